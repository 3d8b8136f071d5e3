"""A short soak on GPUs. For ten minutes: SOAK_S=600, or the command ``python -m tokenferry.testing.soak``."""

import os

import pytest
from pairs import CUDA_RANKS

from tokenferry.testing import soak
from tokenferry.testing.world import World

SOAK_S = float(os.environ.get("SOAK_S", "10"))


@pytest.mark.timeout(SOAK_S * 2 + 300)
@pytest.mark.parametrize("ranks", [ranks for ranks in CUDA_RANKS if ranks > 1])
def test_soak(ranks):
    with World(ranks, devices="cuda", timeout_s=SOAK_S + 200) as world:
        tallies = world.run(soak.run, soak.Soak(SOAK_S, seed=ranks, device="cuda", timeout_s=60.0))
    assert len({tally.calls for tally in tallies}) == 1
    assert tallies[0].calls > 20
    assert tallies[0].checks > 20
