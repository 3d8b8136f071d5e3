"""Decode calls of the CUDA backend, on the kernels of the throughput calls: right, fit for CUDA graphs, not yet fast.

Everything is ordered on the stream, so a hook has nothing to do but to exist: the results are complete where the next
work of the caller on that stream begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenferry import fp8
from tokenferry.backends import cuda_launch
from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest
from tokenferry.backends.cpu_messages import dtype_code
from tokenferry.backends.cuda_faults import Signature
from tokenferry.backends.cuda_launch import Cargo, Sources, Sum, address
from tokenferry.backends.cuda_plan import geometry
from tokenferry.backends.cuda_station import Here
from tokenferry.kernels.pull.spec import Mode
from tokenferry.words import DecodeCombined, DecodeDispatched, DecodePlan, Delivery, Layout, Plan, Quantized

if TYPE_CHECKING:
    from tokenferry.backends.cuda import CudaBackend

_COUNT_BITS = 32
_DELIVERY = Delivery(Layout.MASKED, counts="device")


def dispatch(backend: CudaBackend, request: DecodeDispatchRequest) -> DecodeDispatched:
    """Cast, then dispatch into the masked layout with counts on the device."""
    shape, routing, station = request.shape, request.routing, backend.station
    num_ranks, num_local = backend.num_ranks, shape.num_experts // backend.num_ranks
    room = num_ranks * shape.max_tokens
    rows = request.x if request.fp8 is None else fp8.cast(request.x, request.fp8)
    data, scale = (rows.data, rows.scale) if isinstance(rows, Quantized) else (rows, None)
    topk_idx = _without(routing.topk_idx, station.masked, num_local).contiguous()
    weights = None if routing.topk_weights is None else routing.topk_weights.contiguous()
    signature = Signature(
        "decode_dispatch",
        num_experts=shape.num_experts,
        max_tokens=shape.max_tokens,
        dtype=dtype_code(request.x.dtype),
        fp8_scale=0 if request.fp8 is None else 1 + list(type(request.fp8)).index(request.fp8),
        bytes_of_weights=0 if weights is None else 4 * weights.shape[1],
        bytes_of_topk_idx=topk_idx.shape[1] * topk_idx.element_size(),
    )
    here = station.begin(signature, tolerant=True, wait_ns=address(request.stats.wait_ns))
    src_expert = torch.zeros(num_ranks, num_local, dtype=torch.int32, device=backend.device)
    data = data.contiguous()
    scale_bytes = 0 if scale is None else scale.shape[1] * scale.element_size()
    cargo = Cargo(data, scale, weights, topk_idx, data.shape[1] * data.element_size(), scale_bytes)
    found = geometry(shape, _DELIVERY, num_ranks)
    sent = backend.dock.first(here, cargo, found, (backend.tuning(shape).dispatch_sms, station.num_sms), src_expert)
    counts = src_expert.T.long()
    if request.stats.received is not None:
        request.stats.received.add_(sent.expert_counts)
    plan = DecodePlan(
        group_key=backend.key,
        num_tokens=topk_idx.shape[0],
        num_experts=shape.num_experts,
        topk_idx=topk_idx,
        topk_weights=routing.topk_weights,
        src_token=_spread(sent.plan, sent.plan.src_token.int(), num_local, room),
        src_range=(counts.cumsum(1) - counts) << _COUNT_BITS | counts,
        row_weights=sent.topk_weights,
        under=sent.plan,
    )
    x = sent.x
    if isinstance(x, Quantized):  # grouped FP8 GEMMs read scales column by column
        x = Quantized(x.data, x.scale.transpose(1, 2).contiguous().transpose(1, 2))
    return DecodeDispatched(x, sent.expert_counts, plan, _nothing if request.return_hook else None)


def combine(backend: CudaBackend, request: DecodeCombineRequest) -> DecodeCombined:
    """Pull each slot's row and add them up by weight; ``fast``: sum on the expert's rank first."""
    y, plan, station = request.y, request.plan, backend.station
    under = plan.under
    assert under is not None
    assert plan.topk_weights is not None
    row_bytes = y.shape[-1] * y.element_size()
    signature = Signature("decode_combine", fast=int(request.fast), dtype=dtype_code(y.dtype), bytes_of_rows=row_bytes)
    here = station.begin(signature, tolerant=True, wait_ns=address(request.stats.wait_ns))
    out = request.out
    if out is None or out.data_ptr() % 16:
        out = torch.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype, device=backend.device)
    (_fast if request.fast else _exact)(backend, here, request, under, out)
    if request.out is not None and request.out is not out:
        request.out.copy_(out)
        out = request.out
    return DecodeCombined(out, _nothing if request.return_hook else None)


def _exact(backend: CudaBackend, here: Here, request: DecodeCombineRequest, under: Plan, out: Tensor) -> None:
    """Every slot's row comes home."""
    plan, num_ranks = request.plan, backend.num_ranks
    weights = plan.topk_weights
    assert weights is not None
    y_at, block, _ = backend.shelf.share(here, request.y, under, backend.station.num_sms)
    places = under.places
    sources = Sources(
        places.data_ptr() + 4 * num_ranks, places.shape[1], under.topk_idx.shape[1], by_rank=False,
        weights=weights.contiguous(),
    )  # fmt: skip
    counts = (under.src_counts, under.dst_counts)
    num_sms = backend.combine_sms(under, request.y.shape[-1])
    cuda_launch.pull(backend.station, here, sources, Sum(out, Mode.weighted), counts, (y_at, 0), num_sms)
    del block


