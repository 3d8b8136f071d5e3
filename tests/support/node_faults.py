"""Jobs in which a rank of a group of several nodes fails and lives on, and what it and the others must report."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from support.children import in_child, leave_child
from support.lost_nodes import CASE, LOST_RANK, NUM_RANKS, calls, open_group, twice
from support.lost_ranks import LONG_S, leave_note
from support.mismatches import MISMATCHES, Mismatch
from support.refusals import MOMENTS
from support.throughput import check_round_trip
from tokenferry import ClosedError, DispatchOptions, ExpertGroup, Routing, RoutingError, TokenferryError


@dataclass(frozen=True)
class Caught:
    """What a rank has caught: the class of the error, the ranks that it names, its text, and when it came."""

    name: str
    peers: tuple[int, ...]
    nodes: tuple[int, ...]
    text: str
    took_s: float


def catch(group: ExpertGroup, call: Callable[[], Any]) -> Caught:
    """Make a call that must fail and break the group; what a rank has sent before is enough for some, so twice."""
    start = time.monotonic()
    with pytest.raises((TokenferryError, KeyboardInterrupt)) as caught:
        twice(call)
    error, took_s = caught.value, time.monotonic() - start
    with pytest.raises(ClosedError, match=type(error).__name__):
        call()
    peers, nodes = getattr(error, "peers", ()), getattr(error, "nodes", ())
    return Caught(type(error).__name__, peers, nodes, str(error), took_s)


@contextlib.contextmanager
def new_group(timeout_s: float = LONG_S) -> Iterator[ExpertGroup]:
    """Yield a group on a process group of its own, which gloo may close."""
    with open_group(dist.new_group(list(range(NUM_RANKS)), backend="gloo"), timeout_s) as group:
        yield group


def disagree(rank: int, pg: dist.ProcessGroup, odd: int) -> dict[str, Caught]:
    """Return, by mismatch, what this rank catches when rank ``odd`` makes another call than all others."""
    mine = CASE.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)

    def differ(mismatch: Mismatch) -> Caught:
        call = mismatch.last if rank == odd else mismatch.others
        with new_group() as group:
            sent = group.dispatch(mine.x, routing)
            return catch(group, lambda: call(group, mine.x, routing, sent))

    return {name: differ(mismatch) for name, mismatch in MISMATCHES.items()}


def fail(rank: int, pg: dist.ProcessGroup, name: str, moments: Mapping[str, BaseException]) -> dict[str, Caught]:
    """Return, by moment, what this rank catches when a function of rank 3 raises there.

    Args:
        rank: This rank.
        pg: Connects all ranks.
        name: The call.
        moments: By the name of the function, what it raises.
    """
    caught = {}
    for target, error in moments.items():
        with new_group() as group:
            call = calls(group)[name]
            dist.barrier(pg)
            failing = mock.patch(target.format(call=name), side_effect=error)
            with failing if rank == LOST_RANK else contextlib.nullcontext():
                caught[target] = catch(group, call)
    return caught


TRANSPORTS = ("shared_memory.SharedMemoryTransport", "process_group.ProcessGroupTransport")


def refusals() -> dict[str, Exception]:
    """Return the moments of `support.refusals`; in those of a transport, either of the two transports refuses."""
    found = {}
    for target, error, _ in MOMENTS.values():
        for transport in TRANSPORTS:
            found[target.replace("TRANSPORT", f"tokenferry.transports.{transport}")] = error
    return found


def interrupts() -> dict[str, BaseException]:
    """Return moments at which the user interrupts rank 3."""
    return {f"tokenferry.transports.{transport}.receive": KeyboardInterrupt() for transport in TRANSPORTS}


def close_alone(rank: int, pg: dist.ProcessGroup, timeout_s: float) -> Caught | None:
    """Rank 3 passes a wrong argument, which does no harm; then it closes, and waits until the others notice."""
    caught = None
    with new_group(timeout_s) as group:
        call = calls(group)["dispatch"]
        if rank == LOST_RANK:
            mine = CASE.inputs()[rank]
            with pytest.raises(RoutingError):
                group.dispatch(mine.x, Routing(torch.full_like(mine.topk_idx, CASE.experts)))
        check_round_trip(group, CASE, DispatchOptions())
        dist.barrier(pg)
        if rank == LOST_RANK:
            group.close()
        else:
            caught = catch(group, call)
    dist.barrier(pg)
    return caught


def fork(rank: int, pg: dist.ProcessGroup, folder: str) -> Caught:
    """Calls of forked children raise, and change nothing; then rank 3 is killed, and a child of it lives on."""
    with new_group() as group:
        todo = calls(group)

        def in_vain() -> None:
            for call in todo.values():
                with pytest.raises(ClosedError, match="belongs to process"):
                    call()
            group.close()

        in_child(in_vain)
        check_round_trip(group, CASE, DispatchOptions())
        dist.barrier(pg)
        if rank == LOST_RANK:
            leave_note(folder, leave_child("fork"), "is a child")
            os.kill(os.getpid(), signal.SIGKILL)
        return catch(group, todo["combine"])
