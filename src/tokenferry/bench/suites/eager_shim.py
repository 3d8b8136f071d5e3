"""The eager calls of a program written for DeepEP, on `tokenferry.compat.deep_ep.Buffer`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.checks import must_equal
from tokenferry.bench.core.inputs import Inputs, Sizes, sent_to
from tokenferry.bench.core.sets import DECODE_PAIR, PAIR, USER_ROWS, Call, Pair, Sets, checked_step
from tokenferry.bench.suites.decode_reference import DecodeReference
from tokenferry.compat.deep_ep import Buffer
from tokenferry.types import Quantized

ASYNCHRONOUS = "dispatch + combine, async_finish"

Shim = Buffer
"""What programs for DeepEP make their calls with."""


def make_buffer(pg: dist.ProcessGroup, sizes: Sizes) -> Buffer:
    """Make a buffer with memory for several sets of rows; ``sizes`` are the largest. Collective."""
    rows_bytes = sizes.ranks * sizes.tokens * 2 * sizes.hidden
    return Buffer(pg, 4 * rows_bytes, low_latency_mode=True, explicitly_destroy=True)


def shim_calls(sets: Sets, buffer: Buffer) -> Iterator[Call]:
    """Make the calls of normal mode as users write them: a layout before each dispatch. Collective."""
    experts = sets.sizes.experts

    def dispatch(inputs: Inputs, x: Any) -> Any:  # noqa: ANN401 - DeepEP's rows and handles
        return _dispatch(buffer, inputs, x, buffer.get_dispatch_layout(inputs.topk_idx, experts))

    def rows_of(v: int, kind: str) -> Any:  # noqa: ANN401
        rows = sets.rows(v, kind)
        return rows if isinstance(rows, Tensor) else (rows.data, rows.scale)

    def whole(v: int, rows: str) -> Tensor | Quantized:
        return _as_rows(dispatch(sets.inputs[v], rows_of(v, rows))[0])

    def kept(v: int, rows: str) -> Tensor | Quantized:
        return _as_rows(buffer.dispatch(rows_of(v, rows), handle=ready[v].plan)[0])

    def layout(v: int) -> Any:  # noqa: ANN401
        return buffer.get_dispatch_layout(sets.inputs[v].topk_idx, experts)

    def check_layout(v: int, got: Any) -> None:  # noqa: ANN401
        per_rank, _, _, in_rank, _ = got
        expected = sent_to(sets.sizes, sets.inputs[v].topk_idx)
        must_equal("get_dispatch_layout: is_token_in_rank", in_rank, expected)
        must_equal("get_dispatch_layout: num_tokens_per_rank", per_rank[:, None], expected.sum(0).int()[:, None])

    def pair(v: int) -> Tensor:
        received, handle, _ = dispatch(sets.inputs[v], sets.inputs[v].x)
        return buffer.combine(received, handle)[0]

    ready = sets.ready(lambda inputs: dispatch(inputs, inputs.x)[:2])
    user = partial(sets.combine_step, "Buffer.combine", lambda v: buffer.combine(ready[v].y, ready[v].plan)[0])
    yield Call("layout alone", "-", partial(sets.step, layout, check_layout))
    yield from sets.dispatches(whole, kept)
    yield Call(USER_ROWS, "bf16", user)
    for name, call in ((PAIR, pair), (ASYNCHRONOUS, lambda v: _asynchronous(buffer, sets.inputs[v], experts))):
        yield Call(name, "bf16", partial(sets.pair_step, f"Buffer: {name}", call))


def _dispatch(buffer: Buffer, inputs: Inputs, x: Any, layout: Any, **how: Any) -> Any:  # noqa: ANN401
    """Send rows by a layout; return what came, the handle and the event."""
    per_rank, per_node, per_expert, in_rank, _ = layout
    received, _, _, _, handle, event = buffer.dispatch(
        x,
        topk_idx=inputs.topk_idx,
        topk_weights=inputs.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **how,
    )
    return received, handle, event


def _asynchronous(buffer: Buffer, inputs: Inputs, experts: int) -> Tensor:
    """Send rows and add them up on the communication stream, as training frameworks do."""
    how: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True}
    layout = buffer.get_dispatch_layout(inputs.topk_idx, experts, previous_event=buffer.capture(), **how)
    received, handle, event = _dispatch(buffer, inputs, inputs.x, layout, previous_event=layout.event, **how)
    event.current_stream_wait()
    sums, _, event = buffer.combine(received, handle, previous_event=buffer.capture(), **how)
    event.current_stream_wait()
    return sums


def shim_decode(references: list[DecodeReference], buffer: Buffer, y: Tensor, sizes: Sizes) -> Iterator[Call]:
    """Make the pair of low-latency calls; ``sizes.tokens`` is M. Collective."""

    def pair(v: int) -> Pair:
        one = references[v]
        sent = buffer.low_latency_dispatch(one.x, one.topk_idx, sizes.tokens, sizes.experts)
        return Pair(sent, buffer.low_latency_combine(y, one.topk_idx, one.topk_weights, sent[2])[0])

    def check(v: int, got: Pair) -> None:
        rows, counts, handle, _, _ = got.sent
        references[v].check_received("low_latency_dispatch", _as_rows(rows), counts, handle[0])
        references[v].check_sums("low_latency_combine", got.sums, numerics="exact", shift=0)

    yield Call(DECODE_PAIR, "fp8", partial(checked_step, len(references), pair, check))


def _as_rows(x: Any) -> Tensor | Quantized:  # noqa: ANN401 - DeepEP's rows: a tensor, or a tuple of two
    return x if isinstance(x, Tensor) else Quantized(*x)
