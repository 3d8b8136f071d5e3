"""Jobs of the tests of `tokenferry.compat.deep_ep`; their results are compared with the oracle's."""

import os
import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.compat.deep_ep import Buffer, EventHandle
from tokenferry.compat.deep_ep.throughput import Handle
from tokenferry.errors import ArgumentError, CapacityError, MismatchError, ShapeError
from tokenferry.testing.cases import Case, answers, returned_weights
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle, Sent
from tokenferry.topology import consecutive

CASES = (
    Case((5, 3, 0, 7), experts=8, top_k=3, hidden=16),
    Case((4, 4, 4, 4), experts=4, top_k=2, hidden=24, routing="half_dropped", idx_dtype=torch.int32),
    Case((3, 6, 2, 1), experts=12, top_k=5, hidden=8, routing="one_rank_idle", dtype=torch.float32),
    Case((2, 3, 4, 5), experts=8, top_k=2, hidden=16, routing="repeated"),
    Case((2, 2, 2, 2), experts=8, top_k=2, hidden=16, routing="nothing"),
)


def on_nodes(
    rank: int, pg: dist.ProcessGroup, ranks_per_node: int, job: Callable[..., object], *args: object
) -> object:
    """Run a job whose groups have nodes of so many ranks."""
    with mock.patch.dict(os.environ, TOKENFERRY_RANKS_PER_NODE=str(ranks_per_node)):
        return job(rank, pg, *args)


def ranks_per_node(buffer: Buffer) -> int:
    """The ranks of a node, as a program for DeepEP asks for them."""
    return buffer.group_size // buffer.runtime.get_num_rdma_ranks()


def nodes_of(buffer: Buffer) -> tuple[tuple[int, ...], ...]:
    """The ranks of each node."""
    return consecutive(buffer.group_size, ranks_per_node(buffer))


