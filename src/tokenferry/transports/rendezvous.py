"""Rendezvous: compare the options of all ranks of a group, agree on a transport, and connect. Collective."""

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
from tokenferry.forked import close_in_child
from tokenferry.transports.base import CallId, Deadline, Transport, peer_timeout
from tokenferry.transports.handshake import Bootstrap, host_name, moves_cpu_tensors
from tokenferry.transports.lifetime import open_process, process_numbers
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.transports.shared_memory import SharedMemoryTransport

_PREAMBLE = struct.Struct("<16sq")
"""First bytes on a new connection: the secret of the group, and the rank of the connecting process."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The result of a rendezvous.

    Attributes:
        transport: A connected transport, ready for call 1.
        key: The name of this group, the same on all ranks.
        why: The reason for choosing this transport, for the log.
    """

    transport: Transport
    key: str
    why: str


def connect(group: dist.ProcessGroup | None, wanted: str, timeout_s: float, terms: dict[str, object]) -> Agreement:
    """Compare ``terms``, choose a transport, and connect. Collective.

    Args:
        group: The process group, or None for a group of one.
        wanted: ``"shared_memory"``, ``"process_group"`` or ``"auto"``.
        timeout_s: Seconds that each wait may take.
        terms: JSON values that must be equal on all ranks, by their names in the API.

    Raises:
        ConfigError: ranks have different terms; the message names the first that differs, and each rank's value.
        BackendUnavailable: the wanted transport, or every transport, does not work; the message gives the reason.
        PeerTimeout: a rank did not answer in time.
    """
    if group is None or group.size() == 1:
        return Agreement(SharedMemoryTransport(0, {}), secrets.token_hex(4), "a group of one rank needs no transport")
    bootstrap = Bootstrap(group, timeout_s)
    listener, address = _listen()
    try:
        handshakes = bootstrap.exchange(
            {
                "terms": terms,
                "key": secrets.token_hex(4),
                "secret": secrets.token_hex(16),
                "host": host_name(),
                "address": address,
                "process": {"id": os.getpid(), "numbers": process_numbers()},
            }
        )
        compare_terms([handshake["terms"] for handshake in handshakes])
        key = handshakes[0]["key"]
        why_not = _why_not_local(handshakes, wanted)
        sockets: dict[int, socket.socket] = {}
        if not why_not:
            why_not, sockets = _try_local(group.rank(), handshakes, bootstrap)
        if not why_not and listener:
            sockets.update(_accept_higher_ranks(listener, group.rank(), handshakes, timeout_s))
            return Agreement(SharedMemoryTransport(group.rank(), sockets), key, "all ranks on one host: shared memory")
        if wanted == "shared_memory":
            raise BackendUnavailable(
                f"ExpertGroup: transport='shared_memory' cannot run: {why_not}; use transport='auto' or 'process_group'"
            )
        if not moves_cpu_tensors(group):
            raise BackendUnavailable(
                f"ExpertGroup: no transport works: {why_not}, and the process group cannot move CPU tensors; pass one "
                "made with backend 'gloo' or 'cpu:gloo,cuda:nccl'"
            )
        transport = ProcessGroupTransport(group, int(key, 16), _open_processes(group.rank(), handshakes))
        return Agreement(transport, key, f"torch.distributed, because {why_not}")
    finally:
        if listener:
            listener.close()
            if not address.startswith("\0"):
                os.unlink(address)


def _try_local(
    rank: int, handshakes: list[dict[str, Any]], bootstrap: Bootstrap
) -> tuple[str, dict[int, socket.socket]]:
    """Connect to the lower ranks, and exchange whether every rank has succeeded. Collective.

    Returns:
        tuple: The reason why a rank failed, or an empty string, and the sockets.
    """
    sockets: dict[int, socket.socket] = {}
    why_not = ""
    try:
        sockets = _connect_to_lower_ranks(rank, handshakes)
    except OSError as error:
        why_not = f"rank {rank} cannot reach a rank of its host over a Unix socket ({error})"
    reasons = [handshake["why_not"] for handshake in bootstrap.exchange({"why_not": why_not})]
    why_not = next((reason for reason in reasons if reason), "")
    if why_not:
        for sock in sockets.values():
            sock.close()
        sockets = {}
    return why_not, sockets


