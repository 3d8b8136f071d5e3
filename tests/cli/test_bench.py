"""`tokenferry bench cpu`: what it measures, checks and prints, and that it prints no time for a wrong answer."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from support.bench_jobs import TINY, broken, discard, measure_damaged, splits, wrong_answer
from support.bench_runs import bench
from tokenferry.bench.core.checks import WrongAnswer, must_be_near, must_equal
from tokenferry.bench.core.inputs import draw
from tokenferry.bench.core.session import in_session
from tokenferry.bench.suites.cpu_calls import VARIANTS
from tokenferry.cli import bench_cpu as command
from tokenferry.cli.main import main

CPU = torch.device("cpu")
SIZES = TINY.sizes(6)
ARGS = ["--ranks", "2", "--tokens", "6", "--top-k", "2", "--experts", "4", "--iterations", "3"]
CALLS = {
    *("dispatch + combine", "dispatch", "redispatch (plan kept)", "combine"),
    *("decode pair, exact", "decode pair, fast", "decode dispatch", "decode combine, exact"),
}


MODES = ("isolated", "back_to_back")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run over both transports."""
    return bench(tmp_path_factory.mktemp("bench"), *ARGS, "--hidden", "128")


def test_every_call_is_measured_over_both_transports(both):
    assert both.status == 0
    seen = [(result["label"]["note"], result["label"]["call"]) for result in both.report["results"]]
    calls = {*CALLS, "decode dispatch, FP8"}
    assert set(seen) == {(transport, call) for transport in ("shared_memory", "process_group") for call in calls}
    assert len(seen) == len(set(seen))


def test_one_rank_is_measured_once(tmp_path):
    """It has no transport, so that both would be the same."""
    alone = bench(tmp_path, "--ranks", "1", *ARGS[2:], "--hidden", "64")
    assert alone.status == 0
    labels = [(result["label"]["note"], result["label"]["call"]) for result in alone.report["results"]]
    assert {note for note, _ in labels} == {"none"}
    assert len(set(labels)) == len(labels)
    assert "one rank, which has no transport" in alone.output
    assert "transport shared_memory" not in alone.output


def test_every_call_has_the_times_of_both_modes_and_of_its_baseline(both):
    for result in both.report["results"]:
        for times in (result, result["baseline"]):
            for mode in MODES:
                assert times[mode]["n"] == 3
                assert 0 < times[mode]["p05_us"] <= times[mode]["median_us"] <= times[mode]["p95_us"]
        for mode in MODES:
            ratio = result[mode]["median_us"] / result["baseline"][mode]["median_us"]
            assert result["ratio"][mode] == pytest.approx(ratio)


def test_bytes_of_the_calls(both):
    bytes_of = {result["label"]["call"]: result["bytes_out"] for result in both.report["results"]}
    assert bytes_of["dispatch + combine"] == pytest.approx(2 * bytes_of["dispatch"])
    assert bytes_of["combine"] == pytest.approx(bytes_of["dispatch"])
    assert bytes_of["decode dispatch, FP8"] == pytest.approx(bytes_of["dispatch"] * (128 + 4) / 256)
    assert bytes_of["decode combine, exact"] == 6 * 2 * 256, "every expert's row travels: T * K rows of 2 * H bytes"


def test_the_report_says_where_it_comes_from(both):
    assert set(both.report) == {
        *("schema", "tokenferry", "commit", "date", "command", "machine", "threads_per_rank", "notes", "settings"),
        *("limits", "results", "failed"),
    }
    assert both.report["schema"] == 3
    assert both.report["command"].startswith("tokenferry bench cpu --ranks 2")
    assert both.report["settings"]["hidden"] == 128
    assert set(both.report["machine"]) == {"processor", "cores", "load", "system", "python", "torch"}


def test_the_output_says_what_was_checked_and_written(both):
    assert both.output.count("checked: ") == 2
    assert f"written: {both.folder}" in both.output


