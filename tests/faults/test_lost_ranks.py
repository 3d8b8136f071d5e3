"""A rank that dies, stalls or calls something else: what the others are told, and that they can go on alone.

Rank 2 of three misbehaves in one phase. Nothing here waits for a clock but the timeouts under test: a stalled rank
waits until the others have written down what they saw.

On GPUs a call may return before the device has found anything, so that the ranks here wait for their calls
(`ExpertGroup.synchronize`, which has nothing to do on the CPU). And nothing tells a GPU that a peer's process has
ended: there a rank that died is one that does not come.
"""

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.pairs import CPU_PAIRS, CUDA_PAIRS, Pair
from tokenferry import (
    BackendUnavailable,
    ClosedError,
    DispatchOptions,
    ExpertGroup,
    MismatchError,
    PeerTimeout,
    Routing,
    Scale,
    TokenferryError,
)
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError

BAD_RANK = 2
CASE = Case((3, 2, 4), 6, 2, hidden=64, dtype=torch.float32)
PHASES = (
    *("dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine"),
    *("decode_dispatch by hook", "decode_combine by hook"),
)
LONG_S = 30.0
"""More than any rank of a busy machine is late; a rank that died must be noticed much earlier."""
SHORT_S = 2.0
"""Jobs with this timeout start together, so that slow imports on a busy machine are not taken for a fault."""


@dataclasses.dataclass
class Told:
    """What a rank saw."""

    phase: str
    call: int
    rank: int
    peers: tuple[int, ...]
    waited_s: float
    took_s: float
    text: str


def calls(group: ExpertGroup, rank: int) -> dict[str, Callable[[], Any]]:
    """One function a phase; everything that it needs is here already."""
    group.warmup()  # a rank that compiles is not late
    mine = CASE.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing)
    decoded = group.decode_dispatch(mine.x, routing)
    group.synchronize()

    def by_hook() -> None:
        got = group.decode_dispatch(mine.x, routing, return_hook=True)
        got.hook()

    def combine_by_hook() -> None:
        got = group.decode_combine(decoded.x, decoded.plan, return_hook=True)
        got.hook()

    return {
        "dispatch": lambda: group.dispatch(mine.x, routing),
        "redispatch": lambda: group.redispatch(mine.x, sent.plan),
        "combine": lambda: group.combine(sent.x, sent.plan),
        "decode_dispatch": lambda: group.decode_dispatch(mine.x, routing),
        "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan),
        "decode_dispatch by hook": by_hook,
        "decode_combine by hook": combine_by_hook,
    }


def listen(todo: dict[str, Callable[[], Any]], phase: str, group: ExpertGroup) -> Told:
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        done(group, todo[phase])
    error, took = caught.value, time.monotonic() - start
    assert group.backend == "cpu" or re.search(r"epoch \d+ seen.* \d+ expected", str(error)), str(error)
    for call in todo.values():
        with pytest.raises(ClosedError, match="PeerTimeout"):
            call()
    group.close()
    group.close()
    return Told(error.phase, error.call, error.rank, error.peers, error.waited_s, took, str(error))


def done(group: ExpertGroup, call: Callable[[], Any]) -> None:
    """Make a call and wait until it is through."""
    call()
    group.synchronize()


def patience(pair: Pair) -> float:
    """The timeout of a test in which the transport may know at once what has happened."""
    return LONG_S if pair.backend == "cpu" else SHORT_S


def die_in(rank, pg, pair: Pair, phase: str, how: str, folder: str) -> Told:
    together(pg)
    with pair.open(pg, CASE.shape, timeout_s=patience(pair)) as group:
        todo = calls(group, rank)
        if rank != BAD_RANK:
            Path(folder, f"{rank} is ready").touch()
            return listen(todo, phase, group)
        await_others(folder, "is ready")  # or they may still be reading what this rank sent before
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody lives here")


@pytest.mark.parametrize(("phase", "how"), [(phase, ("exit", "kill")[i % 2]) for i, phase in enumerate(PHASES)])
def test_a_rank_that_dies(pair, phase, how, tmp_path):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_in, pair, phase, how, str(tmp_path))
    assert set(caught.value.errors) == {BAD_RANK}, caught.value
    assert isinstance(caught.value.errors[BAD_RANK], ChildProcessError)
    for rank, told in caught.value.results.items():
        check_told(told, rank, phase)
        if pair.backend == "cpu":
            assert told.took_s < LONG_S, "a dead rank is seen at once"
        else:
            check_late(told, rank, phase)


