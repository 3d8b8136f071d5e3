"""The group of a buffer of any dialect, made as its arguments and DeepEP's environment variables ask."""

from __future__ import annotations

import logging
import weakref
from typing import NamedTuple

import torch.distributed as dist

from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.compat.deep_ep.wording import Field, put_term
from tokenferry.errors import BackendUnavailable, ConfigError, UnsupportedError

_log = logging.getLogger("tokenferry")


LEAST_HEAP_BYTES = 2 << 30
"""GPU memory for rows of a buffer that asks for less: T and H are not known before the calls."""


DEFAULT_QUEUE_PAIRS = 24
"""``num_qps_per_rank`` of a caller that asks for nothing."""


class NvshmemNeeds(NamedTuple):
    """What a buffer needs of NVSHMEM for low-latency calls, with TOKENFERRY_NETWORK=nvshmem.

    Attributes:
        num_bytes: Memory that other nodes put them into.
        queue_pairs: Queue pairs between two ranks.
        nvlink: Whether they may use NVLink.
    """

    num_bytes: int
    queue_pairs: int = DEFAULT_QUEUE_PAIRS
    nvlink: bool = True


def closing(owner: object, experts: ExpertGroup) -> weakref.finalize[[], object]:
    """Return what closes the group of a buffer, also when the buffer is collected; not at exit, when the process does.

    It is local, so that it is safe wherever the collector runs.
    """
    found = weakref.finalize(owner, experts.close)
    found.atexit = False
    return found


_NVSHMEM_BYTES = {"bytes for puts": Field("num_rdma_bytes")}
_SIZES = {"heap bytes": Field("num_bytes, or the memory for the sizes that were given,")}
_TERMS = {
    "Buffer": {
        "on_timeout": Field("enable_shrink", {"mask": "True", "raise": "False"}),
        "heap bytes": Field("the larger of num_nvl_bytes and num_rdma_bytes"),
        **_NVSHMEM_BYTES,
    },
    "ElasticBuffer": _SIZES,
    "EPBuffer": _SIZES,
    "HybridEPBuffer": {"heap bytes": Field("the memory for hidden_dim and max_num_of_tokens_per_rank")},
}
"""What the ranks of a group compare, by the class that makes it, in the words of its arguments."""


def connect(
    owner: str,
    group: dist.ProcessGroup | None,
    *,
    heap_bytes: int,
    timeout_s: float | None = None,
    enable_shrink: bool = False,
    puts: NvshmemNeeds | None = None,
    service_level: int | None = None,
) -> ExpertGroup:
    """Make the group of a buffer. Collective.

    Args:
        owner: The name of its class, for messages.
        group: The process group, or None for one rank.
        heap_bytes: GPU memory for rows, unless TOKENFERRY_HEAP_MB is set.
        timeout_s: Seconds that any wait for a peer may take; None: TOKENFERRY_TIMEOUT_S.
        enable_shrink: Mask a rank that does not answer in time.
        puts: What it asks of low-latency calls over NVSHMEM; None: nothing.
        service_level: The priority on the network that the program asks for; None: any.

    Raises:
        UnsupportedError: ranks of this group cannot be masked; a variable or ``service_level`` asks for what cannot be
            honoured; what the buffer asks of NVSHMEM contradicts its variables.
        ConfigError: a variable cannot be parsed.
        BackendUnavailable, PeerTimeout: as `ExpertGroup`.
    """
    settings = env.read_deep_ep()
    try:
        made = ExpertGroup._with_heap(
            group,
            heap_bytes=heap_bytes,
            timeout_s=timeout_s,
            cache_folder=settings.cache_dir,
            on_timeout="mask" if enable_shrink else "raise",
            put_bytes=None if puts is None else puts.num_bytes,
        )
    except ConfigError as error:
        put_term(error, owner, _TERMS[owner])
        raise
    except BackendUnavailable as error:
        if "on_timeout='mask'" not in str(error):
            put_term(error, owner, {})
            raise
        raise UnsupportedError(
            f"{owner}: enable_shrink: ranks can be skipped where all are on one node, on CPUs one host, or over "
            f"NVSHMEM; this group cannot: {error}; pass enable_shrink=False, or on GPUs set TOKENFERRY_NETWORK=nvshmem"
        ) from error
    try:
        _check_network(owner, made, settings)
        _check_service_level(owner, made, settings, service_level)
        if puts is not None:
            _check_puts(owner, made, settings, puts)
    except UnsupportedError:
        made.close()
        raise
    if settings.buffer_debug:
        ranks, where = f"rank {made.rank} of {made.num_ranks}", made.topology
        # A warning, so that it is seen without any set-up, as what DeepEP prints is.
        _log.warning(
            "EP_BUFFER_DEBUG: %s: %s, backend %s, transport %s, %s: %s",
            *(owner, ranks, made.backend, made.transport, where, where.found),
        )
    return made


