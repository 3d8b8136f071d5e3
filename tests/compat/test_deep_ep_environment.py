"""The environment variables of DeepEP: honoured, or refused by name where they ask for what nothing here does."""

import logging
import os
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from support.deep_ep_jobs import on_nodes
from tokenferry import api, env
from tokenferry.compat.deep_ep import Buffer, ElasticBuffer, EPBuffer
from tokenferry.compat.deep_ep.connect import NvshmemNeeds, _check_network, _check_puts, _check_service_level
from tokenferry.errors import ArgumentError, BackendUnavailable, ConfigError, UnsupportedError
from tokenferry.topology import Topology, consecutive


def made(rank, pg, environ, **options):
    """Make a Buffer with more variables; return what is raised."""
    with mock.patch.dict(os.environ, environ):
        try:
            Buffer(pg, **options)
        except (UnsupportedError, BackendUnavailable) as error:
            return type(error), str(error)
    return None


@pytest.mark.parametrize("name", env.DEEP_EP_NETWORK)
def test_a_choice_of_the_network_is_refused_across_nodes(worlds, name):
    for kind, text in worlds(2).run(on_nodes, 1, made, {name: "3"}):
        assert kind is UnsupportedError
        assert f"the environment has {name} ({env.DEEP_EP_NETWORK[name]} of NCCL)" in text
        assert "transport process_group between 2 nodes of 1 rank" in text
        assert "GLOO_SOCKET_IFNAME" in text


def test_all_of_them_are_named_at_once(worlds):
    environ = {"NVSHMEM_IB_SL": "3", "NVSHMEM_HCA_LIST": "mlx5_0", "NVSHMEM_QP_DEPTH": "2048", "NVSHMEM_DEBUG": "INFO"}
    for _, text in worlds(2).run(on_nodes, 1, made, environ):
        assert "NVSHMEM_HCA_LIST (NCCL_IB_HCA of NCCL), NVSHMEM_IB_SL (NCCL_IB_SL of NCCL): " in text
        assert "QP_DEPTH" not in text
        assert "DEBUG" not in text


def test_one_node_uses_no_network(worlds):
    assert worlds(2).run(made, dict.fromkeys(env.DEEP_EP_NETWORK, "3")) == [None, None]


def test_empty_ones_choose_nothing(worlds):
    assert worlds(2).run(on_nodes, 1, made, dict.fromkeys(env.DEEP_EP_NETWORK, "")) == [None, None]


def refused_and_closed(rank, pg):
    """The group of a Buffer that was refused is closed, so that nothing keeps its connections."""
    groups, make = [], api.ExpertGroup._with_heap
    with (
        mock.patch.dict(os.environ, NVSHMEM_IB_SL="1", TOKENFERRY_RANKS_PER_NODE="1"),
        mock.patch.object(api.ExpertGroup, "_with_heap", lambda *a, **k: groups.append(make(*a, **k)) or groups[0]),
        pytest.raises(UnsupportedError),
    ):
        Buffer(pg)
    return repr(groups[0])


def test_a_refused_buffer_leaves_nothing_open(worlds):
    assert all("was closed" in text for text in worlds(2).run(refused_and_closed))


SHRINKING = {"low_latency_mode": True, "enable_shrink": True}


def made_on_hosts(rank, pg):
    with mock.patch("tokenferry.transports.rendezvous.host_name", return_value=f"host{rank}"):
        return made(rank, pg, {}, **SHRINKING)


def test_masks_need_one_host(worlds):
    for kind, text in worlds(2).run(made_on_hosts):
        assert kind is UnsupportedError
        assert text.startswith(
            "Buffer: enable_shrink: ranks can be skipped where all are on one node, on CPUs one host"
        )


def made_shrinking(rank, pg):
    return made(rank, pg, {}, **SHRINKING)


def test_nodes_of_one_host_can_mask_on_cpus(worlds):
    assert worlds(2).run(on_nodes, 1, made_shrinking) == [None, None]


def test_other_reasons_are_not_taken_for_a_lack_of_masks(worlds):
    if torch.cuda.is_available():
        pytest.skip("backend cuda runs here")
    for kind, text in worlds(2).run(made, {"TOKENFERRY_BACKEND": "cuda"}):
        assert kind is BackendUnavailable
        assert "shrink" not in text


