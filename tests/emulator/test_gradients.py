"""Gradients through the kernels of the CUDA backend, of calls that nothing traces.

The operators, which traces need, do not run in several threads at once, as which the emulator has its ranks.
"""

import torch

from support.emulated_group import EmulatedPair
from tokenferry import DispatchOptions, Layout, MoeShape, Routing, autograd

SHAPE = MoeShape(4, 2, 16, 8)


def gradients(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Tokens 0 and 2 go to one rank, token 1 to both; rank r multiplies rows by 2 + r."""
    index = torch.tensor([[0, 1], [1, 2], [3, 2]])
    with pair.open(pg, SHAPE) as group:
        x = torch.arange(48, dtype=torch.float32).view(3, 16).requires_grad_()
        weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
        sent = autograd.dispatch(group, x, Routing(index, weights), options=DispatchOptions(Layout.EXPERTS))
        rows = sent.x * sent.topk_weights.unsqueeze(1) * (2 + rank)
        (autograd.combine(group, rows, sent.plan).x ** 2).sum().backward()
        with torch.no_grad():
            factors = torch.tensor([[2.0, 2.0], [2.0, 3.0], [3.0, 3.0]])
            total = (factors * weights).sum(1, keepdim=True)
            torch.testing.assert_close(x.grad, 2 * x * total**2)
            torch.testing.assert_close(weights.grad, 2 * (x**2).sum(1, keepdim=True) * total * factors)


def test_gradients(run):
    run(2, gradients)
