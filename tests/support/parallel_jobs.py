"""Jobs about what `parallelize` is for, and what happens without it."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import tokenferry
from support.sharded import local_parts
from support.training_jobs import (
    HIDDEN,
    SHAPE,
    Model,
    Recipe,
    average_by_hand,
    batch,
    device_of,
    gradients,
    loss_of,
    open_group,
    prepared,
    whole,
    wholes,
)
from tokenferry.nn import GroupLimit, LayerOptions, MoELayer, Router, parallelize, update_biases
from tokenferry.nn.balance import PlacedRouter, Placement


def unprepared(rank: int, pg: dist.ProcessGroup) -> tuple[dict[str, str], bool]:
    """Return the error of each tool that is used without `parallelize`, and whether the experts are as they were."""
    errors = {}
    with open_group(pg) as group:
        whole_mesh = init_device_mesh(device_of(pg).type, (pg.size(),))
        tools = {
            "ddp": DistributedDataParallel,
            "ddp of a compiled module": lambda module: (
                parallelize(module) and DistributedDataParallel(torch.compile(module))
            ),
            "fsdp": fully_shard,
            "fsdp of a mesh": lambda module: fully_shard(module, mesh=whole_mesh),
        }
        kept = True
        for name, tool in tools.items():
            for module in (Model(group, torch.float32), MoELayer(group, 12, router=nn.Identity(), seed=3)):
                experts = [p for p in module.parameters() if hasattr(p, "to_local")]
                before = [p.to_local().detach().clone() for p in experts]
                try:
                    tool(module)
                except Exception as error:  # noqa: BLE001 - torch's own, of any class
                    errors[f"{name} {type(module).__name__}"] = str(error)
                kept &= all(torch.equal(p.to_local(), value) for p, value in zip(experts, before, strict=True))
        return errors, kept


def clipped_at_once(rank: int, pg: dist.ProcessGroup) -> str:
    """Clip DTensors and tensors together without `implicit_replication`."""
    with open_group(pg) as group:
        model = Model(group, torch.float64)
        loss_of(model, batch(0, torch.float64, 4)).backward()
        try:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        except RuntimeError as error:
            return str(error)
    return ""


def traced_for_nans(rank: int, pg: dist.ProcessGroup) -> str:
    """Return what torch says about DTensors in its anomaly mode."""
    with open_group(pg) as group, torch.autograd.set_detect_anomaly(True):
        try:
            loss_of(Model(group, torch.float64), batch(0, torch.float64, 4)).backward()
        except NotImplementedError as error:
            return str(error)
    return ""


def clipped_values(rank: int, pg: dist.ProcessGroup, tool: str) -> tuple[str, bool]:
    """Clip values: return what torch says of DTensors and tensors at once, and whether it is right with help."""
    message, recipe = "", Recipe(tool)
    with open_group(pg) as group:
        model = prepared(Model(group, torch.float64), recipe, pg)
        loss_of(model, batch(0, torch.float64, 4)).backward()
        want = {name: value.clamp(-1e-3, 1e-3) for name, value in gradients(model).items()}
        try:
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        except RuntimeError as error:
            message = str(error)
        with recipe.together():
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        got = gradients(model)
    return message, all(torch.equal(got[name], value) for name, value in want.items())


def refusals(rank: int, pg: dist.ProcessGroup) -> list[str]:
    """Return what `parallelize` says about models and meshes that do not fit."""
    messages = []
    with open_group(pg) as group:
        model = Model(group, torch.float32)
        two = init_device_mesh(device_of(pg).type, (2, pg.size() // 2), mesh_dim_names=("a", "b"))
        before = list(model.parameters())
        for args in ((nn.Linear(2, 2),), (model, two), (model, two["b"]), (model, init_device_mesh("meta", (4,)))):
            try:
                parallelize(*args)
            except tokenferry.ConfigError as error:
                messages.append(str(error))
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    return messages


def small_groups(rank: int, pg: dist.ProcessGroup) -> list[str]:
    """Return what `parallelize` says where groups have two of four ranks, and nobody says well what others hold."""
    recipe, messages = Recipe("ddp", expert_ranks=2), []
    mesh = recipe.mesh(pg)
    with recipe.open_group(pg) as group:
        model, slots = Model(group, torch.float32), torch.arange(SHAPE.num_experts)
        router = PlacedRouter(Router(HIDDEN, SHAPE.num_experts, 2), Placement.of(slots, 2), group)
        placed = MoELayer(group, 12, router=router)
        here = dist.new_group([0, 1])
        for given, replicate in (
            (model, None),
            (model, mesh),
            (model, "all"),
            (placed, mesh["replicate"]),
            (model, mesh["experts"]),
            (model, dist.group.WORLD if rank < 2 else here),
        ):
            try:
                parallelize(given, replicate=replicate)
            except tokenferry.ConfigError as error:
                messages.append(str(error))
        assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
        before = {}
        for name, parameter in model.moe.named_parameters():
            if "experts" in name:
                before[name] = parameter.to_local().detach()
                before[name] += rank
                before[name] = before[name] - (rank // 2) * 2
        parallelize(model, replicate=mesh["replicate"].get_group())
        for name, value in before.items():
            got = model.moe.get_parameter(name).to_local().detach()
            assert torch.allclose(got, value, atol=1e-5), f"{name} is not that of the first of the ranks that hold it"
        parallelize(placed, replicate=False)
        parallelize(model, replicate=False)
        assert [layer._same_experts for layer in model.moe] == [None, None]
    return messages


def kept_by_parallelize(rank: int, pg: dist.ProcessGroup) -> None:
    """Parameters that are replaced keep what they had, and one of two layers stays one; hooks are refused."""
    with open_group(pg) as group:
        model, mesh = Model(group, torch.float32), init_device_mesh("cpu", (pg.size(),), mesh_dim_names=("experts",))
        model.moe[1].experts.gate = model.moe[0].experts.gate
        loss_of(model, batch(rank, torch.float32, 5)).backward()
        before = {name: whole(p.grad) for name, p in model.named_parameters()}
        model.moe[0].experts.up.decay = 0.5
        handle = model.moe[1].experts.down.register_post_accumulate_grad_hook(print)
        parameters = list(model.parameters())
        try:
            parallelize(model, mesh)
        except tokenferry.ConfigError as error:
            assert "parallelize: 'moe.1': experts: down: has hooks, and would be" in str(error)  # noqa: PT017 - in a rank
        else:
            raise AssertionError("hooks were lost")
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True)), "some were replaced"
        handle.remove()
        parallelize(model, mesh)
        assert model.moe[1].experts.gate is model.moe[0].experts.gate
        assert model.moe[0].experts.gate.device_mesh == mesh
        assert model.moe[0].experts.up.decay == 0.5
        for name, p in model.named_parameters():
            assert torch.equal(whole(p.grad), before[name]), name
        model.zero_grad()
        loss_of(DistributedDataParallel(model), batch(rank, torch.float32, 5)).backward()
        for name, p in model.named_parameters():
            if "experts" in name:
                close = torch.allclose(whole(p.grad), before[name], rtol=1e-5, atol=1e-7)
                assert close, f"{name}: an expert that two layers share is in DistributedDataParallel's reducer"


def prepared_again(rank: int, pg: dist.ProcessGroup) -> list[int]:
    """Return how many hooks look at what is loaded into each part of the experts."""
    with open_group(pg) as group:
        model = Model(group, torch.float32)
        for name in ("one", "other"):
            parallelize(model, init_device_mesh("cpu", (pg.size(),), mesh_dim_names=(name,)))
            model = copy.deepcopy(model)
        return [len(part._load_state_dict_pre_hooks) for layer in model.moe for part in layer.experts.modules()]


def ignored_before(rank: int, pg: dist.ProcessGroup) -> float:
    """Return a buffer that DistributedDataParallel was told to ignore, after it has run."""
    with open_group(pg) as group:
        model = Model(group, torch.float32)
        model.register_buffer("mine", torch.full((1,), float(rank)))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["mine"])
        parallelize(model)
        loss_of(DistributedDataParallel(model), batch(rank, torch.float32, 5)).backward()
        return model.mine.item()


def balanced(rank: int, pg: dist.ProcessGroup | None, recipe: Recipe, num_ranks: int) -> Tensor:
    """Return the biases after a step with this rank's tokens; alone, with those of all ranks."""
    with open_group(None) if pg is None else recipe.open_group(pg) as group:
        router = Router(HIDDEN, SHAPE.num_experts, 2, group_limit=GroupLimit(1, 1))
        layer = MoELayer(group, 12, router=router)
        if pg is not None:
            mesh = recipe.mesh(pg)
            parallelize(layer, replicate=mesh["replicate"])
        for number in [rank] if pg is not None else range(num_ranks):
            layer(batch(number, torch.float32, 5 + number))
        update_biases(layer)
        return router.bias


