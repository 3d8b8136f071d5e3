"""When a program ends, whatever ends it, its ranks end and it leaves no files."""

import os
import signal
import subprocess
import sys

import pytest

from support import endings, processes

SOON_S = endings.BUSY_S / 2
"""Seconds for ranks to end after their program. They take a quarter of one where cores are free; a busy machine takes
longer, and so does one whose disk is busy: each process writes down first what it has covered."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


class Program:
    """A program that a test kills; its temporary files go to a folder of its own."""

    def __init__(self, folder, *command):
        folder.mkdir()
        self.folder, self.started = folder, set()
        # Torch's compiler makes a folder for its cache when it is imported, and keeps it.
        environ = {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": f"{folder}-compiled"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=environ)

    def line_with(self, text):
        """Its next line of output that contains a text."""
        for line in self.process.stdout:
            if text in line:
                return line
        raise AssertionError(self.process.stderr.read())

    def kill(self, number, forked=0):
        """Kill it; return its status. The processes that it has started, without one, and its files have to go."""
        self.started |= processes.descendants(self.process.pid)
        ranks = self.started - {forked}
        self.process.send_signal(number)
        status = self.process.wait(60)
        assert processes.left_after(SOON_S, ranks) == {}
        assert list(self.folder.iterdir()) == []
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.started |= processes.descendants(self.process.pid)
        for pid in (self.started | {self.process.pid}) & set(processes.parents()):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def test_ranks_end_with_their_program(tmp_path):
    """A process that the program has forked lives on, with all of its descriptors."""
    with (
        Program(tmp_path / "terminated", endings.__file__) as terminated,
        Program(tmp_path / "killed", endings.__file__) as killed,
    ):
        for program, number in ((terminated, signal.SIGTERM), (killed, signal.SIGKILL)):
            assert program.kill(number, forked=int(program.line_with("\n"))) == -number
            assert len(program.started) == 5, "ranks, their server, and the forked process"


def test_the_demo_ends_without_a_trace(tmp_path):
    demo = ("-W", "ignore", "-m", "tokenferry", "demo", "--device", "cpu", "--ranks", "2", "--steps", "1000")
    with Program(tmp_path / "temporary", *demo) as program:
        program.line_with("step    1")
        assert program.kill(signal.SIGTERM) == 143
        assert program.process.stderr.read() == ""
        assert len(program.started) == 3, "two ranks and their server"
