"""Rendezvous: R ranks compare what they were asked for, and agree on a transport. Collective."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.transports.base import CallId, Deadline, Transport, peer_timeout
from tokenferry.transports.handshake import Table, moves_cpu_tensors
from tokenferry.transports.handshake import host_name as _host
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.transports.shared_memory import SharedMemoryTransport

_HELLO = struct.Struct("<16sq")
"""The group's secret and the caller's rank."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the ranks agreed on.

    Attributes:
        transport: Ready for call 1.
        key: Names this group, the same on all ranks.
        why: Why this transport, for the log.
    """

    transport: Transport
    key: str
    why: str


def meet(group: dist.ProcessGroup | None, wanted: str, timeout_s: float, terms: dict[str, object]) -> Agreement:
    """Compare ``terms``, choose a transport, connect.

    Args:
        group: The process group, or None for a group of one.
        wanted: ``"shared_memory"``, ``"process_group"`` or ``"auto"``.
        timeout_s: Seconds that each wait may take.
        terms: JSON values that must be equal on all ranks, by the names that users know them by.

    Raises:
        ConfigError: ranks brought different terms; names the first that differs, and each rank's value.
        BackendUnavailable: ``"shared_memory"`` was asked for and does not work; says why.
        PeerTimeout: a rank did not come.
    """
    if group is None or group.size() == 1:
        return Agreement(SharedMemoryTransport(0, {}), secrets.token_hex(4), "a group of one rank needs no transport")
    table = Table(group, timeout_s)
    listener, address = _listen()
    try:
        handshakes = table.exchange(
            {
                "terms": terms,
                "key": secrets.token_hex(4),
                "secret": secrets.token_hex(16),
                "host": _host(),
                "address": address,
            }
        )
        compare_terms([handshake["terms"] for handshake in handshakes])
        key = handshakes[0]["key"]
        why_not = _why_not_local(handshakes, wanted)
        sockets: dict[int, socket.socket] = {}
        if not why_not:
            why_not, sockets = _try_local(group.rank(), handshakes, table)
        if not why_not and listener:
            sockets.update(_accept_higher_ranks(listener, group.rank(), handshakes, timeout_s))
            return Agreement(SharedMemoryTransport(group.rank(), sockets), key, "all ranks on one host: shared memory")
        if wanted == "shared_memory":
            raise BackendUnavailable(
                f"ExpertGroup: transport='shared_memory' cannot run: {why_not}; use transport='auto' or 'process_group'"
            )
        if not moves_cpu_tensors(group):
            raise BackendUnavailable(
                f"ExpertGroup: nothing can carry rows: {why_not}, and the process group cannot move CPU tensors; pass "
                "one made with backend 'gloo' or 'cpu:gloo,cuda:nccl'"
            )
        return Agreement(ProcessGroupTransport(group, int(key, 16)), key, f"torch.distributed, because {why_not}")
    finally:
        if listener:
            listener.close()
            if not address.startswith("\0"):
                os.unlink(address)


def _try_local(rank: int, handshakes: list[dict[str, Any]], table: Table) -> tuple[str, dict[int, socket.socket]]:
    """Connect to the lower ranks, and hear whether every rank could; returns why not, or nothing, and the sockets."""
    sockets: dict[int, socket.socket] = {}
    why_not = ""
    try:
        sockets = _call_lower_ranks(rank, handshakes)
    except OSError as error:
        why_not = f"rank {rank} cannot reach a rank of its host over a Unix socket ({error})"
    reasons = [handshake["why_not"] for handshake in table.exchange({"why_not": why_not})]
    why_not = next((reason for reason in reasons if reason), "")
    if why_not:
        for sock in sockets.values():
            sock.close()
        sockets = {}
    return why_not, sockets


def compare_terms(terms: list[dict[str, Any]]) -> None:
    """Raise ConfigError if ranks brought different terms; names the first, and what each rank brought."""
    for name in terms[0]:
        values = [term[name] for term in terms]
        if any(value != values[0] for value in values):
            brought = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ConfigError(f"ExpertGroup: {name} differs between ranks ({brought}); give all ranks the same")


def _why_not_local(handshakes: list[dict[str, Any]], wanted: str) -> str:
    """The reason against shared memory that can be seen without trying, or nothing."""
    if wanted == "process_group":
        return "transport='process_group' was asked for"
    hosts = {handshake["host"] for handshake in handshakes}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts"
    without = [rank for rank, handshake in enumerate(handshakes) if not handshake["address"]]
    return f"rank {without[0]} has no Unix sockets that pass descriptors" if without else ""


def _listen() -> tuple[socket.socket | None, str]:
    """Listen on a Unix socket; on Linux its name is no file, elsewhere it is one for a moment."""
    if not hasattr(socket, "send_fds"):
        return None, ""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name = f"tokenferry-{secrets.token_hex(8)}"
    address = f"\0{name}" if sys.platform == "linux" else os.path.join(tempfile.gettempdir(), name)
    listener.bind(address)
    listener.listen(1024)
    return listener, address


def _call_lower_ranks(rank: int, handshakes: list[dict[str, Any]]) -> dict[int, socket.socket]:
    """Connect to every lower rank; they listen already, so this waits for nobody.

    Nor does it wait where more ranks call than a system lets queue: such a call fails at once, as any other reason.
    """
    hello = _HELLO.pack(bytes.fromhex(handshakes[0]["secret"]), rank)
    sockets: dict[int, socket.socket] = {}
    try:
        for peer in range(rank):
            sockets[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sockets[peer].setblocking(False)
            sockets[peer].connect(handshakes[peer]["address"])
            sockets[peer].sendall(hello)
    except OSError:
        for sock in sockets.values():
            sock.close()
        raise
    return sockets


def _accept_higher_ranks(
    listener: socket.socket, rank: int, handshakes: list[dict[str, Any]], timeout_s: float
) -> dict[int, socket.socket]:
    """Accept the ranks above, all of which have connected; a stranger, who lacks the secret, is turned away."""
    deadline = Deadline(timeout_s)
    sockets: dict[int, socket.socket] = {}
    while len(sockets) < len(handshakes) - 1 - rank:
        listener.settimeout(max(deadline.left(), 0.001))
        try:
            sock, _ = listener.accept()
            sock.settimeout(max(deadline.left(), 0.001))
            hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
        except TimeoutError:
            missing = [peer for peer in range(rank + 1, len(handshakes)) if peer not in sockets]
            call = CallId(0, "making the group")
            raise peer_timeout(call, rank, missing, "it did not connect", deadline.waited(), "") from None
        secret, peer = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
        if secret == bytes.fromhex(handshakes[0]["secret"]):
            sockets[peer] = sock
        else:
            sock.close()
    return sockets
