"""The server from which the ranks of all worlds of a program are forked: one process that has imported torch.

A rank ends with the program, whatever ends that: the server notices within a quarter of a second, kills its ranks, and
ends; and should the server itself be killed, the kernel kills its ranks (Linux). It does not matter what a rank is
doing then, nor whether it is stopped. The server looks at its parent's process id, because the end of a socket says
less: a process that the program forked may still hold a copy of it.

Program, server and ranks talk over socket pairs, which have no name, so there is nothing to clean up.
``multiprocessing`` has such a server too, but its socket lies in a folder that stays when the program is killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import importlib
import multiprocessing
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import IO

from tokenferry.testing import rank
from tokenferry.testing.streams import open_closed_streams

LOOK_S = 0.25
"""Seconds between two looks of the server at its parent."""
STALL_S = 30.0
"""Seconds that a message between program and rank may rest half sent: its other side is stopped."""
ENDING_S = 1.0
"""Seconds between the end of the server's sockets and its own."""
START_S = 120.0
"""Seconds that starting the server may take: it imports torch."""

_COMMAND = struct.Struct("=ii")  # process id and signal; if descriptors come along: start a rank on them
_STATUS = struct.Struct("=i")  # once the process id, or minus errno; once, at the end, how the rank ended
_PR_SET_PDEATHSIG = 1

_server: RankServer | None = None


