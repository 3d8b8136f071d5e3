"""Jobs of ranks, and stand-ins, for the tests of the command line and the bench."""

import time
from unittest import mock

import torch

from tokenferry.api import ExpertGroup
from tokenferry.bench.core import progress as feed
from tokenferry.bench.core.inputs import Spec, WrongAnswer
from tokenferry.bench.suites import cpu_calls as scenarios
from tokenferry.types import Quantized

TINY = Spec(ranks=2, tokens=6, hidden=128, top_k=2, experts=4, iters=2, warmup=1, seed=7)


def damaged(x):
    """The same with one element of its first row that has data changed by little."""
    rows = x.data if isinstance(x, Quantized) else x
    row = rows.view(-1, rows.shape[-1])[0]
    row[0] = 448.0 if isinstance(x, Quantized) else row[0] * 1.01
    return x


def measure_damaged(rank, pg, news, spec, transport, method, call_number):
    """`scenarios.measure` in a world where one call of one method returns damaged rows; returns the complaint."""
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
            scenarios.measure(rank, pg, news, spec, transport)
        except WrongAnswer as error:
            return str(error)
    return "nothing"


def wrong_answer(rank, pg, news, spec, transport):
    """A measurement that finds something wrong on rank 1."""
    if rank == 1:
        raise WrongAnswer("combine: 1 of 6 rows differ, the first is row 4")
    return [], transport


def broken(rank, pg, news, *args):
    """A job that fails for a reason that has no name."""
    raise RuntimeError("no reason at all")


def talk(rank, pg, news, count):
    """Send ``count`` items from rank 0."""
    for i in range(count):
        if rank == 0:
            feed.send(news, {"i": i})
    return rank


def talk_and_stall(rank, pg, news):
    """Send one item, then stay."""
    feed.send(news, {"rank": rank})
    time.sleep(600)


def splits(rank, pg, spec):
    """(rows sent, rows received) by set of inputs and rank, for each exchange that the limit is made of."""
    exchanges = scenarios._exchanges(pg, spec)
    for exchange in exchanges.values():
        for i in range(scenarios.VARIANTS):
            exchange(i)
    return {name: (exchange._send, exchange._receive) for name, exchange in exchanges.items()}
