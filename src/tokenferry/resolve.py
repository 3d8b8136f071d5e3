"""Check and resolve: from the arguments of a call to a request that a backend can trust, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry import env
from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    RedispatchRequest,
    Resolved,
)
from tokenferry.checks import FLOATS, INDICES, ROW_BYTES_MULTIPLE, Checks
from tokenferry.errors import ArgumentError, ConfigError, PlanError, ShapeError
from tokenferry.words import (
    DecodePlan,
    DecodeStats,
    Delivery,
    Layout,
    MoeShape,
    Plan,
    Quantized,
    Routing,
    Scale,
)

_DECODE_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def resolve_options(
    group: dist.ProcessGroup | None,
    shape: MoeShape,
    backend: str,
    wire: str,
    timeout_s: float | None,
    on_timeout: str,
) -> Resolved:
    """Check the options of a group, and fill in what the environment says; see `ExpertGroup`."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        got = type(group).__name__
        raise ConfigError(f"ExpertGroup: group: expected a torch.distributed.ProcessGroup or None, got {got}")
    settings = env.read()
    timeout_s = settings.timeout_s if timeout_s is None else timeout_s
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise ConfigError(f"ExpertGroup: timeout_s: expected a finite number of seconds above 0, got {timeout_s!r}")
    if on_timeout not in ("raise", "mask"):
        raise ConfigError(f'ExpertGroup: on_timeout: expected "raise" or "mask", got {on_timeout!r}')
    if wire not in ("auto", "local", "group"):
        raise ConfigError(f'ExpertGroup: wire: expected "auto", "local" or "group", got {wire!r}')
    check_divides("ExpertGroup", shape, 1 if group is None else group.size())
    backend = settings.backend if backend == "auto" else backend
    wire = settings.wire if wire == "auto" else wire
    return Resolved(shape, backend, wire, float(timeout_s), mask_on_timeout=on_timeout == "mask")


def check_divides(call: str, shape: MoeShape, num_ranks: int) -> None:
    """Raise ConfigError unless ``shape`` is a MoeShape and R divides E."""
    if not isinstance(shape, MoeShape):
        raise ConfigError(f"{call}: shape: expected a MoeShape, got {type(shape).__name__}")
    if shape.num_experts % num_ranks:
        raise ConfigError(
            f"{call}: num_experts={shape.num_experts} is no multiple of the group's {num_ranks} ranks; "
            f"use {-(-shape.num_experts // num_ranks) * num_ranks} experts, or another number of ranks"
        )


