"""Training: a layer by hand from differentiable calls, and the same step with `MoELayer`.

`python examples/training_step.py`: one rank, CPU; examples/train_language_model.py trains on several.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokenferry
from tokenferry import DispatchOptions, Layout, Quantized, Routing, autograd
from tokenferry.nn import GroupLimit, MoELayer, Router, softmax_topk

TOKENS, HIDDEN, EXPERTS, TOP_K = 16, 8, 4, 2


def by_hand(group: tokenferry.ExpertGroup, x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    """Return ``[T, H]``: the weighted sum of one matrix per expert."""
    routing = softmax_topk(x @ gate, TOP_K)
    sent = autograd.dispatch(group, x, routing, options=DispatchOptions(Layout.EXPERTS))
    assert sent.host_counts is not None
    assert sent.topk_weights is not None
    by_expert = torch.split(sent.x, list(sent.host_counts))
    y = torch.cat([rows @ matrix for rows, matrix in zip(by_expert, experts, strict=True)])
    y = y * sent.topk_weights.unsqueeze(1)
    return autograd.combine(group, y, sent.plan).x


def along_a_plan(group: tokenferry.ExpertGroup, x: Tensor, routing: Routing) -> None:
    """Send other rows along the same plan: packed ones, with their scales."""
    sent = group.dispatch(x, Routing(routing.topk_idx), options=DispatchOptions(counts="device"))
    packed = Quantized((x * 8).to(torch.int8).repeat(1, 2), torch.full((x.shape[0], 1), 0.125))
    again = group.redispatch(packed, sent.plan)
    rows = int(sent.plan.src_counts.sum())
    unpacked = again.x.data[:rows, :HIDDEN] * again.x.scale[:rows]
    torch.testing.assert_close(unpacked, sent.x[:rows], rtol=0.0, atol=0.125)


def main() -> None:
    """Take a step with each, and print how much the loss has changed."""
    torch.manual_seed(0)
    shape = tokenferry.MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=TOKENS)
    with tokenferry.ExpertGroup(None, shape, backend="cpu", transport="auto") as group:
        x, target = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
        gate = torch.randn(HIDDEN, EXPERTS, requires_grad=True)
        experts = torch.randn(group.num_local_experts, HIDDEN, HIDDEN, requires_grad=True)
        torch.autograd.backward((by_hand(group, x, gate, experts) - target).square().mean())
        assert gate.grad is not None
        assert experts.grad is not None

        router = Router(HIDDEN, EXPERTS, TOP_K, group_limit=GroupLimit(num_groups=2, top_groups=1), scale=2.5)
        layer = MoELayer(group, ffn_hidden=16, router=router)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        losses: list[float] = []
        for _ in range(2):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        assert layer.expert_counts is not None
        along_a_plan(group, x, router(x))
    print(f"the loss fell, and {int(layer.expert_counts.sum())} rows were received")


if __name__ == "__main__":
    main()
