"""The sections of a message are in order, aligned, do not overlap, and lie inside of it; capacities of results."""

import pytest
import torch

from tokenferry.layout import RowCapacity, Sections, row_capacity
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DispatchOptions(), RowCapacity(worst=20, given=20, received=20, sent=2)),
        (DispatchOptions(counts="device", capacity=7), RowCapacity(worst=20, given=7, received=7, sent=2)),
        (DispatchOptions(Layout.EXPERTS), RowCapacity(worst=60, given=60, received=20, sent=2)),
        (DispatchOptions(Layout.EXPERTS, alignment=8), RowCapacity(worst=88, given=88, received=20, sent=2)),
        (DispatchOptions(Layout.MASKED, capacity=9), RowCapacity(worst=20, given=9, received=20, sent=2)),
    ],
)
def test_the_capacity_of_a_dispatch(options, expected):
    """R=2, M=10, K=3, L=4: worst-case rows of every layout, and what an explicit capacity leaves of them."""
    found = row_capacity(MoeShape(num_experts=8, top_k=3, hidden=8, max_tokens=10), options, 2)
    assert found == expected
    assert found.tight == (expected.given < expected.worst)


def test_padding_of_the_worst_routing_has_room():
    """Two ranks send a token each, to different experts of one rank: 8 places for each expert."""
    shape = MoeShape(num_experts=4, top_k=1, hidden=16, max_tokens=1)
    options = DispatchOptions(Layout.EXPERTS, alignment=8, counts="device")
    assert row_capacity(shape, options, num_ranks=2).worst == 16
