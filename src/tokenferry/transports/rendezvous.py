"""Rendezvous: compare the options of all ranks of a group, agree on a transport, and connect. Collective."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tokenferry.errors import BackendUnavailable
from tokenferry.forked import close_in_child
from tokenferry.topology import Topology, by_place, consecutive
from tokenferry.transports import segment
from tokenferry.transports.base import Deadline, Transport
from tokenferry.transports.failures import FailureReports
from tokenferry.transports.handshake import (
    Bootstrap,
    agree,
    compare_terms,
    host_name,
    moves_cpu_tensors,
    network_namespace,
    pid_namespace,
)
from tokenferry.transports.lifetime import open_process, process_and_user
from tokenferry.transports.mixed import MixedTransport
from tokenferry.transports.process_group import GROUP_IDS, ProcessGroupTransport
from tokenferry.transports.refused import resource_error
from tokenferry.transports.shared_memory import SharedMemoryTransport
from tokenferry.transports.store import ask

_PREAMBLE = struct.Struct("<16sq")
"""First bytes on a new connection: the secret of the group, and the rank of the connecting process."""
_ACCEPT_S = 5.0
"""Seconds to turn away strangers, who may come without end. The ranks have connected before."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The result of a rendezvous.

    Attributes:
        transport: A connected transport, ready for call 1.
        topology: The nodes of the group.
        key: The name of this group, the same on all ranks.
        why: The reason for choosing this transport, for the log.
        reports: With several nodes: where ranks that give up say why.
    """

    transport: Transport
    topology: Topology
    key: str
    why: str
    reports: FailureReports | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options of a group ask for.

    Attributes:
        transport: ``"shared_memory"``, ``"process_group"`` or ``"auto"``.
        ranks_per_node: Consecutive ranks that form a node; None: the ranks of a host do.
        masks: Whether ranks are to be masked on a timeout, after which no message passes through a process group.
    """

    transport: str
    ranks_per_node: int | None
    masks: bool = False


def connect(group: dist.ProcessGroup | None, wanted: Wanted, timeout_s: float, terms: dict[str, object]) -> Agreement:
    """Compare ``terms``, find the nodes, choose a transport, and connect. Collective.

    Args:
        group: The process group, or None for a group of one.
        wanted: What the options ask for; the same on all ranks, as ``terms`` has to ensure.
        timeout_s: Seconds that each wait may take.
        terms: JSON values that must be equal on all ranks, by their names in the API.

    Raises:
        ConfigError: ranks have different terms; the message names the first that differs, and each rank's value.
        BackendUnavailable: the wanted transport, or every transport, does not work; the message gives the reason.
        PeerTimeout: a rank did not answer in time.
    """
    if group is None or group.size() == 1:
        alone = SharedMemoryTransport(0, {})
        topology = Topology(0, ((0,),), "a group of one rank")
        return Agreement(alone, topology, secrets.token_hex(4), "a group of one rank needs no transport")
    rank, bootstrap = group.rank(), Bootstrap(group, timeout_s)
    with _Listener() as listener:
        handshakes = bootstrap.exchange(
            {
                "terms": terms,
                "key": secrets.token_hex(4),
                "group_id": new_group_id(group) if rank == 0 else 0,
                "secret": secrets.token_hex(16),
                "host": host_name(),
                "network": network_namespace(),
                "user": user(),
                "address": listener.address,
                "why_not": "" if wanted.transport == "process_group" else listener.why_not or segment.why_not(),
                "process": {"id": os.getpid(), "namespace": pid_namespace()},
            }
        )
        compare_terms(handshakes)
        key = handshakes[0]["key"]
        topology = _find_nodes(rank, handshakes, wanted)
        nodes = topology.nodes
        reports = FailureReports(group, handshakes[0]["group_id"], topology) if len(nodes) > 1 else None
        by_node = wanted.transport == "auto" and not wanted.masks
        near = nodes if by_node else (tuple(range(len(handshakes))),)
        why_not = _why_not_near(handshakes, wanted, near)
        sockets: dict[int, socket.socket] = {}
        if not why_not:
            mine = near[topology.node] if len(near) > 1 else near[0]
            why_not, sockets = _connect_all(rank, mine, handshakes, listener, bootstrap)
        if not why_not and len(near) == 1:
            transport: Transport = SharedMemoryTransport(rank, sockets)
            return Agreement(transport, topology, key, f"{_everybody(topology)} on one host: shared memory", reports)
    if wanted.transport == "shared_memory":
        raise BackendUnavailable(
            f"ExpertGroup: transport='shared_memory' cannot run: {why_not}; use transport='auto' or 'process_group'"
        )
    if not moves_cpu_tensors(group):
        _close(sockets)
        raise BackendUnavailable(
            f"ExpertGroup: no transport works: {why_not or _across(topology)}, and the process group cannot move CPU "
            "tensors; pass one made with backend 'gloo' or 'cpu:gloo,cuda:nccl'"
        )
    far = ProcessGroupTransport(group, handshakes[0]["group_id"], _open_processes(rank, handshakes))
    if not sockets:
        why = f"torch.distributed, because {why_not or _across(topology)}"
        return Agreement(far, topology, key, why, reports)
    transport = MixedTransport(SharedMemoryTransport(rank, sockets, len(handshakes)), far, [rank, *sockets])
    why = f"{_across(topology)}: shared memory inside, torch.distributed between"
    return Agreement(transport, topology, key, why, reports)


