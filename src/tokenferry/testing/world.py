"""World: R rank processes on this host that run jobs one after another. Made once, used many times.

Ranks are forked from one server process that has imported torch and tokenferry, so a world of four is up in a fraction
of a second, and its ranks share that server's memory pages. Each rank is in one gloo process group. The server does
not initialise CUDA: each rank that owns a GPU does.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist


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

    Args:
        num_ranks: R.
        devices: ``"cpu"``, or ``"cuda"``: rank r owns GPU ``r % number of GPUs``, which is then its current device.
            Ranks that share a GPU take turns on it, which is slow.
        timeout_s: Seconds a job may take before its ranks are killed; their stacks go to stderr first.
        threads: Threads that torch may use in each rank.

    Raises:
        ValueError: ``devices`` is neither.
        RuntimeError: there is no GPU.
    """

    def __init__(self, num_ranks: int, *, devices: str = "cpu", timeout_s: float = 60.0, threads: int = 1) -> None:
        if devices not in ("cpu", "cuda"):
            raise ValueError(f'World: devices: expected "cpu" or "cuda", got {devices!r}')
        if devices == "cuda" and not torch.cuda.is_available():
            raise RuntimeError('World: devices="cuda" needs a GPU, torch sees none; use devices="cpu"')
        self.num_ranks = num_ranks
        self.devices = devices
        self.timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="tokenferry-world-")
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "tokenferry", "tokenferry.autograd"])
        self._pipes: list[Connection] = []
        self._ranks: list[mp.process.BaseProcess] = []
        store = os.path.join(self._folder.name, "store")
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            settings = _RankSettings(rank, num_ranks, devices, threads, store)
            process = context.Process(target=_serve, args=(settings, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._ranks.append(process)
        self.alive = True

    @property
    def pids(self) -> list[int]:
        """Process id of each rank, for tests that stop or kill one."""
        return [process.pid or 0 for process in self._ranks]

    def run(self, fn: Callable[..., Any], *args: object) -> list[Any]:
        """Call ``fn(rank, process_group, *args)`` on every rank and return its results, by rank.

        ``fn`` and ``args`` are pickled: ``fn`` is a function of a module.

        Raises:
            WorldError: a rank raised, died, or took longer than ``timeout_s``; the world has then ended.
        """
        self.submit(fn, *args)
        return self.collect()

    def submit(self, fn: Callable[..., Any], *args: object) -> None:
        """Start a job and return at once; `collect` waits for it."""
        if not self.alive:
            raise RuntimeError("this world has ended; make a new one")
        # Paths travel apart and first: unpickling ``fn`` imports its module.
        job = pickle.dumps((list(sys.path), pickle.dumps((fn, args))))
        for pipe in self._pipes:
            pipe.send_bytes(job)

    def collect(self) -> list[Any]:
        """Wait for the job that `submit` started; as `run`."""
        deadline = time.monotonic() + self.timeout_s
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        texts: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    errors[rank] = TimeoutError(f"rank {rank} did not finish the job within {self.timeout_s} s")
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, value, text = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    errors[rank] = ChildProcessError(f"rank {rank} died")
                    continue
                if good:
                    results[rank] = value
                else:
                    errors[rank], texts[rank] = value, text
        if errors:
            self.kill(dump=tuple(waiting.values()))
            raise WorldError(errors, results, texts)
        return [results[rank] for rank in range(self.num_ranks)]

    def kill(self, dump: tuple[int, ...] = ()) -> None:
        """End all ranks at once; the ranks in ``dump`` print their stacks to stderr first."""
        self.alive = False
        for rank in dump:
            os.kill(self.pids[rank], signal.SIGCONT)
            os.kill(self.pids[rank], signal.SIGUSR1)
            self._ranks[rank].join(0.2)
        for process in self._ranks:
            process.kill()
        self._end()

    def stop(self) -> None:
        """Kill all ranks, from another thread than the one that waits in `run` or `collect`, which raises WorldError.

        It alone frees what the world holds: two threads that do would close each other's files.
        """
        for process in self._ranks:
            process.kill()

    def close(self) -> None:
        """End all ranks; idempotent."""
        if self.alive:
            self.alive = False
            for pipe in self._pipes:
                pipe.send_bytes(b"")
            for process in self._ranks:
                process.join(10.0)
                process.kill()
            self._end()

    def _end(self) -> None:
        for process in self._ranks:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.alive:  # ranks may be in the middle of a job whose results will not be collected
            self.kill()


@dataclass(frozen=True, slots=True)
class _RankSettings:
    """The settings of one rank."""

    rank: int
    num_ranks: int
    devices: str
    threads: int
    store: str


def _serve(settings: _RankSettings, pipe: Connection) -> None:
    """Run a rank: join the group, then run jobs until an empty one comes or the parent process is gone."""
    rank = settings.rank
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(settings.threads)
    if settings.devices == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{settings.store}",
        rank=rank,
        world_size=settings.num_ranks,
        timeout=timedelta(seconds=120),
    )
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        if not job:
            break
        pipe.send_bytes(_answer(rank, job))
    dist.destroy_process_group()


def _answer(rank: int, job: bytes) -> bytes:
    """Run one job; return something that can be unpickled, whatever happens."""
    try:
        paths, call = pickle.loads(job)
        sys.path[:] = paths
        fn, args = pickle.loads(call)
        return pickle.dumps((True, fn(rank, dist.group.WORLD, *args), ""))
    except BaseException as error:  # noqa: BLE001 - everything, KeyboardInterrupt too, is returned to the caller
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)
        except Exception:  # noqa: BLE001 - an exception may be of any class, picklable or not
            answer = pickle.dumps((False, RuntimeError(text), text))
        return answer
