"""Whether ranks can map each other's GPU memory; each rank's part of the answer, and one answer for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tokenferry.transports.handshake import host_name

MAX_RANKS = 8
"""More GPUs than this do not share one NVLink domain on the machines that this is made for."""
_OLDEST = (9, 0)


class Exchange(Protocol):
    """What `tokenferry.transports.handshake.Table` does."""

    def exchange(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        """Give one card to every rank, and return every rank's."""


def process_name() -> str:
    """Something that differs between the processes of a host, in containers too."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{os.getpid()} {namespace}"


def describe(device: torch.device | None) -> dict[str, Any]:
    """This rank's card: JSON values, the same keys on every rank, with or without a GPU."""
    card: dict[str, Any] = {"host": host_name(), "process": process_name(), "device": None, "trouble": ""}
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        try:
            properties = torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError) as error:  # the others shall hear of it, and not wait in vain
            return {**card, "trouble": f" that works: {error}"}
        card["device"] = {
            "name": properties.name,
            "index": device.index or 0,
            "uuid": str(properties.uuid),
            "capability": [properties.major, properties.minor],
        }
    return card


def why_not(cards: Sequence[dict[str, Any]], rank: int) -> str:
    """Why this rank cannot map the memory of all others, or nothing; local."""
    if len(cards) > MAX_RANKS:
        return f"{len(cards)} ranks are more than the {MAX_RANKS} that can share memory"
    hosts = {card["host"] for card in cards}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts"
    for peer, card in enumerate(cards):
        if card["device"] is None:
            return f"rank {peer} has no CUDA device{card['trouble']}"
        if tuple(card["device"]["capability"]) < _OLDEST:
            return (
                f"rank {peer} has a GPU of compute capability {_dotted(card['device']['capability'])} "
                f"({card['device']['name']}), and {_dotted(_OLDEST)} (Hopper) or newer is needed"
            )
    mine = cards[rank]["device"]
    here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for peer, card in enumerate(cards):
        # A device that CUDA_VISIBLE_DEVICES hides cannot be asked about; opening its memory will tell.
        other = here.get(card["device"]["uuid"])
        if other is not None and other != mine["index"] and not torch.cuda.can_device_access_peer(mine["index"], other):
            return (
                f"the GPU of rank {rank} ({mine['uuid']}) cannot reach that of rank {peer} ({card['device']['uuid']})"
            )
    return ""


def agree(table: Exchange, reason: str) -> str:
    """One rank's reason, the lowest rank's, on all ranks; nothing if no rank has one. Collective."""
    return next((card["why_not"] for card in table.exchange({"why_not": reason}) if card["why_not"]), "")


def obstacle(table: Exchange | None, rank: int, device: torch.device | None) -> str:
    """Why these ranks cannot share GPU memory, the same on all ranks; nothing if they can.

    Collective; allocates nothing. ``table`` may be None for a group of one.

    Raises:
        PeerTimeout: a rank did not come.
    """
    card = describe(device)
    if table is None:
        return why_not([card], 0)
    return agree(table, why_not(table.exchange(card), rank))


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