class RankServer:
    """The program's side of the server: starts it, and asks it for ranks. Its ranks end when this object is gone."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._commands, theirs = socket.socketpair()
        with theirs:
            # Not 0, 1 or 2, which may be free here, and are standard streams there.
            descriptor = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            dtensor = "torch.distributed.tensor" in sys.modules
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from tokenferry.testing import rank_server; "
                f"rank_server.main({descriptor}, {self.owner}, dtensor={dtensor})"
            )
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            command = [sys.executable, *flags, "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[descriptor])
        finally:
            os.close(descriptor)

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process.poll() is None

    def ending(self) -> str:
        """Return in words how the server has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)
        code = self._process.returncode
        return "its server died" if code is None else f"its server died: {_ending(code)}"

    def start(self, store: IO[bytes]) -> RankProcess:
        """Fork a rank, which then waits for its first message.

        Args:
            store: The open file that the rank inherits.

        Raises:
            OSError: the server is gone or cannot fork, or there are no descriptors left.
        """
        pipe, their_pipe = socket.socketpair()
        status, their_status = socket.socketpair()
        with their_pipe, their_status, status:
            try:
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    pipe.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(STALL_S), 0))
                passed = [their_pipe.fileno(), their_status.fileno(), store.fileno()]
                socket.send_fds(self._commands, [_COMMAND.pack(0, 0)], passed)
                their_pipe.close()
                their_status.close()
                status.settimeout(START_S)
                answer = status.recv(_STATUS.size)
                (pid,) = _STATUS.unpack(answer) if answer else (-errno.ECHILD,)
                if pid < 0:
                    raise OSError(-pid, f"World: the server of ranks cannot start one: {os.strerror(-pid)}")
                return RankProcess(self, pid, Connection(pipe.detach()), status.dup())
            finally:
                pipe.close()

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a rank. Nothing happens if it has ended: its process id may be another process by now."""
        with suppress(OSError):  # the server is gone, and its ranks with it
            self._commands.sendall(_COMMAND.pack(pid, number))


class RankProcess:
    """One rank, as the program sees it.

    Attributes:
        pid: Its process id.
        pipe: For messages to and from the rank.
        status: Readable once the rank has ended; whatever processes the rank has forked.
        ending: How it ended, such as "killed by SIGKILL"; empty until `join` has returned True.
    """

    def __init__(self, server: RankServer, pid: int, pipe: Connection, status: socket.socket) -> None:
        self.pid, self.pipe, self.status, self.ending = pid, pipe, status, ""
        self._server = server

    def signal(self, number: int) -> None:
        """Send a signal to the rank, if it has not ended."""
        self._server.signal(self.pid, number)

    def join(self, timeout_s: float) -> bool:
        """Wait until the rank has ended; return whether it has."""
        if not self.ending:
            self.status.settimeout(timeout_s)
            try:
                answer = self.status.recv(_STATUS.size)
            except (TimeoutError, BlockingIOError):  # the second if timeout_s is 0
                return False
            self.ending = _described(_STATUS.unpack(answer)[0]) if answer else self._server.ending()
        return True

    def close(self) -> None:
        """Close the sockets."""
        self.pipe.close()
        self.status.close()


def get_server() -> RankServer:
    """Return the server of this process; one that a parent process started, or that has died, is replaced.

    Raises:
        RuntimeError: this process is a rank that imports the program, which makes a world when it is imported.
        OSError: the server cannot be started.
    """
    global _server
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "World: a rank imports the program that made it, and must not make a world of its own in turn; "
            'make worlds below `if __name__ == "__main__":`'
        )
    if _server is None or _server.owner != os.getpid() or not _server.alive:
        _server = RankServer()
    return _server


def main(descriptor: int, program: int, *, dtensor: bool) -> None:
    """Run the server, the child of a program, until that ends.

    Args:
        descriptor: Of the socket that commands come from.
        program: Process id of the program.
        dtensor: Whether to import torch.distributed.tensor. That takes most of a second, and the first call of
            `torch.testing.assert_close` would do it in every new rank.
    """
    code = 1
    try:
        open_closed_streams()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the terminal; the program decides
        importlib.import_module("tokenferry.autograd")  # all that ranks are likely to need, beside this file's imports
        if dtensor:
            importlib.import_module("torch.distributed.tensor")
        gc.collect()
        gc.freeze()  # or each collection in each rank would look at all that was imported, and copy its pages
        _Server(descriptor, program).run()
        code = 0
    except Exception:  # noqa: BLE001 - the end of a process, whatever it is
        traceback.print_exc()
    finally:
        os._exit(code)  # taking torch down can take seconds, and programs see the server's end as that of its ranks


class _Server:
    """The server process itself."""

    def __init__(self, descriptor: int, program: int) -> None:
        self._commands = socket.socket(fileno=descriptor)
        self._program, self._pid = program, os.getpid()
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        self._statuses: dict[int, socket.socket] = {}
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # a handler, so that the wakeup socket is written

    def run(self) -> None:
        try:
            while os.getppid() == self._program:
                ready, _, _ = select.select([self._commands, self._woken], [], [], LOOK_S)
                if self._woken in ready:
                    self._woken.recv(4096)
                self._reap()
                if self._commands in ready and not self._obey():
                    return
        finally:
            # What ends this process may do more than end it, and take locks: coverage writes its data, and hung when
            # the handler, which it traces as well, ran meanwhile.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            for pid in self._statuses:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Collect the ranks that have ended, and say how."""
        while self._statuses:
            pid, how = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self._statuses.pop(pid) as status, suppress(OSError):  # the world is gone
                status.send(_STATUS.pack(how))

    def _obey(self) -> bool:
        """Take one command; return False if there will be none."""
        command, descriptors, _, _ = socket.recv_fds(self._commands, _COMMAND.size, 3)
        if not command:
            return False
        pid, number = _COMMAND.unpack(command)
        if len(descriptors) == 3:
            self._start(*descriptors)
        elif pid in self._statuses:  # otherwise it has ended
            os.kill(pid, number)
        return True

    def _start(self, pipe: int, status: int, store: int) -> None:
        with socket.socket(fileno=status) as answers:
            try:
                pid = os.fork()
            except OSError as error:
                pid = -(error.errno or errno.EAGAIN)
            if pid == 0:
                self._become_rank(pipe, answers, store)
            if pid > 0:
                self._statuses[pid] = answers.dup()
            with suppress(OSError):  # the world was given up while it was made: the rank finds its pipe closed
                answers.send(_STATUS.pack(pid))
        os.close(pipe)
        os.close(store)

    def _become_rank(self, pipe: int, answers: socket.socket, store: int) -> None:
        """Run a rank in the process that has just been forked for it; does not return."""
        code = 1
        try:
            if self._prctl is not None:
                self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._pid:
                return  # it was killed before the kernel knew that this rank ends with it
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (self._commands, self._wake, self._woken, answers, *self._statuses.values()):
                one.close()
            rank.serve(Connection(pipe), store)
            code = 0
        except BaseException:  # noqa: BLE001 - the end of a process, which must not go on as a second server
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)


def _described(status: int) -> str:
    """Return in words how a process ended."""
    return _ending(os.waitstatus_to_exitcode(status))


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
