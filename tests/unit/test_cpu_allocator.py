"""The allocator reuses a result's memory when, and only when, its last tensor is freed."""

import gc
import os

import torch

from tokenferry.backends.cpu.allocator import Allocator

LARGE = (1 << 18,)


def test_a_block_is_reused_when_the_last_view_is_freed():
    allocator = Allocator()
    result = allocator.empty(*LARGE, dtype=torch.float32)
    address, view = result.data_ptr(), result[10:20]
    view.fill_(1.0)
    del result
    second = allocator.empty(*LARGE, dtype=torch.float32)
    second.zero_()
    assert second.data_ptr() != address, "a view still uses this memory"
    assert view.tolist() == [1.0] * 10
    del view
    assert allocator.empty(*LARGE, dtype=torch.float32).data_ptr() == address


def test_a_block_serves_a_result_of_another_shape_and_type():
    allocator = Allocator()
    address = allocator.empty(1000, 1000, dtype=torch.bfloat16).data_ptr()
    other = allocator.empty(600, 3000, dtype=torch.uint8)
    assert (other.data_ptr(), other.shape, other.dtype) == (address, (600, 3000), torch.uint8)
    assert other.is_contiguous()


def test_a_large_result_is_no_view():
    """Autograd hooks of a result, such as those of FSDP, would be lost when it is changed in place."""
    result = Allocator().empty(*LARGE, dtype=torch.float32)
    assert not result._is_view()
    assert result.is_contiguous()


def test_a_block_twice_too_large_is_left_for_a_larger_result():
    allocator = Allocator()
    address = allocator.empty(1 << 24, dtype=torch.uint8).data_ptr()
    assert allocator.empty(1 << 20, dtype=torch.uint8).data_ptr() != address
    assert allocator.empty(1 << 24, dtype=torch.uint8).data_ptr() == address


def test_small_results_do_not_use_blocks():
    allocator = Allocator()
    allocator.empty(10, 10, dtype=torch.float32)
    assert not allocator._free
    assert allocator.empty(0, 5, dtype=torch.float32).shape == (0, 5)


def test_few_free_blocks_are_kept():
    allocator = Allocator()
    results = [allocator.empty(*LARGE, dtype=torch.float32) for _ in range(20)]
    results.clear()
    assert len(allocator._free) == 12


def test_nothing_is_kept_after_closing():
    allocator = Allocator()
    results = [allocator.empty(*LARGE, dtype=torch.float32) for _ in range(3)]
    results.pop()
    allocator.close()
    assert not allocator._free
    results.clear()
    assert not allocator._free


def test_results_outlive_the_allocator():
    result = Allocator().empty(*LARGE, dtype=torch.float32)
    gc.collect()
    result.fill_(3.0)
    assert result.sum().item() == 3.0 * LARGE[0]


def test_a_forked_process_does_not_write_into_results():
    result = Allocator().empty(*LARGE, dtype=torch.float32)
    result[0] = 1.0
    pid = os.fork()
    if pid == 0:
        result[0] = 2.0
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert result[0].item() == 1.0


def test_large_results_are_ordinary_tensors():
    result = Allocator().empty(1 << 20, dtype=torch.float32).requires_grad_()
    (result * 2).sum().backward()
    assert bool((result.grad == 2).all())
    assert result.detach().clone().view(1024, 1024).T.contiguous().shape == (1024, 1024)
