"""Jobs of the tests of the low-latency calls; their results are compared with the oracle's."""

from dataclasses import replace

import torch
from torch import Tensor

from support.deep_ep_jobs import nodes_of
from tokenferry.compat.deep_ep import Buffer, EventHandle
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import close_each, same_bits
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast, ue8m0

M = 8

CASES = (
    Case((5, 3, 0, 7), experts=8, top_k=3, hidden=256),
    Case((4, 4, 4, 4), experts=8, top_k=2, hidden=512, routing="half_dropped", idx_dtype=torch.int32),
    Case((1, 2, 0, 3), experts=4, top_k=2, hidden=128, routing="nothing"),
)


def oracle_of(sent: list[Sent], num_experts: int) -> Oracle:
    return Oracle(sent, num_experts, "masked", capacity=len(sent) * M)


def check_rows(oracle: Oracle, rank: int, rows: Tensor, counts: Tensor, handle: tuple) -> None:
    """Rows, counts, and the two tensors of the handle."""
    flat = rows.view(-1, rows.shape[-1])
    same_bits("rows", flat[_places(oracle, rank)], oracle.x(rank))
    check_handle(oracle, rank, counts, handle)


def check_cast(oracle: Oracle, rank: int, rows: tuple[Tensor, Tensor], *, round_scale: bool, use_ue8m0: bool) -> None:
    """FP8 rows with their scales, column-major."""
    data, scale = rows
    width = oracle.sent[rank].x.shape[1]
    assert data.shape[2] == width
    assert data.dtype == torch.float8_e4m3fn
    assert scale.shape[:2] == data.shape[:2]
    assert scale.dtype == (torch.int32 if use_ue8m0 else torch.float32)
    assert scale.shape[2] == width // (512 if use_ue8m0 else 128)
    assert scale.shape[1] == 1 or scale.stride(1) == 1
    places = _places(oracle, rank)
    found = data.view(torch.uint8).view(-1, width)[places], scale.reshape(-1, scale.shape[2])[places]
    for row, inverse, x in zip(*found, oracle.x(rank), strict=True):
        cast, wanted = fp8_cast(x, power_of_two=round_scale)
        same_bits("row", row, cast.view(torch.uint8))
        same_bits("scale", inverse, ue8m0(wanted) if use_ue8m0 else wanted)


def _places(oracle: Oracle, rank: int) -> Tensor:
    return torch.tensor([row.place for row in oracle.rows(rank)], dtype=torch.int64)


def check_handle(oracle: Oracle, rank: int, counts: Tensor, handle: tuple) -> None:
    """Counts, and the two tensors of the handle as DeepEP's own programs read them."""
    places = _places(oracle, rank)
    assert counts.dtype == torch.int32
    assert counts.tolist() == oracle.expert_counts(rank)
    src_info, layout_range = handle[:2]
    assert (src_info.dtype, layout_range.dtype) == (torch.int32, torch.int64)
    assert src_info.flatten()[places].tolist() == [row.src_token for row in oracle.rows(rank)]
    found = [[(int(v) >> 32, int(v) & 0xFFFFFFFF) for v in line] for line in layout_range]
    wanted = oracle.decode_ranges(rank)
    for expert_found, expert_wanted in zip(found, wanted, strict=True):
        for one, other in zip(expert_found, expert_wanted, strict=True):
            assert one == other or one[1] == other[1] == 0  # where a range of nothing starts means nothing


def round_trip(rank, pg, case, each_waits=True):
    """BF16 rows: synchronous, with an event, with a hook; combine with weights, ``out`` and zero copy.

    ``each_waits``: what peers send is never there before this rank looks for it.
    """
    sent = case.inputs()
    mine, oracle = sent[rank], oracle_of(sent, case.experts)
    local = case.experts // case.ranks
    rows = local * case.ranks * M
    ys = [answers(case, oracle, r, rows, case.dtype) for r in range(case.ranks)]
    y = ys[rank].view(local, case.ranks * M, case.hidden)
    buffer = Buffer(pg, low_latency_mode=True)
    want = oracle.decode_combine(rank, ys, nodes=nodes_of(buffer))
    buffer.clean_low_latency_buffer(M, case.hidden, case.experts)
    received = torch.full((local,), 5, dtype=torch.int32)
    waited, waited_home = torch.zeros(2, case.ranks, dtype=torch.int64)
    for how in ({}, {"async_finish": True}, {"return_recv_hook": True}):
        x, counts, handle, event, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, M, case.experts, received, waited, use_fp8=False, round_scale=True, **how
        )
        assert (hook is not None) is ("return_recv_hook" in how)
        assert isinstance(event.event, EventHandle) is ("async_finish" in how)
        if hook:
            hook()
            hook()
        assert x.shape == (local, case.ranks * M, case.hidden)
        check_rows(oracle, rank, x, counts, handle)
        assert handle[2:5] == (M, case.hidden, case.experts)

        out = torch.full_like(mine.x, torch.nan)
        got, event, hook = buffer.low_latency_combine(
            y,
            mine.topk_idx.clone(),
            mine.topk_weights,
            handle,
            out=out,
            combine_wait_recv_cost_stats=waited_home,
            **how,
        )
        assert (hook is not None) is ("return_recv_hook" in how)
        assert isinstance(event.event, EventHandle) is ("async_finish" in how)
        if hook:
            hook()
        assert got is out
        same_bits("combined", got, want)
    assert received.tolist() == [5 + 3 * count for count in oracle.expert_counts(rank)]
    for stats in (waited, waited_home):
        assert stats[rank] == 0
        assert all(ns >= each_waits for r, ns in enumerate(stats.tolist()) if r != rank)

    place = buffer.get_next_low_latency_combine_buffer(handle)
    assert place.dtype == torch.bfloat16
    place[:, :, :] = y
    assert buffer.get_next_low_latency_combine_buffer(handle).data_ptr() == place.data_ptr()
    poison = torch.full_like(y, torch.nan)
    got, _, _ = buffer.low_latency_combine(poison, mine.topk_idx, mine.topk_weights, handle, zero_copy=True)
    same_bits("zero copy", got, want)


