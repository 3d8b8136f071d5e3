"""Where the tokens of this rank go: the kernels `dispatch_layout` and `dispatch_restrict`, for the DeepEP API."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.backends.base import TokenLayout
from tokenferry.backends.cuda.context import Context
from tokenferry.jit.params import Packer
from tokenferry.kernels.dispatch_layout import spec as layout_spec
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.kernels.dispatch_restrict import spec as restrict_spec
from tokenferry.memory.empty import part_of

_LAYOUT = Packer(
    layout_spec.SPEC.params.struct, "topk_idx", "counts", "in_rank", "num_tokens", "top_k", "num_experts", "num_nodes"
)
_RESTRICT = Packer(
    restrict_spec.SPEC.params.struct, "topk_idx", "in_rank", "kept", "num_tokens", "top_k", "num_experts"
)


def token_layout(
    context: Context, topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int = 1
) -> TokenLayout:
    """Launch `dispatch_layout` on the current stream; see `tokenferry.backends.base.Backend`.

    Args:
        context: Context of this rank.
        topk_idx: As there.
        num_experts: As there.
        num_ranks: R, the ranks of all nodes.
        num_nodes: The nodes, of equally many consecutive ranks.
    """
    stream, _ = context.order_after_calls()  # the kernel counts in the control block, as those of a dispatch do
    num_tokens, top_k = topk_idx.shape
    nodes_at, num_counted = num_ranks + num_experts, num_nodes if num_nodes > 1 else 0
    counts = context.empty((nodes_at + num_counted,), (1,), torch.int32)
    in_rank = context.empty((num_tokens, num_ranks), (num_ranks, 1), torch.bool)
    wide = topk_idx.dtype is torch.int64
    key = (layout_spec.SPEC, wide, num_experts)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(layout_spec.SPEC, _LAYOUT, wide=int(wide))
        template.block, template.params.num_ranks = layout_spec.THREADS, num_ranks
        template.smem_bytes = layout_spec.smem_bytes(num_experts, num_ranks)
        context.templates[key] = template
    template.pack(
        topk_idx.data_ptr(), counts.data_ptr(), in_rank.data_ptr(), num_tokens, top_k, num_experts, num_counted
    )
    template.launch(max(1, min(num_units(num_tokens), layout_spec.MAX_BLOCKS)), stream)
    per_rank, per_expert = part_of(counts, 0, (num_ranks,), (1,)), part_of(counts, num_ranks, (num_experts,), (1,))
    per_node = part_of(counts, nodes_at, (num_nodes,), (1,)) if num_counted else None
    return TokenLayout(per_rank, per_node, per_expert, in_rank)


def restricted(context: Context, topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
    """Launch `dispatch_restrict` on the current stream; see `tokenferry.backends.base.Backend`."""
    stream, _ = context.order_after_calls()  # whether the kernel does anything follows from what they have found
    num_tokens, top_k = topk_idx.shape
    kept = context.empty((num_tokens, top_k), (top_k, 1), topk_idx.dtype)
    wide = topk_idx.dtype is torch.int64
    key = (restrict_spec.SPEC, wide)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(restrict_spec.SPEC, _RESTRICT, wide=int(wide))
        template.block, template.params.num_ranks = restrict_spec.THREADS, in_rank.shape[1]
        context.templates[key] = template
    template.pack(topk_idx.data_ptr(), in_rank.data_ptr(), kept.data_ptr(), num_tokens, top_k, num_experts)
    num_blocks = -(-num_tokens * top_k // restrict_spec.THREADS)
    template.launch(max(1, min(num_blocks, restrict_spec.MAX_BLOCKS)), stream)
    return kept
