"""Communicators of NCCL over a library that is a stand-in: how calls end, and what is done about those that do not."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenferry.backends.cuda.across import nccl
from tokenferry.backends.cuda.across.nccl import Communicator, NcclError

SUCCESS, REMOTE_ERROR, IN_PROGRESS = 0, 6, 7
PARTS = [(0x1000, 64, 1, False), (0x2000, 32, 1, True), (0x3000, 16, 2, True)]


class Library:
    """NCCL's functions, which note their calls and return what they are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.results: dict[str, int] = {}
        self.state = SUCCESS
        self.given: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*args: object) -> int:
            self.calls.append(name)
            if name in ("ncclSend", "ncclRecv"):
                self.given.append(args)
            return self.results.get(name, SUCCESS)

        return function

    def ncclCommInitRankConfig(self, comm, num_ranks, unique_id, rank, config) -> int:  # noqa: N802 - NCCL's name
        comm._obj.value = 0xC0
        assert config._obj.blocking == 1, "a thread would be made for each exchange"
        return self.results.get("ncclCommInitRankConfig", SUCCESS)

    def ncclCommGetAsyncError(self, _comm, state) -> int:  # noqa: N802
        state._obj.value = self.state
        return SUCCESS

    def ncclGetErrorString(self, result: int) -> bytes:  # noqa: N802
        return f"error {result}".encode()

    def ncclGetLastError(self, _comm) -> bytes:  # noqa: N802
        return b"the last word"


@pytest.fixture
def library(monkeypatch) -> Library:
    found = Library()
    monkeypatch.setattr(nccl, "library", lambda: found)
    return found


def connect() -> Communicator:
    return Communicator(0, 3, bytes(128), max_ctas=16)


def test_an_exchange_is_one_group(library):
    connect().exchange(PARTS, 7)
    assert library.calls == ["ncclGroupStart", "ncclRecv", "ncclSend", "ncclSend", "ncclGroupEnd"]
    assert [args[:2] + args[3:4] + args[5:] for args in library.given] == [
        (0x1000, 64, 1, 7),
        (0x2000, 32, 1, 7),
        (0x3000, 16, 2, 7),
    ]


def test_an_error_is_not_hidden_by_what_succeeds(library):
    library.results = {"ncclRecv": REMOTE_ERROR}
    with pytest.raises(NcclError, match=r"^an exchange: error 6 \(the last word\)$"):
        connect().exchange(PARTS, 7)
    assert library.calls[-1] == "ncclGroupEnd", "the group of this thread stays open"


def test_errors_between_calls(library):
    communicator = connect()
    assert communicator.error() == ""
    library.state = IN_PROGRESS
    assert communicator.error() == ""
    library.state = REMOTE_ERROR
    assert communicator.error() == "error 6 (the last word)"
    communicator.abort()
    communicator.abort()
    assert communicator.error() == ""
    assert library.calls == ["ncclCommAbort"]
    with pytest.raises(NcclError, match="aborted"):
        communicator.exchange(PARTS, 7)


@pytest.mark.parametrize("ends", [True, False])
def test_closing_waits_until_all_has_left(library, ends):
    communicator = connect()
    library.results = {"ncclCommFinalize": SUCCESS if ends else REMOTE_ERROR}
    communicator.close()
    communicator.close()
    assert library.calls == ["ncclCommFinalize", "ncclCommDestroy" if ends else "ncclCommAbort"]


def test_an_abort_does_not_wait_for_a_call_that_is_stuck(library, monkeypatch):
    """Such as a launch on a device whose queue is full; the abort is what ends it."""
    monkeypatch.setattr(nccl, "_LOCK_S", 0.05)
    communicator, aborted, begun = connect(), threading.Event(), threading.Event()

    def stuck() -> int:
        begun.set()
        assert aborted.wait(20)
        return REMOTE_ERROR

    def abort(_comm: int) -> int:
        aborted.set()
        return SUCCESS

    library.ncclGroupEnd, library.ncclCommAbort = stuck, abort
    with ThreadPoolExecutor(1) as pool:
        exchange = pool.submit(communicator.exchange, PARTS, 7)
        assert begun.wait(20)
        assert communicator.error() == "", "asked about a communicator that a call is using"
        communicator.abort()
        with pytest.raises(NcclError, match="an exchange: error 6"):
            exchange.result(20)
