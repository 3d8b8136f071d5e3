"""Timelines and counters of real kernels: what they record on the emulator is consistent."""

import time

import pytest
import torch

from support.emulator import Emulator
from tokenferry.bench.core.device import CpuDevice
from tokenferry.bench.core.inputs import Sizes
from tokenferry.bench.profile import iterations, timeline
from tokenferry.bench.profile.diagnose import Where, judge
from tokenferry.kernels.control_block import MAX_RANKS, TRACE, TRACE_ROWS
from tokenferry.types import MoeShape, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

NAMES = ("decode_dispatch", "decode_combine")


def record(rank, pg, pair, sizes, found):
    with pair.open(pg, sizes.shape) as group, torch.no_grad():
        found[rank] = iterations.record_in(group, CpuDevice(), pair.barrier, sizes, NAMES)
        assert group._backend.decoder.trace is None


def test_a_pair_on_two_ranks(run, monkeypatch):
    monkeypatch.setattr(iterations, "CALIBRATIONS", 6)
    monkeypatch.setattr(iterations, "CHAIN", 3)
    found = {}
    run(2, record, Sizes(2, 8, 256, 2, 4, 5), found)
    both = [found[0], found[1]]
    clocks = timeline.find_clocks(timeline.stacked([one["clocks"] for one in both]))
    # The ranks have the same clock here.
    assert abs(clocks.offset_ns[1]) <= clocks.error_ns
    calls = [timeline.Recorded(name, timeline.stacked([one[name] for one in both])) for name in NAMES]
    for call in calls:
        assert int((call.words[..., TRACE["start"]] > 0).sum()) == 8, "four blocks on each rank"
        for one in timeline.rank_times(call):
            assert {"read, wait for space", "send", "receive"} <= set(one.phases)
            assert one.waited_longest == 1 - one.rank
            assert one.lasts_us > 0
    named = {e["name"] for e in timeline.events(calls) if e["ph"] in "Xi"}
    assert {"send", "send counts", "receive", "message", "last row of rank 0", "last row of rank 1"} <= named
    assert timeline.row_waits(timeline.stacked([one["clocks"] for one in both])).shape == (2, 2)


GOES = ((0, 1), (2,), (0, 2))
"""By rank: the ranks whose experts its tokens choose."""


def take_rows(rank, pg, pair, found):
    """One expert a rank; a dispatch, and a combine of each kind."""
    x, weights = torch.ones(3, 16), torch.ones(3, 2)
    experts = torch.tensor([*GOES[rank], -1, -1])[:2].repeat(3, 1)
    with pair.open(pg, MoeShape(3, 2, 16, 4)) as group:
        recorder = iterations.Recorder(group, 3)
        sent = recorder.call(0, group.decode_dispatch, x, Routing(experts, weights))
        for i, numerics in ((1, "exact"), (2, "fast")):
            recorder.call(i, group.decode_combine, sent.x, sent.plan, numerics=numerics)
        found[rank] = recorder.words()


def test_rows_are_recorded_for_their_source_rank(run):
    found = {}
    run(3, take_rows, found)
    for rank in range(3):
        senders = [source for source in range(3) if rank in GOES[source]]
        for words, sources in zip(found[rank], (senders, GOES[rank], GOES[rank]), strict=True):
            rows = words[:, TRACE_ROWS : TRACE_ROWS + MAX_RANKS]
            assert rows.amax(dim=0).nonzero().flatten().tolist() == list(sources)
            starts = words[:, TRACE["start"], None]
            assert bool(((rows == 0) | (rows >= starts)).all()), "a row came before its block began"


def count(rank, pg, pair, settings, found, late_s=0.0):
    def barrier():
        pair.barrier()
        time.sleep(late_s if rank == 1 else 0.0)

    with pair.open(pg, settings.sizes.shape) as group, torch.no_grad():
        found[rank] = iterations.count_in(group, CpuDevice(), barrier, settings)


def test_a_slow_rank_is_identified(run):
    settings, found = iterations.CountSettings(Sizes(3, 4, 256, 2, 6, 5), 3, slowed=iterations.Slowed(2, 1.0)), {}
    run(3, count, settings, found)
    waits = torch.stack([found[r].dispatch_ns + found[r].combine_ns for r in range(3)])
    assert waits[0, 2] > 3 * 0.7e9
    rows = timeline.row_waits(timeline.stacked([found[r].words for r in range(3)]))
    [slow] = judge(waits / 3, rows, took_ns=4e9).slow  # others may be late by 0.4 s on a busy machine
    assert (slow.rank, slow.where) == (2, Where.COMPUTE)


def test_a_host_that_begins_late_is_not_counted(run):
    found = {}
    run(2, count, iterations.CountSettings(Sizes(2, 4, 256, 2, 6, 5), 2), found, 2.0)
    assert found[0].dispatch_ns[1] + found[0].combine_ns[1] < 1e9
