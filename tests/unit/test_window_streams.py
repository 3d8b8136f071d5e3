"""The heap's questions to the CUDA driver about streams, with a driver that records them."""

import contextlib
import enum
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda.across.nccl_channel import NcclChannel
from tokenferry.errors import BackendUnavailable
from tokenferry.memory.streams import CudaStreams, HostStreams

CAPTURED = 70
REFUSED = 80
NOT_READY = 600


class Cuda:
    CUstream_flags = enum.IntEnum("StreamFlags", {"CU_STREAM_NON_BLOCKING": 1})
    CUevent_flags = enum.IntEnum("Flags", {"CU_EVENT_DISABLE_TIMING": 2})

    def __init__(self):
        self.log = []
        self.status = 0

    def cuStreamGetCaptureInfo(self, stream):  # noqa: N802 - the driver's name
        self.log.append(("info", stream))
        return (906, None, None) if stream == REFUSED else (0, int(stream == CAPTURED), 55, "graph", [], [], 0)

    def cuEventCreate(self, flags):  # noqa: N802
        return 0, f"event without timing {flags == 2}"

    def cuEventRecord(self, event, stream):  # noqa: N802
        self.log.append(("record", event, stream))
        return (0,)

    def cuStreamWaitEvent(self, stream, event, flags):  # noqa: N802
        self.log.append(("wait", stream, event, flags))
        return (0,)

    def cuEventQuery(self, event):  # noqa: N802
        self.log.append(("ask", event))
        return (self.status,)

    def cuStreamCreateWithPriority(self, flags, priority):  # noqa: N802
        self.log.append(("make", flags, priority))
        return 0, 90 + sum(entry[0] == "make" for entry in self.log)

    def cuStreamDestroy(self, stream):  # noqa: N802
        self.log.append(("destroy", stream))
        return (0,)

    def cuEventDestroy(self, event):  # noqa: N802
        self.log.append(("destroy", event))
        return (0,)


class Device:
    inherited = False

    def __init__(self):
        self.cuda = Cuda()
        self.index = 1

    @contextlib.contextmanager
    def current(self):
        self.cuda.log.append("enter")
        yield


