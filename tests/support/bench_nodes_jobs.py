"""Jobs of ranks for the tests of the benchmark across nodes."""

from unittest import mock

import torch

from support.bench_jobs import damaged
from tokenferry.api import ExpertGroup
from tokenferry.bench.suites import nodes


def wrong_dispatch(rank, pg, progress, settings):
    """`measure_nodes` in which a dispatch across nodes delivers a wrong row, on rank 1 only."""
    right = ExpertGroup.dispatch

    def dispatch(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if rank == 1 and self.topology.num_nodes > 1:
            with torch.no_grad():
                damaged(result.x)
        return result

    with mock.patch.object(ExpertGroup, "dispatch", dispatch):
        nodes.measure_nodes(rank, pg, progress, settings)


def miscounted(rank, pg, progress, settings):
    """`measure_nodes` in which one row more crosses the network than there has to."""
    count = nodes.rows_across
    with mock.patch.object(nodes, "rows_across", lambda *args: count(*args) + (rank == 1)):
        nodes.measure_nodes(rank, pg, progress, settings)


def wrong_leg(rank, pg, progress, settings):
    """`measure_nodes` in which the leg between nodes brings rank 1 other rows than those that cross."""
    right = nodes._Rail.dispatch

    def dispatch(self, iteration):
        right(self, iteration)
        if rank == 1:
            damaged(self.into[0])

    with mock.patch.object(nodes._Rail, "dispatch", dispatch):
        nodes.measure_nodes(rank, pg, progress, settings)
