"""`tokenferry bench gpu`, run on the CPU backend: the same program, without streams and kernels."""

import json
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from support.bench_jobs import wrong_call
from support.bench_runs import bench_gpu_phases
from tokenferry.api import ExpertGroup
from tokenferry.bench.baselines import nccl
from tokenferry.bench.core import session
from tokenferry.bench.core.checks import WrongAnswer, check_by_expert, check_rows, expected_sums
from tokenferry.bench.core.inputs import ROUTINGS, Sizes, draw, remote_rows, sent_to
from tokenferry.bench.core.session import Label, Result, Settings
from tokenferry.bench.core.summary import Summary
from tokenferry.bench.report import tables
from tokenferry.bench.report.report import GPU_NOTES, Report
from tokenferry.bench.suites import first_call, gemms, megatron, overlap
from tokenferry.bench.suites.calls import measure_calls
from tokenferry.bench.suites.limits import Limits, Rate
from tokenferry.cli import bench_phases
from tokenferry.cli.bench_settings import make_settings
from tokenferry.cli.main import main, make_parser
from tokenferry.errors import ConfigError
from tokenferry.types import Quantized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A run of the calls and their baseline, for two T and two routings, with pictures."""
    folder = tmp_path_factory.mktemp("calls")
    words = ["--tokens", "4,16", "--routing", "uniform,one-rank", "--plot", str(folder / "plots")]
    return bench_gpu_phases(folder, "gpu", "--only", "limits,calls,nccl", *words)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A run of the other phases."""
    folder = tmp_path_factory.mktemp("others")
    return bench_gpu_phases(folder, "gpu", "--only", "host,sms,overlap,memory,vdev", "--tokens", "8")


def test_nothing_fails(calls):
    assert calls.status == 0
    assert calls.report["failed"] == []


def test_settings_and_command_are_in_the_report(calls):
    assert calls.report["settings"]["tokens"] == [4, 16]
    assert calls.report["command"].startswith("tokenferry bench gpu --only limits,calls,nccl")


def labels(run):
    return {tuple(r["label"][name] for name in ("library", "call", "rows", "tokens")) for r in run.report["results"]}


@pytest.mark.parametrize("tokens", [4, 16])
def test_every_call_is_measured_beside_its_baseline(calls, tokens):
    expected = {
        (library, call, rows, tokens)
        for library in ("tokenferry", "gloo")
        for call in ("dispatch", "dispatch, plan kept")
        for rows in ("fp8", "bf16")
    }
    expected |= {
        ("gloo", "combine", "bf16", tokens),
        ("tokenferry", "combine, rows in the group's memory", "bf16", tokens),
        ("tokenferry", "combine, rows in user memory", "bf16", tokens),
    }
    assert expected <= labels(calls)


def test_variants_of_dispatch_are_measured_for_one_number_of_tokens(calls):
    variants = {label for label in labels(calls) if label[1] in ("dispatch, by expert", "dispatch, counts on device")}
    assert variants == {
        ("tokenferry", "dispatch, by expert", "bf16", 16),
        ("tokenferry", "dispatch, counts on device", "fp8", 16),
    }


def test_other_routings_are_measured(calls):
    assert {r["label"]["routing"] for r in calls.report["results"]} == {"uniform", "one-rank"}


def test_every_result_has_both_times_and_its_limit(calls):
    for result in calls.report["results"]:
        assert result["isolated"]["n"] == result["back_to_back"]["n"] == 2
        assert result["ahead"] == 0, "on a CPU the host does the work itself"
        assert result["of_limit"] > 0 or result["bytes_out"] == 0


