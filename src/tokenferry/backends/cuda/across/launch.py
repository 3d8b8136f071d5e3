"""Launch templates of the kernels of groups of several nodes."""

from __future__ import annotations

import torch

from tokenferry.backends.cuda.across.parcels import Chunks
from tokenferry.backends.cuda.context import Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.jit.params import Items
from tokenferry.kernels.across_check import spec as check_spec
from tokenferry.kernels.across_clock import spec as clock_spec
from tokenferry.kernels.across_open import spec as open_spec
from tokenferry.kernels.codes import RAIL_CHUNKS, TYPES
from tokenferry.kernels.combine_nodes import spec as sum_spec
from tokenferry.kernels.decode_encode import spec as encode_spec
from tokenferry.kernels.decode_open import spec as decode_open_spec
from tokenferry.kernels.decode_pack import spec as decode_pack_spec
from tokenferry.kernels.decode_sum import spec as decode_sum_spec
from tokenferry.kernels.decode_unpack import spec as decode_unpack_spec
from tokenferry.kernels.dispatch_pack import spec as pack_spec
from tokenferry.kernels.dispatch_rails import spec as rails_spec
from tokenferry.kernels.dispatch_relay import spec as relay_spec
from tokenferry.kernels.dispatch_split import spec as split_spec
from tokenferry.topology import Topology

_SPLIT = call_packer(
    split_spec.SPEC, "topk_idx", "table", "bases", "dst_counts", "headers", "came", "states", "host", "num_tokens"
)
_RAILS = call_packer(
    rails_spec.SPEC,
    "topk_idx", "table", "bases", "mine", "came", "dst_counts", "slots", "ids", "parcels_out", "dst_token",
    "num_tokens", "segment",
)  # fmt: skip
_RELAY = call_packer(
    relay_spec.SPEC,
    "parcels_in", "headers", "mine", "ids", "tokens", "sizes", "dst_counts", "num_tokens", "segment",
)  # fmt: skip
_PACK = call_packer(
    pack_spec.SPEC,
    "x", "scale", "weights", "slots", "dst_counts", "went", "out", "scale_row_stride", "scale_stride", "num_tokens",
)  # fmt: skip
_SUM = call_packer(
    sum_spec.SPEC,
    "slots", "dst_counts", "own", "parts", "own_weights", "went", "bias0", "bias1", "out", "weights_out", "num_tokens",
)  # fmt: skip

_OPEN = call_packer(
    open_spec.SPEC,
    "headers", "came", "states", "goes", "comes", "chunks", "cut_node", Items("chunk_first", 0, RAIL_CHUNKS),
)  # fmt: skip
_CHECK = call_packer(
    check_spec.SPEC,
    "headers", "epoch", "since", "goes", "comes", "states", "src_counts", "num_states", "first_state", "chunks",
    "skips",
    waits=True,
)  # fmt: skip
_PACK_DECODE = call_packer(
    decode_pack_spec.SPEC,
    "x", "topk_idx", "weights", "records", "slots", "number", "ids_here", "weights_here", "headers", "came", "states",
    "overflows", "epoch", "num_tokens",
)  # fmt: skip
_UNPACK_DECODE = call_packer(
    decode_unpack_spec.SPEC,
    "headers", "states", "records", "ids", "weights", "overflows", "epoch", "since", "num_states",
    waits=True,
)  # fmt: skip
_OPEN_DECODE = call_packer(
    decode_open_spec.SPEC,
    "headers", "came", "states", "epoch", "slots", "weights", "weights_here", "weights_out",
    "num_tokens", "top_k",
)  # fmt: skip
_CLOCK = call_packer(clock_spec.SPEC, "since")
_ENCODE = call_packer(encode_spec.SPEC, "rows", "packets", "num_rows", "columns")
_SUM_ENCODED = call_packer(decode_sum_spec.SPEC, "slots", "own", "parts", "out", "num_tokens", "columns")


def split_template(context: Context, topology: Topology, num_experts: int, top_k: int, *, wide: bool) -> LaunchTemplate:
    """Return a template of `dispatch_split`; ``wide``: ``topk_idx`` is int64."""
    template = context.new_template(split_spec.SPEC, _SPLIT, wide=int(wide))
    _set_nodes(template, topology, num_experts, top_k)
    template.block = split_spec.THREADS
    return template


def rails_template(context: Context, topology: Topology, num_experts: int, top_k: int, *, wide: bool) -> LaunchTemplate:
    """Return a template of `dispatch_rails`; ``wide``: ``topk_idx`` is int64."""
    template = context.new_template(rails_spec.SPEC, _RAILS, wide=int(wide))
    _set_nodes(template, topology, num_experts, top_k)
    template.block = rails_spec.THREADS
    return template


