"""`tokenferry bench --device cuda`, run on the CPU backend: the same program, without streams and kernels."""

import json
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from tokenferry.bench.core import session as trial
from tokenferry.bench.core.clock import Summary
from tokenferry.bench.core.inputs import WrongAnswer
from tokenferry.bench.core.session import Label, Result, Settings
from tokenferry.bench.core.static_inputs import (
    ROUTINGS,
    Sizes,
    check_by_expert,
    check_rows,
    draw,
    expected_sums,
    remote_rows,
    sent_to,
)
from tokenferry.bench.report import gpu as gpu_report
from tokenferry.bench.suites import first_call, gemms, overlap
from tokenferry.bench.suites.limits import Limits, Rate
from tokenferry.cli import bench_cuda
from tokenferry.cli.main import main, make_parser
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError

CPU = torch.device("cpu")
TINY = ["--ranks", "2", "--hidden", "128", "--top-k", "2", "--experts", "8", "--iters", "2", "--seed", "5"]


def run_on_cpu(*argv):
    """The command with the CPU in place of GPUs; there `num_sms` has no meaning."""
    words = ["bench", "--device", "cuda", *TINY, *argv]
    args = make_parser().parse_args(words)
    args.command_line = " ".join(["tokenferry", *words])
    args.device, args.sms = "cpu", ()
    return bench_cuda.run(args, Screen())


def test_calls_and_their_rival(phases, tmp_path, capsys):
    file, plots = tmp_path / "out.json", tmp_path / "plots"
    argv = ["--tokens", "4,16", "--routing", "uniform,one-rank", "--json", str(file), "--plot", str(plots)]
    assert run_on_cpu("--only", "limits,calls,nccl", *argv) == 0
    whole = json.loads(file.read_text())
    assert whole["failed"] == []
    assert whole["settings"]["tokens"] == [4, 16]
    assert whole["command"].endswith(str(plots))
    seen = {(r["label"]["who"], r["label"]["call"], r["label"]["rows"], r["label"]["tokens"]) for r in whole["results"]}
    for tokens in (4, 16):
        for who in ("tokenferry", "gloo"):
            for rows in ("fp8", "bf16"):
                assert {(who, "dispatch", rows, tokens), (who, "dispatch, plan kept", rows, tokens)} <= seen
        assert ("gloo", "combine", "bf16", tokens) in seen
        assert ("tokenferry", "combine, rows in the group's memory", "bf16", tokens) in seen
        assert ("tokenferry", "combine, rows in user memory", "bf16", tokens) in seen
    assert ("tokenferry", "dispatch, by expert", "bf16", 16) in seen
    for result in whole["results"]:
        assert result["drained"]["n"] == result["chained"]["n"] == 2
        assert result["ahead"] == 0, "on a CPU the host does the work itself"
        assert result["of_limit"] > 0 or result["bytes_out"] == 0
    assert {path.name for path in plots.iterdir()} == {"tokens.png", "sms.png"}
    out = capsys.readouterr().out
    short = out[out.rindex("nccl drained") :].splitlines()
    assert len(short) == 2 + 2 * 6 + 2, "the short table is the last thing: six calls for each T, two more for one"