def biases_of_copies(rank: int, pg: dist.ProcessGroup, tool: str) -> list[Tensor | str]:
    """Return the biases where each rank has all experts, or what `update_biases` says.

    For what `parallelize` was told of copies: nothing, that there are none, and that all ranks have them.
    """
    recipe, found = Recipe(tool, expert_ranks=1), []
    mesh = recipe.mesh(pg)
    for replicate in (None, False, mesh["replicate"]):
        with recipe.open_group(pg) as group:
            layer = MoELayer(group, 12, router=Router(HIDDEN, SHAPE.num_experts, 2, group_limit=GroupLimit(1, 1)))
            if replicate is not None:
                parallelize(layer, replicate=replicate)
            model = DistributedDataParallel(layer) if tool == "ddp" else layer
            if tool == "fsdp":
                fully_shard(model, mesh=mesh["replicate"])
            model(batch(rank, torch.float32, 5 + rank)).sum().backward()
            try:
                update_biases(model)
                found.append(layer.router.bias.clone())
            except tokenferry.ConfigError as error:
                found.append(str(error))
    return found


def averaged_fsdp(rank: int, pg: dist.ProcessGroup) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return two models' parameters, and those of the second after it was moved half way to the first."""
    recipe = Recipe("fsdp")
    with open_group(pg) as group:
        model, average = (prepared(Model(group, recipe.dtype), recipe, pg) for _ in range(2))
        try:
            AveragedModel(model)
        except AssertionError as error:
            assert "does not support deepcopy" in str(error)  # noqa: PT017 - torch's own, in a rank
        else:
            raise AssertionError("a sharded model was copied")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3.0)
        get_ema_multi_avg_fn(0.5)(list(average.parameters()), list(model.parameters()), 1)
        return wholes(model), wholes(average)


