"""What DeepEP's own V1 tests do, on CPU ranks: their options, their checks, ranks that stop in shrink mode."""

from support import deep_ep_v1_jobs as jobs
from support.deep_ep_v1_jobs import Sizes
from tokenferry.testing.world import World

LOW_LATENCY = Sizes(tokens=6, hidden=1024, experts=16, top_k=3)


def test_low_latency(worlds):
    worlds(4).run(jobs.low_latency, "cpu", LOW_LATENCY)


def test_low_latency_with_logfmt(worlds):
    worlds(4).run(jobs.low_latency, "cpu", LOW_LATENCY, True)


def test_ranks_that_stop_in_shrink_mode():
    with World(6) as world:
        world.run(jobs.shrinking, "cpu", Sizes(tokens=5, hidden=1024, experts=12, top_k=4))


def test_normal_mode(worlds):
    worlds(4).run(jobs.normal_mode, "cpu", Sizes(tokens=12, hidden=256, experts=8, top_k=3), 24)
