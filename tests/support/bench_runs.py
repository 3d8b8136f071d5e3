"""Runs of `tokenferry bench`, whose reports and output several tests share."""

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from support import bench_decode_jobs, bench_jobs, limits_jobs
from tokenferry.cli import bench_phases, bench_settings, screen
from tokenferry.cli.main import main, make_parser
from tokenferry.cli.screen import Screen

TINY = ["--ranks", "2", "--hidden", "128", "--top-k", "2", "--experts", "8", "--iterations", "2", "--seed", "5"]


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        status: Exit status.
        output: Everything that it printed.
        report: The JSON file.
        folder: Holds its files.
    """

    status: int
    output: str
    report: dict
    folder: Path


def bench(folder, *words):
    """Run `tokenferry bench cpu`."""
    file, output = folder / "out.json", io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["bench", "cpu", *words, "--json", str(file)])
    return Run(status, output.getvalue(), json.loads(file.read_text()), folder)


def bench_gpu_phases(folder, part, *words, **jobs):
    """Run a part that is for GPUs on the CPU backend, where `num_sms` has no meaning; links are not measured.

    ``jobs`` replace those of phases; calls are few where the time of the host is measured.
    """
    file, output = folder / "out.json", io.StringIO()
    words = ["bench", part, *words, *TINY, "--json", str(file)]
    args = make_parser().parse_args(words)
    args.command_line = " ".join(["tokenferry", *words])
    args.device, args.sms = "cpu", ()
    jobs = {
        "limits": limits_jobs.stand_in,
        "host": bench_jobs.measure_host,
        "decode": bench_decode_jobs.measure_decode,
        **jobs,
    }
    phases = {
        name: replace(bench_phases.PHASES[name], measure=job, timeout_s=60.0, what="a test")
        for name, job in jobs.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_settings.DEFAULTS, (part, "cpu"), bench_settings.DEFAULTS[part, "cuda"])
        patch.setattr(screen, "NOTE_COLUMNS", 10_000)  # tests look for whole sentences
        patch.setattr(bench_phases, "PHASES", {**bench_phases.PHASES, **phases})
        status = bench_phases.run(args, Screen(output))
    return Run(status, output.getvalue(), json.loads(file.read_text()), folder)
