"""`tokenferry trace`: clocks, phases, events, and the output. The kernels' part: tests/emulator, tests/cuda."""

import json

import pytest
import torch

from support import trace_jobs
from support.trace_jobs import COMBINE, DISPATCH, T0, block, calls, shifted
from tokenferry.bench.core.gpus import Gpus
from tokenferry.bench.profile.timeline import (
    WAIT,
    Recorded,
    aligned,
    events,
    find_clocks,
    phases,
    rank_times,
    row_waits,
    stacked,
)
from tokenferry.cli import trace
from tokenferry.cli.main import main
from tokenferry.errors import ArgumentError
from tokenferry.kernels.control_block import TRACE, TRACE_ROWS, TRACE_SIGNATURE
from tokenferry.testing.world import World

CALL = Recorded("decode_dispatch", DISPATCH)

# ------------------------------------------------------------------ clocks


def even(num_ranks, ns):
    return [[0 if a == b else ns for b in range(num_ranks)] for a in range(num_ranks)]


@pytest.mark.parametrize("offsets", [(0,), (0, 5000), (0, -5001), (0, 8_000_000_000, -3, 77)])
def test_offsets_that_are_known(offsets):
    clocks = find_clocks(shifted(calls(len(offsets), even(len(offsets), 1300)), offsets))
    assert clocks.offset_ns == offsets
    assert clocks.error_ns == (1300 if len(offsets) > 1 else 0)


def test_rank_0_is_the_one_whose_clock_counts():
    assert find_clocks(shifted(calls(3, even(3, 900)), (40, 0, -60))).offset_ns == (0, -40, -100)


def test_ways_that_are_not_as_long_are_within_the_bound():
    way = [[0, 2000, 900], [700, 0, 1100], [900, 1500, 0]]
    offsets = (0, 10_000, -20_000)
    clocks = find_clocks(shifted(calls(3, way), offsets))
    assert clocks.error_ns == 1350
    for found, right in zip(clocks.offset_ns, offsets, strict=True):
        assert abs(found - right) <= clocks.error_ns
    assert clocks.offset_ns != offsets


def test_calls_in_which_a_rank_looks_late_do_not_count():
    """Only when rank 0 is late does rank 1 see its message as soon as it comes."""
    one_way = torch.stack(
        [trace_jobs.messages([0, 9000], even(2, 1300)), trace_jobs.messages([9000, 0], even(2, 1300))]
    )
    assert find_clocks(shifted(one_way, (0, 500))).offset_ns == (0, 500)
    assert find_clocks(shifted(one_way[:1], (0, 500))).offset_ns != (0, 500)


def test_ranks_without_messages_of_each_other():
    words = calls(3, even(3, 900))
    words[:, 1, :, TRACE_SIGNATURE + 2] = 0
    with pytest.raises(ArgumentError, match="rank 1 has seen no message of rank 2"):
        find_clocks(words)


def test_aligned_keeps_what_was_not_written():
    clocks = find_clocks(shifted(calls(2, even(2, 1300)), (0, 123_456)))
    assert torch.equal(aligned(Recorded("x", shifted(DISPATCH, (0, 123_456))), clocks).words, DISPATCH)


def test_stacked_fills_up_with_blocks_that_did_not_run():
    words = stacked([torch.ones(5, 3, 32), torch.full((5, 2, 32), 2)])
    assert words.shape == (5, 2, 3, 32)
    assert words[4, :, :, 7].tolist() == [[1, 1, 1], [2, 2, 0]]


# ------------------------------------------------------------------ phases


def spans(words, **options):
    return [(phase.name, phase.start_ns - T0, phase.end_ns - T0) for phase in phases(words.tolist(), **options)]


def test_phases_of_a_block():
    assert spans(DISPATCH[0, 0]) == [
        ("read, wait for space", 1000, 2000),
        ("send", 2000, 5000),
        ("wait for counts", 5000, 6500),
        ("receive", 6500, 9000),
    ]


def test_phases_of_the_last_block():
    assert spans(DISPATCH[0, 2], last=True) == [
        ("read, wait for space", 1050, 2100),
        ("send counts", 2100, 3100),
        (WAIT, 3100, 5600),
        ("wait for counts", 5600, 6000),
    ]


def test_what_was_not_written_is_no_phase():
    assert spans(COMBINE[0, 1]) == [
        ("read, wait for space", 21100, 22200),
        ("send", 22200, 26200),
        ("receive", 26200, 29900),
    ]
    assert spans(block(start=5, sent=9)) == [("send", 5, 9)]
    assert spans(block()) == []
    assert spans(block(start=100, ready=200, sent=300, signature={1: 250}), last=True)[-1] == ("send counts", 200, 300)


def test_times_of_ranks():
    first, second = rank_times(CALL)
    assert (first.late_us, second.late_us) == (0.0, 1.0)
    assert (first.lasts_us, second.lasts_us) == (8.9, 7.6)
    assert first.phases["send"] == (3.5, 4.0)
    assert first.phases["wait for counts"] == pytest.approx((0.95, 1.5))
    assert first.waits_us == {1: 2.5}, "from 3100, when it had sent its own, to 5600"
    assert first.waited_longest == 1
    assert second.waits_us == {0: 0.2}


def test_a_message_that_is_there_is_not_waited_for():
    words = DISPATCH.clone()
    words[0, 2, TRACE_SIGNATURE + 1] = T0 + 2500
    assert rank_times(Recorded("x", words))[0].waits_us == {1: 0.0}


