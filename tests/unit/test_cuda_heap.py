"""The heap of a window, over streams that only keep count: who may use memory again, and what is waited for first."""

import gc
import itertools
import threading
import unittest.mock
from collections import deque

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenferry.errors import ClosedError
from tokenferry.memory import heap as heap_module
from tokenferry.memory import tensor as tensor_module
from tokenferry.memory.heap import Heap, HeapFull
from tokenferry.memory.ranges import Ranges
from tokenferry.memory.tensor import tensor_at

KIB = 1024


class Streams:
    """Streams with vector clocks: ``clocks[s][t]`` is how far stream t had come in what stream s waited for."""

    def __init__(self):
        self.clocks = {}
        self.captures = {}
        self.done = {}
        """How far each stream has come by now, as the host can see."""
        self.now = 1
        self.log = []
        self.through_graph = {}
        """What each capture's graph waits for at its start: by events outside of it, and as all was synchronised."""

    def clock(self, stream):
        return self.clocks.setdefault(stream, {stream: 0})

    def work(self, stream):
        """Queue something; returns its time."""
        self.clock(stream)[stream] += 1
        return self.clock(stream)[stream]

    def begin_capture(self, stream, number):
        """As torch.cuda.graph does: synchronise, then capture."""
        done = {each: clock[each] for each, clock in self.clocks.items()}
        for each in self.clocks:
            self.clocks[each] = dict(done)
        self.through_graph[number] = dict(done)
        self.captures[stream] = number
        self.done = dict(done)

    def finish(self, stream):
        """Do everything that is queued on a stream, and what it waits for."""
        for each, time in self.clock(stream).items():
            self.done[each] = max(self.done.get(each, 0), time)

    def end_capture(self):
        self.captures.clear()

    def current(self):
        return self.now

    def capture(self, stream):
        return self.captures.get(stream, 0)

    def is_eager(self, stream):
        return self.now == stream and stream not in self.captures

    def eager(self):
        return None if self.now in self.captures else self.now

    def take_back(self, event):
        self.log.append(("ask", event[0]))
        return all(self.done.get(each, 0) >= time for each, time in event[2].items())

    def record(self, stream, *, eager=False):
        assert not eager or stream == self.eager()
        self.log.append(("record", stream))
        return (stream, self.capture(stream), dict(self.clock(stream)))

    def wait(self, stream, event, *, outside):
        of, capture, seen = event
        self.log.append(("wait", stream, of))
        assert outside == (self.capture(stream) != 0 and capture == 0), "the driver refuses this wait"
        assert capture == 0 or capture == self.capture(stream), "an event of a capture is unknown outside of it"
        clock = self.through_graph[self.capture(stream)] if outside else self.clock(stream)
        for other, time in seen.items():
            clock[other] = max(clock.get(other, 0), time)

    def passed(self, stream, other, time):
        """Whether work queued on ``stream`` now runs after what ``other`` had queued at ``time``."""
        clock = dict(self.clock(stream))
        for key, value in self.through_graph.get(self.capture(stream), {}).items():
            clock[key] = max(clock.get(key, 0), value)
        return stream == other or max(clock.get(other, 0), self.done.get(other, 0)) >= time


def make(kib=64, **options):
    streams = Streams()
    return Heap(0, kib * KIB, torch.device("cpu"), streams=streams, **options), streams


def test_blocks_are_aligned_and_lie_in_the_heaps_part_of_the_window():
    heap = Heap(1 << 20, 64 * KIB, torch.device("cpu"), first=1000)
    blocks = [heap.block(100, 0) for _ in range(3)]
    end = (1000 + 64 * KIB) // 512 * 512
    assert [block.offset for block in blocks] == [end - 512, end - 1024, end - 1536]
    assert [block.address - (1 << 20) for block in blocks] == [block.offset for block in blocks]
    largest = heap.block(heap.largest_free, 0)
    assert (largest.offset, largest.offset + largest.num_bytes) == (1024, end - 1536)


def test_one_stream_needs_no_event():
    heap, streams = make()
    for _ in range(3):
        blocks = [heap.block(20 * KIB, 1) for _ in range(3)]
        del blocks[1]
        blocks.append(heap.block(10 * KIB, 1))
        blocks.clear()
    assert streams.log == []
    assert (heap.num_live, heap.free_bytes, heap.largest_free) == (0, 64 * KIB, 64 * KIB)


