"""Refused resources: errors of the system and of torch, turned into an exception with the limit and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from tokenferry.errors import ResourceError, TokenferryError


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of refusal.

    Attributes:
        resource: What was refused.
        limits: Returns what is known about the limit.
        remedy: What to do.
    """

    resource: str
    limits: Callable[[], str]
    remedy: str


def resource_error(where: str, error: BaseException) -> ResourceError | None:
    """Return the exception for a refused resource, or None if ``error`` means something else.

    Args:
        where: The beginning of the message: which call on which rank, or what the resource was needed for.
        error: An exception of Python or torch, or a `ResourceError`, to which ``where`` is added.
    """
    if isinstance(error, ResourceError):
        return ResourceError(f"{where}: {error}", resource=error.resource, errno=error.errno or 0)
    code = None if isinstance(error, TokenferryError) else _code(error)
    if code is None:
        return None
    lines = str(error).strip().splitlines()
    reason = os.strerror(code) if isinstance(error, OSError) or not lines else lines[0][:200]
    kind = _GPU_MEMORY if "CUDA" in reason else _KINDS[code]
    known = f"{kind.resource} refused ({errno.errorcode[code]}: {reason})"
    return ResourceError(
        f"{where}: {'; '.join(filter(None, (known, kind.limits(), kind.remedy)))}",
        resource=kind.resource,
        errno=code,
    )


def raise_if_refused(where: str, error: BaseException) -> None:
    """Raise what `resource_error` returns, if ``error`` means that a resource was refused."""
    refused = resource_error(where, error)
    try:
        if refused is not None:
            raise refused from error
    finally:
        del refused, error  # a cycle through this frame would keep the memory of calls alive


def _code(error: BaseException) -> int | None:
    """Return the code of a refusal, or None. torch raises RuntimeErrors, which have nothing but a text."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno if error.errno in _KINDS else None
    if isinstance(error, RuntimeError):
        text = str(error)
        for code in _IN_TEXTS:
            if os.strerror(code) in text:
                return code
        return next((code for phrase, code in _PHRASES.items() if phrase in text), None)
    return None


def _descriptors() -> str:
    return _limit("RLIMIT_NOFILE", "")


def _memory() -> str:
    """Return the limits that may have refused memory: those that are set."""
    known = [_limit("RLIMIT_AS", " bytes"), _limit("RLIMIT_DATA", " bytes")]
    with contextlib.suppress(OSError, ValueError, MemoryError):
        most = int(_read("/proc/sys/vm/max_map_count"))
        mappings = _read("/proc/self/maps").count("\n")
        if mappings > 0.9 * most:
            known.append(f"this process has {mappings} mappings, and vm.max_map_count is {most}")
    with contextlib.suppress(OSError, ValueError, MemoryError):
        known.append(f"memory.max of the container is {int(_read('/sys/fs/cgroup/memory.max'))} bytes")
    return "; ".join(text for text in known if text) or "no limit of this process is set, so the machine has no more"


def _nothing() -> str:
    return ""


def _limit(name: str, unit: str) -> str:
    """Return the value of a resource limit, or an empty string if it is not set. Opens no file."""
    try:
        import resource
    except ImportError:  # not a Unix
        return ""
    soft, hard = resource.getrlimit(getattr(resource, name))
    if soft == resource.RLIM_INFINITY:
        return ""
    return f"{name} is {soft}{unit} (hard limit: {'none' if hard == resource.RLIM_INFINITY else f'{hard}{unit}'})"


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


_GPU_MEMORY = _Kind(
    "memory of the GPU", _nothing, "free memory (torch.cuda.empty_cache() releases what torch caches), and call again"
)
_FORBIDDEN = _Kind(
    "a call of the system",
    _nothing,
    "containers forbid calls by a seccomp profile: allow memfd_create, mmap and Unix sockets, or use "
    "transport='process_group'",
)
_KINDS = {
    errno.EMFILE: _Kind("file descriptors", _descriptors, "close files, or raise the limit (ulimit -n)"),
    errno.ENFILE: _Kind(
        "file descriptors", lambda: "the whole system has no more (fs.file-max)", "close files, or raise the limit"
    ),
    errno.ETOOMANYREFS: _Kind("descriptors on their way", _descriptors, "raise the limit (ulimit -n)"),
    errno.ENOMEM: _Kind("memory", _memory, "send fewer tokens at once, free memory, or raise the limit"),
    errno.ENOBUFS: _Kind("memory of sockets", _nothing, "free memory, or send fewer tokens at once"),
    errno.ENOSPC: _Kind("shared memory", _nothing, "free space, or send fewer tokens at once"),
    errno.EFBIG: _Kind(
        "shared memory", lambda: _limit("RLIMIT_FSIZE", " bytes"), "raise the limit (ulimit -f), or send fewer tokens"
    ),
    errno.EAGAIN: _Kind(
        "threads or locked memory",
        lambda: "; ".join(filter(None, (_limit("RLIMIT_NPROC", ""), _limit("RLIMIT_MEMLOCK", " bytes")))),
        "raise the limit (ulimit -u, ulimit -l)",
    ),
    errno.EPERM: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.ENOSYS: _FORBIDDEN,
}
_IN_TEXTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PHRASES = {
    "can't allocate memory": errno.ENOMEM,
    "not enough memory": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}
