"""`tokenferry bench decode`: what it measures, what it checks that against, and the limit beside it; on CPUs."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from support import bench_decode_jobs as decode_jobs
from support.bench_runs import bench_gpu_phases
from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.core.inputs import Sizes, draw
from tokenferry.bench.report import decode as decode_report
from tokenferry.bench.report import plots
from tokenferry.bench.suites import decode, two_batch_overlap
from tokenferry.bench.suites.decode import DecodeCase
from tokenferry.bench.suites.decode_reference import DecodeReference, Pool
from tokenferry.bench.suites.limits import Limits, Rate
from tokenferry.cli import bench_phases, bench_settings
from tokenferry.cli.main import main, make_parser
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast
from tokenferry.types import Quantized

CPU = torch.device("cpu")
CALLS = {
    *("dispatch FP8", "dispatch BF16", "pair exact", "pair fast", "combine exact", "combine fast"),
    *(f"combine {numerics}, encoding {encoding}" for numerics in ("exact", "fast") for encoding in ("fp8", "logfmt10")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all decode phases for two T, with pictures."""
    folder = tmp_path_factory.mktemp("decode")
    words = ["--tokens", "1,5", "--two-batch-tokens", "6", "--plot", str(folder / "plots")]
    return bench_gpu_phases(folder, "decode", *words)


def test_every_call_is_measured_for_every_number_of_tokens(run):
    assert run.status == 0
    assert run.report["failed"] == []
    seen = [(item["call"], item["tokens"]) for item in run.report["decode"]]
    assert set(seen) == set(product(CALLS, (1, 5)))
    assert len(seen) == len(set(seen))
    assert {item["max_tokens"] for item in run.report["decode"]} == {5}, "M is the largest T"


def test_every_case_has_all_its_times(run):
    for item in run.report["decode"]:
        hooked = ["graph_hook", "eager_hook"] if "encoding" not in item["call"] else []
        for name in ("graph", "eager", "isolated", *hooked):
            assert item[name]["n"] == 2
            assert 0 < item[name]["p05_us"] <= item[name]["median_us"] <= item[name]["p95_us"]
        assert item["host_us"] > 0
        assert (item["host_hook_us"] is None) == ("encoding" in item["call"])


def test_every_case_has_its_limit(run):
    for item in run.report["decode"]:
        assert item["of_limit"] == pytest.approx(item["limit_us"] / item["graph"]["median_us"])
        assert item["limit_hook_us"] > item["limit_us"], "two kernels instead of one"


def test_two_batch_overlap_of_both_numerics_and_kinds_of_work(run):
    assert [item["numerics"] for item in run.report["two_batch"]] == ["exact", "exact", "fast", "fast"]
    assert [item["work_is"] for item in run.report["two_batch"]] == ["even", "uneven"] * 2
    assert {item["tokens"] for item in run.report["two_batch"]} == {3}, "of each of the two"


def test_figures_of_two_batch_overlap(run):
    for item in run.report["two_batch"]:
        serial, hooks = item["serial"]["median_us"], item["hooks"]["median_us"]
        assert item["speedup"] == pytest.approx(serial / hooks)
        rest = item["work"]["median_us"] + item["calls"]["median_us"] - hooks
        assert item["hidden"] == pytest.approx(rest / item["calls"]["median_us"])


def test_a_picture_is_drawn(run):
    assert [path.name for path in (run.folder / "plots").iterdir()] == ["decode.png"]


def test_tables_of_all_cases(run):
    for text in ("graph + hook us", "by hooks us", "an empty kernel of a graph", "bit-equal", *CALLS):
        assert text in run.output


