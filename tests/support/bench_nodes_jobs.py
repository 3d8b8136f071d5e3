"""Jobs of ranks for the tests of the benchmark across nodes."""

from unittest import mock

import torch

from support.bench_jobs import damaged
from tokenferry.api import ExpertGroup
from tokenferry.bench.suites import nodes, nodes_decode


def wrong_dispatch(session):
    """`measure_nodes` in which a dispatch across nodes delivers a wrong row, on rank 1 only."""
    right = ExpertGroup.dispatch

    def dispatch(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if session.rank == 1 and self.topology.num_nodes > 1:
            with torch.no_grad():
                damaged(result.x)
        return result

    with mock.patch.object(ExpertGroup, "dispatch", dispatch):
        nodes.measure_nodes(session)


def miscounted(session):
    """`measure_nodes` in which one row more crosses the network than there has to."""
    count = nodes.rows_across
    with mock.patch.object(nodes, "rows_across", lambda *args: count(*args) + (session.rank == 1)):
        nodes.measure_nodes(session)


def wrong_leg(session):
    """`measure_nodes` in which the leg between nodes brings rank 1 other rows than those that cross."""
    right = nodes.Rail.dispatch

    def dispatch(self, iteration):
        right(self, iteration)
        if session.rank == 1:
            damaged(self.into[0])

    with mock.patch.object(nodes.Rail, "dispatch", dispatch):
        nodes.measure_nodes(session)


def wrong_pair(session):
    """`measure_node_pairs` in which an exact combine across nodes returns a wrong sum, on rank 1 only."""
    right = ExpertGroup.decode_combine

    def combine(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if session.rank == 1 and self.topology.num_nodes > 1 and kwargs["numerics"] == "exact":
            with torch.no_grad():
                result.x[0] += 8
        return result

    with mock.patch.object(ExpertGroup, "decode_combine", combine):
        nodes_decode.measure_node_pairs(session)
