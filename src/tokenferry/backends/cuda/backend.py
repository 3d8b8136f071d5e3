"""The CUDA backend: what the API promises, over windows that all ranks of a node can address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    RedispatchRequest,
)
from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned, overlap
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.decode import Decoder
from tokenferry.backends.cuda.dispatch import Dispatcher, shaped
from tokenferry.backends.cuda.faults import Signature
from tokenferry.backends.cuda.launch import Payload, Sum
from tokenferry.backends.cuda.masks import Masks
from tokenferry.backends.cuda.plan import CODES, Geometry
from tokenferry.backends.cuda.workspace import Exchange
from tokenferry.errors import ArgumentError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.control_block import TRACE_WORDS
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.tuning import Topology, Tuning, tune
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    Dispatched,
    DispatchOptions,
    Layout,
    MoeShape,
    Plan,
    Quantized,
)

_MOST_SIGNATURES = 1024


class CudaBackend:
    """The backend for tensors in GPU memory; see `tokenferry.backends.base.Backend`."""

    name = "cuda"
    checks_routing = True

    def __init__(self, context: Context, key: str, why: str, exchange: Exchange) -> None:
        self.key = key
        self.why = why
        self.rank = context.rank
        self.num_ranks = context.num_ranks
        self.transport = "nvlink" if context.num_ranks > 1 else "none"
        self.device = context.device
        self.context = context
        self.allocator = SymmetricAllocator(context)
        self.dispatcher = Dispatcher(context, self.allocator, key)
        self.decoder = Decoder(context, self.allocator, key, exchange)
        self.masks = Masks(context, self.decoder)
        self._exchange = exchange
        self._known: dict[tuple[Any, ...], tuple[Signature, Geometry, int]] = {}
        self._signatures: dict[tuple[Any, ...], Signature] = {}
        self._tunings: dict[MoeShape, Tuning] = {}
        self._combine_tunings: dict[tuple[int, ...], Tuning] = {}

    @property
    def broken(self) -> str | None:
        """What ended the group, or None."""
        return self.context.broken

    def masked(self) -> frozenset[int]:
        """Ranks that decode calls skip."""
        return self.context.absent()

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it."""
        (self.masks.add if masked else self.masks.remove)(rank)

    def warmup(self) -> None:
        """Compile and load every kernel; returns when every rank has."""
        self.context.warmup()
        self._exchange({})

    def synchronize(self) -> None:
        """Wait for this rank's calls, and raise what they met."""
        self.context.synchronize()

    def close(self) -> None:
        """Let go of the windows."""
        if self.context.broken != "was closed":
            self.context.close("was closed")

    def tuning(self, shape: MoeShape) -> Tuning:
        """SMs of each call, for a shape."""
        found = self._tunings.get(shape)
        if found is None:
            found = self._tunings[shape] = tune(shape, Topology(self.num_ranks, self.context.num_sms))
        return found

    def plan_columns(self, shape: MoeShape, options: DispatchOptions) -> int:
        """Return the columns of ``Plan._places``."""
        return num_columns(self.num_ranks, shape.top_k, by_expert=options.layout is not Layout.ROWS)

    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor:
        """Rows in the heap, in the shape of ``Dispatched.x``."""
        _, rows = self.allocator.rows("empty_rows", (plan.num_delivered, hidden), dtype, self.context.current_stream())
        return shaped(rows, plan)

    # ------------------------------------------------------------------ throughput

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Plan, move, unpack; and wait for the counts if they are wanted here."""
        shape, options, routing = request.shape, request.options, request.routing
        payload = _payload(request.x, routing.topk_weights, routing.topk_idx)
        key = (shape, options, *_kind(payload))
        known = self._known.get(key)
        if known is None:
            known = self._remember(key, payload, shape, options)
        signature, found, num_sms = known
        call = self.context.begin(signature)
        sms = (request.num_sms or num_sms, request.num_sms or self.context.num_sms)
        if call.capturing and options.counts == "host":
            raise ArgumentError(
                'dispatch: options: counts="host" waits for the device, which a CUDA graph cannot capture; '
                'use DispatchOptions(counts="device")'
            )
        return self.dispatcher.first(call, payload, found, sms)

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Move along a plan, unpack."""
        plan = request.plan
        options = plan.options
        payload = _payload(request.x, request.topk_weights, None)
        key = ("redispatch", options.layout, *_kind(payload))
        signature = self._signatures.get(key)
        if signature is None:
            signature = self.sign(key, "redispatch", layout=CODES[options.layout], **_fields(payload))
        call = self.context.begin(signature)
        sms = (request.num_sms or self.tuning(request.shape).dispatch_sms, request.num_sms or self.context.num_sms)
        return self.dispatcher.along(call, payload, plan, sms)

    def combine(self, request: CombineRequest) -> Combined:
        """Bring rows home, or fetch them where they lie by expert; each rank adds up its own tokens' rows."""
        y, plan, weights = request.y, request.plan, request.topk_weights
        top_k, hidden = plan.topk_idx.shape[1], y.shape[-1]
        key = ("combine", plan.options.layout, y.dtype, hidden, weights is None)
        signature = self._signatures.get(key)
        if signature is None:
            signature = self.sign(
                key,
                "combine",
                layout=CODES[plan.options.layout],
                dtype=dtype_code(y.dtype),
                bytes_of_rows=hidden * y.element_size(),
                bytes_of_weights=0 if weights is None else 4,
            )
        call = self.context.begin(signature)
        out = request.out
        if out is None or out.data_ptr() % 16 or overlap(out, y):
            out = torch.empty(plan.num_tokens, hidden, dtype=y.dtype, device=self.device)
        home = None
        if weights is not None:
            home = torch.empty(plan.num_tokens, top_k, dtype=torch.float32, device=self.device)
        weights_at, kept = (0, None) if weights is None else self.allocator.reachable(call, weights)
        self._add_up(call, y, Sum(plan, out, _biases(request.biases), home), weights_at, request.num_sms)
        del kept  # given back on this stream, behind the kernel
        if request.out is not None and request.out is not out:
            request.out.copy_(out)
            out = request.out
        return Combined(out, home)

    def _add_up(self, call: Call, y: Tensor, result: Sum, weights_at: int, num_sms: int | None) -> None:
        """Launch what brings rows home and adds them up."""
        plan, allocator, tuned = result.plan, self.allocator, self.combine_tuning(result.plan, y.shape[-1])
        if plan.options.layout is Layout.ROWS:
            y, rows_at = aligned(y), allocator.offset(y)
            room = allocator.room(call, plan.dst_token.shape[0] * y.shape[1] * y.element_size())
            sms = num_sms or (tuned.combine_sms if rows_at else tuned.push_sms)
            launch.push(self.context, call, result, y, (room.offset, weights_at, rows_at), sms)
        else:
            y_at, _kept = allocator.share(call, y, plan, num_sms or self.context.num_sms)
            launch.pull(self.context, call, result, (y_at, weights_at), num_sms or tuned.combine_sms)

    def combine_tuning(self, plan: Plan, hidden: int) -> Tuning:
        """SMs of a combine along a plan."""
        key = (plan.expert_counts.shape[0], plan.topk_idx.shape[1], hidden, plan.num_tokens)
        found = self._combine_tunings.get(key)
        if found is None:
            if len(self._combine_tunings) >= _MOST_SIGNATURES:
                self._combine_tunings.clear()
            shape = MoeShape(key[0] * self.num_ranks, key[1], hidden, max(key[3], 1))
            found = self._combine_tunings[key] = tune(shape, Topology(self.num_ranks, self.context.num_sms))
        return found

    # ------------------------------------------------------------------ decode

    @torch.no_grad()
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.decode`."""
        return self.decoder.dispatch(request)

    @torch.no_grad()
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cuda.decode`."""
        return self.decoder.combine(request)

    def new_traces(self, num_calls: int) -> Tensor:
        """``[num_calls, blocks, TRACE_WORDS]`` int64 zeros: one slice for each call that `record` is to follow."""
        return torch.zeros(num_calls, self.context.num_sms, TRACE_WORDS, dtype=torch.int64, device=self.device)

    def record(self, trace: Tensor | None) -> None:
        """Let the decode calls from now on write down when what happened; None: they do not, which costs nothing.

        Contract: local, at once. What a call wrote is there when its stream has passed it; the tensor has to live until
        then, and, if a CUDA graph captures the call, as long as that. What the words mean:
        `tokenferry.kernels.control_block`.

        Args:
            trace: A slice of what `new_traces` made.
        """
        self.decoder.trace = trace

    # ------------------------------------------------------------------ what is made once

    def _remember(
        self, key: tuple[Any, ...], payload: Payload, shape: MoeShape, options: DispatchOptions
    ) -> tuple[Signature, Geometry, int]:
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        signature = Signature(
            "dispatch",
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            max_tokens=shape.max_tokens,
            layout=CODES[options.layout],
            alignment=options.alignment,
            device_counts=int(options.counts == "device"),
            capacity=options.capacity or 0,
            **_fields(payload),
        )
        found = cuda_plan.geometry(shape, options, self.num_ranks)
        known = self._known[key] = (signature, found, self.tuning(shape).dispatch_sms)
        return known

    def sign(self, key: tuple[Any, ...], phase: str, **fields: int) -> Signature:
        """A signature, kept under ``key``."""
        if len(self._signatures) >= _MOST_SIGNATURES:
            self._signatures.clear()
        signature = self._signatures[key] = Signature(phase, **fields)
        return signature


def _payload(x: Tensor | Quantized, weights: Tensor | None, topk_idx: Tensor | None) -> Payload:
    rows, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
    if scale is not None and scale.element_size() > 8:  # wider than a lane copies: in bulk, or not at all
        scale = aligned(scale.contiguous())
    return Payload(
        aligned(rows),
        scale,
        weights,
        topk_idx,
        rows.shape[1] * rows.element_size(),
        0 if scale is None else scale.shape[1] * scale.element_size(),
    )


def _kind(payload: Payload) -> tuple[Any, ...]:
    weights, index, scale = payload.weights, payload.topk_idx, payload.scale
    return (
        payload.rows.dtype,
        payload.row_bytes,
        payload.scale_bytes,
        scale is None,
        None if weights is None else weights.shape[1],
        None if index is None else index.dtype,
    )


def _fields(payload: Payload) -> dict[str, int]:
    index, weights = payload.topk_idx, payload.weights
    return {
        "dtype": dtype_code(payload.rows.dtype),
        "bytes_of_rows": payload.row_bytes,
        "bytes_of_scale": payload.scale_bytes,
        "bytes_of_weights": 0 if weights is None else 4 * weights.shape[1],
        "bytes_of_topk_idx": 0 if index is None else index.shape[1] * index.element_size(),
    }


def _biases(biases: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(aligned(bias) for bias in biases) if biases else ()