def by_loops(sizes):
    """Rows that leave each rank, counted token by token: dispatch, exact combine, fast combine."""
    local = sizes.experts // sizes.ranks
    out = {name: [0] * sizes.ranks for name in ("dispatch", "exact", "fast")}
    for src in range(sizes.ranks):
        for experts in draw(sizes, 0, src, CPU).topk_idx.tolist():
            owners = [e // local for e in experts if e // local != src]
            out["dispatch"][src] += len(set(owners))
            for owner in owners:
                out["exact"][owner] += 1
            for owner in set(owners):
                out["fast"][owner] += 1
    return out


def test_rows_are_those_that_leave():
    sizes = Sizes(3, 40, 128, 3, 12, 9)
    pool, rows = Pool(sizes, CPU), by_loops(sizes)
    for rank in range(3):
        got = DecodeReference(sizes, 0, rank, pool).rows_out()
        assert got == {name: each[rank] for name, each in rows.items()}


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (DecodeCase("dispatch"), [("dispatch", 7168 + 56 * 4)]),
        (DecodeCase("dispatch", fp8=False), [("dispatch", 14336)]),
        (DecodeCase("combine", numerics="fast"), [("fast", 14336)]),
        (DecodeCase("combine", numerics="exact", encoding="fp8"), [("exact", 14336 * 33 // 64)]),
        (DecodeCase("combine", numerics="exact", encoding="logfmt10"), [("exact", 14336 * 42 // 64)]),
        (DecodeCase("pair", numerics="exact"), [("dispatch", 7392), ("exact", 14336)]),
    ],
)
def test_bytes_of_rows(case, messages):
    assert case.messages(7168) == messages


def test_limit():
    rates = (Rate("store", 7168, 64, 350.0), Rate("store", 7168, 8, 300.0), Rate("store", 14336, 64, 360.0))
    limits = Limits(4, rates, flag_us=1.25, barrier_us=2.0)
    messages = [
        {"row_bytes": 7392, "rows": 200.0, "rows_most": 210},
        {"row_bytes": 14336, "rows": 500.0, "rows_most": 510},
    ]
    item = {"messages": messages}
    expected = 210 * 7392 / 350e3 + 510 * 14336 / 360e3 + 2 * (1.25 + 1.5)
    assert decode_report.limit_us(item, limits, 1.5) == pytest.approx(expected)
    assert decode_report.limit_us(item, limits, 1.5, kernels=2) == pytest.approx(expected + 2 * 1.5)
    for missing in ((None, 1.5), (limits, None), (Limits(4, (), 1.0, 1.0), 1.5)):
        assert decode_report.limit_us(item, *missing) is None


SIZES = Sizes(2, 7, 256, 3, 8, 11)


def oracle_of(variant, padded):
    """The oracle of the same inputs, with the same answers, for M = 9."""
    pool = Pool(SIZES, CPU)
    sent = []
    for rank in range(2):
        reference = DecodeReference(SIZES, variant, rank, pool, padded=padded)
        sent.append(Sent(reference.x, reference.topk_idx, reference.topk_weights))
    return pool, Oracle(sent, 8, "masked", capacity=18)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("encoding", ["same", "fp8", "logfmt10"])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_sums_are_those_of_the_oracle(numerics, encoding, padded):
    pool, oracle = oracle_of(1, padded)
    ys = [torch.empty(4, 18, 256, dtype=torch.bfloat16) for _ in range(2)]
    for rank, y in enumerate(ys):
        pool.fill(y, 4 * rank, 1)
    for rank in range(2):
        reference = DecodeReference(SIZES, 1, rank, pool, padded=padded)
        want = oracle.decode_combine(rank, [y.flatten(0, 1) for y in ys], fast=numerics == "fast", encoding=encoding)
        options = {"numerics": numerics, "encoding": encoding, "shift": 1}
        reference.check_sums("x", want, **options)
        wrong = [{"shift": 2}, {"encoding": "same" if encoding == "fp8" else "fp8"}]
        if encoding != "logfmt10":  # one rounding more is less than a code
            wrong.append({"numerics": "exact" if numerics == "fast" else "fast"})
        for other in wrong:
            with pytest.raises(WrongAnswer, match="x: "):
                reference.check_sums("x", want, **{**options, **other})
        spoiled = want.clone()
        spoiled[-1, 3] = spoiled[-1, 3] * 1.1 + 1e-3
        with pytest.raises(WrongAnswer):
            reference.check_sums("x", spoiled, **options)


def test_fast_sums_are_in_the_order_of_experts():
    """Weights that swallow one another: another order is another sum."""
    sizes = Sizes(2, 40, 128, 6, 8, 3)
    pool = Pool(sizes, CPU)
    references = [DecodeReference(sizes, 0, rank, pool) for rank in range(2)]
    choices = torch.tensor([2.0**40, -(2.0**40), 1.0, 3.0])
    for reference in references:
        reference.topk_weights = choices[torch.randint(4, (40, 6), generator=torch.Generator().manual_seed(1))]
    pool.rows = lambda experts, places, shift: torch.ones(*experts.shape, 128, dtype=torch.bfloat16)
    oracle = Oracle([Sent(t.x, t.topk_idx, t.topk_weights) for t in references], 8, "masked", capacity=80)
    want = oracle.decode_combine(0, [torch.ones(320, 128, dtype=torch.bfloat16)] * 2, fast=True)
    assert len(want.unique()) > 3
    references[0].check_sums("x", want, numerics="fast", shift=0)


def test_logfmt10_allows_few_other_codes():
    """One number in a hundred may be a code off; more may not."""
    pool, _ = oracle_of(0, padded=False)
    reference = DecodeReference(SIZES, 0, 0, pool)
    want, _, one_code = reference._sums("fast", "logfmt10", 0)
    off = (want.float() + one_code).bfloat16()
    few = torch.where(torch.arange(256) < 2, off, want)
    reference.check_sums("x", few, numerics="fast", encoding="logfmt10", shift=0)
    with pytest.raises(WrongAnswer, match="off by a code or more"):
        reference.check_sums("x", off, numerics="fast", encoding="logfmt10", shift=0)


def delivered(fp8, padded):
    """A dispatch as the oracle delivers it to rank 1."""
    pool, oracle = oracle_of(1, padded)
    rows, x = oracle.rows(1), oracle.x(1)
    places = torch.tensor([row.place for row in rows])
    tokens = torch.full((72,), -5, dtype=torch.int32)
    tokens[places] = torch.tensor([row.src_token for row in rows], dtype=torch.int32)
    if fp8:
        casts = [fp8_cast(row, power_of_two=False) for row in x]
        data, scale = torch.zeros(72, 256, dtype=torch.uint8), torch.zeros(72, 2)
        data[places] = torch.stack([cast.view(torch.uint8) for cast, _ in casts])
        scale[places] = torch.stack([scales for _, scales in casts])
        got = Quantized(data.view(torch.float8_e4m3fn).view(4, 18, 256), scale.view(4, 18, 2))
    else:
        got = torch.zeros(72, 256, dtype=torch.bfloat16)
        got[places] = x
        got = got.view(4, 18, 256)
    counts = torch.tensor(oracle.expert_counts(1), dtype=torch.int32)
    plan = SimpleNamespace(src_token=tokens.view(4, 18))
    return (
        DecodeReference(SIZES, 1, 1, pool, padded=padded),
        SimpleNamespace(x=got, expert_counts=counts, plan=plan),
        places,
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_dispatch_is_that_of_the_oracle(fp8, padded):
    reference, sent, places = delivered(fp8, padded)
    reference.check_dispatch("x", sent)
    at = places[-1] // 18, places[-1] % 18
    sent.plan.src_token[at] += 1
    with pytest.raises(WrongAnswer, match="x: source tokens"):
        reference.check_dispatch("x", sent)
    sent.plan.src_token[at] -= 1
    sent.expert_counts[2] += 1
    with pytest.raises(WrongAnswer, match="x: counts"):
        reference.check_dispatch("x", sent)
    sent.expert_counts[2] -= 1
    data = sent.x.data.view(torch.uint8) if fp8 else sent.x
    data[at][3] += 1
    with pytest.raises(WrongAnswer, match=r"x: 1 of .* rows are wrong on rank 1"):
        reference.check_dispatch("x", sent)
    data[at][3] -= 1
    if fp8:
        sent.x.scale[at][1] *= 1.01
        with pytest.raises(WrongAnswer, match=r"x: 1 of .* scales are wrong"):
            reference.check_dispatch("x", sent)


def test_ranks_bring_different_numbers_of_tokens():
    pool, _ = oracle_of(0, padded=True)
    used = [int((DecodeReference(SIZES, 0, rank, pool, padded=True).topk_idx >= 0).any(1).sum()) for rank in range(2)]
    assert used == [7 * 2 // 3, 7]


def test_no_time_for_results_that_are_wrong_afterwards(tmp_path):
    run = bench_gpu_phases(tmp_path, "gpu", "--only", "decode", "--tokens", "4", decode=decode_jobs.wrong_after_timing)
    wrong = {f"combine {numerics}, encoding fp8" for numerics in ("exact", "fast")}
    assert run.status == 1
    assert {item["call"] for item in run.report["decode"]} == CALLS - wrong, "the rest is kept"
    assert {one["what"] for one in run.report["failed"]} == {f"decode: {name}, T=4" for name in wrong}
    assert all("rank 1: WrongAnswer: " in one["why"] for one in run.report["failed"])


def test_new_data_has_to_show(tmp_path):
    run = bench_gpu_phases(tmp_path, "gpu", "--only", "decode", "--tokens", "4", decode=decode_jobs.always_the_same)
    assert run.status == 1
    assert {item["call"] for item in run.report["decode"]} == CALLS - {"dispatch FP8", "dispatch BF16"}
    failed = run.report["failed"]
    assert {one["what"] for one in failed} == {"decode: dispatch FP8, T=4", "decode: dispatch BF16, T=4"}
    assert all("(inputs 1)" in one["why"] for one in failed)


def test_two_batch_overlap_is_checked(tmp_path):
    words = ("gpu", "--only", "two_batch", "--two-batch-tokens", "8")
    run = bench_gpu_phases(tmp_path, *words, two_batch=decode_jobs.wrong_dispatch)
    assert run.status == 1
    assert "two_batch" not in run.report
    assert [one["what"] for one in run.report["failed"]] == [
        f"two-batch overlap, {numerics}, {work} work" for numerics in ("exact", "fast") for work in ("even", "uneven")
    ]
    assert all("hooks, A: dispatch" in one["why"] for one in run.report["failed"])


def test_answers_are_poisoned():
    """Everything that is checked is poisoned, so that a graph that writes nothing cannot pass."""
    reference, sent, _ = delivered(fp8=True, padded=False)
    done = SimpleNamespace(x=torch.zeros(7, 256))
    decode.Answer(sent, done).poison()
    assert sent.x.data.float().isnan().all()
    assert sent.x.scale.isnan().all()
    assert (sent.expert_counts == -1).all()
    assert (sent.plan.src_token == -1).all()
    assert done.x.isnan().all()
    with pytest.raises(WrongAnswer):
        reference.check_dispatch("x", sent)


class Recorded:
    """Static inputs whose group records its calls."""

    def __init__(self, done, name):
        self.done, self.name, self.x, self.y, self.routing, self.group = done, name, None, None, None, self

    def _call(self, what, return_hook):
        self.done.append(f"{'send' if return_hook else 'call'} {what} {self.name}")
        hook = (lambda: self.done.append(f"receive {what} {self.name}")) if return_hook else (lambda: None)
        return SimpleNamespace(hook=hook, plan=None)

    def decode_dispatch(self, x, routing, *, quantize, return_hook):
        return self._call("dispatch", return_hook)

    def decode_combine(self, y, plan, *, numerics, return_hook):
        return self._call("combine", return_hook)


def test_schedules():
    done = []
    batches = Recorded(done, "A"), Recorded(done, "B")
    both = two_batch_overlap.Schedules(
        *batches, DecodeCase("pair", numerics="exact"), lambda share: done.append("work")
    )
    both.by_hooks()
    assert done == [
        *("send dispatch A", "work", "receive dispatch A"),
        *("send dispatch B", "work", "receive dispatch B"),
        *("send combine A", "work", "receive combine A"),
        *("send combine B", "work", "receive combine B"),
    ]
    done.clear()
    both.one_after_another()
    assert done == [step for name in "AB" for step in ("work", f"call dispatch {name}", "work", f"call combine {name}")]
    done.clear()
    both.calls_only()
    assert done == [f"call {what} {name}" for name in "AB" for what in ("dispatch", "combine")]
    done.clear()
    both.work_only()
    assert done == ["work"] * two_batch_overlap.PIECES


def test_uneven_work():
    """A has as much more work as B has less, in every schedule: each rank does as much as with even work."""
    for name in ("by_hooks", "one_after_another", "work_only"):
        done = []
        batches = Recorded([], "A"), Recorded([], "B")
        getattr(
            two_batch_overlap.Schedules(*batches, DecodeCase("pair", numerics="exact"), done.append, tilt=0.5), name
        )()
        assert sorted(done) == [0.5, 0.5, 1.5, 1.5]
        assert sum(done) == two_batch_overlap.PIECES
    assert done == [1.5, 0.5, 1.5, 0.5]


def chosen(*words):
    args = make_parser().parse_args(["bench", *words])
    return bench_phases.choose_phases(args), bench_settings.make_settings(args, 4)


def test_phases_and_tokens_that_options_choose():
    names, settings = chosen("decode")
    assert names == ("limits", "decode", "two_batch")
    assert settings.decode_tokens == (1, 8, 32, 64, 128, 256, 512)
    assert settings.two_batch_tokens == 128
    assert chosen("gpu", "--only", "decode")[0] == ("limits", "decode"), "the limit is in its table"
    assert chosen("gpu", "--only", "decode,limits")[0] == ("decode", "limits")
    assert chosen("gpu", "--only", "two_batch")[0] == ("two_batch",)
    assert set(chosen("gpu")[0]) == set(bench_phases.PHASES) - {
        "eager",
        "megatron",
        "transformers",
        "language",
        "nodes",
        "nodes_decode",
    }
    names, settings = chosen("gpu", "--quick")
    assert "decode" in names
    assert settings.decode_tokens == (1, 128), "the targets"
    assert chosen("decode", "--tokens", "4,16", "--two-batch-tokens", "64")[1].decode_tokens == (4, 16)
    assert chosen("gpu", "--tokens", "4096")[1].decode_tokens == bench_settings.FULL_DECODE_TOKENS
    assert chosen("gpu", "--tokens", "64,4096")[1].decode_tokens == (64,)


def test_decode_means_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "decode"]) == 3
    assert "this needs GPUs" in capsys.readouterr().err


def test_a_limit_has_the_colour_of_its_curve(tmp_path, monkeypatch):
    lines = {}
    monkeypatch.setattr(plots, "_line", lambda axes, points, style, label, colour=None: lines.update({label: colour}))
    points = [(1.0, 2.0)]
    plots.plot_tokens({"a": points, "b": points}, {"limit: b": points, "other": points}, tmp_path, "title", "x.png")
    assert lines == {"a": None, "b": None, "limit: b": "C1", "other": None}