def check_told(told: Told, rank: int, phase: str) -> None:
    name = phase.split()[0]
    assert told.phase == name
    assert told.call == 3, "the first two calls prepared it"
    assert told.rank == rank
    # A rank that was told first closes its group; who waits then may hear that before it sees rank 2.
    assert BAD_RANK in told.peers or "closed" in told.text
    assert f"{name} #3: rank {rank} waited" in told.text
    assert "docs/errors.md#peertimeout" in told.text


def together(pg) -> None:
    pg.barrier().wait()


def stall_in(rank, pg, pair: Pair, phase: str, folder: str) -> Told | None:
    together(pg)
    with pair.open(pg, CASE.shape, timeout_s=SHORT_S) as group:
        todo = calls(group, rank)
        if rank != BAD_RANK:
            told = listen(todo, phase, group)
            Path(folder, f"{rank} was told").touch()
            return told
        Path(folder, "asleep").touch()
        await_others(folder)
        with pytest.raises(TokenferryError):
            twice(group, todo[phase])  # what the others sent before they left may still be here, but no more
    return None


def twice(group: ExpertGroup, call: Callable[[], Any]) -> None:
    done(group, call)
    done(group, call)


def await_others(folder: str, what: str = "was told") -> None:
    while len(list(Path(folder).glob(f"* {what}"))) < 2:
        time.sleep(0.01)


@pytest.mark.parametrize("phase", ["dispatch", "combine", "decode_dispatch", *PHASES[4:]])
def test_a_rank_that_sleeps(pair, phase, tmp_path):
    with World(3, devices=pair.backend) as world:
        results = world.run(stall_in, pair, phase, str(tmp_path))
    check_both_late(results, phase)


def check_both_late(results: list[Told], phase: str) -> None:
    for rank in (0, 1):
        check_late(results[rank], rank, phase)
    assert max(results[0].waited_s, results[1].waited_s) >= SHORT_S


def check_late(told: Told, rank: int, phase: str) -> None:
    check_told(told, rank, phase)
    assert told.peers == (BAD_RANK,)
    # A GPU that gives up tells its peers, who need not wait for their own deadlines.
    heard = f"rank {1 - rank} gave it up" in told.text
    assert 0 <= told.waited_s < SHORT_S + 10.0
    assert heard or told.waited_s >= SHORT_S
    assert told.took_s < SHORT_S + 10.0


