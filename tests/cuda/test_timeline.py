"""Timelines and counters on several GPUs; tests/emulator/test_recorded.py covers most of this without them."""

import json

import pytest
import torch

from tokenferry.cli.main import main

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"
)

SIZES = ["--ranks", "2", "--tokens", "32", "--hidden", "2048", "--experts", "16", "--top-k", "4"]


def test_trace(tmp_path, capsys):
    file = tmp_path / "trace.json"
    assert main(["trace", *SIZES, "--json", str(file)]) == 0, capsys.readouterr().out
    whole = json.loads(file.read_text())
    assert whole["otherData"]["clock_error_at_most_ns"] < 20_000
    spans = [e for e in whole["traceEvents"] if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1}
    assert {e["cat"] for e in spans} == {"decode_dispatch", "decode_combine"}
    assert max(e["ts"] + e["dur"] for e in spans) < 5_000, "both calls are done within milliseconds"
    assert {"send", "receive", "message", "rows"} <= {e["name"] for e in spans}


@pytest.mark.parametrize("rank", [0, 1])
def test_diagnose(tmp_path, capsys, rank):
    file = tmp_path / "report.json"
    slow = ["--slow-rank", str(rank), "--slow-us", "2000", "--json", str(file)]
    assert main(["diagnose", "--device", "cuda", *SIZES, *slow]) == 0, capsys.readouterr().out
    found = json.loads(file.read_text())["slow"]
    assert [(one["rank"], one["where"]) for one in found] == [(rank, "compute")]
