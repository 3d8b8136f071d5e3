"""Jobs of ranks, and stand-ins, for the tests of the command line and the bench."""

import time
from unittest import mock

import torch

from tokenferry.api import ExpertGroup
from tokenferry.bench.baselines.gloo import row_exchanges
from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.core.session import Settings
from tokenferry.bench.suites import host_time
from tokenferry.bench.suites.cpu_calls import RUNS, VARIANTS, measure_cpu_calls
from tokenferry.types import Quantized

TINY = Settings(
    ranks=2, tokens=(6,), hidden=128, top_k=2, experts=4, iterations=2, warmup=1, seed=7, backend="cpu", runs=RUNS
)

FEW_CALLS = 3
"""Calls of a batch in which the host's time is measured."""


def damaged(x):
    """The same with one element of its first row that has data changed by little."""
    rows = x.data if isinstance(x, Quantized) else x
    row = rows.view(-1, rows.shape[-1])[0]
    row[0] = 448.0 if isinstance(x, Quantized) else row[0] * 1.01
    return x


def measure_damaged(session, transport, method, call_number):
    """`measure_cpu_calls` in a world where one call of one method returns damaged rows; returns the error."""
    right = getattr(ExpertGroup, method)
    calls = 0

    def wrong(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        result = right(self, *args, **kwargs)
        if calls == call_number:
            with torch.no_grad():
                damaged(result.x)
        return result

    with mock.patch.object(ExpertGroup, method, wrong):
        try:
            measure_cpu_calls(session, transport)
        except WrongAnswer as error:
            return str(error)
    return "nothing"


def wrong_call(session, measure, owner, method):
    """A suite in which a method delivers a wrong row, on rank 1 only."""
    right = getattr(owner, method)

    def call(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if session.rank == 1:
            with torch.no_grad():
                damaged(getattr(result, "x", result))
        return result

    with mock.patch.object(owner, method, call):
        measure(session)


def wrong_answer(session, transport):
    """A measurement that finds something wrong on rank 1."""
    if session.rank == 1:
        raise WrongAnswer("combine: 1 of 6 rows differ, the first is row 4")


def broken(*args, **options):
    """A job that fails for an unexpected reason."""
    raise RuntimeError("no reason at all")


def discard(item):
    """Takes the place of the progress of a job that is run without."""


def report_items(rank, pg, progress, count):
    """Send ``count`` items from rank 0."""
    for i in range(count):
        if rank == 0:
            progress({"i": i})
    return rank


def report_and_stall(rank, pg, progress):
    """Send one item, then stay."""
    progress({"rank": rank})
    time.sleep(600)


def splits(rank, pg, settings):
    """(rows sent, rows received) by set of inputs and rank, for each exchange of the baseline."""
    exchanges = row_exchanges(pg, settings.sizes(settings.tokens[0]), VARIANTS)
    for exchange in exchanges.values():
        for i in range(VARIANTS):
            exchange(i)
    return {name: (exchange._send, exchange._receive) for name, exchange in exchanges.items()}


def measure_host(session):
    """`host_time.measure_host` with few calls."""
    with mock.patch.object(host_time, "CALLS", FEW_CALLS):
        host_time.measure_host(session)
