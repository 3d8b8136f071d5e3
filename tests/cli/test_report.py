"""Percentiles, summaries and reports."""

import json
import subprocess

import pytest

from support.bench_jobs import TINY
from tokenferry.bench.core import clock
from tokenferry.bench.report import cpu as report
from tokenferry.bench.suites.cpu_calls import Samples


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (5, 1.2), (25, 2.0), (50, 3.0), (95, 4.8), (100, 5.0), (60, 3.4)]
)
def test_percentiles_are_linear_between_samples(percent, expected):
    assert clock.percentile([3.0, 1.0, 5.0, 2.0, 4.0], percent) == pytest.approx(expected)


def test_percentile_of_one_sample_is_the_sample():
    assert clock.percentile([7.0], 5) == clock.percentile([7.0], 95) == 7.0


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match=f"{len(values)} values, {percent}"):
        clock.percentile(values, percent)


def test_summary_takes_the_slowest_rank_of_each_iteration():
    summary = clock.summarize([[1e-6, 9e-6, 3e-6], [5e-6, 2e-6, 4e-6]])  # slowest: 5, 9, 4
    assert summary.n == 3
    assert summary.median_us == pytest.approx(5.0)
    assert summary.p05_us == pytest.approx(4.1)
    assert summary.p95_us == pytest.approx(8.6)


def test_summary_refuses_ranks_of_different_lengths():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        clock.summarize([[1.0], [1.0, 2.0]])


def one_line():
    slow = Samples("dispatch", 2e6, {"drained": [2e-3, 4e-3]}, {"drained": [1e-3, 1e-3]})
    fast = Samples("dispatch", 4e6, {"drained": [1e-3, 1e-3]}, {"drained": [2e-3, 2e-3]})
    [line] = report.lines("shared_memory", [[slow], [fast]])
    return line


def test_line_of_two_ranks():
    line = one_line()
    assert (line.transport, line.call, line.mode) == ("shared_memory", "dispatch", "drained")
    assert line.row_bytes == 3e6
    assert line.ours.median_us == pytest.approx(3000)
    assert line.gloo.median_us == pytest.approx(2000)
    assert line.ratio == pytest.approx(1.5)


def test_cells_match_the_header():
    cells = dict(zip(report.HEADER, report.cells(one_line()), strict=True))
    assert cells["call"] == "dispatch"
    assert cells["median us"] == "3000"
    assert cells["gloo us"] == "2000"
    assert cells["ratio"] == "1.50"
    assert cells["MB/rank"] == "3.00"
    assert cells["GB/s"] == "1.00"


def test_json_holds_everything_a_number_needs():
    whole = json.loads(json.dumps(report.as_json(TINY, 1, "tokenferry bench", [one_line()])))
    assert set(whole) == {
        *("schema", "tokenferry", "commit", "date", "command", "machine", "threads_per_rank", "spec", "bytes"),
        *("checked", "results"),
    }
    assert whole["schema"] == 1
    assert whole["spec"]["hidden"] == TINY.hidden
    assert set(whole["machine"]) == {"processor", "cores", "load", "system", "python", "torch"}
    [line] = whole["results"]
    assert set(line) == {"transport", "call", "mode", "row_bytes", "ours", "gloo", "ratio"}
    assert set(line["ours"]) == {"n", "median_us", "p05_us", "p95_us"}


def test_commit_is_that_of_the_clone_that_holds_the_package(tmp_path):
    def git(*words):
        name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(["git", "-C", tmp_path, *name, *words], check=True, capture_output=True, text=True).stdout

    assert report.commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "report.py").write_text("")
    assert report.commit(tmp_path) is None, "a package inside another project's clone is not part of it"
    git("add", "report.py")
    git("commit", "-q", "-m", "x")
    assert report.commit(tmp_path) == git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "report.py").write_text("changed")
    assert report.commit(tmp_path).endswith("-dirty")


def test_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit() is None


@pytest.mark.parametrize("text", [None, "nothing here"])
def test_processor_where_the_system_does_not_say(monkeypatch, text):
    def read(*args, **kwargs):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(report.Path, "read_text", read)
    assert report.machine()["processor"]


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr(report, "num_cores", lambda: 8)
    assert [report.threads_for(ranks) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