def compare_terms(terms: list[dict[str, Any]]) -> None:
    """Check that all ranks have the same terms.

    Raises:
        ConfigError: they differ; the message names the first term that does, and each rank's value.
    """
    for name in terms[0]:
        values = [term[name] for term in terms]
        if any(value != values[0] for value in values):
            per_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ConfigError(f"ExpertGroup: {name} differs between ranks ({per_rank}); give all ranks the same")


def _why_not_local(handshakes: list[dict[str, Any]], wanted: str) -> str:
    """Return the reason that rules out shared memory according to the handshakes, or an empty string."""
    if wanted == "process_group":
        return "transport='process_group' was asked for"
    hosts = {handshake["host"] for handshake in handshakes}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts"
    without = [rank for rank, handshake in enumerate(handshakes) if not handshake["address"]]
    return f"rank {without[0]} has no Unix sockets that pass descriptors" if without else ""


def _open_processes(rank: int, handshakes: list[dict[str, Any]]) -> dict[int, int]:
    """Return, for each other rank whose process this one can see, a descriptor of it; see `open_process`."""
    mine = handshakes[rank]
    return {
        peer: open_process(theirs["process"]["id"])
        for peer, theirs in enumerate(handshakes)
        if peer != rank
        and theirs["host"] == mine["host"]
        and theirs["process"]["numbers"] == mine["process"]["numbers"] != ""
    }


def _listen() -> tuple[socket.socket | None, str]:
    """Listen on a Unix socket, whose name is abstract on Linux and a temporary file elsewhere."""
    if not hasattr(socket, "send_fds"):
        return None, ""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    close_in_child(listener)
    name = f"tokenferry-{secrets.token_hex(8)}"
    address = f"\0{name}" if sys.platform == "linux" else os.path.join(tempfile.gettempdir(), name)
    listener.bind(address)
    listener.listen(1024)
    return listener, address


def _connect_to_lower_ranks(rank: int, handshakes: list[dict[str, Any]]) -> dict[int, socket.socket]:
    """Connect to every lower rank without waiting, since they are already listening.

    If more ranks connect than the system can queue, the connection fails at once, as for any other reason.
    """
    preamble = _PREAMBLE.pack(bytes.fromhex(handshakes[0]["secret"]), rank)
    sockets: dict[int, socket.socket] = {}
    try:
        for peer in range(rank):
            sockets[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            close_in_child(sockets[peer])
            sockets[peer].setblocking(False)
            sockets[peer].connect(handshakes[peer]["address"])
            sockets[peer].sendall(preamble)
    except OSError:
        for sock in sockets.values():
            sock.close()
        raise
    return sockets


def _accept_higher_ranks(
    listener: socket.socket, rank: int, handshakes: list[dict[str, Any]], timeout_s: float
) -> dict[int, socket.socket]:
    """Accept the connections of all higher ranks, and close any that does not send the secret."""
    deadline = Deadline(timeout_s)
    sockets: dict[int, socket.socket] = {}
    while len(sockets) < len(handshakes) - 1 - rank:
        listener.settimeout(max(deadline.left(), 0.001))
        try:
            sock, _ = listener.accept()
            close_in_child(sock)
            sock.settimeout(max(deadline.left(), 0.001))
            preamble = sock.recv(_PREAMBLE.size, socket.MSG_WAITALL)
        except TimeoutError:
            missing = [peer for peer in range(rank + 1, len(handshakes)) if peer not in sockets]
            call = CallId(0, "making the group")
            raise peer_timeout(call, rank, missing, "it did not connect", deadline.waited(), "") from None
        secret, peer = _PREAMBLE.unpack(preamble) if len(preamble) == _PREAMBLE.size else (b"", -1)
        if secret == bytes.fromhex(handshakes[0]["secret"]):
            sockets[peer] = sock
        else:
            sock.close()
    return sockets
