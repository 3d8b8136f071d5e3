"""Host half of the kernel dispatch_fused; kernel.cuh documents the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.describe import describe
from tokenferry.kernels.dispatch.spec import Rings, cut
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.kernels.dispatch_notify.spec import smem_bytes as mask_bytes

THREADS = 512
MAX_TOKENS = 512
"""Most tokens of a rank: block 0 counts all of them alone. With 1024 three kernels were faster (71 against 60 us)."""

SPEC = replace(
    describe(
        __file__,
        (
            ("x", "ptr:const u8"),
            ("scale", "ptr:const u8"),
            ("weights", "ptr:const f32"),
            ("topk_idx", "ptr:const u8"),
            ("table", "ptr:i32"),
            ("bases", "ptr:i32"),
            ("dst_counts", "ptr:i64"),
            ("src_counts", "ptr:i64"),
            ("expert_counts", "ptr:i32"),
            ("expert_offsets", "ptr:i32"),
            ("places", "ptr:i32"),
            ("dst_token", "ptr:i64"),
            ("scale_row_stride", "i64"),
            ("scale_stride", "i64"),
            ("num_tokens", "u32"),
            ("tokens", "ptr:const i32"),
            ("host", "ptr:u32"),
            ("row_bytes", "u32"),
            ("piece_bytes", "u32"),
            ("pitch", "u32"),
            ("pieces", "u32"),
            ("stages", "u32"),
            ("warps", "u32"),
            ("rings_at", "u32"),
            ("bulk_scale_bytes", "u32"),
            ("small_scale", "u32"),
            ("scale_size", "u32"),
            ("num_scales", "u32"),
            ("top_k", "u32"),
            ("width", "u32"),
            ("num_experts", "u32"),
            ("num_local", "u32"),
            ("layout", "u32"),
            ("by_expert", "u32"),
            ("alignment", "u32"),
            ("capacity", "u32"),
            ("row_limit", "u32"),
            ("segments", "u32"),
            ("segment_units", "u32"),
        ),
        max_registers=96,
        max_threads=THREADS,
        static_smem=2560,
        configs=({"wide": 0}, {"wide": 1}),
    ),
    other_registers=128,
)


def num_blocks(num_tokens: int, num_sms: int) -> int:
    """Return the number of blocks for T tokens on at most ``num_sms`` SMs; 0 if T is too large for this kernel.

    One block exchanges counts; more others than tokens would be idle. Each unit of tokens needs a block.
    """
    if num_tokens > MAX_TOKENS or num_units(num_tokens) > num_sms:
        return 0
    return min(num_sms, num_tokens + 1)


def rings_at(num_experts: int, num_ranks: int) -> int:
    """Return where the rings begin in the dynamic shared memory of a block: behind the masks of a unit."""
    return -(-mask_bytes(num_experts, num_ranks) // 128) * 128


def cut_rings(row_bytes: int, bulk_scale_bytes: int, smem_bytes: int) -> Rings:
    """Cut rows into pieces, and the memory behind the masks of a unit into rings, as ``cut`` of dispatch does."""
    return cut(row_bytes, bulk_scale_bytes, smem_bytes, max_warps=THREADS // 32)
