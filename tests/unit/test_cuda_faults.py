"""Errors made from the records of kernels; no GPU is needed."""

import select
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda import context, faults
from tokenferry.backends.cuda.faults import FlightRecorder, Pinned, Record
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import CapacityError, MismatchError, PeerTimeout, RoutingError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.control_block import CAPACITY_WORD, RECORD_WORDS, ROWS_WORD, START_WORD, Fault

SIGNATURE = Signature(
    "dispatch", num_experts=4, max_tokens=8, device_counts=0, bytes_of_topk_idx=16, dtype=dtype_code(torch.float32)
)


@pytest.mark.parametrize(
    ("word", "seen", "message"),
    [
        (1, 6, "num_experts is 4 on rank 0 and 6 on rank 2"),
        (2, 99, "max_tokens is 8 on rank 0 and 99 on rank 2"),
        (3, 1, "device counts is 0 on rank 0 and 1 on rank 2"),
        (4, 8, "bytes of topk_idx is 16 on rank 0 and 8 on rank 2"),
        (5, dtype_code(torch.bfloat16), "dtype is torch.float32 on rank 0 and torch.bfloat16 on rank 2"),
    ],
)
def test_a_mismatch_names_the_argument(word, seen, message):
    flight_recorder = FlightRecorder(0)
    flight_recorder.note(7, SIGNATURE)
    error = flight_recorder.explain(Record(Fault.mismatch, 7, 2, word, seen, SIGNATURE.fields[word][1], 2, 0))
    assert isinstance(error, MismatchError)
    assert str(error) == (
        f"dispatch #7: rank 0 and rank 2 made different calls: {message}; it has to be the same on all ranks"
    )


@pytest.mark.parametrize("fault", Fault)
def test_kernels_tell_peers_of_faults_that_break_the_group(fault):
    """Of the others nobody has told them, when a group is closed that has not looked."""
    pinned = Pinned(pin=False)
    assert not pinned.gave_up
    pinned.words[0] = fault
    flight_recorder = FlightRecorder(0)
    flight_recorder.note(0, Signature("dispatch"))
    error = flight_recorder.explain(pinned.take_record())
    pinned.words[0] = fault
    assert pinned.gave_up is not isinstance(error, RoutingError | CapacityError)


def test_what_kernels_say_while_a_group_is_closed_is_what_peers_hear(monkeypatch):
    """It names the fault, where the host would say only that this rank has closed the group."""
    closing, written = object.__new__(context.Context), []
    closing.pinned, closing.window, closing._notified_peers = (
        Pinned(pin=False),
        SimpleNamespace(bases=[0, 1 << 20]),
        False,
    )
    closing.device, closing.rank, closing.num_ranks = torch.device("cuda", 0), 0, 2
    monkeypatch.setattr(context, "bytes_at", lambda address, *_: written.append(address) or torch.zeros(8))
    for fault, tells in ((Fault.mismatch, False), (Fault.overflow, True)):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _, found=fault: write_fault(closing.pinned, found))
        closing.pinned.take_record()
        closing._notified_peers = False
        closing.notify_peers()
        assert bool(written) is tells


def write_fault(pinned: Pinned, fault: Fault) -> None:
    pinned.words[0] = fault


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (ROWS_WORD, "rank 2 has 5 rows for rank 0, whose plan says 6"),
        (CAPACITY_WORD, "rank 0 has 6 rows for rank 2, whose plan says 5"),
        (START_WORD, "the plan of rank 0 names row 6 of rank 2, whose rows for it begin at 5"),
    ],
)
def test_plans_that_do_not_fit(word, message):
    flight_recorder = FlightRecorder(0)
    flight_recorder.note(7, Signature("combine"))
    error = flight_recorder.explain(Record(Fault.mismatch, 7, 2, word, 5, 6, 2, 0))
    assert isinstance(error, MismatchError)
    assert str(error) == f"combine #7: {message}; use plans of the same dispatch on all ranks"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        (9, "9"),
        (2**32 - 7, "-7"),
        (2**31 - 2, "2147483646"),
        (2**31 - 1, "2147483647 or more"),
        (2**31, "-2147483648 or less"),
    ],
)
def test_an_index_that_does_not_fit_is_shown_as_a_bound(word, shown):
    """Kernels write the nearest int32: 4294967297 is reported as 2147483647."""
    error = FlightRecorder(0).explain(Record(Fault.bad_routing, 7, 1, 3, word, 6, 0, 0))
    assert isinstance(error, RoutingError)
    assert str(error).startswith(f"a call: topk_idx[3, 1] is {shown}, expected an expert in [0, 6)")


