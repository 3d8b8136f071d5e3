"""Check the options of a group, and complete them from the environment, before ranks connect."""

from __future__ import annotations

import torch.distributed as dist

from tokenferry import env
from tokenferry.backends.base import Resolved
from tokenferry.errors import ConfigError
from tokenferry.types import BackendName, MoeShape, TimeoutPolicy, TransportName


def resolve_options(
    group: dist.ProcessGroup | None,
    shape: MoeShape,
    backend: BackendName,
    transport: TransportName,
    timeout_s: float | None,
    on_timeout: TimeoutPolicy,
) -> Resolved:
    """Check the options of a group and complete them from the environment; see `ExpertGroup`."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        got = type(group).__name__
        raise ConfigError(f"ExpertGroup: group: expected a torch.distributed.ProcessGroup or None, got {got}")
    settings = env.read()
    timeout_s = settings.timeout_s if timeout_s is None else timeout_s
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise ConfigError(f"ExpertGroup: timeout_s: expected a finite number of seconds above 0, got {timeout_s!r}")
    if on_timeout not in ("raise", "mask"):
        raise ConfigError(f'ExpertGroup: on_timeout: expected "raise" or "mask", got {on_timeout!r}')
    if transport not in ("auto", "shared_memory", "process_group"):
        raise ConfigError(
            f'ExpertGroup: transport: expected "auto", "shared_memory" or "process_group", got {transport!r}'
        )
    check_divides("ExpertGroup", shape, 1 if group is None else group.size())
    return Resolved(
        shape,
        settings.backend if backend == "auto" else backend,
        settings.transport if transport == "auto" else transport,
        float(timeout_s),
        mask_on_timeout=on_timeout == "mask",
        heap_bytes=None if settings.heap_mb is None else settings.heap_mb << 20,
        cache_folder=settings.cache_dir,
        cpu_only="" if transport == "auto" else f"transport={transport!r} is a transport of the CPU backend",
    )


def check_divides(call: str, shape: MoeShape, num_ranks: int) -> None:
    """Raise ConfigError unless ``shape`` is a MoeShape and R divides E."""
    if not isinstance(shape, MoeShape):
        raise ConfigError(f"{call}: shape: expected a MoeShape, got {type(shape).__name__}")
    if shape.num_experts % num_ranks:
        raise ConfigError(
            f"{call}: num_experts={shape.num_experts} is not a multiple of the group's {num_ranks} ranks; "
            f"use {-(-shape.num_experts // num_ranks) * num_ranks} experts, or another number of ranks"
        )
