"""The CUDA backend: what the API promises, over windows that all ranks of a node can address."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    RedispatchRequest,
    TokenLayout,
)
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.combine import Combiner
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.decode import Decoder
from tokenferry.backends.cuda.dispatch import Dispatcher, shaped
from tokenferry.backends.cuda.masks import Masks
from tokenferry.backends.cuda.token_layout import token_layout
from tokenferry.backends.cuda.workspace import Exchange
from tokenferry.kernels.dispatch_assign.spec import num_columns
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
        self.combiner = Combiner(context, self.allocator)
        self.decoder = Decoder(context, self.allocator, key, exchange)
        self.masks = Masks(context, self.decoder)
        self._exchange = exchange

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

    def plan_columns(self, shape: MoeShape, options: DispatchOptions) -> int:
        """See `tokenferry.backends.base.Backend`."""
        return num_columns(self.num_ranks, shape.top_k, by_expert=options.layout is not Layout.ROWS)

    def token_layout(self, topk_idx: Tensor, num_experts: int) -> TokenLayout:
        """See `tokenferry.backends.cuda.token_layout`."""
        return token_layout(self.context, topk_idx, num_experts)

    def masked(self) -> frozenset[int]:
        """Return the ranks that decode calls skip."""
        return self.context.masked_ranks()

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it."""
        (self.masks.add if masked else self.masks.remove)(rank)

    def warmup(self) -> None:
        """Compile and load every kernel; returns when every rank has."""
        self.context.warmup()
        self._exchange({})

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
        if self.context.broken != "was closed":
            self.context.close("was closed")
