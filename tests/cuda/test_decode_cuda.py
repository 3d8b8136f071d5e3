"""Decode calls of groups on GPUs: what a CUDA graph refuses, hooks on other streams, results of gigabytes."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from support.decoding import Step, check_combined, check_received
from support.numbered_rows import GIB, HIDDEN, check_numbered, heap_of, numbered
from support.pairs import NUM_GPUS, Pair
from tokenferry import ArgumentError, ConfigError, DecodeDispatched, ExpertGroup, MoeShape, Quantized, Routing, Scale
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import same_bits
from tokenferry.testing.reference import fp8_cast

PAIR = Pair("cuda", "nvlink")
RANKS = 2
CASE = Case((40, 25), 8, 3, hidden=256)


def brought(group: ExpertGroup, step: Step) -> tuple[Tensor, Routing]:
    """Return the input of a rank, on its device."""
    mine = step.mine()
    x, topk_idx, weights = (tensor.to(group.device) for tensor in (mine.x, mine.topk_idx, mine.topk_weights))
    return x, Routing(topk_idx, weights)


def check_works(group: ExpertGroup, step: Step) -> None:
    sent = group.decode_dispatch(*brought(group, step))
    check_received(step, sent, None)
    check_combined(group, step, sent, torch.bfloat16)


# ---------------------------------------------------------------------- what is refused


def hooks_across_the_border(rank, pg) -> None:
    step = Step(CASE, rank)
    both = "decode_dispatch: hook: a CUDA graph has to capture both the call and its hook, or neither"
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        check_works(group, step)
        x, routing = brought(group, step)
        outside = group.decode_dispatch(x, routing, return_hook=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(ArgumentError, match=both):
                outside.hook()
            inside = group.decode_dispatch(x, routing, return_hook=True)
        with pytest.raises(ArgumentError, match=both):
            inside.hook()
        outside.hook()
        check_received(step, outside, None)
        for _ in range(3):
            check_works(group, step)


def test_a_hook_on_the_other_side_of_a_captures_border(worlds):
    worlds(RANKS, "cuda").run(hooks_across_the_border)


def room_for_a_capture(rank, pg) -> None:
    steps = [Step(replace(CASE, seed=seed), rank) for seed in range(3)]
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        check_works(group, steps[0])
        owed = [group.decode_dispatch(*brought(group, step), return_hook=True) for step in steps[:2]]
        x, routing = brought(group, steps[2])
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(ArgumentError, match="the hook of an earlier decode_dispatch has to be called before a CUDA"),
        ):
            group.decode_dispatch(x, routing)
        for step, sent in zip(steps, owed, strict=False):
            sent.hook()
            check_received(step, sent, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sent = group.decode_dispatch(x, routing)
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            check_received(steps[2], sent, None)
            check_works(group, steps[0])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_needs_the_room_of_a_hook_outside(worlds):
    worlds(RANKS, "cuda").run(room_for_a_capture)


def first_calls(rank, pg) -> None:
    """They make memory together with all ranks."""
    step = Step(CASE, rank)
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        x, routing = brought(group, step)
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(ArgumentError, match=r"(?s)CUDA graph cannot capture.*call it once before the capture"),
        ):
            group.decode_dispatch(x, routing)
        check_works(group, step)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_first_call_in_a_capture(worlds):
    worlds(RANKS, "cuda").run(first_calls)


def too_many_tokens(rank, pg) -> None:
    step = Step(CASE, rank)
    with PAIR.open(pg, CASE.shape) as group:
        x, routing = brought(group, step)
        view = group.for_shape(replace(CASE.shape, max_tokens=65537))
        with pytest.raises(ConfigError, match="max_tokens=65537, and at most 65536 are possible in decode calls"):
            view.decode_dispatch(x, routing)
        check_works(group, step)


def test_more_tokens_than_decode_calls_take(worlds):
    worlds(RANKS, "cuda").run(too_many_tokens)


# ---------------------------------------------------------------------- hooks on other streams


SLEEP = 80_000_000
"""Clock cycles, some 40 ms: until then a side stream has not begun what is queued on it."""
POISON = 0x5A


def bytes_of(*tensors: Tensor) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def copied(sent: DecodeDispatched) -> DecodeDispatched:
    """The same results in memory of their own, in order of the current stream."""
    values = {field.name: getattr(sent.plan, field.name) for field in fields(sent.plan)}
    plan = replace(sent.plan, **{name: one.clone() for name, one in values.items() if isinstance(one, Tensor)})
    return DecodeDispatched(sent.x.clone(), sent.expert_counts.clone(), plan, sent.hook)


class Filled:
    """Memory that the allocator returns on the current stream at once, and that only its owner may write."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    def take(self, sizes: list[int]) -> None:
        """Take what has just become free, among others: several tensors of each of these numbers of bytes."""
        for size in sizes:
            self._tensors += [torch.full((size,), POISON, dtype=torch.uint8, device=self._device) for _ in range(8)]

    def check(self) -> None:
        for tensor in self._tensors:
            assert bool((tensor == POISON).all()), f"{tensor.numel()} bytes that were free were written to"


def hooks_on_a_side_stream(rank, pg) -> None:
    """Free the memory that the kernels of hooks read and write before they start."""
    stream, made = torch.cuda.Stream(), []
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        filled = Filled(group.device)
        for seed in range(4):
            step = Step(replace(CASE, seed=seed), rank)
            x, routing = brought(group, step)
            sent = group.decode_dispatch(x, routing, return_hook=True)
            sizes = bytes_of(sent.x, sent.expert_counts, sent.plan.src_token, sent.plan.src_range, sent.plan._table, x)
            del x, routing
            filled.take(sizes)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP)
                sent.hook()
                made.append((step, copied(sent)))
            del sent
            filled.take(sizes)
        torch.cuda.synchronize()
        for step, kept in made:
            check_received(step, kept, None)
        filled.check()


