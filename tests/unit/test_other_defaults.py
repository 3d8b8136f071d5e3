"""The inputs and references of tests and benchmarks are the same under other default dtypes and devices of torch."""

import random
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from support.ambient import STATES
from tokenferry import Scale
from tokenferry.bench.core.inputs import ROUTINGS, Sizes, draw, expert, sent_to
from tokenferry.bench.suites.decode_reference import Pool
from tokenferry.formats import fp8, logfmt
from tokenferry.testing import reference, soak_graphs, soak_graphs_reference, soak_large
from tokenferry.testing.cases import Case, answers, returned_weights
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle, fp8_cast, logfmt10, ue8m0

CPU = torch.device("cpu")
OTHER = ("float64, set_default_device", "bfloat16, with device")


def of_tests():
    case = Case((4, 3), experts=4, top_k=3, hidden=128)
    sent = case.inputs()
    yield from sent
    for layout in ("rows", "experts", "masked"):
        oracle = Oracle(sent, case.experts, layout, capacity=8 if layout == "masked" else None)
        ys = [answers(case, oracle, rank, oracle.num_delivered(rank), case.dtype) for rank in range(2)]
        ws = [returned_weights(case, oracle, rank, oracle.num_delivered(rank)) for rank in range(2)]
        yield oracle.x(0), oracle.topk_idx(0), oracle.row_idx(0), oracle.weights(0)
        yield *ys, *ws, oracle.combine(1, ys, [sent[1].x]), oracle.combine_weights(1, ws)
        if layout == "masked":
            for encoding in ("same", "fp8", "logfmt10"):
                for fast in (False, True):
                    yield oracle.decode_combine(0, ys, fast=fast, encoding=encoding)
            yield oracle.decode_slack(0, ys)
    row = sent[0].x[0]
    yield fp8_cast(row, power_of_two=True), fp8_cast(row, power_of_two=False), logfmt10(row)
    yield ue8m0(fp8_cast(row, power_of_two=True)[1])


def of_formats():
    x = Case((5,), experts=1, top_k=1, hidden=384).inputs()[0].x
    for scale in Scale:
        yield fp8.cast(x, scale), fp8.dequantize(fp8.cast(x, scale)), reference.fp8_cast(x, scale)
    yield logfmt.encode(x), logfmt.decode(logfmt.encode(x)), reference.logfmt10(x)
    for encoding in ("same", "fp8", "logfmt10"):
        yield reference.encode_and_decode(x, encoding)


def of_soaks():
    for number in range(20):
        kind = soak_graphs.kind_of(1, number)
        if kind != soak_graphs.WIDE:
            yield soak_graphs.draw(kind, 2, CPU, 1, number)
    inputs, num_experts = soak_graphs.draw(soak_graphs.KINDS[-1], 2, CPU, 1, 0), 2 * soak_graphs.KINDS[-1].local
    for fast, encoding in ((False, "same"), (True, "logfmt10")):
        wanted = soak_graphs_reference.Reference(inputs, num_experts, 0, None, fast=fast, encoding=encoding)
        yield soak_graphs_reference.factors(num_experts, CPU), wanted.total()
    large = soak_large.draw(random.Random(1), 2)
    yield large.routing, soak_large.numbered(torch.arange(9, dtype=torch.int64, device="cpu"), 64)


def of_benchmarks():
    for routing in ROUTINGS:
        sizes = Sizes(2, 5, 256, 2, 8, seed=1, routing=routing)
        inputs = draw(sizes, 0, 1, CPU)
        yield inputs, sent_to(sizes, inputs.topk_idx), expert(inputs.x, 3)
    one = torch.arange(3, dtype=torch.int64, device="cpu")
    yield Pool(sizes, CPU).rows(one, one, 1)


def tensors(value):
    """Return the tensors in dataclasses and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors(one)


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("make", [of_tests, of_formats, of_soaks, of_benchmarks])
def test_nothing_depends_on_defaults(make, name):
    want = list(tensors(list(make())))
    with STATES[name].of_the_process(), STATES[name].of_a_thread("cpu"):
        got = list(tensors(list(make())))
    assert len(want) > 3
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        same_bits(f"tensor {i}", one, other)
