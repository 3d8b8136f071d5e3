"""The ends of processes, as a group on GPUs notices them, with real processes; no GPU is needed."""

import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from support.children import in_child, open_descriptors
from tokenferry.backends.cuda.peers import Peers, Process

NAMESPACE = Process.this().namespace
SOON_S = 10.0
"""What a busy machine may need for what takes a millisecond."""


@contextmanager
def processes(*commands: str) -> Iterator[list[subprocess.Popen[str]]]:
    made = [subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        yield made
    finally:
        for one in made:
            one.kill()
            one.communicate()


def of(*pids: int) -> Peers:
    return Peers([Process(pid, NAMESPACE) for pid in pids])


def words() -> memoryview:
    return memoryview(bytearray(4)).cast("I")


def becomes(what: Callable[[], object]) -> bool:
    deadline = time.monotonic() + SOON_S
    while not what() and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(what())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_ends_of_processes_are_noted():
    with processes("exec sleep 60", "exit 3", "exec sleep 60") as (killed, ended, lives):
        peers, word = of(killed.pid, ended.pid, lives.pid), words()
        peers.watch(word)
        assert becomes(lambda: word[0] == 0b010)
        killed.kill()
        assert becomes(lambda: word[0] == 0b011), "before anything has waited for the process"
        peers.close()


def test_a_child_that_lives_on_does_not_hide_the_end_of_its_parent():
    with processes("sleep 60 & echo $!; exec sleep 60") as [parent]:
        child = int(parent.stdout.readline())
        try:
            peers, word = of(parent.pid), words()
            peers.watch(word)
            parent.kill()
            assert becomes(lambda: word[0] == 1)
            os.kill(child, 0)
            peers.close()
        finally:
            os.kill(child, 9)


def test_a_watch_that_has_ended_notes_nothing():
    with processes("exec sleep 60", "exec sleep 60") as (one, other):
        first, second, word, other_word = of(one.pid, other.pid), of(one.pid, other.pid), words(), words()
        first.watch(word)
        second.watch(other_word)
        first.close()
        first.close()
        one.kill()
        assert becomes(lambda: other_word[0] == 1), "each group has its own watch"
        assert word[0] == 0
        second.close()


@pytest.mark.parametrize("how", ["closed", "dropped", "never begun", "after an end"])
def test_no_descriptor_is_left(how):
    before = descriptors()
    with processes("exec sleep 60", "exit 0") as (lives, ended):
        during = descriptors()
        many = [of(os.getpid(), lives.pid, ended.pid) for _ in range(20)]
        assert descriptors() == during + 20 * 3, "two processes, and one descriptor to end the watch"
        word = words()
        for peers in many if how != "never begun" else []:
            peers.watch(word)
        if how == "after an end":
            assert becomes(lambda: word[0] == 0b100)
        for peers in many if how != "dropped" else []:
            peers.close()
        del peers, many
        gc.collect()
        assert becomes(lambda: descriptors() == during)
    assert descriptors() == before


def test_ranks_of_this_process_are_not_watched():
    before = descriptors()
    peers, word = of(os.getpid(), os.getpid()), words()
    peers.watch(word)
    peers.close()
    assert descriptors() == before


def no_pidfd(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    return Process(1, NAMESPACE)


def refused(monkeypatch):
    def refuse(pid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    return Process(1, NAMESPACE)


@pytest.mark.parametrize(
    ("process", "why"),
    [
        (no_pidfd, "this system has no pidfd_open"),
        (refused, "Operation not permitted"),
        (lambda _: Process(1, "pid:[7]"), "rank 1 is in another PID namespace"),
    ],
)
def test_a_system_that_cannot_watch_processes_says_so(monkeypatch, caplog, process, why):
    before = descriptors()
    peers = Peers([Process.this(), process(monkeypatch)])
    assert why in caplog.text
    assert "calls notice after timeout_s that one has ended" in caplog.text
    peers.watch(words())
    peers.close()
    assert descriptors() == before


def test_a_process_that_can_have_no_more_threads_says_so(monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with processes("exec sleep 60") as [process]:
        before = descriptors()
        peers = of(process.pid)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        peers.watch(words())
        assert "can't start new thread" in caplog.text
        assert descriptors() == before
        peers.close()


def test_a_forked_child_leaves_the_watch_of_its_parent_alone():
    with processes("exec sleep 60") as [process]:
        before = open_descriptors()
        peers, word = of(process.pid), words()
        peers.watch(word)
        ours = open_descriptors().items() - before.items()

        def close() -> list[tuple[int, str]]:
            peers.close()
            peers.close()
            return sorted(ours & open_descriptors().items())

        assert len(ours) == 2
        assert in_child(close) == []
        process.kill()
        assert becomes(lambda: word[0] == 1), "the child ended the watch of its parent"
        peers.close()