def test_a_rank_that_wrote_nothing():
    words = DISPATCH.clone()
    words[1] = 0
    with pytest.raises(ArgumentError, match="decode_dispatch: rank 1 recorded nothing"):
        rank_times(Recorded("decode_dispatch", words))


def test_row_waits_begin_when_all_messages_are_there():
    other = DISPATCH + torch.where(DISPATCH > 0, 1, 0) * 1_000_000
    other[0, 1, 17] += 200
    waits = row_waits(torch.stack([DISPATCH, other]))
    assert waits.tolist() == [[0.0, 4200.0], [4200.0, 0.0]]
    other[:, :, 16:24] = 0
    assert row_waits(other[None]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# ------------------------------------------------------------------ events


def test_events():
    found = events([CALL, Recorded("decode_combine", COMBINE)])
    json.dumps(found)
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert threads == {
        **{(r, b): f"block {b}" for r in range(2) for b in range(2)},
        **{(r, 2): "block 2: counts" for r in range(2)},
        (0, 4): "from rank 1",
        (1, 3): "from rank 0",
    }
    assert {e["args"]["name"] for e in found if e["name"] == "process_name"} == {"rank 0", "rank 1"}
    complete = [e for e in found if e["ph"] == "X"]
    assert all(e["dur"] > 0 and e["ts"] >= 0 for e in complete)
    assert {"cat": "decode_dispatch", "pid": 1, "tid": 1, "ph": "X", "name": "send", "ts": 2.2, "dur": 4.0} in complete
    assert {"cat": "decode_combine", "pid": 0, "tid": 0, "ph": "X", "name": "send", "ts": 21.0, "dur": 3.0} in complete
    journey = [(e["name"], e["ts"], e["dur"]) for e in complete if (e["pid"], e["tid"]) == (0, 4)]
    assert journey[:2] == [("message", 3.0, 1.6), ("rows", 4.6, 4.1)], "sent at 4000 by rank 1, seen at 5600"
    instants = [(e["pid"], e["tid"], e["name"], e["ts"]) for e in found if e["ph"] == "i"]
    assert (0, 1, "last row of rank 1", 8.7) in instants
    assert len(instants) == 14


def test_a_message_never_arrives_before_it_was_sent():
    """Clocks are not exact: what would take less than no time takes none."""
    words = shifted(DISPATCH, (0, 5000))
    messages = [e for e in events([Recorded("x", words)]) if e["name"] == "message"]
    assert [e["dur"] for e in messages if e["pid"] == 0] == [0.0]


def test_a_rank_without_rows_for_another():
    words = DISPATCH.clone()
    words[0, :, TRACE_ROWS + 1] = 0
    found = [e for e in events([Recorded("x", words)]) if e["ph"] == "X" and (e["pid"], e["tid"]) == (0, 4)]
    assert [e["name"] for e in found] == ["message"]


# ------------------------------------------------------------------ the command


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(trace, "need_gpus", lambda: 2)
    monkeypatch.setattr(trace, "find_gpus", lambda: Gpus(2, "H200", "13.0", ()))
    monkeypatch.setattr(trace, "World", lambda ranks, devices, timeout_s: World(ranks, timeout_s=timeout_s))
    monkeypatch.setattr(trace, "record_calls", trace_jobs.recorded)


def test_command(two_gpus, capsys, tmp_path):
    file = tmp_path / "a.json"
    assert main(["trace", "--json", str(file), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "clocks of the ranks relative to that of rank 0: 0.00, 123.46 us" in out
    assert "error at most 1.30 us" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(("0 ", "1 "))]
    assert len(lines) == 4, "two ranks, two calls"
    assert lines[0][:3] == ["0", "0.0", "8.9"]
    assert lines[0][-3:] == ["rank", "1:", "2.5"]
    assert lines[1][:2] == ["1", "1.1"], "its first block was left out"
    assert "-" in lines[2], "a combine waits for no counts"
    whole = json.loads(file.read_text())
    assert {e["cat"] for e in whole["traceEvents"] if e["ph"] == "X"} == {"decode_dispatch", "decode_combine"}
    assert whole["otherData"]["clock_offsets_ns"] == [0, 123456]
    assert 0 <= whole["otherData"]["clock_error_at_most_ns"] < 20_000
    assert "seed 3" in whole["otherData"]["sizes"]
    assert main(["trace", "--call", "decode_combine", "--json", str(file)]) == 0
    whole = json.loads(file.read_text())
    assert {e["cat"] for e in whole["traceEvents"] if e["ph"] == "X"} == {"decode_combine"}


def test_wrong_answers_are_not_recorded(two_gpus, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trace, "record_calls", trace_jobs.wrong)
    assert main(["trace", "--json", str(tmp_path / "a.json")]) == 1
    assert "rank 0, 1: WrongAnswer: decode round trip" in capsys.readouterr().out
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ranks", "9", "--experts", "9"], "at most 8 ranks"),
        (["--ranks", "3"], "--experts 256 is no multiple of --ranks 3"),
        (["--top-k", "300"], "--top-k 300 exceeds"),
        (["--hidden", "200"], "--hidden 200 is no multiple of 128"),
    ],
)
def test_wrong_sizes(two_gpus, options, text, capsys):
    assert main(["trace", *options]) == 2
    assert text in capsys.readouterr().err


def test_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["trace"]) == 3
    assert "this needs GPUs, and " in capsys.readouterr().err


def test_words_do_not_overlap():
    assert max(TRACE.values()) < TRACE_SIGNATURE