def fp8(rank, pg, case, round_scale, use_ue8m0):
    """FP8 rows: synchronous, with an event, with a hook."""
    sent = case.inputs()
    mine, oracle = sent[rank], oracle_of(sent, case.experts)
    form = {"round_scale": round_scale, "use_ue8m0": use_ue8m0}
    buffer = Buffer(pg, low_latency_mode=True)
    for how in ({}, {"async_finish": True}, {"return_recv_hook": True}):
        rows, counts, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, M, case.experts, **form, **how
        )
        if hook:
            hook()
        check_cast(oracle, rank, rows, **form)
        check_handle(oracle, rank, counts, handle)


def logfmt(rank, pg, case, exact=True):
    """Rows come home in 10 bits: as the oracle encodes them, and not as they are.

    Not ``exact``: logarithms may differ in their last bits, so that what lies half-way between two codes gets either.
    """
    sent = case.inputs()
    mine, oracle = sent[rank], oracle_of(sent, case.experts)
    local = case.experts // case.ranks
    ys = [answers(case, oracle, r, local * case.ranks * M, case.dtype) for r in range(case.ranks)]
    y = ys[rank].view(local, case.ranks * M, case.hidden)
    buffer = Buffer(pg, low_latency_mode=True)
    handle = buffer.low_latency_dispatch(mine.x, mine.topk_idx, M, case.experts, use_fp8=False)[2]
    out = torch.full_like(mine.x, torch.nan)
    nodes = nodes_of(buffer)
    want = oracle.decode_combine(rank, ys, encoding="logfmt10", nodes=nodes)
    for how in ({}, {"out": out}, {"return_recv_hook": True}):
        got, _, hook = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle, use_logfmt=True, **how)
        if hook:
            hook()
        if exact:
            same_bits("combined", got, want)
        else:
            _nearly(got, want, *oracle.decode_slack(rank, ys, nodes=nodes))
    if case.routing != "nothing" and len(mine.x):
        assert not torch.equal(got.cpu(), oracle.decode_combine(rank, ys, nodes=nodes))


def _nearly(got: Tensor, want: Tensor, one_code: Tensor, magnitude: Tensor) -> None:
    """Rounded to the same bits, but for a neighbouring code here and there."""
    assert got.dtype == want.dtype
    fine = magnitude * 2.0**-16 + want.float().abs() * torch.finfo(want.dtype).eps
    close_each("combined", got, want, fine + 1.01 * one_code)
    other_codes = int(((got.cpu().float() - want.float()).abs() > fine).sum())
    assert other_codes <= max(2, got.numel() // 100), f"{other_codes} numbers of {got.numel()} have other codes"


def shrink(rank, pg, case):
    """All ranks mask the last one, which masks all others: rows to and from it are missing, the rest is complete."""
    sent, last = case.inputs(), case.ranks - 1
    local = case.experts // case.ranks
    away = set(range(last)) if rank == last else {last}
    num_bytes = Buffer.get_low_latency_rdma_size_hint(M, case.hidden, case.ranks, case.experts)
    buffer = Buffer(pg, 0, num_bytes, low_latency_mode=True, enable_shrink=True)
    nodes = nodes_of(buffer)
    # Memory of these sizes is made with all ranks, so that masks may be cleared without a barrier.
    buffer.low_latency_dispatch(sent[rank].x, sent[rank].topk_idx, M, case.experts, use_fp8=False)
    for other in away:
        buffer.low_latency_update_mask_buffer(other, True)
    status = torch.full((case.ranks,), 9, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r in away) for r in range(case.ranks)]

    def seen(r: int, one: Sent) -> Sent:
        gone = torch.zeros_like(one.topk_idx, dtype=torch.bool)
        for other in away:
            gone |= (one.topk_idx >= other * local) & (one.topk_idx < (other + 1) * local)
        return Sent(one.x, torch.where(gone | (r in away), -1, one.topk_idx), one.topk_weights)

    def round_trip(seen_by_all: list[Sent]) -> None:
        oracle, mine = oracle_of(seen_by_all, case.experts), sent[rank]
        x, counts, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, M, case.experts, use_fp8=False)
        check_rows(oracle, rank, x, counts, handle)
        ys = [answers(case, oracle, r, local * case.ranks * M, case.dtype) for r in range(case.ranks)]
        y = ys[rank].view(local, case.ranks * M, case.hidden)
        got, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)
        same_bits("combined", got, oracle.decode_combine(rank, ys, nodes=nodes))

    round_trip([seen(r, one) for r, one in enumerate(sent)])
    pg.barrier().wait()  # nothing is under way: every rank that is here has compared its sums
    buffer.low_latency_clean_mask_buffer()
    pg.barrier().wait()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * case.ranks
    for _ in range(2):
        round_trip(list(sent))


