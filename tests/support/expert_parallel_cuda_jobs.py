"""Jobs of the tests of `integrations.transformers.ExpertParallel` for ranks with GPUs; experts without host waits."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from support.deep_ep_cuda_jobs import captured
from support.expert_parallel_jobs import all_experts, batch, dense_layer
from tokenferry.integrations.transformers import ExpertParallel

DEVICE = "cuda"
TOP_K = 3


class MaskedExperts:
    """L linear experts, each of which reads all rows, so that their number of rows may stay on the device."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.num_experts = weight.shape[0]

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen = [(weights * (index == expert)).sum(1, keepdim=True) for expert in range(self.num_experts)]
        return sum(one * (x @ matrix) for one, matrix in zip(chosen, self.weight, strict=True))


def layer(rank: int, ranks: int) -> tuple[ExpertParallel, Tensor]:
    """The experts of this rank, and their parameters; each rank has its own batch."""
    everyone = init_device_mesh("cpu", (ranks,))
    own = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data", "tensor"))["tensor"]
    part = all_experts().chunk(ranks)[rank].to(DEVICE).requires_grad_()
    return ExpertParallel(MaskedExperts(part), everyone, own), part


def on_device(number: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    x, index, weights = batch(number, tokens, TOP_K)
    return x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)


def trains(rank, pg) -> None:
    """Outputs and all gradients are those of all experts in one process; ranks have other batches, one of them none."""
    ranks = pg.size()
    parallel, part = layer(rank, ranks)
    dense = all_experts().to(DEVICE).requires_grad_()
    counts = (5, 0, 3, 6)
    want = []
    for number in range(ranks):
        x, index, weights = on_device(number, counts[number])
        out = dense_layer(dense, x.requires_grad_(), index, weights.requires_grad_())
        out.square().sum().backward()
        want.append((out, x.grad, weights.grad))
    x, index, weights = on_device(rank, counts[rank])
    out = parallel(x.requires_grad_(), index, weights.requires_grad_())
    out.square().sum().backward()
    for got, expected in zip((out, x.grad, weights.grad), want[rank], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.grad, dense.grad.chunk(ranks)[rank], rtol=1e-5, atol=1e-5)


def captures(rank, pg) -> None:
    """Without gradients a call is captured after one outside of the capture, and replayed with other batches."""
    parallel, _ = layer(rank, pg.size())
    dense = all_experts().to(DEVICE)
    given = on_device(rank, 6)
    with torch.no_grad():
        parallel(*given)
        replay, (out,) = captured(lambda: (parallel(*given),))
        for number in (rank + 8, rank, rank + 8):
            other = on_device(number, 6)
            for mine, value in zip(given, other, strict=True):
                mine.copy_(value)
            replay()
            torch.testing.assert_close(out, dense_layer(dense, *other), rtol=1e-5, atol=1e-5)
