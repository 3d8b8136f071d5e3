"""The table of environment variables."""

import dataclasses
import logging
import os

import pytest

from tokenferry import ConfigError, env


@pytest.fixture(autouse=True)
def _level(monkeypatch):
    """A test that sets TOKENFERRY_LOG leaves no level behind, and none knows of names in another."""
    monkeypatch.setattr(env, "_warned", set())
    before = logging.getLogger("tokenferry").level
    yield
    logging.getLogger("tokenferry").setLevel(before)


def test_defaults():
    cache = os.path.expanduser("~/.cache/tokenferry")
    assert env.read({}) == env.Settings(
        arch=None,
        as_deep_ep=False,
        backend="auto",
        cache_dir=cache,
        fast_path=True,
        heap_mb=None,
        log="auto",
        network="nccl",
        ranks_per_node=None,
        timeout_s=100.0,
        transport="auto",
    )


def test_values_are_parsed():
    environ = {
        "TOKENFERRY_ARCH": "compute_80",
        "TOKENFERRY_AS_DEEP_EP": "1",
        "TOKENFERRY_BACKEND": "cuda",
        "TOKENFERRY_CACHE_DIR": "/tmp/cubins",
        "TOKENFERRY_FAST_PATH": "off",
        "TOKENFERRY_HEAP_MB": "512",
        "TOKENFERRY_LOG": "warning",
        "TOKENFERRY_NETWORK": "nvshmem",
        "TOKENFERRY_RANKS_PER_NODE": "4",
        "TOKENFERRY_TIMEOUT_S": "2.5",
        "TOKENFERRY_TRANSPORT": "process_group",
        "OTHER": "x",
    }
    assert env.read(environ) == env.Settings(
        arch="compute_80",
        as_deep_ep=True,
        backend="cuda",
        cache_dir="/tmp/cubins",
        fast_path=False,
        heap_mb=512,
        log="warning",
        network="nvshmem",
        ranks_per_node=4,
        timeout_s=2.5,
        transport="process_group",
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TOKENFERRY_TIMEOUT_S", "soon", "expected a number of seconds above 0, at most 1000000, such as 100"),
        ("TOKENFERRY_TIMEOUT_S", "0", "above 0"),
        ("TOKENFERRY_TIMEOUT_S", "-1", "above 0"),
        ("TOKENFERRY_TIMEOUT_S", "inf", "at most 1000000"),
        ("TOKENFERRY_TIMEOUT_S", "nan", "at most 1000000"),
        ("TOKENFERRY_TIMEOUT_S", "1e7", "at most 1000000"),
        ("TOKENFERRY_TRANSPORT", "rdma", "expected one of auto, shared_memory, process_group"),
        ("TOKENFERRY_NETWORK", "rdma", "expected one of nccl, nvshmem"),
        ("TOKENFERRY_BACKEND", "", "expected one of auto, cpu, cuda"),
        ("TOKENFERRY_FAST_PATH", "yes", "expected one of on, off"),
        ("TOKENFERRY_HEAP_MB", "0", "expected auto, or a whole number of MiB above 0, such as 2048"),
        ("TOKENFERRY_HEAP_MB", "1.5", "expected auto, or a whole number of MiB above 0"),
        ("TOKENFERRY_HEAP_MB", "2GB", "expected auto, or a whole number of MiB above 0"),
        ("TOKENFERRY_RANKS_PER_NODE", "two", "expected auto, or a whole number of ranks above 0, such as 8"),
        ("TOKENFERRY_RANKS_PER_NODE", "0", "expected auto, or a whole number of ranks above 0"),
        ("TOKENFERRY_CACHE_DIR", "", "expected a folder"),
        ("TOKENFERRY_ARCH", "ampere", "expected auto, sm_XY for machine code or compute_XY for PTX"),
        ("TOKENFERRY_LOG", "loud", r"expected one of auto, debug, info, warning, error, off\. "),
        ("TOKENFERRY_LOG", "warn", r"warning, error, off \(did you mean warning\?\)"),
        ("TOKENFERRY_LOG", "ERROR", r"did you mean error\?"),
        ("TOKENFERRY_BACKEND", "cude", r"did you mean cuda\?"),
    ],
)
def test_a_bad_value_names_variable_value_and_expectation(name, value, message):
    with pytest.raises(ConfigError, match=rf"{name}='{value}'.*{message}"):
        env.read({name: value})


def test_an_unknown_name_warns_with_the_nearest(caplog):
    with caplog.at_level(logging.WARNING, "tokenferry"):
        env.read({"TOKENFERRY_TIMEOUT": "5"})
    assert "TOKENFERRY_TIMEOUT is not a variable" in caplog.text
    assert "TOKENFERRY_TIMEOUT_S" in caplog.text
    assert env.unknown({"TOKENFERRY_TIMEOUT": "5"}) == {"TOKENFERRY_TIMEOUT": "TOKENFERRY_TIMEOUT_S"}
    env.read({"TOKENFERRY_TIMEOUT": "5"})
    assert len(caplog.records) == 1, "programs that make many groups get one warning"


def test_the_process_environment_is_the_default_and_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "7")
    before = dict(os.environ)
    assert env.read().timeout_s == 7.0
    assert dict(os.environ) == before


def test_every_variable_is_a_setting():
    names = [v.name.removeprefix("TOKENFERRY_").lower() for v in env.VARIABLES]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(env.Settings))
    assert all(v.meaning for v in env.VARIABLES)
