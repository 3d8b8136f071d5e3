"""Short soaks on GPUs. For longer ones SOAK_S=600 and SOAK_REPLAYS=10000, or the commands
``python -m tokenferry.testing.soak`` and ``python -m tokenferry.testing.soak_graphs``.
"""

import os

import pytest

from support.pairs import CUDA_RANKS
from tokenferry.testing import soak, soak_graphs
from tokenferry.testing.world import World

SOAK_S = float(os.environ.get("SOAK_S", "10"))
SOAK_REPLAYS = int(os.environ.get("SOAK_REPLAYS", "200"))

by_ranks = pytest.mark.parametrize("ranks", [ranks for ranks in CUDA_RANKS if ranks > 1])


@pytest.mark.timeout(SOAK_S * 2 + 300)
@by_ranks
def test_soak(ranks):
    with World(ranks, devices="cuda", timeout_s=SOAK_S + 200) as world:
        tallies = world.run(soak.run, soak.Soak(SOAK_S, seed=ranks, device="cuda", timeout_s=60.0))
    assert len({tally.calls for tally in tallies}) == 1
    assert tallies[0].calls > 20
    assert tallies[0].checks > 20


@pytest.mark.timeout(SOAK_REPLAYS + 300)
@by_ranks
def test_soak_of_decode_graphs(ranks):
    plan = soak_graphs.Soak(SOAK_REPLAYS, seed=ranks, device="cuda", timeout_s=60.0)
    with World(ranks, devices="cuda", timeout_s=SOAK_REPLAYS + 200) as world:
        tallies = world.run(soak_graphs.run, plan)
    assert len({tally.checks for tally in tallies}) == 1
    assert tallies[0].checks >= 6 * SOAK_REPLAYS
