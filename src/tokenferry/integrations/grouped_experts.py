"""The experts of transformers on rows that are in the order of their experts already.

Its own function for grouped GEMMs (``experts_implementation="grouped_mm"``) sorts rows, copies them in that order,
masks those of other ranks, and puts the outputs back: some twenty operators beside the eight that compute something,
and as many passes over all rows. Rows that a dispatch has grouped by expert need none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_GROUPED_MM = "grouped_mm"
_CHOICES = (_GROUPED_MM, "tokenferry")
"""Values of ``experts_implementation`` that mean grouped GEMMs; the second one is ours, for versions before 5.23."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class GroupedExperts:
    """Runs the experts of a module, with the bits of transformers' own function.

    Args:
        experts: The module.
        linear: transformers' product of rows by expert with weights ``[L, ...]``.

    Attributes:
        inner: The name of the first weights.
    """

    def __init__(self, experts: nn.Module, linear: Callable[..., Tensor]) -> None:
        self.experts: Any = experts
        self.linear = linear
        self.inner = "gate_up_proj" if self.experts.has_gate else "up_proj"

    @classmethod
    def of(cls, experts: object) -> GroupedExperts | None:
        """Return what runs these experts, or None if they are no module whose experts functions can be exchanged.

        None too for what depends on the number of an expert beside its weights, such as biases.
        """
        try:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward
        except ImportError:
            return None
        known = (
            isinstance(experts, nn.Module)
            and ALL_EXPERTS_FUNCTIONS.get(_GROUPED_MM) is grouped_mm_experts_forward
            and hasattr(type(experts).forward, "__wrapped__")  # by what lets the function be chosen
            and "forward" not in experts.__dict__
            and hasattr(experts, "has_gate")
            and not getattr(experts, "has_bias", True)
            and not getattr(experts, "has_post_expert_norm", False)
        )
        return cls(experts, _grouped_linear) if known else None  # type: ignore[arg-type]

    def apply_now(self) -> bool:
        """Return whether the model chooses grouped GEMMs, and the weights are plain numbers.

        Both may change after the module was made; those of quantized experts mean nothing without their scales.
        """
        weight = getattr(self.experts, self.inner)
        return (
            self.experts.config._experts_implementation in _CHOICES
            and type(weight) in (Tensor, nn.Parameter)
            and weight.dtype in _DTYPES
        )

    def __call__(self, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted outputs, ``[N, H]``.

        Args:
            rows: ``[N, H]``, by expert.
            offsets: ``[L + 1]`` int32: first row of each expert, then the end; the outputs of later rows are undefined.
            weights: ``[N]``.
        """
        experts, linear, ends = self.experts, self.linear, offsets[1:]
        transposed = experts.is_transposed
        hidden = linear(rows, getattr(experts, self.inner), ends, is_transposed=transposed)
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        out = linear(hidden, experts.down_proj, ends, is_transposed=transposed)
        return (out * weights.unsqueeze(1)).to(rows.dtype)
