"""The heap's questions to the CUDA driver about streams, with a driver that records them."""

import contextlib
import enum

import pytest
import torch

from tokenferry.errors import BackendUnavailable
from tokenferry.memory.streams import CudaStreams, HostStreams

CAPTURED = 70
REFUSED = 80
NOT_READY = 600


class Cuda:
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
    assert streams.record(60, eager=True) is event
    assert streams._cuda.log == [("record", "event without timing True", 60)]


def test_the_host_has_one_stream():
    host = HostStreams()
    host.wait(0, host.record(0), outside=False)
    assert (host.current(), host.capture(0)) == (0, 0)