def test_a_dispatch_received_on_a_side_stream(worlds):
    worlds(RANKS, "cuda").run(hooks_on_a_side_stream)


def combines_on_a_side_stream(rank, pg) -> None:
    """As `hooks_on_a_side_stream`; here the plan dies, too, before its rows are home."""
    stream, made = torch.cuda.Stream(), []
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        filled = Filled(group.device)
        for seed in range(4):
            step = Step(replace(CASE, seed=seed), rank)
            oracle, local = step.oracle(), CASE.experts // RANKS
            ys = [answers(step.case, oracle, there, local * step.capacity, torch.bfloat16) for there in range(RANKS)]
            y = ys[rank].to(group.device).reshape(local, step.capacity, CASE.hidden)
            sent = group.decode_dispatch(*brought(group, step))
            home = group.decode_combine(y, sent.plan, numerics=("exact", "fast")[seed % 2], return_hook=True)
            sizes = bytes_of(y, home.x, sent.plan._table, sent.plan.topk_idx, sent.plan.topk_weights)
            del y, sent
            filled.take(sizes)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP)
                home.hook()
                made.append((step, home.x.clone(), oracle.decode_combine(rank, ys, fast=seed % 2 == 1)))
            del home
            filled.take(sizes)
        torch.cuda.synchronize()
        for step, x, want in made:
            same_bits(f"{step} decode_combine", x, want)
        filled.check()


def test_a_combine_received_on_a_side_stream(worlds):
    worlds(RANKS, "cuda").run(combines_on_a_side_stream)


# ---------------------------------------------------------------------- results beyond 2^31 and 2^32 bytes


TOKENS = 4096
LOCAL = 37
"""Experts of a rank. One has room for 8192 rows of 14336 bytes: all of them for 4.3e9 bytes, and 2.2e9 in FP8."""
FULL = {18: 2, 36: -1}
"""Local experts that get every token, and what they multiply by. The first lies on both sides of 2^31 bytes, the other
of 2^32 bytes, or in FP8 of 2^31."""


def check_places(sent: DecodeDispatched) -> None:
    """Every token went to the two experts; they lie by source rank, then token."""
    device = sent.expert_counts.device
    counts, tokens = torch.zeros(LOCAL, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int32, device=device)
    counts[list(FULL)] = RANKS * TOKENS
    same_bits("expert_counts", sent.expert_counts, counts)
    for expert in FULL:
        same_bits(f"src_token of expert {expert}", sent.plan.src_token[expert], tokens.repeat(RANKS))


def check_cast(sent: DecodeDispatched, everything: Tensor) -> None:
    """Each row's bytes and scales, a part of the rows at a time, compared on the GPU."""
    assert isinstance(sent.x, Quantized)
    for expert in FULL:
        for first in range(0, RANKS * TOKENS, TOKENS):
            part = slice(first, first + TOKENS)
            data, scale = fp8_cast(numbered(everything[part]), Scale.FLOAT32)
            wrong = (sent.x.data[expert, part].view(torch.uint8) != data.view(torch.uint8)).any(dim=1)
            wrong |= (sent.x.scale[expert, part] != scale).any(dim=1)
            assert not bool(wrong.any()), f"expert {expert}: row {first + int(wrong.nonzero()[0])} is wrong"


def large(rank, pg) -> None:
    """Every token goes to two experts of each rank; their answers add up to three times the row."""
    with heap_of(2048), PAIR.open(pg, MoeShape(RANKS * LOCAL, 4, HIDDEN, TOKENS)) as group:
        everything = torch.arange(RANKS * TOKENS, device=group.device)
        x = numbered(everything[rank * TOKENS :][:TOKENS])
        experts = torch.tensor([there * LOCAL + expert for there in range(RANKS) for expert in FULL])
        weights = torch.tensor([1.0, 1.0, 2.0, 2.0]).repeat(TOKENS, 1).to(group.device)
        routing = Routing(experts.repeat(TOKENS, 1).to(group.device), weights)
        group.warmup()
        sent = group.decode_dispatch(x, routing)
        assert sent.x.numel() * sent.x.element_size() > 1 << 32
        check_places(sent)
        y = torch.full_like(sent.x, torch.nan)
        for expert, factor in FULL.items():
            check_numbered(f"expert {expert}", sent.x[expert], everything)
            y[expert] = sent.x[expert] * factor
        want = (x.float() * 3).to(x.dtype)
        for numerics in ("exact", "fast"):
            wrong = (group.decode_combine(y, sent.plan, numerics=numerics).x != want).any(dim=1)
            assert not bool(wrong.any()), f"{numerics}: token {int(wrong.nonzero()[0])} is wrong"
        del sent, y
        sent = group.decode_dispatch(x, routing, quantize=Scale.FLOAT32)
        assert sent.x.data.numel() > 1 << 31
        check_places(sent)
        check_cast(sent, everything)


def test_results_beyond_32_bits(worlds):
    needed = 16 * GIB * (RANKS if NUM_GPUS < RANKS else 1)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed // GIB} GiB of GPU memory, {free // GIB} GiB are free")
    worlds(RANKS, "cuda").run(large)
