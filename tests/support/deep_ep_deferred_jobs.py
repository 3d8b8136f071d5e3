"""Jobs of `EPBuffer`: those of `ElasticBuffer` on it, and calls whose results come from their events."""

from typing import Any
from unittest import mock

from support import deep_ep_elastic_clients as clients
from support import deep_ep_elastic_jobs as jobs
from support.deep_ep_elastic_jobs import Deal, Mode
from tokenferry.compat.deep_ep import EPBuffer, EPHandle, EventOverlap
from tokenferry.compat.deep_ep.expert_buffer import ExpertBuffer
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

MODES = (
    Mode(),
    Mode(cpu_sync=False, alignment=4),
    Mode(expand=True, alignment=4, zero_padding=True),
    Mode(expand=True, cpu_sync=False),
)


class Deferring(EPBuffer):
    """An `EPBuffer` that defers every call, and returns its results in the form in which `ElasticBuffer` does."""

    def dispatch(self, x: Any, *rest: Any, do_handle_copy: bool = True, **how: Any) -> Any:
        how |= {"do_handle_copy": do_handle_copy, "async_with_compute_stream": True, "defer_epilogue": True}
        return _waited(super().dispatch(x, *rest, **how))

    def combine(self, x: Any, *rest: Any, **how: Any) -> Any:
        return _waited(super().combine(x, *rest, **how, async_with_compute_stream=True, defer_epilogue=True))


def _waited(event: Any) -> tuple[Any, ...]:
    assert type(event) is EventOverlap
    results = event.wait()
    assert event.wait() is None, "results are handed over once"
    return (*results, EventOverlap())


def on_buffers(rank: int, pg: Any, kind: type[ExpertBuffer], job: Any, *args: Any) -> None:
    """Run a job of `ElasticBuffer` on buffers of another kind."""
    with mock.patch.object(jobs, "ElasticBuffer", kind), mock.patch.object(clients, "ElasticBuffer", kind):
        job(rank, pg, *args)


def deferred(rank: int, pg: Any, case: Case) -> None:
    """Several calls under way at once, whose results are fetched in another order; the routing is the caller's own."""
    buffer = EPBuffer(pg, num_max_tokens_per_rank=max(*case.tokens, 1), num_topk=case.top_k)
    how = {"async_with_compute_stream": True, "defer_epilogue": True}
    deals = [Deal(rank, case, mode, buffer.num_max_tokens_per_rank) for mode in MODES]
    ready = EPBuffer.capture()
    sent = [
        buffer.dispatch(deal.mine.x, previous_event=ready, allocate_on_comm_stream=True, **deal.arguments(), **how)
        for deal in deals
    ]
    handles: dict[int, EPHandle] = {}
    for i in reversed(range(len(deals))):
        deal = deals[i]
        x, ids, weights, handles[i] = sent[i].current_stream_wait()
        deal.check_rows("recv_x", x)
        deal.check_ids(ids)
        deal.check_weights(weights)
        deal.check_handle(handles[i])
        assert handles[i].topk_idx is deal.mine.topk_idx
    returned = [
        buffer.combine(
            deal.answers()[rank],
            handles[i],
            topk_weights=deal.returned_weights()[rank],
            previous_event=sent[i],
            allocate_on_comm_stream=True,
            **how,
        )
        for i, deal in enumerate(deals)
    ]
    for deal, event in [*zip(deals, returned, strict=True)][::-1]:
        out, weights = event.wait()
        same_bits("combined_x", out, deal.oracle.combine(rank, deal.answers()))
        same_bits("combined_topk_weights", weights, deal.selected(deal.returned_weights()))
