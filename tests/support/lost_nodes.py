"""Jobs in which a rank of a group of several nodes dies, stalls or does not call, in one leg of a call."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.lost_ranks import leave_note
from support.throughput import all_options, check_round_trip
from tokenferry import ClosedError, ExpertGroup, PeerTimeout, Routing
from tokenferry.testing.cases import Case

LOST_RANK = 3
LOST_NODE = 1
RANKS_PER_NODE = 2
NUM_RANKS = 6
CASE = Case((3, 2, 4, 5, 1, 3), 12, 4, hidden=64, dtype=torch.float32)


@dataclass(frozen=True)
class Loss:
    """How rank 3, on node 1, is lost.

    Attributes:
        call: The call during which it is lost.
        exchange: Which exchange of that call it does not make; 0: it never calls.
        how: ``"kill"`` or ``"stall"``.
        folder: Where ranks leave notes for each other.
        timeout_s: The deadline of the group.
    """

    call: str
    exchange: int
    how: str
    folder: str
    timeout_s: float


@dataclass(frozen=True)
class Seen:
    """What a survivor caught, and the seconds that it took."""

    phase: str
    peers: tuple[int, ...]
    nodes: tuple[int, ...]
    took_s: float
    text: str


def calls(group: ExpertGroup) -> dict[str, Callable[[], Any]]:
    """Return a function for each call; all that it needs has been made."""
    mine = CASE.inputs()[group.rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing)
    decoded = group.decode_dispatch(mine.x, routing)
    return {
        "dispatch": lambda: group.dispatch(mine.x, routing),
        "redispatch": lambda: group.redispatch(mine.x, sent.plan),
        "combine": lambda: group.combine(sent.x, sent.plan),
        "decode_dispatch": lambda: group.decode_dispatch(mine.x, routing),
        "decode_dispatch by hook": lambda: group.decode_dispatch(mine.x, routing, return_hook=True).hook(),
        "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan),
        "decode_combine by hook": lambda: group.decode_combine(decoded.x, decoded.plan, return_hook=True).hook(),
    }


def open_group(pg: dist.ProcessGroup, timeout_s: float) -> ExpertGroup:
    return ExpertGroup(pg, CASE.shape, backend="cpu", timeout_s=timeout_s, ranks_per_node=RANKS_PER_NODE)


def lose(rank: int, pg: dist.ProcessGroup, loss: Loss) -> Seen | None:
    """Lose rank 3, and return what each of the others sees; then, if it lives, all go on with a new process group."""
    group = open_group(pg, loss.timeout_s)
    todo = calls(group)
    pg.barrier().wait()
    seen = None
    if rank == LOST_RANK:
        get_lost(group, loss)
        with pytest.raises((PeerTimeout, ClosedError)):
            twice(todo[loss.call])  # what the others have sent before is enough for one call, and no more
    else:
        seen = survive(todo, loss)
        leave_note(loss.folder, rank, "has reported")
    group.close()
    if loss.how == "stall":
        again = dist.new_group(list(range(NUM_RANKS)), backend="gloo")
        with open_group(again, 30.0) as group:
            for options in all_options(CASE)[::4]:
                check_round_trip(group, CASE, options)
    return seen


def get_lost(group: ExpertGroup, loss: Loss) -> None:
    """Make an exchange of the next call the last that this rank gets to."""
    start, left = group._backend._exchange.start, loss.exchange

    def start_or_stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left == 0:
            if loss.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while len([name for name in os.listdir(loss.folder) if "has reported" in name]) < NUM_RANKS - 1:
                time.sleep(0.01)
        left -= 1
        return start(*args, **kwargs)

    group._backend._exchange.start = start_or_stop


def twice(call: Callable[[], Any]) -> None:
    call()
    call()


def survive(todo: dict[str, Callable[[], Any]], loss: Loss) -> Seen:
    begin = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        twice(todo[loss.call])  # what rank 3 has sent across before is enough for some
    error, took_s = caught.value, time.monotonic() - begin
    for call in todo.values():
        with pytest.raises(ClosedError, match="PeerTimeout"):
            call()
    return Seen(error.phase, error.peers, error.nodes, took_s, str(error))
