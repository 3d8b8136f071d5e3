"""Combine of the CPU backend: send each row back to its token's rank and sum there, in rank order."""

from __future__ import annotations

import torch

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.dispatch import LAYOUT_CODES
from tokenferry.backends.cpu.exchange import Exchange, Kind, Pending, Signature
from tokenferry.backends.cpu.payload import Payload
from tokenferry.backends.tensors import overlap, without_autocast
from tokenferry.formats.dtypes import dtype_code
from tokenferry.types import Combined, Layout


@without_autocast
def combine(exchange: Exchange, request: CombineRequest) -> Combined:
    """Send one row per (token, rank) back to the token's rank, and sum the rows that arrive."""
    plan, allocator = request.plan, exchange.allocator
    payload = _payload(request)
    pending = _start(exchange, request, payload)
    out = request.out
    if out is None:
        out = allocator.empty(plan.num_tokens, request.y.shape[-1], dtype=request.y.dtype)
    weight_sum = None
    if request.topk_weights is not None:
        weight_sum = torch.empty(plan.num_tokens, plan.topk_idx.shape[1], dtype=torch.float32, device="cpu")
    dst_counts = plan.dst_counts.tolist()
    # `out` may come from inference mode, and be filled outside of it.
    with pending.receive() as received, torch.inference_mode():
        pending.check_counts(received, dst_counts)
        tokens = torch.split(plan.dst_token[: sum(dst_counts)], dst_counts)
        rows = [payload.view_rows(source) for source in received]
        cpu_routing.reduce_rows(out, tokens, rows, allocator, request.biases)
        if weight_sum is not None:
            weights = torch.split(payload.gather_metadata(received)["weights"], dst_counts)
            cpu_routing.reduce_rows(weight_sum, tokens, weights, allocator)
    return Combined(out, weight_sum)


def _payload(request: CombineRequest) -> Payload:
    """Return one row per received row: in layouts by expert, the sum of its delivered rows."""
    y, plan, weights = request.y, request.plan, request.topk_weights
    num_rows = int(plan.src_counts.sum())
    if plan.options.layout is Layout.ROWS:
        return Payload(y[:num_rows], weights=None if weights is None else weights[:num_rows])
    row_idx = plan.row_idx[:num_rows]
    rows = cpu_routing.reduce_expert_rows(y.view(-1, y.shape[-1]), row_idx)
    return Payload(rows, weights=None if weights is None else cpu_routing.gather_weights(weights, row_idx))


def _start(exchange: Exchange, request: CombineRequest, payload: Payload) -> Pending:
    """Send each source rank the rows that came from it."""
    y, plan = request.y, request.plan
    fields = {"layout": LAYOUT_CODES[plan.options.layout], "dtype": dtype_code(y.dtype), **payload.fields}
    counts, ends = plan.src_counts.tolist(), plan.src_counts.cumsum(0).tolist()
    slices = [slice(end - num, end) for end, num in zip(ends, counts, strict=True)]
    # This rank's own rows are read in place, unless the sums may overwrite them.
    copy_own = request.out is not None and overlap(request.out, y)
    fill = payload.fill(slices, exchange.rank)
    return exchange.start(Signature(Kind.combine, fields), payload.sections, counts, fill, copy_own=copy_own)
