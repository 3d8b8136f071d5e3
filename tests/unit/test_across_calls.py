"""What the host does in calls across nodes, over kernels and a network that take no time: counts, not times."""

import pytest
import torch

from support.silent_kernels import counted_calls, num_python_calls, rows_of
from support.silent_nodes import SilentNodes
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
    # Padding of the routing; sizes of the plan; states and headers of the others, which the host reads.
    "dispatch": [
        "__getitem__",
        "clone",
        "copy_",
        "fill_",
        "new",
        "new",
        "new",
        "new",
        "new",
        "tensor",
        "tolist",
        "zeros",
    ],
    "dispatch, counts on the device": [*["__getitem__"] * 4, "clone", *["fill_"] * 3, *["new"] * 5, "zeros"],
    "redispatch": ["clone", "new", "new", "new", "zeros"],
    "combine": ["clone", "empty", "empty_like", "new", "new", "new", "zeros"],
}
UNSEEN = {"_set_grad_enabled", "__len__", "untyped_storage"}
"""Of the guards around a call, and of the way in which tensors are made."""


def test_torch_calls(silent):
    for name, call in calls_of(silent).items():
        call()
        with counted_calls(silent.group) as names:
            call()
        assert sorted(each for each in names if each not in UNSEEN) == sorted(TORCH_CALLS[name]), name


PYTHON_CALLS = {"dispatch": 235, "dispatch, counts on the device": 235, "redispatch": 160, "combine": 146}


def test_functions_of_python(silent):
    """How many run in a call, which is where its time goes: a dispatch of one node takes 50."""
    found = {name: num_python_calls(call) for name, call in calls_of(silent).items()}
    assert {name: num for name, num in found.items() if num > PYTHON_CALLS[name]} == {}


SHORT = {
    "dispatch": (["split", "rails", "pack", "notify", "assign", "", "check", ""], 3),
    "redispatch": (["open", "pack", "", "check", "check", ""], 2),
    "combine": (["open", "push", "push", "check", "check", "nodes"], 2),
}
NAMES = {
    "": "dispatch",
    "check": "across_check",
    "open": "across_open",
    "push": "combine_push",
    "nodes": "combine_nodes",
}


def test_launches_and_exchanges(silent):
    """Few tokens cross at once, whatever M is."""
    for group in (silent, SilentNodes(MoeShape(E, K, H, 1 << 17))):
        assert group is silent or group.group._backend._crossing.chunks(2 * H).num > 1
        for name, call in calls_of(group).items():
            if name in SHORT:
                launches, num_exchanges = SHORT[name]
                group.launches.clear()
                group.channel.num_exchanges = 0
                call()
                expected = [NAMES.get(short, f"dispatch_{short}") for short in launches]
                assert [launch[0] for launch in group.launches] == expected, name
                assert group.channel.num_exchanges == num_exchanges, name
