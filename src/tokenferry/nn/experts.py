"""The experts of a `MoELayer`: modules that compute a row for each row, with the weights of its expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError
from tokenferry.nn.grouped import Product, by_expert
from tokenferry.nn.seeds import FIRST_EXPERT_STREAM, find_initialised_tensor, generator, initialised_tensor, normal
from tokenferry.nn.sharding import fill, local_part
from tokenferry.nn.wrappers import unwrapped


class SeededExperts(nn.Module):
    """Base class of our experts: a few matrices for each expert, initialised from a seed.

    The values do not depend on the rank that holds the expert, nor on the dtype.
    """

    def __init__(
        self, group: ExpertGroup, sizes: dict[str, Sequence[int]], seed: int, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for hidden in next(iter(sizes.values())):
            if not isinstance(hidden, int) or hidden < 1:
                raise ConfigError(f"{name}: ffn_hidden: expected a positive integer, got {hidden}")
        generator(name, seed, FIRST_EXPERT_STREAM)  # refuses a bad seed
        self.seed = seed
        first = group.rank * group.num_local_experts
        self.numbers = list(range(first, first + group.num_local_experts))  # of the experts that this rank holds
        device = torch.get_default_device()
        device = device if device.type == "meta" else group.device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.weight_names = tuple(sizes)
        for weight, (inner, outer) in sizes.items():
            empty = torch.empty(group.num_local_experts, inner, outer, dtype=dtype, device=device)
            self.register_parameter(weight, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters from the seed: the experts as they were made.

        Contract: local. Parameters on the meta device stay without values. What was added since the experts were made,
        such as adapters, is left as it is. Of a parameter that torch's ``parametrize`` computes, the original is
        initialised.

        Raises:
            ConfigError: a parameter is computed from several tensors, or no longer exists. Nothing was initialised.
        """
        weights = [initialised_tensor(self, weight) for weight in self.weight_names]
        parts = [local_part(weight) for weight in weights]
        if parts[0].device.type == "meta":
            return
        size = len(self.numbers)
        if any(part.shape != (size, *weight.shape[1:]) for part, weight in zip(parts, weights, strict=True)):
            # A tool has sharded the experts of this rank, such as FSDP2 those of a group of one rank.
            per_expert = [list(self._initial_values(number, weights)) for number in self.numbers]
            for weight, of_experts in zip(weights, zip(*per_expert, strict=True), strict=True):
                fill(weight, torch.stack(of_experts))
            return
        for i, number in enumerate(self.numbers):
            for part, values in zip(parts, self._initial_values(number, weights), strict=True):
                part[i].copy_(values)

    def _initial_values(self, number: int, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the initial values of an expert in each of the parameters."""
        source = generator(type(self).__name__, self.seed, FIRST_EXPERT_STREAM + number)
        for weight in weights:
            inner, outer = weight.shape[1:]
            yield normal(source, inner, outer) * inner**-0.5


def seeded_parameters(experts: nn.Module) -> set[nn.Parameter | None]:
    """Return the parameters that `SeededExperts.reset_parameters` initialises alike wherever an expert is."""
    ours = unwrapped(experts)
    if isinstance(ours, SeededExperts) and type(ours).reset_parameters is SeededExperts.reset_parameters:
        return {find_initialised_tensor(ours, weight) for weight in ours.weight_names}
    return set()


class SwiGLUExperts(SeededExperts):
    """Experts that compute ``(silu(x @ gate) * (x @ up)) @ down``.

    Contract: local. Grouped products where torch has them, see `by_expert`.

    Args:
        group: The group of the layer; its shape determines E and H. It is not kept.
        ffn_hidden: F, the intermediate size.
        seed: Seed of the parameters, in 0 .. 2^40 - 1; the same on every rank.
        dtype: dtype of the parameters; None: torch's default dtype.
        fp8: Whether products of forward are in FP8, see `by_expert`. Parameters and gradients stay in their dtype.

    Attributes:
        gate, up: ``[L, H, F]`` parameters; in a layer on several ranks ``[E, H, F]``, of which this rank holds L.
        down: ``[L, F, H]`` parameter, likewise.

    Raises:
        ConfigError: ``ffn_hidden`` or ``seed`` is out of range.
    """

    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def __init__(
        self,
        group: ExpertGroup,
        ffn_hidden: int,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
    ) -> None:
        hidden = group.shape.hidden
        inward, outward = (hidden, ffn_hidden), (ffn_hidden, hidden)
        super().__init__(group, {"gate": inward, "up": inward, "down": outward}, seed, dtype)
        self.fp8 = fp8

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the output of each row's expert.

        Contract: local; differentiable, in the rows and the parameters. See `by_expert` for when it waits for the
            device.

        Args:
            rows: ``[n, H]``, grouped by expert, of the dtype of the parameters, unless under torch.autocast.
            offsets: ``[L + 1]`` integers: the first row of each expert, then the end; rows from there on hold no data.

        Returns:
            Tensor: ``[n, H]``, the dtype of the products.

        Raises:
            ShapeError: ``offsets`` are not ``[L + 1]``; or a parameter is a DTensor instead of this rank's part.
            RuntimeError: torch's, for rows of another width or dtype than the parameters.
        """
        return by_expert(_swiglu, rows, offsets, self.gate, self.up, self.down, fp8=self.fp8)


class GELUExperts(SeededExperts):
    """Experts that compute ``gelu(x @ up) @ down``, with the exact GELU.

    Contract: local. Grouped products where torch has them, see `by_expert`.

    Args:
        group: The group of the layer; its shape determines E and H. It is not kept.
        ffn_hidden: F, the intermediate size.
        seed: Seed of the parameters, in 0 .. 2^40 - 1; the same on every rank.
        dtype: dtype of the parameters; None: torch's default dtype.
        fp8: Whether products of forward are in FP8, see `by_expert`. Parameters and gradients stay in their dtype.

    Attributes:
        up: ``[L, H, F]`` parameter; in a layer on several ranks ``[E, H, F]``, of which this rank holds L.
        down: ``[L, F, H]`` parameter, likewise.

    Raises:
        ConfigError: ``ffn_hidden`` or ``seed`` is out of range.
    """

    up: nn.Parameter
    down: nn.Parameter

    def __init__(
        self,
        group: ExpertGroup,
        ffn_hidden: int,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
    ) -> None:
        hidden = group.shape.hidden
        super().__init__(group, {"up": (hidden, ffn_hidden), "down": (ffn_hidden, hidden)}, seed, dtype)
        self.fp8 = fp8

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the output of each row's expert.

        Contract: local; differentiable, in the rows and the parameters. See `by_expert` for when it waits for the
            device.

        Args:
            rows: ``[n, H]``, grouped by expert, of the dtype of the parameters, unless under torch.autocast.
            offsets: ``[L + 1]`` integers: the first row of each expert, then the end; rows from there on hold no data.

        Returns:
            Tensor: ``[n, H]``, the dtype of the products.

        Raises:
            ShapeError: ``offsets`` are not ``[L + 1]``; or a parameter is a DTensor instead of this rank's part.
            RuntimeError: torch's, for rows of another width or dtype than the parameters.
        """
        return by_expert(_gelu, rows, offsets, self.up, self.down, fp8=self.fp8)


def _swiglu(product: Product, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return product(F.silu(product(rows, gate)) * product(rows, up), down)


def _gelu(product: Product, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return product(F.gelu(product(rows, up)), down)
