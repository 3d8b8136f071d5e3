"""Which backend a group gets, shown by stand-ins for the CUDA backend, and the small calls of groups."""

import logging
from typing import Any

import pytest
import torch

from tokenferry import (
    ArgumentError,
    BackendUnavailable,
    ClosedError,
    ConfigError,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    PlanError,
    Routing,
)
from tokenferry.backends import choose
from tokenferry.backends.cuda import setup as cuda_setup

HOW_TO_HIDE = ". To hide this line, name the backend, or set TOKENFERRY_LOG=error"
SHAPE = MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=4)


class Cuda:
    """Says whether CUDA can run, and stands for the backend; ``asked`` says which of its functions were called."""

    name = "cuda"
    why = "every rank has one"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, why_not: str) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(cuda_setup, "why_not_cuda", lambda *_: self.asked.append("why not") or why_not)
        monkeypatch.setattr(cuda_setup, "make_cuda_backend", lambda *_: self.asked.append("make") or self)


def choice(backend: str, **options: Any) -> Any:
    from tokenferry.options import resolve_options

    transport, on_timeout = options.get("transport", "auto"), options.get("on_timeout", "raise")
    return choose.make_backend(None, resolve_options(None, SHAPE, backend, transport, None, on_timeout))


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch):
    monkeypatch.delenv("TOKENFERRY_BACKEND", raising=False)
    monkeypatch.setattr(choose, "_announced", set())


def test_auto_takes_cuda_where_every_rank_can(monkeypatch, caplog):
    cuda = Cuda(monkeypatch, "")
    with caplog.at_level(logging.INFO, "tokenferry"):
        assert choice("auto") is cuda
    assert cuda.asked == ["why not", "make"]
    assert caplog.messages == [f"ExpertGroup: backend 'auto' chose cuda (every rank has one){HOW_TO_HIDE}"]
    with caplog.at_level(logging.WARNING, "tokenferry"):
        choice("auto")
    assert len(caplog.messages) == 1, "once"


def test_auto_says_why_it_did_not(monkeypatch, caplog):
    cuda = Cuda(monkeypatch, "rank 1 has no GPU")
    with caplog.at_level(logging.INFO, "tokenferry"):
        assert choice("auto").name == "cpu"
    assert cuda.asked == ["why not"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("ExpertGroup: backend 'auto' chose cpu (")
    assert caplog.messages[0].endswith(f"; not cuda: rank 1 has no GPU{HOW_TO_HIDE}")


def test_a_requested_backend_is_not_probed_and_logs_nothing(monkeypatch, caplog):
    cuda = Cuda(monkeypatch, "")
    with caplog.at_level(logging.INFO, "tokenferry"):
        assert choice("cpu").name == "cpu"
        assert choice("cuda") is cuda
    assert cuda.asked == ["make"]
    assert not caplog.messages


def test_every_rank_probes_cuda_even_if_an_option_needs_the_cpu(monkeypatch):
    """The probe is collective: a rank that left it out would leave the others waiting."""
    cuda = Cuda(monkeypatch, "no")
    choice("auto", transport="shared_memory")
    assert cuda.asked == ["why not"]


def test_cuda_refuses_what_only_the_cpu_can(monkeypatch):
    cuda = Cuda(monkeypatch, "")
    with pytest.raises(
        ConfigError, match="transport='process_group' is a transport of the CPU backend; leave it out, or use"
    ):
        choice("cuda", transport="process_group")
    assert not cuda.asked


def test_the_cpu_refuses_what_only_cuda_can(monkeypatch):
    cuda = Cuda(monkeypatch, "")
    with pytest.raises(ConfigError, match="backend='cpu': transport='nvshmem' is a transport of the CUDA backend"):
        choice("cpu", transport="nvshmem")
    assert choice("auto", transport="nvshmem") is cuda
    Cuda(monkeypatch, "rank 1 has no GPU")
    with pytest.raises(BackendUnavailable, match=r"of the CUDA backend, and .* cannot run: rank 1 has no GPU"):
        choice("auto", transport="nvshmem")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="expected 'auto', 'cpu' or 'cuda', got 'tpu'"):
        choice("tpu")


@pytest.mark.parametrize("layout", Layout)
def test_empty_rows_have_the_shape_of_the_received_rows(layout):
    with ExpertGroup(None, SHAPE, backend="cpu") as group:
        sent = group.dispatch(
            torch.ones(3, 8), Routing(torch.tensor([[0, 1], [2, -1], [0, 3]])), options=DispatchOptions(layout)
        )
        rows = group.empty_rows(sent.plan)
        assert (rows.shape, rows.dtype) == (sent.x.shape, torch.bfloat16)
        rows = group.empty_rows(sent.plan, torch.float32).copy_(sent.x)
        assert torch.equal(group.combine(rows, sent.plan).x, group.combine(sent.x, sent.plan).x)
        with pytest.raises(
            ArgumentError, match=r"empty_rows: dtype: expected one of torch\.bfloat16, .* got torch\.int32"
        ):
            group.empty_rows(sent.plan, torch.int32)
        with pytest.raises(PlanError, match="empty_rows: plan"):
            group.empty_rows(sent)


def test_the_cpu_has_nothing_to_warm_up_and_nothing_to_wait_for():
    group = ExpertGroup(None, SHAPE, backend="cpu")
    group.warmup()
    group.synchronize()
    plan = group.dispatch(torch.ones(1, 8), Routing(torch.tensor([[0, 1]]))).plan
    assert plan._places.shape == group._places_shape(DispatchOptions(), plan.num_tokens) == (0, 0)
    backend = group._backend
    assert backend.new_traces(1) is None
    backend.set_trace(None)
    with pytest.raises(BackendUnavailable, match="set_trace: backend 'cpu' has no time stamps"):
        backend.set_trace(torch.zeros(1, 1))
    group.close()
    for call in (group.warmup, group.synchronize, lambda: group.empty_rows(plan)):
        with pytest.raises(ClosedError):
            call()
