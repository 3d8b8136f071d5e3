"""One program with a call of every kind, and the states of torch that must change none of its results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.sharded import local_parts
from tokenferry import (
    DecodeDispatched,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    Quantized,
    Routing,
    Scale,
    autograd,
)
from tokenferry.compat.deep_ep import Buffer
from tokenferry.nn import GroupLimit, MoELayer, Router
from tokenferry.testing.compare import same_bits

RANKS = 2
SHAPE = MoeShape(num_experts=4, top_k=2, hidden=256, max_tokens=4)
L = SHAPE.num_experts // RANKS
TOKENS = (4, 3)
OPTIONS = (
    DispatchOptions(),
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True),
    DispatchOptions(Layout.EXPERTS, alignment=2, zero_padding=True, counts="device"),
    DispatchOptions(Layout.MASKED, zero_padding=True),
    DispatchOptions(Layout.MASKED, zero_padding=True, counts="device", capacity=6),
)
Results = dict[str, Tensor]


# ---------------------------------------------------------------------- states


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """Refuse what is not deterministic, and fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Not cuBLAS, which is deterministic enough without its environment variable: one call, one stream.
            warnings.filterwarnings("error", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Contexts = tuple[AbstractContextManager[Any], ...]


@dataclass(frozen=True)
class State:
    """A state of torch.

    Attributes:
        process: Makes contexts of the whole process.
        thread: Makes contexts of one thread, from the type of the group's device.
    """

    process: Callable[[], Contexts]
    thread: Callable[[str], Contexts]

    @contextmanager
    def of_the_process(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.process():
                stack.enter_context(context)
            yield

    @contextmanager
    def of_a_thread(self, device: str) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.thread(device):
                stack.enter_context(context)
            yield


def _nothing(*_: str) -> tuple[()]:
    return ()


STATES = {
    "float64, set_default_device": State(lambda: (default_dtype(torch.float64),), lambda _: (default_device("meta"),)),
    "bfloat16, with device": State(lambda: (default_dtype(torch.bfloat16),), lambda _: (torch.device("meta"),)),
    "autocast": State(_nothing, lambda device: (torch.autocast(device, torch.bfloat16),)),
    "inference": State(_nothing, lambda _: (torch.inference_mode(),)),
    "deterministic, no_grad": State(lambda: (deterministic(), threads(3)), lambda _: (torch.no_grad(),)),
}
"""On "meta" nothing can be computed, so an allocation without a device does not go unnoticed."""
CUDA_STATES = {
    **STATES,
    "cuda": State(lambda: (default_dtype(torch.bfloat16),), lambda _: (default_device("cuda"),)),
}
"""As programs written for GPUs begin."""


# ---------------------------------------------------------------------- the program


def calls(group: ExpertGroup, pg: Any) -> Results:
    """Run a call of every kind; return what is defined of its results. Collective."""
    results: Results = {}
    group.warmup()
    for options in OPTIONS:
        name = f"{options.layout.value} {options.counts} "
        results |= {name + key: value for key, value in _throughput(group, options).items()}
    results |= _quantized(group)
    for quantize in (None, *Scale):
        results |= {f"decode {quantize} {key}": value for key, value in _decode(group, quantize).items()}
    if group.transport != "nccl":  # which has no masks
        results |= {f"masked {key}": value for key, value in _masked(group).items()}
        group.synchronize()
        pg.barrier().wait()
        for rank in range(RANKS):
            group.mask(rank, masked=False)  # resynchronises, as after a rank was lost
        pg.barrier().wait()
    return results | {f"after {key}": value for key, value in _decode(group, Scale.FLOAT32).items()}


def numbers(group: ExpertGroup, *shape: int, dtype: torch.dtype = torch.bfloat16, salt: int = 0) -> Tensor:
    """Random numbers that depend on the rank."""
    draws = torch.Generator(device="cpu").manual_seed(group.rank * 64 + salt)
    return torch.randn(*shape, generator=draws, dtype=torch.float32, device="cpu").to(group.device, dtype)


def routing_of(group: ExpertGroup) -> Routing:
    tokens = TOKENS[group.rank]
    weights = numbers(group, tokens, SHAPE.top_k, dtype=torch.float32, salt=1)
    chosen = torch.tensor([[0, 3], [2, 1], [3, -1], [1, 1]], dtype=torch.int64, device=group.device)
    return Routing((chosen[:tokens] + group.rank).clamp(max=3).contiguous(), weights)


def _throughput(group: ExpertGroup, options: DispatchOptions) -> Results:
    x, routing = numbers(group, TOKENS[group.rank], SHAPE.hidden), routing_of(group)
    sent = group.dispatch(x, routing, options=options)
    results = _delivered(sent)
    again = group.redispatch(-x, sent.plan, topk_weights=routing.topk_weights)
    results |= {f"again {key}": value for key, value in _delivered(again).items()}
    own = group.empty_rows(sent.plan, torch.bfloat16)
    assert (own.dtype, own.shape, own.device.type) == (torch.bfloat16, sent.x.shape, group.device.type)
    own.copy_(sent.x)
    for y in (own, sent.x.float() / 3, sent.x.to(torch.float16)):
        bias = numbers(group, *x.shape, dtype=y.dtype, salt=2)
        home = group.combine(y, sent.plan, topk_weights=sent.topk_weights, bias=(bias, bias))
        results |= {f"home {y.dtype}": home.x, f"weights {y.dtype}": home.topk_weights}
    out = torch.empty_like(x)
    assert group.combine(own, sent.plan, out=out).x is out
    return {**results, "out": out}


def _delivered(sent: Dispatched[Any]) -> Results:
    """Return rows that hold data, and the counts."""
    rows = {"x": sent.x} if isinstance(sent.x, Tensor) else {"data": sent.x.data, "scale": sent.x.scale}
    if sent.topk_weights is not None:
        rows["weights"] = sent.topk_weights
    if sent.plan.options.layout is Layout.ROWS:
        there = int(sent.plan.src_counts.sum())
        rows = {key: value[:there] for key, value in (rows | {"topk_idx": sent.topk_idx}).items()}
    offsets = {} if sent.expert_offsets is None else {"offsets": sent.expert_offsets}
    there = int(sent.plan.src_counts.sum())
    sources = {"src_token": sent.plan.src_token[:there], "src_rank": sent.plan.src_rank[:there]}
    return {**rows, **offsets, **sources, "counts": sent.expert_counts}


def _quantized(group: ExpertGroup) -> Results:
    data = numbers(group, TOKENS[group.rank], SHAPE.hidden).to(torch.float8_e4m3fn)
    scale = numbers(group, TOKENS[group.rank], SHAPE.hidden // 128, dtype=torch.float32, salt=3)
    results = {}
    for options in (OPTIONS[0], OPTIONS[2]):
        sent = group.dispatch(Quantized(data, scale), routing_of(group), options=options)
        results |= {f"quantized {options.layout.value} {key}": value for key, value in _delivered(sent).items()}
    return results


def _decode(group: ExpertGroup, quantize: Scale | None) -> Results:
    x, routing = numbers(group, TOKENS[group.rank], SHAPE.hidden), routing_of(group)
    received = torch.zeros(L, dtype=torch.int32, device=group.device)
    waited = torch.zeros(RANKS, dtype=torch.int64, device=group.device)
    sent = group.decode_dispatch(
        x, routing, quantize=quantize, stats=DecodeStats(received, waited), return_hook=quantize is None
    )
    sent.hook()
    results = {"received": received, **_decoded(sent)}
    if quantize is None:
        for encoding in ("same", "fp8", "logfmt10"):
            for numerics in ("exact", "fast"):
                home = group.decode_combine(sent.x, sent.plan, numerics=numerics, encoding=encoding)
                results[f"{encoding} {numerics}"] = home.x
        narrow = sent.x.to(torch.float16)
        for numerics in ("exact", "fast"):
            home = group.decode_combine(narrow, sent.plan, numerics=numerics, return_hook=True)
            home.hook()
            results[f"float16 {numerics}"] = home.x
    return results


def _decoded(sent: DecodeDispatched[Any]) -> Results:
    """Return the rows that hold data, of each expert."""
    tensors = {"x": sent.x} if isinstance(sent.x, Tensor) else {"data": sent.x.data, "scale": sent.x.scale}
    tensors |= {"row_weights": sent.plan.row_weights, "src_token": sent.plan.src_token}
    rows = {key: _of_experts(value, sent.expert_counts) for key, value in tensors.items()}
    return {**rows, "counts": sent.expert_counts}


def _of_experts(rows: Tensor, counts: Tensor) -> Tensor:
    """Return the first rows of each expert, so many as there are. Autocast would refuse to join rows of FP8."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([rows[expert, :count] for expert, count in enumerate(counts.tolist())])


def _masked(group: ExpertGroup) -> Results:
    other = 1 - group.rank
    group.mask(other)
    sent = group.decode_dispatch(numbers(group, TOKENS[group.rank], SHAPE.hidden), routing_of(group))
    home = group.decode_combine(sent.x, sent.plan)
    results = {**_decoded(sent), "home": home.x}
    group.mask(other, masked=False)
    return results


def gradients(group: ExpertGroup) -> Results:
    """Run routers and a layer, with a backward pass where the state has one. Collective."""
    with_grad = torch.is_grad_enabled()
    results: Results = {}
    x = numbers(group, TOKENS[group.rank], SHAPE.hidden).requires_grad_(with_grad)
    for limit in (None, GroupLimit(2, 1)):
        router = Router(SHAPE.hidden, SHAPE.num_experts, SHAPE.top_k, group_limit=limit, seed=3)
        assert router.weight.dtype == torch.float32
        router = _placed(router, group.device, limit)
        routing = router(x)
        results |= {f"{limit} idx": routing.topk_idx, f"{limit} weights": routing.topk_weights}
        if limit is not None:
            router.update_bias(torch.arange(SHAPE.num_experts, dtype=torch.int32, device=group.device))
            results["bias"] = router.bias
        if with_grad:
            routing.topk_weights.square().sum().backward()
            results[f"{limit} gradient"] = router.weight.grad
    layer = MoELayer(group, 32, seed=5, dtype=torch.bfloat16)
    if layer.experts.gate.device.type == "meta":
        layer.to_empty(device=group.device)
        layer.reset_parameters()
    results |= local_parts({name: parameter.detach() for name, parameter in layer.named_parameters()})
    out = layer(x)
    results |= {"out": out, "expert_counts": layer.expert_counts}
    if with_grad:
        out.float().square().sum().backward()
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
        results |= local_parts(gradients)
        results["gradient of x"] = x.grad
    for options in OPTIONS:
        results |= {f"{options.layout.value} {options.counts} {k}": v for k, v in _through(group, options).items()}
    return {name: value.detach() for name, value in results.items()}


def _placed(router: Router, device: torch.device, limit: GroupLimit | None) -> Router:
    """Return the router on the group's device. It was made on torch's default device, which may have no values."""
    assert router.weight.device.type == torch.get_default_device().type
    if router.weight.device.type != "meta":
        return router.to(device)
    with device:
        return Router(SHAPE.hidden, SHAPE.num_experts, SHAPE.top_k, group_limit=limit, seed=3)


def _through(group: ExpertGroup, options: DispatchOptions) -> Results:
    """Differentiable calls."""
    routing, with_grad = routing_of(group), torch.is_grad_enabled()
    x = numbers(group, TOKENS[group.rank], SHAPE.hidden, dtype=torch.float32).requires_grad_(with_grad)
    weights = routing.topk_weights.requires_grad_(with_grad)
    sent = autograd.dispatch(group, x, routing, options=options)
    home = autograd.combine(group, sent.x * 3, sent.plan, topk_weights=sent.topk_weights, bias=x)
    if with_grad:
        (home.x.square().sum() + home.topk_weights.square().sum()).backward()
        return {"home": home.x, "weights": home.topk_weights, "of x": x.grad, "of weights": weights.grad}
    return {"home": home.x, "weights": home.topk_weights}


def deep_ep(pg: Any) -> Results:
    """The same program in DeepEP's API. Collective."""
    buffer = Buffer(pg, 1 << 20, low_latency_mode=True, explicitly_destroy=True, enable_shrink=pg.size() > 1)
    group = buffer._experts
    x, routing = numbers(group, TOKENS[group.rank], SHAPE.hidden), routing_of(group)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(routing.topk_idx, SHAPE.num_experts)
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    results = dict(layout)
    rows, idx, weights, counts, handle, _ = buffer.dispatch(
        x, topk_idx=routing.topk_idx, topk_weights=routing.topk_weights, **layout
    )
    assert len(counts) == L
    results |= {"rows": rows, "idx": idx, "weights": weights}
    results["cached"] = buffer.dispatch(x * 2, handle=handle)[0]
    results["home"], results["home weights"], _ = buffer.combine(rows, handle, weights, x)
    results["without experts"] = buffer.dispatch(x, **layout)[0]
    worst = buffer.dispatch(
        x, topk_idx=routing.topk_idx, topk_weights=routing.topk_weights, num_worst_tokens=8, **layout
    )
    results["worst idx"], results["worst weights"] = worst[1:3]
    for cast in ({"use_fp8": False}, {}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}):
        got = buffer.low_latency_dispatch(x, routing.topk_idx, SHAPE.max_tokens, SHAPE.num_experts, **cast)
        parts = got[0] if isinstance(got[0], tuple) else (got[0],)
        for i, part in enumerate(parts):
            results[f"{cast} {i}"] = _of_experts(part, got[1])
        if "use_fp8" in cast:
            own = buffer.get_next_low_latency_combine_buffer(got[2])
            own.copy_(got[0])
            for how in ({}, {"use_logfmt": True}, {"zero_copy": True}):
                home = buffer.low_latency_combine(own, routing.topk_idx, routing.topk_weights, got[2], **how)
                results[f"home {how}"] = home[0]
    results["mask"] = torch.full((RANKS,), 7, dtype=torch.int32, device=group.device)
    buffer.low_latency_query_mask_buffer(results["mask"])
    local = buffer.get_local_buffer_tensor(torch.float32)
    assert (local.dtype, local.device.type) == (torch.float32, group.device.type)
    buffer.destroy()
    return results


# ---------------------------------------------------------------------- jobs


def compare(rank: int, pg: Any, pair: Any, name: str) -> int:
    """Run the program as it is and in a state; return how many results were the same. Collective."""
    want = everything(pg, pair)
    state = CUDA_STATES[name]
    with state.of_the_process(), state.of_a_thread(pair.device.type):
        got = everything(pg, pair)
    return same(got, want)


def everything(pg: Any, pair: Any) -> Results:
    with pair.open(pg, SHAPE) as group:
        results = {**calls(group, pg), **gradients(group)}
    return {**results, **{f"deep_ep {name}": value for name, value in deep_ep(pg).items()}}


def same(got: Results, want: Results) -> int:
    """Assert that results are the same; a state without gradients has fewer. Return how many there are."""
    assert set(got) <= set(want)
    assert got.keys() >= {name for name in want if "gradient" not in name and " of " not in name}
    for name, value in got.items():
        same_bits(name, value, want[name])
    return len(got)


def one_after_the_other(rank: int, pg: Any, pair: Any) -> None:
    """A group that was made in inference mode serves calls outside of it, and the other way round."""
    results = []
    for first, second in ((torch.inference_mode, torch.enable_grad), (torch.enable_grad, torch.inference_mode)):
        with first():
            group = pair.open(pg, SHAPE)
            results.append(calls(group, pg))
        with second():
            results.append(calls(group, pg))
        group.close()
    for one in results[1:]:
        same(one, results[0])


def handed_over(rank: int, pg: Any, pair: Any) -> None:
    """Tensors to write to that were made in inference mode, and hooks of calls in it, are filled outside of it."""
    with pair.open(pg, SHAPE) as group:
        x, routing = numbers(group, TOKENS[rank], SHAPE.hidden), routing_of(group)
        for made_in, filled_in in (
            (torch.inference_mode, torch.enable_grad),
            (torch.enable_grad, torch.inference_mode),
        ):
            with made_in():
                out, home = torch.empty_like(x), torch.empty_like(x)
                stats = DecodeStats(
                    torch.zeros(L, dtype=torch.int32, device=group.device),
                    torch.zeros(RANKS, dtype=torch.int64, device=group.device),
                )
                early = group.decode_dispatch(x, routing, return_hook=True)
            with filled_in():
                early.hook()
                sent = group.dispatch(x, routing)
                assert group.combine(sent.x, sent.plan, out=out).x is out
                same_bits("in place", group.combine(sent.x, sent.plan, out=sent.x[: len(x)]).x, out)
                late = group.decode_dispatch(x, routing, stats=stats, return_hook=True)
                late.hook()
                assert stats.received.tolist() == late.expert_counts.tolist()
                assert group.decode_combine(late.x, late.plan, out=home).x is home
                same_bits("rows", _decoded(early)["x"], _decoded(late)["x"])
                same_bits("sum", group.decode_combine(early.x, early.plan).x, home)
