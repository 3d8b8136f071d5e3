"""Rows made from token numbers, for results of gigabytes; and groups whose heap has a given size."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GIB = 1 << 30
HIDDEN = 7168
STEP = 4096


def numbered(numbers: Tensor) -> Tensor:
    """``[n, HIDDEN]`` bfloat16 made from token numbers: integers from -128 to 127, whose doubles are exact, too."""
    columns = torch.arange(HIDDEN, device=numbers.device)
    mixed = (numbers[:, None] * 2_654_435_761 + columns * 40_503) & 0xFFFFFFFF
    return (((mixed >> 13) ^ (mixed >> 5)) & 0xFF).sub_(128).to(torch.bfloat16)


def check_numbered(what: str, rows: Tensor, numbers: Tensor, factor: int = 1) -> None:
    """Every row is that of its token, checked on the GPU, block by block."""
    assert rows.shape == (numbers.numel(), HIDDEN), f"{what}: got shape {list(rows.shape)}"
    for first in range(0, numbers.numel(), STEP):
        wrong = (rows[first : first + STEP] != numbered(numbers[first : first + STEP]) * factor).any(dim=1)
        assert not bool(wrong.any()), f"{what}: row {first + int(wrong.nonzero()[0])} is wrong, the first of its block"


@contextmanager
def heap_of(megabytes: int) -> Iterator[None]:
    os.environ["TOKENFERRY_HEAP_MB"] = str(megabytes)
    try:
        yield
    finally:
        del os.environ["TOKENFERRY_HEAP_MB"]