def _find_nodes(rank: int, handshakes: list[dict[str, Any]], wanted: Wanted) -> Topology:
    """Return the nodes: the ranks of each host form one, if hosts have equally many, else all ranks do."""
    everybody = (tuple(range(len(handshakes))),)
    if wanted.ranks_per_node is not None:
        nodes = consecutive(len(handshakes), wanted.ranks_per_node)
        return Topology(rank, nodes, f"ranks_per_node={wanted.ranks_per_node}")
    hosts = by_place([_place(handshake) for handshake in handshakes])
    if len(hosts) == 1:
        return Topology(rank, hosts, "all ranks are on one host")
    if wanted.transport != "auto":
        return Topology(rank, everybody, f"transport={wanted.transport!r} takes all ranks as one node")
    sizes = [len(ranks) for ranks in hosts]
    if len(set(sizes)) > 1:
        found = (
            f"the {len(hosts)} hosts have {', '.join(map(str, sizes))} ranks; with equally many each would be a node"
        )
        return Topology(rank, everybody, found)
    return Topology(rank, hosts, "each host is a node")


def _place(handshake: dict[str, Any]) -> str:
    """Return what ranks have in common that reach each other's Unix sockets."""
    return f"{handshake['host']} {handshake['network']}"


def _everybody(topology: Topology) -> str:
    return "all ranks" if topology.num_nodes == 1 else f"the ranks of all {topology}"


def _across(topology: Topology) -> str:
    return f"the group has {topology}"


def new_group_id(group: dist.ProcessGroup) -> int:
    """Return a number that no earlier group has on a process group, where its messages may still be under way."""
    answers = ask(lambda: int(group.get_group_store().add("tokenferry/groups", 1)))
    return answers[0] if answers else secrets.randbelow(GROUP_IDS)


def user() -> int:
    """Return the number of the user whose rights this process has, or -1 where there is none."""
    return os.geteuid() if hasattr(os, "geteuid") else -1


def _why_not_near(handshakes: list[dict[str, Any]], wanted: Wanted, near: Sequence[Sequence[int]]) -> str:
    """Return the reason that rules out shared memory according to the handshakes, or an empty string.

    Args:
        handshakes: By rank.
        wanted: What the options ask for.
        near: The ranks that are to share memory, one sequence for each node.
    """
    if wanted.transport == "process_group":
        return "transport='process_group' was asked for"
    for rank, handshake in enumerate(handshakes):  # first, since a rank without descriptors does not know its host
        if handshake["why_not"]:
            return f"rank {rank}: {handshake['why_not']}"
    for ranks in near:
        who = "the ranks" if len(near) == 1 else f"ranks {', '.join(map(str, ranks))}, one node,"
        places = {_place(handshakes[rank]) for rank in ranks}
        if len(places) > 1:
            return f"{who} are on {len(places)} hosts"
        users = {handshakes[rank]["user"] for rank in ranks}
        if len(users) > 1:
            return f"{who} belong to {len(users)} users"
    return ""


def _open_processes(rank: int, handshakes: list[dict[str, Any]]) -> dict[int, int]:
    """Return, for each other rank whose process this one can see, a descriptor of it; see `open_process`."""
    mine = handshakes[rank]
    return {
        peer: open_process(theirs["process"]["id"])
        for peer, theirs in enumerate(handshakes)
        if peer != rank
        and theirs["host"] == mine["host"]
        and theirs["process"]["namespace"] == mine["process"]["namespace"] != ""
    }


