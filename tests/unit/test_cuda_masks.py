"""Epochs of ranks that resynchronise."""

import struct

import pytest

from tokenferry.backends.cuda.masks import _by_half, _latest

LAST = (1 << 32) - 1


@pytest.mark.parametrize(
    ("epochs", "latest"),
    [([0], 0), ([3, 7, 5], 7), ([7, 0, 0], 7), ([LAST, 2], 2), ([2, LAST, LAST - 5], 2), ([LAST - 1, LAST], LAST)],
)
def test_the_latest_epoch(epochs, latest):
    assert _latest(epochs) == _latest(epochs[::-1]) == latest


@pytest.mark.parametrize(("epoch", "even", "odd"), [(0, 0, 0), (1, 0, 1), (2, 2, 1), (3, 2, 3), (LAST, LAST - 1, LAST)])
def test_a_resynchronised_rank_has_received_everything(epoch, even, odd):
    assert struct.unpack("<2I", _by_half(epoch)) == (even, odd)