@pytest.fixture
def streams(monkeypatch):
    """Torch's current stream is 60 on device 1, which is the current device."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 60 * index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    return CudaStreams(Device())


def test_the_current_stream_needs_no_driver(streams):
    assert (streams.current(), streams.capture(60)) == (60, 0)
    assert streams._cuda.log == []


def test_other_streams_are_asked_about(streams):
    assert (streams.capture(61), streams.capture(CAPTURED)) == (0, 55)
    with pytest.raises(BackendUnavailable, match="asking whether a stream is captured failed"):
        streams.capture(REFUSED)
    streams._current_device = lambda: 0  # torch would answer for another device
    streams.capture(60)
    streams._current_device = lambda: 1
    streams._capturing = lambda: True  # the number is wanted
    streams.capture(60)
    assert [entry for entry in streams._cuda.log if entry != "enter"] == [
        ("info", stream) for stream in (61, CAPTURED, REFUSED, 60, 60)
    ]


def test_events(streams):
    event = streams.record(61)
    name = "event without timing True"
    streams.wait(60, event, outside=False)
    streams.wait(60, event, outside=True)
    del event
    log = [entry for entry in streams._cuda.log if entry != "enter"]
    assert log == [("record", name, 61), ("wait", 60, name, 0), ("wait", 60, name, 1), ("destroy", name)]


def test_an_event_is_recorded_again_once_it_has_passed(streams):
    """On the current stream, without a look at contexts: a call takes as long to enter one as to do the rest."""
    event = streams.record(streams.eager(), eager=True)
    streams._cuda.status = NOT_READY
    assert not streams.take_back(event)
    assert streams.record(60, eager=True) is not event
    streams._cuda.status = 0
    assert streams.take_back(event)
    streams._cuda.log.clear()
    again = streams.record(60, eager=True)
    assert streams._cuda.log == [("record", "event without timing True", 60)]
    assert event.handle is None, "two would destroy it"
    assert again.handle
    assert not streams._idle


@pytest.mark.parametrize("finalized_first", [True, False])
@pytest.mark.parametrize("give_back", ["take_back", "reuse"])
def test_an_event_that_is_collected_is_destroyed_or_recorded_again(streams, finalized_first, give_back):
    """In a cycle of objects, its finalizer runs before or after that of what gives it back."""
    event = streams.record(streams.eager(), eager=True)
    if finalized_first:
        event.__del__()
        getattr(streams, give_back)(event)
    else:
        getattr(streams, give_back)(event)
        event.__del__()
    destroyed = [entry for entry in streams._cuda.log if entry[0] == "destroy"]
    assert len(destroyed) + len(streams._idle) == 1
    assert len(destroyed) == finalized_first
    del event
    log = streams._cuda.log
    assert [entry for entry in log if entry[0] == "destroy"] == destroyed
    del streams._idle
    assert len([entry for entry in log if entry[0] == "destroy"]) == 1, "it outlives the streams"


def test_what_has_passed(streams):
    event = streams.record(61)
    assert streams.is_done(event)
    streams._cuda.status = NOT_READY
    assert not streams.is_done(event)
    streams._cuda.status = 700
    with pytest.raises(BackendUnavailable, match=r"asking about an event failed: .*700"):
        streams.is_done(event)


class Communicator:
    """What `NcclChannel` needs of it; exchanges are noted among what the driver is asked for."""

    def __init__(self, log):
        self.log = log

    error = abort = None

    def exchange(self, parts, stream):
        self.log.append((parts, stream))


@pytest.fixture
def channel(streams, monkeypatch):
    """Exchanges lie on stream 91."""
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, _: SimpleNamespace(cuda_stream=handle))
    made = NcclChannel(Communicator(streams._cuda.log), torch.device("cuda", 1), streams)
    streams._cuda.log.clear()
    return made


def test_an_exchange_lies_between_the_work_of_a_stream(streams, channel):
    """Its events are used again, for which no context is entered: a call has several, and the host starts them."""
    log, name = streams._cuda.log, "event without timing True"
    for number, asked in enumerate((True, False, True)):
        marks = channel.start("parts", 60, captured=False)
        marks.join()
        assert log.count("enter") == (0 if number else 2), "to make two events"
        assert [entry for entry in log if entry != "enter"] == [
            ("record", name, 60), ("wait", 91, name, 0), ("parts", 91), ("record", name, 91), ("wait", 60, name, 0)
        ]  # fmt: skip
        log.clear()
        if asked:
            assert marks.ended()
            assert marks.ended(), "what has ended is not asked again"
        del marks
        assert log == [("ask", name)] * (1 if asked else 2)
        assert len(streams._idle) == 2
        log.clear()


def test_exchanges_of_a_cycle_leave_no_event_that_is_destroyed(streams, channel):
    """The traceback of an error holds the frames of its call, with their exchanges, and they hold the error."""
    cuda, names = streams._cuda, itertools.count()
    cuda.cuEventCreate = lambda flags: (0, next(names))
    for _ in range(3):
        marks = channel.start("parts", 60, captured=False)
        marks.join()
        marks.ended()
        cycle = [marks]
        cycle.append(cycle)
        del marks, cycle
        gc.collect()
    used = [entry[1] for entry in cuda.log if entry[0] == "record"]
    ends = {entry[1]: at for at, entry in enumerate(cuda.log) if entry[0] == "destroy"}
    assert len(used) == 6
    for at, entry in enumerate(cuda.log):
        assert entry[0] != "record" or at < ends.get(entry[1], len(cuda.log)), f"{entry} after its end at {ends}"


@pytest.mark.parametrize("why", ["a forked child", "a capture"])
def test_events_that_nobody_may_ask_about_are_not_used_again(streams, channel, monkeypatch, why):
    marks = channel.start("parts", 60, captured=False)
    if why == "a capture":
        streams._capturing = lambda: True
    else:
        monkeypatch.setattr(streams._device, "inherited", True, raising=False)
    streams._cuda.log.clear()
    del marks
    assert ("ask", "event without timing True") not in streams._cuda.log
    assert not streams._idle


def test_streams_that_nobody_else_has(streams, channel, monkeypatch):
    """One for exchanges, one for what is read meanwhile, until the channel is closed."""
    used, log = [], streams._cuda.log
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(used.append(stream.cuda_stream)))
    channel.aside()
    assert used == [92]
    channel._communicator.close = lambda: log.append("closed")
    log.clear()
    channel.close()
    assert [entry for entry in log if entry != "enter"] == ["closed", ("destroy", 91), ("destroy", 92)]


def test_an_exchange_from_another_device(streams, channel):
    streams._current_device = lambda: 0
    marks = channel.start("parts", 60, captured=False)
    marks.join()
    log = streams._cuda.log
    assert log.count("enter") == 4, "for each event and each wait"
    assert [entry[0] for entry in log if entry != "enter"] == ["record", "wait", "parts", "record", "wait"]


def test_where_an_exchange_is(streams, channel):
    marks = channel.start("parts", 60, captured=False)
    streams._cuda.status = NOT_READY
    assert (marks.begun(), marks.ended(), marks.captured) == (False, False, False)
    streams._cuda.status = 0
    assert (marks.begun(), marks.ended(), marks.captured) == (True, True, False)


def test_the_host_has_one_stream():
    host = HostStreams()
    host.wait(0, host.record(0), outside=False)
    assert (host.current(), host.capture(0)) == (0, 0)
