"""A rank of a group of several nodes is lost, on either leg of a call: every survivor names it, in time."""

import pytest

from support.lost_nodes import LOST_NODE, LOST_RANK, NUM_RANKS, Loss, Seen, lose
from support.lost_ranks import LONG_S, SLACK_S
from tokenferry.testing.world import World, WorldError

TIMEOUT_S = 3.0


def check(seen: list[Seen], loss: Loss) -> None:
    assert len(seen) == NUM_RANKS - 1
    for one in seen:
        assert one.phase.split()[0] == loss.call
        assert (one.peers, one.nodes) == ((LOST_RANK,), (LOST_NODE,)), one.text
        assert f"rank {LOST_RANK} on node {LOST_NODE}" in one.text
        assert one.took_s < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize(
    ("call", "exchange"),
    [("dispatch", 0), ("dispatch", 1), ("dispatch", 3), ("redispatch", 2), ("combine", 0), ("combine", 3)],
)
@pytest.mark.parametrize("how", ["kill", "stall"])
def test_every_survivor_names_the_lost_rank(call, exchange, how, tmp_path):
    loss = Loss(call, exchange, how, str(tmp_path), TIMEOUT_S if how == "stall" else LONG_S)
    with World(NUM_RANKS) as world:
        if how == "stall":
            seen = world.run(lose, loss)
            assert seen.pop(LOST_RANK) is None
        else:
            with pytest.raises(WorldError) as caught:
                world.run(lose, loss)
            assert set(caught.value.errors) == {LOST_RANK}, caught.value
            seen = list(caught.value.results.values())
    check(seen, loss)
    if how == "kill":
        assert max(one.took_s for one in seen) < LONG_S, "a rank that died is seen at once"
