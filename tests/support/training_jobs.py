"""Jobs that train a small model with `MoELayer` by each tool, and the same training in one process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tokenferry
from tokenferry import MoeShape, Routing
from tokenferry.nn import LayerOptions, MoELayer, Router, clip_grad_norm_, parallelize

EXPERTS, TOP_K, HIDDEN, FFN = 8, 2, 16, 12
TOKENS = (5, 3, 8, 6)
"""Tokens of each of four ranks: the mean over ranks is not the mean over tokens."""
SHAPE = MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=sum(TOKENS) + 42)
LIMIT = 0.02
"""The norm to which gradients are clipped, below that of every step."""


def device_of(pg: dist.ProcessGroup | None) -> torch.device:
    """Return the device of a process group's tensors: the GPU of this rank for NCCL, else the CPU."""
    on_gpu = pg is not None and dist.get_backend(pg) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def open_group(pg: dist.ProcessGroup | None) -> tokenferry.ExpertGroup:
    """Make a group on the device of the process group. Its ranks may wait while another compiles."""
    return tokenferry.ExpertGroup(pg, SHAPE, backend=device_of(pg).type, timeout_s=200.0)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        tool: ``"hand"``, ``"ddp"`` or ``"fsdp"``: what keeps the copies of replicated parameters equal.
        dtype: Of parameters and rows.
        optimizer: Which AdamW, ``"plain"``, ``"foreach"`` or ``"fused"``; or another optimizer of torch, by its name.
        expert_ranks: Ranks over which experts are spread; others hold them again. None: all.
    """

    tool: str
    dtype: torch.dtype = torch.float64
    optimizer: str = "plain"
    expert_ranks: int | None = None

    def mesh(self, pg: dist.ProcessGroup) -> DeviceMesh:
        """Return all ranks: those that hold the same experts, and those over which they are spread."""
        wide = self.expert_ranks or pg.size()
        names = ("replicate", "experts")
        return init_device_mesh(device_of(pg).type, (pg.size() // wide, wide), mesh_dim_names=names)

    def open_group(self, pg: dist.ProcessGroup) -> tokenferry.ExpertGroup:
        """Make the group of the experts."""
        if self.expert_ranks is None:
            return open_group(pg)
        return open_group(self.mesh(pg)["experts"].get_group())

    def together(self) -> AbstractContextManager[Any]:
        """Return what a call on DTensors and tensors at once needs; with FSDP2 all are DTensors."""
        return nullcontext() if self.tool == "fsdp" else implicit_replication()


class Fixed(nn.Module):
    """A router without gradients: those through gate weights are float32, whatever the dtype of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = Router(HIDDEN, EXPERTS, TOP_K, seed=4).requires_grad_(False)

    def forward(self, x: Tensor) -> Routing:
        return self.choice(x.detach())


class Model(nn.Module):
    """Two layers of experts between dense ones."""

    def __init__(self, group: tokenferry.ExpertGroup, dtype: torch.dtype, options: LayerOptions | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        fixed = dtype == torch.float64
        self.moe = nn.ModuleList(
            MoELayer(group, FFN, router=Fixed() if fixed else None, seed=seed, options=options) for seed in (1, 2)
        )
        self.last = nn.Linear(HIDDEN, HIDDEN)
        self.to(dtype)
        if not self.first.weight.is_meta:
            self.to(group.device)  # the same values on each device: they were drawn on the CPU

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.moe:
            x = x + layer(x)
        return self.last(x)


def batch(step: int, dtype: torch.dtype, tokens: int = sum(TOKENS)) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).device)
    return (model(x) - x.roll(1, -1)).square().mean()


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor, DTensor or not, as a copy on the CPU."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().to("cpu", copy=True)


