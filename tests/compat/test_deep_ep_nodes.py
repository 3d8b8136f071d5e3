"""The calls of DeepEP across nodes: two nodes of two ranks, three of two, and nodes of one rank; on CPUs."""

from unittest import mock

import pytest
import torch

from support import deep_ep_decode_jobs as decode_jobs
from support import deep_ep_jobs as jobs
from tokenferry.compat.deep_ep import Buffer
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle

CASES = (
    (2, jobs.CASES[0]),
    (2, jobs.CASES[1]),
    (1, jobs.CASES[2]),
    (2, Case((3, 1, 0, 4, 2, 2), experts=12, top_k=4, hidden=16)),
    (3, Case((3, 1, 0, 4, 2, 2), experts=6, top_k=3, hidden=8, routing="one_rank_idle", dtype=torch.float32)),
)
"""Ranks a node and case: 2 x 2 (twice), 4 x 1, 3 x 2 and 2 x 3."""

on_several_nodes = pytest.mark.parametrize(
    ("per_node", "case"), CASES, ids=lambda v: f"nodes_of_{v}" if isinstance(v, int) else str(v)
)


@on_several_nodes
def test_round_trip(worlds, per_node, case):
    worlds(case.ranks).run(jobs.on_nodes, per_node, jobs.round_trip, case)


@on_several_nodes
def test_num_worst_tokens(worlds, per_node, case):
    worlds(case.ranks).run(jobs.on_nodes, per_node, jobs.worst_tokens, case)


@on_several_nodes
def test_without_topk_idx(worlds, per_node, case):
    worlds(case.ranks).run(jobs.on_nodes, per_node, jobs.without_experts, case)


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        (jobs.internode_calls, ()),
        (jobs.wrong_nodes, ()),
        (jobs.scales, (torch.int32,)),
        (jobs.dropped_ranks, ()),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_on_two_nodes_of_two_ranks(worlds, job, arguments):
    worlds(4).run(jobs.on_nodes, 2, job, jobs.CASES[0], *arguments)


def test_internode_calls_want_several_nodes(worlds):
    worlds(2).run(jobs.internode_calls, Case((3, 2), experts=4, top_k=2, hidden=16))


def test_handles_are_not_consumed(worlds):
    worlds(4).run(jobs.on_nodes, 2, jobs.in_a_batch)


def test_each_direction_is_the_transpose_of_the_other(worlds):
    sums = worlds(4).run(jobs.on_nodes, 2, jobs.backward, jobs.CASES[0])
    there, home = (sum(side) for side in zip(*sums, strict=True))
    assert there == pytest.approx(home, rel=1e-5)


def interleaved(rank, pg, case):
    """Ranks 0 and 2 are on one host, 1 and 3 on another; DeepEP numbers nodes by consecutive ranks."""
    mine, experts_per_rank = case.inputs()[rank], case.experts // case.ranks
    with mock.patch("tokenferry.transports.rendezvous.host_name", return_value="abab"[rank]):
        buffer = Buffer(pg)
    assert (buffer.runtime.get_rdma_rank(), buffer.runtime.get_root_rdma_rank(True)) == (rank % 2, rank // 2)
    given = jobs.layout_arguments(buffer, mine.topk_idx, case.experts)
    goes_to = [{e // experts_per_rank % 2 for e in experts if e >= 0} for experts in mine.topk_idx.tolist()]
    assert given["num_tokens_per_rdma_rank"].tolist() == [sum(node in nodes for nodes in goes_to) for node in (0, 1)]
    x, ids, _, _, handle, _ = buffer.dispatch(mine.x, topk_idx=mine.topk_idx, **given)
    oracle = Oracle(case.inputs(), case.experts)
    same_bits("recv_x", x, oracle.x(rank))
    same_bits("recv_topk_idx", ids, oracle.topk_idx(rank))
    jobs.check_handle(buffer, handle, oracle)


@pytest.mark.parametrize("case", jobs.CASES[:3], ids=str)
def test_nodes_need_not_be_consecutive_ranks(worlds, case):
    worlds(4).run(interleaved, case)


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (6, 2)])
def test_low_latency_calls(worlds, ranks, per_node):
    case = Case((5, 3, 0, 7, 2, 8)[:ranks], experts=2 * ranks, top_k=3, hidden=256)
    worlds(ranks).run(jobs.on_nodes, per_node, decode_jobs.round_trip, case)


@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_low_latency_calls_in_fp8(worlds, use_ue8m0):
    worlds(4).run(jobs.on_nodes, 2, decode_jobs.fp8, decode_jobs.CASES[1], use_ue8m0, use_ue8m0)


def test_low_latency_calls_in_logfmt(worlds):
    worlds(4).run(jobs.on_nodes, 2, decode_jobs.logfmt, decode_jobs.CASES[0])
