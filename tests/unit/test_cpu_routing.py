"""Sums of the CPU backend are equal to those of plain loops, bit for bit; rows are copied into their ranges only."""

import sys

import pytest
import torch

import tokenferry
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.allocator import Allocator


@pytest.fixture(params=[1, 3, 7, 100], ids="{} tokens a block".format)
def allocator(request, monkeypatch):
    """Return an allocator; blocks have this many tokens of width 8."""
    for name in ("_BLOCK_BYTES", "_WEIGHTED_BLOCK_BYTES"):
        monkeypatch.setattr(cpu_routing, name, request.param * 4 * 8)
    return Allocator()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_start_with_the_biases_and_follow_the_sources(allocator, dtype):
    torch.manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens_by_source = [torch.rand(20).lt(share).nonzero()[:, 0] for share in (0.9, 0.0, 0.5)]
    rows = [torch.randn(len(tokens), 8).to(dtype) for tokens in tokens_by_source]
    biases = [torch.randn(20, 8).to(dtype) for _ in range(2)]
    expected = torch.empty(20, 8, dtype=dtype)
    for token in range(20):
        total = biases[0][token].to(wide) + biases[1][token].to(wide)
        for tokens, source in zip(tokens_by_source, rows, strict=True):
            for row in (tokens == token).nonzero()[:, 0].tolist():
                total = total + source[row].to(wide)
        expected[token] = total.to(dtype)
    out = torch.full((20, 8), torch.nan, dtype=dtype)
    cpu_routing.reduce_rows(out, tokens_by_source, rows, allocator, biases)
    assert torch.equal(out, expected)


def test_weighted_sums_follow_the_slots(allocator):
    torch.manual_seed(2)
    rows = torch.randn(30, 8).bfloat16()
    row_idx = torch.randint(-1, 30, (20, 4))
    weights = torch.rand(20, 4)
    expected = torch.zeros(20, 8)
    for token in range(20):
        for slot in range(4):
            if row_idx[token, slot] >= 0:
                expected[token] += rows[row_idx[token, slot]].float() * weights[token, slot]
    out = torch.full((20, 8), torch.nan, dtype=torch.bfloat16)
    cpu_routing.reduce_weighted(out, rows, row_idx, weights, allocator)
    assert torch.equal(out, expected.bfloat16())


def test_empty_sums(allocator):
    out = torch.empty(0, 8)
    cpu_routing.reduce_rows(out, [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 8)], allocator)
    cpu_routing.reduce_weighted(
        out, torch.empty(0, 8), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), allocator
    )


def test_sums_may_overwrite_their_rows(allocator):
    shape = tokenferry.MoeShape(num_experts=1, top_k=1, hidden=8, max_tokens=20)
    with tokenferry.ExpertGroup(None, shape) as group:
        # Token 0 has no row, so row i - 1 is that of token i: each sum overwrites the row that the next one needs.
        index = torch.zeros(20, 1, dtype=torch.int64)
        index[0] = -1
        sent = group.dispatch(torch.zeros(20, 8), tokenferry.Routing(index))
        memory = torch.arange(20.0).repeat_interleave(8).view(20, 8)
        out = group.combine(memory[:19], sent.plan, out=memory).x
        assert out[:, 0].tolist() == [0.0, *map(float, range(19))]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("strides", [(9, 1), (1, 4)], ids=str)
def test_rows_become_bytes_whatever_strides_torch_calls_contiguous(shape, strides):
    """A single number may have any strides, such as those of a column that is padded for a GPU."""
    numbers = torch.arange(32, dtype=torch.int32, device="cpu")
    rows = numbers.as_strided(shape, strides, storage_offset=2).contiguous()
    found = cpu_routing.as_bytes(rows)
    assert found.shape == (shape[0], 4 * shape[1])
    assert bytes(found.flatten().tolist()) == b"".join(n.to_bytes(4, sys.byteorder) for n in rows.flatten().tolist())


RANGES = [range(2), range(4, 4), range(4, 7), range(7, 9), range(12, 13)]
"""Of five experts, one without rows and two side by side; there is padding between them and behind."""


def test_rows_are_expanded_into_their_ranges_only():
    rows = torch.arange(20.0).view(4, 5)
    row_idx = torch.tensor([[0, 4], [1, 8], [5, 7], [6, 12]], dtype=torch.int32)
    out = torch.full((15, 5), -1.0)
    cpu_routing.expand_rows(rows, row_idx, RANGES, out)
    source = [0, 1, -1, -1, 0, 2, 3, 2, 1, -1, -1, -1, 3, -1, -1]
    assert out.equal(torch.stack([rows[i] if i >= 0 else torch.full((5,), -1.0) for i in source]))


def test_padding_is_zeroed_and_no_rows():
    out = torch.full((15, 3), 7.0)
    cpu_routing.zero_padding(RANGES, out)
    filled = [i for each in RANGES for i in each]
    assert [i for i in range(15) if out[i].eq(7.0).all()] == filled
    assert not out[[i for i in range(15) if i not in filled]].any()


def shifted(rows: int, by: int, *, in_numpy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors of so many rows, of which one begins so many rows behind the other: of one storage or two."""
    torch.manual_seed(3)
    whole = torch.randn(rows + abs(by), 8, dtype=torch.float32)
    at = (max(-by, 0), max(by, 0))
    if in_numpy:
        memory = whole.numpy()
        first, second = (torch.from_numpy(memory[start : start + rows]) for start in at)
    else:
        first, second = (whole[start : start + rows] for start in at)
    return first, second


@pytest.mark.parametrize("in_numpy", [False, True])
@pytest.mark.parametrize("by", [-7, 0, 7])
@pytest.mark.parametrize("what", ["y", "bias", "second bias"])
def test_sums_may_overwrite_what_they_are_sums_of(monkeypatch, what, by, in_numpy):
    """Blocks of three rows are written one after the other."""
    monkeypatch.setattr(cpu_routing, "_BLOCK_BYTES", 3 * 4 * 8)
    first, out = shifted(20, by, in_numpy=in_numpy)
    other = torch.full((20, 8), 2.0, dtype=torch.float32)
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(1, 1, 8, 20), backend="cpu") as group:
        where = tokenferry.Routing(torch.zeros(20, 1, dtype=torch.int64))
        plan = group.dispatch(other, where).plan
        y, bias = {"y": (first, other), "bias": (other, first), "second bias": (other, (other, first))}[what]
        wanted = group.combine(y, plan, bias=bias).x.clone()
        done = group.combine(y, plan, bias=bias, out=out)
    assert done.x is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", range(9))
def test_rows_are_copied_in_the_widest_integers_that_fit(dtype, start):
    """They may begin anywhere: views of a part of a larger tensor do."""
    flat = torch.arange(start + 3 * 16, device="cpu").to(dtype)
    rows, place = flat[start:].view(3, 16), torch.zeros(3, 16, dtype=dtype)
    words, out = cpu_routing.as_words(rows, place)
    size = min(8, (start * dtype.itemsize & -start * dtype.itemsize) or 8)
    assert (words.dtype, words.element_size()) == (out.dtype, size)
    out.copy_(words)
    assert torch.equal(place, rows)
