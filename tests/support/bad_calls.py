"""Calls that must be refused: what is wrong, which exception, and what its message must hold.

DEVICE in a message is the device of the group.
"""

from dataclasses import replace

import torch

from support.good_calls import SHAPE, Call, at, combine, decode, decode_combine, dispatch, good, grad, open_group, wide
from support.wrapped import Wrapped
from tokenferry import (
    ArgumentError,
    CapacityError,
    ConfigError,
    DecodeStats,
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

STANDS_FOR_OTHERS: dict[str, Call] = {
    "dispatch: x": dispatch(x=lambda g: Wrapped(g.x)),
    "dispatch: x.data": dispatch(x=lambda g: Quantized(Wrapped(g.x), g.weights)),
    "dispatch: x.scale": dispatch(x=lambda g: Quantized(g.x, Wrapped(g.weights))),
    "dispatch: topk_idx": dispatch(topk_idx=lambda g: Wrapped(g.topk_idx)),
    "dispatch: topk_weights": dispatch(topk_weights=lambda g: Wrapped(g.weights)),
    "redispatch: x": lambda g: g.group.redispatch(Wrapped(g.x), g.sent.plan),
    "redispatch: topk_weights": lambda g: g.group.redispatch(g.x, g.sent.plan, topk_weights=Wrapped(g.weights)),
    "combine: y": combine(lambda g: Wrapped(g.sent.x)),
    "combine: topk_weights": lambda g: g.group.combine(
        g.sent.x.clone(), g.sent.plan, topk_weights=Wrapped(g.sent.topk_weights)
    ),
    "combine: bias": lambda g: g.group.combine(g.sent.x.clone(), g.sent.plan, bias=Wrapped(g.x)),
    "combine: bias[1]": lambda g: g.group.combine(g.sent.x.clone(), g.sent.plan, bias=(g.x, Wrapped(g.x))),
    "combine: out": lambda g: g.group.combine(g.sent.x.clone(), g.sent.plan, out=Wrapped(g.x)),
    "decode_dispatch: x": decode(x=lambda g: Wrapped(g.x)),
    "decode_dispatch: topk_idx": decode(topk_idx=lambda g: Wrapped(g.topk_idx)),
    "decode_dispatch: topk_weights": decode(topk_weights=lambda g: Wrapped(g.weights)),
    "decode_dispatch: stats.received": decode(stats=DecodeStats(Wrapped(torch.zeros(2, dtype=torch.int32)))),
    "decode_dispatch: stats.wait_ns": decode(stats=DecodeStats(wait_ns=Wrapped(torch.zeros(2, dtype=torch.int64)))),
    "decode_combine: y": decode_combine(lambda g: Wrapped(g.decoded.x)),
    "decode_combine: plan.topk_weights": decode_combine(
        plan=lambda g: replace(g.decoded.plan, topk_weights=Wrapped(g.weights))
    ),
    "decode_combine: out": decode_combine(out=Wrapped(torch.ones(3, 16))),
}

SMALL_FP8 = MoeShape(num_experts=4, top_k=2, hidden=24, max_tokens=8)
OTHER = MoeShape(num_experts=8, top_k=2, hidden=16, max_tokens=8)

BAD: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {
    **{
        f"{name} of a class that stands for others": (
            call,
            ShapeError,
            (f"{name}: expected a tensor with values in memory, got one of class Wrapped", "pass a plain torch.Tensor"),
        )
        for name, call in STANDS_FOR_OTHERS.items()
    },
    # ---------------------------------------------------------------- dispatch
    "x is a list": (dispatch(x=[1.0]), ShapeError, ("dispatch: x:", "[T, H]", "list", "torch.Tensor")),
    "x is None": (dispatch(x=lambda g: None), ShapeError, ("dispatch: x:", "NoneType", "torch.Tensor")),
    "x has one dimension": (dispatch(x=wide(16)), ShapeError, ("dispatch: x:", "[16]", "2 dimensions instead of 1")),
    "x is too narrow": (dispatch(x=wide(3, 12)), ShapeError, ("x:", "H=16", "the group", "12", "pass shape [3, 16]")),
    "x is of integers": (
        dispatch(x=wide(3, 16, dtype=torch.int32)),
        ShapeError,
        ("x:", "torch.bfloat16", "torch.int32", "call .to(", ", or pass Quantized(data, scale) to move packed rows"),
    ),
    "x has holes": (
        dispatch(x=wide(3, 32)[:, ::2]),
        ShapeError,
        ("x: must be contiguous", "(32, 2)", "call .contiguous()"),
    ),
    "x is elsewhere": (
        dispatch(x=torch.ones(3, 16, device="meta")),
        ShapeError,
        ("x:", "on meta", "the group is on DEVICE", "call .to('DEVICE')"),
    ),
    "x has too many rows": (
        dispatch(x=wide(9, 16), topk_idx=torch.zeros(9, 2, dtype=torch.int64), topk_weights=wide(9, 2)),
        CapacityError,
        ("x: T=9", "max_tokens=8", "MoeShape(max_tokens=9)"),
    ),
    "x requires grad": (dispatch(x=grad("x")), ArgumentError, ("x: requires grad", "tokenferry.autograd")),
    "topk_idx has fewer rows": (
        dispatch(topk_idx=torch.zeros(2, 2, dtype=torch.int64)),
        ShapeError,
        ("topk_idx:", "T=3 was set by x", "here it is 2", "pass shape [3, 2]"),
    ),
    "topk_idx has more slots": (
        dispatch(topk_idx=torch.zeros(3, 5, dtype=torch.int64)),
        ShapeError,
        ("topk_idx:", "K=2 was set by the group", "here it is 5", "pass shape [3, 2]"),
    ),
    "topk_idx is of floats": (
        dispatch(topk_idx=wide(3, 2)),
        ShapeError,
        ("topk_idx:", "torch.int64 or torch.int32", "torch.float32", "call .to(torch.int64)"),
    ),
    "topk_idx has holes": (
        dispatch(topk_idx=torch.zeros(2, 3, dtype=torch.int64).t()),
        ShapeError,
        ("topk_idx: must be contiguous", "(1, 3)", ".contiguous()"),
    ),
    "topk_idx is None": (dispatch(topk_idx=lambda g: None), ShapeError, ("topk_idx:", "NoneType", "torch.Tensor")),
    "an expert is too high": (
        dispatch(topk_idx=at(1, 0, 4)),
        RoutingError,
        ("topk_idx[1, 0] is 4", "[0, 4)", "-1", "num_experts=4"),
    ),
    "an expert is too low": (
        dispatch(topk_idx=at(2, 1, -2)),
        RoutingError,
        ("topk_idx[2, 1] is -2", "[0, 4)", "-1 for an unused slot"),
    ),
    "weights are float64": (
        dispatch(topk_weights=wide(3, 2, dtype=torch.float64)),
        ShapeError,
        ("topk_weights:", "torch.float32", "torch.float64", ".to(torch.float32)"),
    ),
    "weights have fewer slots": (
        dispatch(topk_weights=wide(3, 1)),
        ShapeError,
        ("topk_weights:", "K=2", "here it is 1", "pass shape [3, 2]"),
    ),
    "weights are elsewhere": (
        dispatch(topk_weights=torch.ones(3, 2, device="meta")),
        ShapeError,
        ("topk_weights:", "on meta", ".to('DEVICE')"),
    ),
    "weights require grad": (
        dispatch(topk_weights=grad("weights")),
        ArgumentError,
        ("topk_weights: requires grad", "tokenferry.autograd"),
    ),
    "routing is a tuple": (
        dispatch(routing=lambda g: (g.topk_idx, g.weights)),
        ArgumentError,
        ("routing:", "tokenferry.Routing", "tuple"),
    ),
    "options is a layout": (
        dispatch(options=lambda g: Layout.MASKED),
        ArgumentError,
        ("options:", "DispatchOptions", "Layout"),
    ),
    "quantized rows of odd bytes": (
        dispatch(x=Quantized(wide(3, 10, dtype=torch.uint8), wide(3, 1))),
        ShapeError,
        ("x.data:", "10 bytes", "multiple of 16", "pad", "16 elements"),
    ),
    "scales of fewer rows": (
        dispatch(x=Quantized(wide(3, 16, dtype=torch.uint8), wide(2, 1))),
        ShapeError,
        ("x.scale:", "T=3 was set by x.data", "here it is 2"),
    ),
    "scales of one dimension": (
        dispatch(x=Quantized(wide(3, 16, dtype=torch.uint8), wide(3))),
        ShapeError,
        ("x.scale:", "[T, S]", "2 dimensions instead of 1"),
    ),
    "scale is None": (
        dispatch(x=Quantized(wide(3, 16, dtype=torch.uint8), None)),
        ShapeError,
        ("x.scale:", "NoneType", "torch.Tensor"),
    ),
    "scale is sparse": (
        dispatch(x=Quantized(wide(3, 16, dtype=torch.uint8), wide(3, 1).to_sparse())),
        ShapeError,
        ("dispatch: x.scale: expected a dense tensor, got torch.sparse_coo; call .to_dense()",),
    ),
    "rows are sparse": (
        dispatch(x=wide(3, 16).to_sparse()),
        ShapeError,
        ("dispatch: x: expected a dense tensor, got torch.sparse_coo; call .to_dense()",),
    ),
    "quantized rows are compressed": (
        dispatch(x=Quantized(wide(3, 16, dtype=torch.uint8).to_sparse_csr(), wide(3, 1))),
        ShapeError,
        ("dispatch: x.data: expected a dense tensor, got torch.sparse_csr; call .to_dense()",),
    ),
    "weights are sparse": (
        dispatch(topk_weights=wide(3, 2).to_sparse()),
        ShapeError,
        ("dispatch: topk_weights: expected a dense tensor",),
    ),
    "quantized rows require grad": (
        dispatch(x=lambda g: Quantized(g.x.clone().requires_grad_(), wide(3, 1))),
        ArgumentError,
        ("x", "requires grad", "tokenferry.autograd"),
    ),
    "dispatch on no SM": (dispatch(num_sms=0), ArgumentError, ("dispatch: num_sms:", "at least 1", "got 0")),
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
        lambda g: g.group.redispatch(wide(4, 16), g.sent.plan),
        ShapeError,
        ("redispatch: x:", "T=3 was set by the plan", "here it is 4", "pass shape [3, 16]"),
    ),
    "redispatch of narrow weights": (
        lambda g: g.group.redispatch(g.x, g.sent.plan, topk_weights=wide(3, 3)),
        ShapeError,
        ("topk_weights:", "K=2", "here it is 3"),
    ),
    "redispatch on half an SM": (
        lambda g: g.group.redispatch(g.x, g.sent.plan, num_sms=0.5),
        ArgumentError,
        ("redispatch: num_sms:", "integer", "got 0.5"),
    ),
    # ---------------------------------------------------------------- combine
    "combine along a stranger's plan": (
        combine(plan=lambda g: g.foreign.plan),
        PlanError,
        ("combine: plan:", "use the group that dispatched"),
    ),
    "combine along a decode plan": (
        combine(plan=lambda g: g.decoded.plan),
        PlanError,
        ("combine: plan:", "DecodePlan"),
    ),
    "y has too many rows": (
        combine(lambda g: wide(g.sent.x.shape[0] + 1, 16)),
        ShapeError,
        ("combine: y:", "N=", "was set by the plan", "pass shape ["),
    ),
    "y is too wide": (
        combine(lambda g: wide(g.sent.x.shape[0], 20)),
        ShapeError,
        ("y:", "H=16 was set by the group", "here it is 20"),
    ),
    "y is of integers": (
        combine(lambda g: g.sent.x.int()),
        ShapeError,
        ("y:", "torch.bfloat16", "torch.int32", ".to("),
    ),
    "y has holes": (
        combine(lambda g: wide(16, g.sent.x.shape[0]).t()),
        ShapeError,
        ("y: must be contiguous", ".contiguous()"),
    ),
    "y is flat for a masked plan": (
        combine(lambda g: g.masked.x.reshape(-1, 16), lambda g: g.masked.plan),
        ShapeError,
        ("y:", "[L, capacity, H]", "3 dimensions instead of 2"),
    ),
    "y requires grad": (
        combine(lambda g: g.sent.x.clone().requires_grad_()),
        ArgumentError,
        ("y: requires grad", "tokenferry.autograd"),
    ),
    "three biases": (
        combine(bias=(wide(3, 16), wide(3, 16), wide(3, 16))),
        ArgumentError,
        ("bias:", "at most 2", "got 3", "add them up first"),
    ),
    "a short bias": (combine(bias=wide(2, 16)), ShapeError, ("bias[0]:", "T=3 was set by the plan", "here it is 2")),
    "a bias of another dtype": (
        combine(bias=(wide(3, 16), wide(3, 16, dtype=torch.bfloat16))),
        ShapeError,
        ("bias[1]:", "torch.float32", "torch.bfloat16", ".to(torch.float32)"),
    ),
    "a long out": (combine(out=wide(4, 16)), ShapeError, ("out:", "T=3", "here it is 4", "pass shape [3, 16]")),
    "out of another dtype": (
        combine(out=wide(3, 16, dtype=torch.float64)),
        ShapeError,
        ("out:", "torch.float32", "torch.float64"),
    ),
    "out has holes": (combine(out=wide(16, 3).t()), ShapeError, ("out: must be contiguous", "(1, 3)")),
    "weights for other rows": (
        combine(topk_weights=wide(2, 2)),
        ShapeError,
        ("topk_weights:", "[N, K]", "N=", "here it is 2"),
    ),
    "combine on fewer SMs than none": (combine(num_sms=-1), ArgumentError, ("combine: num_sms:", "got -1")),
    # ---------------------------------------------------------------- decode_dispatch
    "decode in float64": (
        decode(x=wide(3, 16, dtype=torch.float64)),
        ShapeError,
        ("decode_dispatch: x:", "torch.bfloat16", "torch.float64", ".to("),
    ),
    "decode sparse rows": (
        lambda g: g.group.decode_dispatch(wide(3, 16).to_sparse(), g.routing),
        ShapeError,
        ("decode_dispatch: x: expected a dense tensor",),
    ),
    "decode too many rows": (
        decode(x=wide(9, 16), topk_idx=torch.zeros(9, 2, dtype=torch.int64), topk_weights=wide(9, 2)),
        CapacityError,
        ("x: T=9", "max_tokens=8"),
    ),
    "decode to an unknown expert": (decode(topk_idx=at(0, 0, 99)), RoutingError, ("topk_idx[0, 0] is 99", "[0, 4)")),
    "decode with a string for a scale": (decode(quantize="ue8m0"), ArgumentError, ("quantize:", "Scale", "'ue8m0'")),
    "decode with a tensor for a flag": (
        decode(return_hook=torch.zeros(2)),
        ArgumentError,
        ("decode_dispatch: return_hook:", "True or False", "a tensor [2]"),
    ),
    "decode with a word for a flag": (decode(return_hook="no"), ArgumentError, ("return_hook:", "'no'")),
    "fp8 rows of odd bytes": (
        lambda g: g.group.for_shape(SMALL_FP8).decode_dispatch(wide(3, 24), g.routing, quantize=Scale.FLOAT32),
        ShapeError,
        ("x:", "H=24", "multiple of 16", "pad"),
    ),
    "counters of another length": (
        decode(stats=DecodeStats(received=torch.zeros(4, dtype=torch.int32))),
        ShapeError,
        ("stats.received:", "L=2", "here it is 4"),
    ),
    "counters of another dtype": (
        decode(stats=DecodeStats(received=torch.zeros(2, dtype=torch.int64))),
        ShapeError,
        ("stats.received:", "torch.int32", "torch.int64"),
    ),
    "wait times of another length": (
        decode(stats=DecodeStats(wait_ns=torch.zeros(3, dtype=torch.int64))),
        ShapeError,
        ("stats.wait_ns:", "R=2", "here it is 3"),
    ),
    "a tensor for counters": (
        decode(stats=lambda g: torch.zeros(2, dtype=torch.int32)),
        ArgumentError,
        ("stats:", "DecodeStats", "Tensor"),
    ),
    # ---------------------------------------------------------------- decode_combine
    "numerics that do not exist": (
        decode_combine(numerics="quick"),
        ArgumentError,
        ("numerics:", '"exact" or "fast"', "'quick'"),
    ),
    "decode_combine with a tensor for a flag": (
        decode_combine(return_hook=torch.zeros(2)),
        ArgumentError,
        ("decode_combine: return_hook:", "True or False", "a tensor [2]"),
    ),
    "a plan without weights": (
        decode_combine(plan=lambda g: replace(g.decoded.plan, topk_weights=None)),
        PlanError,
        ("plan:", "topk_weights", "Routing"),
    ),
    "a plan without row weights": (
        decode_combine(plan=lambda g: replace(g.decoded.plan, row_weights=None), numerics="fast"),
        PlanError,
        ("plan:", "fast", "Routing"),
    ),
    "a plan with odd weights": (
        decode_combine(plan=lambda g: replace(g.decoded.plan, topk_weights=wide(3, 4))),
        ShapeError,
        ("plan.topk_weights:", "K=2", "here it is 4"),
    ),
    "decode_combine along a stranger's plan": (
        decode_combine(plan=lambda g: g.foreign_decoded.plan),
        PlanError,
        ("decode_combine: plan:", "use the group that dispatched"),
    ),
    "decode_combine along a dispatch plan": (
        decode_combine(plan=lambda g: g.sent.plan),
        PlanError,
        ("decode_combine: plan:", "DecodePlan", "Plan"),
    ),
    "decode_combine on another shape": (
        lambda g: g.group.for_shape(OTHER).decode_combine(torch.ones(4, 16, 16), g.decoded.plan),
        ShapeError,
        ("y:", "L=2 was set by the plan", "here it is 4"),
    ),
    "decode answers with too few rows": (
        decode_combine(lambda g: wide(2, 15, 16)),
        ShapeError,
        ("y:", "rows=16 was set by the plan", "here it is 15"),
    ),
    "decode answers of too many experts": (
        decode_combine(lambda g: wide(3, 16, 16)),
        ShapeError,
        ("y:", "L=2", "here it is 3"),
    ),
    "decode out of another dtype": (
        decode_combine(out=wide(3, 16, dtype=torch.float16)),
        ShapeError,
        ("out:", "torch.float32", "torch.float16"),
    ),
    "received tokens in combine": (
        decode_combine(stats=DecodeStats(received=torch.zeros(2, dtype=torch.int32))),
        ArgumentError,
        ("stats.received:", "None", "decode_dispatch"),
    ),
    # ---------------------------------------------------------------- the group itself
    "mask oneself": (
        lambda g: g.group.mask(g.group.rank),
        ArgumentError,
        ("mask: rank:", "0..1", "other than this rank"),
    ),
    "mask a rank that does not exist": (lambda g: g.group.mask(2), ArgumentError, ("mask: rank:", "0..1", "got 2")),
    "mask a string": (lambda g: g.group.mask("0"), ArgumentError, ("mask: rank:", "0..1", "got '0'")),
    "mask by a boolean": (lambda g: g.group.mask(g.group.rank == 0), ArgumentError, ("mask: rank:", "0..1")),
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
        open_group(MoeShape(3, 2, 16, 8)),
        ConfigError,
        ("num_experts=3", "2 ranks", "use 4 experts"),
    ),
    "a group without a shape": (open_group({"num_experts": 4}), ConfigError, ("shape:", "MoeShape", "dict")),
    "a group without time": (open_group(timeout_s=0), ConfigError, ("timeout_s:", "above 0", "got 0")),
    "a group with a string as timeout": (open_group(timeout_s="5"), ConfigError, ("timeout_s:", "seconds", "'5'")),
    "a group with a flag as timeout": (open_group(timeout_s=True), ConfigError, ("timeout_s:", "seconds", "True")),
    "a group with an infinite timeout": (
        open_group(timeout_s=float("inf")),
        ConfigError,
        ("timeout_s:", "at most 1000000", "inf"),
    ),
    "a group that ignores timeouts": (
        open_group(on_timeout="ignore"),
        ConfigError,
        ("on_timeout:", '"raise" or "mask"', "'ignore'"),
    ),
    "a group on another transport": (
        open_group(transport="rdma"),
        ConfigError,
        ("transport:", '"shared_memory"', "'rdma'"),
    ),
    "a group on another backend": (open_group(backend="tpu"), ConfigError, ("backend:", "'cpu'", "'tpu'")),
    "a transport of the CPU on CUDA": (
        open_group(backend="cuda", transport="shared_memory"),
        ConfigError,
        ("backend='cuda'", "transport='shared_memory'", "leave it out", "backend='cpu'"),
    ),
    "a group of numbers": (
        lambda g: ExpertGroup([0, 1], SHAPE),
        ConfigError,
        ("group:", "ProcessGroup", "None", "list"),
    ),
}


