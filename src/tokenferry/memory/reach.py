"""Checks whether ranks can map each other's GPU memory, and over which links."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from tokenferry.errors import BackendUnavailable
from tokenferry.jit.driver import has_peer_atomics
from tokenferry.jit.source import OLDEST
from tokenferry.transports.handshake import host_name, pid_namespace

MAX_RANKS = 8
"""The largest number of GPUs that share memory."""
_OLDEST = divmod(OLDEST, 10)


def process_name() -> str:
    """Return a name that is unique to this process on its host, even in containers."""
    return f"{os.getpid()} {pid_namespace()}"


def describe(device: torch.device | None) -> dict[str, Any]:
    """Return this rank's handshake: JSON values, with the same keys on every rank, with or without a GPU."""
    handshake: dict[str, Any] = {"host": host_name(), "process": process_name(), "device": None, "trouble": ""}
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        try:
            properties = torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError) as error:  # sent to the others, which would otherwise wait
            return {**handshake, "trouble": f" that works: {error}"}
        handshake["device"] = {
            "name": properties.name,
            "index": device.index or 0,
            "uuid": str(properties.uuid),
            "capability": [properties.major, properties.minor],
        }
    return handshake


def why_not(handshakes: Sequence[dict[str, Any]], rank: int, node: Sequence[int] | None = None) -> str:
    """Return the reason why this rank cannot map the memory of all others of its node, or an empty string. Local.

    Args:
        handshakes: Those of all ranks.
        rank: This rank.
        node: The ranks of its node; None: all.
    """
    ranks = range(len(handshakes)) if node is None else node
    if len(ranks) > MAX_RANKS:
        return f"{len(ranks)} ranks are more than the {MAX_RANKS} that can share memory"
    for peer in ranks:  # first, since a rank without descriptors does not know its host
        if handshakes[peer]["trouble"]:
            return f"rank {peer} has no CUDA device{handshakes[peer]['trouble']}"
    hosts = {handshakes[peer]["host"] for peer in ranks}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts"
    for peer in ranks:
        handshake = handshakes[peer]
        if handshake["device"] is None:
            return f"rank {peer} has no CUDA device"
        if tuple(handshake["device"]["capability"]) < _OLDEST:
            return (
                f"rank {peer} has a GPU of compute capability {_dotted(handshake['device']['capability'])} "
                f"({handshake['device']['name']}), and {_dotted(_OLDEST)} (Ampere) or newer is needed"
            )
    return unreachable(handshakes, rank, ranks)


def unreachable(handshakes: Sequence[dict[str, Any]], rank: int, node: Sequence[int]) -> str:
    """Return which GPU of the node that of this rank cannot map, or an empty string. Local.

    Args:
        handshakes: Those of all ranks.
        rank: This rank.
        node: The ranks of its node.
    """
    if any(handshakes[peer]["device"] is None for peer in (rank, *node)):
        return ""
    mine = handshakes[rank]["device"]
    for peer, other in _visible(handshakes, node).items():
        if other != mine["index"] and not torch.cuda.can_device_access_peer(mine["index"], other):
            uuid = handshakes[peer]["device"]["uuid"]
            return f"the GPU of rank {rank} ({mine['uuid']}) cannot reach that of rank {peer} ({uuid})"
    return ""


def has_atomics(handshakes: Sequence[dict[str, Any]], rank: int, node: Sequence[int]) -> bool:
    """Return whether atomics on the memory of all others of the node are known to be atomic, as over NVLink. Local.

    Args:
        handshakes: Those of all ranks.
        rank: This rank.
        node: The ranks of its node, whose memory it can map.
    """
    mine, visible = handshakes[rank]["device"]["index"], _visible(handshakes, node)
    if len(visible) < len(node):
        return False
    try:
        return all(other == mine or has_peer_atomics(mine, other) for other in visible.values())
    except BackendUnavailable:
        return False


def _visible(handshakes: Sequence[dict[str, Any]], node: Sequence[int]) -> dict[int, int]:
    """Return the index here of the GPU of each rank; without those that CUDA_VISIBLE_DEVICES hides.

    A hidden GPU cannot be queried; opening its memory shows whether it is reachable.
    """
    here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    uuids = {peer: handshakes[peer]["device"]["uuid"] for peer in node}
    return {peer: here[uuid] for peer, uuid in uuids.items() if uuid in here}


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
