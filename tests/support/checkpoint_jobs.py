"""Jobs that save and load models with `MoELayer` by `torch.distributed.checkpoint`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from support.training_jobs import (
    Model,
    Recipe,
    average_by_hand,
    batch,
    loss_of,
    make_optimizer,
    open_group,
    prepared,
    wholes,
)
from tokenferry.nn import MoELayer

TOKENS = 24
"""Tokens of all ranks: a number that 4, 2 and 1 divide, so that the mean over ranks is the mean over tokens."""


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, pg: dist.ProcessGroup | None, steps: range
) -> list[float]:
    """Train, and return the mean loss of each step. Alone if ``pg`` is None."""
    losses = []
    for i in steps:
        x = batch(i, recipe.dtype, TOKENS)
        loss = loss_of(model, x if pg is None else x.chunk(pg.size())[pg.rank()])
        loss.backward()
        mean = loss.detach().clone()
        if pg is not None:
            dist.all_reduce(mean, group=pg)
            mean /= pg.size()
            if recipe.tool == "hand":
                average_by_hand(model, pg)
        with recipe.together():
            optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> dict[str, Any]:
    """Return the states of both; an optimizer without one makes it by a step."""
    with recipe.together():
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def save(rank: int, pg: dist.ProcessGroup, recipe: Recipe, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Save after two steps; return the losses of the next two, and what was saved as one process would have it."""
    with recipe.open_group(pg) as group:
        model = prepared(Model(group, recipe.dtype), recipe, pg)
        optimizer = make_optimizer(model, recipe)
        advance(model, optimizer, recipe, pg, range(2))
        bare = getattr(model, "module", model)
        states = state_of(bare, optimizer, recipe)
        dcp.save(states, checkpoint_id=folder)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(bare, options=options)
        full = {name: value.clone() for name, value in full.items()}
        return advance(model, optimizer, recipe, pg, range(2, 4)), full


def resume(rank: int, pg: dist.ProcessGroup | None, recipe: Recipe, folder: Path) -> list[float]:
    """Load what `save` has saved, on any number of ranks; return the losses of the next two steps."""
    with open_group(None) if pg is None else recipe.open_group(pg) as group:
        model = Model(group, recipe.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        model = model if pg is None else prepared(model, recipe, pg)
        optimizer = make_optimizer(model, recipe)
        bare = getattr(model, "module", model)
        states = state_of(bare, optimizer, recipe)
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(bare, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        return advance(model, optimizer, recipe, pg, range(2, 4))


def take_over(rank: int, pg: dist.ProcessGroup, recipe: Recipe, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load the state of a single process, which only rank 0 has; return all parameters."""
    with recipe.open_group(pg) as group:
        model = prepared(Model(group, recipe.dtype), recipe, pg)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(getattr(model, "module", model), full if rank == 0 else {}, options=options)
        return wholes(model)


def save_bare(rank: int, pg: dist.ProcessGroup, folder: Path) -> None:
    """Save a layer, without any preparation."""
    with open_group(pg) as group:
        dcp.save(MoELayer(group, 12, seed=5).state_dict(), checkpoint_id=folder)


def load_bare(rank: int, pg: dist.ProcessGroup, folder: Path) -> dict[str, Any]:
    """Load into a layer with other values."""
    with open_group(pg) as group:
        layer = MoELayer(group, 12, seed=6)
        state = layer.state_dict()
        dcp.load(state, checkpoint_id=folder)
        layer.load_state_dict(state)
        return wholes(layer)