def made_elastic(rank, pg):
    with mock.patch.dict(os.environ, EP_OVERRIDE_RDMA_SL="1"), pytest.raises(UnsupportedError) as caught:
        ElasticBuffer(pg, num_max_tokens_per_rank=4)
    return str(caught.value)


def level(rank, pg, kind, **given):
    """Return what is raised for a service level, or None."""
    try:
        kind(pg, num_max_tokens_per_rank=4, **given)
    except UnsupportedError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", [ElasticBuffer, EPBuffer])
def test_a_service_level_is_refused_across_nodes_as_its_variables_are(worlds, kind):
    for text in worlds(2).run(on_nodes, 1, partial(level, kind=kind, sl_idx=5)):
        assert text.startswith(f"{kind.__name__}: sl_idx=5: transport process_group between 2 nodes of 1 rank")
        assert "NCCL_IB_SL=5 on all ranks (it is not set)" in text
    assert worlds(2).run(partial(level, kind=kind, sl_idx=5)) == [None, None]  # one node
    for chosen in ({}, {"sl_idx": 0}):  # what vLLM passes
        assert worlds(2).run(on_nodes, 1, partial(level, kind=kind, **chosen)) == [None, None]


def test_a_service_level_has_to_be_a_number():
    with pytest.raises(ArgumentError, match="sl_idx"):
        ElasticBuffer(None, num_max_tokens_per_rank=4, sl_idx=-1)


@pytest.mark.parametrize(
    ("transport", "of_nccl", "refused"),
    [("nvlink+nccl", "5", False), ("nvlink+nccl", "4", True), ("nvlink+nccl", "", True), ("process_group", "5", True)],
)
def test_a_service_level_that_nccl_was_told(monkeypatch, transport, of_nccl, refused):
    monkeypatch.setenv("NCCL_IB_SL", of_nccl)
    group = SimpleNamespace(topology=Topology(0, consecutive(4, 2)), transport=transport)
    with pytest.raises(UnsupportedError, match="sl_idx=5") if refused else nullcontext():
        _check_service_level("ElasticBuffer", group, env.read_deep_ep(), 5)


def debugging(caplog):
    """Return the lines of EP_BUFFER_DEBUG; others may be said before them, once in a process."""
    return [message for message in caplog.messages if message.startswith("EP_BUFFER_DEBUG")]


def test_of_deep_ep_2_too(worlds, monkeypatch, caplog):
    for text in worlds(2).run(on_nodes, 1, made_elastic):
        assert text.startswith("ElasticBuffer: the environment has EP_OVERRIDE_RDMA_SL (NCCL_IB_SL of NCCL)")
    monkeypatch.setenv("EP_BUFFER_DEBUG", "1")
    with caplog.at_level(logging.WARNING, "tokenferry"):
        ElasticBuffer(None, num_max_tokens_per_rank=4)
    assert [message.split(",")[0] for message in debugging(caplog)] == ["EP_BUFFER_DEBUG: ElasticBuffer: rank 0 of 1"]


@pytest.mark.parametrize(("value", "lines"), [("1", 1), ("0", 0), (None, 0)])
def test_debugging_says_what_a_buffer_uses(monkeypatch, caplog, value, lines):
    if value is not None:
        monkeypatch.setenv("EP_BUFFER_DEBUG", value)
    with caplog.at_level(logging.WARNING, "tokenferry"):
        Buffer(None)
    expected = (
        "EP_BUFFER_DEBUG: Buffer: rank 0 of 1, backend cpu, transport none, 1 node of 1 rank: a group of one rank"
    )
    assert debugging(caplog) == [expected] * lines


def test_a_switch_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("EP_BUFFER_DEBUG", "false")
    with pytest.raises(ConfigError, match="EP_BUFFER_DEBUG='false': expected 0 or 1"):
        Buffer(None)


