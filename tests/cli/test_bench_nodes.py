"""`tokenferry bench nodes`: calls across nodes beside their legs, checked, with the rows that crossed."""

from types import SimpleNamespace

import pytest

from support.bench_nodes_jobs import miscounted, wrong_dispatch, wrong_leg, wrong_pair
from support.bench_runs import bench_gpu_phases
from tokenferry.bench.core.inputs import Sizes
from tokenferry.bench.report.nodes import (
    MEMORY_HEADER,
    MEMORY_PARTS,
    memory_line,
    memory_rows,
    replayed_line,
    replayed_rows,
    show,
)
from tokenferry.bench.report.tables import Table
from tokenferry.bench.suites.nodes_shim import v1_hints
from tokenferry.cli.bench_settings import nodes_ranks
from tokenferry.cli.main import main
from tokenferry.transports.base import HEADER_INTS

WORDS = ["nodes", "--ranks-per-node", "1", "--tokens", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return bench_gpu_phases(tmp_path_factory.mktemp("nodes"), *WORDS)


CALLS = ["dispatch", "redispatch", "combine"]


def test_calls_and_their_legs_are_measured(run):
    assert run.status == 0
    assert run.report["failed"] == []
    items = run.report["nodes"]
    assert [item["call"] for item in items] == CALLS
    for item in items:
        assert (item["nodes"], item["transport"]) == ("2 nodes of 1 rank", "process_group")
        rows = item["rows_across"]
        assert 0 < rows <= 6
        assert item["empty_us"] > 0
        for part in ("whole", "network", "inside"):
            assert 0 < item[part]["p05_us"] <= item[part]["median_us"] <= item[part]["p95_us"]


def test_the_same_calls_are_measured_without_the_host(run):
    items = run.report["nodes replayed"]
    assert [item["call"] for item in items] == CALLS
    for item in items:
        assert (item["nodes"], item["tokens"], item["graphs"]) == ("2 nodes of 1 rank", 6, False)
        for part in ("whole", "network", "inside"):
            assert 0 < item[part]["p05_us"] <= item[part]["median_us"] <= item[part]["p95_us"]


def test_calls_in_graphs_are_shown_as_such(run):
    """As if the run had been one on GPUs."""
    times = {"median_us": 30.0, "p05_us": 29.0, "p95_us": 31.0, "n": 20}
    item = {**run.report["nodes replayed"][2], "graphs": True, "whole": times, "network": times | {"median_us": 20.0}}
    item["inside"] = times | {"median_us": 15.0}
    assert replayed_line(item) == "2 nodes of 1 rank: combine, T=6: 30.0 us in a graph"
    assert replayed_rows([item]) == [
        ["combine", "6", "30.0 (29.0-31.0)", "20.0 (29.0-31.0)", "15.0 (29.0-31.0)", "1.50"]
    ]
    kinds = {"nodes": run.report["nodes"], "nodes replayed": [item]}
    settings = SimpleNamespace(between="nvlink", ranks=2, backend="cuda")
    report = SimpleNamespace(items=lambda kind: kinds.get(kind, []), settings=settings, about={"gpus": {"count": 2}})
    titles = [part.title for part in show(report) if isinstance(part, Table)]
    assert titles[1] == "2 nodes of 1 rank, process_group, CUDA graphs, median us (5th-95th percentile)"


HEADER = 8 * (HEADER_INTS + 2)
"""Bytes that announce a message, if it has any or not."""


def test_bytes_are_counted_where_they_leave(run):
    """One header for the other node. A token has ids and its number, of 8 bytes each, and weights of 4."""
    top_k = run.report["settings"]["top_k"]
    for item, metadata in zip(run.report["nodes"], (12 * top_k + 8, 0, 0), strict=True):
        assert item["besides_bytes"] == HEADER + item["rows_across"] * metadata
        assert item["sent_bytes"] == item["besides_bytes"] + item["rows_across"] * item["row_bytes"]


def test_bytes_of_pairs_are_counted_where_they_leave(run):
    """Rows, weights of exact sums, and sums have a header each, and are those of tokens that cross: no slots here."""
    settings, rows = run.report["settings"], run.report["nodes"][0]["rows_across"]
    exact, fast = run.report["nodes decode"]
    hidden, top_k = settings["hidden"], settings["top_k"]
    fp8 = hidden + 4 * (hidden // 128) + 12 * top_k + 8
    assert fast["sent_bytes"] == pytest.approx(3 * HEADER + rows * (fp8 + 2 * hidden), abs=16)  # rounded up
    assert exact["sent_bytes"] - fast["sent_bytes"] == pytest.approx(rows * 4 * top_k, abs=16)


def test_pairs_of_decode_calls_and_their_legs_are_measured(run):
    items = run.report["nodes decode"]
    assert [item["numerics"] for item in items] == ["exact", "fast"]
    for item in items:
        hidden = run.report["settings"]["hidden"]
        assert (item["rows_across"], item["graphs"]) == (6, False)
        assert item["bytes_across"] == 6 * (hidden + 4 * -(-hidden // 128) + 2 * hidden)
        for part in ("whole", "network", "inside", "eager"):
            assert 0 < item[part]["p05_us"] <= item[part]["median_us"] <= item[part]["p95_us"]


def test_the_table_says_what_it_shows(run):
    for text in (
        "over slower leg",
        "torch.empty(8) us",
        "MB besides",
        "MB sent",
        "rows across",
        "loopback",
        "not rates of a network",
        "bit-equal",
        "process_group, back to back",
        "over both legs",
        "bit-equal from a graph",
    ):
        assert text in run.output


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (wrong_dispatch, "rank 1: dispatch: 1 of"),
        (wrong_leg, "rank 1: rows from node 0 alone:"),
        (miscounted, "rows came over the network, one for each token would be"),
    ],
)
def test_a_wrong_answer_gets_no_time(tmp_path, job, text):
    run = bench_gpu_phases(tmp_path, *WORDS, nodes=job)
    assert run.status == 1
    assert "nodes" not in run.report
    assert text in run.report["failed"][0]["why"]


def test_a_wrong_pair_gets_no_time(tmp_path):
    run = bench_gpu_phases(tmp_path, *WORDS, nodes_decode=wrong_pair)
    assert run.status == 1
    assert "nodes decode" not in run.report
    assert "rank 1: exact pair: outside the bound" in run.report["failed"][-1]["why"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nodes", "--ranks", "4", "--ranks-per-node", "3"], "expected at least two nodes, of equally many ranks"),
        (["nodes", "--ranks", "4", "--ranks-per-node", "4"], "expected at least two nodes, of equally many ranks"),
        (["nodes", "--between", "nvlink"], "--between is for GPUs"),
    ],
)
def test_wrong_options(capsys, words, text):
    assert main(["bench", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("num_gpus", "ranks"), [(0, 4), (1, 2), (2, 4), (4, 4), (8, 8)])
def test_few_gpus_are_shared_by_two_nodes(num_gpus, ranks):
    assert nodes_ranks(num_gpus) == ranks


def test_memory_is_shown_beside_the_hints_of_deepep():
    hints = v1_hints(Sizes(4, 6, 7168, 8, 256, 0), per_node=2)
    item = {"tokens": 6, "group_bytes": 70e6, "window_bytes": 65e6, "call_bytes": 3e6, **hints}
    row_bytes, channels = 2 * 7168 + 2056, 10
    assert item["v1_nvl_bytes"] == pytest.approx(channels * 2 * 256 * row_bytes, rel=0.001)  # of each rank of a node
    assert item["v1_rdma_bytes"] == pytest.approx(channels * 2 * 2 * 132 * row_bytes, rel=0.001)  # each node, both ways
    assert memory_line(item) == (
        "memory of a rank, T=6: group 70 MB, calls 3 MB; V1 84 MB for NVLink, 87 MB for the network"
    )
    assert memory_rows([item]) == [["6", "70.0", "65.0", "3.0", "83.9", "86.6"]]


def test_memory_is_a_table(run):
    """As if the run had been one on GPUs."""
    item = {"tokens": 6, **dict.fromkeys(MEMORY_PARTS, 7e6)}
    settings = SimpleNamespace(between="sockets", ranks=2, backend="cpu")
    kinds = {"nodes": run.report["nodes"], "nodes memory": [item]}
    report = SimpleNamespace(items=lambda kind: kinds.get(kind, []), settings=settings, about={"gpus": {"count": 0}})
    [_, table] = [shown for shown in show(report) if isinstance(shown, Table)]
    assert (table.title, table.header) == ("memory of a rank", MEMORY_HEADER)
    assert table.rows == [["6", *["7.0"] * 5]]
