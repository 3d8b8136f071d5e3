"""The CPU backend: the calls of the API, over messages between the processes of the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.backends.base import (
    CLOSED,
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    QuickChecks,
    RedispatchRequest,
    Resolved,
    TokenLayout,
)
from tokenferry.backends.cpu import combine, dispatch, routing
from tokenferry.backends.cpu.decode import Decoder
from tokenferry.backends.cpu.entrance import Entered
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.backends.cpu.levels import Levels
from tokenferry.backends.cpu.route import Direct, Route
from tokenferry.backends.cpu.two_levels import TwoLevels
from tokenferry.errors import ArgumentError, BackendUnavailable, ResourceError
from tokenferry.topology import Topology
from tokenferry.transports.refused import resource_error
from tokenferry.transports.rendezvous import Wanted, connect
from tokenferry.transports.shared_memory import SharedMemoryTransport
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    Dispatched,
    DispatchOptions,
    Layout,
    MoeShape,
    Plan,
    Quantized,
)


def make_cpu_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> CpuBackend:
    """Connect to the other ranks and return a backend; collective."""
    terms: dict[str, object] = {
        **resolved.terms,
        "shape": str(resolved.shape),
        "transport": resolved.transport,
        "on_timeout": "mask" if resolved.mask_on_timeout else "raise",
        "ranks_per_node": resolved.ranks_per_node,
    }
    wanted = Wanted(resolved.transport, resolved.ranks_per_node, resolved.mask_on_timeout)
    agreement = connect(group, wanted, resolved.timeout_s, terms)
    transport = agreement.transport
    if resolved.mask_on_timeout:
        if not isinstance(transport, SharedMemoryTransport):
            raise BackendUnavailable(
                "ExpertGroup: on_timeout='mask' needs the transport 'shared_memory', this group has "
                f"{transport.name!r} ({agreement.why}): after one timeout gloo closes all connections, so no "
                "rank can continue; use on_timeout='raise'"
            )
        transport.patient = True
    exchange = Exchange(
        transport,
        resolved.timeout_s,
        mask_on_timeout=resolved.mask_on_timeout,
        reports=agreement.reports,
    )
    return CpuBackend(exchange, agreement.topology, agreement.key, agreement.why)


class CpuBackend:
    """The backend for tensors in main memory; see `tokenferry.backends.base.Backend`."""

    name = "cpu"
    checks_routing = False
    num_host_sizes = 0

    def __init__(self, exchange: Exchange, topology: Topology, key: str, why: str) -> None:
        self.key = key
        self.why = why
        self.rank = exchange.rank
        self.num_ranks = exchange.num_ranks
        self.transport = exchange.transport.name if exchange.num_ranks > 1 else "none"
        self.topology = topology
        self.device = torch.device("cpu")
        self._exchange = exchange
        levels = None if topology.num_nodes == 1 else Levels(exchange, topology)
        self._route: Route = Direct(exchange) if levels is None else TwoLevels(levels)
        # Where any rank may be lost, none passes on rows of others.
        self._decoder = Decoder(exchange, None if exchange.mask_on_timeout else levels, key)

    @property
    def broken(self) -> str | None:
        """The reason why the group is closed or broken, or None."""
        return self._exchange.broken

    @not_compiled  # a program may read them between calls
    def masked(self) -> frozenset[int]:
        """Ranks that decode calls skip."""
        return frozenset(self._exchange.masked)

    def scratch(self, num_bytes: int) -> Tensor:
        """See `tokenferry.backends.base.Backend`; the system maps pages when they are first written."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def write_masks(self, out: Tensor) -> None:
        """See `tokenferry.backends.base.Backend`."""
        for rank in range(self.num_ranks):
            out[rank] = int(rank in self._exchange.masked)

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it."""
        if masked:
            self._exchange.mask(rank)
        else:
            self._exchange.unmask(rank)

    def close(self) -> None:
        """Close the transport."""
        self._exchange.close(CLOSED, linger=True)

    def warmup(self) -> None:
        """Do nothing: there is nothing to compile."""

    def synchronize(self) -> None:
        """Do nothing: calls return with their work done."""

    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor:
        """Return undefined rows in the shape of ``Dispatched.x``."""
        rows = self._exchange.allocator.empty(plan.num_delivered, hidden, dtype=dtype)
        if plan.options.layout is not Layout.MASKED:
            return rows
        num_local = plan.expert_counts.numel()
        return rows.view(num_local, plan.num_delivered // num_local, hidden)

    def fast_path(self, shape: MoeShape, checks: QuickChecks) -> None:
        """Return None: moving the rows takes far longer than checking the arguments."""

    def refused(self, call: str, error: Exception, *, local: bool = False) -> ResourceError | None:
        """Break the group if a call was refused a resource: its peers are notified, and need not wait for this rank."""
        return resource_error(call, error) if local else self._exchange.refused(call, error)

    @property
    def interruptible(self) -> CpuBackend:
        """See `tokenferry.backends.base.Backend`."""
        return self

    @property
    def latest_call(self) -> Entered:
        """See `tokenferry.backends.base.Interruptible`."""
        return self._exchange.entrance.latest

    def interrupted(self, call: str, before: Entered, error: BaseException) -> None:
        """See `tokenferry.backends.base.Interruptible`."""
        self._exchange.interrupted(call, before, error)

    def places_shape(self, shape: MoeShape, options: DispatchOptions, num_tokens: int) -> tuple[int | None, int]:
        """See `tokenferry.backends.base.Backend`: only with several nodes do plans have ``places``."""
        return (0, 0) if self.topology.num_nodes == 1 else (None, 1 + self.topology.ranks_per_node)

    def token_layout(self, topk_idx: Tensor, num_experts: int) -> TokenLayout:
        """See `tokenferry.backends.base.Backend`."""
        return routing.token_layout(topk_idx, num_experts, self.num_ranks)

    def restricted(self, topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
        """See `tokenferry.backends.base.Backend`."""
        return routing.restricted(topk_idx, in_rank, num_experts)

    def call_sms(self, shape: MoeShape) -> None:
        """Return None: this backend uses no SMs."""
        return

    def new_traces(self, num_calls: int) -> Tensor | None:
        """Return None: this backend records no time stamps."""
        return None

    def set_trace(self, trace: Tensor | None) -> None:
        """Refuse a trace."""
        if trace is not None:
            raise BackendUnavailable("set_trace: backend 'cpu' has no time stamps of calls; use backend='cuda'")

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cpu.dispatch`."""
        _check_no_sms("dispatch", request.num_sms)
        with self._exchange.call("dispatch"), torch.no_grad():
            return dispatch.dispatch(self._exchange, self._route, self.key, request)

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cpu.dispatch`."""
        _check_no_sms("redispatch", request.num_sms)
        with self._exchange.call("redispatch"), torch.no_grad():
            return dispatch.redispatch(self._exchange, self._route, request)

    def combine(self, request: CombineRequest) -> Combined:
        """See `tokenferry.backends.cpu.combine`."""
        _check_no_sms("combine", request.num_sms)
        with self._exchange.call("combine"), torch.no_grad():
            return combine.combine(self._exchange, self._route, request)

    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cpu.decode`."""
        with self._exchange.call("decode_dispatch"), torch.no_grad():
            return self._decoder.dispatch(request)

    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cpu.decode`."""
        with self._exchange.call("decode_combine"), torch.no_grad():
            return self._decoder.combine(request)


def _check_no_sms(call: str, num_sms: int | None) -> None:
    if num_sms is not None:
        raise ArgumentError(
            f"{call}: num_sms: expected None, got {num_sms}; the CPU backend has no SMs; leave num_sms out"
        )
