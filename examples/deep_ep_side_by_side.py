"""A program for DeepEP's V1 API, and the same in native calls: the same rows, and the same sums, bit for bit.

    python examples/deep_ep_side_by_side.py                                      # one rank
    torchrun --standalone --nproc-per-node 4 examples/deep_ep_side_by_side.py    # four

The functions with DeepEP in their names need no more than ``import deep_ep`` to be a program for DeepEP.
docs/coming-from-deepep.md lists what becomes what.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

import tokenferry
import tokenferry.compat.deep_ep as deep_ep
from tokenferry import DispatchOptions, Layout, MoeShape, Routing, Scale
from tokenferry.formats import fp8

TOKENS, HIDDEN, EXPERTS, TOP_K = 16, 256, 8, 2


def experts_of_rows(rows: Tensor, chosen: Tensor, weights: Tensor, first: int) -> Tensor:
    """Multiply each row by e + 1 for each of its experts here, weighted: what experts would do."""
    factors = torch.where(chosen >= 0, weights * (first + chosen + 1), torch.zeros_like(weights))
    return (rows.float() * factors.sum(1, keepdim=True)).to(rows.dtype)


def experts_of_batch(rows: Tensor, first: int) -> Tensor:
    """The same for ``[L, R*M, H]``, where the experts' rows are apart and the weights are applied later."""
    factors = torch.arange(first + 1, first + 1 + rows.shape[0], dtype=rows.dtype, device=rows.device)
    return rows * factors[:, None, None]


def normal_deep_ep(buffer: deep_ep.Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, first: int) -> Tensor:
    """Training and prefill."""
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    recv_x, recv_topk_idx, recv_topk_weights, _, handle, _ = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    assert isinstance(recv_x, Tensor)
    assert recv_topk_idx is not None
    assert recv_topk_weights is not None
    assert handle is not None
    y = experts_of_rows(recv_x, recv_topk_idx, recv_topk_weights, first)
    combined_x, _, _ = buffer.combine(y, handle)
    return combined_x


def normal_native(group: tokenferry.ExpertGroup, x: Tensor, routing: Routing, first: int) -> Tensor:
    """One call finds out what goes where, and sends it; the plan is the handle."""
    sent = group.dispatch(x, routing)
    assert sent.topk_idx is not None
    assert sent.topk_weights is not None
    y = experts_of_rows(sent.x, sent.topk_idx, sent.topk_weights, first)
    return group.combine(y, sent.plan).x


def by_expert_native(group: tokenferry.ExpertGroup, x: Tensor, routing: Routing, first: int) -> Tensor:
    """What DeepEP leaves to the program: rows sorted by expert, ready for a grouped GEMM."""
    sent = group.dispatch(x, routing, options=DispatchOptions(Layout.EXPERTS))
    assert sent.host_counts is not None
    assert sent.topk_weights is not None
    parts = enumerate(torch.split(sent.x, list(sent.host_counts)))
    y = torch.cat([rows.float() * (first + i + 1) for i, rows in parts]) * sent.topk_weights[:, None]
    return group.combine(y.to(x.dtype), sent.plan).x


def low_latency_deep_ep(
    buffer: deep_ep.Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, first: int
) -> Tensor:
    """Decoding, with rows in FP8."""
    recv_x, _, handle, _, hook = buffer.low_latency_dispatch(x, topk_idx, TOKENS, EXPERTS, return_recv_hook=True)
    assert hook is not None
    hook()
    assert not isinstance(recv_x, Tensor)
    rows = fp8.dequantize(tokenferry.Quantized(*recv_x)).to(x.dtype)
    y = experts_of_batch(rows, first)
    combined_x, _, hook = buffer.low_latency_combine(y, topk_idx, topk_weights, handle, return_recv_hook=True)
    assert hook is not None
    hook()
    return combined_x


def low_latency_native(group: tokenferry.ExpertGroup, x: Tensor, routing: Routing, first: int) -> Tensor:
    """The plan remembers the routing, so that combine needs nothing but the rows."""
    sent = group.decode_dispatch(x, routing, quantize=Scale.FLOAT32, return_hook=True)
    sent.hook()
    y = experts_of_batch(fp8.dequantize(sent.x).to(x.dtype), first)
    done = group.decode_combine(y, sent.plan, return_hook=True)
    done.hook()
    return done.x


def main() -> None:
    """Run both on the same tokens, and compare."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    world = dist.group.WORLD
    num_ranks = 1 if world is None else world.size()
    rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, num_ranks, EXPERTS)
    buffer = deep_ep.Buffer(world, 1 << 20, rdma_bytes, low_latency_mode=True, explicitly_destroy=True)
    with tokenferry.ExpertGroup(world, MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=TOKENS)) as group:
        draws = torch.Generator().manual_seed(group.rank)
        x = torch.randn(TOKENS, HIDDEN, generator=draws).to(group.device, torch.bfloat16)
        scores = torch.randn(TOKENS, EXPERTS, generator=draws).to(group.device).softmax(-1)
        topk_weights, topk_idx = scores.topk(TOP_K)
        routing, first = Routing(topk_idx, topk_weights), group.rank * group.num_local_experts

        one = normal_deep_ep(buffer, x, topk_idx, topk_weights, first)
        two = normal_native(group, x, routing, first)
        assert torch.equal(one, two)
        three = by_expert_native(group, x, routing, first)
        torch.testing.assert_close(three, two, rtol=0.02, atol=0.02)  # each expert's row is rounded

        one = low_latency_deep_ep(buffer, x, topk_idx, topk_weights, first)
        two = low_latency_native(group, x, routing, first)
        assert torch.equal(one, two)
        print(f"rank {group.rank} of {group.num_ranks}: {TOKENS} rows are the same, in both ways and both modes")
    buffer.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
