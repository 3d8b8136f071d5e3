"""Two nodes in network namespaces of their own: nothing but a TCP link connects them, and it is cut in mid-call."""

import json
import time
from pathlib import Path
from subprocess import Popen

import pytest

from support.lost_ranks import SLACK_S
from support.network_rank import CUTS, NODES, RANKS, STARTED_S, TIMEOUT_S
from support.networks import Network, NoNetworksError, two_networks

PORT = 29500


def wait_for_notes(folder: Path, note: str, num: int, ranks: list[Popen[str]]) -> None:
    """Wait for the notes of all ranks, unless one of them fails; then what it prints says why."""
    deadline = time.monotonic() + STARTED_S
    while len(list(folder.glob(f"* {note}*"))) < num and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            break
        time.sleep(0.05)


def run_ranks(networks: tuple[Network, Network], folder: Path) -> list[tuple[int, str, str]]:
    """Start all ranks, cut the link when all are ready, and return how each has ended."""
    store = f"{networks[0].address}:{PORT}"
    ranks = [networks[rank // 2].start("support.network_rank", rank, store, folder) for rank in range(RANKS)]
    try:
        wait_for_notes(folder, "is ready", RANKS, ranks)
        (folder / "start").touch()
        wait_for_notes(folder, "is in", RANKS * len(CUTS), ranks)
        networks[0].cut()
        (folder / "cut").touch()
        return [(rank.returncode, out, err) for rank in ranks for out, err in [rank.communicate(timeout=STARTED_S)]]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_two_networks_and_a_link_that_is_cut(tmp_path):
    try:
        with two_networks() as networks:
            ended = run_ranks(networks, tmp_path)
    except NoNetworksError as why:
        pytest.skip(str(why))
    for rank, (code, out, err) in enumerate(ended):
        assert code == 0, f"rank {rank} ended with {code}: {err}"
        for seen in json.loads(out):
            others = NODES[1 - rank // 2]
            assert set(seen["peers"]) <= set(others), f"rank {rank}: {seen}"
            assert seen["nodes"] == [1 - rank // 2], f"rank {rank}: {seen}"
            assert seen["phase"].split()[0] == seen["call"], f"rank {rank}: {seen}"
            assert seen["took_s"] < TIMEOUT_S + SLACK_S, f"rank {rank}: {seen}"