def relay_template(context: Context, topology: Topology, host: int, top_k: int, *, wide: bool) -> LaunchTemplate:
    """Return a template of `dispatch_relay`; ``host``: address of the words of the host; ``wide``: as above."""
    template = context.new_template(relay_spec.SPEC, _RELAY, wide=int(wide))
    p = template.params
    p.host, p.top_k, p.num_nodes, p.node = host, top_k, topology.num_nodes, topology.node
    template.block = relay_spec.THREADS
    return template


def pack_template(context: Context, topology: Topology, kind: RowKind, chunks: Chunks, pitch: int) -> LaunchTemplate:
    """Return a template of `dispatch_pack`; ``pitch``: of `RowWidths`."""
    template = context.new_template(pack_spec.SPEC, _PACK)
    p = template.params
    p.row_bytes, p.top_k = kind.row_bytes, kind.top_k
    if kind.scale_dtype is not None:
        p.bulk_scale_bytes = kind.scale_bytes if kind.bulk_scale else 0
        p.scale_size, p.num_scales = kind.scale_dtype.itemsize, kind.scale_columns
    p.num_nodes, p.node = topology.num_nodes, topology.node
    p.chunks, p.cut_node, p.pitch = chunks.num, chunks.to, pitch
    p.chunk_first[:] = chunks.table
    template.block = pack_spec.THREADS
    return template


def sum_template(
    context: Context, topology: Topology, dtype: torch.dtype, columns: int, top_k: int, *, skips: bool = False
) -> LaunchTemplate:
    """Return a template of `combine_nodes`, for sums without weights.

    ``skips``: for calls that leave masked ranks out.
    """
    template = context.new_template(sum_spec.SPEC, _SUM, type=TYPES[dtype])
    p = template.params
    p.row_bytes, p.top_k = columns * dtype.itemsize, top_k
    p.chunks, p.pitch = 1, p.row_bytes
    p.num_nodes, p.node, p.skips = topology.num_nodes, topology.node, int(skips)
    template.block = sum_spec.THREADS
    return template


def open_template(context: Context, topology: Topology) -> LaunchTemplate:
    """Return a template of `across_open`."""
    template = context.new_template(open_spec.SPEC, _OPEN)
    template.params.num_nodes, template.params.node = topology.num_nodes, topology.node
    template.block = open_spec.THREADS
    return template


def check_template(context: Context, topology: Topology) -> LaunchTemplate:
    """Return a template of `across_check`."""
    template = context.new_template(check_spec.SPEC, _CHECK)
    template.params.num_nodes, template.params.node = topology.num_nodes, topology.node
    template.block = check_spec.THREADS
    return template


def pack_decode_template(context: Context, topology: Topology, **config: int) -> LaunchTemplate:
    """Return a template of `decode_pack`."""
    template = context.new_template(decode_pack_spec.SPEC, _PACK_DECODE, **config)
    template.params.num_nodes, template.params.node = topology.num_nodes, topology.node
    template.block = decode_pack_spec.THREADS
    return template


def unpack_decode_template(context: Context, topology: Topology) -> LaunchTemplate:
    """Return a template of `decode_unpack`."""
    template = context.new_template(decode_unpack_spec.SPEC, _UNPACK_DECODE)
    p = template.params
    p.num_nodes, p.node, p.chunks = topology.num_nodes, topology.node, 1
    template.block = decode_unpack_spec.THREADS
    return template


def open_decode_template(context: Context, topology: Topology) -> LaunchTemplate:
    """Return a template of `decode_open`."""
    template = context.new_template(decode_open_spec.SPEC, _OPEN_DECODE)
    template.params.num_nodes, template.params.node = topology.num_nodes, topology.node
    template.block = decode_open_spec.THREADS
    return template


def clock_template(context: Context) -> LaunchTemplate:
    """Return a template of `across_clock`."""
    template = context.new_template(clock_spec.SPEC, _CLOCK)
    template.block = clock_spec.THREADS
    return template


def encode_template(context: Context, dtype: torch.dtype, encoding: int) -> LaunchTemplate:
    """Return a template of `decode_encode`."""
    template = context.new_template(encode_spec.SPEC, _ENCODE, type=TYPES[dtype], encoding=encoding)
    template.block = encode_spec.THREADS
    return template


def sum_encoded_template(context: Context, topology: Topology, dtype: torch.dtype, encoding: int) -> LaunchTemplate:
    """Return a template of `decode_sum`."""
    template = context.new_template(decode_sum_spec.SPEC, _SUM_ENCODED, type=TYPES[dtype], encoding=encoding)
    template.params.num_nodes, template.params.node = topology.num_nodes, topology.node
    template.block = decode_sum_spec.THREADS
    return template


def _set_nodes(template: LaunchTemplate, topology: Topology, num_experts: int, top_k: int) -> None:
    p, num_ranks = template.params, topology.num_ranks
    p.top_k, p.num_experts, p.all_ranks = top_k, num_experts, num_ranks
    p.num_nodes, p.node = topology.num_nodes, topology.node
    template.smem_bytes = split_spec.smem_bytes(num_ranks, topology.num_nodes)
