"""Percentiles, summaries and reports."""

import subprocess
from dataclasses import replace

import pytest

from tokenferry.bench.core.session import Label, Result, Times
from tokenferry.bench.core.summary import percentile, summarize
from tokenferry.bench.report import about, tables


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (5, 1.2), (25, 2.0), (50, 3.0), (95, 4.8), (100, 5.0), (60, 3.4)]
)
def test_percentiles_are_linear_between_samples(percent, expected):
    assert percentile([3.0, 1.0, 5.0, 2.0, 4.0], percent) == pytest.approx(expected)


def test_percentile_of_one_sample_is_the_sample():
    assert percentile([7.0], 5) == percentile([7.0], 95) == 7.0


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match=f"{len(values)} values, {percent}"):
        percentile(values, percent)


def test_summary_takes_the_slowest_rank_of_each_iteration():
    summary = summarize([[1e-6, 9e-6, 3e-6], [5e-6, 2e-6, 4e-6]])  # slowest: 5, 9, 4
    assert summary.n == 3
    assert summary.median_us == pytest.approx(5.0)
    assert summary.p05_us == pytest.approx(4.1)
    assert summary.p95_us == pytest.approx(8.6)


def test_summary_refuses_ranks_of_different_lengths():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        summarize([[1.0], [1.0, 2.0]])


def summary(median):
    return summarize([[median * 1e-6]])


def result(**changes):
    label = Label("tokenferry", "dispatch", "bf16", 6, row_bytes=256, rows_out=7)
    baseline = Times(summary(2000.0), summary(1500.0))
    return replace(Result(label, 3e6, 4e6, summary(3000.0), 0.0, summary(1200.0), baseline), **changes)


def test_ratios_are_those_of_medians():
    one = result()
    assert tables.ratios(one) == {"isolated": pytest.approx(1.5), "back_to_back": pytest.approx(0.8)}
    assert tables.ratios(replace(one, baseline=None)) is None


def test_rows_of_a_call_and_its_baseline():
    first, second = (dict(zip(tables.BASELINE_HEADER, row, strict=True)) for row in tables.baseline_rows([result()]))
    assert (first["mode"], second["mode"]) == ("isolated", "back to back")
    assert first["call"] == second["call"] == "dispatch"
    assert (first["median us"], second["median us"]) == ("3000", "1200")
    assert (first["gloo us"], second["gloo us"]) == ("2000", "1500")
    assert (first["ratio"], second["ratio"]) == ("1.50", "0.80")
    assert (first["MB/rank"], first["GB/s"], second["GB/s"]) == ("3.00", "1.00", "2.50")


def test_commit_is_that_of_the_clone_that_holds_the_package(tmp_path):
    def git(*words):
        name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(["git", "-C", tmp_path, *name, *words], check=True, capture_output=True, text=True).stdout

    file = tmp_path / "about.py"
    file.write_text("")
    assert about.commit(file) is None
    git("init", "-q")
    assert about.commit(file) is None, "a package inside another project's clone is not part of it"
    git("add", "about.py")
    git("commit", "-q", "-m", "x")
    assert about.commit(file) == git("rev-parse", "--short=12", "HEAD").strip()
    file.write_text("changed")
    assert about.commit(file).endswith("-dirty")


def test_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert about.commit() is None


@pytest.mark.parametrize("text", [None, "nothing here"])
def test_processor_where_the_system_does_not_say(monkeypatch, text):
    def read(*args, **kwargs):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(about.Path, "read_text", read)
    assert about.machine()["processor"]


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr(about, "num_cores", lambda: 8)
    assert [about.threads_for(ranks) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


def test_a_report_says_for_which_architecture_kernels_were_compiled(monkeypatch):
    monkeypatch.delenv("TOKENFERRY_ARCH", raising=False)
    assert about.about("tokenferry bench gpu")["command"] == "tokenferry bench gpu"
    monkeypatch.setenv("TOKENFERRY_ARCH", "compute_80")
    command = "TOKENFERRY_ARCH=compute_80 tokenferry bench gpu"
    assert about.about("tokenferry bench gpu")["command"] == command
    assert about.lines("tokenferry bench gpu")[-1] == f"command: {command}"
