"""The fast path of a group of several nodes; see `tokenferry.backends.cuda.fast_path`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from tokenferry.backends.base import QuickChecks
from tokenferry.backends.cuda.fast_path import BackendCalls, CudaFastPath
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    DecodePlan,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    EncodingName,
    MoeShape,
    Numerics,
    Plan,
    Quantized,
    Routing,
    Scale,
)


class AcrossFastPath(CudaFastPath):
    """The fast path of one view of a group; see `tokenferry.backends.base.FastPath`.

    Args:
        calls: The calls of this rank.
        shape: Sizes of the view.
        checks: Checks of arguments.
        explain: Raises an error, or one that names the ranks at fault.
    """

    def __init__(
        self, calls: BackendCalls, shape: MoeShape, checks: QuickChecks, explain: Callable[[Exception], NoReturn]
    ) -> None:
        super().__init__(calls, shape, checks)
        self._explain = explain

    def dispatch(
        self, x: Tensor | Quantized, routing: Routing, options: DispatchOptions | None, num_sms: int | None
    ) -> Dispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        try:
            return super().dispatch(x, routing, options, num_sms)
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)

    def redispatch(
        self, x: Tensor | Quantized, plan: Plan, topk_weights: Tensor | None, num_sms: int | None
    ) -> Dispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        try:
            return super().redispatch(x, plan, topk_weights, num_sms)
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)

    def combine(
        self,
        y: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        bias: Tensor | tuple[Tensor, ...] | None,
        out: Tensor | None,
        num_sms: int | None,
    ) -> Combined | None:
        """See `tokenferry.backends.base.FastPath`."""
        try:
            return super().combine(y, plan, topk_weights, bias, out, num_sms)
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)

    def decode_dispatch(
        self, x: Tensor, routing: Routing, quantize: Scale | None, stats: DecodeStats | None, *, return_hook: bool
    ) -> DecodeDispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        try:
            return super().decode_dispatch(x, routing, quantize, stats, return_hook=return_hook)
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)

    def decode_combine(
        self,
        y: Tensor,
        plan: DecodePlan,
        numerics: Numerics,
        encoding: EncodingName,
        out: Tensor | None,
        stats: DecodeStats | None,
        *,
        return_hook: bool,
    ) -> DecodeCombined | None:
        """See `tokenferry.backends.base.FastPath`."""
        try:
            return super().decode_combine(y, plan, numerics, encoding, out, stats, return_hook=return_hook)
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)
