"""The CUDA backend: what the API promises, over windows that all ranks of a node can address."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry import tuning
from tokenferry.ambient import not_compiled
from tokenferry.backends.base import (
    CLOSED,
    CallSms,
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    QuickChecks,
    RedispatchRequest,
    TokenLayout,
)
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.combine import Combiner
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.decode import Decoder, Decoding
from tokenferry.backends.cuda.dispatch import Dispatcher
from tokenferry.backends.cuda.fast_path import BackendCalls, CudaFastPath
from tokenferry.backends.cuda.masks import Masks
from tokenferry.backends.cuda.results import LazyPlan, shaped
from tokenferry.backends.cuda.token_layout import restricted, token_layout
from tokenferry.errors import ResourceError
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.topology import Topology
from tokenferry.transports.refused import resource_error
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


class CudaBackend:
    """The backend for tensors in GPU memory; see `tokenferry.backends.base.Backend`."""

    name = "cuda"
    checks_routing = True
    num_host_sizes = 0

    def __init__(self, context: Context, key: str, why: str, *, fast_path: bool = True) -> None:
        self._has_fast_path = fast_path
        self.key = key
        self.why = why
        self.rank = context.rank
        self.num_ranks = context.num_ranks
        everybody = tuple(range(context.num_ranks))
        self.topology = Topology(context.rank, (everybody,), "all ranks are on one host")
        self.transport = "nvlink" if context.num_ranks > 1 else "none"
        self.device = context.device
        self.context = context
        self.allocator = SymmetricAllocator(context)
        self.dispatcher = Dispatcher(context, self.allocator, key)
        self.combiner = Combiner(context, self.allocator)
        self.decoder: Decoding = Decoder(context, self.allocator, key)
        self.masks = Masks(context, self.decoder)

    @property
    def interruptible(self) -> Context:
        """See `tokenferry.backends.base.Backend`."""
        return self.context

    @property
    def broken(self) -> str | None:
        """The reason why the group ended, or None."""
        return self.context.broken

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.dispatch`."""
        return self.dispatcher.dispatch(request)

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.dispatch`."""
        return self.dispatcher.redispatch(request)

    def combine(self, request: CombineRequest) -> Combined:
        """See `tokenferry.backends.cuda.combine`."""
        return self.combiner.combine(request)

    @torch.no_grad()
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.decode`."""
        return self.decoder.dispatch(request)

    @torch.no_grad()
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cuda.decode`."""
        return self.decoder.combine(request)

    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor:
        """Return undefined rows in the heap, in the shape of ``Dispatched.x``."""
        stream = self.context.current_stream()
        return shaped(self.allocator.new_rows("empty_rows", (plan.num_delivered, hidden), dtype, stream), plan)

    def fast_path(self, shape: MoeShape, checks: QuickChecks) -> CudaFastPath | None:
        """See `tokenferry.backends.base.Backend`."""
        if not self._has_fast_path:
            return None
        context = self.context
        calls = BackendCalls(
            context,
            self.dispatcher,
            self.combiner,
            self.decoder,
            self.key,
            context.begin_eager,
            context.begin_eager,
            context.nobody_masked,
            LazyPlan,
            LazyPlan._addresses,
        )
        return CudaFastPath(calls, shape, checks)

    def refused(self, call: str, error: Exception, *, local: bool = False) -> ResourceError | None:
        """Name the state of the group, too: it is whole unless the call had begun to send, which breaks it."""
        state = "the group is broken" if self.broken else "nothing was sent"
        return resource_error(f"{call}: rank {self.rank} ({state})", error)

    def scratch(self, num_bytes: int) -> Tensor:
        """See `tokenferry.backends.base.Backend`; as much must stay free in the heap for calls."""
        if num_bytes and self.allocator.has_room_for_two(num_bytes):
            return self.allocator.block("scratch", num_bytes, self.context.current_stream()).tensor()
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def places_shape(self, shape: MoeShape, options: DispatchOptions, num_tokens: int) -> tuple[int | None, int]:
        """See `tokenferry.backends.base.Backend`."""
        columns = num_columns(self.num_ranks, shape.top_k, by_expert=options.layout is not Layout.ROWS)
        return num_tokens if columns else 0, columns

    def token_layout(self, topk_idx: Tensor, num_experts: int) -> TokenLayout:
        """See `tokenferry.backends.cuda.token_layout`."""
        return token_layout(self.context, topk_idx, num_experts, self.num_ranks, self.topology.num_nodes)

    def restricted(self, topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
        """See `tokenferry.backends.cuda.token_layout`."""
        return restricted(self.context, topk_idx, in_rank, num_experts)

    def call_sms(self, shape: MoeShape) -> CallSms:
        """See `tokenferry.backends.base.Backend`."""
        tuned = tuning.tune(shape, tuning.Machine(self.context.num_ranks, self.context.num_sms))
        return CallSms(tuned.dispatch_sms, tuned.combine_sms)

    @not_compiled  # a program may read them between calls
    def masked(self) -> frozenset[int]:
        """Return the ranks that decode calls skip."""
        return self.masks.ranks()

    def write_masks(self, out: Tensor) -> None:
        """See `tokenferry.backends.base.Backend`."""
        self.masks.write(out)

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it."""
        (self.masks.add if masked else self.masks.remove)(rank)

    def warmup(self) -> None:
        """Compile and load every kernel; returns when every rank has."""
        self.context.warmup()
        self.decoder.meet()

    def synchronize(self) -> None:
        """Wait for this rank's calls, and raise their errors."""
        self.context.synchronize()

    def new_traces(self, num_calls: int) -> Tensor:
        """Return ``[num_calls, blocks, TRACE_WORDS]`` int64; words: see `tokenferry.kernels.control_block`."""
        return self.decoder.new_traces(num_calls)

    def set_trace(self, trace: Tensor | None) -> None:
        """See `tokenferry.backends.base.Backend`."""
        self.decoder.trace = trace

    def close(self) -> None:
        """Release the windows."""
        if self.context.broken != CLOSED:
            self.context.close(CLOSED)
            self.decoder.close()