def test_kernels_are_kept_where_deep_ep_keeps_them(monkeypatch):
    seen, make = [], api.make_backend
    monkeypatch.setattr(api, "make_backend", lambda group, options: seen.append(options) or make(group, options))
    monkeypatch.delenv("TOKENFERRY_CACHE_DIR", raising=False)
    for environ, folder in (
        ({}, os.path.expanduser("~/.cache/tokenferry")),
        ({"EP_JIT_CACHE_DIR": "/tmp/of_deep_ep"}, "/tmp/of_deep_ep"),
        ({"EP_JIT_CACHE_DIR": ""}, os.path.expanduser("~/.cache/tokenferry")),
        ({"EP_JIT_CACHE_DIR": "/tmp/of_deep_ep", "TOKENFERRY_CACHE_DIR": "/tmp/ours"}, "/tmp/ours"),
    ):
        with mock.patch.dict(os.environ, environ):
            Buffer(None)
        assert seen[-1].cache_folder == folder


def checked_puts(monkeypatch, environ, puts, transport="nvlink+nccl+nvshmem"):
    for name in (env.QUEUE_PAIRS, env.NO_P2P):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    _check_puts("Buffer", SimpleNamespace(transport=transport), env.read_deep_ep(), puts)


def test_queue_pairs_are_those_of_nvshmem(monkeypatch, caplog):
    checked_puts(monkeypatch, {env.QUEUE_PAIRS: "32"}, NvshmemNeeds(0, 32))
    checked_puts(monkeypatch, {env.QUEUE_PAIRS: "32"}, NvshmemNeeds(0))  # nobody asked
    assert not caplog.records
    with pytest.raises(UnsupportedError, match=r"num_qps_per_rank=32: NVSHMEM_IBGDA_NUM_RC_PER_PE=8 says"):
        checked_puts(monkeypatch, {env.QUEUE_PAIRS: "8"}, NvshmemNeeds(0, 32))
    checked_puts(monkeypatch, {env.QUEUE_PAIRS: "8"}, NvshmemNeeds(0, 32), transport="nvlink+nccl")
    assert not caplog.records
    checked_puts(monkeypatch, {}, NvshmemNeeds(0, 32))
    assert "num_qps_per_rank=32: NVSHMEM takes a number of its own" in caplog.text


@pytest.mark.parametrize("value", ["0", "false", "No", ""])
def test_nvlink_is_forbidden_by_the_variable_of_nvshmem(monkeypatch, value):
    without = NvshmemNeeds(0, nvlink=False)
    checked_puts(monkeypatch, {env.NO_P2P: "1"}, without)
    checked_puts(monkeypatch, {env.NO_P2P: "true"}, without)
    checked_puts(monkeypatch, {}, without, transport="nvlink+nccl")
    with pytest.raises(UnsupportedError, match=r"allow_nvlink_for_low_latency_mode=False: .*NVSHMEM_DISABLE_P2P=1"):
        checked_puts(monkeypatch, {env.NO_P2P: value}, without)


def test_a_buffer_passes_on_what_it_asks_of_nvshmem(monkeypatch):
    seen = []
    monkeypatch.setattr("tokenferry.compat.deep_ep.connect._check_puts", lambda *args: seen.append(args[3]))
    Buffer(None, 0, 128, num_qps_per_rank=7, allow_nvlink_for_low_latency_mode=False)
    assert seen == [NvshmemNeeds(128, 7, nvlink=False)]


@pytest.mark.parametrize(
    ("transport", "of_nccl", "refused"),
    [("nvlink+nccl+nvshmem", "3", False), ("nvlink+nccl+nvshmem", "", True), ("nvlink+nccl", "3", True)],
)
def test_nvshmem_reads_its_own_variables(monkeypatch, transport, of_nccl, refused):
    """It does not see those of DeepEP, and NCCL, which carries the other calls, sees neither."""
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    monkeypatch.setenv("NCCL_IB_SL", of_nccl)
    group = SimpleNamespace(topology=Topology(0, consecutive(4, 2)), transport=transport)
    with pytest.raises(UnsupportedError, match="NVSHMEM_IB_SL") if refused else nullcontext():
        _check_network("Buffer", group, env.read_deep_ep())
    monkeypatch.setenv("EP_OVERRIDE_RDMA_SL", "3")
    with pytest.raises(UnsupportedError, match="EP_OVERRIDE_RDMA_SL"):
        _check_network("Buffer", group, env.read_deep_ep())
