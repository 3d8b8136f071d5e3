"""`tokenferry bench nodes`: calls across nodes beside their legs, checked, with the rows that crossed."""

import pytest

from support.bench_nodes_jobs import miscounted, wrong_dispatch
from support.bench_runs import bench_gpu_phases
from tokenferry.cli.main import main

WORDS = ["nodes", "--ranks-per-node", "1", "--tokens", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return bench_gpu_phases(tmp_path_factory.mktemp("nodes"), *WORDS)


def test_both_calls_and_their_legs_are_measured(run):
    assert run.status == 0
    assert run.report["failed"] == []
    items = run.report["nodes"]
    assert [item["call"] for item in items] == ["dispatch", "combine"]
    for item in items:
        assert (item["nodes"], item["transport"]) == ("2 nodes of 1 rank", "process_group")
        assert 0 < item["rows_across"] <= 6
        for part in ("whole", "network", "inside"):
            assert 0 < item[part]["p05_us"] <= item[part]["median_us"] <= item[part]["p95_us"]


def test_the_table_says_what_it_shows(run):
    for text in ("over slower leg", "rows across", "loopback", "not rates of a network", "bit-equal"):
        assert text in run.output


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (wrong_dispatch, "rank 1: dispatch: 1 of"),
        (miscounted, "rows came over the network, one for each token would be"),
    ],
)
def test_a_wrong_answer_gets_no_time(tmp_path, job, text):
    run = bench_gpu_phases(tmp_path, *WORDS, nodes=job)
    assert run.status == 1
    assert "nodes" not in run.report
    assert text in run.report["failed"][0]["why"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nodes", "--device", "cuda"], "GPUs do not cross nodes in this version"),
        (["nodes", "--ranks", "4", "--ranks-per-node", "3"], "expected at least two nodes, of equally many ranks"),
        (["nodes", "--ranks", "4", "--ranks-per-node", "4"], "expected at least two nodes, of equally many ranks"),
        (["eager", "--device", "cpu", "--ranks-per-node", "2"], "--ranks-per-node is for calls across nodes"),
    ],
)
def test_wrong_options(capsys, words, text):
    assert main(["bench", *words]) == 2
    assert text in capsys.readouterr().err