def wholes(model: nn.Module) -> dict[str, Tensor]:
    return {bare(name): whole(p) for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {bare(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def bare(name: str) -> str:
    """Return the name of a parameter without those of wrappers."""
    return name.removeprefix("module.").removeprefix("_checkpoint_wrapped_module.")


def prepared(model: nn.Module, recipe: Recipe, pg: dist.ProcessGroup) -> nn.Module:
    """Return the model as its tool wants it."""
    if recipe.expert_ranks is not None:
        mesh = recipe.mesh(pg)
        experts = parallelize(model, mesh["experts"], replicate=mesh["replicate"])
    if recipe.tool == "ddp":
        if recipe.expert_ranks is None:
            parallelize(model)
        return DistributedDataParallel(model)
    if recipe.tool == "fsdp":
        if recipe.expert_ranks is None:
            mesh = init_device_mesh(device_of(pg).type, (pg.size(),), mesh_dim_names=("all",))
            experts = parallelize(model, mesh)
        for layer in model.moe:
            fully_shard(layer, mesh=mesh, ignored_params=experts)
        fully_shard(model, mesh=mesh, ignored_params=experts)
    return model


OTHERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True, "eps": 1e-3},
    "NAdam": {"eps": 1e-3},
    "RAdam": {"eps": 1e-3},
    "RMSprop": {"eps": 1e-3},
    "Adagrad": {"eps": 1e-3},
    "Adadelta": {"eps": 1e-3},
    "Adamax": {"eps": 1e-3},
    "Adafactor": {},
    "Rprop": {},
}
"""Optimizers of torch, with an eps that does not turn rounding errors of gradients near zero into steps."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer in OTHERS:
        made: torch.optim.Optimizer = getattr(torch.optim, recipe.optimizer)(
            parameters, lr=1e-2, **OTHERS[recipe.optimizer]
        )
        return made
    kind = {} if recipe.optimizer == "plain" else {recipe.optimizer: True}
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, **kind)


def average_by_hand(model: nn.Module, pg: dist.ProcessGroup) -> None:
    experts = {p for layer in model.moe for p in layer.expert_parameters()}
    for p in model.parameters():
        if p not in experts and p.grad is not None:
            dist.all_reduce(p.grad, group=pg)
            p.grad /= pg.size()


def train(rank: int, pg: dist.ProcessGroup, recipe: Recipe) -> dict[str, Any]:
    """Three steps on this rank's tokens, with clipping and a moving average."""
    with recipe.open_group(pg) as group:
        model = prepared(Model(group, recipe.dtype), recipe, pg)

        def step(i: int) -> Tensor:
            loss = loss_of(model, batch(i, recipe.dtype).split(TOKENS)[rank])
            loss.backward()
            if recipe.tool == "hand":
                average_by_hand(model, pg)
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=pg)
            return whole(mean / pg.size())

        return _steps(model, make_optimizer(model, recipe), recipe, step)


def train_alone(recipe: Recipe, num_ranks: int = len(TOKENS)) -> dict[str, Any]:
    """The same in this process, from the rule: the gradients are those of the mean of the ranks' losses."""
    with open_group(None) as group:
        model = Model(group, recipe.dtype)

        def step(i: int) -> Tensor:
            parts = batch(i, recipe.dtype).split(TOKENS)[:num_ranks]
            loss = torch.stack([loss_of(model, part) for part in parts]).mean()
            loss.backward()
            return loss.detach()

        return _steps(model, make_optimizer(model, recipe), recipe, step)


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, step: Callable[[int], Tensor]
) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": []}
    average = None if recipe.tool == "fsdp" else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for i in range(3):
        found["losses"].append(step(i))
        if i == 0:
            found["gradients"] = gradients(model)
        with recipe.together():
            # Torch's function takes DTensors of one mesh.
            several = recipe.expert_ranks is not None
            norm = clip_grad_norm_(model, LIMIT) if several else nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
        found["norms"].append(whole(norm))
        optimizer.zero_grad()
    found["parameters"] = wholes(model)
    if average is not None:
        found["average"] = wholes(average.module)
    return found