def _fast(backend: CudaBackend, here: Here, request: DecodeCombineRequest, under: Plan, out: Tensor) -> None:
    """One row per token and rank comes home: the weighted sum of what its experts answered there."""
    y, num_ranks, top_k = request.y, backend.num_ranks, under.topk_idx.shape[1]
    assert request.plan.row_weights is not None
    hidden, num_rows = y.shape[-1], under.row_idx.shape[0]
    block, sums = backend.shelf.rows("decode_combine", (num_rows, hidden), y.dtype, here.stream)
    entries = _distinct(under.row_idx).int()
    counts = (under.src_counts, under.dst_counts)
    y = y if y.data_ptr() % 16 == 0 else y.clone()
    local = Sources(
        entries.data_ptr(), top_k, top_k, by_rank=False,
        weights=request.plan.row_weights, by_place=True, local=y.data_ptr(),
    )  # fmt: skip
    num_sms = backend.combine_sms(under, hidden)
    into = (under.src_counts, under.src_counts)
    cuda_launch.pull(backend.station, here, local, Sum(sums, Mode.weighted), into, (0, 0), backend.station.num_sms)
    first = num_ranks + top_k  # the column `row` of places
    sources = Sources(under.places.data_ptr() + 4 * first, under.places.shape[1], num_ranks, by_rank=True)
    cuda_launch.pull(backend.station, here, sources, Sum(out, Mode.rows), counts, (block.offset, 0), num_sms)


def _without(topk_idx: Tensor, ranks: set[int], num_local: int) -> Tensor:
    """Replace the experts of ``ranks`` by -1."""
    for rank in ranks:
        topk_idx = torch.where(topk_idx // num_local == rank, -1, topk_idx)
    return topk_idx


def _used(plan: Plan) -> Tensor:
    """``[N, 1]`` bool: which received rows hold anything."""
    rows = torch.arange(plan.row_idx.shape[0], device=plan.row_idx.device)
    return (rows < plan.src_counts.sum()).unsqueeze(1)


def _spread(plan: Plan, values: Tensor, num_local: int, room: int) -> Tensor:
    """``[L, room]``: one value a received row, at all its places."""
    nowhere = num_local * room  # one place more than there are takes what has none
    # Rows of a call that came to nothing are anything.
    at = torch.where(_used(plan) & (plan.row_idx >= 0) & (plan.row_idx < nowhere), plan.row_idx, nowhere)
    table = torch.zeros(nowhere + 1, dtype=values.dtype, device=values.device)
    table.scatter_(0, at.flatten(), values.unsqueeze(1).expand_as(at).flatten())
    return table[:nowhere].view(num_local, room)


def _distinct(row_idx: Tensor) -> Tensor:
    """``[N, K]``: each row's places, ascending, each once; -1 elsewhere."""
    order = row_idx.sort(dim=1).values
    again = torch.zeros_like(order, dtype=torch.bool)
    again[:, 1:] = order[:, 1:] == order[:, :-1]
    return order.masked_fill(again, -1)


def _nothing() -> None:
    """The hook of a call whose work is on the stream."""
