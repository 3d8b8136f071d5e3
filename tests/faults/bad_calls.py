"""Calls that must be refused: what is wrong, which exception, and what its message must hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import (
    ArgumentError,
    BackendUnavailable,
    CapacityError,
    ConfigError,
    DecodeDispatched,
    DecodeStats,
    Delivery,
    Dispatched,
    ExpertGroup,
    Layout,
    MoeShape,
    PlanError,
    Quantized,
    Routing,
    RoutingError,
    Scale,
    ShapeError,
)

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=8)


@dataclass
class Good:
    """A group of two ranks, and arguments and results that are right: T=3, K=2, H=16, M=8, E=4, L=2."""

    pg: dist.ProcessGroup
    group: ExpertGroup
    stranger: ExpertGroup
    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    sent: Dispatched
    masked: Dispatched
    decoded: DecodeDispatched
    foreign: Dispatched
    foreign_decoded: DecodeDispatched

    @property
    def routing(self) -> Routing:
        return Routing(self.topk_idx, self.weights)


def good(pg: dist.ProcessGroup, group: ExpertGroup, stranger: ExpertGroup) -> Good:
    """Collective: makes the results that bad calls misuse."""
    x, weights = torch.ones(3, 16), torch.ones(3, 2)
    topk_idx = torch.tensor([[0, 1], [2, 3], [1, 2]])
    routing = Routing(topk_idx, weights)
    return Good(
        pg=pg,
        group=group,
        stranger=stranger,
        x=x,
        topk_idx=topk_idx,
        weights=weights,
        sent=group.dispatch(x, routing),
        masked=group.dispatch(x, routing, delivery=Delivery(Layout.MASKED)),
        decoded=group.decode_dispatch(x, routing),
        foreign=stranger.dispatch(x, routing),
        foreign_decoded=stranger.decode_dispatch(x, routing),
    )


Call = Callable[[Good], Any]


def _dispatch(**changes: Any) -> Call:
    """A dispatch with some arguments replaced; a function gets the good arguments."""
    return _throughput("dispatch", changes)


def _decode(**changes: Any) -> Call:
    return _throughput("decode_dispatch", changes)


def _throughput(name: str, changes: dict[str, Any]) -> Call:
    def call(g: Good) -> Any:
        new = {key: value(g) if callable(value) else value for key, value in changes.items()}
        x = new.pop("x", g.x)
        routing = new.pop("routing", Routing(new.pop("topk_idx", g.topk_idx), new.pop("topk_weights", g.weights)))
        return getattr(g.group, name)(x, routing, **new)

    return call


def _combine(y: Callable[[Good], Any] = lambda g: g.sent.x.clone(), plan=lambda g: g.sent.plan, **options: Any) -> Call:
    return lambda g: g.group.combine(y(g), plan(g), **options)


def _decode_combine(
    y: Callable[[Good], Any] = lambda g: g.decoded.x, plan=lambda g: g.decoded.plan, **options: Any
) -> Call:
    return lambda g: g.group.decode_combine(y(g), plan(g), **options)


def _open(shape: Any = SHAPE, **options: Any) -> Call:
    return lambda g: ExpertGroup(g.pg, shape, **options)


def _wide(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def _at(token: int, slot: int, expert: int) -> Call:
    def change(g: Good) -> torch.Tensor:
        topk_idx = g.topk_idx.clone()
        topk_idx[token, slot] = expert
        return topk_idx

    return change


def _grad(name: str) -> Call:
    return lambda g: getattr(g, name).clone().requires_grad_()


SMALL_FP8 = MoeShape(num_experts=4, top_k=2, hidden=24, max_tokens=8)
OTHER = MoeShape(num_experts=8, top_k=2, hidden=16, max_tokens=8)

BAD: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {
    # ---------------------------------------------------------------- dispatch
    "x is a list": (_dispatch(x=[1.0]), ShapeError, ("dispatch: x:", "[T, H]", "list", "torch.Tensor")),
    "x is None": (_dispatch(x=lambda g: None), ShapeError, ("dispatch: x:", "NoneType", "torch.Tensor")),
    "x has one dimension": (_dispatch(x=_wide(16)), ShapeError, ("dispatch: x:", "[16]", "2 dimensions instead of 1")),
    "x is too narrow": (_dispatch(x=_wide(3, 12)), ShapeError, ("x:", "H=16", "the group", "12", "pass shape [3, 16]")),
    "x is of integers": (
        _dispatch(x=_wide(3, 16, dtype=torch.int32)),
        ShapeError,
        ("x:", "torch.bfloat16", "torch.int32", "call .to("),
    ),
    "x has holes": (
        _dispatch(x=_wide(3, 32)[:, ::2]),
        ShapeError,
        ("x: must be contiguous", "(32, 2)", "call .contiguous()"),
    ),
    "x is elsewhere": (
        _dispatch(x=torch.ones(3, 16, device="meta")),
        ShapeError,
        ("x:", "on meta", "the group is on cpu", "call .to('cpu')"),
    ),
    "x has too many rows": (
        _dispatch(x=_wide(9, 16), topk_idx=torch.zeros(9, 2, dtype=torch.int64), topk_weights=_wide(9, 2)),
        CapacityError,
        ("x: T=9", "max_tokens=8", "MoeShape(max_tokens=9)"),
    ),
    "x requires grad": (_dispatch(x=_grad("x")), ArgumentError, ("x: requires grad", "tokenferry.autograd")),
    "topk_idx has fewer rows": (
        _dispatch(topk_idx=torch.zeros(2, 2, dtype=torch.int64)),
        ShapeError,
        ("topk_idx:", "T=3 was set by x", "here it is 2", "pass shape [3, 2]"),
    ),
    "topk_idx has more slots": (
        _dispatch(topk_idx=torch.zeros(3, 5, dtype=torch.int64)),
        ShapeError,
        ("topk_idx:", "K=2 was set by the group", "here it is 5", "pass shape [3, 2]"),
    ),
    "topk_idx is of floats": (
        _dispatch(topk_idx=_wide(3, 2)),
        ShapeError,
        ("topk_idx:", "torch.int64 or torch.int32", "torch.float32", "call .to(torch.int64)"),
    ),
    "topk_idx has holes": (
        _dispatch(topk_idx=torch.zeros(2, 3, dtype=torch.int64).t()),
        ShapeError,
        ("topk_idx: must be contiguous", "(1, 3)", ".contiguous()"),
    ),
    "topk_idx is None": (_dispatch(topk_idx=lambda g: None), ShapeError, ("topk_idx:", "NoneType", "torch.Tensor")),
    "an expert is too high": (
        _dispatch(topk_idx=_at(1, 0, 4)),
        RoutingError,
        ("topk_idx[1, 0] is 4", "[0, 4)", "-1", "num_experts=4"),
    ),
    "an expert is too low": (
        _dispatch(topk_idx=_at(2, 1, -2)),
        RoutingError,
        ("topk_idx[2, 1] is -2", "[0, 4)", "-1 for an unused slot"),
    ),
    "weights are float64": (
        _dispatch(topk_weights=_wide(3, 2, dtype=torch.float64)),
        ShapeError,
        ("topk_weights:", "torch.float32", "torch.float64", ".to(torch.float32)"),
    ),
    "weights have fewer slots": (
        _dispatch(topk_weights=_wide(3, 1)),
        ShapeError,
        ("topk_weights:", "K=2", "here it is 1", "pass shape [3, 2]"),
    ),
    "weights are elsewhere": (
        _dispatch(topk_weights=torch.ones(3, 2, device="meta")),
        ShapeError,
        ("topk_weights:", "on meta", ".to('cpu')"),
    ),
    "weights require grad": (
        _dispatch(topk_weights=_grad("weights")),
        ArgumentError,
        ("topk_weights: requires grad", "tokenferry.autograd"),
    ),
    "routing is a tuple": (
        _dispatch(routing=lambda g: (g.topk_idx, g.weights)),
        ArgumentError,
        ("routing:", "tokenferry.Routing", "tuple"),
    ),
    "delivery is a layout": (
        _dispatch(delivery=lambda g: Layout.MASKED),
        ArgumentError,
        ("delivery:", "Delivery", "Layout"),
    ),
    "quantized rows of odd bytes": (
        _dispatch(x=Quantized(_wide(3, 10, dtype=torch.uint8), _wide(3, 1))),
        ShapeError,
        ("x.data:", "10 bytes", "multiple of 16", "pad", "16 elements"),
    ),
    "scales of fewer rows": (
        _dispatch(x=Quantized(_wide(3, 16, dtype=torch.uint8), _wide(2, 1))),
        ShapeError,
        ("x.scale:", "T=3 was set by x.data", "here it is 2"),
    ),
    "scales of one dimension": (
        _dispatch(x=Quantized(_wide(3, 16, dtype=torch.uint8), _wide(3))),
        ShapeError,
        ("x.scale:", "[T, S]", "2 dimensions instead of 1"),
    ),
    "scale is None": (
        _dispatch(x=Quantized(_wide(3, 16, dtype=torch.uint8), None)),
        ShapeError,
        ("x.scale:", "NoneType", "torch.Tensor"),
    ),
    "quantized rows require grad": (
        _dispatch(x=lambda g: Quantized(g.x.clone().requires_grad_(), _wide(3, 1))),
        ArgumentError,
        ("x", "requires grad", "tokenferry.autograd"),
    ),
    # ---------------------------------------------------------------- redispatch
    "redispatch along a stranger's plan": (
        lambda g: g.group.redispatch(g.x, g.foreign.plan),
        PlanError,
        ("redispatch: plan:", "use the group that dispatched"),
    ),
    "redispatch along nothing": (
        lambda g: g.group.redispatch(g.x, None),
        PlanError,
        ("redispatch: plan:", "Plan", "NoneType"),
    ),
    "redispatch along a decode plan": (
        lambda g: g.group.redispatch(g.x, g.decoded.plan),
        PlanError,
        ("redispatch: plan:", "Plan", "DecodePlan"),
    ),
    "redispatch of more rows": (
        lambda g: g.group.redispatch(_wide(4, 16), g.sent.plan),
        ShapeError,
        ("redispatch: x:", "T=3 was set by the plan", "here it is 4", "pass shape [3, 16]"),
    ),
    "redispatch of narrow weights": (
        lambda g: g.group.redispatch(g.x, g.sent.plan, topk_weights=_wide(3, 3)),
        ShapeError,
        ("topk_weights:", "K=2", "here it is 3"),
    ),
    # ---------------------------------------------------------------- combine
    "combine along a stranger's plan": (
        _combine(plan=lambda g: g.foreign.plan),
        PlanError,
        ("combine: plan:", "use the group that dispatched"),
    ),
    "combine along a decode plan": (
        _combine(plan=lambda g: g.decoded.plan),
        PlanError,
        ("combine: plan:", "DecodePlan"),
    ),
    "y has too many rows": (
        _combine(lambda g: _wide(g.sent.x.shape[0] + 1, 16)),
        ShapeError,
        ("combine: y:", "N=", "was set by the plan", "pass shape ["),
    ),
    "y is too wide": (
        _combine(lambda g: _wide(g.sent.x.shape[0], 20)),
        ShapeError,
        ("y:", "H=16 was set by the group", "here it is 20"),
    ),
    "y is of integers": (
        _combine(lambda g: g.sent.x.int()),
        ShapeError,
        ("y:", "torch.bfloat16", "torch.int32", ".to("),
    ),
    "y has holes": (
        _combine(lambda g: _wide(16, g.sent.x.shape[0]).t()),
        ShapeError,
        ("y: must be contiguous", ".contiguous()"),
    ),
    "y is flat for a masked plan": (
        _combine(lambda g: g.masked.x.reshape(-1, 16), lambda g: g.masked.plan),
        ShapeError,
        ("y:", "[L, capacity, H]", "3 dimensions instead of 2"),
    ),
    "y requires grad": (
        _combine(lambda g: g.sent.x.clone().requires_grad_()),
        ArgumentError,
        ("y: requires grad", "tokenferry.autograd"),
    ),
    "three biases": (
        _combine(bias=(_wide(3, 16), _wide(3, 16), _wide(3, 16))),
        ArgumentError,
        ("bias:", "at most 2", "got 3", "add them up first"),
    ),
    "a short bias": (_combine(bias=_wide(2, 16)), ShapeError, ("bias[0]:", "T=3 was set by the plan", "here it is 2")),
    "a bias of another dtype": (
        _combine(bias=(_wide(3, 16), _wide(3, 16, dtype=torch.bfloat16))),
        ShapeError,
        ("bias[1]:", "torch.float32", "torch.bfloat16", ".to(torch.float32)"),
    ),
    "a long out": (_combine(out=_wide(4, 16)), ShapeError, ("out:", "T=3", "here it is 4", "pass shape [3, 16]")),
    "out of another dtype": (
        _combine(out=_wide(3, 16, dtype=torch.float64)),
        ShapeError,
        ("out:", "torch.float32", "torch.float64"),
    ),
    "out has holes": (_combine(out=_wide(16, 3).t()), ShapeError, ("out: must be contiguous", "(1, 3)")),
    "weights for other rows": (
        _combine(topk_weights=_wide(2, 2)),
        ShapeError,
        ("topk_weights:", "[N, K]", "N=", "here it is 2"),
    ),
    # ---------------------------------------------------------------- decode_dispatch
    "decode in float64": (
        _decode(x=_wide(3, 16, dtype=torch.float64)),
        ShapeError,
        ("decode_dispatch: x:", "torch.bfloat16", "torch.float64", ".to("),
    ),
    "decode too many rows": (
        _decode(x=_wide(9, 16), topk_idx=torch.zeros(9, 2, dtype=torch.int64), topk_weights=_wide(9, 2)),
        CapacityError,
        ("x: T=9", "max_tokens=8"),
    ),
    "decode to an unknown expert": (_decode(topk_idx=_at(0, 0, 99)), RoutingError, ("topk_idx[0, 0] is 99", "[0, 4)")),
    "decode with a word for a scale": (_decode(fp8="ue8m0"), ArgumentError, ("fp8:", "Scale", "'ue8m0'")),
    "fp8 rows of odd bytes": (
        lambda g: g.group.for_shape(SMALL_FP8).decode_dispatch(_wide(3, 24), g.routing, fp8=Scale.FLOAT32),
        ShapeError,
        ("x:", "H=24", "multiple of 16", "pad"),
    ),
    "counters of another length": (
        _decode(stats=DecodeStats(received=torch.zeros(4, dtype=torch.int32))),
        ShapeError,
        ("stats.received:", "L=2", "here it is 4"),
    ),
    "counters of another dtype": (
        _decode(stats=DecodeStats(received=torch.zeros(2, dtype=torch.int64))),
        ShapeError,
        ("stats.received:", "torch.int32", "torch.int64"),
    ),
    "wait times of another length": (
        _decode(stats=DecodeStats(wait_ns=torch.zeros(3, dtype=torch.int64))),
        ShapeError,
        ("stats.wait_ns:", "R=2", "here it is 3"),
    ),
    "a tensor for counters": (
        _decode(stats=lambda g: torch.zeros(2, dtype=torch.int32)),
        ArgumentError,
        ("stats:", "DecodeStats", "Tensor"),
    ),
    # ---------------------------------------------------------------- decode_combine
    "numerics that nobody has": (
        _decode_combine(numerics="quick"),
        ArgumentError,
        ("numerics:", '"exact" or "fast"', "'quick'"),
    ),
    "a plan without weights": (
        _decode_combine(plan=lambda g: replace(g.decoded.plan, topk_weights=None)),
        PlanError,
        ("plan:", "topk_weights", "Routing"),
    ),
    "a plan without row weights": (
        _decode_combine(plan=lambda g: replace(g.decoded.plan, row_weights=None), numerics="fast"),
        PlanError,
        ("plan:", "fast", "Routing"),
    ),
    "a plan with odd weights": (
        _decode_combine(plan=lambda g: replace(g.decoded.plan, topk_weights=_wide(3, 4))),
        ShapeError,
        ("plan.topk_weights:", "K=2", "here it is 4"),
    ),
    "decode_combine along a stranger's plan": (
        _decode_combine(plan=lambda g: g.foreign_decoded.plan),
        PlanError,
        ("decode_combine: plan:", "use the group that dispatched"),
    ),
    "decode_combine along a dispatch plan": (
        _decode_combine(plan=lambda g: g.sent.plan),
        PlanError,
        ("decode_combine: plan:", "DecodePlan", "Plan"),
    ),
    "decode_combine on another shape": (
        lambda g: g.group.for_shape(OTHER).decode_combine(torch.ones(4, 16, 16), g.decoded.plan),
        ShapeError,
        ("y:", "L=2 was set by the plan", "here it is 4"),
    ),
    "decode answers with too few rows": (
        _decode_combine(lambda g: _wide(2, 15, 16)),
        ShapeError,
        ("y:", "rows=16 was set by the plan", "here it is 15"),
    ),
    "decode answers of too many experts": (
        _decode_combine(lambda g: _wide(3, 16, 16)),
        ShapeError,
        ("y:", "L=2", "here it is 3"),
    ),
    "decode out of another dtype": (
        _decode_combine(out=_wide(3, 16, dtype=torch.float16)),
        ShapeError,
        ("out:", "torch.float32", "torch.float16"),
    ),
    "received tokens in combine": (
        _decode_combine(stats=DecodeStats(received=torch.zeros(2, dtype=torch.int32))),
        ArgumentError,
        ("stats.received:", "None", "decode_dispatch"),
    ),
    # ---------------------------------------------------------------- the group itself
    "mask oneself": (
        lambda g: g.group.mask(g.group.rank),
        ArgumentError,
        ("mask: rank:", "0..1", "other than this rank"),
    ),
    "mask nobody": (lambda g: g.group.mask(2), ArgumentError, ("mask: rank:", "0..1", "got 2")),
    "mask in words": (lambda g: g.group.mask("0"), ArgumentError, ("mask: rank:", "0..1", "got '0'")),
    "mask minus one": (lambda g: g.group.mask(-1), ArgumentError, ("mask: rank:", "0..1", "got -1")),
    "another shape that does not divide": (
        lambda g: g.group.for_shape(MoeShape(5, 2, 16, 8)),
        ConfigError,
        ("for_shape: num_experts=5", "2 ranks", "use 6 experts"),
    ),
    "another shape that is none": (
        lambda g: g.group.for_shape((4, 2, 16, 8)),
        ConfigError,
        ("shape:", "MoeShape", "tuple"),
    ),
    "a group that does not divide": (
        _open(MoeShape(3, 2, 16, 8)),
        ConfigError,
        ("num_experts=3", "2 ranks", "use 4 experts"),
    ),
    "a group without a shape": (_open({"num_experts": 4}), ConfigError, ("shape:", "MoeShape", "dict")),
    "a group without time": (_open(timeout_s=0), ConfigError, ("timeout_s:", "above 0", "got 0")),
    "a group with time in words": (_open(timeout_s="5"), ConfigError, ("timeout_s:", "seconds", "'5'")),
    "a group with all the time": (_open(timeout_s=float("inf")), ConfigError, ("timeout_s:", "finite", "inf")),
    "a group that ignores timeouts": (
        _open(on_timeout="ignore"),
        ConfigError,
        ("on_timeout:", '"raise" or "mask"', "'ignore'"),
    ),
    "a group on another wire": (_open(wire="rdma"), ConfigError, ("wire:", '"local"', "'rdma'")),
    "a group on another backend": (_open(backend="tpu"), ConfigError, ("backend:", "'cpu'", "'tpu'")),
    "a group of numbers": (
        lambda g: ExpertGroup([0, 1], SHAPE),
        ConfigError,
        ("group:", "ProcessGroup", "None", "list"),
    ),
    "a group on CUDA": (_open(backend="cuda"), BackendUnavailable, ("backend='cuda'", "use 'cpu' or 'auto'")),
}
