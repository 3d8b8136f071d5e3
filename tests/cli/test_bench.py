"""The bench: what it checks, what it prints, and that it prints no time for a wrong answer."""

import json

import pytest
import torch

from support.bench_jobs import TINY, broken, measure_damaged, splits, wrong_answer
from tokenferry.bench.core.inputs import WrongAnswer, draw, must_be_near, must_equal
from tokenferry.bench.suites.cpu_calls import VARIANTS
from tokenferry.cli import bench
from tokenferry.cli.main import main

ARGS = ["--ranks", "2", "--tokens", "6", "--top-k", "2", "--experts", "4", "--iters", "3"]
CALLS = {
    *("dispatch + combine", "dispatch", "redispatch (plan kept)", "combine"),
    *("decode pair, exact", "decode pair, fast", "decode dispatch", "decode combine, exact"),
}


def test_json_of_both_transports(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["bench", *ARGS, "--hidden", "128", "--json", str(file)]) == 0
    whole = json.loads(file.read_text())
    seen = {(line["transport"], line["call"], line["mode"]) for line in whole["results"]}
    calls = {*CALLS, "decode dispatch, FP8"}
    assert seen == {
        (w, c, m) for w in ("shared_memory", "process_group") for c in calls for m in ("drained", "chained")
    }
    for line in whole["results"]:
        assert line["ours"]["n"] == line["gloo"]["n"] == 3
        assert 0 < line["ours"]["p05_us"] <= line["ours"]["median_us"] <= line["ours"]["p95_us"]
        assert line["ratio"] == pytest.approx(line["ours"]["median_us"] / line["gloo"]["median_us"])
    bytes_of = {line["call"]: line["row_bytes"] for line in whole["results"]}
    assert bytes_of["dispatch + combine"] == pytest.approx(2 * bytes_of["dispatch"])
    assert bytes_of["combine"] == pytest.approx(bytes_of["dispatch"])
    assert bytes_of["decode dispatch, FP8"] == pytest.approx(bytes_of["dispatch"] * (128 + 4) / 256)
    assert bytes_of["decode combine, exact"] == 6 * 2 * 256, "every expert's row travels: T * K rows of 2 * H bytes"
    assert whole["command"].startswith("tokenferry bench --ranks 2")
    out = capsys.readouterr().out
    assert "checked: " in out
    assert str(file) in out


def test_table_on_any_terminal(any_terminal):
    # H is no multiple of 128: no FP8.
    assert (
        main(["bench", *ARGS, "--hidden", "64", "--transport", "shared_memory", "--threads", "1", "--seed", "3"]) == 0
    )
    out = any_terminal.getvalue()
    for word in (
        *CALLS,
        "drained",
        "chained",
        "median us",
        "ratio",
        "seed 3",
        "1 thread(s) a rank",
        "command: tokenferry",
    ):
        assert word in out
    assert "FP8 " not in out.split("within")[1]


@pytest.mark.parametrize(
    ("method", "call_number", "complaint"),
    [
        ("dispatch", 1, "dispatch: 1 of"),
        ("redispatch", 1, "redispatch: 1 of"),
        ("combine", 1, "combine: 1 of"),
        ("decode_dispatch", 1, "decode_dispatch, expert"),
        ("decode_combine", 1, "decode_combine: 1 of"),
        ("decode_combine", 2, "decode_combine, fast: outside"),
        ("decode_dispatch", 2, "decode_dispatch, FP8, expert"),
        ("combine", 3, "combine: 1 of"),  # the third set of inputs
    ],
)
def test_every_call_is_checked(worlds, tmp_path, method, call_number, complaint):
    for said in worlds(2).run(measure_damaged, str(tmp_path / "news"), TINY, "shared_memory", method, call_number):
        assert said.startswith(complaint)


def test_the_limit_moves_the_rows_that_the_calls_move(worlds):
    """Counted once more, by loops over tokens; home goes every row that went out, and each expert's answer."""
    rows = [[[0, 0], [0, 0]] for _ in range(VARIANTS)]
    answers = [[[0, 0], [0, 0]] for _ in range(VARIANTS)]
    for variant in range(VARIANTS):
        for source in range(2):
            for experts in draw(TINY, variant, source).topk_idx.tolist():
                for owner in {expert // 2 for expert in experts}:
                    rows[variant][source][owner] += 1
                for expert in experts:
                    answers[variant][source][expert // 2] += 1
    for rank, seen in enumerate(worlds(2).run(splits, TINY)):
        out = [r[rank] for r in rows], [[line[rank] for line in r] for r in rows]
        home = [[line[rank] for line in r] for r in answers], [r[rank] for r in answers]
        assert seen == {"out": out, "home": out[::-1], "answers": home, "out fp8": out}


def test_undamaged_calls_are_not_complained_about(worlds, tmp_path):
    assert (
        worlds(2).run(measure_damaged, str(tmp_path / "news"), TINY, "process_group", "combine", -1) == ["nothing"] * 2
    )


def test_no_time_for_a_wrong_answer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "measure", wrong_answer)
    assert main(["bench", *ARGS, "--hidden", "64", "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert "rank 1: WrongAnswer: combine: 1 of 6 rows differ, the first is row 4" in out
    assert "no time is printed" in out
    assert "median" not in out
    assert not list(tmp_path.iterdir())


def test_other_failures_are_shown_whole(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", broken)
    assert main(["bench", *ARGS, "--hidden", "64"]) == 1
    out = capsys.readouterr().out
    assert "no reason at all" in out
    assert "Traceback" in out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--ranks", "3", "--experts", "4"], "--experts 4 is no multiple of --ranks 3"),
        (["--top-k", "9", "--experts", "8"], "--top-k 9 exceeds --experts 8"),
        (["--hidden", "7"], "--hidden 7"),
    ],
)
def test_sizes_that_do_not_fit(args, complaint, capsys):
    assert main(["bench", *args]) == 2
    assert complaint in capsys.readouterr().err


def test_not_a_positive_number(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--iters", "0"])
    assert stop.value.code == 2
    assert "--iters" in capsys.readouterr().err


def test_inputs_differ_by_variant_rank_and_seed():
    drawn = [draw(TINY, variant, rank).x for variant in range(2) for rank in range(2)]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(drawn[0], draw(TINY, 0, 0).x)


def test_must_equal_names_the_row():
    good = torch.arange(12.0).view(4, 3)
    bad = good.clone()
    bad[2, 1] += 1e-6 * bad[2, 1]
    must_equal("sums", good, good.clone())
    with pytest.raises(WrongAnswer, match="sums: 1 of 4 rows differ, the first is row 2"):
        must_equal("sums", bad, good)
    with pytest.raises(WrongAnswer, match=r"expected torch.float32 \[4, 3\], got torch.float32 \[3, 3\]"):
        must_equal("sums", good[:3], good)
    with pytest.raises(WrongAnswer, match="rows differ"):
        must_equal("sums", torch.full((4, 3), torch.nan), good)


def test_must_be_near():
    good = torch.ones(2, 2)
    must_be_near("rows", good * 1.01, good, relative=0.02, absolute=0.0)
    for bad in (good * 1.03, good * torch.nan):
        with pytest.raises(WrongAnswer, match="rows: outside"):
            must_be_near("rows", bad, good, relative=0.02, absolute=0.0)
    with pytest.raises(WrongAnswer, match=r"expected \[2, 2\], got \[1, 2\]"):
        must_be_near("rows", good[:1], good, relative=1.0, absolute=0.0)
