"""What a `MoELayer` does beside routing its tokens through experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from tokenferry.errors import ConfigError
from tokenferry.types import DispatchOptions, Layout


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of a `MoELayer`; the same on every rank.

    Args:
        shared: A module for all tokens, whose result is added: the shared experts of DeepSeekMoE (arXiv 2401.06066). It
            maps ``[T, H]`` to ``[T, H]``, on the rank that has the tokens, and runs while the rows are under way. Its
            parameters are replicated.
        dispatch: How rows are delivered to the experts: ``Layout.EXPERTS``, with any alignment. With
            ``counts="device"`` forward does not wait for the counts, and experts get ``capacity`` rows, of which those
            past the last offset hold no data; their memory and computation are those of the capacity.

    Raises:
        ConfigError: the options contradict each other.
    """

    shared: nn.Module | None = None
    dispatch: DispatchOptions = field(default_factory=lambda: DispatchOptions(Layout.EXPERTS))

    def __post_init__(self) -> None:
        if self.dispatch.layout is not Layout.EXPERTS:
            raise ConfigError(
                f"LayerOptions: dispatch: expected Layout.EXPERTS, got {self.dispatch.layout}; experts take rows that "
                "are grouped"
            )
