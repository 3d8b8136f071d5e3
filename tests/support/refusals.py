"""Resources that are refused on one rank of three: descriptors and memory, at every moment of every call."""

import contextlib
import errno
import gc
import itertools
import logging
import mmap
import os
import resource
import sys
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from support.lost_ranks import CASE, LONG_S, LOST_RANK, barrier, calls, complete_twice
from support.pairs import Pair
from support.throughput import check_round_trip
from tokenferry import ClosedError, DispatchOptions, ExpertGroup, MoeShape, PeerTimeout, ResourceError, Routing
from tokenferry.testing.cases import Case

PROMPTLY_S = 15.0
"""Half of the deadline of the groups here, and far more than it takes to tell the peers."""

_PACKAGE = "tokenferry.backends.cpu"
_TORCH = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "800000000 bytes. Error code 12 (Cannot allocate memory)\nand a long stack"
)
MOMENTS: dict[str, tuple[str, Exception, str]] = {
    "arguments are checked": ("tokenferry.resolve.Resolver.{call}", MemoryError(), "memory refused"),
    "rows are packed": (f"{_PACKAGE}.payload.Payload.__init__", _TORCH, "tried to allocate 800000000 bytes"),
    "a message is opened": ("TRANSPORT.open", OSError(errno.EMFILE, "?"), "file descriptors refused (EMFILE"),
    "a message is sent": ("TRANSPORT.post", OSError(errno.ENOBUFS, "?"), "memory of sockets refused (ENOBUFS"),
    "a message is received": ("TRANSPORT.receive", OSError(errno.ENOMEM, "?"), "memory refused (ENOMEM"),
    "the call ends": ("TRANSPORT.finish", _TORCH, "memory refused (ENOMEM"),
}
"""What is being done when the system refuses: the function that raises, what it raises, words of the message."""


