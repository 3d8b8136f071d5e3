"""Decode calls of the CUDA backend on the host: which hooks, workspaces and sizes they accept or refuse."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda import workspace
from tokenferry.backends.cuda.across.decode_forms import rail_sizes, sizes_of
from tokenferry.backends.cuda.channel import Channel, PendingRecv
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.decode import check_limits
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspaces, sizes_for
from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.topology import Topology, consecutive
from tokenferry.types import MoeShape

CALL = Signature("decode_dispatch", hidden=1)


def new_call(number=1, *, stream=1, capturing=False):
    return Call(number, stream, capturing, 3, CALL, 0)


class Tensor:
    """A tensor that a receive writes; records the streams that use it."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


class Calls:
    """A channel, and a context whose current stream, number 1, a test may change.

    Attributes:
        launched: Number and stream of each receive.
        ordered: Streams that were ordered after all calls without a call of their own.
    """

    def __init__(self):
        self.stream, self.capturing = 1, False
        self.launched, self.ordered = [], []
        self.device = torch.device("cuda")
        self.channel = Channel(self)

    def resume(self, call):
        return new_call(call.number, stream=self.stream, capturing=self.capturing)

    def order_after_calls(self):
        self.ordered.append(self.stream)

    def send(self, number, *, tensors=()):
        """Send with a hook, on the current stream."""
        call = new_call(number, stream=self.stream, capturing=self.capturing)
        self.channel.receive_overwritten(call)
        pending = PendingRecv(call, lambda at: self.launched.append((number, at.stream)), tensors)
        self.channel.sent(pending)
        return pending


@pytest.fixture
def calls(monkeypatch):
    found = Calls()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.stream)
    return found


# ---------------------------------------------------------------------- hooks


@pytest.mark.parametrize("inside", [True, False])
def test_a_hook_belongs_to_the_capture_of_its_call(calls, inside):
    calls.capturing = inside
    tensor = Tensor()
    pending = calls.send(1, tensors=(tensor,))
    calls.capturing = not inside
    with pytest.raises(ArgumentError, match="decode_dispatch: hook: a CUDA graph has to capture both"):
        calls.channel.receive(pending)
    assert calls.launched == []
    assert pending.tensors == (tensor,), "it may still be called where it belongs"
    calls.capturing = inside
    calls.channel.receive(pending)
    assert calls.launched == [(1, 1)]


@pytest.mark.parametrize("capturing", [True, False])
def test_a_send_receives_the_call_that_it_overwrites(calls, capturing):
    calls.capturing = capturing
    for number in (1, 2):
        calls.send(number)
    assert calls.launched == []
    third = calls.send(3)
    assert calls.launched == [(1, 1)]
    calls.channel.receive(third)
    calls.send(4)
    assert calls.launched == [(1, 1), (3, 1), (2, 1)]
    calls.send(5)
    assert calls.launched == [(1, 1), (3, 1), (2, 1)], "the third was received by its own hook"


def test_a_capture_overwrites_a_call_outside(calls):
    first = calls.send(1)
    calls.send(2)
    calls.capturing = True
    with pytest.raises(
        ArgumentError, match="hook of an earlier decode_dispatch has to be called before a CUDA graph is captured"
    ):
        calls.send(3)
    assert calls.launched == []
    calls.capturing = False
    calls.channel.receive(first)
    calls.capturing = True
    calls.send(3)  # it overwrites the first
    with pytest.raises(ArgumentError, match="has to be called before"):
        calls.send(4)
    assert calls.launched == [(1, 1)]


def test_a_hook_not_called_in_its_capture_is_dropped(calls):
    calls.capturing = True
    for number in (1, 2):
        calls.send(number)
    calls.capturing = False
    for number in (3, 4):
        calls.send(number)
    assert calls.launched == []


def test_a_hook_on_another_stream_is_known_to_the_allocator(calls):
    """The memory of tensors may not be reused before that stream is done."""
    one, other = Tensor(), Tensor()
    pending = calls.send(1, tensors=(one, None, other))
    calls.stream = 2
    calls.channel.receive(pending)
    assert calls.launched == [(1, 2)]
    assert one.streams == other.streams == [2]
    assert pending.tensors == ()


@pytest.mark.parametrize(("stream", "capturing"), [(1, False), (2, True)])
def test_the_allocator_need_not_know_of_its_own_stream_or_of_captures(calls, stream, capturing):
    tensor = Tensor()
    calls.capturing = capturing
    pending = calls.send(1, tensors=(tensor,))
    calls.stream = stream
    calls.channel.receive(pending)
    calls.channel.receive(pending)
    assert calls.launched == [(1, stream)]
    assert tensor.streams == []


def test_the_hook_of_a_call_that_was_received_orders_its_stream(calls):
    """Its caller reads results on that stream, whichever stream received them."""
    first = calls.send(1)
    calls.send(2)
    calls.stream = 2
    calls.send(3)
    assert calls.launched == [(1, 2)]
    calls.stream = 4
    calls.channel.receive(first)
    assert calls.launched == [(1, 2)]
    assert calls.ordered == [4]


def test_pending_receives_are_enqueued_except_those_of_captures(calls):
    calls.capturing = True
    calls.send(1)
    calls.capturing = False
    second = calls.send(2)
    calls.channel.receive_open()
    calls.channel.receive_open()
    assert calls.launched == [(2, 1)]
    assert second.done