def test_a_rank_that_is_stopped(pair, tmp_path):
    """As under a debugger: its sockets stay open, and it says nothing."""
    with World(3, devices=pair.backend) as world:
        world.submit(stall_in, pair, "dispatch", str(tmp_path))
        deadline = time.monotonic() + 60.0
        while not Path(tmp_path, "asleep").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(world.pids[BAD_RANK], signal.SIGSTOP)
        try:
            while len(list(tmp_path.glob("* was told"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(world.pids[BAD_RANK], signal.SIGCONT)
        results = world.collect()
    check_both_late(results, "dispatch")


def come_late_to_the_group(rank, pg, pair: Pair, folder: str) -> Told | None:
    together(pg)
    if rank == BAD_RANK:
        await_others(folder)
        with pytest.raises(TokenferryError):
            pair.open(pg, CASE.shape, timeout_s=SHORT_S)
        return None
    with pytest.raises(PeerTimeout) as caught:
        pair.open(pg, CASE.shape, timeout_s=SHORT_S)
    Path(folder, f"{rank} was told").touch()
    error = caught.value
    return Told(error.phase, error.call, error.rank, error.peers, error.waited_s, 0.0, str(error))


def test_a_rank_that_does_not_come(pair, tmp_path):
    with World(3, devices=pair.backend) as world:
        results = world.run(come_late_to_the_group, pair, str(tmp_path))
    for rank in (0, 1):
        told = results[rank]
        assert (told.phase, told.call, told.rank) == ("making the group", 0, rank)
        assert BAD_RANK in told.peers
        assert told.waited_s < SHORT_S + 10.0


def die_before_the_group(rank, pg, pair: Pair) -> Told:
    if rank == BAD_RANK:
        os._exit(1)
    with pytest.raises(PeerTimeout) as caught:
        pair.open(pg, CASE.shape, timeout_s=LONG_S)
    error = caught.value
    return Told(error.phase, error.call, error.rank, error.peers, error.waited_s, 0.0, str(error))


def test_a_rank_that_dies_before_it_comes(pair):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_before_the_group, pair)
    assert set(caught.value.errors) == {BAD_RANK}, caught.value
    for rank, told in caught.value.results.items():
        assert (told.phase, told.call, told.rank) == ("making the group", 0, rank)
        assert told.waited_s < LONG_S


def go_on_without(rank, pg, pair: Pair, folder: str) -> None:
    """With on_timeout="mask", decode calls go on without rank 2; the others still raise."""
    together(pg)
    step = Step(CASE, rank, frozenset({BAD_RANK}))
    with pair.open(pg, CASE.shape, timeout_s=SHORT_S, on_timeout="mask") as group:
        everyone = Step(CASE, rank)
        sent = group.decode_dispatch(everyone.mine().x, everyone.routing())
        check_received(everyone, sent, None)
        if rank == BAD_RANK:
            await_others(folder)
            return
        late = group.decode_dispatch(step.mine().x, step.routing(), return_hook=rank == 1)
        late.hook()
        assert group.masked_ranks == {BAD_RANK}
        start = time.monotonic()
        for _ in range(3):
            sent = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, sent, None)
            check_combined(group, step, sent, torch.bfloat16)
            check_combined(group, step, sent, torch.float32, fast=True, hook=True)
        assert time.monotonic() - start < SHORT_S * 9, "nobody waits for a masked rank again"
        with pytest.raises(PeerTimeout):
            group.dispatch(step.mine().x, step.routing())
        Path(folder, f"{rank} was told").touch()


def test_decoding_goes_on_without_a_silent_rank(tmp_path):
    with World(3) as world:
        world.run(go_on_without, CPU_PAIRS[0], str(tmp_path))


def mask_over_torch_distributed(rank, pg) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"on_timeout='mask' needs the transport 'shared_memory'.* use on_timeout='raise'"
    ):
        ExpertGroup(pg, CASE.shape, backend="cpu", transport="process_group", on_timeout="mask")
    with ExpertGroup(pg, CASE.shape, transport="auto", on_timeout="mask") as group:
        assert group.backend == "cpu"
        assert group.transport == "shared_memory"


def test_masking_on_timeout_needs_shared_memory(worlds):
    worlds(3).run(mask_over_torch_distributed)


def close_alone(rank, pg, pair: Pair) -> None:
    """Rank 0 closes; nobody is asked, results stay, and the other rank is told when it calls."""
    together(pg)
    case = Case((3, 4), 4, 2, dtype=torch.float32)
    group = pair.open(pg, case.shape, timeout_s=LONG_S if pair.transport == "shared_memory" else SHORT_S)
    group.warmup()
    view = group.for_shape(case.shape)
    mine = case.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing)
    out = group.combine(sent.x, sent.plan)
    kept = sent.x.clone(), out.x.clone()
    if rank == 1:
        with pytest.raises(PeerTimeout, match=r"rank 1 waited .* for rank 0"):
            group.dispatch(mine.x, routing)
    group.close()
    group.close()
    view.close()
    for call in (
        lambda: view.dispatch(mine.x, routing),
        lambda: group.for_shape(case.shape),
        lambda: group.mask(1 - rank),
    ):
        with pytest.raises(ClosedError, match="make a new ExpertGroup"):
            call()
    assert torch.equal(sent.x, kept[0])
    assert torch.equal(out.x, kept[1])


def test_closing_is_local_and_idempotent(pair):
    with World(2, devices=pair.backend) as world:
        world.run(close_alone, pair)


def close_with_a_hook_pending(rank, pg, pair: Pair) -> None:
    case = Case((3, 4), 4, 2, dtype=torch.float32)
    mine = case.inputs()[rank]
    with pair.open(pg, case.shape, timeout_s=LONG_S) as group:
        got = group.decode_dispatch(mine.x, Routing(mine.topk_idx), return_hook=True)
    with pytest.raises(ClosedError, match="closed"):
        got.hook()


def test_a_hook_of_a_closed_group_says_so():
    with World(2) as world:
        world.run(close_with_a_hook_pending, CPU_PAIRS[0])


