"""Rows with infinities and NaNs, among ordinary numbers, among zeros, and alone."""

import torch
from torch import Tensor

GROUP = 128
"""Columns that share a scale."""

_INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_NANS = {torch.bfloat16: (0x7FC0, -0x5F), torch.float16: (0x7E00, -0x2AB), torch.float32: (0x7FC00000, -0x5EDCBB)}
"""Bits of the usual NaN, and of a signalling one with sign and payload."""


def spoil(rows: Tensor) -> Tensor:
    """Return a copy of rows ``[n, H]`` of which most groups of 128 columns hold something that is not finite.

    The first group of each row is of another kind than that of the row before, and so is each next group of a row.
    """
    rows = rows.clone()
    nans = torch.tensor(_NANS[rows.dtype], dtype=_INTS[rows.dtype]).view(rows.dtype)
    strange = torch.cat([torch.tensor([torch.inf, -torch.inf], dtype=rows.dtype), nans])
    for i, row in enumerate(rows):
        for g, group in enumerate(row.split(GROUP)):
            kind, at = (i + g) % 8, (7 * i + 13 * g) % len(group)
            if kind < 4:
                group[at] = strange[kind]
            elif kind == 4:  # nothing else
                group[:] = strange[torch.arange(len(group)) % 4]
            elif kind == 5:  # zeros, one of them negative
                group[:] = 0.0
                group[at - 1], group[at] = -0.0, torch.inf
            elif kind == 6:  # a few, and zeros
                group[::5], group[1::5], group[2::25], group[3::25] = 0.0, -0.0, torch.nan, -torch.inf
            else:  # a negative zero among finite numbers
                group[at] = -0.0
    return rows


def any_bits(like: Tensor, seed: int = 0) -> Tensor:
    """Return random bits of the shape and dtype of ``like``: numbers of all sizes, infinities and NaNs among them."""
    kind = _INTS[like.dtype]
    ends = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(ends.min, ends.max, like.shape, dtype=torch.int64, generator=generator).to(kind)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.02, torch.inf, bits.view(like.dtype))
