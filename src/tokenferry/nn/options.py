"""Options of a `MoELayer` and of its `Router`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from tokenferry.errors import ConfigError
from tokenferry.types import DispatchOptions, Layout, Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """Options of a `MoELayer`; the same on every rank.

    Args:
        shared: A module for all tokens, whose result is added: the shared experts of DeepSeekMoE (arXiv 2401.06066). It
            maps ``[T, H]`` to ``[T, H]``, on the rank that has the tokens, and runs before the dispatch, on the same
            stream: nothing overlaps. Its parameters are replicated.
        quantize: Cast rows to FP8 for the way to the experts, with scales of this format; DeepSeek-V3 dispatches in FP8
            (arXiv 2412.19437, section 3.3.3). Experts get them in their dtype; the way back, and all gradients, travel
            in that dtype. See `tokenferry.autograd.dispatch`.
        dispatch: How rows are delivered to the experts: ``Layout.EXPERTS``, with any alignment. With
            ``counts="device"`` forward does not wait for the counts, and experts get ``capacity`` rows, of which those
            past the last offset hold no data; their memory and computation are those of the capacity.
        checkpoint_experts: Keep of the experts only their rows for backward, and compute them again there: activation
            checkpointing without a second exchange.

    Raises:
        ConfigError: ``shared`` is no module, ``quantize`` no `Scale`, ``dispatch`` no `DispatchOptions`, or it has
            another layout, or ``checkpoint_experts`` is no bool.
    """

    shared: nn.Module | None = None
    quantize: Scale | None = None
    dispatch: DispatchOptions = field(default_factory=lambda: DispatchOptions(Layout.EXPERTS))
    checkpoint_experts: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint_experts, bool):
            raise ConfigError(f"LayerOptions: checkpoint_experts: expected a bool, got {self.checkpoint_experts!r}")
        if self.shared is not None and not isinstance(self.shared, nn.Module):
            raise ConfigError(
                f"LayerOptions: shared: expected a torch.nn.Module or None, got {type(self.shared).__name__}"
            )
        if self.quantize is not None and not isinstance(self.quantize, Scale):
            raise ConfigError(f"LayerOptions: quantize: expected a tokenferry.Scale or None, got {self.quantize!r}")
        if not isinstance(self.dispatch, DispatchOptions):
            got = type(self.dispatch).__name__
            raise ConfigError(f"LayerOptions: dispatch: expected a tokenferry.DispatchOptions, got {got}")
        if self.dispatch.layout is not Layout.EXPERTS:
            raise ConfigError(
                f"LayerOptions: dispatch: expected Layout.EXPERTS, got {self.dispatch.layout}; experts take rows that "
                "are grouped"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Options of a `Router`: how weights are made of scores, and the load of the experts; the same on every rank.

    Args:
        losses: Compute auxiliary losses in each forward; `auxiliary_losses` returns them.
        capacity_factor: Drop choices: of the tokens of a rank, each expert keeps at most this many times its share,
            ``T * K / E``, rounded up. As in GShard (arXiv 2006.16668, algorithm 1) first choices come before second
            ones, and then earlier tokens before later ones. Weights that stay are not changed. None: nothing is
            dropped.
        normalize: Divide the weights of a token by their sum. With one choice per token (``top_k=1``) that makes every
            weight the same, so that the task has no gradient for the router: there pass False, for the probability
            itself, as in the Switch Transformer (arXiv 2101.03961).

    Raises:
        ConfigError: ``capacity_factor`` is not a positive number, or ``normalize`` no bool.
    """

    losses: bool = False
    capacity_factor: float | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool):
            raise ConfigError(f"RouterOptions: normalize: expected a bool, got {self.normalize!r}")
        factor = self.capacity_factor
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if factor is not None and not (is_number and factor > 0 and math.isfinite(factor)):
            raise ConfigError(f"RouterOptions: capacity_factor: expected a positive number or None, got {factor!r}")
