"""Which nodes a group of GPUs has, where some cannot map each other: as rank 0 sees it; its peer is scripted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenferry import MoeShape
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda import setup
from tokenferry.errors import ConfigError
from tokenferry.memory import reach
from tokenferry.topology import Topology

UUIDS = ["GPU-0", "GPU-1"]


class Table:
    """Answers of two ranks; the other one has no objection of its own, but perhaps a wrong option."""

    def __init__(self, *hosts: str, wrong: str = "") -> None:
        self.hosts, self.asked, self.wrong = hosts, 0, wrong
        self.said: list[dict[str, Any]] = []

    def exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        self.asked += 1
        self.said.append(mine)
        if "why_not" in mine:
            return [mine, {"why_not": "", "wrong": self.wrong} if "wrong" in mine else {"why_not": ""}]
        return [{**mine, "host": host, "device": device(rank)} for rank, host in enumerate(self.hosts)]


def device(rank: int) -> dict[str, Any]:
    return {"name": "RTX", "index": rank, "uuid": UUIDS[rank], "capability": [8, 9]}


@pytest.fixture
def survey(monkeypatch):
    """``survey(table, reachable=, nccl=, **options)``: what rank 0 of two finds."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=UUIDS[i]))
    monkeypatch.setattr(setup, "_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(setup, "describe", lambda _: {"host": "here", "process": "0", "device": None, "trouble": ""})
    monkeypatch.setattr(setup, "_rank_and_size", lambda _: (0, 2))
    monkeypatch.setattr(setup, "Jit", lambda *_, **__: SimpleNamespace(close=lambda: None))
    memory = SimpleNamespace(smem_bytes=lambda: run.smem_bytes, close=lambda: None)
    monkeypatch.setattr(setup, "Device", lambda index: memory)

    def run(table: Table, *, reachable: bool, nccl: str = "", **options: Any) -> Any:
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reachable)
        monkeypatch.setattr(setup.nccl, "why_not", lambda: nccl)
        monkeypatch.setattr(setup, "_bootstrap", lambda *_: table)
        on_timeout = options.pop("on_timeout", "raise")
        shape = MoeShape(4, 2, 16, 8)
        resolved = Resolved(shape, "auto", "auto", 5.0, on_timeout == "mask", None, "", **options)
        return setup._survey(None, resolved)

    run.smem_bytes = 99 << 10
    return run


def test_gpus_that_reach_each_other_are_one_node(survey):
    table = Table("here", "here")
    found = survey(table, reachable=True)
    assert (found.topology.nodes, found.why_not, table.asked) == (((0, 1),), "", 3)


def test_gpus_that_do_not_are_nodes_of_their_own(survey):
    found = survey(Table("here", "here"), reachable=False)
    assert (found.topology.nodes, found.why_not) == (((0,), (1,)), "")
    assert found.topology.found == "the GPU of rank 0 (GPU-0) cannot reach that of rank 1 (GPU-1)"


def test_without_nccl_both_reasons_are_given(survey):
    found = survey(Table("here", "here"), reachable=False, nccl="no library")
    assert found.topology.num_nodes == 1
    assert "GPU-0) cannot reach that of rank 1 (GPU-1); and with each as a node of its own: 2 nodes" in found.why_not
    assert found.why_not.endswith("no library")


def test_options_that_need_one_node_or_name_nodes_are_kept(survey):
    found = survey(Table("here", "here"), reachable=False, on_timeout="mask")
    assert "on_timeout='mask' needs all ranks on one node" in found.why_not
    found = survey(Table("here", "here"), reachable=False, ranks_per_node=2)
    assert (found.topology.num_nodes, "cannot reach" in found.why_not) == (1, True)


def test_experts_that_cannot_be_counted(survey):
    """Not only by the first launch. 2 nodes of 1 rank need 4 * (2 * (2 + 1 + 1) + 2 * 2 + 4) bytes and 2048."""
    survey.smem_bytes = 2048 + 64
    found = survey(Table("here", "here"), reachable=False)
    assert (found.topology.num_nodes, found.why_not) == (2, "")
    survey.smem_bytes -= 4
    found = survey(Table("here", "here"), reachable=False)
    assert found.why_not == (
        "rank 0: num_experts=4, and on 2 nodes of 1 rank at most 2 are possible with the 2 KB of shared memory that a "
        "block has on this GPU"
    )


WRONG = "TOKENFERRY_ARCH=sm_80: a GPU of sm_90a cannot run such code"


def refuse(*_: object, **__: object) -> None:
    raise ConfigError(WRONG)


def test_a_wrong_option_of_one_rank_is_an_error_of_all(survey, monkeypatch):
    """The others would wait for a rank that raises alone, until the deadline."""
    with pytest.raises(ConfigError, match=f"^ExpertGroup: rank 1: {WRONG}$"):
        survey(Table("here", "here", wrong=f"rank 1: {WRONG}"), reachable=True)
    table = Table("here", "here")
    monkeypatch.setattr(setup, "Jit", refuse)
    with pytest.raises(ConfigError, match=f"^ExpertGroup: rank 0: {WRONG}$"):
        survey(table, reachable=True)
    assert table.said[-1] == {"why_not": "", "wrong": f"rank 0: {WRONG}"}


def test_a_wrong_option_that_is_found_later_is_an_error_of_all(survey, monkeypatch):
    table, closed = Table("here", "here"), []
    window = SimpleNamespace(close=lambda: closed.append("window"), has_atomics=True)
    everything = Topology(0, ((0, 1),), "all ranks are on one host")
    monkeypatch.setattr(setup, "_survey", lambda *_: SimpleNamespace(topology=everything, why_not=""))
    monkeypatch.setattr(setup, "_bootstrap", lambda *_: table)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 30))
    monkeypatch.setattr(setup, "compare_terms", lambda _: None)
    monkeypatch.setattr(setup, "Peers", lambda _: None)
    monkeypatch.setattr(setup, "share", lambda *_: window)
    monkeypatch.setattr(setup, "assemble", refuse)
    resolved = Resolved(MoeShape(4, 2, 16, 8), "cuda", "auto", 5.0, False, None, "")
    with pytest.raises(ConfigError, match=f"^ExpertGroup: rank 0: {WRONG}$"):
        setup.make_cuda_backend(None, resolved)
    assert table.said[-1] == {"why_not": "", "wrong": f"rank 0: {WRONG}"}
    assert closed == ["window"]


def test_what_links_are_follows_from_atomics(survey, monkeypatch):
    """A peer whose GPU is hidden cannot be asked for: its link may be any."""
    survey(Table("here", "here"), reachable=True)
    both = [{"device": device(rank)} for rank in range(2)]
    for atomics in (True, False):
        monkeypatch.setattr(reach, "has_peer_atomics", lambda one, other, answer=atomics: answer)
        assert reach.has_atomics(both, 0, (0, 1)) is atomics
        assert reach.has_atomics(both, 0, (0,)), "its own memory"
    monkeypatch.setattr(reach, "has_peer_atomics", lambda one, other: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not reach.has_atomics(both, 0, (0, 1))
