"""The control blocks as the host reads and writes them, outside of calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import Window


def read_field(window: Window, rank: int, field: str, num_bytes: int) -> bytes:
    """Return the first bytes of a field of a rank's control block; waits for the current stream."""
    return bytes(_field(window, rank, field, num_bytes).tolist())


def write_field(window: Window, field: str, value: bytes) -> None:
    """Write the first bytes of a field of this rank's own control block, in the order of the current stream."""
    values = torch.tensor(tuple(value), dtype=torch.uint8, device="cpu")
    _field(window, window.rank, field, len(value)).copy_(values)


def _field(window: Window, rank: int, field: str, num_bytes: int) -> Tensor:
    return bytes_at(window.bases[rank] + CONTROL_BLOCK_OFFSETS[field], num_bytes, window.device, window)
