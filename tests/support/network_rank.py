"""One rank of a group on two networks: ``python -m support.network_rank RANK ADDRESS:PORT FOLDER``.

It runs jobs of the contract suite, then makes calls while the link between the networks is cut, and prints, as JSON,
what it has caught.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support import decode_jobs, throughput_jobs
from support.lost_nodes import twice
from support.lost_ranks import leave_note
from support.pairs import Pair
from tokenferry import ClosedError, ExpertGroup, PeerTimeout, Routing
from tokenferry.testing.cases import Case

RANKS = 4
NODES = ((0, 1), (2, 3))
TIMEOUT_S = 8.0
"""A quarter of it is for ranks that begin a call late."""
STARTED_S = 60.0
PAIR = Pair("cpu", "shared_memory+process_group")
CASE = Case((3, 2, 4, 5), 8, 4, hidden=4096, dtype=torch.float32)


@dataclass(frozen=True)
class Cut:
    """A call, and before which of its exchanges ranks wait until the link is cut.

    ``ahead``: ranks 1 and 3 do not wait. They have what they need from the other node, and wait for ranks 0 and 2.
    """

    call: str
    exchange: int
    ahead: bool = False


CUTS = (
    *(Cut("dispatch", 0), Cut("dispatch", 1), Cut("redispatch", 0, ahead=True), Cut("combine", 3)),
    *(Cut("decode_dispatch", 1), Cut("decode_combine", 2)),
)
"""Each is made on a group of its own, in a thread."""


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{store}", rank=rank, world_size=RANKS)
    pg = dist.group.WORLD
    for job in (throughput_jobs.round_trips, throughput_jobs.overflow):
        job(rank, pg, PAIR, RANKS)
    decode_jobs.encodings(rank, pg, PAIR, RANKS)
    everyone = range(RANKS)
    groups = [PAIR.open(dist.new_group(everyone, backend="gloo"), CASE.shape, timeout_s=TIMEOUT_S) for _ in CUTS]
    assert groups[0].topology.nodes == NODES, f"found {groups[0].topology.nodes}"
    todo = [calls_of(group)[cut.call] for group, cut in zip(groups, CUTS, strict=True)]
    for group, cut in zip(groups, CUTS, strict=True):
        wait_in_call(group, cut, folder)
    leave_note(str(folder), rank, "is ready")
    wait_for(folder / "start")  # together: a rank that starts much later gives up much later
    with ThreadPoolExecutor(len(CUTS)) as pool:
        seen = list(pool.map(catch, groups, todo, CUTS))
    sys.stdout.write(json.dumps(seen))


def calls_of(group: ExpertGroup) -> dict[str, Callable[[], Any]]:
    mine = CASE.inputs()[group.rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent, decoded = group.dispatch(mine.x, routing), group.decode_dispatch(mine.x, routing)
    return {
        "dispatch": lambda: group.dispatch(mine.x, routing),
        "redispatch": lambda: group.redispatch(mine.x, sent.plan),
        "combine": lambda: group.combine(sent.x, sent.plan),
        "decode_dispatch": lambda: group.decode_dispatch(mine.x, routing),
        "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan),
    }


def wait_for(note: Path) -> None:
    while not note.exists():
        time.sleep(0.01)


def wait_in_call(group: ExpertGroup, cut: Cut, folder: Path) -> None:
    """Let the next call leave a note where it waits until the link is cut, or before its third exchange."""
    ahead = cut.ahead and group.rank % 2 == 1
    start, left = group._backend._exchange.start, 2 if ahead else cut.exchange

    def start_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left == 0:
            leave_note(str(folder), group.rank, f"is in {cut}")
            if not ahead:
                wait_for(folder / "cut")
        left -= 1
        return start(*args, **kwargs)

    group._backend._exchange.start = start_later


def catch(group: ExpertGroup, call: Callable[[], Any], cut: Cut) -> dict[str, Any]:
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        twice(call)
    took_s = time.monotonic() - start
    with pytest.raises(ClosedError):
        call()
    group.close()
    error = caught.value
    return {
        "cut": str(cut),
        "call": cut.call,
        "phase": error.phase,
        "peers": error.peers,
        "nodes": error.nodes,
        "text": str(error),
        "took_s": took_s,
    }


if __name__ == "__main__":
    main()
