"""`tokenferry bench eager`, on CPUs: every call of every library, checked, on the wall clock."""

from functools import partial

import pytest

from support.bench_eager_jobs import measure_eager
from support.bench_jobs import wrong_call
from support.bench_runs import bench_gpu_phases
from tokenferry.api import ExpertGroup
from tokenferry.bench.report import eager, plots

DISPATCHES = {(name, rows) for name in ("dispatch", "dispatch, plan kept") for rows in ("bf16", "fp8")}
COMMON = {
    *DISPATCHES,
    ("combine, rows in user memory", "bf16"),
    ("dispatch + combine", "bf16"),
    ("decode pair", "fp8"),
}
CALLS = {
    "tokenferry": {*COMMON, ("combine, rows in the group's memory", "bf16")},
    "Buffer": {*COMMON, ("layout alone", "-"), ("dispatch + combine, async_finish", "bf16")},
    "gloo": COMMON,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the device as torch's default."""
    words = ["eager", "--tokens", "6", "--default-device"]
    return bench_gpu_phases(tmp_path_factory.mktemp("eager"), *words, eager=measure_eager)


def test_every_call_of_every_library_is_measured(run):
    assert run.status == 0
    assert run.report["failed"] == []
    seen = [(item["library"], item["call"], item["rows"]) for item in run.report["eager"]]
    assert set(seen) == {(library, *call) for library, calls in CALLS.items() for call in calls}
    assert len(seen) == len(set(seen))


def test_times(run):
    for item in run.report["eager"]:
        for mode in ("isolated", "back_to_back"):
            times = item[mode]
            assert times["n"] == 2
            assert 0 < times["p05_us"] <= times["median_us"] <= times["p95_us"]
        assert item["host_us"] > 0
    assert run.report["torch.empty(8)"][0]["us"] > 0
    assert run.report["settings"]["default_device"] is True


def test_tables_have_every_call(run):
    for text in ("x torch.empty(8)", "over Buffer", "isolated us", "default device", "layout alone", "bit-equal"):
        assert text in run.output
    assert "GPU" not in run.output


def test_a_wrong_answer_gets_no_time(tmp_path):
    job = partial(wrong_call, measure=measure_eager, owner=ExpertGroup, method="redispatch")
    run = bench_gpu_phases(tmp_path, "eager", "--tokens", "6", eager=job)
    assert run.status == 1
    assert ["rank 1: WrongAnswer: dispatch, plan kept" in one["why"] for one in run.report["failed"]] == [True] * 4
    seen = {(item["library"], item["call"]) for item in run.report["eager"]}
    assert ("gloo", "dispatch, plan kept") in seen
    assert not seen & {("tokenferry", "dispatch, plan kept"), ("Buffer", "dispatch, plan kept")}


def item(library, tokens, us, host_us=None):
    times = {"n": 3, "median_us": us, "p05_us": us - 1, "p95_us": us + 1}
    label = {"library": library, "call": "dispatch", "rows": "bf16", "tokens": tokens}
    return {**label, "isolated": times, "back_to_back": times, "host_us": host_us}


def test_rows_of_tables():
    items = [
        item("tokenferry", 8, 10.0, 6.0),
        item("nccl", 8, 25.0),
        item("tokenferry", 1, 5.0),
        item("Buffer", 8, 20.0),
    ]
    assert eager.rows(items, 2.0)[1] == [
        *("dispatch", "bf16", "8", "tokenferry", "10.0 (9.0-11.0)", "10.0 (9.0-11.0)", "6.0", "3.0"),
    ]
    assert eager.short_rows(items) == [
        ["dispatch", "bf16", "1", "5.0", "-", "-", "-", "-"],
        ["dispatch", "bf16", "8", "10.0", "20.0", "25.0", "2.50", "1.25"],
    ]


def test_a_picture_has_the_calls_of_several_libraries(tmp_path):
    items = [
        item("tokenferry", 8, 10.0),
        item("all_to_all_single (nccl)", 8, 25.0),
        item("tokenferry", 1, 5.0),
        item("Buffer", 1, 20.0),
        {**item("Buffer", 1, 20.0), "call": "layout alone"},
    ]
    parts = eager.bars(items)
    assert [(part.title, part.groups) for part in parts] == [
        ("T=1", {"dispatch, BF16": {"tokenferry": 5.0, "Buffer": 20.0}}),
        ("T=8", {"dispatch, BF16": {"tokenferry": 10.0, "all_to_all_single": 25.0}}),
    ]
    for some in (parts, parts[:1], [*parts, parts[0]]):
        (file,) = plots.plot_bars(some, tmp_path / "new", "title", "eager.png")
        assert file.read_bytes().startswith(b"\x89PNG")
