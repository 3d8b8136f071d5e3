"""Which results of dispatches stay in the heap, and what stays free for the rows of later calls."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.memory.heap import Heap

KIB = 1024
CALL = SimpleNamespace(stream=1, capturing=False, signature=SimpleNamespace(phase="dispatch"))


def make(kib):
    heap = Heap(0, kib * KIB, torch.device("cpu"))
    return SymmetricAllocator(SimpleNamespace(heap=heap, window=SimpleNamespace(base=0, num_bytes=kib * KIB)))


@pytest.mark.parametrize("sizes", [(10, 10, 10, 10, 10, 40), (5, 25, 40), (24, 40, 40)])
def test_results_that_stay_leave_room_for_the_largest_one(sizes):
    allocator = make(64)
    allocator.expect(40 * KIB)
    kept = []
    for size in sizes:
        block, copy_out = allocator.recv_block(CALL, size * KIB)
        if not copy_out:
            kept.append(block)
        del block
    assert kept, "there is room for some"


def test_results_may_take_a_quarter_of_a_heap_that_the_largest_one_would_fill(caplog):
    """Where all choices of all ranks might go to one."""
    allocator = make(64)
    allocator.expect(1000 * KIB)
    allocator.expect(4 * KIB)
    first, second = (allocator.recv_block(CALL, 8 * KIB) for _ in range(2))
    assert not first[1]
    assert not second[1]
    with caplog.at_level(logging.WARNING, "tokenferry"):
        assert allocator.recv_block(CALL, 8 * KIB)[1]
        assert allocator.recv_block(CALL, 8 * KIB)[1]
    assert len(caplog.records) == 1, "it is said once"
    assert "TOKENFERRY_HEAP_MB" in caplog.text


def test_what_is_said_names_the_largest_range_that_is_free(caplog):
    """For free memory that lies in pieces does not help."""
    allocator = make(4096)
    allocator.expect(1536 * KIB)
    kept = [allocator.block("dispatch", 1024 * KIB, 1) for _ in range(3)]
    del kept[1]
    with caplog.at_level(logging.WARNING, "tokenferry"):
        assert allocator.recv_block(CALL, 256 * KIB)[1]
    assert "2 MiB free, the largest free range 1.0 MiB) keeps a range of 1.5 MiB" in caplog.text, caplog.text


def test_without_a_limit_room_is_left_for_twice_what_came():
    allocator = make(64)
    allocator.expect_more(20 * KIB)
    assert allocator.recv_block(CALL, 30 * KIB)[1], "34 KiB are left, 40 may come"
    assert not allocator.recv_block(CALL, 20 * KIB)[1]


def test_without_a_dispatch_a_result_leaves_room_for_another_one():
    allocator = make(64)
    first, second, third = (allocator.recv_block(CALL, 20 * KIB) for _ in range(3))
    assert [first[1], second[1], third[1]] == [False, False, True]
