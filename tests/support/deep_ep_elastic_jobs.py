"""Jobs of the tests of `ElasticBuffer`, against the oracle; ranks on the CPU run them, and threads on the emulator."""

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tokenferry.compat import deep_ep
from tokenferry.compat.deep_ep import ElasticBuffer, EPHandle, EventHandle
from tokenferry.testing.cases import Case, answers, returned_weights
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle
from tokenferry.topology import consecutive

CASES = (
    Case((5, 3, 0, 7), experts=8, top_k=3, hidden=16),
    Case((4, 4, 4, 4), experts=4, top_k=2, hidden=24, routing="half_dropped", idx_dtype=torch.int32),
    Case((3, 6, 2, 1), experts=12, top_k=5, hidden=8, routing="one_rank_idle", dtype=torch.float32),
    Case((2, 3, 4, 5), experts=8, top_k=4, hidden=16, routing="repeated"),
    Case((2, 2, 2, 2), experts=8, top_k=2, hidden=16, routing="nothing"),
    Case((1, 4, 2, 3), experts=16, top_k=4, hidden=8, dtype=torch.float16, weights=False),
)


def up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def of_ranks(case: Case, ranks: int) -> Case:
    """Return the same kind of case for fewer ranks."""
    experts = case.experts // case.ranks * ranks
    return Case(
        case.tokens[:ranks], experts, min(case.top_k, experts), case.hidden, case.dtype, case.idx_dtype, case.routing
    )


@dataclass(frozen=True)
class Mode:
    """How a dispatch delivers rows."""

    expand: bool = False
    cpu_sync: bool = True
    alignment: int = 1
    zero_padding: bool = False

    def __str__(self) -> str:
        kind, counts = "expand" if self.expand else "rows", "sync" if self.cpu_sync else "free"
        return f"{kind}-{counts}-A{self.alignment}{'-zeros' * self.zero_padding}"


MODES = (
    Mode(),
    Mode(cpu_sync=False, alignment=4),
    Mode(expand=True),
    Mode(expand=True, alignment=4),
    Mode(expand=True, alignment=4, zero_padding=True),
    Mode(expand=True, cpu_sync=False),
    Mode(expand=True, cpu_sync=False, alignment=4, zero_padding=True),
)


