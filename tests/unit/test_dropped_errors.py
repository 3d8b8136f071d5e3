"""An error that a program drops frees the memory of its call at once, without Python's collector.

Its traceback has the frames of the call. So none of them may hold the error, nor what keeps it.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import tokenferry
from tokenferry import MoeShape, Routing
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.errors import BackendUnavailable, ConfigError, PeerTimeout, ResourceError, TokenferryError
from tokenferry.jit.kernel import Jit
from tokenferry.nn import MoELayer, Router, RouterOptions
from tokenferry.nn.balance import PlacedRouter, Placement, move_experts, rebalance
from tokenferry.transports import process_group, segment
from tokenferry.transports.base import HEADER_INTS, CallId, Deadline
from tokenferry.transports.handshake import Bootstrap
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.transports.shared_memory import SharedMemoryTransport

X, ROUTING = torch.ones(2, 8), Routing(torch.tensor([[0], [1]]))
ARE_NUMBERED, ARE_REVERSED = (Placement.of(torch.tensor(slots), 1) for slots in ([0, 1, 2, 3], [3, 2, 1, 0]))
REFUSE: dict[str, Any] = {"side_effect": MemoryError}
CALL = CallId(1, "dispatch")


def group_of_one() -> tokenferry.ExpertGroup:
    return tokenferry.ExpertGroup(None, MoeShape(4, 1, 8, max_tokens=4), backend="cpu")


def late(message: str) -> PeerTimeout:
    return PeerTimeout(message, phase="dispatch", call=1, rank=0, peers=(1,), waited_s=1.0)


def refuse_in_a_call() -> None:
    with group_of_one() as group, mock.patch.object(SharedMemoryTransport, "open", **REFUSE):
        group.dispatch(X, ROUTING)


def explain_an_error() -> None:
    """Across nodes another error is raised than the one that was met."""
    reports = SimpleNamespace(post=lambda _: None, explain=lambda *_: late("for another rank"))
    exchange = Exchange(mock.Mock(rank=0, num_ranks=2), 1.0, mask_on_timeout=False, reports=reports)
    with exchange.guard("dispatch"):
        raise late("for the rail peer")


def refuse_a_handshake() -> None:
    table = object.__new__(Bootstrap)
    table._rank, table._timeout_s, table._carrier = 0, 1.0, SimpleNamespace(exchange=mock.Mock(**REFUSE))
    table.exchange({})


def refuse_a_segment() -> None:
    with mock.patch.object(segment, "attach", **REFUSE):
        segment.create(1, 100)


def lose_a_descriptor() -> None:
    lost = (b"-", [], segment.socket.MSG_CTRUNC, None)
    with mock.patch.object(segment.socket, "recv_fds", return_value=lost), segment.socket.socketpair()[0] as ours:
        segment.receive(ours, 1)


def over_a_process_group(spoil: Callable[[ProcessGroupTransport], object]) -> None:
    broken = mock.Mock(side_effect=RuntimeError("Connection closed by peer"))
    transport = ProcessGroupTransport(SimpleNamespace(rank=lambda: 0, size=lambda: 2, send=broken, recv=broken))
    spoil(transport)
    transport.open(CALL, [0, 8])
    transport.post(CALL, [(0,) * HEADER_INTS] * 2, Deadline(1.0))
    try:
        transport.receive(CALL, 1, Deadline(1.0))
    finally:
        transport.close(linger=False)


def lose_a_connection() -> None:
    over_a_process_group(lambda _: None)


def wait_for_one_that_has_left() -> None:
    header = torch.empty(HEADER_INTS + 2, dtype=torch.int64)
    old = [process_group._Incoming(number, header, None) for number in range(process_group.MOST_AWAITED)]

    def spoil(transport: ProcessGroupTransport) -> None:
        transport._incoming[1].extend(old)
        transport._reasons[1] = "ValueError: no more"

    over_a_process_group(spoil)


class Broken(Jit):
    """Builds nothing."""

    def __init__(self) -> None:
        self._lock, self._builds, self._kernels = threading.Lock(), {}, {}

    def _build(self, *_: object) -> bytes:
        raise BackendUnavailable("does not compile")


def build_a_kernel() -> None:
    Broken()._built(mock.Mock(), ())


def wait_for_a_kernel() -> None:
    """Another thread builds it."""
    jit, spec = Broken(), mock.Mock()
    jit._builds[spec, ()] = Future()
    jit._builds[spec, ()].set_exception(BackendUnavailable("does not compile"))
    try:
        jit._built(spec, ())
    finally:
        jit._builds.clear()


def warm_up() -> None:
    Broken().warmup([mock.Mock(configs=({},))])


def move_other_rows() -> None:
    with group_of_one() as group:
        move_experts(group, [torch.ones(3, 2)], ARE_NUMBERED, ARE_REVERSED)


def rebalance_without_parameters() -> None:
    with group_of_one() as group:
        layer = MoELayer(
            group, 12, router=PlacedRouter(Router(8, 4, 1, options=RouterOptions(normalize=False)), ARE_NUMBERED, group)
        )
        rebalance(layer, ARE_REVERSED, optimizer=torch.optim.SGD([torch.ones(1, requires_grad=True)]))


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (refuse_in_a_call, ResourceError),
        (explain_an_error, PeerTimeout),
        (refuse_a_handshake, ResourceError),
        (refuse_a_segment, ResourceError),
        (lose_a_descriptor, ResourceError),
        (lose_a_connection, PeerTimeout),
        (wait_for_one_that_has_left, PeerTimeout),
        (build_a_kernel, BackendUnavailable),
        (wait_for_a_kernel, BackendUnavailable),
        (warm_up, BackendUnavailable),
        (move_other_rows, TokenferryError),
        (rebalance_without_parameters, ConfigError),
    ],
)
def test_an_error_keeps_no_memory(fail, kind):
    def call() -> weakref.ref[torch.Tensor]:
        memory = torch.ones(3)
        try:
            fail()
        except kind:
            return weakref.ref(memory)
        raise AssertionError("no error")

    with suppress(TokenferryError):
        fail()  # what is made once, such as caches, is made now
    gc.collect()
    assert call()() is None
