"""Requests: the quick comparisons accept no argument that the full checks refuse, and lead to the same request."""

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tokenferry import (
    ArgumentError,
    ConfigError,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    Plan,
    Quantized,
    Routing,
    RoutingError,
)
from tokenferry.backends.cuda.across import nccl, nvshmem
from tokenferry.backends.cuda.setup import _unfit, terms_of
from tokenferry.checks import Checks
from tokenferry.options import resolve_options
from tokenferry.resolve import Resolver
from tokenferry.topology import Topology, consecutive

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=4)
CPU = torch.device("cpu")
X = torch.ones(3, 16)
IDX = torch.zeros(3, 2, dtype=torch.int64)
WEIGHTS = torch.ones(3, 2)

ROWS: dict[str, Any] = {
    "right": X,
    "half": X.half(),
    "parameter": torch.nn.Parameter(X, requires_grad=False),
    "no tensor": [1.0],
    "narrow": X[:, :8].contiguous(),
    "holes": torch.ones(3, 32)[:, ::2],
    "flat": torch.ones(16),
    "integers": X.int(),
    "elsewhere": X.to("meta"),
    "too many": torch.ones(5, 16),
    "fewer": X[:2],
    "none": X[:0],
    "grad": X.clone().requires_grad_(),
    "quantized": Quantized(X.to(torch.uint8), torch.ones(6, 3).t()[:, ::2].t().contiguous().t()),
    "quantized, odd": Quantized(torch.ones(3, 7, dtype=torch.uint8), WEIGHTS),
    "quantized, holes": Quantized(torch.ones(3, 32)[:, ::2], WEIGHTS),
    "quantized, fewer scales": Quantized(X, WEIGHTS[:2]),
    "quantized, flat scales": Quantized(X, torch.ones(3)),
    "quantized, grad": Quantized(X, WEIGHTS.clone().requires_grad_()),
    "quantized, elsewhere": Quantized(X.to("meta"), WEIGHTS.to("meta")),
    "quantized, no tensor": Quantized(X, None),
}
INDICES = {
    "right": IDX,
    "int32": IDX.int(),
    "wide": torch.zeros(3, 3, dtype=torch.int64),
    "fewer": IDX[:2],
    "more": torch.zeros(5, 2, dtype=torch.int64),
    "none": IDX[:0],
    "holes": torch.zeros(2, 3, dtype=torch.int64).t(),
    "floats": WEIGHTS,
    "no tensor": [[0, 1]],
    "outside": IDX + 4,
}
GATES = {
    "right": WEIGHTS,
    "absent": None,
    "double": WEIGHTS.double(),
    "fewer": WEIGHTS[:2],
    "grad": WEIGHTS.clone().requires_grad_(),
    "no tensor": 1.0,
}


def resolver(*, checks_routing: bool = False) -> Resolver:
    return Resolver(SHAPE, Topology(0, ((0,),)), CPU, "key", checks_routing)


def outcome(call: str, *args: Any) -> tuple[Any, ...]:
    """Return the error of a call, or the fields of its request."""
    try:
        request = getattr(resolver(), call)(*args)
    except ArgumentError as error:
        return type(error), str(error)
    return tuple(getattr(request, name) for name in request.__dataclass_fields__)


def both(monkeypatch: pytest.MonkeyPatch, call: str, *args: Any) -> None:
    quick = outcome(call, *args)
    for name in ("dispatch_looks_right", "rows_look_right", "_combine_looks_right"):
        monkeypatch.setattr(Resolver, name, lambda *_: False)
    full = outcome(call, *args)
    monkeypatch.undo()
    assert len(quick) == len(full)
    for one, other in zip(quick, full, strict=True):
        assert one is other or (not isinstance(one, torch.Tensor) and one == other)


def a_plan(layout: Layout) -> Plan:
    with ExpertGroup(None, SHAPE, backend="cpu") as group:
        plan = group.dispatch(X, Routing(IDX), options=DispatchOptions(layout)).plan
    object.__setattr__(plan, "group_key", "key")
    return plan