def test_table_on_any_terminal(any_terminal):
    # H is no multiple of 128: no FP8.
    words = ["--hidden", "64", "--transport", "shared_memory", "--threads", "1", "--seed", "3"]
    assert main(["bench", "cpu", *ARGS, *words]) == 0
    out = any_terminal.getvalue()
    modes = ("isolated", "back to back")
    for word in (*CALLS, *modes, "median us", "ratio", "seed 3", "1 thread(s) a rank", "command: tokenferry"):
        assert word in out
    assert "FP8" not in out


@pytest.mark.parametrize(
    ("method", "call_number", "error"),
    [
        ("dispatch", 1, "dispatch: 1 of"),
        ("redispatch", 1, "redispatch: 1 of"),
        ("combine", 1, "combine: 1 of"),
        ("decode_dispatch", 1, "decode_dispatch: 1 of"),
        ("decode_combine", 1, "decode_combine, exact: 1 of"),
        ("decode_combine", 2, "decode_combine, fast: 1 of"),
        ("decode_dispatch", 2, "decode_dispatch, FP8: 1 of"),
        ("combine", 3, "combine: 1 of"),  # the third set of inputs
    ],
)
def test_every_call_is_checked(worlds, method, call_number, error):
    measure = partial(measure_damaged, transport="shared_memory", method=method, call_number=call_number)
    for found in worlds(2).run(in_session, discard, TINY, measure):
        assert found.startswith(error)


def test_the_baseline_moves_the_rows_that_the_calls_move(worlds):
    """Counted once more, by loops over tokens; home goes every row that went out, and each expert's answer."""
    rows = [[[0, 0], [0, 0]] for _ in range(VARIANTS)]
    answers = [[[0, 0], [0, 0]] for _ in range(VARIANTS)]
    for variant in range(VARIANTS):
        for source in range(2):
            for experts in draw(SIZES, variant, source, CPU).topk_idx.tolist():
                for owner in {expert // 2 for expert in experts}:
                    rows[variant][source][owner] += 1
                for expert in experts:
                    answers[variant][source][expert // 2] += 1
    for rank, seen in enumerate(worlds(2).run(splits, TINY)):
        out = [r[rank] for r in rows], [[line[rank] for line in r] for r in rows]
        home = [[line[rank] for line in r] for r in answers], [r[rank] for r in answers]
        assert seen == {"out": out, "home": out[::-1], "answers": home, "out fp8": out}


def test_undamaged_calls_pass(worlds):
    measure = partial(measure_damaged, transport="process_group", method="combine", call_number=-1)
    assert worlds(2).run(in_session, discard, TINY, measure) == ["nothing"] * 2


def test_no_time_for_a_wrong_answer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "measure_cpu_calls", wrong_answer)
    assert main(["bench", "cpu", *ARGS, "--hidden", "64", "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert "rank 1: WrongAnswer: combine: 1 of 6 rows differ, the first is row 4" in out
    assert "no time is printed" in out
    assert "median" not in out
    assert not list(tmp_path.iterdir())


def test_unexpected_failures_are_shown_whole(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure_cpu_calls", broken)
    assert main(["bench", "cpu", *ARGS, "--hidden", "64"]) == 1
    out = capsys.readouterr().out
    assert "no reason at all" in out
    assert "Traceback" in out


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--ranks", "3", "--experts", "4"], "--experts 4 is no multiple of --ranks 3"),
        (["--top-k", "9", "--experts", "8"], "--top-k 9 exceeds --experts 8"),
        (["--hidden", "7"], "--hidden 7"),
        (["--tokens", "1,2"], "--tokens 1,2: this part measures one T"),
    ],
)
def test_sizes_that_do_not_fit(args, error, capsys):
    assert main(["bench", "cpu", *args]) == 2
    assert error in capsys.readouterr().err


def test_not_a_positive_number(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "cpu", "--iterations", "0"])
    assert stop.value.code == 2
    assert "--iterations" in capsys.readouterr().err


def test_inputs_differ_by_variant_rank_and_seed():
    drawn = [draw(SIZES, variant, rank, CPU).x for variant in range(2) for rank in range(2)]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(drawn[0], draw(SIZES, 0, 0, CPU).x)
    assert not torch.equal(drawn[0], draw(replace(SIZES, seed=8), 0, 0, CPU).x)


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
