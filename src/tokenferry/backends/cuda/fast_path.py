"""The fast path: calls like earlier ones, whose arguments bare comparisons recognise, go straight to their kernels.

Everything that follows from shapes, options and dtypes is found under one key. Whatever is not plainly such a call,
with a group in its usual state, is left to the general path, which makes the error messages. Both paths launch by the
same code, `Dispatcher.send` and the like: they only differ in how they come by its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenferry.backends.base import Encoding, QuickChecks
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.decode import Decoding, parts_of
from tokenferry.backends.cuda.decode_forms import DecodeDispatchForm, DispatchKind, LazyDecodePlan
from tokenferry.backends.cuda.forms import SendBuffers, is_bulk, row_kind
from tokenferry.backends.cuda.launch import WIDEST_SCALE, RowKind
from tokenferry.backends.cuda.results import LazyPlan
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.tensors import may_write_to
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    DecodePlan,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    EncodingName,
    Layout,
    MoeShape,
    Numerics,
    Plan,
    Quantized,
    Routing,
    Scale,
)

_is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
_MAX_KEYS = 256
_MAX_SIZES = 1024
_MAX_BIASES = 2
_DEFAULT = DispatchOptions()
_NO_STATS = DecodeStats()


class DispatchCalls(Protocol):
    """Dispatch and redispatch of a rank; see `tokenferry.backends.cuda.dispatch.Dispatcher`."""

    def form(self, shape: MoeShape, options: DispatchOptions, kind: RowKind, num_sms: int | None) -> Any: ...  # noqa: ANN401, D102
    def sized(self, form: Any, /) -> Any: ...  # noqa: ANN401, D102
    def send(self, form: Any, call: Call, payload: SendBuffers, num_tokens: int, /) -> Dispatched[Any]: ...  # noqa: ANN401, D102
    def send_again(self, form: Any, call: Call, plan: Plan, along: Any, payload: SendBuffers, /) -> Dispatched[Any]: ...  # noqa: ANN401, D102

    def redispatch_form(  # noqa: D102
        self, shape: MoeShape, plan: Plan, kind: RowKind, num_local: int, num_sms: int | None
    ) -> Any: ...  # noqa: ANN401


class CombineCalls(Protocol):
    """Combine of a rank; see `tokenferry.backends.cuda.combine.Combiner`."""

    def form(self, plan: Plan, along: Any, y: Tensor, /, *, weighted: bool, num_sms: int | None) -> Any: ...  # noqa: ANN401, D102

    def send(  # noqa: D102
        self,
        form: Any,  # noqa: ANN401
        call: Call,
        y: Tensor,
        along: Any,  # noqa: ANN401
        weights: Tensor | None,
        biases: tuple[Tensor, ...],
        out: Tensor | None,
        /,
    ) -> Combined: ...


@dataclass(frozen=True, slots=True)
class BackendCalls:
    """The calls of a backend, as the fast path makes them.

    Attributes:
        context: Context of this rank.
        dispatcher: Dispatch and redispatch of this rank.
        combiner: Combine.
        decoder: Decode calls.
        key: Key of the group.
        begin: Begins a call, as `Context.begin_eager`.
        begin_decode: Begins a decode call, likewise.
        nobody_masked: Returns whether decode calls leave nobody out.
        plan_type: The type of plans that dispatches of this group return.
        along: Returns the addresses of such a plan.
    """

    context: Context
    dispatcher: DispatchCalls
    combiner: CombineCalls
    decoder: Decoding
    key: str
    begin: Callable[[Signature], Call | None]
    begin_decode: Callable[..., Call | None]
    nobody_masked: Callable[[], bool]
    plan_type: type[LazyPlan]
    along: Callable[[Any], Any]


class CudaFastPath:
    """The fast path of one view of a group; see `tokenferry.backends.base.FastPath`.

    Args:
        calls: The calls of this rank.
        shape: Sizes of the view.
        checks: Checks of arguments.
    """

    def __init__(self, calls: BackendCalls, shape: MoeShape, checks: QuickChecks) -> None:
        self._context = calls.context
        self._dispatcher = calls.dispatcher
        self._combiner = calls.combiner
        self._decoder = calls.decoder
        self._key = calls.key
        self._begin = calls.begin
        self._begin_decode = calls.begin_decode
        self._nobody_masked = calls.nobody_masked
        self._plan_type = calls.plan_type
        self._along = calls.along
        self._device = calls.context.device
        self._shape = shape
        self._checks = checks
        # By shapes, too: what follows from them is checked when a key is new.
        self._dispatches: BoundedDict[tuple[Any, ...], Any] = BoundedDict(_MAX_SIZES)
        self._redispatches: BoundedDict[tuple[Any, ...], Any] = BoundedDict(_MAX_KEYS)
        self._combines: BoundedDict[tuple[Any, ...], Any] = BoundedDict(_MAX_KEYS)
        self._decode_dispatches: BoundedDict[tuple[Any, ...], Any] = BoundedDict(_MAX_SIZES)
        self._decode_combines: BoundedDict[tuple[Any, ...], Any] = BoundedDict(_MAX_SIZES)

    def dispatch(
        self, x: Tensor | Quantized, routing: Routing, options: DispatchOptions | None, num_sms: int | None
    ) -> Dispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        if _is_transformed() or forward_ad._current_level >= 0:  # tensors may stand for others, or have tangents
            return None
        device, checks = self._device, self._checks
        if type(routing) is not Routing or not (options is None or type(options) is DispatchOptions):
            return None
        index, weights = routing.topk_idx, routing.topk_weights
        if not (_may_be_sms(num_sms) and _is_plain(index, device) and (weights is None or _is_plain(weights, device))):
            return None
        if _is_plain(x, device):
            rows, scale = x, None
        elif type(x) is Quantized and index.ndim == 2 and checks.rows_look_right(x, index.shape[0]):
            rows, scale = x.data, x.scale
        else:
            return None
        at = rows.data_ptr()
        kind = _kind_of_scale(rows, scale)
        if at % 16 or kind is None:
            return None
        of_weights = None if weights is None else (weights.shape, weights.dtype)
        key = (rows.shape, rows.dtype, index.shape, index.dtype, of_weights, options, kind, num_sms)
        form = self._dispatches.get(key)
        if form is None:
            if self._context.broken or not checks.dispatch_looks_right(x, routing, options):
                return None
            sent = row_kind(rows, scale, weighted=weights is not None, topk_idx=index, top_k=self._shape.top_k)
            form = self._dispatches[key] = self._dispatcher.form(self._shape, options or _DEFAULT, sent, num_sms)
        form = self._dispatcher.sized(form)
        call = self._begin(form.signature)
        if call is None:
            return None
        payload = SendBuffers(at, scale, 0 if weights is None else weights.data_ptr(), index.data_ptr())
        return self._dispatcher.send(form, call, payload, index.shape[0])

    def redispatch(
        self, x: Tensor | Quantized, plan: Plan, topk_weights: Tensor | None, num_sms: int | None
    ) -> Dispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        if _is_transformed() or forward_ad._current_level >= 0:  # tensors may stand for others, or have tangents
            return None
        if type(plan) is not self._plan_type or plan._form.group_key != self._key or not _may_be_sms(num_sms):
            return None
        plan_form, num_tokens = plan._form, plan._layout.num_tokens
        weighted, top_k = topk_weights is not None, plan_form.top_k
        if not self._checks.rows_look_right(x, num_tokens) or (
            topk_weights is not None and not self._checks.weights_look_right(topk_weights, (num_tokens, top_k))
        ):
            return None
        rows, scale = (x, None) if isinstance(x, Tensor) else (x.data, x.scale)
        at = rows.data_ptr()
        kind = _kind_of_scale(rows, scale)
        if at % 16 or kind is None or self._context.broken:
            return None
        key = (plan_form, rows.dtype, weighted, kind, num_sms)
        form = self._redispatches.get(key)
        if form is None:
            sent = row_kind(rows, scale, weighted=weighted, topk_idx=None, top_k=top_k)
            form = self._dispatcher.redispatch_form(self._shape, plan, sent, plan_form.num_local, num_sms)
            self._redispatches[key] = form
        call = self._begin(form.signature)
        if call is None:
            return None
        payload = SendBuffers(at, scale, 0 if topk_weights is None else topk_weights.data_ptr(), 0)
        return self._dispatcher.send_again(form, call, plan, self._along(plan), payload)

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
        if _is_transformed() or forward_ad._current_level >= 0:  # tensors may stand for others, or have tangents
            return None
        if type(plan) is not self._plan_type or plan._form.group_key != self._key or not _may_be_sms(num_sms):
            return None
        plan_form, delivered = plan._form, plan.num_delivered
        layout = plan_form.options.layout
        rows: tuple[int, ...] = (delivered,)
        if layout is Layout.MASKED:
            rows = (plan_form.num_local, delivered // plan_form.num_local)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        checks, num_tokens = self._checks, plan._layout.num_tokens
        if (
            self._context.broken
            or not checks.sums_look_right(y, rows)
            or (biases and not self._may_be_biases(biases, y, num_tokens))
            or (out is not None and not self._may_be_written(out, y, num_tokens, biases))
            or (
                topk_weights is not None
                and not checks.weights_look_right(
                    topk_weights, (delivered, plan_form.top_k) if layout is Layout.ROWS else rows
                )
            )
        ):
            return None
        key = (plan_form, y.dtype, topk_weights is None, num_sms)
        form = self._combines.get(key)
        addresses = self._along(plan)
        if form is None:
            form = self._combiner.form(plan, addresses, y, weighted=topk_weights is not None, num_sms=num_sms)
            self._combines[key] = form
        call = self._begin(form.signature)
        if call is None:
            return None
        return self._combiner.send(form, call, y, addresses, topk_weights, biases, out)

    def decode_dispatch(
        self, x: Tensor, routing: Routing, quantize: Scale | None, stats: DecodeStats | None, *, return_hook: bool
    ) -> DecodeDispatched[Any] | None:
        """See `tokenferry.backends.base.FastPath`."""
        if _is_transformed() or forward_ad._current_level >= 0:  # tensors may stand for others, or have tangents
            return None
        decoder, context, device = self._decoder, self._context, self._device
        if type(routing) is not Routing or not (quantize is None or type(quantize) is Scale):
            return None
        index, weights = routing.topk_idx, routing.topk_weights
        if type(return_hook) is not bool:
            return None
        if not (_is_plain(x, device) and _is_plain(index, device) and (weights is None or _is_plain(weights, device))):
            return None
        of_weights = None if weights is None else (weights.shape, weights.dtype)
        key = (x.shape, x.dtype, index.shape, index.dtype, of_weights, quantize)
        form = self._decode_dispatches.get(key)
        if form is None or form.workspace != decoder.workspaces.number:
            form = self._known_dispatch(x, routing, quantize)
            if form is None:
                return None
            self._decode_dispatches[key] = form
        if (
            x.data_ptr() % 16
            or form.members != context.all_ranks
            or not (stats is None or self._checks.stats_look_right(stats))
        ):
            return None
        nobody_masked = self._nobody_masked()
        if not nobody_masked:
            routing = Routing(decoder.without_masked(index, self._shape.num_experts), weights)
        waits = 0 if stats is None else decoder.waits_of(stats)
        call = self._begin_decode(form.signature, waits, skip_masked=not nobody_masked)
        if call is None:
            return None
        return decoder.send(form, call, x, routing, weights, stats or _NO_STATS, return_hook=return_hook)

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
        if _is_transformed() or forward_ad._current_level >= 0:  # tensors may stand for others, or have tangents
            return None
        decoder, context, checks = self._decoder, self._context, self._checks
        if type(plan) is not LazyDecodePlan or not _is_plain(y, self._device):
            return None
        if type(numerics) is not str or type(encoding) is not str or type(return_hook) is not bool:
            return None
        if (pending := plan._pending) is not None and not pending.done:
            return None
        of, weights, index, num_tokens = plan._form, plan.topk_weights, plan.topk_idx, plan.num_tokens
        key = (of, y.shape, y.dtype, numerics, encoding, index.dtype)
        form = self._decode_combines.get(key)
        if form is None or form.workspace != decoder.workspaces.number:
            form = self._known_combine(of, y, numerics, encoding, index)
            if form is None:
                return None
            self._decode_combines[key] = form
        if (
            not checks.weights_look_right(weights, (num_tokens, of.shape.top_k))
            or (out is not None and not self._may_be_written(out, y, num_tokens))
            or y.data_ptr() % 16
            or form.members != context.all_ranks
            or (stats is not None and (not checks.stats_look_right(stats) or stats.received is not None))
        ):
            return None
        wait_ns, waits = (None, 0) if stats is None else (stats.wait_ns, decoder.waits_of(stats))
        call = self._begin_decode(form.signature, waits, skip_masked=not self._nobody_masked())
        if call is None:
            return None
        assert weights is not None
        parts = parts_of(plan, weights, wait_ns)
        return decoder.send_back(form, call, y, parts, out, None, return_hook=return_hook)

    def _may_be_biases(self, biases: tuple[Tensor, ...], y: Tensor, num_tokens: int) -> bool:
        """Return whether sums of rows like ``y`` can certainly start with these."""
        for bias in biases:
            if not self._checks.out_looks_right(bias, num_tokens, y.dtype):
                return False
        return len(biases) <= _MAX_BIASES

    def _may_be_written(self, out: Tensor, y: Tensor, num_tokens: int, biases: tuple[Tensor, ...] = ()) -> bool:
        """Return whether kernels can certainly write the sums of rows ``y`` and biases to ``out`` themselves."""
        looks_right = self._checks.out_looks_right(out, num_tokens, y.dtype)
        return looks_right and not out.data_ptr() % 16 and may_write_to(out, y, biases)

    def _known_dispatch(self, x: Tensor, routing: Routing, quantize: Scale | None) -> Any:  # noqa: ANN401
        """Return the form of a decode dispatch if one like it has been made; the general path makes the first."""
        if not self._checks.decode_dispatch_looks_right(x, routing, quantize):
            return None
        weighted = routing.topk_weights is not None
        return self._decoder.known_dispatch(
            DispatchKind(self._shape, x.dtype, quantize, routing.topk_idx.dtype, weighted)
        )

    def _known_combine(
        self, of: DecodeDispatchForm, y: Tensor, numerics: Numerics, encoding: EncodingName, topk_idx: Tensor
    ) -> Any:  # noqa: ANN401
        """Return the form of a combine if one like it has been made, as `_known_dispatch`."""
        if of.group_key != self._key or not self._checks.decode_rows_look_right(y, (of.num_local, of.capacity)):
            return None
        fast = numerics == "fast"
        if encoding not in Encoding.__members__ or not (fast or numerics == "exact") or (fast and not of.weighted):
            return None
        return self._decoder.known_combine(of, y, topk_idx.dtype, Encoding[encoding], fast=fast)


def _is_plain(tensor: object, device: torch.device) -> TypeGuard[Tensor]:
    """Return whether a tensor is certainly one that kernels can read as it is, whatever its shape and dtype."""
    return (
        type(tensor) is Tensor
        and tensor.device == device
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _may_be_sms(num_sms: int | None) -> bool:
    return num_sms is None or (type(num_sms) is int and num_sms > 0)


def _kind_of_scale(rows: Tensor, scale: Tensor | None) -> tuple[Any, ...] | int | None:
    """Return what a form depends on besides dtype and H: 0 for plain rows; None if the scales have to be copied."""
    if scale is None:
        return 0
    if scale.element_size() > WIDEST_SCALE:
        return None
    return (rows.shape[1], scale.dtype, scale.shape[1], is_bulk(scale))