@pytest.mark.parametrize("x", ROWS)
def test_dispatch(x, monkeypatch):
    for idx, weights in itertools.product(INDICES.values(), GATES.values()):
        both(monkeypatch, "dispatch", ROWS[x], Routing(idx, weights), None, None)
    both(monkeypatch, "dispatch", ROWS[x], IDX, None, None)
    both(monkeypatch, "dispatch", ROWS[x], Routing(IDX), Layout.ROWS, None)


@pytest.mark.parametrize("x", ROWS)
def test_redispatch(x, monkeypatch):
    plan = a_plan(Layout.ROWS)
    for weights in GATES.values():
        both(monkeypatch, "redispatch", ROWS[x], plan, weights, None)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("y", ROWS)
def test_combine(y, layout, monkeypatch):
    plan = a_plan(layout)
    rows: list[Any] = [ROWS[y], torch.ones(4, 4, 16), torch.ones(4, 3, 16), torch.ones(3, 4, 16)]
    weights = [*GATES.values(), torch.ones(3), torch.ones(4, 4), torch.ones(12)]
    sums = [None, X, (X, X), (X, X, X), X[:2], X.half(), 1, (X, None), X.clone().requires_grad_()]
    for one, gate in itertools.product(rows, weights):
        both(monkeypatch, "combine", one, plan, gate, None, None, None)
    for bias in sums:
        both(monkeypatch, "combine", ROWS[y], plan, None, bias, None, None)
        if not isinstance(bias, tuple):
            both(monkeypatch, "combine", ROWS[y], plan, None, None, bias, None)


def test_good_arguments_need_no_full_checks(monkeypatch):
    """Otherwise the host time of a call is several times longer."""

    def full_checks(*_: object, **__: object) -> None:
        raise AssertionError("the full checks ran")

    monkeypatch.setattr(Resolver, "_checks", full_checks)
    found = resolver(checks_routing=True)
    for rows in (X, X.bfloat16(), ROWS["quantized"]):
        found.dispatch(rows, Routing(IDX, WEIGHTS), DispatchOptions(), 8)
        found.redispatch(rows, a_plan_of_three(), WEIGHTS, None)
    found.combine(X, a_plan_of_three(), WEIGHTS, (X, X), X.clone(), 8)


def a_plan_of_three() -> Plan:
    nothing = torch.empty(0, dtype=torch.int64)
    return Plan("key", DispatchOptions(), 3, 3, 3, *[nothing] * 4, IDX, *[nothing] * 3)


def test_where_the_rows_are_may_check_the_routing():
    outside = Routing(IDX + 4)
    assert resolver(checks_routing=True).dispatch(X, outside, None, None).routing is outside
    with pytest.raises(ArgumentError, match=r"topk_idx\[0, 0\] is 4"):
        resolver().dispatch(X, outside, None, None)


