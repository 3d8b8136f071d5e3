"""`tokenferry diagnose`: the verdict on counters that are known, and on ranks of this machine."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from support import diagnose_jobs
from tokenferry.bench.profile.diagnose import Slow, Where, judge, show_ns
from tokenferry.bench.profile.iterations import need_one_node
from tokenferry.cli import diagnose
from tokenferry.cli.main import main
from tokenferry.cli.screen import Screen
from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.testing.world import World
from tokenferry.topology import Topology, consecutive

WAY = 1300.0
"""Nanoseconds that every message is waited for on a GPU."""


def at_once(comes):
    """``[R, R]`` as GPUs count: rank r is there at comes[r] and waits for all messages at the same time."""
    t = torch.tensor(comes, dtype=torch.float64)
    return (t[None, :] - t[:, None]).clamp(min=0) + WAY


def in_turn(comes):
    """``[R, R]`` as CPUs count: rank r waits for one message after the other, by rank."""
    waits = torch.zeros(len(comes), len(comes), dtype=torch.float64)
    for r, now in enumerate(comes):
        for s, there in enumerate(comes):
            waits[r, s] = max(there - now, 0.0)
            now = max(now, there)
    return waits


def rows(num_ranks, late=()):
    """``[R, R]``: the further behind in the order, the later; ``late``: (receiver, sender, more)."""
    r = torch.arange(num_ranks)
    usual = 5000.0 + 2000.0 * ((r[None, :] - r[:, None]) % num_ranks)
    for receiver, sender, more in late:
        usual[receiver, sender] += more
    return usual


def found(verdict):
    return [(one.rank, one.where) for one in verdict.slow]


# ------------------------------------------------------------------ compute


@pytest.mark.parametrize("count", [at_once, in_turn])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("slow", [0, 1, -1])
def test_one_slow_in_compute(count, num_ranks, slow):
    comes = [0.0] * num_ranks
    comes[slow] = 50_000.0
    rank = slow % num_ranks
    assert found(judge(count(comes))) == [(rank, Where.UNKNOWN)]
    verdict = judge(count(comes), rows(num_ranks))
    assert found(verdict) == [(rank, Where.COMPUTE)]
    assert verdict.slow[0].late_ns == verdict.late_ns[rank] == pytest.approx(50_000.0)


@pytest.mark.parametrize("count", [at_once, in_turn])
@pytest.mark.parametrize(("comes", "slow"), [([0, 9e4, 0, 9e4], {1, 3}), ([8e4, 9e4, 0, 0, 0, 0, 0, 0], {0, 1})])
def test_two_slow(count, comes, slow):
    verdict = judge(count(comes), rows(len(comes)))
    assert {one.rank for one in verdict.slow} == slow
    assert {one.where for one in verdict.slow} == {Where.COMPUTE}
    assert verdict.slow[0].late_ns >= verdict.slow[1].late_ns
    assert len(verdict.lines()) == 2


def test_no_slow_rank():
    for waits in (torch.zeros(4, 4), torch.zeros(1, 1), at_once([0, 100, 50, 200]), in_turn([0, 0, 0])):
        verdict = judge(waits, rows(len(waits)))
        assert verdict.slow == ()
        assert verdict.lines() == ["no rank stands out"]


def test_the_wait_for_the_first_covers_that_for_the_second():
    """No single wait shows rank 2, whose message comes while all ranks wait for rank 0."""
    waits = in_turn([7000.0, 0.0, 7000.0, 0.0])
    assert waits[:, 2].max() == 0
    assert found(judge(waits)) == [(0, Where.UNKNOWN), (2, Where.UNKNOWN)]


def test_small_lateness_is_not_reported():
    waits = at_once([0, 0, 50_000.0])
    assert found(judge(waits, took_ns=400_000.0)) == [(2, Where.UNKNOWN)]
    assert judge(waits, took_ns=600_000.0).slow == ()


def test_one_early_is_told_from_many_late():
    verdict = judge(at_once([0, 9e4, 9e4, 9e4]), rows(4))
    assert [one.rank for one in verdict.slow] == [1, 2, 3]
    assert verdict.lines()[-1] == "most ranks are late: or is there less to do for rank 0?"


def test_waits_for_oneself_do_not_count():
    waits = torch.zeros(3, 3, dtype=torch.int64)
    waits[1, 1] = 10**9
    assert judge(waits).slow == ()


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_a_slow_link_outwards(num_ranks):
    late = [(r, 1, 60_000.0) for r in range(num_ranks) if r != 1]
    verdict = judge(at_once([0.0] * num_ranks), rows(num_ranks, late))
    [slow] = verdict.slow
    assert (slow.rank, slow.where, slow.peers) == (1, Where.LINK_OUT, tuple(r for r in range(num_ranks) if r != 1))
    assert slow.late_ns == pytest.approx(60_000.0, rel=0.15), "what is usual is a median"


def test_a_slow_link_outwards_makes_its_receivers_late():
    """They finish late, come late to the next call, and all wait for them: not their fault."""
    late = [(r, 1, 60_000.0) for r in (0, 2, 3)]
    comes = [60_000.0, 0.0, 60_000.0, 60_000.0]
    assert found(judge(at_once(comes), rows(4))) == [(0, Where.COMPUTE), (2, Where.COMPUTE), (3, Where.COMPUTE)]
    assert found(judge(at_once(comes), rows(4, late))) == [(1, Where.LINK_OUT)]


def test_rows_that_queue_behind_late_ones_are_not_late_themselves():
    """At rank 0 rows of 1, 2, 3 are taken in this order; at rank 2 those of 3, 0, 1; at rank 3 those of 0, 1, 2."""
    late = [(r, s, 60_000.0) for r, s in ((0, 1), (0, 2), (0, 3), (2, 1), (3, 1), (3, 2))]
    verdict = judge(at_once([0.0] * 4), rows(4, late))
    assert verdict.slow == (Slow(1, Where.LINK_OUT, 60_000.0, (0, 2, 3)),)


def test_rows_that_are_later_still_have_a_link_of_their_own():
    late = [*((r, 1, 60_000.0) for r in (0, 2, 3)), *((r, 2, 200_000.0) for r in (0, 1, 3))]
    by_rank = {one.rank: (one.where, one.peers) for one in judge(at_once([0.0] * 4), rows(4, late)).slow}
    assert by_rank == {1: (Where.LINK_OUT, (0, 2, 3)), 2: (Where.LINK_OUT, (0, 1, 3))}


def test_a_slow_link_inwards():
    late = [(2, s, 40_000.0 + s) for s in (0, 1, 3)]
    verdict = judge(at_once([0.0, 0.0, 40_000.0, 0.0]), rows(4, late))
    assert verdict.slow == (Slow(2, Where.LINK_IN, 40_003.0, (0, 1, 3)),)
    assert verdict.lines() == [
        "rank 2: slow in its link: rows of ranks 0, 1, 3 come 40.0 us late here, and not elsewhere"
    ]


def test_one_pair():
    verdict = judge(at_once([0.0, 0.0, 0.0]), rows(3, [(2, 0, 90_000.0)]))
    assert verdict.slow == (Slow(0, Where.LINK_OUT, 90_000.0, (2,)),)
    assert verdict.lines() == ["rank 0: slow in its link: its messages come in time, its rows 90.0 us late at rank 2"]


def test_one_slow_in_compute_and_another_in_its_link():
    late = [(r, 3, 60_000.0) for r in (0, 1, 2)]
    verdict = judge(at_once([0.0, 300_000.0, 0.0, 0.0]), rows(4, late))
    assert found(verdict) == [(1, Where.COMPUTE), (3, Where.LINK_OUT)]


def test_rows_of_a_late_rank_come_last():
    """Those of the others are there when the counts are: not a slow link, unless rows are later than their rank."""
    late = [(r, 1, 40_000.0) for r in (0, 2, 3)]
    assert found(judge(at_once([0.0, 50_000.0, 0.0, 0.0]), rows(4, late))) == [(1, Where.COMPUTE)]
    both = found(judge(at_once([0.0, 20_000.0, 0.0, 0.0]), rows(4, late)))
    assert both == [(1, Where.LINK_OUT), (1, Where.COMPUTE)]


def test_a_slightly_late_link_does_not_explain_a_very_late_rank():
    """Rank 2 comes 300 us late; rows that came 60 us late are not the reason."""
    verdict = judge(at_once([0.0, 0.0, 300_000.0, 0.0]), rows(4, [(2, s, 60_000.0) for s in (0, 1, 3)]))
    assert found(verdict) == [(2, Where.COMPUTE), (2, Where.LINK_IN)]


def test_slightly_late_rows_are_not_reported():
    assert judge(at_once([0.0] * 4), rows(4, [(0, 1, 3000.0), (2, 3, 6000.0)])).slow == ()
    few = rows(4, [(0, 1, 60_000.0)])
    assert judge(at_once([0.0] * 4), few, took_ns=7e5).slow == ()
    nothing = torch.zeros(4, 4, dtype=torch.int64)
    assert judge(at_once([0.0] * 4), nothing).slow == ()


# ------------------------------------------------------------------ wrong counters, words


def test_wrong_counters():
    good = torch.zeros(3, 3)
    for wait, row, text in (
        (torch.zeros(3, 2), None, r"wait_ns: expected \[R, R\] = \[3, 3\], got \[3, 2\]"),
        (good, torch.zeros(2, 2), r"row_ns: expected \[R, R\] = \[3, 3\], got \[2, 2\]"),
        (good - 5, None, "wait_ns: expected nanoseconds >= 0, got -5"),
    ):
        with pytest.raises(ArgumentError, match=text):
            judge(wait, row)


def test_counters_are_left_as_they_are():
    waits = torch.ones(3, 3, dtype=torch.int64)
    judge(waits, waits)
    assert waits.tolist() == [[1] * 3] * 3


@pytest.mark.parametrize(("ns", "text"), [(40.0, "0.0 us"), (12_345.0, "12.3 us"), (5e6, "5.00 ms"), (2.5e9, "2.50 s")])
def test_times_for_people(ns, text):
    assert show_ns(ns) == text


# ------------------------------------------------------------------ the command

SMALL = ["--ranks", "3", "--tokens", "4", "--hidden", "128", "--experts", "6", "--top-k", "2"]


def test_a_slow_rank_of_this_machine(capsys, tmp_path):
    file = tmp_path / "report.json"
    slow = ["--iterations", "6", "--slow-rank", "1", "--slow-us", "200000"]
    assert main(["diagnose", *SMALL, *slow, "--json", str(file), "--plot", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "rank 1: slow: its messages come " in out
    assert "whether it computes for too long or its link is slow is unknown" in out
    assert "decode_combine, us an iteration" in out
    whole = json.loads(file.read_text())
    assert [one["rank"] for one in whole["slow"]] == [1]
    assert whole["slow"][0]["where"] == "compute or link"
    assert whole["slow"][0]["late_ns"] > 100e6
    assert whole["iteration_ns"] > 200e6
    waits = whole["tables_ns"]["decode_dispatch"]
    assert min(waits[0][1], waits[2][1]) > 100e6 > waits[1][0]
    both = torch.tensor(waits) + torch.tensor(whole["tables_ns"]["decode_combine"])
    assert both.sum(1).max() <= whole["iteration_ns"], "waits are part of the iterations that count"
    assert (tmp_path / "waits.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_with_the_times_of_rows(monkeypatch, capsys):
    """As on GPUs: rank 1 sends its rows late, its messages in time."""
    monkeypatch.setattr(diagnose, "need_gpus", lambda: 2)
    monkeypatch.setattr(diagnose, "count_waits", diagnose_jobs.late_rows)
    monkeypatch.setattr(diagnose, "World", lambda ranks, devices, timeout_s: World(ranks, timeout_s=timeout_s))
    assert main(["diagnose", "--device", "cuda", "--ranks", "2", "--iterations", "2"]) == 0
    out = capsys.readouterr().out
    assert "rows of decode_dispatch, us an iteration: after all messages, wait for the last row of each rank" in out
    assert "rank 1: slow in its link: its messages come in time, its rows 80.0 us late at rank 0" in out


def test_heat_has_colours_with_rich(terminal):
    waits = diagnose.Waits(dict.fromkeys(diagnose.WAITS, at_once([0, 9e4, 0, 0])), 1e5)
    diagnose.show(waits, diagnose.judge_all(waits), Screen())
    assert "48;5;160" in terminal.getvalue(), "the hottest cell, red"
    assert "91.3 █" in terminal.getvalue()


def test_no_slow_rank_is_printed(capsys):
    waits = diagnose.Waits(dict.fromkeys(diagnose.WAITS, torch.zeros(2, 2)), 1e5)
    diagnose.show(waits, diagnose.judge_all(waits), Screen())
    assert capsys.readouterr().out.splitlines()[-1] == "no rank stands out"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--slow-rank", "1"], "one makes no sense without the other"),
        (["--slow-us", "100"], "one makes no sense without the other"),
        (["--slow-rank", "4", "--slow-us", "100"], "expected one of 0..3, of --ranks 4"),
        (["--slow-rank", "7"], "--slow-rank 7: expected one of 0..3"),
        (["--ranks", "5"], "--experts 32 is no multiple of --ranks 5"),
    ],
)
def test_wrong_options(options, text, capsys):
    assert main(["diagnose", *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", [["diagnose", "--ranks", "4"], ["trace", "--ranks", "4"]])
def test_several_nodes_are_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("TOKENFERRY_RANKS_PER_NODE", "2")
    assert main(command) == 2
    assert "TOKENFERRY_RANKS_PER_NODE=2 makes several nodes of 4 ranks" in capsys.readouterr().err
    monkeypatch.setenv("TOKENFERRY_RANKS_PER_NODE", "4")
    assert diagnose.make_sizes(Namespace(experts=8, hidden=128, tokens=1, top_k=1, seed=1), 4).ranks == 4


def test_nodes_that_a_group_has_found_are_refused():
    """GPUs that cannot map each other's memory."""
    topology = Topology(1, consecutive(4, 2), found="GPU 0 and GPU 1 cannot map each other's memory")
    with pytest.raises(ConfigError, match=r"these are 2 nodes of 2 ranks \(GPU 0 and GPU 1 cannot map"):
        need_one_node(SimpleNamespace(topology=topology))
    need_one_node(SimpleNamespace(topology=Topology(1, consecutive(4, 4))))


def test_wrong_answers_are_not_counted(monkeypatch, capsys):
    monkeypatch.setattr(diagnose, "count_waits", diagnose_jobs.wrong)
    assert main(["diagnose", *SMALL]) == 1
    out = capsys.readouterr().out
    assert "WrongAnswer: decode round trip" in out
    assert "us an iteration" not in out
