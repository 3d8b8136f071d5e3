"""Dataclasses and option types of the public API: accepted values, messages, and what is private in them."""

import copy
import dataclasses
import inspect
import pickle
import re
import typing

import pytest
import torch

import tokenferry
from tokenferry import ConfigError, DispatchOptions, Layout, MoeShape, Plan, Scale, autograd, types
from tokenferry.testing.compare import same_bits


@pytest.mark.parametrize("name", ["num_experts", "top_k", "hidden", "max_tokens"])
@pytest.mark.parametrize("value", [0, -3, 1.0, "8", None, True])
def test_shape_wants_positive_integers(name, value):
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 8, "max_tokens": 16, name: value}
    with pytest.raises(ConfigError, match=rf"MoeShape: {name}: expected a positive integer, got {value!r}"):
        MoeShape(**sizes)


@pytest.mark.parametrize("name", ["num_experts", "top_k", "hidden", "max_tokens", "max_nodes", "node_slots"])
@pytest.mark.parametrize("value", [2**31, 2**70])
def test_no_size_exceeds_what_fits_into_32_bits(name, value):
    """With larger ones a call overflowed after it had begun, and broke the group."""
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 8, "max_tokens": 16}
    with pytest.raises(ConfigError, match=f"MoeShape: {name}: expected at most 2147483647, got {value}"):
        MoeShape(**sizes | {name: value})
    assert getattr(MoeShape(**sizes | {name: 2**31 - 1}), name) == 2**31 - 1


@pytest.mark.parametrize("name", ["max_nodes", "node_slots"])
@pytest.mark.parametrize("value", [0, -3, 1.0, "8", True])
def test_limits_across_nodes_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=rf"MoeShape: {name}: expected a positive integer or None, got {value!r}"):
        MoeShape(4, 2, 8, 16, **{name: value})


@pytest.mark.parametrize("name", ["max_nodes", "node_slots"])
def test_limits_across_nodes_are_part_of_the_shape(name):
    """Handshakes compare the text of shapes."""
    free, limited = MoeShape(4, 2, 8, 16), MoeShape(4, 2, 8, 16, **{name: 2})
    assert free != limited
    assert str(free) != str(limited)
    for shape in (free, limited):
        assert copy.deepcopy(shape) == pickle.loads(pickle.dumps(shape)) == dataclasses.replace(shape) == shape
        assert eval(repr(shape), {"MoeShape": MoeShape}) == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "rows"}, r"layout: expected a Layout, got 'rows'; e\.g\. Layout\.EXPERTS"),
        ({"counts": "gpu"}, r'counts: expected "host" or "device", got \'gpu\''),
        ({"alignment": 0}, r"alignment: expected a positive integer, got 0"),
        ({"alignment": 8.0, "layout": Layout.EXPERTS}, r"alignment: expected a positive integer, got 8\.0"),
        ({"alignment": True, "layout": Layout.EXPERTS}, r"alignment: expected a positive integer, got True"),
        ({"alignment": 2**31, "layout": Layout.EXPERTS}, r"alignment: expected at most 2147483647, got 2147483648"),
        ({"alignment": 2**70, "layout": Layout.EXPERTS}, r"alignment: expected at most 2147483647, got 1180591620717"),
        ({"zero_padding": torch.zeros(2)}, r"zero_padding: expected True or False, got tensor"),
        ({"alignment": 8}, r"alignment=8 needs Layout\.EXPERTS, got Layout\.ROWS"),
        ({"alignment": 2, "layout": Layout.MASKED}, r"alignment=2 needs Layout\.EXPERTS, got Layout\.MASKED"),
        ({"zero_padding": True}, r"zero_padding needs Layout\.EXPERTS or Layout\.MASKED"),
        ({"capacity": 0, "counts": "device"}, r"capacity: expected a positive integer or None, got 0"),
        ({"capacity": "9", "counts": "device"}, r"capacity: expected a positive integer or None, got '9'"),
        ({"capacity": True, "counts": "device"}, r"capacity: expected a positive integer or None, got True"),
        ({"capacity": 2**31, "layout": Layout.MASKED}, r"capacity: expected at most 2147483647, got 2147483648"),
        ({"capacity": 2**70, "counts": "device"}, r"capacity: expected at most 2147483647, got 1180591620717"),
        ({"capacity": 9}, r'capacity with counts="host" needs Layout\.MASKED'),
        ({"capacity": 9, "layout": Layout.EXPERTS}, r'capacity with counts="host" needs Layout\.MASKED'),
    ],
)
def test_dispatch_options_refuses_contradictions(options, message):
    with pytest.raises(ConfigError, match=f"DispatchOptions: {message}"):
        DispatchOptions(**options)


def test_dispatch_options_accepts_what_makes_sense():
    assert DispatchOptions() == DispatchOptions(Layout.ROWS, 1, False, "host", None)
    DispatchOptions(Layout.MASKED, capacity=9)
    DispatchOptions(capacity=9, counts="device")
    DispatchOptions(Layout.EXPERTS, alignment=128, zero_padding=True, counts="device", capacity=9)


