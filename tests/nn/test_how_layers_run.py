"""Layers under autocast with parameters of all dtypes, checkpointed, and in compiled models."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tokenferry
from support.experts_jobs import stepped
from tokenferry import MoeShape, Scale
from tokenferry.nn import GELUExperts, LayerOptions, MoELayer, Router, SwiGLUExperts

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=32)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NARROW = FLOATS[:2]
WIDTH = 24


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


def rows(*sizes):
    """Rows that all four dtypes can hold: multiples of 1/8 up to 2."""
    return torch.randint(-16, 17, (*sizes, 16), generator=torch.Generator().manual_seed(0)) / 8


def computed(autocast, parameters, given):
    """The dtype of products and results by the contract; None if dtypes do not fit."""
    if autocast is not None:
        parameters, given = (autocast if one != torch.float64 else one for one in (parameters, given))
    elif parameters == torch.float32 and given in NARROW:
        parameters = given
    return parameters if parameters == given else None


COMBINATIONS = list(itertools.product((None, *NARROW), FLOATS, FLOATS))


@pytest.mark.parametrize("kind", [SwiGLUExperts, GELUExperts])
@pytest.mark.parametrize(("autocast", "parameters", "given"), COMBINATIONS, ids=str)
def test_dtypes(group, kind, autocast, parameters, given):
    """Every combination of autocast, parameters and rows: refused, or right to the precision of its products."""
    dtype = computed(autocast, parameters, given)
    shared = nn.Linear(16, 16, dtype=parameters)
    layer = MoELayer(
        group,
        experts=kind(group, WIDTH, dtype=parameters),
        router=Router(16, 4, 2),
        options=LayerOptions(shared=shared),
    )
    x = rows(9).to(given)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if dtype is None:
            with pytest.raises(tokenferry.ShapeError, match=f"like the experts, got {computed_rows(autocast, given)}"):
                layer(x)
            return
        if autocast is None and parameters != given:
            layer.shared = None  # a module that computes in its own dtype, without help
        got = stepped(layer, x)
    assert got["out"].dtype == dtype
    assert got["x"].dtype == given
    for name, parameter in layer.named_parameters():
        assert got[name].dtype == parameter.dtype, name
    want = stepped(layer.double(), x.double())
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # gate weights are float32
    for name, value in want.items():
        error = float((got[name].double() - value).norm() / value.norm())
        assert error < 12 * epsilon, f"{name}: {error / epsilon:.1f} epsilon"


def computed_rows(autocast, given):
    return given if autocast is None or given == torch.float64 else autocast


class Block(nn.Module):
    """A model around a layer, as models have it."""

    def __init__(self, group, dtype, options=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.inward = nn.LayerNorm(16, dtype=dtype), nn.Linear(16, 16, dtype=dtype)
        self.moe = MoELayer(group, WIDTH, dtype=dtype, options=options)
        self.outward = nn.Linear(16, 16, dtype=dtype)

    def forward(self, x):
        x = self.inward(x)
        return self.outward(x + self.moe(self.norm(x)))


def close(got, want, within):
    for name, value in want.items():
        value, found = value.double(), got[name if name in got else f"_orig_mod.{name}"].double()
        assert float((found - value).norm()) <= within * float(value.norm()), name


OPTIONS = {
    "plain": None,
    "shared": lambda: LayerOptions(shared=nn.Linear(16, 16, dtype=torch.bfloat16)),
    "fp8": lambda: LayerOptions(quantize=Scale.FLOAT32),
    "experts again": lambda: LayerOptions(checkpoint_experts=True),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_checkpointing_changes_nothing(group, options, use_reentrant):
    model = Block(group, torch.bfloat16, OPTIONS[options] and OPTIONS[options]())
    x = rows(2, 5).bfloat16()
    want = stepped(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=use_reentrant)

    for name, value in stepped(Checkpointed(), x).items():
        assert torch.equal(value, want[name.removeprefix("model.")]), name


def test_experts_are_computed_again_without_another_exchange(group, monkeypatch):
    """And nothing of theirs but their rows is kept for backward."""
    model = Block(group, torch.bfloat16)
    again = Block(group, torch.bfloat16, LayerOptions(checkpoint_experts=True))
    again.load_state_dict(model.state_dict())
    x, calls = rows(2, 5).bfloat16(), []
    for one in (SwiGLUExperts, tokenferry.ExpertGroup):
        for name in ("forward", "dispatch", "combine", "redispatch"):
            if hasattr(one, name):
                monkeypatch.setattr(one, name, recorded(getattr(one, name), name, calls))
    want = stepped(model, x)
    once, calls[:] = calls[:], []
    for name, value in stepped(again, x).items():
        assert torch.equal(value, want[name]), name
    assert once == ["dispatch", "forward", "combine", "redispatch", "combine"]
    assert calls == ["dispatch", "forward", "combine", "redispatch", "forward", "combine"]
    model.zero_grad()


def recorded(function, name, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("options", [None, LayerOptions(checkpoint_experts=True)], ids=["", "experts again"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_models(group, dtype, options):
    """In one graph if products are grouped; with the loop, the counts break it."""
    model = Block(group, dtype, options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=dtype == torch.bfloat16)
    for num_tokens in (12, 0):
        x = rows(num_tokens).to(dtype)
        close(stepped(compiled, x), stepped(model, x), 1e-6 if dtype == torch.float32 else 2e-2)


def test_compiled_by_default(group):
    """With the backend that generates code."""
    model, x = Block(group, torch.bfloat16), rows(12).bfloat16()
    close(stepped(torch.compile(model, fullgraph=True), x), stepped(model, x), 2e-2)


def checkpointed_and_traced(rank, pg):
    """A repeated part under a mode of torch on rank 0 alone."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        layer = MoELayer(group, WIDTH)
        with FlopCounterMode(display=False) if rank == 0 else contextlib.nullcontext():
            out = checkpoint(layer, rows(3).float(), use_reentrant=False)
            with pytest.raises(tokenferry.MismatchError, match="made different calls"):
                out.sum().backward()


def test_repeated_parts_are_traced_on_all_ranks_or_on_none(worlds):
    """As docs/training.md says: operators are repeated before the first call of backward, eager code after it."""
    worlds(2).run(checkpointed_and_traced)