class Deal:
    """One dispatch in one mode: what each rank sends, and what is right for this rank."""

    def __init__(self, rank: int, case: Case, mode: Mode, max_tokens: int) -> None:
        self.rank, self.case, self.mode, self.max_tokens = rank, case, mode, max_tokens
        self.sent = case.inputs()
        self.mine = self.sent[rank]
        layout = "experts" if mode.expand else "rows"
        self.oracle = Oracle(self.sent, case.experts, layout, alignment=mode.alignment if mode.expand else 1)
        self.places = [row.place for row in self.oracle.rows(rank)]
        self.received = self.oracle.received(rank)
        self.counts = self.oracle.expert_counts(rank)

    def arguments(self) -> dict[str, Any]:
        mode = self.mode
        return {
            "topk_idx": self.mine.topk_idx,
            "topk_weights": self.mine.topk_weights,
            "num_experts": self.case.experts,
            "num_max_tokens_per_rank": self.max_tokens,
            "expert_alignment": mode.alignment,
            "do_expand": mode.expand,
            "do_cpu_sync": mode.cpu_sync,
            "do_zero_padding": mode.zero_padding,
        }

    def allocated(self, rank: int) -> int:
        """Rows of the results on a rank, by the table of the contract."""
        case, mode = self.case, self.mode
        if mode.cpu_sync:
            return self.oracle.num_delivered(rank)
        rows = case.ranks * self.max_tokens
        local = case.experts // case.ranks
        return up(rows * min(case.top_k, local) + (mode.alignment - 1) * local, mode.alignment) if mode.expand else rows

    def check_rows(self, what: str, got: Tensor, values: list[Tensor] | None = None) -> None:
        assert got.shape[0] == self.allocated(self.rank)
        same_bits(what, got.cpu()[self.places], self.oracle.x(self.rank, values))
        if self.mode.zero_padding:
            self.check_padding(what, got)

    def check_padding(self, what: str, got: Tensor) -> None:
        for first, count in zip(self.oracle.expert_offsets(self.rank), self.counts, strict=False):
            pad = got[first + count : first + up(count, self.mode.alignment)]
            assert not pad.view(torch.uint8).any(), f"{what}: padding is not 0"

    def check_weights(self, got: Tensor, values: list[Tensor] | None = None) -> None:
        assert got.shape[0] == self.allocated(self.rank)
        same_bits("recv_topk_weights", got.cpu()[self.places], self.oracle.weights(self.rank, values))
        if self.mode.zero_padding:
            self.check_padding("recv_topk_weights", got)

    def check_ids(self, got: Tensor | None) -> None:
        if self.mode.expand:
            assert got is None
            return
        assert got.shape == (self.allocated(self.rank), self.case.top_k)
        same_bits("recv_topk_idx", got[: len(self.received)], self.oracle.topk_idx(self.rank))

    def answers(self) -> list[Tensor]:
        """The rows that each rank returns; NaN in those that must not be read."""
        case = self.case
        return [answers(case, self.oracle, r, self.allocated(r), case.dtype) for r in range(case.ranks)]

    def returned_weights(self) -> list[Tensor]:
        """The weights that each rank returns, foreign slots included; NaN in rows that must not be read."""
        return [returned_weights(self.case, self.oracle, r, self.allocated(r)) for r in range(self.case.ranks)]

    def selected(self, weights: list[Tensor]) -> Tensor:
        """By plain loops: the weight of each slot from the rank that holds its expert."""
        if self.mode.expand:
            return self.oracle.combine_weights(self.rank, weights)
        local = self.case.experts // self.case.ranks
        table = torch.zeros(self.mine.topk_idx.shape, dtype=torch.float32)
        for token, experts in enumerate(self.mine.topk_idx.tolist()):
            for slot, expert in enumerate(experts):
                if expert >= 0:
                    there = expert // local
                    table[token, slot] = weights[there][self.oracle.place(there, self.rank, token), slot]
        return table

    def check_handle(self, handle: EPHandle) -> None:
        case, mode, A = self.case, self.mode, self.mode.alignment
        assert type(handle) is EPHandle
        aligned = [up(count, A) for count in self.counts]
        assert handle.num_recv_tokens_per_expert_list == (aligned if mode.cpu_sync else [])
        assert all(type(count) is int for count in handle.num_recv_tokens_per_expert_list)
        before = [sum(src <= r for src, _ in self.received) for r in range(case.ranks)]
        self.check_numbers(handle.psum_num_recv_tokens_per_scaleup_rank, before)
        starts = [sum(aligned[:i]) for i in range(len(aligned) + 1)]
        ends = [start + count for start, count in zip(starts, self.counts, strict=False)] if mode.expand else starts[1:]
        self.check_numbers(handle.psum_num_recv_tokens_per_expert, ends)
        self.check_numbers(handle.num_unaligned_recv_tokens_per_expert, self.counts)
        rows = case.ranks * self.max_tokens
        assert handle.num_recv_tokens == (len(self.received) if mode.cpu_sync else rows)
        local = case.experts // case.ranks
        worst = up(rows * min(case.top_k, local) + (A - 1) * local, A)
        assert handle.num_expanded_tokens == (sum(aligned) if mode.cpu_sync else worst)
        source = handle.recv_src_metadata
        assert (source.dtype, tuple(source.shape)) == (torch.int32, (handle.num_recv_tokens, 2 + case.top_k))
        numbers = [src * self.max_tokens + token for src, token in self.received]
        assert source[: len(numbers), 0].tolist() == numbers
        if mode.expand:
            assert source[: len(numbers), 2:].tolist() == self.oracle.row_idx(self.rank).tolist()
        slots = handle.dst_buffer_slot_idx
        assert (slots.dtype, slots.shape) == (torch.int32, self.mine.topk_idx.shape)
        asked = (handle.do_expand, handle.num_experts, handle.expert_alignment, handle.num_max_tokens_per_rank)
        assert asked == (mode.expand, case.experts, A, self.max_tokens)
        assert handle.num_sms > 0
        hybrid = (handle.token_metadata_at_forward, handle.channel_linked_list)
        assert (*hybrid, handle.cached_recv_src_metadata_before_sort) == (None, None, None)

    @staticmethod
    def check_numbers(got: Tensor, expected: list[int]) -> None:
        assert (got.dtype, got.tolist(), got.is_contiguous()) == (torch.int32, expected, True)


