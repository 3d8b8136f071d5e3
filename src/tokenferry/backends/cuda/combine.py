"""Combine of the CUDA backend: rows are pushed to where they are added up, or fetched from where they lie by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.launch import Reduction
from tokenferry.backends.cuda.plan import LAYOUT_CODES
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.tensors import overlap
from tokenferry.formats.dtypes import dtype_code
from tokenferry.tuning import Topology, Tuning, tune
from tokenferry.types import Combined, Layout, MoeShape

_MAX_FORMS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class CombineForm:
    """The parts that all combines of equal sizes, layouts and dtypes share.

    Attributes:
        signature: Signature of the calls.
        tuning: SMs of the kernels, unless the call sets ``num_sms``.
    """

    signature: Signature
    tuning: Tuning


class Combiner:
    """Combine calls of one rank.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator) -> None:
        self._context = context
        self._allocator = allocator
        self._forms: BoundedDict[tuple[Any, ...], CombineForm] = BoundedDict(_MAX_FORMS)

    def combine(self, request: CombineRequest) -> Combined:
        """Add up the rows of each of this rank's tokens."""
        y, plan, weights, device = request.y, request.plan, request.topk_weights, self._context.device
        L, K = plan.expert_counts.shape[0], plan.topk_idx.shape[1]
        key = (plan.options.layout, y.dtype, y.shape[-1], weights is None, L, K, plan.num_tokens)
        form = self._forms.get(key) or self._new_form(key, request)
        call = self._context.begin(form.signature)
        out = request.out
        if out is None or out.data_ptr() % 16 or overlap(out, y):
            out = torch.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype, device=device)
        weights_out, weights_offset, copied = None, 0, None
        if weights is not None:
            weights_out = torch.empty(plan.num_tokens, K, dtype=torch.float32, device=device)
            weights_offset, copied = self._allocator.in_window(call, weights)
        biases = tuple(aligned(bias) for bias in request.biases) if request.biases else ()
        self._launch(call, y, Reduction(plan, out, biases, weights_out, weights_offset), form.tuning, request.num_sms)
        del copied  # its block is given back on this stream, after the kernel
        if request.out is not None and request.out is not out:
            with torch.inference_mode():  # `out` may come from it
                request.out.copy_(out)
            out = request.out
        return Combined(out, weights_out)

    def _launch(self, call: Call, y: Tensor, reduction: Reduction, tuning: Tuning, num_sms: int | None) -> None:
        plan, allocator = reduction.plan, self._allocator
        if plan.options.layout is Layout.ROWS:
            y = aligned(y)
            reduction.rows_offset = allocator.offset(y)
            landing = allocator.call_block(call, plan.dst_token.shape[0] * y.shape[1] * y.element_size())
            reduction.recv_offset = landing.offset
            sms = num_sms or (tuning.combine_sms if reduction.rows_offset else tuning.push_sms)
            launch.combine_push(self._context, call, reduction, y, sms)
        else:
            sms = num_sms or self._context.num_sms
            reduction.rows_offset, _copied = allocator.expert_rows_in_window(call, y, plan, sms)
            launch.combine_pull(self._context, call, reduction, num_sms or tuning.combine_sms)

    def _new_form(self, key: tuple[Any, ...], request: CombineRequest) -> CombineForm:
        y, plan, num_ranks = request.y, request.plan, self._context.num_ranks
        hidden = y.shape[-1]
        signature = Signature(
            "combine",
            layout=LAYOUT_CODES[plan.options.layout],
            dtype=dtype_code(y.dtype),
            bytes_of_rows=hidden * y.element_size(),
            bytes_of_weights=0 if request.topk_weights is None else 4,
        )
        num_experts = plan.expert_counts.shape[0] * num_ranks
        shape = MoeShape(num_experts, plan.topk_idx.shape[1], hidden, max(plan.num_tokens, 1))
        tuning = tune(shape, Topology(num_ranks, self._context.num_sms))
        form = self._forms[key] = CombineForm(signature, tuning)
        return form
