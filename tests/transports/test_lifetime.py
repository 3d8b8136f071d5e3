"""How the end of a process is seen while a copy of its connection is open, and what happens where it cannot be."""

import gc
import os
import select
import signal
import socket
import threading
import time
import weakref
from functools import partial

import pytest

from support.children import in_child, leave_child, open_descriptors
from tokenferry.transports import lifetime
from tokenferry.transports.handshake import pid_namespace
from tokenferry.transports.lifetime import Watch, open_peer, open_process


@pytest.fixture
def child():
    """Return the id of a process that lives until it is killed."""
    pid = leave_child("fork")
    yield pid
    end(pid)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):  # a test has done so
        return


def is_readable(fd: int, timeout_s: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def watchers() -> int:
    return sum(thread.name == "tokenferry-watch" for thread in threading.enumerate())


def until(condition) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_descriptor_shows_the_end_of_a_process(child):
    fd = open_process(child)
    try:
        assert not is_readable(fd)
        end(child)
        assert is_readable(fd, 10.0)
    finally:
        os.close(fd)


def test_a_connection_names_its_process():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        fd = open_peer(ours)
        with open(f"/proc/self/fdinfo/{fd}") as info:
            assert f"Pid:\t{os.getpid()}\n" in info.readlines()
        os.close(fd)


@pytest.mark.parametrize("refusal", [AttributeError, PermissionError, OSError])
def test_a_system_without_such_descriptors(monkeypatch, refusal):
    def refuse(*_):
        raise refusal

    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(os, "readlink", refuse if refusal is PermissionError else os.readlink)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        assert open_peer(ours) == -1
    assert open_process(os.getpid()) == -1
    assert (pid_namespace() == "") is (refusal is PermissionError)
    assert Watch({1: -1}, print)._wake == -1
    assert watchers() == 0


@pytest.mark.parametrize("name", ["pipe", "start"])
def test_a_watch_that_cannot_start_leaves_nothing(monkeypatch, child, name):
    def refuse(*_):
        raise OSError if name == "pipe" else RuntimeError

    before = open_descriptors()
    monkeypatch.setattr(*((os, "pipe") if name == "pipe" else (threading.Thread, "start")), refuse)
    watch = Watch({1: open_process(child)}, print)
    with watch.waiting(1):
        assert not watch.ended(1)
    watch.close()
    assert open_descriptors() == before


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lifetime, "_GRACE_S", 0.05)
    monkeypatch.setattr(lifetime, "_CHECK_MS", 10)


def test_a_wait_for_a_process_that_has_ended_is_given_up_and_no_other(impatient, child):
    given_up: list[int] = []
    watch = Watch({1: open_process(child), 2: open_process(os.getpid())}, given_up.append)
    with watch.waiting(1):
        time.sleep(0.1)
        assert given_up == []
    end(child)
    until(lambda: watch.ended(1))
    with watch.waiting(2):
        time.sleep(0.1)
    assert given_up == []
    assert not watch.ended(2)
    with watch.waiting(1):
        until(lambda: given_up)
    assert set(given_up) == {1}
    with watch.waiting(2, others=(1,)):
        until(lambda: 2 in given_up)
    watch.close()
    until(lambda: watchers() == 0)


@pytest.mark.parametrize("dropped", [False, True])
def test_the_thread_and_the_descriptors_go_with_the_watch(child, dropped):
    before = open_descriptors()
    watch = Watch({1: open_process(child)}, print)
    assert watchers() == 1
    assert len(open_descriptors()) == len(before) + 3
    assert in_child(lambda: set(open_descriptors().values()) & {"anon_inode:[pidfd]"}) == set()
    if dropped:
        del watch
        gc.collect()
    else:
        watch.close()
        watch.close()
    until(lambda: watchers() == 0)
    assert open_descriptors() == before


def test_a_thread_that_has_not_ended_yet_keeps_no_process_group(child, monkeypatch):
    """It may end while the interpreter exits, and torch aborts if the last reference to a process group goes there."""
    may_end, close = threading.Event(), lifetime._State.close

    def late(state):
        may_end.wait(10.0)
        close(state)

    class Group:
        pass

    monkeypatch.setattr(lifetime._State, "close", late)
    group, before = Group(), watchers()
    gone = weakref.ref(group)
    watch = Watch({1: open_process(child)}, partial(print, group))
    watch.close()
    del group
    assert gone() is None
    assert watchers() == before + 1
    may_end.set()
    until(lambda: watchers() == before)