@dataclass(frozen=True, slots=True)
class Resolver:
    """What a group's arguments are checked against; one method a call, named like it."""

    shape: MoeShape
    num_ranks: int
    device: torch.device
    group_key: str

    def dispatch(self, x: Tensor | Quantized, routing: Routing, delivery: Delivery | None) -> DispatchRequest:
        """See `ExpertGroup.dispatch`."""
        if delivery is not None and not isinstance(delivery, Delivery):
            raise ArgumentError(f"dispatch: delivery: expected a tokenferry.Delivery, got {type(delivery).__name__}")
        check = self._checks("dispatch")
        num_tokens = _check_rows(check, x)
        self._check_routing(check, routing)
        check.max_tokens("x", num_tokens, self.shape.max_tokens)
        check.no_grad(x=_tensors(x), topk_weights=routing.topk_weights)
        return DispatchRequest(self.shape, x, routing, delivery or Delivery())

    def redispatch(self, x: Tensor | Quantized, plan: Plan, topk_weights: Tensor | None) -> RedispatchRequest:
        """See `ExpertGroup.redispatch`."""
        self._check_plan("redispatch", plan, Plan)
        check = self._checks("redispatch", T=(plan.num_tokens, "the plan"), K=(plan.topk_idx.shape[1], "the plan"))
        _check_rows(check, x)
        if topk_weights is not None:
            check.tensor("topk_weights", topk_weights, "T K", (torch.float32,))
        check.no_grad(x=_tensors(x), topk_weights=topk_weights)
        return RedispatchRequest(self.shape, x, topk_weights, plan)

    def combine(
        self,
        y: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        bias: Tensor | tuple[Tensor, ...] | None,
        out: Tensor | None,
    ) -> CombineRequest:
        """See `ExpertGroup.combine`."""
        self._check_plan("combine", plan, Plan)
        layout, delivered = plan.delivery.layout, plan.num_delivered
        num_local = plan.expert_counts.numel()
        sizes = {"T": (plan.num_tokens, "the plan"), "K": (plan.topk_idx.shape[1], "the plan")}
        if layout is Layout.MASKED:
            rows = "L capacity"
            sizes |= {"L": (num_local, "the plan"), "capacity": (delivered // num_local, "the plan")}
        else:
            rows = "N" if layout is Layout.ROWS else "rows"
            sizes[rows] = (delivered, "the plan")
        check = self._checks("combine", **sizes)
        check.tensor("y", y, f"{rows} H", FLOATS)
        check.row_bytes("y", y)
        if topk_weights is not None:
            check.tensor("topk_weights", topk_weights, "N K" if layout is Layout.ROWS else rows, (torch.float32,))
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        if len(biases) > 2:
            raise ArgumentError(f"combine: bias: expected at most 2 tensors, got {len(biases)}; add them up first")
        for i, one in enumerate(biases):
            check.tensor(f"bias[{i}]", one, "T H", (y.dtype,))
        if out is not None:
            check.tensor("out", out, "T H", (y.dtype,))
        check.no_grad(y=y, topk_weights=topk_weights, bias=biases, out=out)
        return CombineRequest(y, plan, topk_weights, biases, out)

    def decode_dispatch(
        self, x: Tensor, routing: Routing, fp8: Scale | None, stats: DecodeStats | None, *, return_hook: bool
    ) -> DecodeDispatchRequest:
        """See `ExpertGroup.decode_dispatch`."""
        check = self._checks("decode_dispatch")
        check.tensor("x", x, "T H", _DECODE_FLOATS)
        check.row_bytes("x", x)
        if fp8 is not None and not isinstance(fp8, Scale):
            raise ArgumentError(f"decode_dispatch: fp8: expected a tokenferry.Scale or None, got {fp8!r}")
        if fp8 is not None and self.shape.hidden % ROW_BYTES_MULTIPLE:
            raise ShapeError(
                f"decode_dispatch: x: an FP8 row of H={self.shape.hidden} is {self.shape.hidden} bytes, expected a "
                f"multiple of {ROW_BYTES_MULTIPLE}; pad the hidden size"
            )
        self._check_routing(check, routing)
        check.max_tokens("x", x.shape[0], self.shape.max_tokens)
        stats = _check_stats(check, stats)
        check.no_grad(x=x, topk_weights=routing.topk_weights)
        return DecodeDispatchRequest(self.shape, x, routing, fp8, stats, return_hook)

    def decode_combine(
        self,
        y: Tensor,
        plan: DecodePlan,
        numerics: str,
        out: Tensor | None,
        stats: DecodeStats | None,
        *,
        return_hook: bool,
    ) -> DecodeCombineRequest:
        """See `ExpertGroup.decode_combine`."""
        self._check_plan("decode_combine", plan, DecodePlan)
        num_local, num_rows = plan.src_token.shape
        sizes = {
            "T": (plan.num_tokens, "the plan"),
            "K": (plan.topk_idx.shape[1], "the plan"),
            "L": (num_local, "the plan"),
            "rows": (num_rows, "the plan (R * M)"),
        }
        check = self._checks("decode_combine", **sizes)
        if numerics not in ("exact", "fast"):
            raise ArgumentError(f'decode_combine: numerics: expected "exact" or "fast", got {numerics!r}')
        if plan.topk_weights is None:
            raise PlanError(
                "decode_combine: plan: it has no topk_weights; pass them in Routing to decode_dispatch, "
                "or dataclasses.replace(plan, topk_weights=...) for numerics='exact'"
            )
        check.tensor("plan.topk_weights", plan.topk_weights, "T K", (torch.float32,))
        if numerics == "fast" and plan.row_weights is None:
            raise PlanError("decode_combine: plan: numerics='fast' needs the weights in Routing at decode_dispatch")
        check.tensor("y", y, "L rows H", _DECODE_FLOATS)
        check.row_bytes("y", y)
        if out is not None:
            check.tensor("out", out, "T H", (y.dtype,))
        stats = _check_stats(check, stats)
        if stats.received is not None:
            raise ArgumentError("decode_combine: stats.received: expected None, only decode_dispatch receives tokens")
        check.no_grad(y=y, topk_weights=plan.topk_weights, out=out)
        return DecodeCombineRequest(self.shape, y, plan, numerics == "fast", out, stats, return_hook)

    def _checks(self, call: str, **sizes: tuple[int, str]) -> Checks:
        group = {
            "K": (self.shape.top_k, "the group"),
            "H": (self.shape.hidden, "the group"),
            "L": (self.shape.num_experts // self.num_ranks, "the group"),
            "R": (self.num_ranks, "the group"),
        }
        return Checks(call, self.device, {**group, **sizes})

    def _check_routing(self, check: Checks, routing: Routing) -> None:
        if not isinstance(routing, Routing):
            raise ArgumentError(f"{check.call}: routing: expected a tokenferry.Routing, got {type(routing).__name__}")
        check.tensor("topk_idx", routing.topk_idx, "T K", INDICES)
        if routing.topk_weights is not None:
            check.tensor("topk_weights", routing.topk_weights, "T K", (torch.float32,))
        check.experts("topk_idx", routing.topk_idx, self.shape.num_experts)

    def _check_plan(self, call: str, plan: Plan | DecodePlan, kind: type) -> None:
        if not isinstance(plan, kind):
            maker = "decode_dispatch" if kind is DecodePlan else "dispatch"
            got = type(plan).__name__
            raise PlanError(f"{call}: plan: expected a {kind.__name__}, got {got}; pass the plan of {maker}")
        if plan.group_key != self.group_key:
            raise PlanError(
                f"{call}: plan: it was made by group {plan.group_key}, this is group {self.group_key}; "
                "use the group that dispatched"
            )


def _check_rows(check: Checks, x: Tensor | Quantized) -> int:
    """Check rows and return T."""
    if isinstance(x, Quantized):
        check.tensor("x.data", x.data, "T W", None)
        check.row_bytes("x.data", x.data)
        check.tensor("x.scale", x.scale, "T S", None, contiguous=False)
        return x.data.shape[0]
    check.tensor("x", x, "T H", FLOATS)
    check.row_bytes("x", x)
    return x.shape[0]


def _tensors(x: Tensor | Quantized) -> tuple[Tensor, ...]:
    return (x.data, x.scale) if isinstance(x, Quantized) else (x,)


def _check_stats(check: Checks, stats: DecodeStats | None) -> DecodeStats:
    if stats is None:
        return DecodeStats()
    if not isinstance(stats, DecodeStats):
        raise ArgumentError(f"{check.call}: stats: expected a tokenferry.DecodeStats, got {type(stats).__name__}")
    if stats.received is not None:
        check.tensor("stats.received", stats.received, "L", (torch.int32,))
    if stats.wait_ns is not None:
        check.tensor("stats.wait_ns", stats.wait_ns, "R", (torch.int64,))
    return stats
