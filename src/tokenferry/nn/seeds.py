"""Random number streams of a layer: one for the router, and one for each of the E experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenferry.errors import ConfigError

_MAX_SEED = 2**40
_STREAMS_PER_SEED = 2**20
ROUTER_STREAM = 0
FIRST_EXPERT_STREAM = 1


def generator(call: str, seed: int, stream: int) -> torch.Generator:
    """Return a CPU generator that yields the same numbers on all ranks.

    Raises:
        ConfigError: ``seed`` is out of range.
    """
    if not 0 <= seed < _MAX_SEED:
        raise ConfigError(f"{call}: seed: expected 0 .. 2^40 - 1, got {seed}")
    return torch.Generator(device="cpu").manual_seed(seed * _STREAMS_PER_SEED + stream)


def initialised_tensor(module: nn.Module, weight: str) -> nn.Parameter:
    """Return the tensor that `reset_parameters` initialises for a weight: itself, or ``parametrize``'s original.

    Raises:
        ConfigError: the weight is computed from several tensors, or no longer exists.
    """
    found = find_initialised_tensor(module, weight)
    if found is None:
        raise ConfigError(
            f"{type(module).__name__}: reset_parameters: {weight} is no parameter any more, nor computed from one "
            "tensor alone; draw the module first, and change what it is made of afterwards"
        )
    return found


def find_initialised_tensor(module: nn.Module, weight: str) -> nn.Parameter | None:
    """Return what `initialised_tensor` returns, or None where it raises."""
    own = dict(module.named_parameters())
    return own.get(weight, own.get(f"parametrizations.{weight}.original"))


def normal(source: torch.Generator, rows: int, columns: int) -> Tensor:
    """Draw ``[rows, columns]`` normal numbers in float32 on the CPU: the same whatever torch's defaults are."""
    return torch.randn(rows, columns, generator=source, dtype=torch.float32, device="cpu")