def test_a_receive_that_fails_is_still_pending(calls, monkeypatch):
    def refuse(at):
        raise OSError("no launch")

    pending = calls.send(1, tensors=(Tensor(),))
    monkeypatch.setattr(pending, "launch", refuse)
    with pytest.raises(OSError, match="no launch"):
        calls.channel.receive(pending)
    assert not pending.done
    assert len(pending.tensors) == 1


def test_dropped_hooks_do_nothing(calls):
    pendings = [calls.send(number, tensors=(Tensor(),)) for number in (1, 2)]
    calls.channel.forget()
    for pending in pendings:
        assert pending.tensors == ()
        calls.channel.receive(pending)
    calls.capturing = True
    for number in (3, 4):
        calls.send(number)
    assert calls.launched == []


# ---------------------------------------------------------------------- workspaces


SMALL, LARGE = MoeShape(4, 2, 128, 8), MoeShape(4, 2, 128, 16)


class OneRank:
    """Context and allocator of rank 4, on host memory; rank 5 offers what it offers; ``exchanges`` counts."""

    def __init__(self, monkeypatch):
        self.rank, self.num_ranks, self.device = 0, 2, torch.device("cpu")
        self.window, self.flight_recorder = SimpleNamespace(bases=(0, 1 << 40)), SimpleNamespace(first_rank=4)
        self.masked, self.exchanges = set(), 0
        self.workspaces = Workspaces(self, self)
        monkeypatch.setattr(self.workspaces, "_share", self.share)
        monkeypatch.setattr(workspace, "write_field", lambda window, field, value: None)

    def masked_ranks(self):
        return frozenset(self.masked)

    def block(self, phase, num_bytes, stream):
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(address=memory.data_ptr(), offset=512, memory=memory)

    def share(self, call, sizes, offset):
        self.exchanges += 1
        return workspace._Shared(self.exchanges, {rank: offset for rank in range(2) if call.alive >> rank & 1})

    def fitting(self, shape, *, capturing=False):
        call = new_call(capturing=capturing)
        call.alive &= ~sum(1 << rank for rank in self.masked)
        return self.workspaces.fitting(call, shape, 2)


def test_a_workspace_is_made_outside_of_captures(monkeypatch):
    one_rank = OneRank(monkeypatch)
    for number in range(2):
        with pytest.raises(
            ArgumentError, match=r"decode_dispatch: the first decode call .* call it once before the capture"
        ):
            one_rank.fitting(LARGE, capturing=True)
        assert one_rank.exchanges == number, "peers took part in a call that is refused here"
        small = one_rank.fitting(SMALL)
        assert one_rank.workspaces.now is small
    large = one_rank.fitting(LARGE)
    assert large is not small
    assert large.addresses == (512, (1 << 40) + 512)
    for shape in (LARGE, SMALL):
        assert sizes_for(shape, 2, 2).within(large.sizes)
        assert one_rank.fitting(shape, capturing=True) is large
    assert one_rank.exchanges == 2


def test_a_workspace_made_without_a_rank(monkeypatch):
    """It has no address of that rank; and the one before is kept, since that rank may still be writing there."""
    one_rank = OneRank(monkeypatch)
    small = weakref.ref(one_rank.fitting(SMALL))
    one_rank.masked = {1}
    assert one_rank.fitting(SMALL) is small(), "it has room for these sizes"
    large = one_rank.fitting(LARGE)
    assert large.addresses == (512, 0)
    assert small() is not None
    one_rank.masked = set()
    with pytest.raises(ArgumentError, match=r"rank\(s\) \[5\] were masked when the memory for rows under way was made"):
        one_rank.fitting(SMALL)
    monkeypatch.setattr(workspace, "read_field", lambda window, rank, field, num_bytes: bytes(num_bytes))
    one_rank.workspaces.resynchronise([0, 1])
    assert small() is None
    assert one_rank.fitting(SMALL).addresses == (512, (1 << 40) + 512)


# ---------------------------------------------------------------------- sizes


def test_limit_of_tokens():
    check_limits(MoeShape(4096, 64, 128, 1 << 16))
    with pytest.raises(ConfigError, match="max_tokens=65537, and at most 65536 are possible in decode calls"):
        check_limits(MoeShape(4, 2, 128, (1 << 16) + 1))


def test_limit_of_tokens_across_nodes():
    shape, topology = MoeShape(64, 8, 128, 1 << 13), Topology(9, consecutive(64, 8))
    sizes = rail_sizes(shape, topology)
    assert (sizes.segment, sizes.num_relayed, sizes.most) == (8192, 7 * 8192, 1 << 16)
    few = rail_sizes(replace(shape, node_slots=3), topology)
    assert (few.segment, few.most) == (8, 7 * 8 + 8192), "a multiple of eight"
    with pytest.raises(ConfigError, match=r"R \* max_tokens is 524352, and at most 524288 are possible"):
        rail_sizes(replace(shape, max_tokens=(1 << 13) + 1), topology)


@pytest.mark.parametrize("slots", [None, 1, 9])
def test_sizes_follow_from_a_plan(slots):
    """As they do in another view of the group."""
    topology = Topology(5, consecutive(12, 4))
    sizes = rail_sizes(MoeShape(24, 3, 128, 10, node_slots=slots), topology)
    plan = SimpleNamespace(_table=torch.empty(sizes.table_words, dtype=torch.int32), topk_idx=torch.empty(7, 3))
    assert sizes_of(plan, topology, 10) == sizes
