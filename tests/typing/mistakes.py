"""Mistakes that a type checker has to find: every line with ``# wrong``, and no other. Never run."""

from __future__ import annotations

import torch
from torch import Tensor

import tokenferry
from tokenferry import DispatchOptions, ExpertGroup, MoeShape, Quantized, Routing, Scale, autograd
from tokenferry.nn import Router


def calls(group: ExpertGroup, x: Tensor, packed: Quantized, routing: Routing) -> None:
    """Take rows of the wrong kind from results."""
    sent = group.dispatch(x, routing)
    tensor: Tensor = sent.x * 2
    tensor = group.dispatch(packed, routing).x  # wrong
    tensor = group.redispatch(packed, sent.plan).x  # wrong
    tensor = autograd.dispatch(group, packed, routing).x  # wrong
    tensor = autograd.redispatch(group, packed, sent.plan).x  # wrong
    tensor = group.decode_dispatch(x, routing, quantize=Scale.UE8M0).x  # wrong
    quantized: Quantized = group.decode_dispatch(x, routing).x  # wrong
    quantized = group.dispatch(x, routing).x  # wrong
    group.combine(quantized, sent.plan)  # wrong
    sent.x = tensor  # wrong
    print(sent.plan.places, sent.plan.host_counts)  # wrong
    print(group.plan_columns)  # wrong


def options(group: ExpertGroup, shape: MoeShape, y: Tensor, plan: tokenferry.DecodePlan) -> None:
    """Name what an option cannot be."""
    ExpertGroup(None, shape, backend="gpu")  # wrong
    ExpertGroup(None, shape, transport="local")  # wrong
    ExpertGroup(None, shape, on_timeout="ignore")  # wrong
    DispatchOptions(counts="gpu")  # wrong
    group.decode_combine(y, plan, numerics="quick")  # wrong
    group.decode_combine(y, plan, encoding="bf16")  # wrong
    group.decode_combine(y, plan).hook(y)  # wrong
    Router(8, 4, 2, group_limit=(2, 1))  # wrong
    Router(8, 4, 2, group_limit=None)(torch.zeros(1, 8))
