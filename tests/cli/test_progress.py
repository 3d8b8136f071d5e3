"""Progress of ranks while they work."""

import pytest

from support.bench_jobs import broken, report_and_stall, report_items
from tokenferry.bench.core.progress import _read, run_with_progress
from tokenferry.testing.world import World, WorldError


def test_all_items_arrive_in_order(worlds):
    items = []
    assert run_with_progress(worlds(2), report_items, 50, on_item=items.append) == [0, 1]
    assert items == [{"i": i} for i in range(50)]


def test_half_a_line_waits_for_its_rest(tmp_path):
    path, items = tmp_path / "progress", []
    path.write_text('{"a": 1}\n{"b"')
    with path.open() as file:
        _read(file, items.append)
        assert items == [{"a": 1}]
        with path.open("a") as more:
            more.write(": 2}\n")
        _read(file, items.append)
    assert items == [{"a": 1}, {"b": 2}]


def test_failure_of_the_job_is_raised():
    with World(1) as world, pytest.raises(WorldError, match="no reason at all"):
        run_with_progress(world, broken, on_item=print)


def test_interrupt_ends_the_ranks():
    def interrupt(item):
        raise KeyboardInterrupt

    with World(1, timeout_s=600) as world:
        with pytest.raises(KeyboardInterrupt):
            run_with_progress(world, report_and_stall, on_item=interrupt)
        assert not world.alive