def test_another_stream_waits_for_the_one_that_used_the_memory():
    heap, streams = make()
    del_here = heap.block(64 * KIB, 1)
    del del_here
    block = heap.block(64 * KIB, 2)
    assert streams.log == [("record", 1), ("wait", 2, 1)]
    del block


def test_memory_that_needs_no_wait_is_taken_first():
    heap, streams = make()
    blocks = [heap.block(8 * KIB, 1), heap.block(5 * KIB, 1)]
    offset = blocks[0].offset
    del blocks[0]
    other = heap.block(8 * KIB, 2)
    assert other.offset != offset
    assert heap.block(8 * KIB, 1).offset == offset
    assert streams.log == []


def test_the_smallest_range_that_fits_is_taken():
    heap, _ = make()
    blocks = [heap.block(size * KIB, 1) for size in (8, 1, 4, 1, 6, 1)]
    offsets = [block.offset for block in blocks]
    del blocks[::2]
    assert heap.block(4 * KIB, 1).offset == offsets[2]


def test_a_block_freed_on_another_stream_leaves_an_event():
    heap, streams = make()
    block = heap.block(64 * KIB, 1)
    streams.now = 2
    streams.work(2)
    del block
    assert streams.log == [("record", 2)]
    again = heap.block(64 * KIB, 1)
    assert (again.offset, streams.log) == (0, [("record", 2), ("ask", 2), ("wait", 1, 2)])


def test_a_block_freed_on_another_stream_is_taken_again_once_that_is_done(monkeypatch):
    """Without a search, and without a wait on the device: as results of calls on a stream of their own are."""
    heap, streams = make()
    places = []
    for round_ in range(4):
        block = heap.block(10 * KIB, 1, 0)
        places.append(block.offset)
        streams.now = 2
        used = streams.work(2)
        del block
        streams.finish(2)
        assert round_ == 0 or streams.passed(1, 2, used)
        monkeypatch.setattr(Ranges, "best", no_search)
    assert places == [0] * 4
    assert not [entry for entry in streams.log if entry[0] == "wait"]
    assert (heap.num_live, heap.largest_free) == (0, 64 * KIB)


def test_a_block_in_use_on_another_stream_is_not_waited_for_while_there_are_others():
    """The stream of the calls would wait for what the program does meanwhile."""
    heap, streams = make()
    block = heap.block(KIB, 1, 0)
    streams.now = 2
    streams.work(2)
    del block
    first = heap.block(KIB, 1, 0)
    assert first.offset == 62 * KIB
    streams.finish(2)
    again = heap.block(KIB, 1, 0)
    assert (again.offset, streams.log) == (63 * KIB, [("record", 2), ("ask", 2), ("ask", 2)])
    del first, again


def test_of_two_events_of_a_stream_the_later_is_kept():
    heap, streams = make()
    blocks = [heap.block(32 * KIB, 1), heap.block(32 * KIB, 1)]
    streams.now = 2
    del blocks[1]
    last = streams.work(2)
    del blocks[0]
    _ = heap.block(64 * KIB, 1)
    assert streams.log == [("record", 2), ("record", 2), ("wait", 1, 2)]
    assert streams.passed(1, 2, last)


def test_what_is_left_of_a_range_waits_for_the_same():
    heap, streams = make()
    block = heap.block(64 * KIB, 1)
    del block
    blocks = [heap.block(32 * KIB, 2), heap.block(32 * KIB, 3)]
    assert streams.log == [("record", 1), ("wait", 2, 1), ("record", 1), ("wait", 3, 1)]
    del blocks


def test_trim_gives_back_the_rest():
    heap, streams = make()
    block = heap.block(64 * KIB, 1)
    block.trim(1000)
    assert (block.num_bytes, heap.free_bytes, heap.num_live) == (1000, 63 * KIB, 1)
    assert heap.block(63 * KIB, 1).offset == 1024
    block.trim(1000)
    with pytest.raises(ValueError, match="at most num_bytes=1000, got 1001"):
        block.trim(1001)
    del block
    assert (heap.free_bytes, heap.num_live, streams.log) == (64 * KIB, 0, [])


