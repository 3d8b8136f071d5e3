"""One function a kernel: from what a call knows to a params struct and a launch. Nothing here decides anything.

Host time counts: a whole eager call may cost 15 us. So params are kept for each geometry, with all that follows from it
filled in, and what differs from call to call lies side by side, to be packed in one go.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.cuda_station import Here, Prepared, Station
from tokenferry.kernels.board import OFFSET_BYTES
from tokenferry.kernels.count import spec as count_spec
from tokenferry.kernels.describe import TYPES
from tokenferry.kernels.move import spec as move_spec
from tokenferry.kernels.place import spec as place_spec
from tokenferry.kernels.pull import spec as pull_spec
from tokenferry.kernels.stage import spec as stage_spec
from tokenferry.kernels.unpack import spec as unpack_spec

ROWS, EXPERTS, MASKED = 0, 1, 2
"""What the kernels call the layouts."""

_OFFSETS = struct.Struct("<6I")
_COUNT = struct.Struct("<9QI")
_SEVEN = struct.Struct("<7Q")
_PULL = struct.Struct("<11QI")


@dataclass(slots=True)
class Tables:
    """What `count` and `place` fill.

    Attributes:
        table: Address of ``[units, E + R]`` int32, in the allocation of ``places``.
        bases: Address of ``[2 * R + E]`` int32, likewise.
        dst_counts: ``[R]`` int64 rows to each rank.
        src_counts: ``[R]`` int64 rows from each rank.
        expert_counts: ``[L]`` int32.
        expert_offsets: EXPERTS: ``[L + 1]`` int32.
        places: ``[T, C]`` int32.
        dst_token: ``[T * min(K, R)]`` int64.
        src_expert: ``[R, L]`` int32 rows from each rank for each local expert, or None if nobody asks.
    """

    table: int
    bases: int
    dst_counts: Tensor
    src_counts: Tensor
    expert_counts: Tensor
    expert_offsets: Tensor | None
    places: Tensor
    dst_token: Tensor
    src_expert: Tensor | None


@dataclass(slots=True)
class Cargo:
    """What one rank's rows bring along; ``topk_idx`` in a first dispatch only."""

    rows: Tensor
    scale: Tensor | None
    weights: Tensor | None
    topk_idx: Tensor | None
    row_bytes: int
    scale_bytes: int


@dataclass(slots=True)
class Landing:
    """Where rows land in this rank's window, as offsets; 0 for what does not travel."""

    rows: int = 0
    scale: int = 0
    weights: int = 0
    ids: int = 0
    src_token: int = 0
    row_idx: int = 0


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def count(station: Station, here: Here, topk_idx: Tensor, tables: Tables, sizes: tuple[int, ...], num_sms: int) -> None:
    """Launch `count`; ``sizes``: E, layout, alignment, capacity, room."""
    num_tokens, top_k = topk_idx.shape
    wide = topk_idx.dtype is torch.int64
    key = (count_spec.SPEC, wide, top_k, sizes)
    prepared = station.prepared.get(key)
    if prepared is None:
        prepared = station.prepare(key, count_spec.SPEC, wide=int(wide))
        p = prepared.params
        p.top_k = top_k
        p.num_experts, p.layout, p.alignment, p.capacity, p.room = sizes
        prepared.block = count_spec.THREADS
        prepared.smem_bytes = count_spec.smem_bytes(p.num_experts, station.num_ranks)
    station.address(prepared, here)
    _COUNT.pack_into(
        prepared.view,
        prepared.first,
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        tables.dst_counts.data_ptr(),
        tables.src_counts.data_ptr(),
        tables.expert_counts.data_ptr(),
        address(tables.expert_offsets),
        address(tables.src_expert),
        station.pinned.host_address,
        num_tokens,
    )
    prepared.launch(max(1, min(count_spec.num_units(num_tokens), num_sms)), here.stream)


def place(
    station: Station, here: Here, topk_idx: Tensor, tables: Tables, sizes: tuple[int, bool], num_sms: int
) -> None:
    """Launch `place`; ``sizes``: E, whether rows lie by expert."""
    num_experts, by_expert = sizes
    num_tokens, top_k = topk_idx.shape
    if not num_tokens:
        return
    wide = topk_idx.dtype is torch.int64
    key = (place_spec.SPEC, wide, top_k, num_experts, by_expert)
    prepared = station.prepared.get(key)
    if prepared is None:
        prepared = station.prepare(key, place_spec.SPEC, wide=int(wide))
        p = prepared.params
        p.top_k, p.num_experts, p.by_expert = top_k, num_experts, by_expert
        prepared.block = place_spec.THREADS
        prepared.smem_bytes = count_spec.smem_bytes(num_experts, station.num_ranks)
    station.address(prepared, here)
    _SEVEN.pack_into(
        prepared.view,
        prepared.first,
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        tables.dst_counts.data_ptr(),
        tables.places.data_ptr(),
        tables.dst_token.data_ptr(),
        num_tokens,
    )
    prepared.launch(min(count_spec.num_units(num_tokens), num_sms), here.stream)


