"""Ranks that are lost to decode calls: the others go on, and the lost ones come back."""

import os
import signal
import time
from pathlib import Path

import pytest

from support.masks import Load, by_hand, in_a_graph, skip_and_return, under_load
from support.pairs import CPU_PAIRS, CUDA_PAIRS, NUM_GPUS
from tokenferry.testing.world import World

TIMEOUT_S = 2.0

maskable = pytest.mark.parametrize("pair", [CPU_PAIRS[0], *CUDA_PAIRS], ids=str)


@maskable
@pytest.mark.parametrize(("where", "hook"), [("dispatch", False), ("dispatch", True), ("combine", False)])
def test_a_rank_that_is_away_comes_back(pair, where, hook, tmp_path):
    with World(3, devices=pair.backend) as world:
        world.run(skip_and_return, pair, str(tmp_path), TIMEOUT_S, where, hook)


@maskable
@pytest.mark.parametrize("lost", [(2,), (0,), (3, 1)], ids=str)
def test_processes_that_are_stopped_under_load_come_back(pair, lost, tmp_path):
    """They are stopped wherever they happen to be; the others wait for them once, and go on for hundreds of rounds."""
    ranks = 2 + len(lost)
    if pair.backend == "cuda" and ranks > max(NUM_GPUS, 3):
        pytest.skip(f"needs {ranks} GPUs")
    with World(ranks, devices=pair.backend, timeout_s=120.0) as world:
        world.submit(under_load, pair, str(tmp_path), TIMEOUT_S, Load(lost, 300, stopped=True))
        stopped = [world.pids[rank] for rank in lost]
        others = [rank for rank in range(ranks) if rank not in lost]
        try:
            await_words(tmp_path, "ready", range(ranks))
            time.sleep(0.3)  # somewhere
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            await_words(tmp_path, "went on", others)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        told = world.collect()
    for rank in others:
        assert told[rank]["made"] >= 300
        assert 1 <= told[rank]["masked"] <= 2 * len(lost), "they were waited for again and again"


@maskable
@pytest.mark.parametrize("both_sides", [True, False])
def test_masks_by_hand(pair, both_sides, tmp_path):
    with World(3, devices=pair.backend) as world:
        world.run(by_hand, pair, str(tmp_path), both_sides, TIMEOUT_S if not both_sides else 30.0)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_graphs_see_masks(worlds, pair, tmp_path):
    worlds(3, pair.backend).run(in_a_graph, pair, str(tmp_path))


def await_words(folder: Path, what: str, ranks) -> None:
    deadline = time.monotonic() + 100.0
    while not all((folder / f"{what} {rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
