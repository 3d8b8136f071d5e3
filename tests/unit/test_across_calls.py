"""What the host does in calls across nodes, over kernels and a network that take no time: counts, not times."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from support.silent_kernels import counted_calls, num_python_calls, rows_of
from support.silent_nodes import SilentNodes
from tokenferry.backends.cuda.across.nccl_rails import NcclTransfer
from tokenferry.backends.cuda.context import Context
from tokenferry.types import DispatchOptions, MoeShape, Routing

T, K, E, H = 6, 2, 4, 256


@pytest.fixture
def silent() -> SilentNodes:
    return SilentNodes(MoeShape(E, K, H, 8))


def routing(num_tokens: int = T) -> Routing:
    index = torch.arange(num_tokens * K, dtype=torch.int64, device="cpu").view(num_tokens, K) % E
    return Routing(index, torch.ones(num_tokens, K, dtype=torch.float32, device="cpu"))


def calls_of(silent: SilentNodes) -> dict:
    group, x, where = silent.group, rows_of(T, H), routing()
    sent = group.dispatch(x, where)
    y = group.empty_rows(sent.plan)
    on_device = DispatchOptions(counts="device")
    return {
        "dispatch": lambda: group.dispatch(x, where),
        "dispatch, counts on the device": lambda: group.dispatch(x, where, options=on_device),
        "redispatch": lambda: group.redispatch(x, sent.plan),
        "combine": lambda: group.combine(y, sent.plan),
    }


TORCH_CALLS = {
    # Padding of the routing; what the others say, with nothing in it; five pieces of memory.
    "dispatch": ["__getitem__", "clone", "fill_", *["new"] * 5],
    "dispatch, counts on the device": ["__getitem__", "clone", "fill_", *["new"] * 5],
    "redispatch": ["clone", *["new"] * 3],
    "combine": ["clone", *["new"] * 5],
}
UNSEEN = {"_set_grad_enabled", "__len__", "untyped_storage"}
"""Of the guards around a call, and of the way in which tensors are made."""


def test_torch_calls(silent):
    for name, call in calls_of(silent).items():
        call()
        with counted_calls(silent.group) as names:
            call()
        assert sorted(each for each in names if each not in UNSEEN) == sorted(TORCH_CALLS[name]), name


PYTHON_CALLS = {"dispatch": 158, "dispatch, counts on the device": 140, "redispatch": 125, "combine": 129}


def test_functions_of_python(silent):
    """How many run in a call, which is where its time goes: a dispatch of one node takes 50."""
    found = {name: num_python_calls(call) for name, call in calls_of(silent).items()}
    assert {name: num for name, num in found.items() if num > PYTHON_CALLS[name]} == {}


SHORT = {
    "dispatch": (["split", "rails", "pack", "relay", "notify", "assign", "", "check", ""], 2, 2),
    "redispatch": (["open", "pack", "", "check", "check", ""], 2, 0),
    "combine": (["open", "push", "push", "check", "check", "nodes"], 2, 0),
}
"""Launches, exchanges, and waits of the host."""
NAMES = {
    "": "dispatch",
    "check": "across_check",
    "open": "across_open",
    "push": "combine_push",
    "nodes": "combine_nodes",
}


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """List the waits of the host for the device."""
    waits = ((Context, "wait_for_words"), (Context, "wait_for_counts"), (NcclTransfer, "wait"))
    names: list[str] = []

    def noted(of: type, name: str):
        wait = getattr(of, name)

        def run(*args: object, **kwargs: object) -> object:
            names.append(name)
            return wait(*args, **kwargs)

        return mock.patch.object(of, name, run)

    with noted(*waits[0]), noted(*waits[1]), noted(*waits[2]):
        yield names


@pytest.mark.parametrize("most", [8, 1 << 17])
def test_launches_exchanges_and_waits(most):
    """Few tokens cross at once, whatever M is. The routing of very many could not cross with the headers."""
    group = SilentNodes(MoeShape(E, K, H, most))
    assert (group.group._backend._crossing.chunks(2 * H).num > 1) == (most > 8)
    for name, call in calls_of(group).items():
        if name in SHORT:
            launches, num_exchanges, num_waits = SHORT[name]
            later = most > 8 and name == "dispatch"
            group.launches.clear()
            group.channel.exchanges.clear()
            with counted_waits() as waits:
                call()
            expected = [NAMES.get(short, f"dispatch_{short}") for short in launches]
            assert [launch[0] for launch in group.launches] == expected, name
            assert len(group.channel.exchanges) == num_exchanges + later, name
            assert len(waits) == num_waits + later, name


def test_plans_are_no_inference_tensors(silent):
    """Whatever the mode of the call that made them."""
    calls_of(silent)["dispatch"]()
    with torch.inference_mode():
        plan = silent.group.dispatch(rows_of(T, H), routing()).plan
        assert not plan.dst_counts.is_inference()
        assert not plan.src_counts.is_inference()