def round_trips(rank: int, pg: Any, case: Case) -> None:
    """dispatch, cached dispatch and combine in every mode, with M that changes from call to call."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=16, explicitly_destroy=True)
    assert (buffer.group, buffer.rank_idx, buffer.num_ranks) == (pg, rank, case.ranks)
    most = max(*case.tokens, 1)
    for mode, max_tokens in zip(MODES, itertools.cycle((most, most + 3, 16)), strict=False):
        round_trip(buffer, Deal(rank, case, mode, max_tokens))
    buffer.destroy()
    buffer.destroy()
    assert buffer.runtime is None


def round_trip(buffer: ElasticBuffer, deal: Deal, nodes: Sequence[Sequence[int]] = ()) -> None:
    mine, case, rank = deal.mine, deal.case, deal.rank
    stats = torch.full((len(deal.counts),), 100, dtype=torch.int32)
    x, ids, weights, handle, event = buffer.dispatch(
        mine.x.clone().requires_grad_(), cumulative_local_expert_recv_stats=stats, **deal.arguments()
    )
    assert event.event is None
    assert not x.requires_grad
    deal.check_rows("recv_x", x)
    deal.check_ids(ids)
    if mine.topk_weights is None:
        assert weights is None
    else:
        deal.check_weights(weights)
    deal.check_handle(handle)
    assert stats.tolist() == [100 + count for count in deal.counts]
    assert handle.topk_idx is not mine.topk_idx
    same_bits("handle.topk_idx", handle.topk_idx, mine.topk_idx)
    again(buffer, deal, handle)

    ys, ws = deal.answers(), deal.returned_weights()
    bias = case.rows(rank, case.dtype, case.hidden, 7)
    for biases in (None, bias, (bias, bias)):
        given = () if biases is None else biases if isinstance(biases, tuple) else (biases,)
        out, out_weights, event = buffer.combine(ys[rank], handle=handle, topk_weights=ws[rank], bias=biases)
        same_bits("combined_x", out, deal.oracle.combine(rank, ys, given, nodes))
        same_bits("combined_topk_weights", out_weights, deal.selected(ws))
        assert event.event is None
    assert buffer.combine(ys[rank], handle)[1] is None


def again(buffer: ElasticBuffer, deal: Deal, handle: EPHandle) -> None:
    """Cached dispatches: the same places and the same handle; other rows, other weights, with and without zeros."""
    mine, case, mode = deal.mine, deal.case, deal.mode
    x, ids, weights, same, event = buffer.dispatch(
        mine.x * 2,
        handle=handle,
        num_sms=handle.num_sms,
        do_cpu_sync=False,
        do_expand=mode.expand,
        do_zero_padding=mode.zero_padding,
    )
    assert same is handle
    assert (weights, event.event) == (None, None)
    deal.check_rows("cached recv_x", x, [one.x * 2 for one in deal.sent])
    deal.check_ids(ids)
    gates = [case.gates(r, 5) for r in range(case.ranks)]
    for zeros in {mode.expand, False}:
        other = Deal(deal.rank, case, Mode(mode.expand, mode.cpu_sync, mode.alignment, zeros), deal.max_tokens)
        x, _, weights, _, _ = buffer.dispatch(
            mine.x,
            handle=handle,
            topk_weights=gates[deal.rank],
            num_experts=case.experts,
            expert_alignment=mode.alignment,
            num_max_tokens_per_rank=deal.max_tokens,
            do_expand=mode.expand,
            do_zero_padding=zeros,
        )
        other.check_rows("cached recv_x", x)
        other.check_weights(weights, gates)


def scales(rank: int, pg: Any, case: Case, dtype: torch.dtype) -> None:
    """Rows with scales of four bytes travel as bytes; scales come and go by row or by column."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(*case.tokens, 1), use_fp8_dispatch=True)
    data = [case.rows(r, torch.float32, 32, 1).to(torch.float8_e4m3fn) for r in range(case.ranks)]
    scale = [case.rows(r, torch.float32, 3, 2).view(dtype) for r in range(case.ranks)]
    num_tokens = case.tokens[rank]
    by_column = torch.empty(3, up(num_tokens, 4), dtype=dtype).t()[:num_tokens].copy_(scale[rank])
    for mode, mine in itertools.product(MODES, (scale[rank], by_column)):
        deal = Deal(rank, case, mode, buffer.num_max_tokens_per_rank)
        arguments = deal.arguments()
        for tma in (False, True):
            arguments["use_tma_aligned_col_major_sf"] = tma
            (rows, got), *_, handle, _ = buffer.dispatch((data[rank], mine), **arguments)
            check_scales(deal, (rows, got), (data, scale), tma=tma)
            (rows, got), *_ = buffer.dispatch(
                (data[rank], mine), handle=handle, do_expand=mode.expand, use_tma_aligned_col_major_sf=tma
            )
            deal = Deal(rank, case, Mode(mode.expand, mode.cpu_sync, mode.alignment), deal.max_tokens)
            check_scales(deal, (rows, got), (data, scale), tma=tma)
            deal = Deal(rank, case, mode, deal.max_tokens)