def layout_arguments(buffer: Buffer, topk_idx: Tensor, num_experts: int) -> dict[str, Tensor | None]:
    """The four arguments of `Buffer.dispatch` that `Buffer.get_dispatch_layout` makes."""
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def check_layout(buffer: Buffer, mine: Sent, case: Case) -> None:
    """By plain loops over tokens."""
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(mine.topk_idx, case.experts)
    local = case.experts // case.ranks
    chosen = [set(experts) - {-1} for experts in mine.topk_idx.tolist()]
    want_in = [[any(e // local == rank for e in experts) for rank in range(case.ranks)] for experts in chosen]
    assert in_rank.tolist() == want_in
    assert in_rank.dtype == torch.bool
    assert per_rank.tolist() == [sum(row[rank] for row in want_in) for rank in range(case.ranks)]
    assert per_expert.tolist() == [sum(e in experts for experts in chosen) for e in range(case.experts)]
    assert per_rank.dtype == per_expert.dtype == torch.int32
    check_nodes(buffer, per_node, want_in)
    assert event.event is None


def check_nodes(buffer: Buffer, per_node: Tensor | None, in_rank: list[list[bool]]) -> None:
    """A token counts once for each node that it goes to; one node is not counted."""
    size, runtime = ranks_per_node(buffer), buffer.runtime
    assert runtime.is_internode_available() is (size < buffer.group_size)
    assert (runtime.get_rdma_rank(), runtime.get_root_rdma_rank(True)) == divmod(buffer.rank, size)
    assert runtime.get_root_rdma_rank(False) == 0
    if size == buffer.group_size:
        assert per_node is None
        return
    assert per_node.dtype == torch.int32
    firsts = range(0, buffer.group_size, size)
    assert per_node.tolist() == [sum(any(row[first : first + size]) for row in in_rank) for first in firsts]


def round_trip(rank, pg, case):
    """dispatch, cached dispatch, combine; synchronous and not."""
    sent = case.inputs()
    mine, oracle = sent[rank], Oracle(sent, case.experts)
    ys = [answers(case, oracle, r, oracle.num_delivered(r), case.dtype) for r in range(case.ranks)]
    ws = [returned_weights(case, oracle, r, oracle.num_delivered(r)) for r in range(case.ranks)]
    buffer = Buffer(pg, 1 << 20, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size, buffer.group) == (rank, case.ranks, pg)
    check_layout(buffer, mine, case)
    given, nodes = layout_arguments(buffer, mine.topk_idx, case.experts), nodes_of(buffer)
    for async_finish in (False, True):
        event = Buffer.capture() if async_finish else None
        how = {"previous_event": event, "async_finish": async_finish, "allocate_on_comm_stream": async_finish}
        x, ids, weights, counts, handle, event = buffer.dispatch(
            mine.x.clone().requires_grad_(),
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            expert_alignment=4,
            config=Buffer.get_dispatch_config(case.ranks),
            **given,
            **how,
        )
        assert not x.requires_grad
        same_bits("recv_x", x, oracle.x(rank))
        same_bits("recv_topk_idx", ids, oracle.topk_idx(rank))
        same_bits("recv_topk_weights", weights, oracle.weights(rank))
        assert counts == [-(-count // 4) * 4 for count in oracle.expert_counts(rank)]
        assert all(type(count) is int for count in counts)
        assert isinstance(event.event, EventHandle) is async_finish
        check_handle(buffer, handle, oracle)

        again = buffer.dispatch(mine.x * 2, handle=handle, **how)
        assert again[1:5] == (None, None, None, None)
        same_bits("cached recv_x", again[0], oracle.x(rank) * 2)
        bias = case.rows(rank, case.dtype, case.hidden, 7)
        for biases in (None, bias, (bias, bias)):
            given_bias = () if biases is None else biases if isinstance(biases, tuple) else (biases,)
            out, out_weights, event = buffer.combine(ys[rank], handle, ws[rank], biases, **how)
            same_bits("combined_x", out, oracle.combine(rank, ys, given_bias, nodes))
            same_bits("combined_topk_weights", out_weights, oracle.combine_weights(rank, ws, nodes))
            assert isinstance(event.event, EventHandle) is async_finish
        assert buffer.combine(ys[rank], handle)[1] is None
    buffer.destroy()
    buffer.destroy()
    assert buffer.runtime is None


def check_handle(buffer: Buffer, handle: Handle, oracle: Oracle) -> None:
    """What DeepEP's own tests read: with one node the first element, with several the fourth from the end."""
    received, rank = oracle.received(buffer.rank), buffer.rank
    rows_from = [sum(src <= r for src, _ in received) for r in range(buffer.group_size)]
    if ranks_per_node(buffer) == buffer.group_size:
        prefix, _, _, tokens, in_rank, _, plan = handle
        assert prefix.shape == (buffer.group_size, buffer.group_size)
        assert plan is handle.plan
        assert tokens.tolist() == [token for _, token in received]
        prefix = prefix[:, rank]
    else:
        in_rank, prefix, *channels = handle[0], handle[-4], *handle[1:6], *handle[-3:]
        assert channels == [None] * 8
        assert len(handle) == 10
    assert (prefix.dtype, prefix.tolist()) == (torch.int32, rows_from)
    assert in_rank is handle.in_rank


def internode_calls(rank, pg, case):
    """The calls that DeepEP makes across nodes do what `dispatch` and `combine` do, and want several nodes."""
    mine = case.inputs()[rank]
    buffer = Buffer(pg, 1 << 20, 1 << 20)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    whole = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights, **given}
    how = {"config": Buffer.get_dispatch_config(case.ranks), "previous_event": Buffer.capture(), "async_finish": True}
    if ranks_per_node(buffer) == case.ranks:
        with pytest.raises(ArgumentError, match=r"internode_dispatch: the group has one node; call Buffer\.dispatch"):
            buffer.internode_dispatch(mine.x, **whole, **how)
        with pytest.raises(ArgumentError, match=r"internode_combine: the group has one node; call Buffer\.combine"):
            buffer.internode_combine(mine.x, buffer.dispatch(mine.x, **whole)[4])
        return
    want, mirrored = buffer.dispatch(mine.x, **whole, expert_alignment=2), {**how, "allocate_on_comm_stream": True}
    got = buffer.internode_dispatch(mine.x, expert_alignment=2, **whole, **mirrored)
    for name, one, other in zip(("x", "ids", "weights"), got, want, strict=False):
        same_bits(name, one, other)
    assert (got[3], isinstance(got[5].event, EventHandle)) == (want[3], True)
    again = buffer.internode_dispatch(mine.x * 2, got[4], **how)
    same_bits("cached", again[0], got[0] * 2)
    arguments = (got[0], got[4], got[2], (mine.x, mine.x))
    for one, other in zip(buffer.internode_combine(*arguments, **how), buffer.combine(*arguments), strict=True):
        if isinstance(one, Tensor):
            same_bits("combined", one, other)


def wrong_nodes(rank, pg, case):
    """Counts of nodes that contradict the routing are refused before anything is sent."""
    mine = case.inputs()[rank]
    buffer = Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    per_node = given["num_tokens_per_rdma_rank"]
    for wrong, error in ((per_node + 1, ArgumentError), (per_node[:1], ShapeError)):
        for ids in (mine.topk_idx, None):
            with pytest.raises(error, match="num_tokens_per_rdma_rank"):
                buffer.dispatch(mine.x, topk_idx=ids, **given | {"num_tokens_per_rdma_rank": wrong})
    x = buffer.dispatch(mine.x, topk_idx=mine.topk_idx, **given | {"num_tokens_per_rdma_rank": None})[0]
    same_bits("recv_x", x, Oracle(case.inputs(), case.experts).x(rank))


def scales(rank, pg, case, dtype):
    """Rows with scales travel as bytes: dtype, width and strides of scales are free."""
    sent = case.inputs()
    mine, oracle = sent[rank], Oracle(sent, case.experts)
    data = [case.rows(r, torch.float32, 32, 1).to(torch.float8_e4m3fn) for r in range(case.ranks)]
    scale = [case.rows(r, torch.float32, 6, 2).view(torch.int32).to(dtype) for r in range(case.ranks)]
    buffer = Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    column_major = scale[rank].T.contiguous().T
    (rows, got), ids, weights, _, handle, _ = buffer.dispatch(
        (data[rank], column_major), topk_idx=mine.topk_idx, **given
    )
    same_bits("rows", rows, oracle.x(rank, data))
    same_bits("scales", got, oracle.x(rank, scale))
    assert got.is_contiguous()
    assert weights is None
    same_bits("ids", ids, oracle.topk_idx(rank))
    flat = [s[:, 0].contiguous() for s in scale]
    (rows, got), *_ = buffer.dispatch((data[rank], flat[rank]), handle=handle)
    same_bits("one scale a row", got, oracle.x(rank, flat))
    bare, *_ = buffer.dispatch(data[rank], handle=handle)
    same_bits("rows without scales", bare, oracle.x(rank, data))


def without_experts(rank, pg, case):
    """``topk_idx=None``: rows alone, by is_token_in_rank; the list counts by num_tokens_per_expert."""
    sent = case.inputs()
    mine, oracle = sent[rank], Oracle(sent, case.experts)
    buffer = Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    x, ids, weights, counts, handle, _ = buffer.dispatch(mine.x, expert_alignment=2, **given)
    same_bits("recv_x", x, oracle.x(rank))
    assert ids is None
    assert weights is None
    assert counts == [-(-count // 2) * 2 for count in oracle.expert_counts(rank)]
    ys = [answers(case, oracle, r, oracle.num_delivered(r), case.dtype) for r in range(case.ranks)]
    want = oracle.combine(rank, ys, nodes=nodes_of(buffer))
    same_bits("combined_x", buffer.combine(ys[rank], handle)[0], want)


def dropped_ranks(rank, pg, case):
    """Where is_token_in_rank leaves a rank out, slots of that rank do not travel."""
    sent = case.inputs()
    local = case.experts // case.ranks
    last = case.ranks - 1
    kept = [Sent(s.x, torch.where(s.topk_idx // local == last, -1, s.topk_idx), s.topk_weights) for s in sent]
    oracle = Oracle(kept, case.experts)
    buffer = Buffer(pg)
    given = layout_arguments(buffer, kept[rank].topk_idx, case.experts)
    mine = sent[rank]
    x, ids, weights, *_ = buffer.dispatch(mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, **given)
    same_bits("recv_x", x, oracle.x(rank))
    same_bits("recv_topk_idx", ids, oracle.topk_idx(rank))
    same_bits("recv_topk_weights", weights, oracle.weights(rank))


def worst_tokens(rank, pg, case):
    """num_worst_tokens: fixed shapes, an empty list, a tail that says that it is one."""
    sent = case.inputs()
    mine, oracle = sent[rank], Oracle(sent, case.experts)
    num = oracle.num_delivered(rank)
    buffer = Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    capacity = sum(case.tokens)
    x, ids, weights, counts, handle, _ = buffer.dispatch(
        mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, num_worst_tokens=capacity, **given
    )
    assert x.shape == (capacity, case.hidden)
    assert ids.shape == weights.shape == (capacity, case.top_k)
    assert counts == []
    same_bits("recv_x", x[:num], oracle.x(rank))
    same_bits("recv_topk_idx", ids[:num], oracle.topk_idx(rank))
    same_bits("recv_topk_weights", weights[:num], oracle.weights(rank))
    assert (ids[num:] == -1).all()
    assert (weights[num:] == 0).all()
    y = torch.full((capacity, case.hidden), torch.nan, dtype=case.dtype)
    ys = [answers(case, oracle, r, oracle.num_delivered(r), case.dtype) for r in range(case.ranks)]
    y[:num] = ys[rank]
    same_bits("combined_x", buffer.combine(y, handle)[0], oracle.combine(rank, ys, (), nodes_of(buffer)))
    same_bits("cached recv_x", buffer.dispatch(mine.x, handle=handle)[0][:num], oracle.x(rank))


def too_few_worst_tokens(rank, pg, case):
    """Errors name num_worst_tokens, and say what to pass; what no rank could hold leaves the buffer usable."""
    mine, buffer = case.inputs()[rank], Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    routed = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights, **given}
    most = max(case.tokens)
    with pytest.raises(CapacityError) as caught:
        buffer.dispatch(mine.x, num_worst_tokens=most, **routed)
    found = rf"rank \d received \d+ rows, capacity={most}; pass R times the most tokens of any rank"
    assert re.fullmatch(rf"Buffer.dispatch: num_worst_tokens={most} holds too few rows: {found}", str(caught.value))
    assert buffer.dispatch(mine.x, num_worst_tokens=4 * most, **routed)[0].shape[0] == 4 * most
    said = rf"num_worst_tokens is ({4 * most}|0) on rank \d and ({4 * most}|0) on rank \d"
    with pytest.raises(MismatchError, match=said):
        buffer.dispatch(mine.x, num_worst_tokens=0 if rank == 3 else 4 * most, **routed)


def backward(rank, pg, case):
    """Backward of dispatch is combine, backward of combine is cached dispatch: <dispatch(x), y> == <x, combine(y)>."""
    sent = case.inputs()
    mine = sent[rank]
    buffer = Buffer(pg)
    given = layout_arguments(buffer, mine.topk_idx, case.experts)
    x = mine.x.float()
    there, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, **given)
    y = torch.randn(there.shape, generator=torch.Generator().manual_seed(rank))
    home = buffer.combine(y, handle)[0]
    grad_y = buffer.dispatch(x, handle=handle)[0]
    same_bits("gradient of combine", grad_y, there)
    return (there.cpu().double() * y).sum().item(), (x.double() * home.cpu()).sum().item()


def in_a_batch(rank, pg):
    """Two handles alive at once, and the same one used twice, in any order."""
    buffer = Buffer(pg)
    handles, outs = [], []
    for seed in range(2):
        case = Case((3, 1, 2, 4), experts=8, top_k=2, hidden=16, seed=seed)
        mine = case.inputs()[rank]
        given = layout_arguments(buffer, mine.topk_idx, case.experts)
        x, _, _, _, handle, _ = buffer.dispatch(mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, **given)
        handles.append((handle, x))
    for _ in range(2):
        outs.append([buffer.combine(x, handle)[0] for handle, x in reversed(handles)])
    for first, second in zip(*outs, strict=True):
        same_bits("twice", first, second)