def test_a_call_that_is_no_longer_in_the_flight_recorder():
    """It was captured, and its graph runs long after: the names of its fields are not known."""
    flight_recorder = FlightRecorder(0)
    flight_recorder.note(1, SIGNATURE)
    for number in range(2, 70):
        flight_recorder.note(number, Signature("combine"))
    error = flight_recorder.explain(Record(Fault.mismatch, 1, 1, 1, 3, 4, 1, 0))
    assert isinstance(error, MismatchError)
    assert str(error) == (
        "a call #1: rank 0 and rank 1 made different calls; call the same on all ranks, in the same order"
    )


@pytest.mark.parametrize(
    ("record", "peers", "why"),
    [
        (
            Record(Fault.late_handshake, 7, 2, 0, 5, 6, 2, 100_000),
            (2,),
            "its handshake did not come: epoch 5 seen, 6 expected",
        ),
        (Record(Fault.peer_ended, 7, 2, 0, 5, 6, 2, 90), (2,), "its process ended: epoch 5 seen, 6 expected"),
        (Record(Fault.peer_closed, 7, 2, 0, 5, 6, 2, 90), (2,), "it closed the group: epoch 5 seen, 6 expected"),
        (
            Record(Fault.peer_gave_up, 7, 1, Fault.peer_ended, 5, 6, 2, 90),
            (2,),
            "its process ended, as rank 1 found (epoch 5 seen here, 6 expected)",
        ),
        (
            Record(Fault.peer_gave_up, 7, 1, Fault.late_rows, 5, 6, 2, 90),
            (2,),
            "rank 1 gave it up (epoch 5 seen here, 6 expected)",
        ),
        (
            Record(Fault.peer_gave_up, 7, 1, Fault.late_rows, 5, 6, 0, 90),
            (1,),
            "it gave up waiting for this rank (epoch 5 seen here, 6 expected)",
        ),
    ],
)
def test_a_timeout_says_whom_and_why(record, peers, why):
    flight_recorder = FlightRecorder(0)
    flight_recorder.note(7, SIGNATURE)
    error = flight_recorder.explain(record)
    assert isinstance(error, PeerTimeout)
    assert error.peers == peers
    assert str(error).startswith(
        f"dispatch #7: rank 0 waited {record.waited_ms / 1000:.1f} s for rank {peers[0]}: {why}. "
    )


def test_what_the_host_notes_is_no_part_of_a_fault():
    pinned = Pinned(pin=False)
    pinned.ended[0] = 0b100
    pinned.words[:8] = memoryview(bytes(range(32))).cast("I")
    record = pinned.take_record()
    assert record.waited_ms == 0x1F1E1D1C
    assert pinned.ended[0] == 0b100


@pytest.mark.parametrize("word", [0, RECORD_WORDS])
def test_counts_that_came_while_the_host_was_stopped(monkeypatch, word):
    """Or a fault: a debugger or another thread may hold up the host beyond any deadline."""
    pinned, slept = Pinned(pin=False), []

    def stop(_):
        slept.append(1)
        if len(slept) == 2:
            pinned.words[word] = 7

    monkeypatch.setattr(time, "sleep", stop)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 * len(slept))
    monkeypatch.setattr(faults, "_SHORT_WAIT_S", 0.0)
    assert pinned.wait_for_call_number(7, timeout_s=200.0)


def test_counts_that_do_not_come(monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert not Pinned(pin=False).wait_for_call_number(7, timeout_s=200.0)


def test_a_short_wait_does_not_sleep(monkeypatch):
    """A sleep takes longer than the counts do."""
    pinned, polls = Pinned(pin=False), []

    class Poll:
        def poll(self, timeout):
            polls.append(timeout)
            if len(polls) == 3:
                pinned.words[RECORD_WORDS] = 7

    monkeypatch.setattr(select, "poll", Poll)
    monkeypatch.setattr(time, "sleep", None)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert pinned.wait_for_call_number(7, timeout_s=200.0)
    assert polls == [0, 0, 0]


def test_a_long_wait_lets_other_threads_run():
    """They take the GIL between its polls; nobody takes it from a thread that keeps it."""
    pinned, waits = Pinned(pin=False), threading.Event()

    def work():
        waits.wait(20)
        time.sleep(0.05)  # until the wait sleeps between its polls
        for _ in range(200):
            time.sleep(0)
        pinned.words[RECORD_WORDS] = 7

    thread = threading.Thread(target=work)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)
    try:
        waits.set()
        assert pinned.wait_for_call_number(7, timeout_s=20.0)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