def test_what_trimmed_blocks_have_left_over_is_freed_once():
    heap, _ = make()
    kept, gone, freed = (heap.block(4 * KIB, 1) for _ in range(3))
    for block in (kept, gone, freed):
        block.trim(100)
    del block, gone  # it takes its rest along
    assert heap.free_bytes == 64 * KIB - 2 * 512
    del freed  # what is left of it
    assert heap.free_bytes == 64 * KIB - 512
    kept.trim(50)
    assert heap.free_bytes == 64 * KIB - 512


def test_many_trimmed_blocks_are_looked_through_less_often():
    """A pipeline keeps hundreds of results alive: a look at all of them would take longer than the call."""
    heap, _ = make(4096)
    blocks = [heap.block(4 * KIB, 1) for _ in range(600)]
    for block in blocks:
        block.trim(100)
    assert len(heap._trimmed) == 600
    assert heap._most_trimmed >= 600
    del block, blocks
    for _ in range(700):
        heap.block(4 * KIB, 1).trim(100)
    assert len(heap._trimmed) < 600, "those that are gone are never forgotten"


def test_exhaustion_names_the_numbers():
    heap, _ = make(1024)
    blocks = [heap.block(256 * KIB, 1) for _ in range(4)]
    del blocks[::2]
    with pytest.raises(HeapFull) as caught:
        heap.block(300 * KIB, 1)
    error = caught.value
    assert (error.requested, error.free, error.largest, error.total, error.captured) == (
        300 * KIB,
        512 * KIB,
        256 * KIB,
        1024 * KIB,
        0,
    )
    assert str(error).startswith(
        "the heap is full: 0.3 MiB requested, 0.5 MiB of 1.0 MiB free, the largest free range has 0.2 MiB"
    )
    assert "TOKENFERRY_HEAP_MB" in str(error)
    del blocks
    assert heap.block(1024 * KIB, 1).offset == 0


def test_blocks_of_a_capture_stay_with_its_graph():
    heap, streams = make()
    streams.begin_capture(1, 7)
    first = heap.block(16 * KIB, 1)
    offset = first.offset
    del first
    again, other = heap.block(16 * KIB, 1), heap.block(8 * KIB, 1)
    assert again.offset == offset, "the capture itself takes it again"
    streams.end_capture()
    del again
    block = heap.block(40 * KIB, 1)
    del block, other
    assert (heap.num_live, heap.free_bytes) == (0, 40 * KIB)
    with pytest.raises(HeapFull, match=r"0\.0 MiB belong to CUDA graphs") as caught:
        heap.block(41 * KIB, 1)
    assert caught.value.captured == 24 * KIB
    streams.begin_capture(1, 8)
    with pytest.raises(HeapFull):
        heap.block(41 * KIB, 1)
    assert streams.log == []


def test_a_block_from_before_that_is_freed_during_a_capture_is_available_after_it():
    heap, streams = make()
    block = heap.block(64 * KIB, 1)
    streams.begin_capture(2, 7)
    streams.now = 2
    del block
    for stream in (3, 2):
        with pytest.raises(HeapFull):
            heap.block(KIB, stream)
    streams.end_capture()
    again = heap.block(64 * KIB, 3)
    assert again.offset == 0
    assert streams.log == [("record", 1), ("wait", 3, 1), ("record", 2), ("wait", 3, 2)]


def test_a_graph_waits_at_each_replay_for_the_eager_users_of_its_memory():
    heap, streams = make()
    streams.begin_capture(2, 7)
    block = heap.block(64 * KIB, 1)
    used = streams.work(1)
    del block
    streams.now = 2
    assert heap.block(64 * KIB, 2).offset == 0
    assert streams.passed(2, 1, used)
    assert streams.log == [("record", 1), ("wait", 2, 1)]


def test_a_range_last_used_on_a_stream_that_is_being_captured_is_left_alone():
    heap, streams = make()
    blocks = [heap.block(32 * KIB, 2), heap.block(32 * KIB, 1)]
    blocks.clear()
    streams.begin_capture(2, 7)
    own = heap.block(32 * KIB, 1)
    assert own.offset == 32 * KIB
    with pytest.raises(HeapFull):
        heap.block(32 * KIB, 1)
    streams.end_capture()
    assert heap.block(32 * KIB, 1).offset == 0


def no_search(*args):
    raise AssertionError("the ranges were searched")


def no_question(stream):
    raise AssertionError("the heap knows that already")


