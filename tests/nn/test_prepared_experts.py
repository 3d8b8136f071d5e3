"""What `parallelize` makes of experts that came late, have no values yet, or keep gradients in another dtype."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import GELUExperts, GradScaler, MoELayer, Router, by_expert, clip_grad_norm_, parallelize
from tokenferry.nn.balance import PlacedRouter, Placement

SHAPE = MoeShape(4, 2, 16, max_tokens=32)


class Around(nn.Module):
    """Experts in a module with a parameter, a buffer or a second name for one of theirs."""

    def __init__(self, inner: nn.Module, group: tokenferry.ExpertGroup, what: str) -> None:
        super().__init__()
        self.inner, num_local = inner, group.num_local_experts
        if what == "all":
            self.scale = nn.Parameter(torch.ones(16))
        elif what == "scalar":
            self.scale = nn.Parameter(torch.ones(()))
        elif what == "twice":
            self.scale = inner.up
        else:
            self.register_buffer("scale", torch.ones(num_local))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.inner(rows, offsets)
        return out


def late(rank: int, pg: dist.ProcessGroup, what: str) -> list[str]:
    """Return what is said of the same experts when a layer is made, and when they have come later, without a change."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("experts",))
    found = []
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        with pytest.raises(tokenferry.ConfigError) as caught:
            MoELayer(group, experts=Around(GELUExperts(group, 8), group, what))
        found.append(str(caught.value))
        model = nn.ModuleList([MoELayer(group, 8), MoELayer(group, experts=GELUExperts(group, 8))])
        model[1].experts = Around(model[1].experts, group, what)
        before = list(model.parameters())
        for args in ((), (mesh,)):
            with pytest.raises(tokenferry.ConfigError) as caught:
                parallelize(model, *args)
            found.append(str(caught.value))
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True)), "some were replaced"
        assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    return found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("all", "experts: scale: expected the L=2 experts of this rank as the first dimension, got [16]"),
        ("scalar", "experts: scale: expected the L=2 experts of this rank as the first dimension, got []"),
        ("twice", "experts: scale and inner.up are one parameter"),
        ("buffer", "experts: expected no buffers in the state_dict, got ['scale']"),
    ],
)
def test_experts_that_came_late_are_checked_as_those_of_a_new_layer(worlds, what, message):
    for made, without_mesh, with_mesh in worlds(2).run(late, what):
        assert message in made
        assert without_mesh == with_mesh == made


class Own(nn.Module):
    """Experts that each rank draws for itself."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(num_local, 16, 16))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        part = self.w.to_local() if hasattr(self.w, "to_local") else self.w
        if not part.is_meta:
            nn.init.normal_(part, std=0.25)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return by_expert(lambda product, rows, w: product(rows, w), rows, offsets, self.w)


def from_meta(rank: int, pg: dist.ProcessGroup, ours: bool, again: bool) -> tuple[list[str], Tensor]:
    """Return what training says to experts that had no values to share, and both replicas after three steps."""
    mesh, errors = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts")), []
    torch.manual_seed(rank)
    with tokenferry.ExpertGroup(mesh["experts"].get_group(), SHAPE, backend="cpu") as group:
        with torch.device("meta"):
            layer = MoELayer(group, experts=GELUExperts(group, 8) if ours else Own(group.num_local_experts))
        model = nn.Sequential(layer)
        experts = parallelize(model, mesh["experts"], replicate=mesh["replicate"])
        fully_shard(model, mesh=mesh, ignored_params=experts)
        model.to_empty(device="cpu")
        layer.reset_parameters()
        layer.experts.reset_parameters()
        with torch.no_grad():
            model(torch.randn(3, 16))
        if again:
            for run in (model, torch.compile(model, backend="eager")):
                with pytest.raises(tokenferry.ConfigError) as caught:
                    run(torch.randn(3, 16))
                errors.append(str(caught.value))
            assert parallelize(model) == experts
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(3, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        part = next(layer.experts.parameters()).to_local().detach().contiguous()
        both = torch.empty(2, *part.shape, dtype=part.dtype, device="cpu")
        dist.all_gather(list(both), part, group=mesh["replicate"].get_group())
        return errors, both


def test_replicas_without_values_are_made_equal_later(worlds):
    for errors, both in worlds(4).run(from_meta, False, True):
        assert len(errors) == 2
        for message in errors:
            assert "experts: w had no values when parallelize would have made the ranks and slots equal" in message
            assert "call parallelize(model) again" in message
        assert torch.equal(both[0], both[1])


def test_our_own_replicas_are_drawn_alike(worlds):
    for _, both in worlds(4).run(from_meta, True, False):
        assert torch.equal(both[0], both[1])


def both_kinds_of_groups(rank: int, pg: dist.ProcessGroup, tool: str) -> tuple[str, dict[str, Tensor]]:
    """Return what is said of a model with a layer over all ranks and one over half of them, and its gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts"))
    every = init_device_mesh("cpu", (4,))
    with (
        tokenferry.ExpertGroup(every.get_group(), SHAPE, backend="cpu") as wide,
        tokenferry.ExpertGroup(mesh["experts"].get_group(), SHAPE, backend="cpu") as narrow,
    ):
        layers = [MoELayer(group, 8, seed=i, dtype=torch.float64) for i, group in enumerate((wide, narrow))]
        model: nn.Module = nn.Sequential(*layers)
        with pytest.raises(tokenferry.ConfigError) as caught:
            parallelize(model, replicate=mesh["replicate"])
        parallelize(layers[1], replicate=mesh["replicate"])
        experts = parallelize(model)
        if tool == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=every, ignored_params=experts)
        model(rows_of(rank)).square().sum().backward()
        found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        return str(caught.value), {
            name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()
        }


