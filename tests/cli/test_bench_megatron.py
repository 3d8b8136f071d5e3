"""`tokenferry bench megatron`: the program on CPU ranks, and what it says without Megatron-Core."""

import sys

import pytest

from support import clients
from support.bench_megatron_jobs import changing_combine, measure_megatron, wrong_combine
from support.bench_runs import bench_gpu_phases
from tokenferry.bench.report import training
from tokenferry.bench.suites import megatron
from tokenferry.cli import bench_phases
from tokenferry.cli.bench_settings import make_settings
from tokenferry.cli.main import main, make_parser


@pytest.fixture
def megatron_core(monkeypatch) -> None:
    """Let the ranks find Megatron-Core where `make test` puts it; they import what the test can."""
    folder = clients.folder_of("megatron-core", "0.19.2")
    monkeypatch.setattr(sys, "path", [*sys.path, *filter(None, [folder])])


@pytest.mark.usefixtures("megatron_core")
def test_a_step_of_each_dispatcher(tmp_path):
    run = bench_gpu_phases(tmp_path, "megatron", "--tokens", "12", megatron=measure_megatron)
    assert run.status == 0
    assert run.report["failed"] == []
    assert [item["dispatcher"] for item in run.report["training"]] == list(megatron.DISPATCHERS)
    assert len(run.report["training results"]) == 6
    for item in run.report["training results"]:
        assert len(item["differ_by"]) == 6, "the loss, and gradients of rows, routers and experts of two layers"
        assert max(item["differ_by"].values()) <= (1e-5 if item["dtype"] == "float32" else 2e-2)
    assert len(run.report["training repeated"]) == 16, "each dispatcher in both precisions, with both algorithms"
    assert {tuple(item["changed"]) for item in run.report["training repeated"]} == {()}
    assert "back to back ms" in run.output
    assert (
        "flex, hybridep in bfloat16, T=12, a step repeated with deterministic algorithms: the same bits" in run.output
    )
    for name in ("allgather", "flex, deepep", "flex, hybridep"):
        assert f"{name} and alltoall in float32" in run.output


@pytest.mark.usefixtures("megatron_core")
def test_a_wrong_sum_gets_no_time(tmp_path):
    run = bench_gpu_phases(tmp_path, "megatron", "--tokens", "12", megatron=wrong_combine)
    assert run.status == 1
    assert "flex, deepep differs from alltoall in float32" in run.report["failed"][0]["why"]
    assert "training" not in run.report


@pytest.mark.usefixtures("megatron_core")
def test_steps_that_change_are_told(tmp_path):
    run = bench_gpu_phases(tmp_path, "megatron", "--tokens", "12", megatron=changing_combine)
    assert run.status == 0
    changed = {
        item["dispatcher"]: item["changed"] for item in run.report["training repeated"] if "float32" in item["dtype"]
    }
    assert "loss" in changed.pop("flex, deepep")
    assert set(map(tuple, changed.values())) == {()}


def test_without_megatron(monkeypatch, capsys):
    monkeypatch.setattr(megatron, "version", lambda: None)
    monkeypatch.setattr(bench_phases, "need_gpus", lambda: 1)
    assert main(["bench", "megatron"]) == 3
    assert "Megatron-Core is not installed" in capsys.readouterr().out


def test_sizes_of_a_step():
    settings = make_settings(make_parser().parse_args(["bench", "megatron"]), 2)
    assert (settings.tokens, settings.hidden, settings.experts, settings.top_k) == ((4096,), 2048, 32, 8)


def test_rows_of_the_table():
    times = {"n": 2, "median_us": 2000.0, "p05_us": 1000.0, "p95_us": 3000.0}
    half = {name: us / 2 for name, us in times.items()}
    label = {"tokens": 8, "dtype": "bfloat16"}
    own = {"dispatcher": "alltoall", **label, "isolated": times, "back_to_back": times}
    flex = {"dispatcher": "flex, deepep", **label, "isolated": times, "back_to_back": half}
    assert training.rows([own, flex])[1] == [
        *("flex, deepep", "bfloat16", "8", "2.00 (1.00-3.00)", "1.00 (0.50-1.50)", "0.50"),
    ]
    (part,) = training.bars([own, flex])
    assert part.title == "a training step, T=8, bfloat16"
    assert part.groups == {"alltoall": {"back to back": 2.0}, "flex, deepep": {"back to back": 1.0}}