def test_plan_knows_the_source_of_each_row():
    nothing = torch.empty(0, dtype=torch.int64)
    before, after = [nothing] * 3, [nothing] * 4
    plan = Plan("key", DispatchOptions(), 0, 3, 3, *before, torch.tensor([2, 0, 1]), *after)
    assert plan.src_rank.tolist() == [0, 0, 2]


@pytest.mark.parametrize("name", tokenferry.__all__)
def test_dataclasses_are_frozen_and_their_public_fields_documented(name):
    kind = getattr(tokenferry, name)
    if not dataclasses.is_dataclass(kind):
        return
    assert kind.__dataclass_params__.frozen
    documented = argument_names(kind.__doc__)
    assert documented == [field.name for field in dataclasses.fields(kind) if field.name[0] != "_"]


def results():
    with tokenferry.ExpertGroup(None, MoeShape(2, 2, 8, 4), backend="cpu") as group:
        routing = tokenferry.Routing(torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2))
        sent, decoded = group.dispatch(torch.ones(2, 8), routing), group.decode_dispatch(torch.ones(2, 8), routing)
    return sent, decoded


def test_the_state_of_backends_is_not_public_but_survives_a_copy():
    """Weights are often put into a plan later; a plan that was copied belongs to the same call."""
    sent, decoded = results()
    for plan in (sent.plan, decoded.plan):
        private = [field for field in dataclasses.fields(plan) if field.name[0] == "_"]
        assert private
        assert not any(f"{field.name}=" in repr(plan) for field in private)
        for again in (dataclasses.replace(plan, num_tokens=7), copy.copy(plan)):
            assert all(getattr(again, field.name) is getattr(plan, field.name) for field in private)
    assert decoded.plan._call_number > 0


def test_generic_results_are_as_small_as_any():
    """A base class without slots would give each result a dictionary."""
    for result in results():
        assert not hasattr(result, "__dict__")
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.x = None
        same_bits("a pickled result", pickle.loads(pickle.dumps(result)).x, result.x)


def test_results_can_be_named_with_their_rows():
    assert tokenferry.Dispatched[torch.Tensor] == tokenferry.Dispatched[torch.Tensor]
    assert tokenferry.DecodeDispatched[tokenferry.Quantized].__origin__ is tokenferry.DecodeDispatched


@pytest.mark.parametrize(
    ("alias", "call", "argument"),
    [
        (types.BackendName, tokenferry.ExpertGroup, "backend"),
        (types.TransportName, tokenferry.ExpertGroup, "transport"),
        (types.TimeoutPolicy, tokenferry.ExpertGroup, "on_timeout"),
        (types.CountsLocation, DispatchOptions, "counts"),
        (types.Numerics, tokenferry.ExpertGroup.decode_combine, "numerics"),
        (types.EncodingName, tokenferry.ExpertGroup.decode_combine, "encoding"),
    ],
)
def test_an_option_of_a_few_strings_has_a_type_that_lists_them(alias, call, argument):
    parameter = inspect.signature(call).parameters[argument]
    hints = typing.get_type_hints(call if inspect.isfunction(call) else call.__init__)
    assert hints[argument] == alias
    assert parameter.default in typing.get_args(alias)


MORE_PARAMETERS = {"decode_combine": 7}
"""The one call that has more than six: numerics and encoding are chosen apart, and neither belongs to another."""


@pytest.mark.parametrize(
    "method", [m for n, m in inspect.getmembers(tokenferry.ExpertGroup, inspect.isfunction) if n[0] != "_"]
)
def test_docstrings_name_every_argument_of_a_call(method):
    names = list(inspect.signature(method).parameters)[1:]
    documented = argument_names(method.__doc__)
    assert documented in ([], names)
    assert documented or len(names) < 3
    assert len(names) <= MORE_PARAMETERS.get(method.__name__, 6)


@pytest.mark.parametrize("call", [autograd.combine, autograd.dispatch, autograd.redispatch])
def test_docstrings_of_calls_with_gradients_are_whole(call):
    assert argument_names(call.__doc__) == list(inspect.signature(call).parameters)
    assert "\nReturns:\n" in inspect.cleandoc(call.__doc__)
    assert re.search(
        r"collective, and so is its backward: one `\w+`, on the stream of this call, capturable", call.__doc__
    )


@pytest.mark.parametrize("kind", [Layout, Scale])
def test_help_describes_every_member(kind):
    """`help` shows no text below a member."""
    assert argument_names(kind.__doc__) == [member.name for member in kind]


def argument_names(doc: str) -> list[str]:
    """Names under "Args:" or "Attributes:" of a Google docstring."""
    names = []
    inside = False
    for line in inspect.cleandoc(doc).splitlines():
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside and line.startswith("    ") and line[4] != " ":
            names.append(line.split(":")[0].strip())
    return names
