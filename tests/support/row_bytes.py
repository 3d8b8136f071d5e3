"""Rows in blocks of virtual ranks, compared byte by byte."""

from __future__ import annotations

import torch
from torch import Tensor

from support.virtual_ranks import POISON, Block, same_bytes


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_rows(what: str, block: Block, places: list[int], rows: list[Tensor], row_bytes: int) -> None:
    """Check the rows at their places, and poison everywhere else."""
    want = torch.full((block.tensor.numel() // row_bytes, row_bytes), POISON, dtype=torch.uint8)
    if places:
        want[torch.tensor(places)] = torch.stack(rows).reshape(len(places), row_bytes)
    same_bytes(what, block.cpu(), want.flatten(), row_bytes)
