"""`tokenferry limits`: what it checks, computes and prints. The kernels themselves need GPUs: tests/cuda."""

import json

import pytest
import torch

from support import limits_jobs
from support.limits_jobs import SMALL
from tokenferry.bench.core import gpus as gpu
from tokenferry.bench.core.gpus import Gpus
from tokenferry.bench.report import plots
from tokenferry.bench.suites import limits as bench_limits
from tokenferry.bench.suites.limits import Limits, Rate
from tokenferry.bench.suites.links import rows_per_source, window_bytes
from tokenferry.cli import limits
from tokenferry.cli.main import main
from tokenferry.kernels.link_limits import spec
from tokenferry.testing.world import World

GPUS = Gpus(2, "H200", "13.0", ())


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_measure(worlds, num_ranks):
    for found, shown, launches in worlds(num_ranks).run(limits_jobs.measure):
        assert isinstance(found, Limits)
        assert found.num_ranks == num_ranks
        # 100 SMs are not there: the 5 that are stand for them.
        points = {(rate.kind, rate.row_bytes, rate.num_sms) for rate in found.rates}
        assert points == {(k, b, s) for k in ("store", "load", "copy") for b in (16, 48) for s in (2, 3, 5)}
        assert all(rate.gbps > 0 for rate in found.rates)
        # One store that is checked, one that does not count, two that do.
        assert launches == [("store", sms) for _ in range(2) for sms in (2, 3, 5) for _ in range(4)]
        assert len(shown) <= bench_limits.num_steps(SMALL)
        if num_ranks == 1:
            assert found.flag_us is None
            assert found.barrier_us is None
        else:
            assert 100_000 <= found.flag_us < 200_000, "one way is half of the 0.2 s that an iteration takes"
            assert found.barrier_us > 0


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        ("store", "bulk store: 1 of 27 rows from rank 1 are wrong in the window of rank 0"),
        ("load", "bulk load: 1 of 27 rows are wrong on rank 1"),
        ("copy", "local copy: 1 of 27 rows are wrong on rank 0; local copy: 1 of 27 rows are wrong on rank 1"),
    ],
)
def test_misplaced_rows_are_reported_by_all_ranks(worlds, spoil, error):
    assert worlds(2).run(limits_jobs.measure, spoil) == [error] * 2


def some_limits():
    rates = [Rate("store", 7168, 8, 300.0), Rate("store", 14336, 8, 310.0), Rate("load", 7168, 8, 290.0)]
    return Limits(2, tuple(rates), 1.27, 1.84)


def test_limits_answer():
    found = some_limits()
    assert found.best("store") == 310.0
    assert found.best("store", 7168) == 300.0
    assert found.best("copy") == 0.0
    assert found.at("load", 8, 7168) == 290.0
    assert found.at("load", 9, 7168) is None


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(limits, "need_gpus", lambda: 2)
    monkeypatch.setattr(limits, "find_gpus", lambda: GPUS)
    monkeypatch.setattr(limits, "World", lambda ranks, devices, timeout_s: World(ranks, timeout_s=timeout_s))


def test_command(two_gpus, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(limits, "measure_limits", limits_jobs.stand_in)
    file = tmp_path / "limits.json"
    assert main(["limits", "--json", str(file), "--plot", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    for text in ("2 x H200", "store 16 B", "copy 48 B", "flag, one way", "barrier of 2 ranks", "best: store"):
        assert text in out
    whole = json.loads(file.read_text())
    assert whole["command"].startswith("tokenferry limits --json")
    points = {(rate["kind"], rate["num_sms"], rate["row_bytes"]): rate["gbps"] for rate in whole["limits"]["rates"]}
    assert points["copy", 5, 48] > 0
    picture = (tmp_path / "plots" / "limits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_no_rate_for_misplaced_rows(two_gpus, monkeypatch, capsys):
    monkeypatch.setattr(limits, "measure_limits", limits_jobs.astray)
    assert main(["limits"]) == 1
    out = capsys.readouterr().out
    assert "rank 0, 1: WrongAnswer: bulk store: 3 of 9 rows from rank 1" in out
    assert "GB/s" not in out


def test_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["limits"]) == 3
    assert "this needs GPUs, and " in capsys.readouterr().err


def test_too_many_ranks(capsys):
    assert main(["limits", "--ranks", "9"]) == 2
    assert "at most 8 ranks" in capsys.readouterr().err


def test_without_matplotlib(two_gpus, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["limits", "--plot", str(tmp_path)]) == 3
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_plots_of_calls(tmp_path):
    curves = {"dispatch": [(24, 330.0), (8, 300.0)], "nothing": []}
    [sms] = plots.plot_sms(curves, some_limits(), tmp_path, "title")
    [tokens] = plots.plot_tokens(curves, {"limit": [(128, 10.0), (4096, 200.0)]}, tmp_path, "title")
    [without] = plots.plot_sms(curves, None, tmp_path / "b", "title")
    for file in (sms, tokens, without):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_windows_have_room_for_every_place():
    for num_ranks in range(1, 9):
        for row_bytes in (16, 7168, 14336):
            total = 7168 * 32768
            places = num_ranks * rows_per_source(total // row_bytes, num_ranks) * row_bytes
            assert places <= window_bytes(total, num_ranks)


def test_words_do_not_reach_the_rows():
    assert spec.WORD_STRIDE * (spec.MAX_RANKS + 1) <= 1 << 16


def test_gpus_as_nvidia_smi_says(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 90.1 W, 30'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = gpu.find_gpus().line()
    assert line.startswith("1 x NVIDIA H200, driver 580.1, CUDA ")
    assert line.endswith("SM clock 1980 MHz of 1980 MHz")


def test_gpus_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.find_gpus().smi == ()