def test_bytes_are_those_that_leave(phases, tmp_path):
    file = tmp_path / "out.json"
    assert run_on_cpu("--only", "calls", "--tokens", "16", "--routing", "uniform", "--json", str(file)) == 0
    sizes = Sizes(2, 16, 128, 2, 8, 5)
    rows = [0, 0]  # remote rows of each rank, by loops over tokens
    for variant in range(3):
        for rank in range(2):
            for experts in draw(sizes, variant, rank, CPU).topk_idx.tolist():
                rows[rank] += any(expert // 4 != rank for expert in experts)
    for result in json.loads(file.read_text())["results"]:
        row_bytes = 256 if result["label"]["rows"] == "bf16" else 128 + 4
        assert result["bytes_out"] == pytest.approx(sum(rows) / 2 / 3 * row_bytes)
        assert result["bytes_out_most"] == pytest.approx(max(rows) / 3 * row_bytes)


def test_other_phases(phases, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert run_on_cpu("--only", "host,sms,overlap,memory,vdev", "--tokens", "8", "--json", str(file)) == 0
    whole = json.loads(file.read_text())
    assert [one["what"] for one in whole["failed"]] == ["vdev_2d: starting NVSHMEM"], "a rival may fail"
    assert {item["call"] for item in whole["host"]} > {"dispatch, plan kept, fp8"}
    seen = {(item["call"], item["gemm"], item["first"]) for item in whole["overlap"]}
    assert seen == {
        (c, g, f) for c in ("dispatch FP8", "combine BF16") for g in gemms.KINDS for f in ("calls", "GEMMs")
    }
    assert all(item["carve_out"] == 0 for item in whole["overlap"]), "a CPU has no SMs to leave out"
    assert whole["memory"][0]["worst_rows_mb"] == 2 * 8 * 256 / 1e6
    calls = {(r["label"]["call"], r["label"]["tokens"]) for r in whole["results"]}
    assert ("dispatch + multiply + combine, one graph", 128) in calls
    assert ("dispatch, by expert, counts on device", 8) in calls
    out = capsys.readouterr().out
    for text in ("host time of an eager call", "GEMMs slower by", "memory of a group", "not measured: vdev_2d"):
        assert text in out


def no_answer(rank, pg, news, settings):
    """A phase that dies."""
    raise RuntimeError("no reason at all")


def wrong(rank, pg, news, settings):
    """A phase with one case that is right and one that is wrong on one rank."""

    def prepare_wrong():
        raise WrongAnswer("combine: 1 of 6 rows differ") if rank else ValueError("something else")

    with trial.trial(rank, pg, news, settings) as here:
        here.case(Label("tokenferry", "bad", "bf16", 4), prepare_wrong)
        here.case(Label("tokenferry", "good", "bf16", 4), lambda: lambda i: None)


def test_what_fails_is_left_out_and_the_rest_is_kept(phases, tmp_path, capsys):
    phases["calls"] = (wrong, 60.0, "wrong")
    phases["nccl"] = (no_answer, 60.0, "dead")
    file = tmp_path / "out.json"
    assert run_on_cpu("--only", "nccl,calls", "--tokens", "4", "--json", str(file)) == 1
    whole = json.loads(file.read_text())
    assert [r["label"]["call"] for r in whole["results"]] == ["good"]
    assert [one["what"] for one in whole["failed"]] == ["phase nccl", "tokenferry: bad, bf16, T=4"]
    assert "ValueError: something else" in whole["failed"][1]["why"]
    out = capsys.readouterr().out
    assert "no reason at all" in out
    assert "bad" not in out.split("all cases")[1].split("checked:")[0]


def test_a_rival_that_dies_is_no_failure(phases):
    phases["nccl"] = (no_answer, 60.0, "dead")
    assert run_on_cpu("--only", "nccl", "--tokens", "4") == 0


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--device", "cuda", "--experts", "9", "--ranks", "2"], "--experts 9 is no multiple of --ranks 2"),
        (["--device", "cuda", "--top-k", "300"], "--top-k 300 exceeds"),
        (["--device", "cuda", "--hidden", "64"], "--hidden 64 is no multiple of 128"),
        (["--quick"], "--quick needs --device cuda"),
        (["--tokens", "1,2"], "--tokens 1,2: several need --device cuda"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, args, complaint, capsys):
    monkeypatch.setattr(bench_cuda, "need_gpus", lambda: 1)
    assert main(["bench", *args]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--routing", "straight"], ["--only", "calls,none"], ["--sms", "8,0"]])
def test_words_that_are_none(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cuda", *argv])
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
    assert "this needs GPUs" in capsys.readouterr().err


def test_quick_and_full_settings():
    def settings(*argv):
        return bench_cuda.make_settings(make_parser().parse_args(["bench", "--device", "cuda", *argv]), 4)

    quick, full = settings("--quick"), settings()
    assert quick.ranks == full.ranks == 4
    assert quick.tokens == (128, 1024, 4096, 8192)
    assert quick.routings == ("uniform",)
    assert full.tokens[0] == 1
    assert full.tokens[-1] == 16384
    assert settings("--tokens", "64,256").sweep_tokens == 256
    assert settings("--sms", "8,16").sms == (8, 16)
    with pytest.raises(ConfigError):
        settings("--experts", "10")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing):
    sizes = Sizes(4, 200, 128, 3, 16, 1, routing)
    idx = draw(sizes, 0, 1, CPU).topk_idx
    assert all(len(set(row)) == 3 for row in idx.tolist()), "an expert repeats"
    counts = torch.bincount(idx.flatten(), minlength=16)
    assert torch.equal(idx, draw(sizes, 0, 1, CPU).topk_idx)
    assert not torch.equal(idx, draw(sizes, 1, 1, CPU).topk_idx)
    if routing == "uniform":
        assert counts.min() > 15
    elif routing == "skewed":
        assert counts[0] > 3 * counts[15] > 0
    else:
        assert counts[4:].sum() == 0
    hit = sent_to(sizes, idx)
    assert torch.equal(hit, torch.stack([(idx // 4 == r).any(1) for r in range(4)], 1))


def test_unknown_routing():
    with pytest.raises(ConfigError, match="choose one of uniform"):
        draw(Sizes(1, 2, 128, 1, 2, 0, "none"), 0, 0, CPU)


SIZES = Sizes(2, 6, 128, 2, 4, 3)


def received(rank):
    """What rank has to receive, by loops over tokens."""
    inputs = [draw(SIZES, 0, source, CPU) for source in range(2)]
    return torch.stack(
        [
            one.x[t]
            for one in inputs
            for t, experts in enumerate(one.topk_idx.tolist())
            if any(e // 2 == rank for e in experts)
        ]
    )


def test_rows_are_checked():
    rows = received(1)

    def check(got):
        check_rows("dispatch", SIZES, 0, 1, ((got, lambda inputs: inputs.x),))

    check(rows)
    swapped = rows.clone()
    swapped[[0, 1]] = rows[[1, 0]]
    for bad, complaint in (
        (swapped, "2 of .* rows from rank 0 are wrong on rank 1"),
        (rows[:-1], "has .* rows, .* or more were sent"),
        (torch.cat([rows, rows[:1]]), "were sent to it"),
    ):
        with pytest.raises(WrongAnswer, match=complaint):
            check(bad)


def test_rows_by_expert_are_checked():
    inputs = [draw(SIZES, 0, source, CPU) for source in range(2)]
    groups = [torch.cat([one.x[(one.topk_idx == e).any(1)] for one in inputs]) for e in (2, 3)]
    check_by_expert("dispatch", SIZES, 0, 1, groups)
    with pytest.raises(WrongAnswer, match="rows of expert 2 are wrong"):
        check_by_expert("dispatch", SIZES, 0, 1, groups[::-1])


def test_sums_are_those_of_plain_loops():
    inputs = draw(SIZES, 0, 0, CPU)
    sums = expected_sums(SIZES, inputs)
    for t, experts in enumerate(inputs.topk_idx.tolist()):
        total = torch.zeros(128)
        for rank in sorted({e // 2 for e in experts}):
            total += (inputs.x[t].float() * (1 + rank / 8)).bfloat16().float()
        assert torch.equal(sums[t], total.bfloat16())


def test_remote_rows_of_both_directions():
    out, home = remote_rows(SIZES, 1, 0, CPU)
    other_out, other_home = remote_rows(SIZES, 1, 1, CPU)
    assert (out, home) == (other_home, other_out), "what leaves one rank comes home from the other"


def make_report(tmp_path):
    settings = Settings(2, (4096,), 7168, 8, 256, (), 4096, ("uniform",), 30, 5, 0)
    whole = gpu_report.Report(settings, {"title": "title"}, tmp_path / "out.json")
    rates = (Rate("store", 7168, 64, 330.0), Rate("store", 14336, 64, 340.0), Rate("load", 14336, 12, 320.0))
    whole.limits = Limits(2, rates, 1.0, 2.0)
    return whole


def test_fraction_of_the_limit(tmp_path):
    whole = make_report(tmp_path)
    summary = Summary(30, 500.0, 490.0, 510.0)
    dispatch = Label("tokenferry", "dispatch", "fp8", 4096, num_sms=24, link="store", row_bytes=7392)
    result = Result(dispatch, 82.5e6, 83e6, summary, 1.0, summary)
    assert whole.limit_for(dispatch) == 330.0
    assert whole.fraction(result) == pytest.approx(82.5e6 / 330e9 / 500e-6)
    combine = Label("tokenferry", "combine", "bf16", 4096, link="load", row_bytes=14336)
    assert whole.limit_for(combine) == 320.0
    cells = dict(zip(gpu_report.HEADER, whole.cells(result), strict=True))
    assert cells["GB/s"] == "165.0"
    assert cells["of limit"] == "50%"
    whole.limits = None
    assert whole.fraction(result) is None
    assert dict(zip(gpu_report.HEADER, whole.cells(result), strict=True))["of limit"] == "-"


def test_every_item_is_kept_at_once(tmp_path):
    whole = make_report(tmp_path)
    whole.take({"memory": {"tokens": 4}})
    assert json.loads(whole.file.read_text())["memory"] == [{"tokens": 4}]
    assert whole.take({"now": "something"}) == ""
    assert whole.take({"failed": "x", "why": "y"}) == "FAILED x: y"
    assert json.loads(whole.file.read_text())["failed"] == [{"what": "x", "why": "y"}]


@pytest.mark.parametrize(("ahead", "said"), [(1.0, "ahead"), (0.95, "ahead"), (0.5, "50%"), (0.0, "in it")])
def test_a_drained_time_says_whether_launches_are_in_it(tmp_path, ahead, said):
    summary = Summary(30, 500.0, 490.0, 510.0)
    result = Result(Label("tokenferry", "dispatch", "fp8", 4096, link="store"), 1e6, 1e6, summary, ahead, summary)
    whole = make_report(tmp_path)
    assert dict(zip(gpu_report.HEADER, whole.cells(result), strict=True))["launch"] == said
    assert f"drained (launch: {said})" in whole.take({"case": asdict(result)})
    assert dict(zip(gpu_report.SHORT_HEADER, whole.short()[0], strict=True))["launch"] == said


def test_a_late_host_is_noticed(monkeypatch):
    """Rank 0 was late in one iteration that counts, rank 1 in another: two of four."""
    settings = Settings(2, (4,), 128, 2, 8, (), 4, ("uniform",), iters=4, warmup=1, seed=0)
    answers = iter([True, False, True, False, False])
    stand = SimpleNamespace(stamp=lambda: 0.0, passed=lambda stamp: next(answers), seconds=lambda start, end: 1.0)
    stand.hold = stand.synchronize = lambda *args: None
    told = []
    here = trial.Trial(None, stand, settings, "")
    monkeypatch.setattr(trial.Trial, "rank", 0)
    monkeypatch.setattr(trial.Trial, "tell", lambda self, item: told.append(item))
    monkeypatch.setattr(trial.dist, "barrier", lambda pg: None)
    monkeypatch.setattr(trial, "gather", lambda pg, item: [item, item])
    other = {bool: [False, False, False, True], float: [2.0] * 4}
    monkeypatch.setattr(trial, "slowest", lambda pg, mine: list(map(max, mine, other[type(mine[0])])))
    assert here.case(Label("tokenferry", "x", "bf16", 4), lambda: lambda i: None)
    assert told[-1]["case"]["ahead"] == 0.5


def test_overlap_figures():
    def times(both, gemm_beside=4.0):
        return overlap.Times(4.0, 4.5, 2.0, both=both, gemm_beside=gemm_beside, comm_beside=3.0)

    assert times(5.0).hidden == 0.5
    assert times(5.0, gemm_beside=4.4).gemm_cost == pytest.approx(0.1)
    assert times(4.0).hidden == 1.0
    assert times(6.0).hidden == 0.0


def test_overlap_variants():
    every = overlap.variants("combine BF16", None, 16, many=9)
    assert {(c.carve_out, c.first, c.calls) for c in every} == {
        (left_out, first, calls) for left_out in (0, 16) for first in ("calls", "GEMMs") for calls in (9, 1)
    }
    assert len(every) == 8 * len(gemms.KINDS)
    assert {(c.num_sms, c.carve_out) for c in overlap.variants("combine BF16", 24, 16, many=9)} == {(24, 24)}


@pytest.mark.parametrize("first", ["calls", "GEMMs"])
def test_side_by_side(monkeypatch, first):
    """Both streams start behind one stamp, the second by a head start later; ends are those of each stream."""
    done, stream = [], ["main"]

    def side(*, first=True):
        @contextmanager
        def enter():
            stream[0] = "calls" if first else "GEMMs"
            yield
            stream[0] = "main"

        return enter

    def log(what):
        done.append((stream[0], what))
        return len(done)

    stand = SimpleNamespace(side=side, num_sms=132, stamp=lambda: log("stamp"), synchronize=lambda: None)
    stand.hold, stand.seconds = lambda seconds: log("hold"), lambda start, end: (done[start - 1], done[end - 1])
    here = SimpleNamespace(bed=stand, meet=lambda lead_s: log(f"lead {round(lead_s * 1e6)}"))
    beside = overlap.Beside(here, None)
    case = overlap.Case("dispatch FP8", None, "bmm", 0, first, 2)
    ends = beside._side_by_side(case, lambda: log("call"), lambda: log("gemm"))
    second = "GEMMs" if first == "calls" else "calls"
    work = {"calls": [("calls", "call")] * 2 + [("calls", "stamp")], "GEMMs": [("GEMMs", "gemm"), ("GEMMs", "stamp")]}
    assert done == [("main", "lead 400"), ("main", "stamp"), *work[first], (second, "hold"), *work[second]]
    assert ends == ((("main", "stamp"), ("GEMMs", "stamp")), (("main", "stamp"), ("calls", "stamp")))


def test_gemms_of_every_kind_are_the_same():
    experts = gemms.Experts(3, 128, 5, CPU)
    expected = experts.work("bmm")()
    assert experts.flops == 2 * 3 * 5 * 128 * 3 * gemms.WIDTH
    for kind in gemms.KINDS:
        with gemms.library(kind):
            assert torch.allclose(experts.work(kind)().view_as(expected), expected, rtol=0.05, atol=0.05)


def test_sms_are_left_out_and_given_back():
    before = torch._C._get_sm_carveout_experimental()
    with gemms.carve_out(24):
        assert torch._C._get_sm_carveout_experimental() == 24
    assert torch._C._get_sm_carveout_experimental() == before
    with gemms.carve_out(0):
        assert torch._C._get_sm_carveout_experimental() == before


def test_what_torch_lacks_is_told_once_and_left_out(monkeypatch):
    told = []
    here = SimpleNamespace(bed=SimpleNamespace(side=lambda **kwargs: None), tell=told.append)
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    beside = overlap.Beside(here, None)
    for gemm in gemms.KINDS:
        beside.measure(overlap.Case("combine BF16", None, gemm, 16, "calls", 1), lambda: None)
    assert [item["overlap left out"]["why"] for item in told] == [gemms.missing("bmm", 16)]
    assert gemms.missing("bmm", 0) is None
    monkeypatch.setattr(gemms, "_grouped_mm", lambda: None)
    assert gemms.missing("grouped_mm", 0) == "this torch has no grouped_mm"


def test_kernels_in_words():
    found = [{"name": "nvjet" * 40, "grid": [132, 1, 1], "us": 2900.4}]
    items = [
        {"gemm": "bmm", "carve_out": 0, "kernels": found},
        {"gemm": "bmm", "carve_out": 16, "kernels": "RuntimeError: x"},
    ]
    lines = gpu_report.kernel_lines(items)
    assert lines[0].startswith("kernels of bmm, 0 SMs left out: nvjet")
    assert lines[0].endswith("[132, 1, 1] blocks, 2900 us")
    assert lines[1] == "kernels of bmm, 16 SMs left out: RuntimeError: x"


def test_first_call_of_two_processes():
    both = first_call.run_both("cpu")
    assert set(both) == {"nothing compiled", "second start"}
    assert all(seconds >= 0 for steps in both.values() for seconds in steps.values())
    assert "warmup: all kernels" in both["second start"]


def test_first_call_that_fails():
    with pytest.raises(OSError, match="ended with"):
        first_call._run("nothing", "/tmp")
