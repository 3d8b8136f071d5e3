"""Jobs of dispatches without M, which guess how many rows there will be; processes and threads run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from support.pairs import Pair
from support.throughput import Deal, check_combine, check_delivered, check_plan, oracle_for, routing_of
from tokenferry import DispatchOptions, ExpertGroup, PeerTimeout
from tokenferry.compat.deep_ep.throughput import ANY_NUM_TOKENS
from tokenferry.testing.cases import Case
from tokenferry.types import Dispatched, MoeShape

COUNTED, AT_ONCE, ONCE_MORE = ["counted"], ["at_once"], ["at_once", "once_more", "counted"]
"""What a rank does in a call: it waits for the counts before it sends rows; it does not; it finds too many rows."""


def view_of(group: ExpertGroup, case: Case) -> ExpertGroup:
    """Return the view of a group for the sizes of a case, without M."""
    return group.for_shape(MoeShape(case.experts, case.top_k, case.hidden, ANY_NUM_TOKENS))


def send(group: ExpertGroup, case: Case, **options: Any) -> Dispatched:
    """Dispatch the inputs of a case, without M."""
    mine = case.inputs()[group.rank]
    return view_of(group, case).dispatch(mine.x, routing_of(mine), **options)


def check_sent(group: ExpertGroup, case: Case, sent: Dispatched) -> None:
    """Check all that a dispatch returned, and a combine along its plan."""
    deal = Deal(case, DispatchOptions(), oracle_for(case, DispatchOptions()), group.rank)
    check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
    check_plan(deal, sent)
    check_combine(view_of(group, case), deal, sent, torch.float32, 1, False, True)


def watched(group: ExpertGroup) -> list[str]:
    """Return a list to which each dispatch of a CUDA group adds what it does."""
    seen: list[str] = []
    dispatcher = group._backend.dispatcher

    def watch(name: str) -> None:
        method: Callable[..., Any] = getattr(dispatcher, f"_send_{name}")

        def noting(*args: Any) -> Any:
            seen.append(name)
            return method(*args)

        setattr(dispatcher, f"_send_{name}", noting)

    for name in ("counted", "at_once", "once_more"):
        watch(name)
    return seen


# ---------------------------------------------------------------------- counts that change

FEW = ((20, 0, 9), "even")
CHANGES = (
    (FEW, COUNTED),
    (FEW, AT_ONCE),
    (((40, 0, 60), "all_to_expert_0"), ONCE_MORE),  # too many for rank 0 alone
    (((5, 0, 20), "repeated"), AT_ONCE),
    (((0, 530, 3), "all_to_expert_0"), ONCE_MORE),  # three kernels on rank 1, where others run one
    (((0, 530, 3), "even"), AT_ONCE),
    (((0, 0, 0), "even"), AT_ONCE),
    (((900, 700, 700), "own_rank"), ONCE_MORE),
    *[(((9, 1, 0), "nothing"), AT_ONCE)] * 15,
    (((1, 0, 0), "even"), AT_ONCE),
    (((40, 0, 60), "all_to_expert_0"), ONCE_MORE),  # what is long ago is forgotten
)
"""Tokens of three ranks, routing, and what each rank does with counts on the host."""


def change(rank: int, pg, pair: Pair, ranks: int) -> list[tuple[list[str], int]]:
    """Make calls whose rows become more, on all ranks or on one, and fewer.

    Returns:
        list: on CUDA, on one node, what each call does, and the rows that there is space for in the next.
    """
    cases = [Case((t * 3)[:ranks], 2 * ranks, 2, routing=how, seed=n) for n, ((t, how), _) in enumerate(CHANGES)]
    found = []
    with pair.open(pg, cases[0].shape) as group:
        guesses = pair.backend == "cuda" and group.topology.num_nodes == 1
        seen = watched(group) if guesses else []
        for case in cases:
            seen.clear()
            check_sent(group, case, send(group, case))
            if guesses:
                (guess,) = group._backend.dispatcher._guesses.values()
                found.append((list(seen), guess.num_rows))
    return found


# ---------------------------------------------------------------------- ranks that are lost in the middle

LOST = 1


def nothing(_: ExpertGroup) -> None:
    """Let the others notice by themselves."""


@dataclass(frozen=True)
class Leaving:
    """How a rank is lost between the first try of a call and the second.

    Attributes:
        leave: Called on that rank, instead of the second try.
        tell: Called on the others before theirs.
        timeout_s: The deadline of the group.
    """

    leave: Callable[[ExpertGroup], None]
    tell: Callable[[ExpertGroup], None] = nothing
    timeout_s: float = 60.0


def lose_before_the_second_try(rank: int, pg, pair: Pair, leaving: Leaving) -> str | None:
    """All ranks have found that there are too many rows; then one of them leaves.

    Returns:
        str | None: the error of a rank that stays.
    """
    few, many = Case((3, 2, 4), 6, 2), Case((90, 90, 90), 6, 2)
    with pair.open(pg, few.shape, timeout_s=leaving.timeout_s) as group:
        group.warmup()
        for _ in range(2):
            check_sent(group, few, send(group, few))
        dispatcher = group._backend.dispatcher
        send_once_more = dispatcher._send_once_more
        if rank == LOST:

            def gone(*_: Any) -> None:
                leaving.leave(group)
                raise InterruptedError

            dispatcher._send_once_more = gone
            with pytest.raises(InterruptedError):
                send(group, many)
            return None

        def told(*args: Any) -> Any:
            leaving.tell(group)
            return send_once_more(*args)

        dispatcher._send_once_more = told
        with pytest.raises(PeerTimeout) as caught:
            send(group, many)
        assert group._backend.broken
        assert caught.value.peers == (LOST,)
        return str(caught.value)
