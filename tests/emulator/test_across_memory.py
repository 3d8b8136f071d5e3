"""No memory, across nodes: found before anything is sent, so that the group stays whole; on the emulator."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from support.emulated_group import HEAP_BYTES, EmulatedPair
from support.emulator import Emulator
from tokenferry import CapacityError, DispatchOptions, ExpertGroup, Layout, MoeShape, Routing
from tokenferry.memory.heap import Block, HeapFull

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


def fill_heap(group: ExpertGroup) -> list[Block]:
    """Take all that is left of the heap, and return what keeps it."""
    heap, kept = group._backend.context.heap, []
    num_bytes = heap.num_bytes
    while num_bytes >= 128:
        try:
            kept.append(heap.block(num_bytes, 0))
        except HeapFull:
            num_bytes //= 2
    return kept


def without_room(rank: int, threads: None, pair: EmulatedPair, name: str) -> None:
    """One rank finds no memory before it has sent anything, and makes the call again when it has."""
    shape = MoeShape(2 * threads.num_ranks, 2, 64, 8)
    with pair.open(None, shape) as group:
        x, routing = torch.ones(8, 64), Routing(torch.arange(16).view(8, 2) % shape.num_experts, torch.ones(8, 2))
        plan = group.dispatch(x, routing).plan
        y = torch.ones(plan.num_received, 64)  # not in the heap
        on_device = [DispatchOptions(layout, counts="device") for layout in (Layout.ROWS, Layout.EXPERTS)]
        call = {
            "redispatch": lambda: group.redispatch(x, plan).x.sum(),
            "combine": lambda: group.combine(y, plan).x.sum(),
            "dispatch, rows": lambda: group.dispatch(x, routing, options=on_device[0]).plan.src_counts.sum(),
            "dispatch, experts": lambda: group.dispatch(x, routing, options=on_device[1]).plan.src_counts.sum(),
        }[name]
        expected = call()
        if rank == 0:
            kept = fill_heap(group)
            for _ in range(2):
                with pytest.raises(CapacityError, match="the heap is full"):
                    call()
            del kept
        for _ in range(2):
            assert torch.equal(call(), expected)


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("name", ["redispatch", "combine", "dispatch, rows", "dispatch, experts"])
def test_a_full_heap_is_found_before_anything_is_sent(run, name, per_node):
    """So that the group stays whole, and the other ranks wait for the call that comes."""
    run(2 * per_node, without_room, name, ranks_per_node=per_node)


def larger_than_the_heap(rank: int, threads: None, pair: EmulatedPair) -> None:
    """One rank asks for it, then all: the rows of MASKED take as much memory whatever is received."""
    with pair.open(None, MoeShape(2 * threads.num_ranks, 2, 64, 8)) as group:
        x, routing = torch.ones(8, 64), Routing(torch.arange(16).view(8, 2) % group.shape.num_experts)
        for counts in ("host", "device"):
            options = DispatchOptions(Layout.MASKED, counts=counts)
            too_large = DispatchOptions(Layout.MASKED, counts=counts, capacity=HEAP_BYTES // (64 * 4))
            expected = group.dispatch(x, routing, options=options).expert_counts
            for ranks in ((1,), range(threads.num_ranks)):
                if rank in ranks:
                    with pytest.raises(CapacityError, match="the heap is full"):
                        group.dispatch(x, routing, options=too_large)
                assert group.dispatch(x, routing, options=options).expert_counts.equal(expected)


@pytest.mark.parametrize("per_node", [1, 2])
def test_a_capacity_larger_than_the_heap_across_nodes(run, per_node):
    run(2 * per_node, larger_than_the_heap, ranks_per_node=per_node)


def decode_without_room(rank: int, threads: None, pair: EmulatedPair) -> str:
    """The first decode call of a size; the calls before it go on."""
    R = threads.num_ranks
    small, shape = MoeShape(2 * R, 2, 64, 8), MoeShape(2 * R, 2, 512, 128)
    index = torch.arange(16).view(8, 2) % small.num_experts

    def round_trip(group: ExpertGroup) -> None:
        x, routing = torch.full((8, group.shape.hidden), 1.0 + rank), Routing(index, torch.ones(8, 2))
        sent = group.decode_dispatch(x, routing)
        assert torch.equal(group.decode_combine(sent.x, sent.plan).x, 2 * x)

    full = R - 1  # of the last node
    with pair.open(None, small) as group:
        round_trip(group)
        large, text = group.for_shape(shape), ""
        kept = fill_heap(group) if rank == full else None
        for _ in range(2):
            with pytest.raises(CapacityError) as caught:
                round_trip(large)
            text = str(caught.value)
            round_trip(group)
        del kept
        round_trip(large)
        round_trip(group)
        return text


@pytest.mark.parametrize("per_node", [1, 2])
def test_every_rank_raises_where_a_decode_call_finds_no_memory(run, per_node):
    """And goes on: the ranks of a node agree about the memory that they make together, and nodes do, too."""
    *texts, full = run(2 * per_node, decode_without_room, ranks_per_node=per_node)
    assert "the heap is full" in full
    assert all("heap of a rank on node(s) [1] has no room" in text for text in texts[:per_node])
    assert all("heap of rank(s) [3] has no room" in text for text in texts[per_node:])


class Allocator:
    """Makes tensors as `Context.empty`, and counts; one of them is refused."""

    def __init__(self, empty: Callable[..., torch.Tensor], refused: int | None) -> None:
        self.empty, self.refused, self.count = empty, refused, 0

    def __call__(self, *blank: object) -> torch.Tensor:
        self.count += 1
        if self.count - 1 == self.refused:
            raise torch.OutOfMemoryError("none is left")
        return self.empty(*blank)


def without_memory_of_torch(rank: int, threads: None, pair: EmulatedPair, name: str) -> int:
    """Each tensor of a call, one after the other, finds no memory on one rank, which makes the call again."""
    shape = MoeShape(2 * threads.num_ranks, 2, 64, 8)
    with pair.open(None, shape) as group:
        x, routing = torch.ones(8, 64), Routing(torch.arange(16).view(8, 2) % shape.num_experts, torch.ones(8, 2))
        plan = group.dispatch(x, routing).plan
        y, context = torch.ones(plan.num_received, 64), group._backend.context
        decoded, bounded = group.decode_dispatch(x, routing), DispatchOptions(counts="device", capacity=60)
        call = {
            "dispatch": lambda: group.dispatch(x, routing).x.sum(),
            "dispatch, device": lambda: (
                group.dispatch(x, routing, options=DispatchOptions(counts="device")).plan.src_counts
            ),
            "dispatch, capacity": lambda: group.dispatch(x, routing, options=bounded).plan.src_counts,
            "redispatch": lambda: group.redispatch(x, plan).x.sum(),
            "combine": lambda: group.combine(y, plan).x,
            "decode_dispatch": lambda: group.decode_dispatch(x, routing).expert_counts,
            "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan).x,
            "decode_combine, fast": lambda: group.decode_combine(decoded.x, decoded.plan, numerics="fast").x,
        }[name]

        def refusing(number: int | None) -> Allocator:
            return Allocator(context.empty, number)

        with mock.patch.object(context, "empty", refusing(None)) as counted:
            expected = call()
        # The last one of a dispatch is for the rows that the others send, who have said how many by then.
        num = counted.count - (name == "dispatch")
        for number in range(num):
            if rank == 0:
                with mock.patch.object(context, "empty", refusing(number)), pytest.raises(torch.OutOfMemoryError):
                    call()
            assert torch.equal(call(), expected)
        return num


@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("dispatch", 3), ("dispatch, device", 4), ("dispatch, capacity", 4), ("redispatch", 1), ("combine", 2),
        ("decode_dispatch", 3), ("decode_combine", 2), ("decode_combine, fast", 2),
    ],
)  # fmt: skip
def test_memory_of_torch_is_taken_before_anything_is_sent(run, name, num):
    assert run(4, without_memory_of_torch, name, ranks_per_node=2)[0] == num
