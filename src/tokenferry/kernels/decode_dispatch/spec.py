"""Spec of the kernel `decode_dispatch`: params, configs and resources; kernel.cuh describes the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.codes import RAW, ROW_TYPES, TYPES
from tokenferry.kernels.control_block import MAX_RANKS
from tokenferry.kernels.describe import describe

THREADS = 512
CHOICES_BYTES = 128 * 1024
"""The largest routing that a block keeps in shared memory, however much it has."""

SPEC = replace(
    describe(
        __file__,
        (
            ("x", "ptr:const int4"),
            ("topk_idx", "ptr:const void"),
            ("weights", "ptr:const float"),
            ("choices", "ptr:u16"),
            ("out", "ptr:int4"),
            ("scale_out", "ptr:u32"),
            ("expert_counts", "ptr:i32"),
            ("received", "ptr:i32"),
            ("src_token", "ptr:i32"),
            ("src_range", "ptr:i64"),
            ("row_weights", "ptr:float"),
            ("table", "ptr:i32"),
            ("masked_out", "ptr:u32"),
            ("trace", "ptr:u64"),
            ("num_tokens", "u32"),
            ("phases", "u32"),
            ("records", "ptr:const int4"),
            ("overflows", "ptr:const u32"),
            ("workspaces", f"ptr[{MAX_RANKS}]"),
            ("notes_at", "u64"),
            ("packets_at", "u64"),
            ("words_stride", "u64"),
            ("notes_stride", "u64"),
            ("packets_stride", "u64"),
            ("max_tokens", "u32"),
            ("top_k", "u32"),
            ("num_local", "u32"),
            ("columns", "u32"),
            ("row_units", "u32"),
            ("scale_units", "u32"),
            ("scale_format", "u32"),
            ("wide", "u32"),
            ("weighted", "u32"),
            ("per_local", "f32"),
            ("mask_late", "u32"),
            ("capacity", "u32"),
            ("num_nodes", "u32"),
            ("node", "u32"),
            ("segment", "u32"),
            ("first_own", "u32"),
            ("record_units", "u32"),
            ("node_slots", "u32"),
        ),
        max_registers=128,
        max_threads=THREADS,
        static_smem=256,
        configs=tuple({"type": kind, "relays": 0} for kind in (*(TYPES[dtype] for dtype in ROW_TYPES), RAW)),
    ),
    early=True,
    entry="low_latency::dispatch",
)

ACROSS = replace(SPEC, name="decode_dispatch_across", configs=tuple({**config, "relays": 1} for config in SPEC.configs))
"""The same for groups of several nodes."""


def mask_words(max_tokens: int) -> int:
    """Return the number of 32-bit words that hold one bit per token."""
    return -(-max_tokens // 32)


def message_words(max_tokens: int, num_local: int, num_nodes: int) -> int:
    """Return the words of a message from one rank to another: its tokens, rows for each expert, a mask of tokens."""
    return 1 + num_nodes * num_local + mask_words(max_tokens)


def notes(top_k: int, num_nodes: int) -> int:
    """Return the most notes of a row: one note for three slots, and as many for their weights.

    Across nodes there is another slot, for the number of the token.
    """
    return 2 * -(-(top_k + (num_nodes > 1)) // 3)


def kept_bytes(num_experts: int, num_ranks: int, max_tokens: int, dynamic_bytes: int) -> int:
    """Return the bytes of the largest routing that a block keeps; the host prepares a larger one in global memory.

    Args:
        num_experts: E.
        num_ranks: R.
        max_tokens: M.
        dynamic_bytes: The dynamic shared memory that a block may have.
    """
    left = dynamic_bytes - _counts_bytes(num_experts, num_ranks, max_tokens)
    return min(CHOICES_BYTES, max(0, left // 16 * 16))


def smem_bytes(num_choices: int, kept: int, num_experts: int, num_ranks: int, max_tokens: int) -> int:
    """Return the dynamic shared memory of a block in bytes.

    Args:
        num_choices: The most slots of a routing, M * K.
        kept: `kept_bytes`.
        num_experts: E.
        num_ranks: R.
        max_tokens: M.
    """
    return -(-min(2 * num_choices, kept) // 16) * 16 + _counts_bytes(num_experts, num_ranks, max_tokens)


def _counts_bytes(num_experts: int, num_ranks: int, max_tokens: int) -> int:
    return 4 * (num_experts + num_ranks * mask_words(max_tokens))