def three_alive(rank, pg, case):
    """DeepEP lets two results live; here any number does, and hooks may be taken late."""
    sent = case.inputs()
    mine, oracle = sent[rank], oracle_of(sent, case.experts)
    buffer = Buffer(pg, low_latency_mode=True)
    results = [
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, M, case.experts, use_fp8=False, return_recv_hook=True)
        for _ in range(3)
    ]
    for result in results:
        result[4]()
    for x, counts, handle, _, _ in results:
        check_rows(oracle, rank, x, counts, handle)


def lost_rank(rank, pg, case):
    """With enable_shrink the call that misses a rank masks it instead of raising, and later calls go on."""
    sent, last = case.inputs(), case.ranks - 1
    local = case.experts // case.ranks
    mine = sent[rank]
    buffer = Buffer(pg, low_latency_mode=True, enable_shrink=True, explicitly_destroy=True)

    def dispatched() -> tuple:
        return buffer.low_latency_dispatch(mine.x, mine.topk_idx, M, case.experts, use_fp8=False)[:3]

    check_rows(oracle_of(list(sent), case.experts), rank, *dispatched())
    pg.barrier().wait()
    if rank == last:
        buffer.destroy()
    pg.barrier().wait()
    if rank != last:
        _, counts, handle = dispatched()
        assert (handle[1][:, last] & 0xFFFFFFFF).tolist() == [0] * counts.numel()
        status = torch.zeros(case.ranks, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * last + [1]
        left = [Sent(one.x, one.topk_idx.where(one.topk_idx < last * local, -1), one.topk_weights) for one in sent]
        left[last].topk_idx.fill_(-1)
        oracle = oracle_of(left, case.experts)
        x, counts, handle = dispatched()
        check_rows(oracle, rank, x, counts, handle)
        ys = [answers(case, oracle, r, local * case.ranks * M, case.dtype) for r in range(case.ranks)]
        y = ys[rank].view(local, case.ranks * M, case.hidden)
        got, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)
        same_bits("combined", got, oracle.decode_combine(rank, ys))
    pg.barrier().wait()


def gone_at_once(rank, pg, case, leave):
    """As DeepEP's test of shrink mode: ranks leave right after the constructor, and the others decode without them.

    Args:
        leave: Called by the last rank; returns, ends the process or stops it.
    """
    last = case.ranks - 1
    buffer = Buffer(pg, low_latency_mode=True, enable_shrink=True)
    if rank == last:
        leave()
        return
    status = torch.full((case.ranks,), 9, dtype=torch.int32)

    def masked() -> list[int]:
        buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    assert masked() == [0] * case.ranks
    for hidden, hook in ((case.hidden, False), (2 * case.hidden, True)):  # the second needs larger memory
        _without_the_last(buffer, rank, replace(case, hidden=hidden), hook)
        assert masked() == [0] * last + [1]
    buffer.low_latency_update_mask_buffer(last, False)
    assert masked() == [0] * case.ranks
    _without_the_last(buffer, rank, case, False)  # waits for it again
    assert masked() == [0] * last + [1]
    buffer.low_latency_clean_mask_buffer()
    assert masked() == [0] * case.ranks
    buffer.low_latency_update_mask_buffer(last, True)
    _without_the_last(buffer, rank, replace(case, hidden=4 * case.hidden), True)


def _without_the_last(buffer, rank, case, hook):
    """A dispatch and a combine of the rows of all ranks but the last."""
    last, local, mine = case.ranks - 1, case.experts // case.ranks, case.inputs()[rank]
    left = [
        Sent(one.x, one.topk_idx.where((one.topk_idx < last * local) & (src != last), -1), one.topk_weights)
        for src, one in enumerate(case.inputs())
    ]
    oracle = oracle_of(left, case.experts)
    x, counts, handle, _, receive = buffer.low_latency_dispatch(
        mine.x, mine.topk_idx, M, case.experts, use_fp8=False, return_recv_hook=hook
    )
    if hook:
        receive()
    check_rows(oracle, rank, x, counts, handle)
    ys = [answers(case, oracle, r, local * case.ranks * M, case.dtype) for r in range(case.ranks)]
    y = ys[rank].view(local, case.ranks * M, case.hidden)
    got, _, receive = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle, return_recv_hook=hook)
    if hook:
        receive()
    same_bits("combined", got, oracle.decode_combine(rank, ys))
