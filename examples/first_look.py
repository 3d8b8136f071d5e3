"""The calls of the README: dispatch, experts, combine.

One rank: `python examples/first_look.py`.
Several: `torchrun --standalone --nproc-per-node 4 examples/first_look.py`.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import tokenferry


def main() -> None:
    """Send tokens to their experts and add up what the experts return."""
    if dist.is_torchelastic_launched():  # by torchrun: several ranks; else a group of one
        dist.init_process_group("gloo")
    if torch.cuda.is_available():  # each rank owns a GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    shape = tokenferry.MoeShape(num_experts=8, top_k=2, hidden=64, max_tokens=32)
    with tokenferry.ExpertGroup(dist.group.WORLD, shape) as group:
        x = torch.randn(32, 64, device=group.device)
        scores = torch.randn(32, 8, device=group.device)
        weights, experts = scores.softmax(-1).topk(2)
        sent = group.dispatch(x, tokenferry.Routing(experts, weights))
        assert sent.topk_weights is not None
        y = sent.x * sent.topk_weights.sum(1, keepdim=True)
        out = group.combine(y, sent.plan).x
        torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
        print(f"rank {group.rank} of {group.num_ranks}: {sent.x.shape[0]} rows")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
