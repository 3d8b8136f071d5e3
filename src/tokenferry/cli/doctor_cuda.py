"""Checks of the doctor for GPUs: driver, devices, packages, and whether backend cuda runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tokenferry import env
from tokenferry.cli.explain import LINKS
from tokenferry.cli.finding import Finding, run_check
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.jit.driver import has_peer_atomics
from tokenferry.jit.source import OLDEST

MIN_CAPABILITY = divmod(OLDEST, 10)
PCIE = (
    f"PCIe, which carries less than {LINKS['pcie4'].gbps:g} GB/s for each GPU (4.0 x16) or {LINKS['pcie5'].gbps:g} "
    "GB/s (5.0 x16): `tokenferry explain --gbps pcie4` or pcie5 says what to expect"
)


def findings(alone: Callable[[], str], on_ranks: Callable[[], str]) -> Iterator[Finding]:
    """Run all checks in turn, but none whose answer follows from one that failed.

    Args:
        alone: Makes a round trip on one GPU, without other ranks.
        on_ranks: Makes a round trip over two ranks on GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capability = f"backend cuda needs compute capability {_dotted(MIN_CAPABILITY)} or newer"
    needed = (
        ("cuda torch", _build, "backend cuda needs a build for CUDA 13"),
        ("cuda bindings", _bindings, "pip install 'cuda-bindings==13.*'"),
        ("cuda driver", _driver, "install an NVIDIA driver"),
        ("cuda GPUs", lambda: _gpus(count), capability),
        ("NVRTC", _nvrtc, "CUDA builds of torch include it; or pip install nvidia-cuda-nvrtc"),
    )
    for name, attempt, remedy in needed:
        finding = run_check(name, attempt, remedy)
        yield finding
        if not finding.passed:
            return
    yield run_check("kernel cache", _cache, "each process compiles all kernels again; set TOKENFERRY_CACHE_DIR")
    single = run_check("backend cuda", alone, "")
    yield single
    if count > 1:
        peers = run_check(
            "cuda peer access",
            lambda: _peers(count),
            "ranks on GPUs without access to each other are nodes of their own, connected by NCCL, or use backend cpu",
        )
        yield peers
        single = single if peers.passed else peers
    if single.passed:
        shared = "" if count > 1 else ", both on one GPU"
        yield run_check("backend cuda, ranks", lambda: f"{on_ranks()}{shared}", "see the lines about cuda above")


def _build() -> str:
    if torch.version.cuda is None:
        raise BackendUnavailable(f"this torch ({torch.__version__}) is built without CUDA")
    return f"built for CUDA {torch.version.cuda}"


def _driver() -> str:
    from tokenferry.jit.driver import bindings, check

    number = int(check(bindings().cuDriverGetVersion(), "querying the version of the driver"))
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _gpus(count: int) -> str:
    if not count:
        raise BackendUnavailable("torch sees no GPU")
    by_model: dict[str, list[int]] = {}
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        line = f"{properties.name}, {properties.total_memory >> 30} GiB, compute capability {_dotted(capability)}"
        by_model.setdefault(line, []).append(index)
        if capability < MIN_CAPABILITY:
            raise BackendUnavailable(f"GPU {index} is a {line}")
    return "; ".join(f"{', '.join(map(str, which))}: {line}" for line, which in by_model.items())


def _peers(count: int) -> str:
    missing = [
        f"{one} -> {other}"
        for one in range(count)
        for other in range(count)
        if one != other and not torch.cuda.can_device_access_peer(one, other)
    ]
    if missing:
        raise BackendUnavailable(
            f"{len(missing)} of {count * (count - 1)} directions have no access: {', '.join(missing)}"
        )
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    slow = [f"{one} -> {other}" for one, other in pairs if not has_peer_atomics(one, other)]
    if not slow:
        links = "NVLink"
    elif len(slow) == len(pairs):
        links = PCIE
    else:
        links = f"NVLink, but for {', '.join(slow)}: {PCIE}"
    return f"each of {count} GPUs can access every other; links: {links}; `tokenferry limits` measures them"


def _bindings() -> str:
    try:
        return version("cuda-bindings")
    except PackageNotFoundError:
        raise BackendUnavailable("not installed") from None


def _nvrtc() -> str:
    from tokenferry.jit.compiler import version as nvrtc_version

    return nvrtc_version()


def _cache() -> str:
    from tokenferry.jit import cache

    folder = Path(env.read().cache_dir)
    why = cache.refusal(folder)
    if why is not None:
        raise ConfigError(why)
    return f"{folder} can be written"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
