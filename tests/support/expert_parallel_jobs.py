"""Jobs of the tests of `integrations.transformers.ExpertParallel`, with experts that are written here."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tokenferry import ArgumentError, ClosedError, ConfigError, ExpertGroup, Routing
from tokenferry.autograd import local_parts
from tokenferry.integrations import transformers as ours
from tokenferry.integrations.transformers import ExpertParallel

R, E, H = 4, 8, 16


class Experts:
    """L linear experts: as in transformers, slots with the number L are left out, and no rows make no graph."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.num_experts = weight.shape[0]

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in index.unique().tolist():
            if expert < self.num_experts:
                token, slot = torch.where(index == expert)
                out = out.index_add(0, token, x[token] @ self.weight[expert] * weights[token, slot].unsqueeze(1))
        return out


def dense_layer(experts: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What all experts in one process give."""
    return torch.einsum("nh,nkhf,nk->nf", x, experts[index], weights)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_experts() -> Tensor:
    return drawn(E, H, H, seed=1) / H**0.5


def batch(number: int, tokens: int, top_k: int, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, choices among the first experts, and weights."""
    weights, index = drawn(tokens, experts, seed=10 + number).softmax(1).topk(top_k)
    return drawn(tokens, H, seed=20 + number), index, weights


def layer(rank: int, tensor: int) -> tuple[ExpertParallel, Tensor]:
    """The experts of this rank, where ``tensor`` ranks share a batch; returns their parameters, too."""
    tp_mesh = init_device_mesh("cpu", (R // tensor, tensor), mesh_dim_names=("data", "tensor"))["tensor"]
    ep_mesh = init_device_mesh("cpu", (R,))
    part = all_experts().chunk(R)[rank].clone().requires_grad_()
    return ExpertParallel(Experts(part), ep_mesh, tp_mesh), part


@contextmanager
def counts_of_calls() -> Iterator[list[str]]:
    """Collect where the counts of dispatches are."""
    found: list[str] = []
    dispatch = ExpertGroup.dispatch

    def noted(*args, options, **kwargs):
        found.append(options.counts)
        return dispatch(*args, options=options, **kwargs)

    with mock.patch.object(ExpertGroup, "dispatch", noted):
        yield found


def trains(rank, pg, tensor: int, tokens: tuple[int, ...], experts: int) -> None:
    """Outputs and all gradients are those of all experts in one process."""
    parallel, part = layer(rank, tensor)
    dense = all_experts().requires_grad_()
    number = rank // tensor
    want = []
    for each, count in enumerate(tokens):
        x, index, weights = batch(each, count, 3, experts)
        x.requires_grad_()
        weights.requires_grad_()
        out = dense_layer(dense, x, index, weights)
        (out * drawn(count, H, seed=30 + each)).sum().backward()
        want.append((out, x.grad, weights.grad))
    x, index, weights = batch(number, tokens[number], 3, experts)
    x.requires_grad_()
    weights.requires_grad_()
    with counts_of_calls() as counts:
        out = parallel(x, index, weights)
    (out * drawn(tokens[number], H, seed=30 + number)).sum().backward()
    for got, expected in zip((out, x.grad, weights.grad), want[number], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.grad, dense.grad.chunk(R)[rank], rtol=1e-5, atol=1e-5)
    assert counts == ["host"]


def differentiates_twice(rank, pg, tensor: int) -> None:
    """As penalties on gradients need it."""
    parallel, _ = layer(rank, tensor)
    dense = all_experts()
    x, index, weights = batch(rank // tensor, 6, 3)
    found = []
    for run in (parallel, lambda *given: dense_layer(dense, *given)):
        rows, gates = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = run(rows, index, gates)
        first = torch.autograd.grad((out.square() * drawn(6, H, seed=40)).sum(), (rows, gates), create_graph=True)
        sum(each.square().sum() for each in first).backward()
        found.append((*first, rows.grad, gates.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def differentiates_shards_twice(rank, pg) -> None:
    """In weights that are DTensors, as transformers 5.17 has them, also where torch's own way is for once only."""
    experts, mesh = nn.Linear(4, 4, bias=False, dtype=torch.float64), init_device_mesh("cpu", (R,))
    experts.weight = whole = nn.Parameter(distribute_tensor(experts.weight.detach(), mesh, [Shard(0)]))
    with (
        mock.patch.object(local_parts, "_TO_LOCAL_ONCE", True),
        mock.patch.object(DTensor, "to_local", lambda tensor: tensor.detach()._local_tensor),
        ours._local_parameters(experts),
    ):
        loss = experts.weight.pow(3).sum()
    assert experts.weight is whole
    (first,) = torch.autograd.grad(loss, whole, create_graph=True)
    first.to_local().square().sum().backward()
    torch.testing.assert_close(whole.grad.to_local(), 36 * whole.detach().to_local() ** 3)


def gives_what_may_be_overwritten(rank, pg, tensor: int) -> None:
    """Some models add to what their experts give, in place."""
    parallel, part = layer(rank, tensor)
    for tokens in (6, 8):  # not the same number for each rank, and the same
        x, index, weights = batch(rank // tensor, tokens, 3)
        out = parallel(x.requires_grad_(), index, weights)
        want = out.detach() + 1
        out += 1
        out.sum().backward()
        assert out.equal(want)
        assert part.grad.any()


def infers(rank, pg, tensor: int, where: str) -> None:
    """Without gradients, also of batches with fewer tokens than ranks, and with another K."""
    parallel, _ = layer(rank, tensor)
    number = rank // tensor
    with torch.no_grad(), counts_of_calls() as counts:
        for tokens, top_k in ((6, 3), (1, 3), (5, 2)):
            x, index, weights = batch(number, tokens, top_k)
            out = parallel(x, index, weights)
            want = dense_layer(all_experts(), x, index, weights)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert set(counts) == {where}


def captures(rank, pg) -> None:
    """In a capture counts stay on the device, though ranks have other batches; the group is made before."""
    ours.close_groups()
    parallel, _ = layer(rank, 1)
    x, index, weights = batch(rank, 5, 3)
    with torch.no_grad(), counts_of_calls() as counts, mock.patch.object(ours, "_is_captured", return_value=True):
        with pytest.raises(ArgumentError, match="run the model once before the capture"):
            parallel(x, index, weights)
        with mock.patch.object(ours, "_is_captured", return_value=False):
            want = parallel(x, index, weights)
        torch.testing.assert_close(parallel(x, index, weights), want)
    assert counts == ["host", "device"]


def breaks_a_compiled_graph(rank, pg) -> None:
    """The rest of a compiled model is not affected."""
    parallel, _ = layer(rank, 1)
    x, index, weights = batch(rank, 3, 3)

    def model(rows: Tensor) -> Tensor:
        return parallel(rows * 2, index, weights) + 1

    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def shares_its_group(rank, pg) -> None:
    """All layers have one group. It outlives them, since ranks collect their models at other times."""
    ours.close_groups()
    for _ in range(2):
        layers = [layer(rank, 1)[0] for _ in range(2)]
        for each in layers:
            each(*batch(rank, 2, 3))
        del layers, each
        if rank % 2:
            gc.collect()
    (group,) = ours._groups.values()
    ours.close_groups()
    with pytest.raises(ClosedError):
        group.dispatch(torch.zeros(1, H), Routing(torch.zeros(1, 3, dtype=torch.int64)))
    layer(rank, 1)[0](*batch(rank, 2, 3))
    assert group not in ours._groups.values()


def needs_the_device_of_the_group(rank, pg) -> None:
    ours.close_groups()
    parallel, _ = layer(rank, 1)
    elsewhere = [each.to("meta") for each in batch(rank, 2, 3)]
    with pytest.raises(ConfigError, match="the model is on meta, and backend cpu was chosen; set TOKENFERRY_BACKEND"):
        parallel(*elsewhere)