@pytest.mark.parametrize("call", ["dispatch", "decode_dispatch"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("max_nodes", "ranks_per_node", "refused"),
    [(None, 1, False), (1, 1, True), (1, 2, True), (1, 4, False), (2, 1, False), (3, 1, False)],
)
def test_a_token_goes_to_no_more_nodes_than_the_shape_allows(call, quick, max_nodes, ranks_per_node, refused):
    topology = Topology(0, consecutive(4, ranks_per_node))
    shape = replace(SHAPE, max_nodes=max_nodes)
    x = X if quick else torch.nn.Parameter(X, requires_grad=False)  # which only the full checks accept
    routing = Routing(torch.tensor([[0, 1], [1, -1], [1, 2]] if ranks_per_node == 2 else [[0, 0], [1, -1], [0, 3]]))
    args = (x, routing, None, None)
    options = {"return_hook": False} if call == "decode_dispatch" else {}
    if refused:
        with pytest.raises(RoutingError, match=rf"{call}: topk_idx\[2\] has experts on 2 nodes .*, expected at most 1"):
            getattr(Resolver(shape, topology, CPU, "key", False), call)(*args, **options)
    else:
        assert getattr(Resolver(shape, topology, CPU, "key", False), call)(*args, **options).routing is routing
    where_the_rows_are = Resolver(shape, topology, CPU, "key", True)
    assert getattr(where_the_rows_are, call)(*args, **options).routing is routing


@pytest.mark.parametrize(("max_nodes", "top_k", "checked"), [(2, 3, True), (2, 2, False), (3, 3, False), (4, 4, False)])
def test_a_limit_that_nothing_can_exceed_costs_no_time(max_nodes, top_k, checked, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(Checks, "nodes", lambda check, name, topk_idx, limit: seen.append(limit.max_nodes))
    shape = MoeShape(8, top_k, 16, 4, max_nodes)
    idx = torch.zeros(3, top_k, dtype=torch.int64)
    Resolver(shape, Topology(0, consecutive(4, 1)), CPU, "key", False).dispatch(X, Routing(idx), None, None)
    assert seen == [max_nodes] * checked


@pytest.mark.parametrize("num_sms", [0, -1, True, 2.0, "8"])
def test_a_number_of_sms_is_a_positive_integer(num_sms):
    plan = a_plan_of_three()
    for call, args in (
        ("dispatch", (X, Routing(IDX), None)),
        ("redispatch", (X, plan, None)),
        ("combine", (X, plan, None, None, None)),
    ):
        with pytest.raises(ArgumentError, match=f"{call}: num_sms: expected an integer of at least 1 or None, got"):
            getattr(resolver(), call)(*args, num_sms)


def test_the_cpu_has_no_sms():
    group = ExpertGroup(None, SHAPE, backend="cpu")
    sent = group.dispatch(X, Routing(IDX))
    for call in (
        lambda: group.dispatch(X, Routing(IDX), num_sms=8),
        lambda: group.redispatch(X, sent.plan, num_sms=8),
        lambda: group.combine(sent.x, sent.plan, num_sms=8),
    ):
        with pytest.raises(ArgumentError, match="num_sms: expected None, got 8; the CPU backend has no SMs; leave"):
            call()
    assert group.combine(sent.x, sent.plan).x.equal(X)


def test_options_that_only_the_cpu_backend_honours():
    assert resolve_options(None, SHAPE, "auto", "auto", None, "raise").cpu_only == ""
    assert "transport='shared_memory'" in resolve_options(None, SHAPE, "auto", "shared_memory", None, "raise").cpu_only
    assert resolve_options(None, SHAPE, "auto", "auto", None, "mask").cpu_only == ""


def test_a_variable_does_not_choose_the_cpu(monkeypatch):
    """TOKENFERRY_TRANSPORT is for CPU groups; it must not exclude backend cuda."""
    monkeypatch.setenv("TOKENFERRY_TRANSPORT", "shared_memory")
    monkeypatch.setenv("TOKENFERRY_HEAP_MB", "3")
    options = resolve_options(None, SHAPE, "auto", "auto", None, "raise")
    assert (options.transport, options.cpu_only, options.heap_bytes) == ("shared_memory", "", 3 << 20)


def test_cuda_refuses_them():
    with pytest.raises(ConfigError, match=r"backend='cuda': .*; leave it out, or use backend='cpu'"):
        ExpertGroup(None, SHAPE, backend="cuda", transport="shared_memory")


@pytest.mark.parametrize(("megabytes", "fits"), [(1, True), (65_535, True), (65_536, False), (70_000, False)])
def test_the_largest_heap(monkeypatch, megabytes, fits):
    """Ranks exchange the addresses of rows as 32-bit numbers."""
    monkeypatch.setenv("TOKENFERRY_HEAP_MB", str(megabytes))
    options = resolve_options(None, SHAPE, "auto", "auto", None, "raise")
    message = "" if fits else f"TOKENFERRY_HEAP_MB={megabytes}, and at most "
    found = _unfit(options, Topology(0, ((0, 1),)))
    assert found.startswith(message)
    assert fits == (found == "")


@pytest.mark.parametrize(
    ("num_ranks", "per_node", "message"),
    [
        (9, 9, "9 ranks on a node, and at most 8 are possible"),
        (257, 1, "257 nodes of 1 rank, and at most 256 nodes are possible"),
        (4, 2, "2 nodes of 2 ranks, and there is no NCCL to connect them: libnccl.so.2 was not found"),
        (8, 8, ""),
    ],
)
def test_topologies_that_cuda_cannot_have(monkeypatch, num_ranks, per_node, message):
    monkeypatch.setattr(nccl, "why_not", lambda: "libnccl.so.2 was not found")
    options = resolve_options(None, SHAPE, "auto", "auto", None, "raise")
    assert _unfit(options, Topology(0, consecutive(num_ranks, per_node))) == message


@pytest.mark.parametrize(
    ("per_node", "nvshmem_says", "message"),
    [
        (4, "", "transport='nvshmem': all ranks are on one node, whose decode calls use NVLink"),
        (2, "it was not found", "transport='nvshmem': it was not found"),
        (2, "", ""),
    ],
)
def test_nvshmem_is_between_nodes(per_node, nvshmem_says, message):
    options = resolve_options(None, SHAPE, "auto", "nvshmem", None, "raise")
    with (
        mock.patch.object(nccl, "why_not", return_value=""),
        mock.patch.object(nvshmem, "why_not", return_value=nvshmem_says),
    ):
        assert _unfit(options, Topology(0, consecutive(4, per_node))) == message


def test_nvshmem_is_not_linked_with_ptx(monkeypatch):
    """Before anything is sent: the ranks of a group have the same environment."""
    monkeypatch.setenv("TOKENFERRY_ARCH", "compute_80")
    resolve_options(None, SHAPE, "auto", "auto", None, "raise")
    with pytest.raises(ConfigError, match=r"transport='nvshmem': TOKENFERRY_ARCH=compute_80 is PTX, .* name an sm_XY"):
        ExpertGroup(None, SHAPE, transport="nvshmem")
    monkeypatch.setenv("TOKENFERRY_ARCH", "sm_90a")
    assert resolve_options(None, SHAPE, "auto", "nvshmem", None, "raise").arch == "sm_90a"


def test_a_variable_chooses_the_network_where_the_program_leaves_it_open(monkeypatch):
    """Unlike the transport "nvshmem" it asks for nothing where all ranks are on one node, or on CPUs."""
    monkeypatch.setenv("TOKENFERRY_NETWORK", "nvshmem")
    options = resolve_options(None, SHAPE, "auto", "auto", None, "mask")
    assert (options.network, options.cuda_only) == ("nvshmem", "")
    with mock.patch.object(nccl, "why_not", return_value=""):
        for says, message in (("", ""), ("it was not found", "TOKENFERRY_NETWORK='nvshmem': it was not found")):
            with mock.patch.object(nvshmem, "why_not", return_value=says):
                assert _unfit(options, Topology(0, consecutive(4, 2))) == message
                assert _unfit(options, Topology(0, consecutive(4, 4))) == ""
    monkeypatch.setenv("TOKENFERRY_ARCH", "compute_80")
    with pytest.raises(ConfigError, match="TOKENFERRY_NETWORK=nvshmem: TOKENFERRY_ARCH=compute_80 is PTX"):
        resolve_options(None, SHAPE, "auto", "auto", None, "raise")


def test_ranks_agree_only_on_what_they_use(monkeypatch):
    """A Buffer may have other ``num_rdma_bytes`` on each rank, and ranks other networks, where neither is used."""

    def terms(network, put_bytes, per_node):
        monkeypatch.setenv("TOKENFERRY_NETWORK", network)
        options = replace(resolve_options(None, SHAPE, "auto", "auto", None, "raise"), put_bytes=put_bytes)
        return terms_of(options, Topology(0, consecutive(4, per_node)), 1 << 30)

    assert terms("nccl", 7, 4) == terms("nvshmem", 8, 4) == terms("nccl", None, 4)
    assert terms("nccl", 7, 2) == terms("nccl", 8, 2)
    assert terms("nvshmem", 7, 2) != terms("nvshmem", 8, 2)
    assert terms("nvshmem", 7, 2) != terms("nccl", 7, 2)


def test_ranks_are_masked_across_nodes_on_gpus_if_messages_are_put():
    options, putting = (resolve_options(None, SHAPE, "auto", name, None, "mask") for name in ("auto", "nvshmem"))
    assert _unfit(options, Topology(0, consecutive(4, 4))) == ""
    message = "on_timeout='mask' needs all ranks on one node, or transport='nvshmem', and these are 2 nodes of 2 ranks"
    with mock.patch.object(nccl, "why_not", return_value=""), mock.patch.object(nvshmem, "why_not", return_value=""):
        assert _unfit(options, Topology(0, consecutive(4, 2))).startswith(message)
        assert _unfit(putting, Topology(0, consecutive(4, 2))) == ""
