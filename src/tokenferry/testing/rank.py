"""What a rank process of a `World` does: it joins the process group, then runs jobs until there are no more."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import env

GROUP_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RankSettings:
    """The settings of one rank.

    Attributes:
        rank: Its number.
        num_ranks: R.
        devices: "cpu" or "cuda".
        threads: Threads that torch may use.
        store: The path of the store's file; None: the open file that the rank has inherited.
        ranks_per_node: Number of consecutive ranks that play a node; None: they play none.
    """

    rank: int
    num_ranks: int
    devices: str
    threads: int
    store: str | None
    ranks_per_node: int | None


def preparation() -> dict[str, Any]:
    """Return what a rank needs in order to unpickle functions of this program, also those of its main module."""
    found: dict[str, Any] = {"sys_path": list(sys.path), "sys_argv": list(sys.argv), "dir": os.getcwd()}
    main = sys.modules["__main__"]
    name, path = getattr(main.__spec__, "name", None), getattr(main, "__file__", None)
    if name is not None:
        found["init_main_from_name"] = name
    elif path is not None:
        found["init_main_from_path"] = os.path.abspath(path)
    return found


def prepare(found: dict[str, Any]) -> None:
    """Do in a rank what `preparation` says."""
    process: Any = multiprocessing.current_process()
    process._inheriting = True
    try:
        spawn.prepare(found)
    finally:
        del process._inheriting


def gpu_of(rank: int, num_gpus: int, ranks_per_node: int | None) -> int:
    """Return the GPU of a rank: one after another, in turns. Pure.

    Where nodes share GPUs, each turn begins one GPU later: two nodes of two ranks have the GPUs 0, 1 and 1, 0, so that
    the ranks of a rail are on different ones.
    """
    turn = 0 if ranks_per_node is None else rank // ranks_per_node * ranks_per_node // num_gpus
    return (rank + turn) % num_gpus


def serve(pipe: Connection, store: int) -> None:
    """Run a rank until an empty job comes or the program is gone.

    Args:
        pipe: To and from the program; its first message is what `preparation` returned, and `RankSettings`.
        store: Descriptor of the file for the store of the process group.
    """
    own = os.getpid()
    found, settings = pickle.loads(pipe.recv_bytes())
    prepare(found)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(settings.threads)
    per_node = settings.ranks_per_node
    if per_node is not None:
        env.play_node(settings.rank // per_node, per_node)
    if settings.devices == "cuda":
        torch.cuda.set_device(gpu_of(settings.rank, torch.cuda.device_count(), per_node))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{settings.store or f'/proc/self/fd/{store}'}",
        rank=settings.rank,
        world_size=settings.num_ranks,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        if not job:
            break
        answer = _answer(settings.rank, job, pipe)
        if os.getpid() != own:
            os._exit(1)  # a process that the job forked came back from it: the answer is its parent's to give
        pipe.send_bytes(answer)
    dist.destroy_process_group()


def _answer(rank: int, job: bytes, pipe: Connection) -> bytes:
    """Run one job; return something that can be unpickled, whatever happens."""
    try:
        paths, call = pickle.loads(job)
        sys.path[:] = paths
        fn, args, with_progress = pickle.loads(call)

        def progress(item: Mapping[str, object]) -> None:
            pipe.send_bytes(pickle.dumps(("item", item, "")))

        return pickle.dumps(("result", fn(rank, dist.group.WORLD, *([progress] if with_progress else []), *args), ""))
    except BaseException as error:  # noqa: BLE001 - everything, KeyboardInterrupt too, is returned to the caller
        text = traceback.format_exc()
        try:
            answer = pickle.dumps(("error", error, text))
            pickle.loads(answer)
        except Exception:  # noqa: BLE001 - an exception may be of any class, picklable or not
            answer = pickle.dumps(("error", RuntimeError(text), text))
        return answer