def _prepare_move(station: Station, key: tuple[Any, ...], cargo: Cargo, geometry: tuple[int, int, bool]) -> Prepared:
    prepared = station.prepare(key, move_spec.SPEC)
    p, scale = prepared.params, cargo.scale
    p.top_k, p.num_local, p.by_expert = geometry
    p.row_bytes = cargo.row_bytes
    p.width = place_spec.num_columns(station.num_ranks, p.top_k, by_expert=geometry[2])
    p.bulk_scale_bytes = p.small_scale = 0
    if scale is not None and cargo.scale_bytes:
        if cargo.scale_bytes % 16 == 0 and scale.data_ptr() % 16 == 0 and scale.is_contiguous():
            p.bulk_scale_bytes = cargo.scale_bytes
        else:
            p.small_scale, p.scale_size, p.num_scales = 1, scale.element_size(), scale.shape[1]
            p.scale_row_stride, p.scale_stride = scale.stride()
    p.wide = cargo.topk_idx is not None and cargo.topk_idx.dtype is torch.int64
    rings = move_spec.cut(cargo.row_bytes, p.bulk_scale_bytes)
    p.piece_bytes, p.pitch, p.pieces, p.stages = rings.piece_bytes, rings.pitch, rings.pieces, rings.stages
    prepared.block, prepared.smem_bytes = rings.warps * 32, rings.smem_bytes
    return prepared


def move(
    station: Station,
    here: Here,
    cargo: Cargo,
    route: tuple[Tensor, Tensor, Tensor],
    geometry: tuple[int, int, bool],
    landing: Landing,
    num_sms: int,
) -> None:
    """Launch `move`; ``route``: places, rows out, rows in; ``geometry``: K, L, by expert."""
    scale, index = cargo.scale, cargo.topk_idx
    scale_ptr = 0
    kind: tuple[Any, ...] | None = None
    if scale is not None and cargo.scale_bytes:
        scale_ptr = scale.data_ptr()
        kind = (scale.shape[1], scale.stride(), scale.is_contiguous(), scale.element_size(), scale_ptr % 16)
    key = (move_spec.SPEC, cargo.row_bytes, kind, geometry, index is not None and index.dtype)
    prepared = station.prepared.get(key) or _prepare_move(station, key, cargo, geometry)
    station.address(prepared, here)
    _OFFSETS.pack_into(
        prepared.view,
        prepared.offsets,
        landing.rows // OFFSET_BYTES,
        landing.scale // OFFSET_BYTES,
        landing.weights // OFFSET_BYTES,
        landing.ids // OFFSET_BYTES,
        landing.src_token // OFFSET_BYTES,
        landing.row_idx // OFFSET_BYTES,
    )
    _SEVEN.pack_into(
        prepared.view,
        prepared.first,
        cargo.rows.data_ptr(),
        scale_ptr,
        address(cargo.weights),
        address(index),
        route[0].data_ptr(),
        route[1].data_ptr(),
        route[2].data_ptr(),
    )
    prepared.params.num_tokens = cargo.rows.shape[0]
    prepared.launch(num_sms, here.stream)


@dataclass(slots=True)
class Delivered:
    """Rows that have landed, as addresses, and how they are laid out.

    Attributes:
        rows: Address.
        scale: Address, or 0.
        weights: Address, or 0.
        num_rows: ``Plan.num_delivered``, or 0 where it ends with the last expert's last aligned row.
        row_bytes: Of a row.
        scale_bytes: Of its scales.
        alignment: A.
        capacity: MASKED: rows of an expert.
        zero: Whether padding is zeroed.
    """

    rows: int
    scale: int
    weights: int
    num_rows: int
    row_bytes: int
    scale_bytes: int
    alignment: int
    capacity: int
    zero: bool


