"""The doctor on several nodes: in worlds whose ranks believe to be on hosts, and started by torchrun."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tokenferry import ExpertGroup
from tokenferry.cli import doctor, doctor_nodes
from tokenferry.cli.finding import Finding, run_check
from tokenferry.cli.main import main
from tokenferry.topology import Topology, consecutive


def found_on_hosts(rank, pg, hosts, environ):
    with (
        mock.patch("tokenferry.transports.rendezvous.host_name", return_value=hosts[rank]),
        mock.patch.dict(os.environ, environ),
    ):
        return doctor_nodes.over_nodes(rank, pg, None)


@pytest.mark.parametrize(
    ("hosts", "environ", "text"),
    [
        (
            "aabb",
            {},
            "2 nodes of 2 ranks (ranks 0 1, 2 3): each host is a node; shared_memory inside, process_group between",
        ),
        (
            "aaab",
            {},
            "1 node of 4 ranks (ranks 0..3): the 2 hosts have 3, 1 ranks; with equally many each would be a node; "
            "process_group inside",
        ),
        (
            "aaaa",
            {"TOKENFERRY_RANKS_PER_NODE": "1", "TOKENFERRY_TRANSPORT": "shared_memory"},
            "4 nodes of 1 rank (ranks 0, 1, 2, 3): ranks_per_node=1; shared_memory inside, shared_memory between",
        ),
    ],
)
def test_nodes_are_described(worlds, hosts, environ, text):
    assert worlds(4).run(found_on_hosts, hosts, environ) == [f"{text}, backend cpu"] * 4


def test_many_nodes_are_not_all_listed():
    group = SimpleNamespace(topology=Topology(0, consecutive(48, 8), "each host is a node"), transport="a+b")
    listed = "0..7, 8..15, 16..23, 24..31, and 2 more"
    assert (
        doctor_nodes.describe(group) == f"6 nodes of 8 ranks (ranks {listed}): each host is a node; a inside, b between"
    )


def wrong_sums(rank, pg):
    combine = ExpertGroup.combine

    def wrong(self, y, plan):
        result = combine(self, y, plan)
        result.x[3, 5] += 1
        return result

    with mock.patch.object(ExpertGroup, "combine", wrong), pytest.raises(ArithmeticError, match="not the rows that"):
        doctor_nodes.over_nodes(rank, pg, 1)


def test_wrong_sums_across_nodes_are_found(worlds):
    worlds(2).run(wrong_sums)


def not_divided(rank, pg):
    with mock.patch.dict(os.environ, TOKENFERRY_RANKS_PER_NODE="2"):
        return run_check("nodes", lambda: doctor_nodes.over_nodes(rank, pg, None), "read on").text


def test_nodes_that_do_not_divide_the_ranks_are_explained(worlds):
    reason = "ranks_per_node=2 does not divide the group's 3 ranks; all nodes have equally many"
    assert worlds(3).run(not_divided) == [f"ConfigError: ExpertGroup: {reason}; read on"] * 3


def test_started_by_torchrun_it_checks_the_ranks_of_the_job():
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENFERRY_RANKS_PER_NODE": "1", "TOKENFERRY_BACKEND": "cpu"}
    words = (*command, "-m", "tokenferry", "doctor")
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    nodes = "2 nodes of 1 rank (ranks 0, 1): ranks_per_node=1; process_group inside, process_group between, backend cpu"
    assert done.stdout == f"! nodes of this job         PASS  {nodes}\n"


@pytest.mark.parametrize(
    ("local_rank", "passed", "printed", "status"), [(0, True, True, 0), (1, True, False, 0), (1, False, True, 1)]
)
def test_one_rank_a_host_prints_unless_others_have_found_more(monkeypatch, capsys, local_rank, passed, printed, status):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(doctor_nodes, "of_job", lambda: Finding("nodes of this job", passed, "as it is", required=True))
    assert main(["doctor"]) == status
    assert ("as it is" in capsys.readouterr().out) is printed


def test_a_job_without_a_store_says_so(monkeypatch):
    for name in ("MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    finding = doctor_nodes.of_job()
    assert not finding.passed
    assert "environment variable RANK expected" in finding.text
    assert doctor.dist.is_initialized() is False
