"""The CUDA backend of a group of several nodes: windows inside each node, rails between nodes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import NoReturn

import torch
from torch import Tensor

from tokenferry import tuning
from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    QuickChecks,
    RedispatchRequest,
    Resolved,
)
from tokenferry.backends.cuda.across.combine import AcrossCombiner
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.decode import AcrossDecoder
from tokenferry.backends.cuda.across.dispatch import AcrossDispatcher
from tokenferry.backends.cuda.across.fast_path import AcrossFastPath
from tokenferry.backends.cuda.across.masks import AcrossMasks
from tokenferry.backends.cuda.across.messages import ExchangedMessages, MessageRails
from tokenferry.backends.cuda.across.parcels import Expected
from tokenferry.backends.cuda.across.puts import Network, PutCrossing, PutMessages, Puts
from tokenferry.backends.cuda.across.rails import Rails
from tokenferry.backends.cuda.across.relay import AcrossPlan
from tokenferry.backends.cuda.backend import CudaBackend
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.fast_path import BackendCalls
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import ClosedError, PeerTimeout, UnsupportedError
from tokenferry.kernels.all import ACROSS_NODES
from tokenferry.topology import Topology
from tokenferry.transports.failures import FailureReport, patience_s
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    Dispatched,
    DispatchOptions,
    MoeShape,
    Quantized,
)


@dataclass(frozen=True, slots=True)
class InternodeLinks:
    """What carries exchanges between nodes.

    Attributes:
        rails: That of all calls, but for decode calls if there is a network.
        network: Memory that decode calls put into; None: they use the rails.
    """

    rails: Rails
    network: Network | None = None

    @property
    def names(self) -> list[str]:
        """What they are."""
        return [self.rails.name] if self.network is None else [self.rails.name, self.network.name]


class AcrossBackend(CudaBackend):
    """The backend for tensors in GPU memory of several nodes; see `tokenferry.backends.base.Backend`.

    Args:
        context: Context of this rank, in its node.
        key: Key of the group.
        why: Why this backend was chosen.
        topology: The nodes, of consecutive ranks.
        links: What carries exchanges between nodes.
        resolved: Shape and options.
    """

    def __init__(
        self,
        context: Context,
        key: str,
        why: str,
        topology: Topology,
        links: InternodeLinks,
        resolved: Resolved,
    ) -> None:
        super().__init__(context, key, why, fast_path=resolved.fast_path)
        self.rank = topology.rank
        self.num_ranks = topology.num_ranks
        self.topology = topology
        self.transport = "+".join([*(["nvlink"] if topology.ranks_per_node > 1 else []), *links.names])
        self.num_host_sizes = 2 * topology.num_nodes + 2
        self._rails = rails = links.rails
        self._puts: Puts | None = None
        rails.end_soon_if(context.pinned.mismatched)
        expected = Expected(
            tuning.tokens_for_node(resolved.shape, topology.num_nodes), ranks_per_node=topology.ranks_per_node
        )
        if links.network is None:
            self._crossing = Crossing(context, topology, rails, expected)
            self._messages: MessageRails = ExchangedMessages(self._crossing)
        else:
            self._puts = puts = Puts(context, topology, links.network)
            self._crossing = PutCrossing(context, topology, rails, expected, puts)
            self._messages = PutMessages(self._crossing, puts)
        self._dispatcher = AcrossDispatcher(context, self.allocator, topology, self._crossing, key)
        self._combiner = AcrossCombiner(context, self.allocator, topology, self._crossing)
        self._across = AcrossDecoder(context, self.allocator, topology, self._messages, key, self._explain)
        self.decoder = self._across
        if self._puts is not None:
            self.masks = AcrossMasks(context, self._across, topology, self._puts)

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.across.dispatch`."""
        with torch.inference_mode(False), torch.no_grad(), self._explained():
            self._across.catch_up("dispatch")
            return self._dispatcher.dispatch(request)

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.across.dispatch`."""
        with torch.inference_mode(False), torch.no_grad(), self._explained():
            self._across.catch_up("redispatch")
            return self._dispatcher.redispatch(request)

    def combine(self, request: CombineRequest) -> Combined:
        """See `tokenferry.backends.cuda.across.combine`."""
        with torch.no_grad(), self._explained():
            self._across.catch_up("combine")
            return self._combiner.combine(request)

    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """See `tokenferry.backends.cuda.across.decode`."""
        with torch.no_grad(), self._explained():
            return self._across.dispatch(request)

    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cuda.across.decode`."""
        with torch.no_grad(), self._explained():
            return self._across.combine(request)

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it.

        Raises:
            UnsupportedError: decode calls use NCCL, whose exchanges do not end while a rank is silent.
        """
        if self._puts is None:
            raise UnsupportedError(
                "mask: backend='cuda' can skip ranks across nodes with transport='nvshmem', and not over NCCL, whose "
                "exchanges need all ranks; use a group with that transport or of one node, or backend='cpu' with "
                "tensors in host memory"
            )
        super().mask(rank, masked=masked)

    def write_masks(self, out: Tensor) -> None:
        """See `tokenferry.backends.base.Backend`; over NCCL no rank is skipped."""
        if self._puts is None:
            out.zero_()
        else:
            super().write_masks(out)

    def places_shape(self, shape: MoeShape, options: DispatchOptions, num_tokens: int) -> tuple[int | None, int]:
        """See `tokenferry.backends.base.Backend`."""
        return None, 1

    def fast_path(self, shape: MoeShape, checks: QuickChecks) -> AcrossFastPath | None:
        """See `tokenferry.backends.base.Backend`."""
        if not self._has_fast_path:
            return None
        calls = BackendCalls(
            self.context,
            self._dispatcher,
            self._combiner,
            self._across,
            self.key,
            self._begin_eager,
            self._begin_decode,
            self._messages.nobody_masked,
            AcrossPlan,
            attrgetter("_along"),
        )
        return AcrossFastPath(calls, shape, checks, self._explain)

    def _begin_eager(self, signature: Signature, wait_ns: int = 0, *, skip_masked: bool = False) -> Call | None:
        """Begin a call, as `Context.begin_eager`, if nothing has to be done first for rails and hooks, either."""
        if self._rails.lost is not None or not self._across.caught_up:
            return None
        return self.context.begin_eager(signature, wait_ns, skip_masked=skip_masked)

    def _begin_decode(self, signature: Signature, wait_ns: int, *, skip_masked: bool) -> Call | None:
        """Begin a decode call, likewise."""
        call = self._begin_eager(signature, wait_ns, skip_masked=skip_masked)
        if call is not None:
            call.skips_masked = self._messages.can_mask  # ranks that a kernel masks meanwhile
        return call

    def warmup(self) -> None:
        """Compile and load every kernel, and connect the rails; returns when every rank has."""
        with self._explained():
            self._across.catch_up("warmup")
            self.context.jit.warmup(ACROSS_NODES)
            if self._puts is not None:
                self.context.jit.warmup((self._puts.network.send, self._puts.network.receive))
            super().warmup()
            crossing = self._crossing
            call, chunks = crossing.begin(Signature("warmup"), skip_masked=True), crossing.chunks(1)
            words, _ = crossing.new_words(chunks.num, 0)
            whole_plan = torch.zeros(1, dtype=torch.int64, device=self.device)
            opening = crossing.announce(call, words, chunks, 0, 0, whole_plan.data_ptr())
            if opening.transfer is None:
                crossing.counts(call, words, crossing.open(call, words), 0)
                return
            opening.transfer.join()
            crossing.confirm(call, opening)
            self.context.synchronize()

    def synchronize(self) -> None:
        """Wait for this rank's calls, and raise their errors."""
        with self._explained():
            if self._puts is not None and not self._across.caught_up:
                self._puts.complete()  # what was sent for an open hook
            super().synchronize()
            with self.context.breaking_off():
                self._rails.raise_lost()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Report an error that breaks the group, and raise one that names the ranks at fault.

        They may be others than those for which this rank waited.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again
            self._explain(error)

    def _explain(self, error: Exception) -> NoReturn:
        """Raise an error, as `_explained`."""
        found = error
        try:
            found = self._at_fault(error)
            if found is error:
                raise error
            raise found from error
        finally:
            # Reference cycles through this frame would keep the memory of the call alive until garbage collection.
            del error, found

    def _at_fault(self, error: Exception) -> Exception:
        """Return the error to be raised, and report it if it breaks the group."""
        reports = self._rails.reports
        if reports is None or not self.broken or isinstance(error, ClosedError):
            return error
        start = time.monotonic()
        found: Exception = error
        if isinstance(error, PeerTimeout) and self.context.pinned.mismatched():
            # The exchanges of different calls do not end.
            found = self.context.flight_recorder.explain(self.context.pinned.take_record())
        elif isinstance(error, PeerTimeout) and self._rails.mismatch is not None:
            found = copy.copy(self._rails.mismatch)
        elif isinstance(error, PeerTimeout) and self._rails.lost is not None:
            found = copy.copy(self._rails.lost)  # a kernel knows only that nothing came
        reports.post(FailureReport.of(found))
        self.context.notify_peers()  # after the report, which they will look for
        if isinstance(found, PeerTimeout):
            patient_s = patience_s(self.context.timeout_s, found.waited_s)
            found = reports.explain(found, start + patient_s, _no_text)
        return found

    def close(self) -> None:
        """Release the windows, when exchanges between nodes have ended, unless the group is broken."""
        try:
            if not self.broken:
                self._rails.finish()
        finally:
            try:
                self._rails.close()
            finally:
                super().close()


def _no_text(_rank: int) -> str:
    """Return nothing: the ranks of a node leave no texts in its windows; their reports are in the store."""
    return ""
