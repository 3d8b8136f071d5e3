"""Programs whose calls `torch.compile` meets, and what it traces of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tokenferry
from tokenferry import DispatchOptions, ExpertGroup, Layout, MoeShape, Quantized, Routing, Scale
from tokenferry.compat.deep_ep import Buffer, ElasticBuffer, EPBuffer, HybridEPBuffer
from tokenferry.compat.deep_ep.expert_buffer import get_physical_domain_size
from tokenferry.compat.deep_ep.hybrid_ep_buffer import indices_to_map

E, K, H, M = 4, 2, 128, 8
SHAPE = MoeShape(E, K, H, M)
TOKENS = (5, 3, 7, 0, 1)
COMPILERS = ("eager", "aot_eager")
PACKAGE = Path(tokenferry.__file__).parent
MAY_BE_TRACED = {
    "backends/base.py: no_hook",
    "api.py: num_ranks",
    "api.py: device",
    "api.py: masked_ranks",  # as far as the method that it calls
    "backends/cuda/across/decode.py: hook",  # as far as the receive that it calls
}
"""What at most reads a number; so do the checks of plain data in types.py."""

Program = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@contextmanager
def traced() -> Iterator[set[str]]:
    """Collect the functions of the library that the compiler traces, by themselves or as parts of others."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    found: set[str] = set()
    run = InstructionTranslatorBase.run

    def noted(self: Any) -> Any:
        path = Path(self.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.add(f"{path.relative_to(PACKAGE)}: {self.f_code.co_name}")
        return run(self)

    with mock.patch.object(InstructionTranslatorBase, "run", noted):
        yield found


def inputs(rank: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(16 * rank + num_tokens)
    x = torch.randn(num_tokens, H, generator=draws).to(torch.bfloat16)
    chosen = torch.rand(num_tokens, E, generator=draws).topk(K).indices
    return x, chosen, torch.rand(num_tokens, K, generator=draws)


def compare(rank: int, programs: dict[str, Program]) -> int:
    """Check that programs return the same bits, compiled and not; return how many tensors were compared."""
    num = 0
    for name, program in programs.items():
        for backend in COMPILERS:
            torch._dynamo.reset()
            compiled = torch.compile(program, backend=backend)
            with traced() as functions:
                for num_tokens in TOKENS:
                    want = program(*inputs(rank, num_tokens))
                    got = compiled(*inputs(rank, num_tokens))
                    for place, (one, other) in enumerate(zip(got, want, strict=True)):
                        assert torch.equal(one, other), (name, backend, num_tokens, place)
                        num += 1
            strange = {each for each in functions - MAY_BE_TRACED if not each.startswith("types.py:")}
            assert not strange, (name, backend, strange)
    return num


# ---------------------------------------------------------------------- calls of a group


OPTIONS = {
    "rows": None,
    "rows, device": DispatchOptions(counts="device"),
    "experts": DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True),
    "experts, device": DispatchOptions(Layout.EXPERTS, counts="device", capacity=64),
    "masked": DispatchOptions(Layout.MASKED, capacity=16),
    "masked, device": DispatchOptions(Layout.MASKED, counts="device"),
}


def throughput(group: ExpertGroup, options: DispatchOptions | None) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        sent = group.dispatch(x * 2, Routing(chosen, weights), options=options)
        again = group.redispatch(x + 1, sent.plan, topk_weights=weights * 2)
        y = group.empty_rows(sent.plan)
        y.copy_(sent.x * 3)
        home = group.combine(y, sent.plan, topk_weights=sent.topk_weights, bias=x * 4)
        other = group.combine(again.x * 3, again.plan)
        plan = sent.plan
        return home.x + 1, home.topk_weights * 2, other.x + 1, sent.expert_counts * 2, plan.dst_counts, plan.src_counts

    return program


def decoding(group: ExpertGroup, quantize: Scale | None, *, hooked: bool) -> Program:
    numerics, encoding = ("fast", "fp8") if hooked else ("exact", "logfmt10")

    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        sent = group.decode_dispatch(x * 2, Routing(chosen, weights), quantize=quantize, return_hook=hooked)
        sent.hook()
        rows = sent.x.data.to(x.dtype) if isinstance(sent.x, Quantized) else sent.x * 2
        home = group.decode_combine(rows, sent.plan, numerics=numerics, encoding=encoding, return_hook=hooked)
        home.hook()
        return home.x + 1, sent.expert_counts * 2, sent.plan.src_range + 1

    return program


def local_calls(group: ExpertGroup) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        group.warmup()
        wide = group.for_shape(replace(SHAPE, hidden=2 * H))
        sent = wide.dispatch(torch.cat((x, x), 1), Routing(chosen, weights))
        wide.synchronize()
        home = wide.combine(sent.x * group.num_ranks + len(group.masked_ranks), sent.plan)
        return (home.x + 1,)

    return program


def group_calls(rank: int, pg: Any, pair: Any) -> int:
    """Compare all calls. Collective."""
    with pair.open(pg, SHAPE) as group:
        programs = {name: throughput(group, options) for name, options in OPTIONS.items()}
        return compare(rank, programs | {"local calls": local_calls(group)})


def decode_calls(rank: int, pg: Any, pair: Any) -> int:
    """Compare all calls for decoding. Collective."""
    kinds = [(quantize, hooked) for quantize in (None, Scale.FLOAT32) for hooked in (False, True)]
    with pair.open(pg, SHAPE) as group:
        programs = {
            f"{quantize}, hooks {hooked}": decoding(group, quantize, hooked=hooked) for quantize, hooked in kinds
        }
        return compare(rank, programs)


def short_lived(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Make everything inside of the compiled function."""
    with ExpertGroup(None, SHAPE, backend="cpu") as group:
        sent = group.dispatch(x * 2, Routing(chosen, weights))
        home = group.combine(sent.x * 3, sent.plan).x + 1
    buffer = Buffer(None, explicitly_destroy=True)
    counts = buffer.get_dispatch_layout(chosen, E).num_tokens_per_expert + 1
    buffer.destroy()
    elastic = ElasticBuffer(None, num_max_tokens_per_rank=M)
    rows, _, _, handle, _ = elastic.dispatch(x * 2, chosen, weights, num_experts=E)
    nodes, ranks = get_physical_domain_size(None)
    return home, counts, elastic.combine(rows * 3, handle)[0] + nodes + ranks


# ---------------------------------------------------------------------- dialects of DeepEP


def v1(buffer: Buffer, *, asynchronous: bool) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        before = Buffer.capture() if asynchronous else None
        layout = buffer.get_dispatch_layout(chosen, E, before, asynchronous, asynchronous)
        rows, ids, received, counts, handle, event = buffer.dispatch(
            x * 2,
            num_tokens_per_rank=layout.num_tokens_per_rank,
            is_token_in_rank=layout.is_token_in_rank,
            num_tokens_per_expert=layout.num_tokens_per_expert,
            topk_idx=chosen,
            topk_weights=weights,
            config=Buffer.get_dispatch_config(2),
            previous_event=layout.event if asynchronous else None,
            async_finish=asynchronous,
        )
        if asynchronous:
            event.current_stream_wait()
        again = buffer.dispatch(x + 1, handle=handle)[0]
        home, back, event = buffer.combine(rows * 3, handle, received * 2, x * 4, async_finish=asynchronous)
        with event:
            other = buffer.combine(again * 3, handle)[0] + 1
        return home + 1, back, other, ids + 1, handle[3] + 1, torch.tensor(counts)

    return program


def low_latency(buffer: Buffer, *, use_fp8: bool, how: str) -> Program:
    hooked, asynchronous = how == "hook", how == "event"

    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        waited = torch.zeros(buffer.group_size, dtype=torch.int64)
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            x * 2,
            chosen,
            M,
            E,
            dispatch_wait_recv_cost_stats=waited,
            use_fp8=use_fp8,
            async_finish=asynchronous,
            return_recv_hook=hooked,
        )
        if hooked:
            hook()
        elif asynchronous:
            event.current_stream_wait()
        y = rows[0].to(x.dtype) if use_fp8 else rows * 3
        buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
        home, event, hook = buffer.low_latency_combine(
            y, chosen, weights, handle, use_fp8, not use_fp8, asynchronous, return_recv_hook=hooked
        )
        if hooked:
            hook()
        elif asynchronous:
            event.current_stream_wait()
        return home + 1, counts + 1, handle[1] + 1

    return program


def elastic(buffer: ElasticBuffer, *, expanded: bool, synchronous: bool) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        rows, _, received, handle, event = buffer.dispatch(
            x * 2,
            chosen,
            weights,
            num_experts=E,
            do_expand=expanded,
            do_cpu_sync=synchronous,
            async_with_compute_stream=True,
        )
        event.current_stream_wait()
        again = buffer.dispatch(x + 1, handle=handle, do_expand=expanded)[0]
        home, back, _ = buffer.combine(rows * 3, handle, received * 2, bias=x * 4)
        other = buffer.combine(again * 3, handle)[0]
        sums = handle.psum_num_recv_tokens_per_expert, handle.psum_num_recv_tokens_per_scaleup_rank
        return home + 1, back, other + 1, sums[0] + 1, sums[1] + 1, handle.dst_buffer_slot_idx

    return program


def deferring(buffer: EPBuffer) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        event = buffer.dispatch(
            x * 2, chosen, weights, num_experts=E, async_with_compute_stream=True, defer_epilogue=True
        )
        rows, _, received, handle = event.wait()
        event = buffer.combine(rows * 3, handle, received, async_with_compute_stream=True, defer_epilogue=True)
        home, back = event.wait()
        return home + 1, back + 1

    return program


def hybrid(buffer: HybridEPBuffer, *, budget: int | None, mapped: bool) -> Program:
    def program(x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        routing_map, probs = indices_to_map(chosen, weights, len(x), E)
        experts: dict[str, Any] = {"topk_idx": chosen, "topk_weights": weights, "num_of_experts": E}
        if mapped:
            experts = {"routing_map": routing_map, "probs": probs}
        rows, received, _, counts, handle = buffer.dispatch_with_permute(
            hidden=x * 2, num_permuted_tokens=budget, **experts
        )
        again = buffer.dispatch_with_permute(hidden=x + 1, handle=handle)[0]
        home, back = buffer.combine_with_unpermute(hidden=rows * 3, probs=received * 2, handle=handle)
        other = buffer.combine_with_unpermute(hidden=again * 3, handle=handle)[0]
        return home + 1, back, other + 1, counts + 1, handle[-1] + 1

    return program


def low_latency_calls(rank: int, pg: Any) -> int:
    """Compare the low-latency calls of DeepEP 1. Collective."""
    buffer = Buffer(pg, 1 << 20, 1 << 20, low_latency_mode=True)
    kinds = ((False, "plain"), (True, "hook"), (False, "hook"), (True, "event"))
    return compare(rank, {f"{use_fp8}, {how}": low_latency(buffer, use_fp8=use_fp8, how=how) for use_fp8, how in kinds})


def other_calls(rank: int, pg: Any) -> int:
    """Compare the other calls of all dialects. Collective."""
    buffer, of_v2 = Buffer(pg, 1 << 20), ElasticBuffer(pg, num_max_tokens_per_rank=M)
    of_hybrid = HybridEPBuffer(pg, H, M, E // buffer.group_size)
    return compare(
        rank,
        {
            "V1": v1(buffer, asynchronous=False),
            "V1, asynchronous": v1(buffer, asynchronous=True),
            "V2": elastic(of_v2, expanded=False, synchronous=False),
            "V2, expanded": elastic(of_v2, expanded=True, synchronous=True),
            "V2.5": deferring(EPBuffer(pg, num_max_tokens_per_rank=M)),
            "hybrid, map": hybrid(of_hybrid, budget=None, mapped=True),
            "hybrid, budget": hybrid(of_hybrid, budget=64, mapped=False),
        },
    )