def test_calls_of_equal_size_take_their_places_again_without_a_search(monkeypatch):
    """Also where those of another size, not alive at the same time, come between them."""
    heap, streams = make(1024)
    sizes = (10 * KIB, 300, 10 * KIB, 0)
    places = []
    for round_ in range(3):
        for stream in (1, 2):
            streams.now = stream
            for size in sizes:
                block = heap.block(size, stream, 0)
                assert block.num_bytes == size
                places.append(block.offset)
                block = None
        if not round_:
            monkeypatch.setattr(Ranges, "best", no_search)
            monkeypatch.setattr(streams, "capture", no_question)
    assert places[:8] == places[8:16] == places[16:]
    assert not set(places[:4]) & set(places[4:8]), "streams are kept apart"
    assert heap.num_live == 0
    assert (heap.free_bytes, heap.largest_free, streams.log) == (1024 * KIB, 1024 * KIB, [])


def test_a_stream_waits_for_another_only_if_quick_lists_do_not_help():
    heap, streams = make(64)
    other, kept = heap.block(54 * KIB, 2), heap.block(5 * KIB, 1)
    streams.now = 2
    del other
    assert heap.largest_free == 54 * KIB
    streams.now = 1
    blocks = [heap.block(size, 1) for size in (KIB, 3 * KIB)]
    blocks.clear()
    assert heap.block(4 * KIB, 1).offset == 60 * KIB, "both merged with the last of the heap"
    assert streams.log == []
    del kept


def test_quick_lists_are_settled_before_the_heap_is_full():
    heap, _ = make(64)
    blocks = [heap.block(KIB, 1) for _ in range(64)]
    blocks.clear()
    assert heap.block(3 * KIB, 1).offset == 61 * KIB
    assert heap.block(64 * KIB, 1).offset == 0


def test_a_small_block_that_stays_does_not_part_the_heap():
    """As the plans that a training step keeps do: each is made before the rows of its dispatch, which go sooner."""
    heap, _ = make(64)
    kept = []
    for size in (20, 30, 12, 40):
        kept.append(heap.block(KIB, 1))
        rows = heap.block(size * KIB, 1)
        kept.append(heap.block(KIB, 1))
        del rows
    assert heap.largest_free == 56 * KIB


def test_a_small_block_is_not_put_between_large_ones():
    """Where it would fit best, as long as two large ones take turns."""
    heap, _ = make(64)
    first, second = (heap.block(20 * KIB, 1) for _ in range(2))
    del first
    small = heap.block(KIB, 1)
    del second
    assert (small.offset, heap.largest_free) == (63 * KIB, 63 * KIB)


def test_large_blocks_see_all_that_is_free():
    heap, _ = make(64)
    kept = heap.block(10 * KIB, 1)
    for size in (11 * KIB, 12 * KIB, 13 * KIB):
        assert heap.block(size, 1).offset == 10 * KIB, "the space behind it stays whole"
    del kept


def test_a_graph_takes_what_is_on_a_quick_list_for_good():
    heap, streams = make()
    block = heap.block(KIB, 1)
    used = streams.work(1)
    del block
    streams.begin_capture(1, 7)
    block = heap.block(KIB, 1)
    assert block.offset == 63 * KIB
    assert streams.passed(1, 1, used)
    del block
    streams.end_capture()
    assert heap.block(KIB, 1).offset == 62 * KIB
    assert heap.free_bytes == 63 * KIB


def test_the_oldest_of_many_quick_lists_makes_room():
    heap, _ = make(1024)
    late = heap.block(512, 1)
    kept = [heap.block(2 * 512, 1) for _ in range(2)]
    del kept[1]
    offsets = {heap.block(count * 512, 1).offset for count in range(3, 40)}
    assert len(heap._quicks) == 16
    assert len(offsets) > 1
    del late
    assert heap.num_live == 1
    assert heap.free_bytes == 1023 * KIB
    kept.clear()
    assert heap.largest_free == 1024 * KIB


def test_a_block_freed_while_its_quick_list_is_closed(monkeypatch):
    """By another thread, between the question whether it is open and the entry in it."""
    heap, streams = make()
    block = heap.block(KIB, 1)

    def closed_meanwhile(stream):
        quick = heap._quicks.pop((KIB, 1))
        quick.open = False
        return True

    monkeypatch.setattr(streams, "is_eager", closed_meanwhile)
    del block
    assert (heap.num_live, heap.largest_free) == (0, 64 * KIB)


