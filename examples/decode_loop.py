"""A decode loop: fixed shapes, FP8 rows, receive hooks, counters, rows encoded on their way back.

    python examples/decode_loop.py                                           # one rank, CPU
    torchrun --standalone --nproc-per-node 2 examples/decode_loop.py         # two

examples/serve.py decodes in a CUDA graph, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import tokenferry
from tokenferry.formats import fp8
from tokenferry.types import EncodingName, Numerics

STEPS, TOKENS, HIDDEN, EXPERTS, TOP_K = 3, 8, 128, 4, 2


def experts(rows: Tensor, first: int) -> Tensor:
    """Multiply the rows of global expert e by e + 1."""
    factors = torch.arange(first + 1, first + 1 + rows.shape[0], device=rows.device)
    return rows * factors[:, None, None]


def step(group: tokenferry.ExpertGroup, x: Tensor, routing: tokenferry.Routing, encoding: EncodingName) -> Tensor:
    """Send, work while the rows are on their way, receive, and return the weighted sums."""
    first = group.rank * group.num_local_experts
    sent = group.decode_dispatch(x, routing, return_hook=True)
    shared = x * 2  # the shared expert, while the rows are on their way
    sent.hook()
    y: Tensor = experts(sent.x, first)
    numerics: Numerics = "fast" if encoding == "same" else "exact"
    done = group.decode_combine(y, sent.plan, numerics=numerics, encoding=encoding, return_hook=True)
    hook: Callable[[], None] = done.hook
    hook()
    return shared + done.x


def of_all_ranks(counts: Tensor) -> int:
    """Return the sum of counters over the ranks."""
    total = counts.sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def main() -> None:
    """Compare a few steps with the sums that follow from the routing."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    shape = tokenferry.MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=TOKENS)
    with tokenferry.ExpertGroup(dist.group.WORLD, shape, backend="cpu", on_timeout="mask") as group:
        received = torch.zeros(group.num_local_experts, dtype=torch.int32)
        for number in range(STEPS):
            x = torch.randn(TOKENS, HIDDEN)
            weights, topk_idx = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(TOP_K)
            routing = tokenferry.Routing(topk_idx, weights)
            want = x * (2 + (weights * (topk_idx + 1)).sum(1, keepdim=True))
            torch.testing.assert_close(step(group, x, routing, "same"), want)
            torch.testing.assert_close(step(group, x, routing, "fp8"), want, rtol=0.1, atol=0.5)

            stats = tokenferry.DecodeStats(received)
            unweighted = tokenferry.Routing(topk_idx)
            cast = group.decode_dispatch(x, unweighted, quantize=tokenferry.Scale.FLOAT32, stats=stats)
            cast.hook()  # without return_hook it does nothing
            assert of_all_ranks(received) == (number + 1) * group.num_ranks * TOKENS * TOP_K
            y = experts(fp8.dequantize(cast.x), group.rank * group.num_local_experts).to(x.dtype)
            plan = dataclasses.replace(cast.plan, topk_weights=weights)
            home = group.decode_combine(y, plan).x
            torch.testing.assert_close(home, want - 2 * x, rtol=0.1, atol=0.5)
        print(f"rank {group.rank} of {group.num_ranks}: {STEPS} steps, {int(received.sum())} rows received")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
