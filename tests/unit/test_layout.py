"""Sections of a message are in order, apart, aligned and inside; results have room for the worst routing."""

import pytest
import torch

from tokenferry.layout import Sections, room
from tokenferry.types import DispatchOptions, Layout, MoeShape


@pytest.mark.parametrize("num_rows", [0, 1, 3, 1000])
@pytest.mark.parametrize("widths", [(16,), (32, 0, 12), (8, 4, 3, 1), (0, 0)])
def test_sections_do_not_overlap(widths, num_rows):
    sections = Sections(widths)
    offsets = sections.offsets(num_rows)
    assert offsets[0] == 0
    for start, end, width in zip(offsets, offsets[1:], widths, strict=False):
        assert start % 16 == 0
        assert 0 <= end - start - num_rows * width < 16
    assert sections.num_bytes(num_rows) == offsets[-1]
    body = torch.zeros(sections.num_bytes(num_rows), dtype=torch.uint8)
    parts = sections.split(body, num_rows)
    assert [part.shape for part in parts] == [(num_rows, width) for width in widths]
    for part in parts:
        part += 1
    assert int(body.max()) <= 1 if body.numel() else True
    assert int(body.sum()) == num_rows * sum(widths)


def test_padding_of_the_worst_routing_has_room():
    """Two ranks send a token each, to different experts of one rank: 8 places for each expert."""
    shape = MoeShape(num_experts=4, top_k=1, hidden=16, max_tokens=1)
    options = DispatchOptions(Layout.EXPERTS, alignment=8, counts="device")
    assert room(shape, options, num_ranks=2).worst == 16
