"""Progress of ranks while they work."""

import pytest

from support.bench_jobs import broken, report_and_stall, report_items
from tokenferry.testing.world import World, WorldError


def test_all_items_arrive_in_order(worlds):
    items = []
    assert worlds(2).run_with_progress(report_items, 50, on_item=items.append) == [0, 1]
    assert items == [{"i": i} for i in range(50)]


def test_failure_of_the_job_is_raised():
    with World(1) as world, pytest.raises(WorldError, match="no reason at all"):
        world.run_with_progress(broken, on_item=print)


def test_interrupt_ends_the_ranks():
    def interrupt(item):
        raise KeyboardInterrupt

    with World(1, timeout_s=600) as world:
        with pytest.raises(KeyboardInterrupt):
            world.run_with_progress(report_and_stall, on_item=interrupt)
        assert not world.alive