def test_whether_there_is_room():
    """As `largest_free` says; but what lies ready for the next call stays there if the answer is clear without it."""
    heap, _ = make()
    assert heap.has_room(64 * KIB)
    assert not heap.has_room(64 * KIB + 1)
    first = heap.block(30 * KIB, 1)
    for _ in range(3):
        block = heap.block(20 * KIB, 1)
        assert heap.has_room(14 * KIB)
        assert not heap.has_room(15 * KIB), "each time: this block is all there is for calls of this size"
        del block
    quick = heap.block(KIB, 1).offset
    assert heap.has_room(13 * KIB)
    assert heap._quicks[KIB, 1].free == deque([quick])
    assert heap.has_room(34 * KIB)
    assert not heap._quicks[KIB, 1].free, "that takes all there is"
    del first
    assert heap.has_room(64 * KIB)


def test_streams_of_which_nothing_can_be_known_delay_the_return():
    heap, streams = make()

    def refuse(stream):
        raise RuntimeError("a capture forbids to ask")

    block = heap.block(64 * KIB, 1)
    streams.capture = streams.is_eager = refuse
    del block
    del streams.capture, streams.is_eager
    assert heap.free_bytes == 0
    assert heap.block(64 * KIB, 1).offset == 0


def test_the_stream_of_a_reader_counts_even_if_nothing_can_be_known_of_it():
    heap, streams = make()

    def refuse(stream):
        raise RuntimeError("a capture forbids to ask")

    block = heap.block(64 * KIB, 1)
    streams.now, streams.capture, streams.eager = 2, refuse, lambda: None
    del block
    del streams.capture, streams.eager
    assert heap.block(64 * KIB, 3).offset == 0
    assert [entry for entry in streams.log if entry[0] == "wait"] == [("wait", 3, 1), ("wait", 3, 2)]


class Trap:
    """An object in a cycle of garbage, together with a block."""

    def __init__(self, block):
        self.me = self
        self.block = block


def test_a_block_freed_inside_block():
    heap, streams = make()
    trap = Trap(heap.block(32 * KIB, 1))
    original = streams.capture

    def collect(stream):
        gc.collect()
        return original(stream)

    gc.disable()
    try:
        del trap
        streams.capture = collect
        block = heap.block(64 * KIB, 1)
    finally:
        gc.enable()
    assert block.offset == 0


def test_blocks_freed_in_other_threads():
    heap, _ = make(2048)
    sizes = itertools.count()

    def use():
        for _ in range(300):
            blocks = [heap.block(size * KIB, 1) for size in (3, 3, 3, next(sizes) % 24, 2)]
            assert len({block.offset for block in blocks}) == 5
            del blocks[1::2]

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (heap.num_live, heap.free_bytes, heap.largest_free) == (0, 2048 * KIB, 2048 * KIB)


def over_host_memory(num_bytes):
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    return Heap(memory.data_ptr(), num_bytes, torch.device("cpu"), memory=memory), memory


def test_a_tensor_is_the_block_and_keeps_it():
    heap, memory = over_host_memory(4096)
    block = heap.block(1000, 0)
    tensor = block.tensor()
    assert (tensor.dtype, tensor.shape, tensor.data_ptr()) == (torch.uint8, (1000,), block.address)
    tensor.fill_(7)
    assert memory[block.offset : block.offset + 1000].tolist() == [7] * 1000
    assert memory.sum() == 7000
    del block
    view = tensor[512:].view(torch.float32)
    del tensor
    gc.collect()
    assert heap.num_live == 1
    del view
    assert (heap.num_live, heap.free_bytes) == (0, 4096)