def rows_of(rank: int) -> Tensor:
    return torch.randn(3 + rank, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("tool", ["ddp", "fsdp"])
def test_a_model_may_have_groups_of_both_kinds(worlds, tool):
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        model = nn.Sequential(*(MoELayer(group, 8, seed=i, dtype=torch.float64) for i in range(2)))
        torch.stack([model(rows_of(rank)).square().sum() for rank in range(4)]).mean().backward()
        want = {name: p.grad for name, p in model.named_parameters()}
    for message, got in worlds(4).run(both_kinds_of_groups, tool):
        assert "'0', which hold the same experts" in message
        assert "call parallelize(layer, replicate=) for each of those, then parallelize(model) without it" in message
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


def wide_gradients(rank: int, pg: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return the float32 gradients of bfloat16 experts, as they are, clipped and unscaled, and their norm."""
    found = {}
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        experts = GELUExperts(group, 8, dtype=torch.bfloat16)
        experts.up.grad_dtype = torch.float32
        experts.down.grad_dtype = None  # whatever comes
        layer = MoELayer(group, experts=experts)
        for _ in range(2):
            for r in range(2) if pg is None else [rank]:
                (layer(rows_of(r).bfloat16()).float().square().sum() / (2 if pg is None else 1)).backward()
        assert experts.up.grad.dtype == torch.float32
        assert experts.up.grad_dtype == torch.float32
        assert experts.down.grad_dtype is None
        if pg is not None:
            before = experts.up.grad.to_local().clone()
            parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("experts",)))
            assert torch.equal(layer.experts.up.grad.to_local(), before)
            assert experts.up.grad_dtype == torch.float32
        found["up"], found["norm"] = whole(layer.experts.up.grad), clip_grad_norm_(layer.experts, 0.5)
        found["clipped"] = whole(layer.experts.up.grad)
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones((), device="cpu"))
        scaler.unscale_(torch.optim.SGD(layer.experts.parameters(), lr=0.1))
        found["unscaled"] = whole(layer.experts.up.grad)
        return found


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def test_gradients_have_the_dtype_that_was_asked_for(worlds):
    want = wide_gradients(0, None)
    assert want["norm"] > 0.5
    for got in worlds(2).run(wide_gradients):
        assert got["up"].dtype == torch.float32
        for name, value in want.items():
            torch.testing.assert_close(
                got[name].float(), value.float(), rtol=0.02, atol=0.02 * value.abs().max().item()
            )
        assert torch.equal(got["unscaled"], got["clipped"] / 4)


def scaled_apart(rank: int, pg: dist.ProcessGroup, where: int) -> list[float]:
    """Return the scales of two steps, of which the second has an infinity in the experts of one rank alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts"))
    scaler, scales = GradScaler("cpu", init_scale=16.0), []
    with tokenferry.ExpertGroup(mesh["experts"].get_group(), SHAPE, backend="cpu") as group:
        layer = MoELayer(group, 8)
        parallelize(layer, replicate=mesh["replicate"])
        model = DistributedDataParallel(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = [p.detach().clone() for p in layer.expert_parameters()]
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(model(rows_of(rank).float()).square().sum()).backward()
            if step and rank == where:
                layer.experts.gate.grad.to_local()[0, 0, 0] = torch.inf
            scaler.unscale_(optimizer)
            if step:
                with implicit_replication():
                    scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert all(
            torch.equal(p.to_local(), b.to_local()) for p, b in zip(layer.expert_parameters(), before, strict=True)
        )
    return scales


@pytest.mark.parametrize("where", [0, 3])
def test_ranks_with_the_same_experts_scale_alike(worlds, where):
    assert worlds(4).run(scaled_apart, where) == [[16.0, 8.0]] * 4


def collectives_of_a_scaler(rank: int, pg: dist.ProcessGroup) -> int:
    """Return how often ranks that have told nothing of replicas reduce."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        layer, scaler = MoELayer(group, 8), GradScaler("cpu", init_scale=16.0)
        optimizer = torch.optim.SGD(layer.expert_parameters(), lr=0.1)
        scaler.scale(layer(rows_of(rank).float()).square().sum()).backward()
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            scaler.unscale_(optimizer)
        return reduce.call_count


def test_scalers_reduce_once_without_replicas(worlds):
    assert worlds(2).run(collectives_of_a_scaler) == [1, 1]


class Adapted(GELUExperts):
    """Experts to which an adapter is added when they have been drawn."""

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = super().forward(rows, offsets)
        return out + by_expert(lambda product, rows, a: product(rows, a), rows, offsets, self.a)


def late_replicas(rank: int, pg: dist.ProcessGroup, on_meta: bool) -> tuple[str, Tensor]:
    """Return what training says of an adapter without values, and the adapter of all slots after three steps."""
    torch.manual_seed(rank)
    message = ""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        router = PlacedRouter(Router(16, 3, 2), Placement.of(torch.tensor([0, 1, 0, 2]), 2), group)
        layer = MoELayer(group, experts=Adapted(group, 8), router=router)
        layer.reset_parameters()
        # Not contiguous, as torch.linalg.qr and others return matrices.
        layer.experts.a = nn.Parameter(torch.randn(2, 16, 16, device="meta" if on_meta else "cpu").mT)
        parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("experts",)))
        if on_meta:
            layer.to_empty(device="cpu")
            layer.reset_parameters()
            with pytest.raises(tokenferry.ConfigError) as caught:
                layer(rows_of(rank).float())
            message = str(caught.value)
            with torch.no_grad():
                layer.experts.a.to_local().normal_()
            parallelize(layer)
        first = whole(layer.experts.a)
        optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2)
        for _ in range(3):
            layer(rows_of(rank).float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(whole(layer.experts.a), first)
        return message, whole(layer.experts.a)


@pytest.mark.parametrize("on_meta", [False, True])
def test_replicas_of_what_came_late_are_made_equal(worlds, on_meta):
    for message, slots in worlds(2).run(late_replicas, on_meta):
        assert ("experts: a had no values when parallelize would have made" in message) == on_meta
        assert torch.equal(slots[0], slots[2])
        assert not torch.equal(slots[0], slots[1])


def placed_apart(rank: int, pg: dist.ProcessGroup) -> None:
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        slots = torch.tensor([[0, 1, 0, 2], [0, 1, 2, 0]][rank])
        layer = MoELayer(group, 8, router=PlacedRouter(Router(16, 3, 2), Placement.of(slots, 2), group))
        before = layer.experts.gate.to_local().detach().clone()
        with pytest.raises(tokenferry.ArgumentError, match="parallelize: ranks 0 and 1 passed different placements"):
            parallelize(layer)
        assert torch.equal(layer.experts.gate.to_local(), before)


def test_placements_that_differ_are_refused_on_all_ranks(worlds):
    """Before rows are sent to a rank that does not wait for them."""
    worlds(2).run(placed_apart)


def test_replicas_on_one_rank_are_made_equal():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        router = PlacedRouter(Router(16, 3, 2), Placement.of(torch.tensor([0, 1, 0, 2]), 1), group)
        layer = MoELayer(group, experts=Own(4), router=router)
        second, w = layer.experts.w[1].detach().clone(), layer.experts.w
        parallelize(layer)
        assert torch.equal(w[0], w[2])
        assert torch.equal(w[1], second)