class _Listener:
    """A Unix socket that listens for the higher ranks; a context manager, which closes it.

    Its name is abstract on Linux and a temporary file elsewhere.

    Attributes:
        address: The name.
        why_not: Why there is no such socket, or an empty string.
    """

    def __init__(self) -> None:
        self.address = ""
        self.why_not = ""
        self._socket: socket.socket | None = None

    def __enter__(self) -> _Listener:
        try:
            self._listen()
        except (OSError, AttributeError) as error:  # there is no AF_UNIX on Windows
            self.__exit__()
            self.why_not = _reason("cannot listen on a Unix socket", error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        if self.address and not self.address.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address)
        self.address = ""

    def _listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        close_in_child(self._socket)
        self._socket.setblocking(False)
        name = f"tokenferry-{secrets.token_hex(8)}"
        address = f"\0{name}" if sys.platform == "linux" else os.path.join(tempfile.gettempdir(), name)
        self._socket.bind(address)
        self.address = address
        self._socket.listen(1024)

    def accept(self, missing: set[int], secret: bytes, sockets: dict[int, socket.socket]) -> None:
        """Accept the ranks in ``missing``, which have connected and sent their preambles; waits for nothing.

        Connections of strangers are closed: those of another user, and those that have not sent the secret of the group
        and the number of a rank that is missing.

        Raises:
            OSError: there is a connection that the system refuses to accept, such as for want of descriptors.
        """
        assert self._socket is not None
        deadline = Deadline(_ACCEPT_S)
        with contextlib.suppress(BlockingIOError):  # no connection is left
            while missing and deadline.left():
                sock, _ = self._socket.accept()
                close_in_child(sock)
                peer = _peer_behind(sock, secret)
                if peer in missing:
                    missing.remove(peer)
                    sockets[peer] = sock
                else:
                    sock.close()


def _connect_all(
    rank: int, near: Sequence[int], handshakes: list[dict[str, Any]], listener: _Listener, bootstrap: Bootstrap
) -> tuple[str, dict[int, socket.socket]]:
    """Connect to all other ranks in ``near``. Collective: all ranks of the group call it.

    Every rank connects to the lower ones, and accepts the higher ones only when all have connected. So it never waits
    for a connection, and a stranger that connects and says nothing delays nobody.

    Returns:
        tuple: The reason why any rank has failed, the same on all ranks, or an empty string; and the sockets.
    """
    sockets: dict[int, socket.socket] = {}
    secret = bytes.fromhex(handshakes[0]["secret"])
    try:
        why_not = agree(bootstrap, _connect_to_lower_ranks(rank, near, handshakes, secret, sockets))
        if not why_not:
            why_not = agree(bootstrap, _accept_higher_ranks(rank, near, listener, secret, sockets))
    except BaseException:
        _close(sockets)
        raise
    if why_not:
        _close(sockets)
        sockets = {}
    return why_not, sockets


def _connect_to_lower_ranks(
    rank: int,
    near: Sequence[int],
    handshakes: list[dict[str, Any]],
    secret: bytes,
    sockets: dict[int, socket.socket],
) -> str:
    """Connect to every lower rank without waiting, since they are already listening; return the reason of a failure.

    If more ranks connect than the system can queue, the connection fails at once, as for any other reason.
    """
    for peer in (lower for lower in near if lower < rank):
        try:
            sockets[peer] = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            close_in_child(sock)
            sock.setblocking(False)
            sock.connect(handshakes[peer]["address"])
            if not _same_user(sock):
                return f"rank {rank} reached another user's process instead of rank {peer}"
            sock.sendall(_PREAMBLE.pack(secret, rank))
        except BlockingIOError:
            return f"rank {rank} cannot reach rank {peer}: too many connections wait at its Unix socket"
        except OSError as error:
            return _reason(f"rank {rank} cannot reach rank {peer} of its host over a Unix socket", error)
    return ""


def _accept_higher_ranks(
    rank: int, near: Sequence[int], listener: _Listener, secret: bytes, sockets: dict[int, socket.socket]
) -> str:
    """Accept every higher rank without waiting, since all have connected; return the reason of a failure."""
    missing = {higher for higher in near if higher > rank}
    try:
        listener.accept(missing, secret, sockets)
    except OSError as error:
        return _reason(f"rank {rank} cannot accept a connection of its host over a Unix socket", error)
    return f"rank {rank} has no connection from rank {min(missing)}" if missing else ""


def _peer_behind(sock: socket.socket, secret: bytes) -> int:
    """Return the rank that has sent its preamble over a new connection, or -1 if a stranger has connected."""
    sock.setblocking(False)
    try:
        preamble = sock.recv(_PREAMBLE.size) if _same_user(sock) else b""
    except (BlockingIOError, ConnectionResetError):  # it has sent nothing
        return -1
    sent, peer = _PREAMBLE.unpack(preamble) if len(preamble) == _PREAMBLE.size else (b"", -1)
    return peer if secrets.compare_digest(sent, secret) else -1


def _same_user(sock: socket.socket) -> bool:
    """Return whether the process at the other end belongs to the user of this one; True where that cannot be asked.

    Other users, root included, have no business here: all ranks of a group belong to one user.
    """
    peer = process_and_user(sock)
    return peer is None or peer[1] == user()


def _reason(what: str, error: Exception) -> str:
    return str(resource_error(what, error) or f"{what} ({error})")


def _close(sockets: dict[int, socket.socket]) -> None:
    for sock in sockets.values():
        sock.close()
