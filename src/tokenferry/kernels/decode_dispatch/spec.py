"""Host half of the kernel `spread`; kernel.cuh says what it does."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenferry.kernels.codes import RAW, TYPES
from tokenferry.kernels.describe import describe

THREADS = 512
CHOICES_BYTES = 128 * 1024
"""Routing that a block keeps in shared memory; a larger one is read where it is."""
ROW_TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Rows of a type that is cast to FP8; with the config ``type=RAW`` rows travel as bytes."""

SPEC = replace(
    describe(
        __file__,
        (
            ("workspaces", "ptr[8]"),
            ("x", "ptr"),
            ("topk_idx", "ptr"),
            ("weights", "ptr"),
            ("choices", "ptr"),
            ("out", "ptr"),
            ("scale_out", "ptr"),
            ("expert_counts", "ptr"),
            ("received", "ptr"),
            ("src_token", "ptr"),
            ("src_range", "ptr"),
            ("row_weights", "ptr"),
            ("table", "ptr"),
            ("masked_out", "ptr"),
            ("trace", "ptr"),
            ("notes_at", "u64"),
            ("packets_at", "u64"),
            ("words_stride", "u64"),
            ("notes_stride", "u64"),
            ("packets_stride", "u64"),
            ("num_tokens", "u32"),
            ("phases", "u32"),
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
        ),
        max_registers=128,
        max_threads=THREADS,
        static_smem=256,
        configs=tuple({"type": kind} for kind in (*(TYPES[dtype] for dtype in ROW_TYPES), RAW)),
    ),
    early=True,
)


def mask_words(max_tokens: int) -> int:
    """Words of 32 bits for a bit a token."""
    return -(-max_tokens // 32)


def message_words(max_tokens: int, num_local: int) -> int:
    """Words of a message from one rank to another: tokens, rows of each expert, which tokens."""
    return 1 + num_local + mask_words(max_tokens)


def notes(top_k: int) -> int:
    """Notes of a row, most: three slots a note, and their weights."""
    return 2 * -(-top_k // 3)


def smem_bytes(num_choices: int, num_experts: int, num_ranks: int, max_tokens: int) -> int:
    """Dynamic shared memory of a block; ``num_choices``: the most slots of a routing."""
    return -(-min(2 * num_choices, CHOICES_BYTES) // 16) * 16 + 4 * (num_experts + num_ranks * mask_words(max_tokens))
