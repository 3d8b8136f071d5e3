"""Check the options of a group, and complete them from the environment, before ranks connect."""

from __future__ import annotations

import os
import warnings

import torch.distributed as dist

from tokenferry import env
from tokenferry.backends.base import Resolved
from tokenferry.errors import ConfigError
from tokenferry.forked import forget_in_child, owner
from tokenferry.topology import consecutive
from tokenferry.types import SIZES, BackendName, MoeShape, TimeoutPolicy, TransportName

_OF_CPUS = ("shared_memory", "process_group")
_NO_MEMBER = dist.GroupMember.NON_GROUP_MEMBER


def resolve_options(
    group: dist.ProcessGroup | None,
    shape: MoeShape,
    backend: BackendName,
    transport: TransportName,
    timeout_s: float | None,
    on_timeout: TimeoutPolicy,
    ranks_per_node: int | None = None,
) -> Resolved:
    """Check the options of a group and complete them from the environment; see `ExpertGroup`."""
    num_ranks = check_group(group)
    settings = env.read()
    timeout_s = settings.timeout_s if timeout_s is None else timeout_s
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s <= env.MAX_TIMEOUT_S:
        raise ConfigError(
            f"ExpertGroup: timeout_s: expected a number of seconds above 0, at most {env.MAX_TIMEOUT_S}, got "
            f"{timeout_s!r}"
        )
    if on_timeout not in ("raise", "mask"):
        raise ConfigError(f'ExpertGroup: on_timeout: expected "raise" or "mask", got {on_timeout!r}')
    if transport not in ("auto", *_OF_CPUS, "nvshmem"):
        raise ConfigError(
            f'ExpertGroup: transport: expected "auto", "shared_memory", "process_group" or "nvshmem", got {transport!r}'
        )
    network = settings.network if transport == "auto" else "nvshmem" if transport == "nvshmem" else "nccl"
    if network == "nvshmem" and settings.arch is not None and settings.arch.startswith("compute_"):
        asked = "transport='nvshmem'" if transport == "nvshmem" else "TOKENFERRY_NETWORK=nvshmem"
        raise ConfigError(
            f"ExpertGroup: {asked}: TOKENFERRY_ARCH={settings.arch} is PTX, and its kernels are linked with NVSHMEM, "
            "which takes machine code; name an sm_XY, or use NCCL"
        )
    check_divides("ExpertGroup", shape, num_ranks)
    if ranks_per_node is None:
        ranks_per_node = settings.ranks_per_node
    elif not isinstance(ranks_per_node, int) or isinstance(ranks_per_node, bool) or ranks_per_node < 1:
        raise ConfigError(f"ExpertGroup: ranks_per_node: expected a positive integer or None, got {ranks_per_node!r}")
    if ranks_per_node is not None:
        consecutive(num_ranks, ranks_per_node)
    if group is None:
        _warn_of_others()
    chosen = f"transport={transport!r}"
    return Resolved(
        shape,
        settings.backend if backend == "auto" else backend,
        settings.transport if transport == "auto" else transport,
        float(timeout_s),
        mask_on_timeout=on_timeout == "mask",
        heap_bytes=None if settings.heap_mb is None else settings.heap_mb << 20,
        cache_folder=settings.cache_dir,
        arch=settings.arch,
        fast_path=settings.fast_path,
        ranks_per_node=ranks_per_node,
        cpu_only=f"{chosen} is a transport of the CPU backend" if transport in _OF_CPUS else "",
        cuda_only=f"{chosen} is a transport of the CUDA backend" if transport == "nvshmem" else "",
        network=network,
    )


def check_group(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of a process group; raise ConfigError unless this process can use it."""
    if group is None:
        return 1
    if not isinstance(group, dist.ProcessGroup):
        # An int; in older versions of torch a bare object.
        if type(group) is type(_NO_MEMBER) and group == _NO_MEMBER:
            raise ConfigError(
                "ExpertGroup: group: this rank is not a member of the process group (it is GroupMember."
                "NON_GROUP_MEMBER, as new_group returns it to other ranks); make an ExpertGroup on the members only"
            )
        got = type(group).__name__
        remedy = "; pass the group first: ExpertGroup(group, shape)" if isinstance(group, MoeShape) else ""
        raise ConfigError(f"ExpertGroup: group: expected a torch.distributed.ProcessGroup or None, got {got}{remedy}")
    made_by = owner(group)
    if made_by is None:
        forget_in_child(group)
    elif made_by != os.getpid():
        raise ConfigError(
            f"ExpertGroup: group: this process group belongs to process {made_by}, from which this process "
            f"({os.getpid()}) was forked; call init_process_group in this process, or start it with 'spawn'"
        )
    return group.size()


def _warn_of_others() -> None:
    """Warn if a group of one rank was made among several processes, which is rarely meant."""
    ready = dist.is_initialized()
    num_processes = dist.get_world_size() if ready else env.world_size()
    if num_processes > 1:
        found = f"torch.distributed has {num_processes} ranks" if ready else f"WORLD_SIZE is {num_processes}"
        first = "" if ready else "call torch.distributed.init_process_group, and "
        warnings.warn(
            f"ExpertGroup: group=None makes a group of this rank alone, and {found}; {first}pass "
            "torch.distributed.group.WORLD, or, if each rank is to hold all experts, a process group of one rank",
            stacklevel=4,
        )


def check_divides(call: str, shape: MoeShape, num_ranks: int) -> None:
    """Raise ConfigError unless ``shape`` is a MoeShape and R divides E."""
    if not isinstance(shape, MoeShape):
        is_group = isinstance(shape, dist.ProcessGroup)
        remedy = "the group first: ExpertGroup(group, shape)" if is_group else f"MoeShape({', '.join(SIZES)})"
        raise ConfigError(f"{call}: shape: expected a MoeShape, got {type(shape).__name__}; pass {remedy}")
    if shape.num_experts % num_ranks:
        raise ConfigError(
            f"{call}: num_experts={shape.num_experts} is not a multiple of the group's {num_ranks} ranks; "
            f"use {-(-shape.num_experts // num_ranks) * num_ranks} experts, or another number of ranks"
        )
