"""Makes every measured call once for each set of inputs and compares what it delivers with what it has to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.inputs import (
    Inputs,
    Spec,
    WrongAnswer,
    draw,
    expected_decode_rows,
    expected_decode_sums,
    expected_rows,
    expected_sums,
    expert,
    must_be_near,
    must_equal,
)
from tokenferry.bench.core.static_inputs import FP8_COLUMNS
from tokenferry.types import DecodeDispatched, DecodePlan, Plan, Quantized, Routing, Scale


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One set of inputs, checked: what the timed calls start from.

    Attributes:
        inputs: This rank's inputs.
        routing: The same, as the library takes it.
        plan: Of `dispatch`.
        y: ``[N, H]``: this rank's answers, for `combine`.
        decode_plan: Of `decode_dispatch`.
        decode_y: ``[L, R*M, H]``: the answers of this rank's experts, for `decode_combine`.
    """

    inputs: Inputs
    routing: Routing
    plan: Plan
    y: Tensor
    decode_plan: DecodePlan
    decode_y: Tensor


def prepare(group: ExpertGroup, spec: Spec, variant: int) -> Ready:
    """Draw one set of inputs, make every call with it and check every answer. Collective.

    Raises:
        WrongAnswer: a call delivered something else than it has to.
    """
    inputs = draw(spec, variant, group.rank)
    routing = Routing(inputs.topk_idx, inputs.topk_weights)
    plan, y = _check_throughput(group, spec, variant, inputs, routing)
    decode_plan, decode_y = _check_decode(group, spec, variant, inputs, routing)
    if spec.hidden % FP8_COLUMNS == 0:
        _check_fp8(group, spec, variant, inputs, routing)
    return Ready(inputs, routing, plan, y, decode_plan, decode_y)


def _check_throughput(
    group: ExpertGroup, spec: Spec, variant: int, inputs: Inputs, routing: Routing
) -> tuple[Plan, Tensor]:
    expected = expected_rows(spec, variant, group.rank)
    sent = group.dispatch(inputs.x, routing)
    must_equal("dispatch", _tensor(sent.x), expected)
    again = group.redispatch(inputs.x, sent.plan)
    must_equal("redispatch", _tensor(again.x), expected)
    y = expert(_tensor(sent.x), group.rank)
    must_equal("combine", group.combine(y, sent.plan).x, expected_sums(spec, inputs))
    return sent.plan, y


def _check_decode(
    group: ExpertGroup, spec: Spec, variant: int, inputs: Inputs, routing: Routing
) -> tuple[DecodePlan, Tensor]:
    sent = group.decode_dispatch(inputs.x, routing)
    rows = _tensor(sent.x)
    y = torch.empty_like(rows)  # rows past the counts stay as they are: they must not be read
    for e, index, count in _experts(group, sent):
        must_equal(f"decode_dispatch, expert {index}", rows[e, :count], expected_decode_rows(spec, variant, index))
        y[e, :count] = expert(rows[e, :count], index)
    expected = expected_decode_sums(spec, inputs)
    must_equal("decode_combine", group.decode_combine(y, sent.plan).x, expected)
    # "fast" rounds each rank's partial sum once more: half a unit in the last place of each, and of the sum.
    size = expected_decode_sums(spec, Inputs(inputs.x.abs(), inputs.topk_idx, inputs.topk_weights)).float()
    fast = group.decode_combine(y, sent.plan, numerics="fast").x.float()
    must_be_near("decode_combine, fast", fast, expected.float(), relative=0.0, absolute=size * 2.0**-7)
    return sent.plan, y


def _check_fp8(group: ExpertGroup, spec: Spec, variant: int, inputs: Inputs, routing: Routing) -> None:
    sent = group.decode_dispatch(inputs.x, routing, quantize=Scale.FLOAT32)
    if not isinstance(sent.x, Quantized):
        raise WrongAnswer("decode_dispatch, FP8: expected a Quantized")
    for e, index, count in _experts(group, sent):
        scale = sent.x.scale[e, :count].repeat_interleave(FP8_COLUMNS, -1)
        expected = expected_decode_rows(spec, variant, index).float()
        rows = sent.x.data[e, :count].float() * scale
        # e4m3 has 3 bits of fraction and steps of 2^-9 at its low end: off by half of that, and a little for float32.
        absolute = scale * 2.0**-10
        must_be_near(f"decode_dispatch, FP8, expert {index}", rows, expected, relative=0.0626, absolute=absolute)


def _experts(group: ExpertGroup, sent: DecodeDispatched[Tensor | Quantized]) -> list[tuple[int, int, int]]:
    """(local expert, global expert, rows) of each expert of this rank."""
    first = group.rank * group.num_local_experts
    return [(e, first + e, count) for e, count in enumerate(sent.expert_counts.tolist())]


def _tensor(x: Tensor | Quantized) -> Tensor:
    if not isinstance(x, Tensor):
        raise WrongAnswer(f"expected rows as a Tensor, got {type(x).__name__}")
    return x
