"""Turn the arguments of a call into a checked, complete request to a backend, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    Encoding,
    RedispatchRequest,
)
from tokenferry.checks import FLOATS, INDICES, ROW_BYTES_MULTIPLE, Checks, NodeLimit, check_flags, check_plain, fits
from tokenferry.errors import ArgumentError, PlanError, ShapeError
from tokenferry.topology import Topology, node_of_ranks
from tokenferry.types import (
    DecodePlan,
    DecodeStats,
    DispatchOptions,
    EncodingName,
    Layout,
    MoeShape,
    Numerics,
    Plan,
    Quantized,
    Routing,
    Scale,
)

_DECODE_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHTS = (torch.float32,)
_RECEIVED, _WAIT_NS = (torch.int32,), (torch.int64,)
_ENCODING_GROUP = 128
_DEFAULT_OPTIONS = DispatchOptions()
_NO_STATS = DecodeStats()


@dataclass(frozen=True, slots=True)
class Resolver:
    """The checks of a group's calls: one method for each call, of the same name.

    Each method starts with bare comparisons, which cost a microsecond and recognise the common valid arguments. If they
    fail, `Checks` decides: it accepts every valid case, and its errors explain the others.
    """

    shape: MoeShape
    topology: Topology
    device: torch.device
    group_key: str
    checks_routing: bool
    _row_dtypes: frozenset[torch.dtype] = field(init=False)
    _node_limit: NodeLimit | None = field(init=False)
    _counters: tuple[tuple[int], tuple[int]] = field(init=False)
    """Shapes of the tensors of `DecodeStats`."""

    def __post_init__(self) -> None:
        fitting = (dtype for dtype in FLOATS if self.shape.hidden * dtype.itemsize % ROW_BYTES_MULTIPLE == 0)
        object.__setattr__(self, "_row_dtypes", frozenset(fitting))
        R = self.topology.num_ranks
        object.__setattr__(self, "_counters", ((self.shape.num_experts // R,), (R,)))
        object.__setattr__(self, "_node_limit", _node_limit(self.shape, self.topology))

    def dispatch(
        self, x: Tensor | Quantized, routing: Routing, options: DispatchOptions | None, num_sms: int | None
    ) -> DispatchRequest:
        """See `ExpertGroup.dispatch`."""
        _check_plain("dispatch", x=x, routing=routing)
        if self.dispatch_looks_right(x, routing, options):
            if not self.checks_routing:
                self._check_choices(self._checks("dispatch"), routing)
            _check_num_sms("dispatch", num_sms)
            return DispatchRequest(self.shape, x, routing, options or _DEFAULT_OPTIONS, num_sms)
        if options is not None and not isinstance(options, DispatchOptions):
            got, inner = type(options).__name__, options if isinstance(options, Layout) else "..."
            raise ArgumentError(
                f"dispatch: options: expected a tokenferry.DispatchOptions, got {got}; pass DispatchOptions({inner})"
            )
        check = self._checks("dispatch")
        num_tokens = _check_rows(check, x)
        self._check_routing(check, routing)
        check.max_tokens("x", num_tokens, self.shape.max_tokens)
        check.no_grad(x=_tensors(x), topk_weights=routing.topk_weights)
        _check_num_sms("dispatch", num_sms)
        return DispatchRequest(self.shape, x, routing, options or _DEFAULT_OPTIONS, num_sms)

    def redispatch(
        self, x: Tensor | Quantized, plan: Plan, topk_weights: Tensor | None, num_sms: int | None
    ) -> RedispatchRequest:
        """See `ExpertGroup.redispatch`."""
        _check_plain("redispatch", x=x, topk_weights=topk_weights)
        self._check_plan("redispatch", plan, Plan)
        if self.rows_look_right(x, plan.num_tokens) and (
            topk_weights is None or fits(topk_weights, (plan.num_tokens, plan.topk_idx.shape[1]), _WEIGHTS, self.device)
        ):
            _check_num_sms("redispatch", num_sms)
            return RedispatchRequest(self.shape, x, topk_weights, plan, num_sms)
        check = self._checks("redispatch").given("the plan", T=plan.num_tokens, K=plan.topk_idx.shape[1])
        _check_rows(check, x)
        if topk_weights is not None:
            check.tensor("topk_weights", topk_weights, "T K", (torch.float32,))
        check.no_grad(x=_tensors(x), topk_weights=topk_weights)
        _check_num_sms("redispatch", num_sms)
        return RedispatchRequest(self.shape, x, topk_weights, plan, num_sms)

    def combine(
        self,
        y: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        bias: Tensor | tuple[Tensor, ...] | None,
        out: Tensor | None,
        num_sms: int | None,
    ) -> CombineRequest:
        """See `ExpertGroup.combine`."""
        _check_plain("combine", y=y, topk_weights=topk_weights, bias=bias, out=out)
        self._check_plan("combine", plan, Plan)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        sums = biases if out is None else (*biases, out)
        if self._combine_looks_right(y, plan, topk_weights) and (
            not sums or (len(biases) <= 2 and self._bias_and_out_look_right(sums, y.dtype, plan.num_tokens))
        ):
            _check_num_sms("combine", num_sms)
            return CombineRequest(y, plan, topk_weights, biases, out, num_sms)
        layout, delivered = plan.options.layout, plan.num_delivered
        num_local = plan.expert_counts.numel()
        check = self._checks("combine").given("the plan", T=plan.num_tokens, K=plan.topk_idx.shape[1])
        if layout is Layout.MASKED:
            rows = "L capacity"
            check.given("the plan", L=num_local, capacity=delivered // num_local)
        else:
            rows = "N" if layout is Layout.ROWS else "rows"
            check.given("the plan", **{rows: delivered})
        check.tensor("y", y, f"{rows} H", FLOATS)
        check.row_bytes("y", y)
        if topk_weights is not None:
            check.tensor("topk_weights", topk_weights, "N K" if layout is Layout.ROWS else rows, (torch.float32,))
        if len(biases) > 2:
            raise ArgumentError(f"combine: bias: expected at most 2 tensors, got {len(biases)}; add them up first")
        for i, one in enumerate(biases):
            check.tensor(f"bias[{i}]", one, "T H", (y.dtype,))
        if out is not None:
            check.tensor("out", out, "T H", (y.dtype,))
        check.no_grad(y=y, topk_weights=topk_weights, bias=biases, out=out)
        _check_num_sms("combine", num_sms)
        return CombineRequest(y, plan, topk_weights, biases, out, num_sms)

    def decode_dispatch(
        self, x: Tensor, routing: Routing, quantize: Scale | None, stats: DecodeStats | None, *, return_hook: bool
    ) -> DecodeDispatchRequest:
        """See `ExpertGroup.decode_dispatch`."""
        _check_plain("decode_dispatch", x=x, routing=routing, stats=stats)
        if type(return_hook) is not bool:
            check_flags("decode_dispatch", return_hook=return_hook)
        if (stats is None or self.stats_look_right(stats)) and self.decode_dispatch_looks_right(x, routing, quantize):
            if not self.checks_routing:
                self._check_choices(self._checks("decode_dispatch"), routing)
            return DecodeDispatchRequest(self.shape, x, routing, quantize, stats or _NO_STATS, return_hook)
        check = self._checks("decode_dispatch")
        check.tensor("x", x, "T H", _DECODE_FLOATS)
        check.row_bytes("x", x)
        if quantize is not None and not isinstance(quantize, Scale):
            raise ArgumentError(f"decode_dispatch: quantize: expected a tokenferry.Scale or None, got {quantize!r}")
        if quantize is not None and self.shape.hidden % ROW_BYTES_MULTIPLE:
            raise ShapeError(
                f"decode_dispatch: x: an FP8 row of H={self.shape.hidden} is {self.shape.hidden} bytes, expected a "
                f"multiple of {ROW_BYTES_MULTIPLE}; pad the hidden size"
            )
        self._check_routing(check, routing)
        check.max_tokens("x", x.shape[0], self.shape.max_tokens)
        stats = _check_stats(check, stats)
        check.no_grad(x=x, topk_weights=routing.topk_weights)
        return DecodeDispatchRequest(self.shape, x, routing, quantize, stats, return_hook)

    def decode_combine(  # seven parameters, like the call
        self,
        y: Tensor,
        plan: DecodePlan,
        numerics: Numerics,
        encoding: EncodingName,
        out: Tensor | None,
        stats: DecodeStats | None,
        *,
        return_hook: bool,
    ) -> DecodeCombineRequest:
        """See `ExpertGroup.decode_combine`."""
        if type(return_hook) is not bool:
            check_flags("decode_combine", return_hook=return_hook)
        self._check_plan("decode_combine", plan, DecodePlan)
        _check_plain("decode_combine", y=y, out=out, stats=stats, **{"plan.topk_weights": plan.topk_weights})
        fast = numerics == "fast"
        if (
            stats is None
            and encoding == "same"
            and (fast or numerics == "exact")
            and self._decode_combine_looks_right(y, plan, out, fast)
        ):
            return DecodeCombineRequest(self.shape, y, plan, fast, Encoding.same, out, _NO_STATS, return_hook)
        num_local, num_rows = plan.src_token.shape
        check = self._checks("decode_combine")
        check.given("the plan", T=plan.num_tokens, K=plan.topk_idx.shape[1], L=num_local)
        check.given("the plan (R * M)", rows=num_rows)
        if numerics not in ("exact", "fast"):
            raise ArgumentError(f'decode_combine: numerics: expected "exact" or "fast", got {numerics!r}')
        _check_encoding(encoding, self.shape.hidden)
        if plan.topk_weights is None:
            raise PlanError(
                "decode_combine: plan: it has no topk_weights; pass them in Routing to decode_dispatch, "
                "or dataclasses.replace(plan, topk_weights=...) for numerics='exact'"
            )
        check.tensor("plan.topk_weights", plan.topk_weights, "T K", (torch.float32,))
        if fast and plan.row_weights is None:
            raise PlanError("decode_combine: plan: numerics='fast' needs the weights in Routing at decode_dispatch")
        check.tensor("y", y, "L rows H", _DECODE_FLOATS)
        check.row_bytes("y", y)
        if out is not None:
            check.tensor("out", out, "T H", (y.dtype,))
        stats = _check_stats(check, stats)
        if stats.received is not None:
            raise ArgumentError("decode_combine: stats.received: expected None, only decode_dispatch receives tokens")
        check.no_grad(y=y, topk_weights=plan.topk_weights, out=out)
        return DecodeCombineRequest(self.shape, y, plan, fast, Encoding[encoding], out, stats, return_hook)

    def empty_rows(self, plan: Plan, dtype: torch.dtype) -> None:
        """See `ExpertGroup.empty_rows`."""
        self._check_plan("empty_rows", plan, Plan)
        if dtype not in FLOATS:
            raise ArgumentError(f"empty_rows: dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}")

    def dispatch_looks_right(self, x: Tensor | Quantized, routing: Routing, options: DispatchOptions | None) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        if type(routing) is not Routing or not (options is None or type(options) is DispatchOptions):
            return False
        topk_idx, weights, device = routing.topk_idx, routing.topk_weights, self.device
        if type(topk_idx) is not Tensor or topk_idx.ndim != 2:
            return False
        num_tokens = topk_idx.shape[0]
        shape = (num_tokens, self.shape.top_k)
        return (
            num_tokens <= self.shape.max_tokens
            and self.rows_look_right(x, num_tokens)
            and fits(topk_idx, shape, INDICES, device)
            and (weights is None or fits(weights, shape, _WEIGHTS, device))
        )

    def rows_look_right(self, x: Tensor | Quantized, num_tokens: int) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        if type(x) is Tensor:
            return fits(x, (num_tokens, self.shape.hidden), self._row_dtypes, self.device)
        if type(x) is not Quantized or type(x.data) is not Tensor or type(x.scale) is not Tensor:
            return False
        data, scale, device = x.data, x.scale, self.device
        return (
            data.layout is scale.layout is torch.strided
            and not (data.is_nested or scale.is_nested)  # it has no shape
            and data.ndim == scale.ndim == 2
            and data.shape[0] == scale.shape[0] == num_tokens
            and data.shape[1] * data.element_size() % ROW_BYTES_MULTIPLE == 0
            and data.device == scale.device == device
            and data.is_contiguous()
            and not ((data.requires_grad or scale.requires_grad) and torch.is_grad_enabled())
        )

    def decode_rows_look_right(self, y: Tensor, rows: tuple[int, ...]) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        return self.sums_look_right(y, rows) and y.dtype in _DECODE_FLOATS

    def out_looks_right(self, out: Tensor, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        return fits(out, (num_tokens, self.shape.hidden), (dtype,), self.device)

    def sums_look_right(self, y: Tensor, rows: tuple[int, ...]) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        return fits(y, (*rows, self.shape.hidden), self._row_dtypes, self.device)

    def weights_look_right(self, weights: Tensor, shape: tuple[int, ...]) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        return fits(weights, shape, _WEIGHTS, self.device)

    def stats_look_right(self, stats: DecodeStats) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        if type(stats) is not DecodeStats:
            return False
        received, wait_ns, (local, ranks) = stats.received, stats.wait_ns, self._counters
        return (received is None or fits(received, local, _RECEIVED, self.device)) and (
            wait_ns is None or fits(wait_ns, ranks, _WAIT_NS, self.device)
        )

    def _combine_looks_right(self, y: Tensor, plan: Plan, topk_weights: Tensor | None) -> bool:
        layout, delivered = plan.options.layout, plan.num_delivered
        rows: tuple[int, ...] = (delivered,)
        if layout is Layout.MASKED:
            num_local = plan.expert_counts.shape[0]
            rows = (num_local, delivered // num_local)
        if not self.sums_look_right(y, rows):
            return False
        if topk_weights is None:
            return True
        shape = (delivered, plan.topk_idx.shape[1]) if layout is Layout.ROWS else rows
        return fits(topk_weights, shape, _WEIGHTS, self.device)

    def decode_dispatch_looks_right(self, x: Tensor, routing: Routing, quantize: Scale | None) -> bool:
        """See `tokenferry.backends.base.QuickChecks`."""
        return (
            type(x) is Tensor
            and x.dtype in _DECODE_FLOATS
            and (quantize is None or (type(quantize) is Scale and self.shape.hidden % ROW_BYTES_MULTIPLE == 0))
            and self.dispatch_looks_right(x, routing, None)
        )

    def _decode_combine_looks_right(self, y: Tensor, plan: DecodePlan, out: Tensor | None, fast: bool) -> bool:
        weights, device = plan.topk_weights, self.device
        return (
            fits(weights, (plan.num_tokens, plan.topk_idx.shape[1]), _WEIGHTS, device)
            and not (fast and plan.row_weights is None)
            and self.decode_rows_look_right(y, tuple(plan.src_token.shape))
            and (out is None or self.out_looks_right(out, plan.num_tokens, y.dtype))
        )

    def _bias_and_out_look_right(self, sums: tuple[Tensor, ...], dtype: torch.dtype, num_tokens: int) -> bool:
        shape, dtypes = (num_tokens, self.shape.hidden), (dtype,)
        return all(fits(one, shape, dtypes, self.device) for one in sums)

    def _checks(self, call: str) -> Checks:
        num_ranks = self.topology.num_ranks
        num_local = self.shape.num_experts // num_ranks
        return Checks(call, self.device).given(
            "the group", K=self.shape.top_k, H=self.shape.hidden, L=num_local, R=num_ranks
        )

    def _check_routing(self, check: Checks, routing: Routing) -> None:
        check.routing(routing, Routing)
        check.tensor("topk_idx", routing.topk_idx, "T K", INDICES)
        if routing.topk_weights is not None:
            check.tensor("topk_weights", routing.topk_weights, "T K", (torch.float32,))
        if not self.checks_routing:
            self._check_choices(check, routing)

    def _check_choices(self, check: Checks, routing: Routing) -> None:
        check.experts("topk_idx", routing.topk_idx, self.shape.num_experts)
        if self._node_limit is not None:
            check.nodes("topk_idx", routing.topk_idx, self._node_limit)

    def _check_plan(self, call: str, plan: Plan | DecodePlan, kind: type) -> None:
        if not isinstance(plan, kind):
            maker = "decode_dispatch" if kind is DecodePlan else "dispatch"
            got = type(plan).__name__
            raise PlanError(f"{call}: plan: expected a {kind.__name__}, got {got}; pass the plan of {maker}")
        if plan.group_key != self.group_key:
            where = f"group {plan.group_key}, this is group {self.group_key}"
            raise PlanError(f"{call}: plan: it was made by {where}; use the group that dispatched")


def _check_plain(call: str, **arguments: object) -> None:
    """Raise for a tensor whose memory does not hold its values, or not all of it; other checks say what else is wrong.

    The fast path of a backend leaves out negated and conjugated ones: that would cost a twentieth of a call.
    """
    for name, value in arguments.items():
        for part, one in _parts(name, value).items():
            check_plain(call, part, one)


def _parts(name: str, value: object) -> dict[str, object]:
    """Return what an argument holds, by the names that errors have for it."""
    if isinstance(value, tuple):
        return {f"{name}[{i}]": one for i, one in enumerate(value)}
    if isinstance(value, Routing | Quantized | DecodeStats):
        start = "" if isinstance(value, Routing) else f"{name}."
        return {start + part.name: getattr(value, part.name) for part in fields(value)}
    return {name: value}


def _node_limit(shape: MoeShape, topology: Topology) -> NodeLimit | None:
    """Return the limit of nodes of a token; None if no routing can exceed it."""
    if shape.max_nodes is None or shape.max_nodes >= min(topology.num_nodes, shape.top_k):
        return None
    num_local = shape.num_experts // topology.num_ranks
    return NodeLimit(shape.max_nodes, node_of_ranks(topology.nodes), num_local)


def _check_encoding(encoding: EncodingName, hidden: int) -> None:
    if not isinstance(encoding, str) or encoding not in Encoding.__members__:
        names = ", ".join(f'"{name}"' for name in Encoding.__members__)
        raise ArgumentError(f"decode_combine: encoding: expected one of {names}, got {encoding!r}")
    if Encoding[encoding] is not Encoding.same and hidden % _ENCODING_GROUP:
        raise ArgumentError(
            f"decode_combine: encoding: {encoding!r} works on groups of {_ENCODING_GROUP} columns, H={hidden} is not a "
            'multiple of it; pad the hidden size or use encoding="same"'
        )


def _check_num_sms(call: str, num_sms: int | None) -> None:
    if num_sms is not None and (type(num_sms) is not int or num_sms < 1):
        raise ArgumentError(f"{call}: num_sms: expected an integer of at least 1 or None, got {num_sms!r}")


def _check_rows(check: Checks, x: Tensor | Quantized) -> int:
    """Check the rows, and return T."""
    if isinstance(x, Quantized):
        check.tensor("x.data", x.data, "T W", None)
        check.row_bytes("x.data", x.data)
        check.tensor("x.scale", x.scale, "T S", None, contiguous=False)
        return x.data.shape[0]
    check.tensor("x", x, "T H", FLOATS, or_else=", or pass Quantized(data, scale) to move packed rows as they are")
    check.row_bytes("x", x)
    return x.shape[0]


def _tensors(x: Tensor | Quantized) -> tuple[Tensor, ...]:
    return (x.data, x.scale) if isinstance(x, Quantized) else (x,)


def _check_stats(check: Checks, stats: DecodeStats | None) -> DecodeStats:
    if stats is None:
        return _NO_STATS
    if not isinstance(stats, DecodeStats):
        raise ArgumentError(f"{check.call}: stats: expected a tokenferry.DecodeStats, got {type(stats).__name__}")
    if stats.received is not None:
        check.tensor("stats.received", stats.received, "L", (torch.int32,))
    if stats.wait_ns is not None:
        check.tensor("stats.wait_ns", stats.wait_ns, "R", (torch.int64,))
    return stats
