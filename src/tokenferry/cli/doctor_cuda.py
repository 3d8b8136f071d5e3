"""The doctor's part about GPUs: what is there, what is missing, and whether backend cuda runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tokenferry import env
from tokenferry.cli.finding import Finding, tried
from tokenferry.errors import BackendUnavailable, ConfigError

OLDEST = (9, 0)


def findings(alone: Callable[[], str], on_ranks: Callable[[], str]) -> Iterator[Finding]:
    """Look at one thing after the other.

    Args:
        alone: Makes a round trip on one GPU, without other ranks.
        on_ranks: Makes it over two ranks that own GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield tried("cuda driver", _driver, "install an NVIDIA driver, and a torch that is built for CUDA")
    yield tried("cuda GPUs", lambda: _gpus(count), f"backend cuda needs compute capability {_dotted(OLDEST)} or newer")
    if count > 1:
        yield tried("cuda peer access", lambda: _peers(count), "ranks on GPUs that cannot reach each other use the CPU")
    yield tried("cuda-bindings", _bindings, "pip install 'cuda-bindings==13.*'")
    yield tried("NVRTC", _nvrtc, "CUDA builds of torch bring it; or pip install nvidia-cuda-nvrtc")
    yield tried("kernel cache", _cache, "kernels are compiled anew in each process; set TOKENFERRY_CACHE_DIR")
    one = tried("backend cuda", alone, "")
    yield one
    if one.good:
        shared = "" if count > 1 else ", both on one GPU"
        yield tried("backend cuda, ranks", lambda: f"{on_ranks()}{shared}", "see the lines about cuda above")


def _driver() -> str:
    if torch.version.cuda is None:
        raise BackendUnavailable(f"this torch ({torch.__version__}) is built without CUDA")
    from tokenferry.jit.driver import bindings, check

    number = int(check(bindings().cuDriverGetVersion(), "asking for the version of the driver"))
    return f"CUDA {number // 1000}.{number % 1000 // 10}; torch is built for CUDA {torch.version.cuda}"


def _gpus(count: int) -> str:
    if not count:
        raise BackendUnavailable("torch sees none")
    seen: dict[str, list[int]] = {}
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        capability = (about.major, about.minor)
        line = f"{about.name}, {about.total_memory >> 30} GiB, compute capability {_dotted(capability)}"
        seen.setdefault(line, []).append(index)
        if capability < OLDEST:
            raise BackendUnavailable(f"GPU {index} is a {line}")
    return "; ".join(f"{', '.join(map(str, which))}: {line}" for line, which in seen.items())


def _peers(count: int) -> str:
    apart = [
        f"{one} -> {other}"
        for one in range(count)
        for other in range(count)
        if one != other and not torch.cuda.can_device_access_peer(one, other)
    ]
    if apart:
        raise BackendUnavailable(f"{len(apart)} of {count * (count - 1)} directions are closed: {', '.join(apart)}")
    return f"each of {count} GPUs reaches every other"


def _bindings() -> str:
    try:
        return version("cuda-bindings")
    except PackageNotFoundError:
        raise BackendUnavailable("not installed") from None


def _nvrtc() -> str:
    from tokenferry.jit.compiler import version as nvrtc_version

    return nvrtc_version()


def _cache() -> str:
    folder = Path(env.read().cache_dir)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{folder} cannot be written to ({there} is not ours)")
    return str(folder)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