def narrow_fsdp(rank: int, pg: dist.ProcessGroup) -> dict[str, Any]:
    """Train a step in bfloat16 with float32 parameters by FSDP2's policy."""
    with open_group(pg) as group:
        model, mesh = Model(group, torch.float32), init_device_mesh(device_of(pg).type, (pg.size(),))
        experts, policy = parallelize(model, mesh), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for layer in model.moe:
            fully_shard(layer, mesh=mesh, ignored_params=experts, mp_policy=policy)
        fully_shard(model, mesh=mesh, ignored_params=experts, mp_policy=policy)
        x = batch(0, torch.float32, 8).to(group.device)
        out = model(x)
        (out.float() - x).square().mean().backward()
        return {"dtype": out.dtype, **gradients(model)}


def narrow_parameters(rank: int, pg: dist.ProcessGroup, prepare_router: bool) -> str:
    """Train a step of a bfloat16 model, whose router is float32, by FSDP2; return the error of torch, if any."""
    with open_group(pg) as group:
        layer = MoELayer(group, 12, dtype=torch.bfloat16)
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16), layer)
        mesh = init_device_mesh(device_of(pg).type, (pg.size(),))
        experts = parallelize(model, mesh)
        if prepare_router:
            fully_shard(layer.router, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=experts)
        try:
            out = model(batch(0, torch.bfloat16, 8).to(group.device))
        except AssertionError as error:
            return str(error)
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
        assert layer.router.weight.dtype == torch.float32
        return ""