def test_bytes_are_those_that_leave(calls):
    sizes = Sizes(2, 16, 128, 2, 8, 5)
    rows = [0, 0]  # remote rows of each rank, by loops over tokens
    for variant in range(3):
        for rank in range(2):
            for experts in draw(sizes, variant, rank, CPU).topk_idx.tolist():
                rows[rank] += any(expert // 4 != rank for expert in experts)
    results = [
        r
        for r in calls.report["results"]
        if (r["label"]["library"], r["label"]["tokens"], r["label"]["routing"]) == ("tokenferry", 16, "uniform")
    ]
    assert len(results) == 8
    for result in results:
        row_bytes = 256 if result["label"]["rows"] == "bf16" else 128 + 4
        assert result["bytes_out"] == pytest.approx(sum(rows) / 2 / 3 * row_bytes)
        assert result["bytes_out_most"] == pytest.approx(max(rows) / 3 * row_bytes)


def test_pictures_are_drawn(calls):
    assert {path.name for path in (calls.folder / "plots").iterdir()} == {"tokens.png", "sms.png"}


def test_the_short_table_is_the_last_output(calls):
    short = calls.output[calls.output.rindex("nccl isolated") :].splitlines()
    assert len(short) == 2 + 2 * 6 + 2, "six calls for each T, two more for one"


def test_a_baseline_may_fail(others):
    assert others.status == 0
    assert [one["what"] for one in others.report["failed"]] == ["vdev_2d: starting NVSHMEM"]
    assert "not measured: vdev_2d" in others.output


def test_host_time_of_every_call(others):
    kept = {f"dispatch, plan kept, {rows}" for rows in ("bf16", "fp8")}
    counted = {f"dispatch, counts on device, {rows}" for rows in ("bf16", "fp8")}
    host = others.report["host"]
    assert {item["call"] for item in host} == {*kept, *counted, "combine, rows in the group's memory"}
    assert all(0 < item["least_us"] <= item["median_us"] == max(item["by_rank_us"]) for item in host)


def test_overlap_of_every_call_and_gemm(others):
    overlap = others.report["overlap"]
    seen = {(item["call"], item["gemm"], item["first"]) for item in overlap}
    assert seen == {
        (c, g, f) for c in ("dispatch FP8", "combine BF16") for g in gemms.KINDS for f in ("calls", "GEMMs")
    }
    assert all(item["carve_out"] == 0 for item in overlap), "a CPU has no SMs to leave out"


def test_memory_of_a_group(others):
    assert others.report["memory"][0]["worst_rows_mb"] == 2 * 8 * 256 / 1e6


def test_calls_of_the_other_phases(others):
    seen = {(call, tokens) for _, call, _, tokens in labels(others)}
    assert {("dispatch + multiply + combine, one graph", 128), ("dispatch, by expert, counts on device", 8)} <= seen


def test_tables_of_the_other_phases(others):
    for text in ("host time of an eager call", "GEMMs slower by", "memory of a group"):
        assert text in others.output


def dies(session):
    """A phase that dies."""
    raise RuntimeError("no reason at all")


def one_wrong(session):
    """A phase with one case that is right and one that is wrong on both ranks."""

    def prepare_wrong():
        raise WrongAnswer("combine: 1 of 6 rows differ") if session.rank else ValueError("something else")

    session.case(Label("tokenferry", "bad", "bf16", 4), prepare_wrong)
    session.case(Label("tokenferry", "good", "bf16", 4), lambda: lambda i: None)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A run with a phase that dies and one with a wrong answer."""
    folder = tmp_path_factory.mktemp("failing")
    return bench_gpu_phases(folder, "gpu", "--only", "nccl,calls", "--tokens", "4", calls=one_wrong, nccl=dies)


def test_a_failed_case_is_left_out_and_the_rest_is_kept(failing):
    assert failing.status == 1
    assert [r["label"]["call"] for r in failing.report["results"]] == ["good"]
    assert [one["what"] for one in failing.report["failed"]] == ["phase nccl", "tokenferry: bad, bf16, T=4"]
    assert "ValueError: something else" in failing.report["failed"][1]["why"]


def test_failures_are_printed_apart_from_the_table(failing):
    assert "no reason at all" in failing.output
    assert "bad" not in failing.output.split("all cases")[1].split("checked:")[0]


def wrong_run(tmp_path, phase, measure, owner, method):
    """A run of a phase for T=4 in which a method delivers wrong rows on rank 1: (failed cases, why, cases)."""
    job = partial(wrong_call, measure=measure, owner=owner, method=method)
    run = bench_gpu_phases(tmp_path, "gpu", "--only", phase, "--tokens", "4", "--routing", "uniform", **{phase: job})
    assert run.status == 1
    failed = run.report["failed"]
    return [one["what"].partition(": ")[2] for one in failed], [one["why"] for one in failed], run.report["results"]


@pytest.mark.parametrize(
    ("method", "wrong", "cases"),
    [
        ("dispatch", ["group and first dispatch, T=4, uniform"], 0),
        ("redispatch", [f"dispatch, plan kept, {rows}, T=4" for rows in ("fp8", "bf16")], 6),
        ("combine", [f"combine, rows in {where} memory, bf16, T=4" for where in ("the group's", "user")], 6),
    ],
)
def test_a_wrong_call_gets_no_time_and_keeps_no_rank_waiting(tmp_path, method, wrong, cases):
    """The rank with wrong rows goes through all sets of inputs with its peer, which then measures the other calls."""
    failed, why, results = wrong_run(tmp_path, "calls", measure_calls, ExpertGroup, method)
    assert failed == wrong
    assert all(text.startswith("rank 1: ") and text.count(f"{method}: 1 of") == 3 for text in why), "of every set"
    assert len(results) == cases


@pytest.mark.parametrize(
    ("method", "wrong"), [("redispatch", "dispatch, plan kept, fp8, T=4"), ("combine", "combine, bf16, T=4")]
)
def test_the_baseline_is_checked(tmp_path, method, wrong):
    failed, why, _ = wrong_run(tmp_path, "nccl", nccl.measure_nccl, nccl.NcclBaseline, method)
    assert wrong in failed
    assert all(text.startswith("rank 1: WrongAnswer") for text in why)


def test_a_baseline_that_dies_is_no_failure(tmp_path):
    run = bench_gpu_phases(tmp_path, "gpu", "--only", "nccl", "--tokens", "4", nccl=dies)
    assert run.status == 0
    assert [one["what"] for one in run.report["failed"]] == ["phase nccl"]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--experts", "9", "--ranks", "2"], "--experts 9 is no multiple of --ranks 2"),
        (["--top-k", "300"], "--top-k 300 exceeds"),
        (["--hidden", "64"], "--hidden 64 is no multiple of 128"),
        (
            ["--only", "memory", "--plot", "plots"],
            "--plot: there are pictures of calls, sms, decode, eager, megatron only",
        ),
    ],
)
def test_options_that_do_not_fit(monkeypatch, args, error, capsys):
    monkeypatch.setattr(bench_phases, "need_gpus", lambda: 1)
    assert main(["bench", "gpu", *args]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--routing", "straight"], ["--only", "calls,none"], ["--sms", "8,0"]])
def test_unknown_words(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "gpu", *argv])
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part, instead in (("gpu", "the parts cpu, eager"), ("megatron", "the parts cpu"), ("eager", "--device cpu")):
        monkeypatch.setattr(megatron, "version", lambda: pytest.fail("there is no use in installing it"))
        assert main(["bench", part]) == 3
        error = capsys.readouterr().err
        assert error.startswith(f"tokenferry bench: part {part}: this needs GPUs")
        assert f"; without GPUs: {instead}" in error


def test_quick_and_full_settings():
    def settings(*argv):
        return make_settings(make_parser().parse_args(["bench", "gpu", *argv]), 4)

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
    """The rows that rank has to receive, by loops over tokens."""
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

    check_rows("dispatch", SIZES, 0, 1, rows)
    swapped = rows.clone()
    swapped[[0, 1]] = rows[[1, 0]]
    for bad, error in (
        (swapped, "2 of .* rows from rank 0 are wrong on rank 1"),
        (rows[:-1], "has .* rows, .* or more were sent"),
        (torch.cat([rows, rows[:1]]), "were sent to it"),
    ):
        with pytest.raises(WrongAnswer, match=error):
            check_rows("dispatch", SIZES, 0, 1, bad)


def test_fp8_rows_and_scales_are_checked():
    inputs = [draw(SIZES, 0, source, CPU) for source in range(2)]
    sent = [sent_to(SIZES, one.topk_idx)[:, 1] for one in inputs]
    data = torch.cat([one.quantized.data.view(torch.uint8)[here] for one, here in zip(inputs, sent, strict=True)])
    scale = torch.cat([one.quantized.scale[here] for one, here in zip(inputs, sent, strict=True)])
    check_rows("dispatch", SIZES, 0, 1, Quantized(data.view(torch.float8_e4m3fn), scale))
    other = data.clone()
    other[0, 5] ^= 1
    for bad in (
        Quantized(other.view(torch.float8_e4m3fn), scale),
        Quantized(data.view(torch.float8_e4m3fn), scale * 2),
    ):
        with pytest.raises(WrongAnswer, match="rows from rank 0 are wrong on rank 1"):
            check_rows("dispatch", SIZES, 0, 1, bad)


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
    settings = Settings(2, (4096,), 7168, 8, 256, 30, 5, 0, sweep_tokens=4096)
    whole = Report(settings, {"title": "title"}, GPU_NOTES, tmp_path / "out.json")
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
    whole.limits = None
    assert whole.fraction(result) is None


@pytest.mark.parametrize(("fraction", "text"), [(0.5, "50%"), (None, "-")])
def test_a_row_of_the_table(fraction, text):
    summary = Summary(30, 500.0, 490.0, 510.0)
    dispatch = Label("tokenferry", "dispatch", "fp8", 4096, num_sms=24, link="store", row_bytes=7392)
    row = tables.cells(Result(dispatch, 82.5e6, 83e6, summary, 1.0, summary), fraction)
    cells = dict(zip(tables.HEADER, row, strict=True))
    assert (cells["GB/s"], cells["SMs"], cells["of limit"]) == ("165.0", "24", text)


def test_every_item_is_kept_at_once(tmp_path):
    whole = make_report(tmp_path)
    whole.take({"memory": {"tokens": 4}})
    assert json.loads(whole.file.read_text())["memory"] == [{"tokens": 4}]
    assert whole.take({"failed": "x", "why": "y"}) == "FAILED x: y"
    assert json.loads(whole.file.read_text())["failed"] == [{"what": "x", "why": "y"}]


@pytest.mark.parametrize(("ahead", "text"), [(1.0, "ahead"), (0.95, "ahead"), (0.5, "50%"), (0.0, "in it")])
def test_an_isolated_time_says_whether_launches_are_in_it(tmp_path, ahead, text):
    summary = Summary(30, 500.0, 490.0, 510.0)
    result = Result(Label("tokenferry", "dispatch", "fp8", 4096, link="store"), 1e6, 1e6, summary, ahead, summary)
    assert dict(zip(tables.HEADER, tables.cells(result, None), strict=True))["launch"] == text
    assert f"isolated (launch: {text})" in make_report(tmp_path).take({"case": result})
    [short] = tables.short_rows([result], [None])
    assert dict(zip(tables.SHORT_HEADER, short, strict=True))["launch"] == text


def test_a_late_host_is_noticed(monkeypatch):
    """Rank 0 was late in one iteration that counts, rank 1 in another: two of four."""
    settings = Settings(2, (4,), 128, 2, 8, iterations=4, warmup=1, seed=0)
    passed = iter([True, False, True, False, False])
    device = SimpleNamespace(stamp=lambda: 0.0, passed=lambda stamp: next(passed), seconds=lambda start, end: 1.0)
    device.hold = device.synchronize = lambda *args: None
    sent = []
    opened = session.Session(None, device, settings, "")
    monkeypatch.setattr(session.Session, "rank", 0)
    monkeypatch.setattr(session.Session, "send", lambda self, item: sent.append(item))
    monkeypatch.setattr(session.dist, "barrier", lambda pg: None)
    monkeypatch.setattr(session, "gather", lambda pg, item: [item, item])
    other = {bool: [False, False, False, True], float: [2.0] * 4}
    monkeypatch.setattr(session, "slowest", lambda pg, mine: list(map(max, mine, other[type(mine[0])])))
    assert opened.case(Label("tokenferry", "x", "bf16", 4), lambda: lambda i: None)
    assert sent[-1]["case"].ahead == 0.5


class CountingDevice:
    """A device whose clock counts the calls made so far."""

    def __init__(self):
        self.calls = []

    def stamp(self):
        return float(len(self.calls))

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        pass


@pytest.mark.parametrize(
    ("runs", "made", "samples"),
    [
        (session.Runs(warmup=1, samples=1, calls=2), ["a0", "a1", "a2", "b0", "b1", "b2", "a1", "a2", "a3"], 3),
        (session.Runs(warmup=2, samples=2, calls=1), ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "a2"], 3),
    ],
)
def test_calls_back_to_back_take_turns_in_runs(monkeypatch, runs, made, samples):
    monkeypatch.setattr(session.dist, "barrier", lambda pg: None)
    device = CountingDevice()
    opened = session.Session(None, device, Settings(2, (4,), 128, 2, 8, samples, 1, 0, runs=runs), "")
    steps = [lambda i, name=name: device.calls.append(f"{name}{i}") for name in "ab"]
    assert opened.back_to_back(steps) == [[1.0] * samples] * 2, "the time of one call"
    assert device.calls[: len(made)] == made


def test_replays_in_runs(monkeypatch):
    monkeypatch.setattr(session.dist, "barrier", lambda pg: None)
    device = CountingDevice()
    opened = session.Session(None, device, Settings(2, (4,), 128, 2, 8, 3, 1, 0), "")
    assert opened.replayed(lambda: device.calls.append("replay"), 4) == [1 / 4] * 3, "the time of a part"
    assert len(device.calls) == (1 + 3) * (1 + session.REPLAYS), "a run, and a replay of each run, do not count"


def test_overlap_figures():
    def times(both, gemm_beside=4.0):
        return overlap.OverlapTimes(4.0, 4.5, 2.0, both=both, gemm_beside=gemm_beside, comm_beside=3.0)

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

    device = SimpleNamespace(side=side, num_sms=132, stamp=lambda: log("stamp"), synchronize=lambda: None)
    device.hold, device.seconds = lambda seconds: log("hold"), lambda start, end: (done[start - 1], done[end - 1])
    opened = SimpleNamespace(device=device, synchronize_ranks=lambda lead_s: log(f"lead {round(lead_s * 1e6)}"))
    beside = overlap.Beside(opened, None)
    case = overlap.OverlapCase("dispatch FP8", None, "bmm", 0, first, 2)
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


def test_what_torch_lacks_is_reported_once_and_left_out(monkeypatch):
    sent = []
    opened = SimpleNamespace(device=SimpleNamespace(side=lambda **kwargs: None), send=sent.append)
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    beside = overlap.Beside(opened, None)
    for gemm in gemms.KINDS:
        beside.measure(overlap.OverlapCase("combine BF16", None, gemm, 16, "calls", 1), lambda: None)
    assert [item["overlap left out"]["why"] for item in sent] == [gemms.missing("bmm", 16)]
    assert gemms.missing("bmm", 0) is None
    monkeypatch.setattr(gemms, "_grouped_mm", lambda: None)
    assert gemms.missing("grouped_mm", 0) == "this torch has no grouped_mm"


def test_lines_of_kernels():
    found = [{"name": "nvjet" * 40, "grid": [132, 1, 1], "us": 2900.4}]
    items = [
        {"gemm": "bmm", "carve_out": 0, "kernels": found},
        {"gemm": "bmm", "carve_out": 16, "kernels": "RuntimeError: x"},
    ]
    lines = tables.kernel_lines(items)
    assert lines[0].startswith("kernels of bmm, 0 SMs left out: nvjet")
    assert lines[0].endswith("[132, 1, 1] blocks, 2900 us")
    assert lines[1] == "kernels of bmm, 16 SMs left out: RuntimeError: x"


def test_first_call_of_two_processes():
    both = first_call.run_both("cpu")
    assert set(both) == {"nothing compiled", "second start"}
    assert all(seconds >= 0 for steps in both.values() for seconds in steps.values())
    assert "warmup: all kernels" in both["second start"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "the following arguments are required: device"),
        (["--help"], 0, "The time until the first call of a process is done"),
        pytest.param(
            *(["cuda"], 3, "cuda: torch sees no GPU; use cpu"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=["nothing", "--help", "cuda"],
)
def test_what_first_call_is_told(words, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        first_call.main(words)
    assert ended.value.code == status
    assert said in "".join(capsys.readouterr())


def test_first_call_that_fails():
    with pytest.raises(OSError, match="ended with"):
        first_call._run("nothing", "/tmp")
