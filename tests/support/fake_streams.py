"""Stand-ins for the streams and events of torch.cuda, which note what is done with them."""

from __future__ import annotations

import pytest
import torch


class Cuda:
    """The parts of torch.cuda that `Lane` and `EventHandle` use; ``log`` lists the calls in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done: set[str] = set()
        self.capturing = False
        self.streams = [Stream(self, "mine")]
        self.num_events = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: self.streams[-1])
        monkeypatch.setattr(torch.cuda, "set_stream", self._set)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: id(self.streams[-1]), raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream(self, "comm"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))

    def _set(self, stream: Stream) -> None:
        self.streams[-1] = stream


class Stream:
    device_index = 0

    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.name}")


class Event:
    """An event; its name has a number from when it is first recorded."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.name = ""

    def record(self, stream: Stream | None = None) -> None:
        if not self.name:
            self.name = f"event {self.cuda.num_events}"
            self.cuda.num_events += 1
        self.cuda.log.append(f"{self.name} on {(stream or self.cuda.streams[-1]).name}")

    def query(self) -> bool:
        assert not self.cuda.capturing, "an event cannot be asked anything during a capture"
        return self.name in self.cuda.done
