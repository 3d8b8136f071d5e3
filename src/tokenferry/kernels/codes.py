"""Codes and sizes that kernels and host share, beyond the control block: `generated/codes.cuh`."""

from __future__ import annotations

import torch

from tokenferry.kernels.header import Header

HEADER = Header("generated/codes.cuh", "kernels/codes.py")

# ---- numbers: the constant kType of a kernel

TYPES = {
    torch.bfloat16: HEADER.constant("kBf16", 0, "kType: bfloat16, summed in float32"),
    torch.float16: HEADER.constant("kFp16", 1, "kType: float16, summed in float32"),
    torch.float32: HEADER.constant("kFp32", 2, "kType: float32"),
    torch.float64: HEADER.constant("kFp64", 3, "kType: float64"),
}
"""The constant ``kType`` of a kernel for each dtype of rows that it computes with."""
ROW_TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of rows that decode calls cast and add up; with the config ``type=RAW`` rows are sent as bytes."""
RAW = HEADER.constant("kRaw", 4, "kType of decode dispatch: rows are bytes, nothing is cast")

# ---- layouts of received rows, params.layout

ROWS = HEADER.constant("kRows", 0, "layout: by source rank, then token")
EXPERTS = HEADER.constant("kExperts", 1, "layout: by expert, each group padded to the alignment")
MASKED = HEADER.constant("kMasked", 2, "layout: by expert, `capacity` rows for each")

# ---- units of work

UNIT_TOKENS = HEADER.constant("kUnit", 128, "tokens that a block counts at a time in a dispatch")
MAX_STAGES = HEADER.constant("kMaxStages", 8, "dispatch: most buffers of a warp's ring")
MAX_PUSH_STAGES = HEADER.constant("kMaxPushStages", 3, "combine_push: most buffers of a pushing warp's ring")
PIECE_BYTES = HEADER.constant("kPiece", 2048, "combine: columns that a warp sums at a time, in bytes")
GROUP_ROWS = HEADER.constant("kGroup", 4, "combine: rows that are loaded together")
RAIL_CHUNKS = 8
"""Room for the chunks in which the rows of a node cross, in the params of kernels."""
STAGES = HEADER.constant("kStages", 2, "combine: groups in a warp's ring")