def narrow_alone() -> dict[str, Any]:
    """The same with autocast in one process."""
    with open_group(None) as group:
        model, x = Model(group, torch.float32), batch(0, torch.float32, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        (out.float() - x).square().mean().backward()
        return gradients(model)


def from_meta(rank: int, pg: dist.ProcessGroup, tool: str) -> dict[str, Tensor]:
    """Make a layer on the meta device, prepare it for a tool, give it memory and values; return its parameters.

    DistributedDataParallel comes last: it copies values, so that there have to be some.
    """
    recipe = Recipe(tool)
    with open_group(pg) as group:
        with torch.device("meta"):
            model = Model(group, torch.float32)
        if tool == "fsdp":
            model = prepared(model, recipe, pg)
        model.to_empty(device=group.device)
        for module in model.modules():
            if isinstance(module, MoELayer | Router | nn.Linear):
                module.reset_parameters()
        if tool == "ddp":
            model = prepared(model, recipe, pg)
            loss_of(model, batch(rank, torch.float32, 5)).backward()
        return {name: value for name, value in wholes(model).items() if name.startswith("moe")}


def run_alone(rank: int, pg: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return gradients of a layer as it is, with compilation and with activation checkpointing."""
    found: dict[str, Tensor] = {}
    with open_group(pg) as group:
        layer = MoELayer(group, 12, seed=1, dtype=torch.float64)
        x = torch.randn(3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        x = x.to(group.device)

        def record(name: str, out: Tensor, layer: MoELayer = layer) -> None:
            out.square().mean().backward()
            found.update({f"{name} {key}": whole(p.grad) for key, p in layer.named_parameters()})
            layer.zero_grad()

        record("eager", layer(x))
        record("checkpointed", checkpoint(layer, x, use_reentrant=False))
        record("reentrant", checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True))
        again = MoELayer(group, 12, seed=1, dtype=torch.float64, options=LayerOptions(checkpoint_experts=True))
        record("experts", again(x), again)
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            record("compiled", torch.compile(layer, backend="aot_eager", fullgraph=True)(x))
        return local_parts(found)


def run_otherwise(
    rank: int, pg: dist.ProcessGroup, tool: str, otherwise: str, expert_ranks: int | None = None
) -> list[dict[str, Tensor]]:
    """Return loss and gradients of a model under a tool: as it is, and otherwise.

    Checkpointed layers of either kind; the whole model in torch's wrapper that checkpoints; compiled as by default,
    with eager kernels; in one graph of generated code, by a call before the tool (``in place``) or after it.
    """
    found, recipe = [], Recipe(tool, expert_ranks=expert_ranks)
    backend = "inductor" if otherwise.startswith("generated") else "aot_eager"
    one_graph = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    torch._dynamo.utils.counters.clear()
    with (
        torch._dynamo.config.patch(one_graph if backend == "inductor" else {}),
        recipe.open_group(pg) as group,
    ):
        for how in ("eager", otherwise):
            options = LayerOptions(checkpoint_experts=True) if how == "experts again" else None
            model = Model(group, torch.float64, options)
            if how in ("checkpointed", "reentrant"):
                for layer in model.moe:
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=how == "reentrant")
            if how == "generated in place":
                model.compile(backend=backend)
            if how == "wrapped":
                model = checkpoint_wrapper(model)
            model = prepared(model, recipe, pg)
            run = torch.compile(model, backend=backend) if how in ("compiled", "generated") else model
            loss = loss_of(run, batch(rank, torch.float64, 5 + rank))
            loss.backward()
            found.append({"loss": whole(loss), **gradients(model)})
    if backend == "inductor":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return found


def scaled(rank: int, pg: dist.ProcessGroup, tool: str, kind: type[torch.amp.GradScaler]) -> dict[str, Any]:
    """Train two steps with scaled gradients, of which the second has an infinity on rank 1 alone.

    Return the gradients without and with a scale, and in float16, whether every parameter survived the second step, and
    the last scale.
    """
    recipe, scaler = Recipe(tool, torch.float32), kind(device_of(pg).type, init_scale=16.0)
    with open_group(pg) as group, recipe.together():
        model = prepared(Model(group, recipe.dtype), recipe, pg)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), batch(rank, recipe.dtype, 5)

        def backward(times: torch.amp.GradScaler | None) -> None:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            (loss if times is None else times.scale(loss)).backward()
            if tool == "hand":
                average_by_hand(model, pg)

        backward(None)
        found: dict[str, Any] = {"plain": gradients(model)}
        with torch.autocast(group.device.type, torch.float16):
            backward(scaler)
        scaler.unscale_(optimizer)
        found["half"] = gradients(model)
        scaler.update()
        backward(scaler)
        scaler.unscale_(optimizer)
        found["unscaled"] = gradients(model)
        scaler.step(optimizer)
        scaler.update()
        before = wholes(model)
        backward(scaler)
        if rank == 1:
            experts = next(p for name, p in model.named_parameters() if name.endswith("moe.0.experts.up"))
            experts.grad.to_local()[0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        kept = all(torch.equal(before[name], value) for name, value in wholes(model).items())
        return {**found, "kept": kept, "scale": scaler.get_scale()}


def scaled_together(rank: int, pg: dist.ProcessGroup, tool: str) -> str:
    """Return the error of torch for a model of DTensors and tensors."""
    with open_group(pg) as group:
        model = prepared(Model(group, torch.float32), Recipe(tool), pg)
        scaler = torch.amp.GradScaler(device_of(pg).type)
        scaler.scale(loss_of(model, batch(rank, torch.float32, 5))).backward()
        try:
            with implicit_replication():
                scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
        except AttributeError as error:
            return str(error)
    return ""


def second_derivative(model: nn.Module, loss: Tensor) -> Tensor:
    """Differentiate the square of a gradient, of an expert in the first layer, by one in the second."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    (first,) = torch.autograd.grad(loss, named["moe.0.experts.down"], create_graph=True)
    number = first.square().sum()
    number = number.full_tensor() if hasattr(number, "full_tensor") else number
    (second,) = torch.autograd.grad(number, named["moe.1.experts.up"])
    return whole(second)


def differentiated(rank: int, pg: dist.ProcessGroup, tool: str, expert_ranks: int | None = None) -> Tensor | str:
    """Return a second derivative under a tool, or the error of torch."""
    recipe = Recipe(tool, expert_ranks=expert_ranks)
    with recipe.open_group(pg) as group:
        model = prepared(Model(group, torch.float64), recipe, pg)
        try:
            second = second_derivative(model, loss_of(model, batch(rank, torch.float64, 5)))
        except RuntimeError as error:
            return str(error)
        return second


def differentiated_alone(num_ranks: int) -> Tensor:
    """The same in one process."""
    with open_group(None) as group:
        model = Model(group, torch.float64)
        losses = [loss_of(model, batch(rank, torch.float64, 5)) for rank in range(num_ranks)]
        return second_derivative(model, torch.stack(losses).mean())
