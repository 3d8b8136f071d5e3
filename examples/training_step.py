"""Training: a layer by hand from differentiable calls, and the same step with `MoELayer`.

    python examples/training_step.py                                         # one rank, CPU
    torchrun --standalone --nproc-per-node 2 examples/training_step.py       # two

examples/train_language_model.py trains a whole model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
import torch.distributed as dist
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


def average_over_ranks(copies: Iterable[Tensor], num_ranks: int) -> None:
    """Average the gradients of tensors of which each rank has a copy; those of experts have all ranks' tokens."""
    for one in copies:
        if dist.is_initialized() and one.grad is not None:
            dist.all_reduce(one.grad)
            one.grad /= num_ranks


def steps(group: tokenferry.ExpertGroup) -> int:
    """Take a step with each; return how many rows the experts of this rank have received in the last one."""
    torch.manual_seed(0)
    gate = torch.randn(HIDDEN, EXPERTS, requires_grad=True)  # the same on all ranks
    torch.manual_seed(1 + group.rank)
    x, target = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
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
        average_over_ranks(router.parameters(), group.num_ranks)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert layer.expert_counts is not None
    along_a_plan(group, x, router(x))
    return int(layer.expert_counts.sum())


def main() -> None:
    """Make the group: on all ranks of torchrun, or of this process alone."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    shape = tokenferry.MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=TOKENS)
    with tokenferry.ExpertGroup(dist.group.WORLD, shape, backend="cpu", transport="auto") as group:
        rows = steps(group)
        print(f"rank {group.rank} of {group.num_ranks}: the loss fell, and {rows} rows were received")
    gc.collect()  # the layer held process groups, which must not outlive the next line
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