def check_scales(deal: Deal, got: Any, sent: Any, *, tma: bool) -> None:
    (rows, scale), (data, scales) = got, sent
    deal.check_rows("rows", rows, data)
    assert scale.shape == (rows.shape[0], 3)
    if rows.shape[0]:
        assert scale.stride() == ((1, up(rows.shape[0], 4)) if tma else (3, 1))
    same_bits("scales", scale.cpu()[deal.places], deal.oracle.x(deal.rank, scales))


def events(rank: int, pg: Any, case: Case) -> None:
    """Events of every kind, in every place where one may be given."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(*case.tokens, 1))
    deal = Deal(rank, case, Mode(cpu_sync=False), buffer.num_max_tokens_per_rank)
    ys = deal.answers()
    event = buffer.capture()
    assert type(event) is EventHandle
    for asynchronous, allocate in itertools.product((False, True), (False, True)):
        how = {"async_with_compute_stream": asynchronous, "allocate_on_comm_stream": allocate}
        how["previous_event_before_epilogue"] = event
        if allocate:
            how["previous_event"] = event
        x, _, _, handle, event = buffer.dispatch(deal.mine.x, **deal.arguments(), **how)
        assert isinstance(event.event, EventHandle) is asynchronous
        if asynchronous:
            called = []
            event.register_hook_after_wait(lambda called=called: called.append(1))
            event.current_stream_wait()
            assert called == [1]
        deal.check_rows("recv_x", x)
        deal.check_handle(handle)
        out, _, event = buffer.combine(ys[rank], handle, **how)
        assert isinstance(event.event, EventHandle) is asynchronous
        with event:
            pass
        same_bits("combined_x", out, deal.oracle.combine(rank, ys))


def barriers(rank: int, pg: Any, folder: Path) -> None:
    """No rank leaves a barrier before the last one has come, which is another one each time."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=1)
    for last in range(buffer.num_ranks):
        if rank == last:
            time.sleep(0.1)
            (folder / str(last)).touch()
        buffer.barrier(use_comm_stream=bool(last % 2), with_cpu_sync=True)
        assert (folder / str(last)).exists()


def many_handles(rank: int, pg: Any, case: Case) -> None:
    """Handles are not consumed, and any number may be alive; the caller's own routing is in one that copies nothing."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(*case.tokens, 1))
    deals = [Deal(rank, case, mode, buffer.num_max_tokens_per_rank) for mode in (*MODES, *MODES)]
    handles = [buffer.dispatch(deal.mine.x, do_handle_copy=False, **deal.arguments())[3] for deal in deals]
    for deal, handle in [*zip(deals, handles, strict=True)][::-1]:
        ys = deal.answers()
        assert handle.topk_idx is deal.mine.topk_idx
        same_bits("combined_x", buffer.combine(ys[rank], handle)[0], deal.oracle.combine(rank, ys))
    assert buffer.get_logical_domain_size() == (1, case.ranks)
    assert ElasticBuffer.get_buffer_size_hint(pg, 16, 64) == 2 << 20


def across_nodes(rank: int, pg: Any, case: Case, ranks_per_node: int) -> None:
    """Sums of a node are rounded before they cross, unless only one rounding is allowed."""
    for several in (True, False):
        with mock.patch.dict(os.environ, TOKENFERRY_RANKS_PER_NODE=str(ranks_per_node)):
            buffer = ElasticBuffer(pg, num_max_tokens_per_rank=16, allow_multiple_reduction=several)
            assert deep_ep.get_physical_domain_size(pg) == buffer.get_physical_domain_size()
        assert deep_ep.get_logical_domain_size(pg) == buffer.get_logical_domain_size() == (1, case.ranks)
        sizes = (case.ranks // ranks_per_node, ranks_per_node)
        assert buffer.get_physical_domain_size() == (buffer.num_rdma_ranks, buffer.num_nvlink_ranks) == sizes
        nodes = consecutive(case.ranks, ranks_per_node)
        for mode in MODES:
            deal = Deal(rank, case, mode, 16)
            if several:
                round_trip(buffer, deal, nodes)
                continue
            handle = buffer.dispatch(deal.mine.x, **deal.arguments())[3]
            ys = deal.answers()
            bias = case.rows(rank, case.dtype, case.hidden, 7)
            wide = deal.oracle.combine(rank, [y.float() for y in ys], (bias.float(), bias.float()), nodes)
            out = buffer.combine(ys[rank], handle, bias=(bias, bias))[0]
            same_bits("combined_x", out, wide.to(case.dtype))