def _check_network(owner: str, group: ExpertGroup, settings: env.DeepEpSettings) -> None:
    """Refuse variables that choose a part of the network, if the group uses one: its library would not see them."""
    if group.topology.num_nodes == 1:
        return
    unseen = settings.network
    if "nvshmem" in group.transport:  # it reads its own variables, but NCCL, for the other calls, does not
        unseen = tuple(name for name in unseen if not name.startswith("NVSHMEM_") or name not in settings.set_for_nccl)
    if not unseen:
        return
    names = ", ".join(f"{name} ({env.DEEP_EP_NETWORK[name]} of NCCL)" for name in unseen)
    raise UnsupportedError(
        f"{owner}: the environment has {names}: DeepEP would choose what of the network it uses by them, and "
        f"transport {group.transport} between {group.topology} does not; unset them, and set those of NCCL, or for "
        "gloo GLOO_SOCKET_IFNAME"
    )


def _check_service_level(
    owner: str, group: ExpertGroup, settings: env.DeepEpSettings, service_level: int | None
) -> None:
    """Refuse a service level, if the group uses a network that does not get it."""
    if service_level is None or group.topology.num_nodes == 1:
        return
    configured = settings.nccl_service_level
    if "nccl" in group.transport and configured == str(service_level):
        return
    raise UnsupportedError(
        f"{owner}: sl_idx={service_level}: transport {group.transport} between {group.topology} does not take it; "
        f"leave it out, or with NCCL set NCCL_IB_SL={service_level} on all ranks (it is {configured or 'not set'})"
    )


def _check_puts(owner: str, group: ExpertGroup, settings: env.DeepEpSettings, puts: NvshmemNeeds) -> None:
    """Refuse what NVSHMEM would not do: it reads its variables, which DeepEP sets, and nothing here does."""
    if "nvshmem" not in group.transport:
        return
    if not puts.nvlink and not settings.no_p2p:
        raise UnsupportedError(
            f"{owner}: allow_nvlink_for_low_latency_mode=False: NVSHMEM maps memory of other nodes where NVLink "
            f"reaches it; set {env.NO_P2P}=1, which keeps it from that, as DeepEP does, or pass True. Inside a node "
            "rows take NVLink in any case"
        )
    if puts.queue_pairs == DEFAULT_QUEUE_PAIRS:
        return
    asked = f"{owner}: num_qps_per_rank={puts.queue_pairs}"
    if not settings.queue_pairs:
        _log.warning("%s: NVSHMEM takes a number of its own; set %s to choose one", asked, env.QUEUE_PAIRS)
    elif settings.queue_pairs.strip() != str(puts.queue_pairs):
        raise UnsupportedError(
            f"{asked}: {env.QUEUE_PAIRS}={settings.queue_pairs} says how many queue pairs NVSHMEM makes; set it to "
            f"{puts.queue_pairs}, unset it, or pass {settings.queue_pairs}"
        )
