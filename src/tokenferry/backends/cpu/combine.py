"""Combine of the CPU backend: send each row back to its token's rank and sum there, in the order of ranks or nodes."""

from __future__ import annotations

import torch

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.dispatch import LAYOUT_CODES
from tokenferry.backends.cpu.exchange import PLAN_FIELD, CallKind, Exchange, Signature
from tokenferry.backends.cpu.payload import Payload
from tokenferry.backends.cpu.route import Route
from tokenferry.backends.tensors import may_write_to, without_autocast
from tokenferry.formats.dtypes import dtype_code
from tokenferry.types import Combined, Layout


@without_autocast
def combine(exchange: Exchange, route: Route, request: CombineRequest) -> Combined:
    """Send the rows back to the tokens' ranks, and sum those that arrive."""
    plan, allocator = request.plan, exchange.allocator
    payload = _payload(request)
    out = request.out
    if out is None or not may_write_to(out, request.y, request.biases):
        out = allocator.empty(plan.num_tokens, request.y.shape[-1], dtype=request.y.dtype)
    weight_sum = None
    if request.topk_weights is not None:
        weight_sum = torch.empty(plan.num_tokens, plan.topk_idx.shape[1], dtype=torch.float32, device="cpu")
    # `out` may come from inference mode, and be filled outside of it.
    with (
        route.combine(_signature(request, payload), payload, plan, request.y.dtype) as addends,
        torch.inference_mode(),
    ):
        rows = [addends.payload.view_rows(source) for source in addends.rows]
        cpu_routing.reduce_rows(out, addends.tokens, rows, allocator, request.biases)
        if weight_sum is not None:
            weights = [addends.payload.gather_metadata([source])["weights"] for source in addends.rows]
            cpu_routing.reduce_rows(weight_sum, addends.tokens, weights, allocator)
        if request.out is not None and out is not request.out:
            out = request.out.copy_(out)
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


def _signature(request: CombineRequest, payload: Payload) -> Signature:
    y, plan = request.y, request.plan
    fields = {
        PLAN_FIELD: plan._call_number,
        "layout": LAYOUT_CODES[plan.options.layout],
        "dtype": dtype_code(y.dtype),
        **payload.fields,
    }
    return Signature(CallKind.combine, fields)
