"""The sum of a tensor over a process group, as an operator that torch.compile keeps in order with calls of groups."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


@torch.library.custom_op("tokenferry::sum_over", mutates_args=(), schema="(Tensor x, str process_group) -> Tensor")
def sum_over(x: Tensor, process_group: str) -> Tensor:
    """Return the sum of ``x`` over the ranks of a process group. Collective; differentiable: so is its backward.

    torch's own operators are not in order with those of groups: ranks that wait for each other in one of either kind
    would never end.

    Args:
        x: Of one shape and dtype on all ranks.
        process_group: The name of the group, as ``ProcessGroup.group_name``.
    """
    operators = torch.ops._c10d_functional
    total: Tensor = operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", process_group))
    return total


@sum_over.register_fake
def _sum_over_fake(x: Tensor, process_group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Context(Protocol):
    """The state that forward saves for backward."""

    process_group: str


def _setup(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.process_group = inputs


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
    total: Tensor = sum_over(grad, ctx.process_group)
    return total, None


sum_over.register_autograd(_backward, setup_context=_setup)
