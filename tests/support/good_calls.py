"""Calls that are right but for what a test changes in them: arguments and results of a group of two ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import (
    DecodeDispatched,
    Dispatched,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    Routing,
)

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=8)


@dataclass
class Good:
    """A group of two ranks, and arguments and results that are right: T=3, K=2, H=16, M=8, E=4, L=2."""

    pg: dist.ProcessGroup
    group: ExpertGroup
    stranger: ExpertGroup
    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    sent: Dispatched
    masked: Dispatched
    decoded: DecodeDispatched
    foreign: Dispatched
    foreign_decoded: DecodeDispatched

    @property
    def routing(self) -> Routing:
        return Routing(self.topk_idx, self.weights)


def good(pg: dist.ProcessGroup, group: ExpertGroup, stranger: ExpertGroup) -> Good:
    """Collective: makes the results that bad calls misuse."""
    x, weights = torch.ones(3, 16), torch.ones(3, 2)
    topk_idx = torch.tensor([[0, 1], [2, 3], [1, 2]])
    routing = Routing(topk_idx, weights)
    return Good(
        pg=pg,
        group=group,
        stranger=stranger,
        x=x,
        topk_idx=topk_idx,
        weights=weights,
        sent=group.dispatch(x, routing),
        masked=group.dispatch(x, routing, options=DispatchOptions(Layout.MASKED)),
        decoded=group.decode_dispatch(x, routing),
        foreign=stranger.dispatch(x, routing),
        foreign_decoded=stranger.decode_dispatch(x, routing),
    )


Call = Callable[[Good], Any]


def dispatch(**changes: Any) -> Call:
    """A dispatch with some arguments replaced; a function gets the good arguments."""
    return throughput("dispatch", changes)


def decode(**changes: Any) -> Call:
    return throughput("decode_dispatch", changes)


def throughput(name: str, changes: dict[str, Any]) -> Call:
    def call(g: Good) -> Any:
        new = {key: value(g) if callable(value) else value for key, value in changes.items()}
        x = new.pop("x", g.x)
        routing = new.pop("routing", Routing(new.pop("topk_idx", g.topk_idx), new.pop("topk_weights", g.weights)))
        return getattr(g.group, name)(x, routing, **new)

    return call


def combine(y: Callable[[Good], Any] = lambda g: g.sent.x.clone(), plan=lambda g: g.sent.plan, **options: Any) -> Call:
    return lambda g: g.group.combine(y(g), plan(g), **options)


def decode_combine(
    y: Callable[[Good], Any] = lambda g: g.decoded.x, plan=lambda g: g.decoded.plan, **options: Any
) -> Call:
    return lambda g: g.group.decode_combine(y(g), plan(g), **options)


def open_group(shape: Any = SHAPE, **options: Any) -> Call:
    return lambda g: ExpertGroup(g.pg, shape, **options)


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def at(token: int, slot: int, expert: int) -> Call:
    def change(g: Good) -> torch.Tensor:
        topk_idx = g.topk_idx.clone()
        topk_idx[token, slot] = expert
        return topk_idx

    return change


def grad(name: str) -> Call:
    return lambda g: getattr(g, name).clone().requires_grad_()
