"""The chaos soak: short runs of it, and that it finds what is wrong."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from support import chaos_spoiled
from tokenferry.testing import chaos
from tokenferry.testing.chaos_calls import Call, Replay, alternating
from tokenferry.testing.chaos_judge import SILENT, Judge, Violation
from tokenferry.testing.chaos_plan import LONG_S, Draw, Soak
from tokenferry.testing.chaos_reports import CallReport, Report

SEEDS = {"shared_memory": 1869, "process_group": 1120}
EPISODES = {"shared_memory": 3, "process_group": 2}
"""With these seeds: ranks that die, with and without a forked child, and one without descriptors; masks; both APIs."""


@pytest.mark.parametrize("transport", SEEDS)
def test_a_short_soak(transport):
    """In a process of its own, since it forks."""
    command = [sys.executable, "-m", "tokenferry.testing.chaos", "--episodes", str(EPISODES[transport])]
    command += ["--ranks", "3", "--transport", transport, "--seed", str(SEEDS[transport])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{EPISODES[transport]} episodes" in done.stdout
    assert "all promises kept" in done.stdout


def test_a_short_soak_over_nodes():
    """One rank is killed, and one has no memory, in calls of two levels."""
    command = [sys.executable, "-m", "tokenferry.testing.chaos", "--episodes", "2"]
    command += ["--ranks", "4", "--ranks-per-node", "2", "--seed", "935"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks (cpu, both --ranks-per-node 2)" in done.stdout
    assert "1 x kill" in done.stdout
    assert "1 x no memory" in done.stdout
    assert "all promises kept" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (["--ranks", "3"], "does not divide --ranks 3"),
        (["--transport", "shared_memory"], "leave out --transport"),
        (["--device", "cuda"], "leave out --transport and --device"),
    ],
)
def test_options_that_exclude_nodes(arguments, verdict, capsys):
    with pytest.raises(SystemExit):
        chaos.main(["--ranks-per-node", "2", *arguments])
    assert verdict in capsys.readouterr().err


def test_the_seeds_draw_what_they_are_for():
    drawn = {t: [Draw(Soak(SEEDS[t], 3, "cpu", t), n).episode() for n in range(EPISODES[t])] for t in SEEDS}
    lost = {transport: {fault.kind for one in drawn[transport] for fault in one.fatal} for transport in SEEDS}
    assert lost == {"shared_memory": {"kill", "fork and kill", "no descriptors"}, "process_group": {"fork and kill"}}
    assert {one.on_timeout for one in drawn["shared_memory"]} == {"raise", "mask"}
    assert {one.shim for one in drawn["shared_memory"]} == {True, False}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    program = [sys.executable, chaos_spoiled.__file__]
    return json.loads(subprocess.run(program, capture_output=True, text=True, timeout=240, check=True).stdout)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("nothing", "all promises kept"),
        ("a row", "a wrong result"),
        ("an error", "OSError, which is no TokenferryError"),
        ("noticed late", "the others were to notice {1: 'kill'} at once"),
        ("a hang", "did not return within"),
        ("a descriptor", "x /memfd:tokenferry"),
        ("a folder", "in the temp directory"),
        ("a process", "was left behind"),
    ],
)
def test_a_broken_promise_is_found(verdicts, name, verdict):
    assert verdict in verdicts[name]


# ---------------------------------------------------------------------- the plan


def test_the_seed_draws_the_plan():
    episodes = [Draw(Soak(seed, 4), number).episode() for seed in (1, 2) for number in (0, 1)]
    assert episodes == [Draw(Soak(seed, 4), number).episode() for seed in (1, 2) for number in (0, 1)]
    assert len({episode.steps for episode in episodes}) == 4


def test_everything_is_drawn():
    episodes = [Draw(Soak(1, 4), number).episode() for number in range(300)]
    faults = {
        (episode.transport, fault.kind) for episode in episodes for step in episode.steps for fault in step.faults
    }
    kinds = {kind for _, kind in faults}
    assert len(kinds) == 10
    assert faults == {(transport, kind) for transport in SEEDS for kind in kinds}
    assert {one.kind for episode in episodes for step in episode.steps for one in step.rounds} == {
        *("throughput", "decode", "large", "replay"),
        *("shim", "shim decode"),
    }
    assert {episode.num_groups for episode in episodes} == {1, 2}
    assert any(step.name == "making" and step.faults for episode in episodes for step in episode.steps)
    assert any(len(episode.fatal) == 2 for episode in episodes)
    assert any(not episode.fatal for episode in episodes)
    assert {episode.transport for episode in episodes if episode.on_timeout == "mask"} == {"shared_memory"}


def test_replays_come_before_any_hook_is_pending():
    """The contract of `decode_dispatch` asks for it: a replay would wait for what the hook has yet to receive."""
    replay = object.__new__(Replay)
    replay.calls = [Call(f"replay {i}", int, frozenset) for i in range(3)]
    decode = SimpleNamespace(calls=[Call("decode_combine", int, frozenset), Call("hook", int, frozenset)])
    for seed in range(20):
        order = [call.name for call in alternating([decode, replay], seed)]
        assert order == ["replay 0", "replay 1", "replay 2", "decode_combine", "hook"]


def test_ranks_that_use_gpus_do_not_fork():
    episodes = [Draw(Soak(1, 2, "cuda"), number).episode() for number in range(300)]
    kinds = {fault.kind for episode in episodes for step in episode.steps for fault in step.faults}
    assert kinds == {"late", "kill", "stop", "leave", "close"}
    assert {episode.on_timeout for episode in episodes} == {"mask", "raise"}


# ---------------------------------------------------------------------- the judge

EPISODE = chaos_spoiled.EPISODE
FINE = Report((CallReport("dispatch", 0.1),))


def lost(*peers, text=SILENT, number=3, took_s=0.1) -> Report:
    """A report of a call that lost its peers."""
    return Report((CallReport("combine", took_s, "PeerTimeout", True, text, peers, number),))


def judge(hurt) -> Judge:
    made = Judge(EPISODE)
    made.hurt.update(hurt)
    return made


@pytest.mark.parametrize(
    ("hurt", "reports", "verdict"),
    [
        ({}, {0: lost(1)}, "no rank was lost"),
        ({2: "kill"}, {0: lost(1), 1: FINE}, r"rank\(s\) \[1\] answered"),
        ({2: "kill"}, {0: lost(1), 1: lost(2)}, r"rank\(s\) \[1\] had sent what belongs to this call"),
        ({2: "kill"}, {0: lost(1, number=4), 1: lost(2)}, None),
        ({2: "kill"}, {0: lost(1, text="closed the group"), 1: lost(2)}, None),
        ({2: "kill"}, {0: lost(2), 1: lost(2)}, None),
        ({2: "kill"}, {0: lost(2, took_s=6.0)}, "were to notice .* at once"),
        ({2: "kill"}, {0: lost(2, took_s=LONG_S + 11)}, "past its deadline"),
        ({2: "stop"}, {0: Report((CallReport("combine", 0.1, "ClosedError"),))}, "reports PeerTimeout"),
        ({2: "no memory"}, {2: Report((CallReport("combine", 0.1, "ClosedError"),))}, None),
        ({2: "kill"}, {0: Report((CallReport("making", 0.1, "BackendUnavailable"),))}, None),
        ({2: "stop"}, {0: Report(masked=frozenset({2}))}, None),
        ({2: "stop"}, {0: Report(masked=frozenset({1, 2})), 1: FINE}, r"masked \[1\], which answered"),
        ({}, {0: Report(wrong="left after close(): a socket")}, "a socket"),
    ],
)
def test_the_judge(hurt, reports, verdict):
    if verdict is None:
        judge(hurt).step(reports)
        return
    with pytest.raises(Violation, match=verdict):
        judge(hurt).step(reports)


def test_a_rank_that_does_not_notice():
    kill, starve = judge({1: "kill"}), judge({1: "no memory"})
    with pytest.raises(Violation, match=r"rank\(s\) \[0\] made calls .* as if nothing had happened"):
        kill.aftermath({0: FINE})
    starve.aftermath({0: FINE})
    starve.step({1: Report((CallReport("combine", 0.1, "CapacityError"),))})
    with pytest.raises(Violation, match=r"rank\(s\) \[0\] made calls"):
        starve.aftermath({0: FINE})


def test_a_process_that_ends_without_a_reason():
    judge({1: "kill"}).died(1, signal.SIGKILL)
    judge({1: "no memory"}).died(1, signal.SIGABRT)
    for hurt in ({1: "stop"}, {1: "no memory"}, {}):
        with pytest.raises(Violation, match="rank 1 ended with status"):
            judge(hurt).died(1, signal.SIGKILL)