def call_badly(rank, pg, pair, names: list[str]) -> list[str]:
    """Ranks take turns to make a bad call; after each, both make a round trip together."""
    complaints = []
    with pair.open(pg, SHAPE) as group, pair.open(pg, SHAPE) as stranger:
        g = good(pg, group, stranger)
        for i, name in enumerate(names):
            call, kind, words = BAD[name]
            if rank == i % 2:
                words = [word.replace("DEVICE", str(group.device)) for word in words]
                complaints += complaints_about(name, lambda call=call: call_and_wait(g, call), kind, words)
            sent = group.dispatch(g.x * (rank + 1), Routing(g.topk_idx))
            home = group.combine(sent.x, sent.plan)
            if not torch.equal(home.x.cpu(), g.x * (rank + 1) * torch.tensor([[1.0], [1.0], [2.0]])):
                complaints.append(f"{name}: the round trip after it went wrong")
    return complaints


def call_and_wait(g, call) -> None:
    call(g)
    g.group.synchronize()  # a device may report its findings no earlier


def complaints_about(name: str, call, kind: type[Exception], words: list[str]) -> list[str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - compared with the expected one
        if type(error) is not kind:
            return [f"{name}: raised {error!r} instead of {kind.__name__}"]
        return [f"{name}: {word!r} is not in {str(error)!r}" for word in words if word not in str(error)]
    # A call that was sent puts the ranks out of step: there is nothing to go on with.
    raise AssertionError(f"{name}: the call was accepted")
