"""Handshakes: an all-gather of small JSON objects between the ranks of any process group.

If the group can send CPU tensors (gloo, or "cpu:gloo,cuda:nccl"), handshakes are sent through it. Otherwise (NCCL
alone), they go through the store with which the process group was made. NCCL's own all-gather is the last resort: its
first collective waits for a missing rank until the timeout of the process group, and cannot name the rank.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from tokenferry.errors import ConfigError
from tokenferry.transports.base import HEADER_INTS, CallId, Deadline, peer_timeout
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.transports.refused import raise_if_refused, resource_error

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NO_HEADER = (0,) * HEADER_INTS
_CALL = CallId(0, "making the group")
_POLL_S = 0.0005
_REMEDY = "All ranks make a group together."


class HandshakeExchange(Protocol):
    """An all-gather of handshakes, such as `Bootstrap`."""

    def exchange(self, handshake: dict[str, Any]) -> list[dict[str, Any]]:
        """Send one handshake to every rank, and return those of all ranks, by rank."""


class Bootstrap:
    """An exchange of handshakes between all ranks of a process group. Collective, with a deadline.

    After a `PeerTimeout`, or an interrupt of one rank, the ranks may have made different numbers of exchanges: do not
    use the process group for another one.

    Args:
        group: Any process group.
        timeout_s: Seconds that each exchange may take.
        device: This rank's device, for groups that can only send tensors on it.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, device: torch.device | None = None) -> None:
        self._rank = group.rank()
        self._timeout_s = timeout_s
        self._carrier = _carrier(group, device or torch.device("cpu"))

    def exchange(self, handshake: dict[str, Any]) -> list[dict[str, Any]]:
        """Send a handshake to every rank, and return those of all ranks, by rank.

        Raises:
            PeerTimeout: a rank did not send its handshake in time; the message names it.
            ResourceError: the system refused memory or descriptors for it.
        """
        try:
            texts = self._carrier.exchange(json.dumps(handshake).encode(), Deadline(self._timeout_s))
        except (OSError, MemoryError, RuntimeError) as error:
            raise_if_refused(f"{_CALL.phase}: rank {self._rank}", error)
            raise
        return [json.loads(text) for text in texts]


def agree(bootstrap: HandshakeExchange, reason: str) -> str:
    """Return the reason of the lowest rank that has one, or an empty string; the same on all ranks. Collective."""
    return next(
        (handshake["why_not"] for handshake in bootstrap.exchange({"why_not": reason}) if handshake["why_not"]), ""
    )


def compare_terms(handshakes: Sequence[dict[str, Any]]) -> None:
    """Check that all ranks have the same terms, by their handshakes.

    Raises:
        ConfigError: they differ; the message names the first term that does, and each rank's value.
    """
    terms = [handshake["terms"] for handshake in handshakes]
    for name in terms[0]:
        values = [term[name] for term in terms]
        if any(value != values[0] for value in values):
            per_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ConfigError(f"ExpertGroup: {name} differs between ranks ({per_rank}); give all ranks the same")


def moves_cpu_tensors(group: dist.ProcessGroup) -> bool:
    """Return whether a process group has a backend for CPU tensors."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def host_name() -> str:
    """Return an identifier that differs between hosts, and between boots of one host."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def pid_namespace() -> str:
    """Return the name of this process's PID namespace on its host, or an empty string where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def network_namespace() -> str:
    """Return the name of this process's network namespace on its host, or an empty string where there are none."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


class _Carrier(Protocol):
    """A way to all-gather a few bytes."""

    def exchange(self, text: bytes, deadline: Deadline) -> list[bytes]:
        """Return the bytes of all ranks, by rank; collective."""


def _carrier(group: dist.ProcessGroup, device: torch.device) -> _Carrier:
    if moves_cpu_tensors(group):
        return _SendReceive(group)
    try:
        return _Store(group, group.get_group_store())
    except RuntimeError:  # process groups not made by torch.distributed may have no store
        return _Tensors(group, device)


class _SendReceive:
    """The carrier that sends and receives CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._transport = ProcessGroupTransport(group)

    def exchange(self, text: bytes, deadline: Deadline) -> list[bytes]:
        transport = self._transport
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        for buffer in transport.open(_CALL, [body.numel()] * transport.num_ranks):
            buffer.copy_(body)
        transport.post(_CALL, [_NO_HEADER] * transport.num_ranks, deadline)
        texts = [bytes(transport.receive(_CALL, src, deadline).body.tolist()) for src in range(transport.num_ranks)]
        transport.finish(_CALL, deadline)
        return texts


class _Store:
    """The carrier that uses the store with which the process group was made.

    Each rank counts its exchanges in the store, so that successive bootstraps of a group use different keys.
    """

    def __init__(self, group: dist.ProcessGroup, store: Store) -> None:
        self._rank = group.rank()
        self._num_ranks = group.size()
        self._store = store
        self._last = ""

    def exchange(self, text: bytes, deadline: Deadline) -> list[bytes]:
        try:
            number = self._store.add(f"tokenferry/exchanges/{self._rank}", 1)
            self._store.set(self._key(number, self._rank), text.decode())
            texts = [self._get(number, peer, deadline) for peer in range(self._num_ranks)]
            # Every rank has reached this exchange, so it has read all handshakes of the one before.
            if self._last:
                self._store.delete_key(self._last)
            self._last = self._key(number, self._rank)
        except RuntimeError as error:
            if resource_error("", error) is not None:  # nobody else's fault
                raise
            why = f"the process group's store failed ({str(error).splitlines()[0][:160]})"
            others = [peer for peer in range(self._num_ranks) if peer != self._rank]
            raise peer_timeout(_CALL, self._rank, others, why, deadline.waited(), _REMEDY) from error
        return texts

    def _get(self, number: int, peer: int, deadline: Deadline) -> bytes:
        key = self._key(number, peer)
        try:
            self._store.wait([key], timedelta(seconds=max(deadline.left(), 0.001)))
        except RuntimeError:
            if deadline.left():
                raise
            missing = [rank for rank in range(self._num_ranks) if not self._store.check([self._key(number, rank)])]
            if missing:
                why = "no answer within timeout_s"
                raise peer_timeout(_CALL, self._rank, missing, why, deadline.waited(), _REMEDY) from None
        return bytes(self._store.get(key))

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"tokenferry/{number}/{rank}"


class _Tensors:
    """The carrier that uses an all-gather of byte tensors on this rank's device."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device

    def exchange(self, text: bytes, deadline: Deadline) -> list[bytes]:
        size = torch.tensor([len(text)], dtype=torch.int64, device="cpu")
        sizes = [int(size) for size in self._gather(size, deadline)]
        body = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        body[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = self._gather(body, deadline)
        return [bytes(text[:size].tolist()) for text, size in zip(texts, sizes, strict=True)]

    def _gather(self, tensor: torch.Tensor, deadline: Deadline) -> list[torch.Tensor]:
        mine = tensor.to(self._device)
        gathered = [torch.empty_like(mine) for _ in range(self._group.size())]
        work = self._group.allgather([gathered], [mine])
        while not work.is_completed():  # NCCL's wait() ignores its timeout: it does not wait for the device
            if not deadline.left():
                rank = self._group.rank()
                others = [peer for peer in range(self._group.size()) if peer != rank]
                raise peer_timeout(_CALL, rank, others, "no answer within timeout_s", deadline.waited(), _REMEDY)
            time.sleep(_POLL_S)
        work.wait()
        return [each.cpu() for each in gathered]