@contextlib.contextmanager
def descriptors_left(spare: int) -> Iterator[None]:
    """Let this process open that many files and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (fd for fd in itertools.count() if not _is_open(fd))
    first_refused = next(itertools.islice(free, spare, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_refused, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def refuse_at_every_moment(rank, pg, pair: Pair, phase: str) -> list[str]:
    """Rank 2 is refused something in one call, at each moment in turn; all ranks go on with a new group each time."""
    return [complaint for moment in MOMENTS for complaint in _refuse(rank, pg, pair, phase, moment)]


def _refuse(rank, pg, pair: Pair, phase: str, moment: str) -> list[str]:
    target, error, words = MOMENTS[moment]
    barrier(pg)
    with pair.open(pg, CASE.shape, timeout_s=LONG_S) as group:
        call = calls(group, rank)[phase]
        transport = type(group._backend._exchange.transport)
        target = target.replace("TRANSPORT", f"{transport.__module__}.{transport.__name__}")
        start = time.monotonic()
        if rank == LOST_RANK:
            with (
                mock.patch(target.format(call=phase.split()[0]), side_effect=error),
                pytest.raises(ResourceError) as caught,
            ):
                call()
        else:
            with pytest.raises(PeerTimeout) as caught:
                complete_twice(group, call)  # rank 2 may have sent its message of the first
            assert caught.value.peers == (LOST_RANK,)
            left = f"rank {LOST_RANK}: it left the group: ResourceError: {phase.split()[0]}"
            assert left in str(caught.value), f"{moment}: {caught.value}"
        took_s, text = time.monotonic() - start, str(caught.value)
        with pytest.raises(ClosedError, match=type(caught.value).__name__):
            call()
    complaints = [] if words in text else [f"{moment}: {words!r} is not in {text!r}"]
    return complaints + ([f"{moment}: took {took_s} s"] if took_s > PROMPTLY_S else [])


def refuse_descriptors(rank, pg, poor: int, spare: int) -> str:
    """Rank ``poor`` of two may open ``spare`` files more during a dispatch; returns what each rank reports."""
    barrier(pg)
    case = Case((9, 7), 4, 2, hidden=64, dtype=torch.float32)
    mine = case.inputs()[rank]
    with Pair("cpu", "shared_memory").open(pg, case.shape, timeout_s=LONG_S) as group:
        start = time.monotonic()
        if rank != poor:
            _await_message(group, poor)
        try:
            with descriptors_left(spare) if rank == poor else contextlib.nullcontext():
                for _ in range(4):
                    group.dispatch(mine.x, Routing(mine.topk_idx))
            # The poor rank may have failed in the last call after it had sent its rows: its peer learns in the next.
            group.dispatch(mine.x, Routing(mine.topk_idx))
            text = "done"
        except (ResourceError, PeerTimeout) as error:
            text = f"{type(error).__name__}: {error}"
        assert time.monotonic() - start < PROMPTLY_S
    with Pair("cpu", "shared_memory").open(pg, case.shape, timeout_s=LONG_S) as group:
        check_round_trip(group, case, DispatchOptions())
    return text


def _await_message(group: ExpertGroup, src: int) -> None:
    """Return when the first message of a rank has come, or never will."""
    transport = group._backend._exchange.transport
    peer = transport._peers[src]
    while peer.sends_more() and not peer.inbox:
        transport._progress(PROMPTLY_S)


def refuse_memory(rank, pg, pair: Pair) -> str:
    """Rank 1 of two has no address space left for the rows that it receives; it cannot wait until its peer knows."""
    barrier(pg)
    with mock.patch("tokenferry.transports.process_group._LINGER_S", 2 * PROMPTLY_S):
        return _refuse_memory(rank, pg, pair)


def _refuse_memory(rank, pg, pair: Pair) -> str:
    shape = MoeShape(2, 1, hidden=1024, max_tokens=1 << 15)
    x = torch.zeros(1 << 15, 1024)  # 128 MiB
    with pair.open(pg, shape, timeout_s=LONG_S) as group:
        start = time.monotonic()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if rank == 1:
            with open("/proc/self/statm") as file:
                in_use = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), limits[1]))
        try:
            for _ in range(2):
                group.dispatch(x, Routing(torch.ones(1 << 15, 1, dtype=torch.int64)))
            text = "done"
        except (ResourceError, PeerTimeout) as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.monotonic() - start < PROMPTLY_S
    return text


def free_memory_on_close(rank, pg, pair: Pair) -> list[int]:
    """Return the bytes of shared or reusable memory that are mapped before a group, while it is open, and after."""
    x, routing = torch.zeros(4000, 256), Routing(torch.arange(4000).remainder(2)[:, None], torch.ones(4000, 1))
    found = [_mapped_bytes()]
    group = pair.open(pg, MoeShape(2, 1, hidden=256, max_tokens=4000), timeout_s=LONG_S)
    for _ in range(3):
        sent = group.dispatch(x, routing)
        group.combine(sent.x, sent.plan)
        group.decode_dispatch(x, routing, return_hook=True).hook()
    del sent
    found.append(_mapped_bytes())
    barrier(pg)
    group.close()
    found.append(_mapped_bytes())
    assert group.rank == rank  # still referenced
    return found


def _mapped_bytes() -> int:
    """Return the bytes that are mapped by `mmap.mmap` in this process."""
    gc.collect()
    return sum(len(each) for each in gc.get_objects() if type(each) is mmap.mmap)


def make_where_cuda_cannot_be_loaded(rank, pg, poor: int) -> tuple[str, str]:
    """Make a group with ``backend="auto"`` where the poor rank cannot open the modules of the CUDA backend.

    Returns:
        tuple: The backend, and what the log says about the choice.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tokenferry")
    level, name = logger.level, "tokenferry.backends.cuda.setup"
    refused = mock.patch.dict(sys.modules, {name: None}) if rank == poor else contextlib.nullcontext()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    barrier(pg)
    try:
        with mock.patch.dict(os.environ), refused:
            os.environ.pop("TOKENFERRY_BACKEND", None)
            with ExpertGroup(pg, CASE.shape, timeout_s=LONG_S) as group:
                group.dispatch(torch.ones(1, 64), Routing(torch.zeros(1, 2, dtype=torch.int64)))
                return group.backend, messages[0]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