def unpack(
    station: Station, here: Here, delivered: Delivered, plan: tuple[int, int, Tensor, Tensor], num_sms: int
) -> None:
    """Launch `unpack`; the plan's part: address of row_idx, K, src_counts, expert_counts."""
    row_idx, top_k, src_counts, expert_counts = plan
    key = (unpack_spec.SPEC, top_k)
    prepared = station.prepared.get(key)
    if prepared is None:
        prepared = station.prepare(key, unpack_spec.SPEC)
        prepared.params.top_k = top_k
        prepared.block = unpack_spec.THREADS
    p = prepared.params
    station.address(prepared, here)
    p.rows, p.scale, p.weights = delivered.rows, delivered.scale, delivered.weights
    p.row_idx, p.src_counts, p.expert_counts = row_idx, src_counts.data_ptr(), expert_counts.data_ptr()
    p.num_delivered, p.row_bytes, p.scale_bytes = delivered.num_rows, delivered.row_bytes, delivered.scale_bytes
    p.num_local, p.alignment = expert_counts.shape[0], delivered.alignment
    p.capacity, p.zero = delivered.capacity, delivered.zero
    prepared.launch(num_sms, here.stream)


def stage(
    station: Station, here: Here, source: Tensor, target: int, counts: tuple[Tensor, Tensor], num_sms: int
) -> None:
    """Launch `stage` for ``source`` ``[N, H]``, or ``[L, capacity, H]``; ``counts``: src_counts, expert_counts."""
    key = (stage_spec.SPEC,)
    prepared = station.prepared.get(key)
    if prepared is None:
        prepared = station.prepare(key, stage_spec.SPEC)
        prepared.block = stage_spec.THREADS
    p = prepared.params
    station.address(prepared, here)
    p.source, p.to = source.data_ptr(), target
    p.src_counts, p.expert_counts = counts[0].data_ptr(), counts[1].data_ptr()
    p.num_local, p.capacity = counts[1].shape[0], source.shape[1] if source.ndim == 3 else 0
    p.row_bytes = source.shape[-1] * source.element_size()
    prepared.launch(num_sms, here.stream)


@dataclass(slots=True)
class Sources:
    """Which rows `pull` adds up for each of T tokens.

    Attributes:
        table: Address of the first entry in a table of int32 places.
        stride: Columns of that table.
        width: Entries of a token.
        by_rank: Entry r is a place on rank r; else entries say their rank.
        weights: Mode.weighted: one weight an entry, or with ``by_place`` one a place.
        by_place: See there.
        local: Address of rows in this rank's memory: nobody is met; 0: rows lie in the ranks' windows.
        source: Address of rows of which only peers have a staged copy; 0: all ranks read the same.
    """

    table: int
    stride: int
    width: int
    by_rank: bool
    weights: Tensor | None = None
    by_place: bool = False
    local: int = 0
    source: int = 0


@dataclass(slots=True)
class Sum:
    """Where `pull` puts its sums, and what they start from; ``places`` and ``top_k`` are for ``weights_out``."""

    out: Tensor
    mode: pull_spec.Mode
    biases: tuple[Tensor, ...] = ()
    weights_out: Tensor | None = None
    places: Tensor | None = None
    top_k: int = 0


def pull(
    station: Station,
    here: Here,
    sources: Sources,
    result: Sum,
    counts: tuple[Tensor, Tensor],
    offsets: tuple[int, int],
    num_sms: int,
) -> None:
    """Launch `pull`. ``counts``: rows out, rows in; ``offsets`` of this rank's rows and weights in its window."""
    out, places = result.out, result.places
    width = 0 if places is None else places.shape[1]
    key = (
        pull_spec.SPEC,
        out.dtype,
        result.mode,
        out.shape[1],
        sources.width,
        sources.stride,
        sources.by_rank,
        width,
        result.top_k,
    )
    prepared = station.prepared.get(key)
    if prepared is None:
        prepared = station.prepare(key, pull_spec.SPEC, type=TYPES[out.dtype], mode=int(result.mode))
        p = prepared.params
        p.table_stride, p.width, p.by_rank = sources.stride, sources.width, sources.by_rank
        p.places_stride, p.top_k = width, result.top_k
        p.row_bytes = out.shape[1] * out.element_size()
        p.pieces = -(-p.row_bytes // pull_spec.PIECE_BYTES)
        prepared.block, prepared.smem_bytes = pull_spec.MAX_WARPS * 32, pull_spec.SMEM_BYTES
    station.address(prepared, here)
    _OFFSETS.pack_into(
        prepared.view, prepared.offsets, offsets[0] // OFFSET_BYTES, offsets[1] // OFFSET_BYTES, 0, 0, 0, 0
    )
    biases = result.biases
    _PULL.pack_into(
        prepared.view,
        prepared.first,
        sources.table,
        address(places),
        sources.local,
        out.data_ptr(),
        biases[0].data_ptr() if biases else 0,
        biases[1].data_ptr() if len(biases) > 1 else 0,
        address(sources.weights),
        address(result.weights_out),
        counts[0].data_ptr(),
        counts[1].data_ptr(),
        sources.source,
        out.shape[0],
    )
    prepared.params.weight_by_place = sources.by_place
    prepared.launch(num_sms, here.stream)