MISMATCHES: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "another method": (
        lambda g, x, r, sent: g.combine(sent.x, sent.plan),
        lambda g, x, r, sent: g.dispatch(x, r),
        "dispatch",
    ),
    "another dtype": (
        lambda g, x, r, sent: g.dispatch(x.bfloat16(), r),
        lambda g, x, r, sent: g.dispatch(x, r),
        "torch.bfloat16",
    ),
    "another layout": (
        lambda g, x, r, sent: g.dispatch(x, r, options=DispatchOptions(counts="device")),
        lambda g, x, r, sent: g.dispatch(x, r),
        "counts",
    ),
    "weights and none": (
        lambda g, x, r, sent: g.dispatch(x, Routing(r.topk_idx)),
        lambda g, x, r, sent: g.dispatch(x, r),
        "weights",
    ),
    "another shape": (
        lambda g, x, r, sent: g.for_shape(dataclasses.replace(g.shape, max_tokens=99)).dispatch(x, r),
        lambda g, x, r, sent: g.dispatch(x, r),
        "max_tokens",
    ),
    "the other decode call": (
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_combine"),
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_dispatch"),
        "different calls",
    ),
    "decoding and not": (
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_dispatch"),
        lambda g, x, r, sent: after_decoding(g, x, r, "dispatch"),
        "different calls",
    ),
    "another cast": (
        lambda g, x, r, sent: g.decode_dispatch(x, r, quantize=Scale.FLOAT32),
        lambda g, x, r, sent: g.decode_dispatch(x, r, quantize=Scale.UE8M0),
        "fp8 scale is",
    ),
    "the plan of another dispatch": (
        lambda g, x, r, sent: decode_twice(g, x, r, 0),
        lambda g, x, r, sent: decode_twice(g, x, r, 1),
        "dispatch",
    ),
    "other numerics": (
        lambda g, x, r, sent: decode_round(g, x, r, "fast"),
        lambda g, x, r, sent: decode_round(g, x, r, "exact"),
        "",
    ),
}


def after_decoding(group: ExpertGroup, x: torch.Tensor, routing: Routing, name: str) -> None:
    got = group.decode_dispatch(x, routing)
    if name == "decode_combine":
        group.decode_combine(got.x, got.plan)
    else:
        getattr(group, name)(x, routing)


def decode_twice(group: ExpertGroup, x: torch.Tensor, routing: Routing, which: int) -> None:
    """Combine one of two dispatches of the same routing: counts do not tell them apart."""
    got = [group.decode_dispatch(rows, routing) for rows in (x, 2 * x)]
    group.decode_combine(got[which].x, got[which].plan)


def decode_round(group: ExpertGroup, x: torch.Tensor, routing: Routing, numerics: str) -> None:
    got = group.decode_dispatch(x, routing)
    group.decode_combine(got.x, got.plan, numerics=numerics)


def disagree(rank, pg, pair: Pair, name: str) -> str:
    """The last rank calls something else than the others."""
    one, other, _ = MISMATCHES[name]
    case = dataclasses.replace(CASE, tokens=CASE.tokens[: pg.size()])
    mine = case.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    with pair.open(pg, case.shape, timeout_s=LONG_S) as group:
        sent = group.dispatch(mine.x, routing)
        call = one if rank == pg.size() - 1 else other
        with pytest.raises(MismatchError) as caught:
            done(group, lambda: call(group, mine.x, routing, sent))
        with pytest.raises(ClosedError, match="MismatchError"):
            group.dispatch(mine.x, routing)
    return str(caught.value)


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("pair", [CPU_PAIRS[0], *CUDA_PAIRS], ids=str)
def test_ranks_that_call_different_things(worlds, pair, name):
    for rank, text in enumerate(worlds(3, pair.backend).run(disagree, pair, name)):
        check_mismatch(text, rank, 3, name)


def test_ranks_that_call_different_things_over_torch_distributed():
    with World(3) as world:
        for rank, text in enumerate(world.run(disagree, CPU_PAIRS[1], "another dtype")):
            check_mismatch(text, rank, 3, "another dtype")


def check_mismatch(text: str, rank: int, ranks: int, name: str) -> None:
    assert f"rank {rank}" in text
    if " told rank" not in text:  # who only heard of it names the messenger
        assert f"rank {ranks - 1}" in text
    assert MISMATCHES[name][2] in text or " told rank" in text
