"""Decode calls of the CUDA backend on the host: which hooks, regions and sizes they take, and which they refuse."""

from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda.channel import Channel, PendingRecv
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.decode import check_limits
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspaces, sizes_for
from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.types import MoeShape

CALL = Signature("decode_dispatch", hidden=1)


def new_call(number=1, *, stream=1, capturing=False):
    return Call(number, stream, capturing, 3, CALL, 0)


class Tensor:
    """What a receipt writes; remembers the streams that use it."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


class Calls:
    """A channel on a station whose current stream, number 1, a test may change.

    Attributes:
        launched: Number and stream of what was received.
        behind: Streams that came behind all calls without one of their own.
    """

    def __init__(self):
        self.stream, self.capturing = 1, False
        self.launched, self.behind = [], []
        self.device = torch.device("cuda")
        self.channel = Channel(self)

    def resume(self, call):
        return new_call(call.number, stream=self.stream, capturing=self.capturing)

    def order_after_calls(self):
        self.behind.append(self.stream)

    def send(self, number, *, tensors=()):
        """One with a hook, on the current stream."""
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
def test_a_hook_does_not_cross_the_border_of_a_capture(calls, inside):
    calls.capturing = inside
    tensor = Tensor()
    pending = calls.send(1, tensors=(tensor,))
    calls.capturing = not inside
    with pytest.raises(ArgumentError, match="decode_dispatch: hook: a CUDA graph has to capture both"):
        calls.channel.receive(pending)
    assert calls.launched == []
    assert pending.tensors == (tensor,), "it may still be called on its side of the border"
    calls.capturing = inside
    calls.channel.receive(pending)
    assert calls.launched == [(1, 1)]


@pytest.mark.parametrize("capturing", [True, False])
def test_a_send_receives_the_one_that_it_overwrites(calls, capturing):
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


def test_a_capture_needs_the_room_of_a_call_outside(calls):
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
    calls.send(3)  # it takes the room of the first
    with pytest.raises(ArgumentError, match="has to be called before"):
        calls.send(4)
    assert calls.launched == [(1, 1)]


def test_what_a_capture_forgot_stays_forgotten(calls):
    calls.capturing = True
    for number in (1, 2):
        calls.send(number)
    calls.capturing = False
    for number in (3, 4):
        calls.send(number)
    assert calls.launched == []


def test_a_hook_on_another_stream_tells_the_allocator(calls):
    """Their memory may not be used again before that stream is done."""
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


def test_a_hook_that_a_later_call_has_called_orders_its_stream(calls):
    """Its caller goes on to read results there, wherever they were received."""
    first = calls.send(1)
    calls.send(2)
    calls.stream = 2
    calls.send(3)
    assert calls.launched == [(1, 2)]
    calls.stream = 4
    calls.channel.receive(first)
    assert calls.launched == [(1, 2)]
    assert calls.behind == [4]


def test_open_hooks_are_called_at_once_but_those_of_captures(calls):
    calls.capturing = True
    calls.send(1)
    calls.capturing = False
    second = calls.send(2)
    calls.channel.receive_open()
    calls.channel.receive_open()
    assert calls.launched == [(2, 1)]
    assert second.done


def test_a_receipt_that_fails_is_still_owed(calls, monkeypatch):
    def refuse(at):
        raise OSError("no launch")

    pending = calls.send(1, tensors=(Tensor(),))
    monkeypatch.setattr(pending, "launch", refuse)
    with pytest.raises(OSError, match="no launch"):
        calls.channel.receive(pending)
    assert not pending.done
    assert len(pending.tensors) == 1


def test_forgotten_hooks_do_nothing(calls):
    receipts = [calls.send(number, tensors=(Tensor(),)) for number in (1, 2)]
    calls.channel.forget()
    for pending in receipts:
        assert pending.tensors == ()
        calls.channel.receive(pending)
    calls.capturing = True
    for number in (3, 4):
        calls.send(number)
    assert calls.launched == []


# ---------------------------------------------------------------------- regions


SMALL, LARGE = MoeShape(4, 2, 128, 8), MoeShape(4, 2, 128, 16)


class Ground:
    """Where the regions of one rank lie: memory of the host; peers say what it says. It counts what they are asked."""

    def __init__(self):
        self.rank, self.num_ranks, self.device = 0, 2, torch.device("cpu")
        self.window = SimpleNamespace(bases=(0, 1 << 40))
        self.lost, self.asked = set(), 0
        self.workspaces = Workspaces(self, self, self.exchange)

    def masked_ranks(self):
        return frozenset(self.lost)

    def synchronize(self):
        pass

    def block(self, phase, num_bytes, stream):
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(address=memory.data_ptr(), offset=512, memory=memory)

    def exchange(self, handshake):
        self.asked += 1
        return [handshake, handshake]

    def fitting(self, shape, *, capturing=False):
        return self.workspaces.fitting(new_call(capturing=capturing), shape, 2)


def capture_one(ground):
    ground.fitting(LARGE, capturing=True)


def make_one_without_a_rank(ground):
    ground.lost = {1}
    ground.fitting(LARGE)


@pytest.mark.parametrize(
    ("do", "told"),
    [
        (capture_one, "decode_dispatch: the first decode call .* call it once before the capture"),
        (make_one_without_a_rank, r"decode_dispatch: the first decode call .* rank\(s\) \[1\] are masked"),
    ],
)
def test_a_region_takes_all_ranks_and_no_capture(do, told):
    ground = Ground()
    with pytest.raises(ArgumentError, match=told):
        do(ground)
    assert ground.workspaces.now is None
    ground.lost = set()
    small = ground.fitting(SMALL)
    with pytest.raises(ArgumentError, match=told):
        do(ground)
    assert ground.workspaces.now is small, "there is one, and it has no room for these"
    assert ground.asked == 1, "peers were asked for what is refused here"
    ground.lost = set()
    large = ground.fitting(LARGE)
    assert large is not small
    assert large.addresses == (512, (1 << 40) + 512)
    for shape in (LARGE, SMALL):
        assert sizes_for(shape, 2, 2).within(large.sizes)
        assert ground.fitting(shape, capturing=True) is large
    ground.lost = {1}
    assert ground.fitting(LARGE) is large
    assert ground.asked == 2


# ---------------------------------------------------------------------- sizes


def test_the_most_tokens():
    check_limits(MoeShape(4096, 64, 128, 1 << 16), 8)
    with pytest.raises(ConfigError, match="max_tokens=65537, and at most 65536 are possible in decode calls"):
        check_limits(MoeShape(4, 2, 128, (1 << 16) + 1), 2)