def test_tensors_made_at_once_have_their_own_shapes_and_owners(monkeypatch):
    """Each of four begins while the one before is being made, as threads would, and some die on the way."""
    memory = torch.arange(1024, dtype=torch.int32)
    shapes = [(5,), (2, 3), (2, 3, 4), (7,)]
    made = []

    def make():
        start = len(made)
        owner = object()
        made.append(None)
        tensor = tensor_at(memory.data_ptr() + 4 * start, shapes[start % 4], torch.int32, memory.device, owner)
        assert tensor.untyped_storage().tokenferry_owner is owner
        made[start] = tensor

    def interrupted(*args, original=tensor_module._capsule):
        if len(made) % 4:
            make()
        return original(*args)

    monkeypatch.setattr(tensor_module, "_capsule", interrupted)
    for _ in range(3):
        make()
        made[-3] = None
    for start, tensor in enumerate(made):
        if tensor is not None:
            assert tensor.shape == shapes[start % 4]
            assert tensor.is_contiguous()
            assert tensor.flatten().tolist() == list(range(start, start + tensor.numel()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_of_each_kind_of_dtype(dtype):
    memory = torch.zeros(1024, dtype=torch.uint8)
    tensor = tensor_at(memory.data_ptr() + 128, (3, 4), dtype, memory.device, None)
    assert (tensor.dtype, tensor.shape, tensor.data_ptr()) == (dtype, (3, 4), memory.data_ptr() + 128)


@pytest.mark.parametrize("code", [(99, 8), (1, 8), None], ids=["unknown", "another dtype", "not asked for"])
def test_a_dtype_that_torch_does_not_take(monkeypatch, code):
    """It travels as bytes; so does one whose code stands for something else."""
    dtype = torch.float8_e4m3fn
    monkeypatch.setattr(tensor_module, "_NEWER_TYPES", {} if code is None else {dtype: code})
    monkeypatch.setattr(tensor_module, "_TYPES", dict.fromkeys([torch.uint8], (1, 8)))
    monkeypatch.setattr(tensor_module, "_idle", {})
    memory = torch.arange(24, dtype=torch.uint8)
    for _ in range(2):
        tensor = tensor_at(memory.data_ptr(), (3, 4, 2), dtype, memory.device, None)
        assert (tensor.dtype, tensor.shape, tensor.data_ptr()) == (dtype, (3, 4, 2), memory.data_ptr())
    assert tensor_module._TYPES[dtype] is None


def test_autograd_alone_keeps_a_block():
    heap, _ = over_host_memory(4096)
    x = heap.block(1024, 0).tensor().view(torch.float32)
    x.fill_(3.0)
    weight = torch.ones(256, requires_grad=True)
    loss = (weight * x).sum()
    del x
    gc.collect()
    assert heap.num_live == 1
    loss.backward()
    assert weight.grad.unique().tolist() == [3.0]
    del loss
    assert heap.num_live == 0


def test_tensors_outlive_the_heap_and_keep_its_memory():
    class Memory:
        alive = 0

        def __init__(self, num_bytes):
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8)
            Memory.alive += 1

        def __del__(self):
            Memory.alive -= 1

    memory = Memory(4096)
    heap = Heap(memory.bytes.data_ptr(), 4096, torch.device("cpu"), memory=memory)
    tensor = heap.block(1000, 0).tensor()
    other = heap.block(1000, 0).tensor()
    ready = heap.block(500, 0)
    del ready
    heap.close()
    heap.close()
    with pytest.raises(ClosedError, match="make a new group"):
        heap.block(500, 0)
    del memory, other
    assert Memory.alive == 1
    tensor.fill_(1)
    del tensor
    assert Memory.alive == 0


def test_an_empty_block_has_a_place_and_a_tensor():
    heap, _ = over_host_memory(4096)
    blocks = [heap.block(0, 0), heap.block(0, 0)]
    assert blocks[0].offset != blocks[1].offset
    assert blocks[0].tensor().shape == (0,)


class HeapMachine(RuleBasedStateMachine):
    """Takes, uses and drops blocks on some streams, in and out of captures.

    Whoever gets memory must run after everything that used it, by the streams' clocks; what a graph writes at its
    replays, no other call ever gets.
    """

    streams_of = st.integers(1, 3)

    @initialize()
    def start(self):
        self.streams = Streams()
        for stream in (1, 2, 3):
            self.streams.work(stream)
        self.few = unittest.mock.patch.object(heap_module, "_QUICK_LISTS", 3)
        self.few.start()
        self.heap = Heap(0, 32 * KIB, torch.device("cpu"), streams=self.streams)
        self.blocks = []
        self.uses = {}
        self.owners = {}
        self.numbers = itertools.count(1)

    def cells(self, block):
        return range(block.offset // 512, -(-(block.offset + max(1, block.num_bytes)) // 512))

    def use(self, block, stream):
        time = self.streams.work(stream)
        for cell in self.cells(block):
            self.uses.setdefault(cell, []).append((stream, time, self.streams.capture(stream)))

    @rule(
        stream=streams_of,
        kib=st.sampled_from((0, 1, 1, 2, 2, 3, 5, 9, 16)),
        times=st.integers(1, 3),
        given=st.booleans(),
    )
    def take(self, stream, kib, times, given):
        for _ in range(times):
            try:
                block = self.heap.block(kib * KIB, stream, self.streams.capture(stream) if given else None)
            except HeapFull:
                return
            capture = self.streams.capture(stream)
            for cell in self.cells(block):
                assert self.owners.setdefault(cell, capture) in (0, capture), "a graph writes here at its replays"
                self.owners[cell] = capture
                for other, time, inside in self.uses.pop(cell, ()):
                    if inside == capture or not inside:
                        assert self.streams.passed(stream, other, time), f"stream {other} may still use this"
            for other in self.blocks:
                assert not set(self.cells(other)) & set(self.cells(block)), "two live blocks overlap"
            self.blocks.append(block)
            self.use(block, stream)

    @precondition(lambda self: not self.streams.captures)
    @rule(stream=streams_of, where=streams_of, kib=st.sampled_from((1, 2)), finished=st.booleans())
    def hand_over(self, stream, where, kib, finished):
        """As calls on a stream of their own do it, whose results are used and freed on another one."""
        before = len(self.blocks)
        self.take(stream, kib, 1, given=True)
        if len(self.blocks) > before:
            self.streams.now = where
            self.use(self.blocks[-1], where)
            del self.blocks[-1]
            if finished:
                self.streams.finish(where)
            self.take(stream, kib, 1, given=True)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), where=streams_of, only=st.booleans())
    def drop(self, data, where, only):
        """The last use is on the block's own stream, or on the current one after joining the own."""
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.streams.now = block._quick.stream if only else where
        if self.streams.capture(self.streams.now) == block._quick.capture == self.streams.capture(block._quick.stream):
            self.use(block, block._quick.stream)
            self.use(block, self.streams.now)
        elif not block._quick.capture and not self.streams.captures:
            self.use(block, self.streams.now)

    @precondition(lambda self: not self.streams.captures)
    @rule(stream=streams_of)
    def finish(self, stream):
        self.streams.finish(stream)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), kib=st.integers(0, 4))
    def trim(self, data, kib):
        block = self.blocks[data.draw(st.integers(0, len(self.blocks) - 1))]
        block.trim(min(block.num_bytes, kib * KIB))

    @precondition(lambda self: not self.streams.captures)
    @rule(stream=streams_of, fork=st.booleans())
    def begin(self, stream, fork):
        number = next(self.numbers)
        self.streams.begin_capture(stream, number)
        if fork:
            self.streams.captures[stream % 3 + 1] = number

    @precondition(lambda self: self.streams.captures)
    @rule()
    def end(self):
        self.streams.end_capture()

    @rule(kib=st.integers(0, 33))
    def ask(self, kib):
        """The free bytes are known whatever was taken, at little cost or in full."""
        free = sum(quick.size * (len(quick.free) + len(quick.elsewhere)) for quick in self.heap._quicks.values())
        room = self.heap.has_room(kib * KIB)
        assert self.heap.free_bytes >= free
        assert room == (kib * KIB <= self.heap.largest_free <= self.heap.free_bytes)

    @invariant()
    def books_balance(self):
        """Without settling: what lies on quick lists meets all that follows."""
        assert self.heap.num_live == len(self.blocks)
        for ranges in self.heap._pools.values():
            assert ranges.largest_known <= max(ranges._sizes, default=0), "a range is believed in that is not there"

    def teardown(self):
        if not hasattr(self, "heap"):
            return
        self.few.stop()
        self.streams.end_capture()
        self.streams.now = 1
        self.blocks.clear()
        graphs = sum(512 for owner in self.owners.values() if owner)
        with pytest.raises(HeapFull):
            self.heap.block(1 << 30, 1)
        assert self.heap.free_bytes + graphs == 32 * KIB, "memory was lost"
        if not graphs:
            assert self.heap.largest_free == 32 * KIB, "neighbours did not merge"


TestHeapMachine = HeapMachine.TestCase
TestHeapMachine.settings = settings(max_examples=150, stateful_step_count=40)
