"""World: R rank processes on this host that run jobs one after another. Made once, used many times.

Ranks are forked from one server process that has imported torch and tokenferry, so a world of four is up in a fraction
of a second, and its ranks share that server's memory pages. Each rank is in one gloo process group. The server does
not initialise CUDA: each rank that owns a GPU does.

Ranks end when the program ends, however that happens, and a world leaves no files (on Linux; elsewhere a killed
program leaves one folder).
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import torch

from tokenferry.testing.rank import RankSettings, preparation
from tokenferry.testing.rank_server import STALL_S, RankProcess, get_server

__all__ = ["END_S", "Progress", "World", "WorldError", "check_gpus", "check_nodes"]

END_S = 10.0
"""Seconds that ranks have to end by themselves, and that the system has to end those that were killed."""

Progress = Callable[[Mapping[str, object]], None]
"""``progress(item)``: send a small mapping to the program, from within a job of `World.run_with_progress`."""


def check_gpus(parser: argparse.ArgumentParser, device: str) -> None:
    """End the program with status 3, as commands do on a machine that cannot, if ``--device cuda`` finds no GPU.

    The count comes from NVML where that is there: `torch.cuda.is_available` asks CUDA, which forked children cannot use
    then.
    """
    if device == "cuda" and not torch.cuda.device_count():
        parser.exit(3, f"{parser.prog}: --device cuda: torch sees no GPU; use --device cpu\n")


def check_nodes(parser: argparse.ArgumentParser, num_ranks: int, ranks_per_node: int | None) -> None:
    """End a command with a message if its ``--ranks-per-node`` does not divide its ``--ranks``."""
    if ranks_per_node is not None and (ranks_per_node < 1 or num_ranks % ranks_per_node):
        parser.error(f"--ranks-per-node {ranks_per_node}: does not divide --ranks {num_ranks}")


class WorldError(RuntimeError):
    """A job failed on some ranks.

    Attributes:
        errors: The exception of each failed rank; ChildProcessError for one that died, TimeoutError for one that hung.
        results: The results of the other ranks.
    """

    def __init__(self, errors: dict[int, BaseException], results: dict[int, Any], texts: dict[int, str]) -> None:
        lines = [f"--- rank {rank}: {texts.get(rank, repr(error))}" for rank, error in sorted(errors.items())]
        super().__init__("\n".join([f"the job failed on rank(s) {sorted(errors)}", *lines]))
        self.errors = errors
        self.results = results


class World:
    """A pool of R rank processes, each in one gloo group; a context manager.

    A job that fails on any rank ends the world (its ranks may be out of step): `alive` is then False; make a new one.
    A world belongs to the process that made it: in a process forked from that, it can only be dropped.

    Args:
        num_ranks: R.
        devices: ``"cpu"``, or ``"cuda"``: rank r owns GPU ``r % number of GPUs``, which is then its current device.
            Ranks that share a GPU take turns on it, which is slow.
        timeout_s: Seconds a job may take before its ranks are killed; their stacks go to stderr first.
        threads: Threads that torch may use in each rank.
        ranks_per_node: Number of consecutive ranks that play a node: groups have these nodes, and NCCL takes each for a
            host of its own, so that nodes may share GPUs. None: they play none.

    Raises:
        ValueError: ``devices`` is neither, or ``ranks_per_node`` does not divide R.
        RuntimeError: there is no GPU.
        OSError: a process cannot be started, or no file can be opened.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        devices: str = "cpu",
        timeout_s: float = 60.0,
        threads: int = 1,
        ranks_per_node: int | None = None,
    ) -> None:
        if devices not in ("cpu", "cuda"):
            raise ValueError(f'World: devices: expected "cpu" or "cuda", got {devices!r}')
        if ranks_per_node is not None and num_ranks % ranks_per_node:
            raise ValueError(f"World: ranks_per_node={ranks_per_node} does not divide {num_ranks} ranks")
        if devices == "cuda" and not torch.cuda.is_available():
            raise RuntimeError('World: devices="cuda" needs a GPU, torch sees none; use devices="cpu"')
        self.num_ranks = num_ranks
        self.devices = devices
        self.timeout_s = timeout_s
        self._pid = os.getpid()
        self._busy = False
        self._ranks: list[RankProcess] = []
        self._held = ExitStack()  # closed last
        self.alive = True
        try:
            server = get_server()
            # Linux: a file without a name, which is gone with the last process that has it open.
            store = self._held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with what is held
            path = None
            if sys.platform != "linux":
                folder = self._held.enter_context(tempfile.TemporaryDirectory(prefix="tokenferry-world-"))
                path = os.path.join(folder, "store")
            for rank in range(num_ranks):
                self._ranks.append(server.start(store))
                settings = RankSettings(rank, num_ranks, devices, threads, path, ranks_per_node)
                self._ranks[rank].pipe.send_bytes(pickle.dumps((preparation(), settings)))
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        """Process id of each rank, for tests that stop or kill one."""
        return [process.pid for process in self._ranks]

    def run(self, fn: Callable[..., Any], *args: object) -> list[Any]:
        """Call ``fn(rank, process_group, *args)`` on every rank and return its results, by rank.

        ``fn`` and ``args`` are pickled: ``fn`` is a function of a module.

        Raises:
            WorldError: a rank raised, died, or took longer than ``timeout_s``; the world has then ended.
        """
        self.submit(fn, *args)
        return self.collect()

    def run_with_progress(
        self, fn: Callable[..., Any], *args: object, on_item: Callable[[dict[str, Any]], None]
    ) -> list[Any]:
        """Call ``fn(rank, process_group, progress, *args)`` on every rank, and ``on_item`` here for each item.

        Args:
            fn: A function of a module; it may call its third argument, a `Progress`, any number of times.
            args: Further arguments.
            on_item: Called in this process, with the items of a rank in their order. If it raises, the world ends.

        Returns:
            list: The results of the ranks, by rank.

        Raises:
            WorldError: as `run`.
        """
        self._submit(fn, args, with_progress=True)
        return self._collect(on_item)

    def submit(self, fn: Callable[..., Any], *args: object) -> None:
        """Start a job and return at once; `collect` waits for it."""
        self._submit(fn, args, with_progress=False)

    def collect(self) -> list[Any]:
        """Wait for the job that `submit` started; as `run`."""
        return self._collect(lambda item: None)

    def _submit(self, fn: Callable[..., Any], args: tuple[object, ...], *, with_progress: bool) -> None:
        if not self.alive or self._pid != os.getpid():
            raise RuntimeError("this world has ended, or belongs to another process; make a new one")
        # Paths travel apart and first: unpickling ``fn`` imports its module.
        job = pickle.dumps((list(sys.path), pickle.dumps((fn, args, with_progress))))
        self._busy = True
        for process in self._ranks:
            with suppress(OSError):  # it died, or is stopped: `collect` says so
                process.pipe.send_bytes(job)

    def _collect(self, on_item: Callable[[dict[str, Any]], None]) -> list[Any]:
        deadline = time.monotonic() + self.timeout_s
        waiting = dict(enumerate(self._ranks))
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        texts: dict[int, str] = {}
        try:
            while waiting:
                left = deadline - time.monotonic()
                ends = [end for process in waiting.values() for end in (process.pipe, process.status)]
                if left <= 0 or not wait(ends, left):
                    break
                for rank, process in list(waiting.items()):
                    kind, value, text = _next_message(rank, process)
                    if kind == "item":
                        on_item(value)
                    elif kind == "result":
                        results[rank] = value
                    elif kind == "error":
                        errors[rank], texts[rank] = value, text
                    if rank in results or rank in errors:
                        del waiting[rank]
        except BaseException:
            self.kill()  # the ranks are in the middle of a job
            raise
        self._busy = False
        for rank in waiting:
            errors[rank] = TimeoutError(f"rank {rank} did not finish the job within {self.timeout_s} s")
        if errors:
            self.kill(dump=tuple(waiting))
            raise WorldError(errors, results, texts)
        return [results[rank] for rank in range(self.num_ranks)]

    def kill(self, dump: tuple[int, ...] = ()) -> None:
        """End all ranks at once; the ranks in ``dump`` print their stacks to stderr first. Idempotent."""
        if self.alive and self._pid == os.getpid():
            for rank in dump:
                self._ranks[rank].signal(signal.SIGCONT)
                self._ranks[rank].signal(signal.SIGUSR1)
                self._ranks[rank].join(0.2)
            for process in self._ranks:
                process.signal(signal.SIGKILL)
            for process in self._ranks:
                process.join(END_S)
        self._end()

    def close(self) -> None:
        """End all ranks; idempotent. Ranks that are in the middle of a job are killed."""
        if self.alive and not self._busy and self._pid == os.getpid():
            for process in self._ranks:
                with suppress(OSError):  # it has died
                    process.pipe.send_bytes(b"")
            deadline = time.monotonic() + END_S
            for process in self._ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def _end(self) -> None:
        self.alive = False
        for process in self._ranks:
            process.close()
        self._held.close()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # ranks may be in the middle of a job whose results will not be collected
            self.kill()


def _next_message(rank: int, process: RankProcess) -> tuple[str, Any, str]:
    """Return the kind of the next message of a rank, its value and text; of kind "" if there is none yet."""
    # A process that a dead rank has forked may hold its pipe open, so look at both. First whether it has ended: what
    # it sent before that is then in the pipe.
    ended = process.join(0.0)
    try:
        if process.pipe.poll():
            kind, value, text = pickle.loads(process.pipe.recv_bytes())
            return kind, value, text
    except BlockingIOError:
        late = TimeoutError(f"rank {rank} stopped in the middle of a message, and did not go on for {STALL_S:.0f} s")
        return "error", late, repr(late)
    except (EOFError, ConnectionResetError):
        ended = process.join(END_S)
    if not ended:
        return "", None, ""
    died = ChildProcessError(f"rank {rank} died: {process.ending}")
    return "error", died, repr(died)
