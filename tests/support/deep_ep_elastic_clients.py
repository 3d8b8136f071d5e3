"""The calls of `ElasticBuffer` that vLLM, SGLang and torchtitan make, in their order: layers, against one process.

Expert e multiplies its rows by ``e + 1``. Ranks on the CPU run these jobs, and threads on the emulator.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.compat.deep_ep import ElasticBuffer, EPHandle

E, K, H = 8, 3, 128
TOKENS = (5, 0, 7, 3)
BLOCK = 128
"""Columns that share a scale, and the alignment of SGLang's experts."""


@dataclass
class Batch:
    """The tokens of one rank, and what the layer makes of them."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor

    @property
    def expected(self) -> Tensor:
        factors = (self.topk_weights * (self.topk_idx + 1)).sum(1, keepdim=True)
        return (self.x.float() * factors).bfloat16()


def batch(rank: int, num_tokens: int, step: int = 0) -> Batch:
    seeded = torch.Generator().manual_seed(step * 100 + rank)
    x = torch.randn(num_tokens, H, generator=seeded).bfloat16()
    scores = torch.rand(num_tokens, E, generator=seeded)
    weights, index = scores.topk(K, dim=1)
    index[weights < 0.6] = -1
    return Batch(x, index, weights.masked_fill(index < 0, 0))


def quantized(x: Tensor) -> Any:
    """Return FP8 rows with one scale for each 128 columns."""
    scale = (x.float().view(x.shape[0], H // BLOCK, BLOCK).abs().amax(2) / 448).clamp(min=1e-6)
    return (x.float() / scale.repeat_interleave(BLOCK, 1)).to(torch.float8_e4m3fn), scale


def restored(x: Any) -> Tensor:
    """Return the rows that a kernel would see."""
    return x.float() if isinstance(x, Tensor) else x[0].float() * x[1].repeat_interleave(BLOCK, 1)


def weighted(x: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' outputs for rows with their local experts, added up by row."""
    x = restored(x)
    return (x * (weights * (ids + 1)).masked_fill(ids < 0, 0).sum(1, keepdim=True)).bfloat16()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.08, atol=0.08)


def first_expert(rank: int, pg: Any) -> int:
    return rank * (E // pg.size())


# ---------------------------------------------------------------------- vLLM


def vllm_buffer(pg: Any, *, fp8: bool) -> ElasticBuffer:
    buffer = ElasticBuffer(
        group=pg,
        num_max_tokens_per_rank=max(TOKENS),
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=fp8,
        allow_hybrid_mode=True,
        prefer_overlap_with_compute=False,
        allow_multiple_reduction=False,
        explicitly_destroy=True,
    )
    assert buffer.get_theoretical_num_sms(num_experts=E, num_topk=K) >= 4
    return buffer


def vllm_prefill(rank: int, pg: Any) -> None:
    """Expanded rows with labels from the list of counts; two handles alive, as with two micro-batches."""
    for fp8 in (False, True):
        buffer = vllm_buffer(pg, fp8=fp8)
        pending = []
        for step, finalize_async in ((0, False), (1, True)):
            mine = batch(rank, TOKENS[rank], step)
            recv_x, ids, weights, handle, event = buffer.dispatch(
                x=quantized(mine.x) if fp8 else mine.x,
                topk_idx=mine.topk_idx,
                topk_weights=mine.topk_weights,
                num_experts=E,
                num_max_tokens_per_rank=None,
                do_expand=True,
                do_cpu_sync=True,
                async_with_compute_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            assert ids is None
            pending.append((mine, recv_x, weights, handle, finalize_async))
        for mine, recv_x, weights, handle, finalize_async in pending:
            counts = handle.num_recv_tokens_per_expert_list
            num_rows = (recv_x if isinstance(recv_x, Tensor) else recv_x[0]).shape[0]
            assert sum(counts) == num_rows
            labels = torch.repeat_interleave(torch.arange(len(counts)) + first_expert(rank, pg), torch.tensor(counts))
            y = weighted(recv_x, labels.unsqueeze(1), weights.unsqueeze(1))
            out, _, event = buffer.combine(
                x=y,
                handle=handle,
                topk_weights=None,
                async_with_compute_stream=finalize_async,
                allocate_on_comm_stream=finalize_async,
            )
            if event.event is not None:
                event.current_stream_wait()
            close(out, mine.expected)
        buffer.destroy()


def vllm_decode(rank: int, pg: Any) -> None:
    """Fixed shapes for the next power of two of the largest batch; what lies behind the rows is masked, or NaN."""
    buffer = vllm_buffer(pg, fp8=False)
    for step, tokens in enumerate(((1, 0, 1, 2), (5, 7, 0, 3), (2, 2, 1, 1), (0, 0, 0, 0))):
        most = 1 << (max(tokens[: pg.size()], default=1) - 1).bit_length() if max(tokens) else 1
        mine = batch(rank, tokens[rank], step)
        recv_x, ids, weights, handle, event = buffer.dispatch(
            x=mine.x,
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=most,
            do_expand=False,
            do_cpu_sync=False,
            async_with_compute_stream=False,
        )
        assert event.event is None
        assert not handle.num_recv_tokens_per_expert_list
        psum = handle.psum_num_recv_tokens_per_scaleup_rank
        assert psum.shape[0] == pg.size()
        assert recv_x.shape[0] == psum.shape[0] * most
        behind = torch.arange(recv_x.shape[0]) >= psum[-1]
        ids = ids.masked_fill(behind.unsqueeze(1), -1)
        y = weighted(recv_x, torch.where(ids >= 0, ids + first_expert(rank, pg), -1), weights)
        y[behind] = torch.nan
        out, _, event = buffer.combine(x=y, handle=handle, topk_weights=None)
        assert event.event is None
        close(out, mine.expected)
    buffer.destroy()


# ---------------------------------------------------------------------- SGLang


def sglang_buffer(pg: Any) -> ElasticBuffer:
    buffer = ElasticBuffer(
        pg,
        num_max_tokens_per_rank=BLOCK,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=True,
        allow_hybrid_mode=False,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes > 0
    return buffer


def sglang_batch(rank: int, step: int) -> Batch:
    """A rank without tokens sends one whose weights are 0."""
    mine = batch(rank, TOKENS[rank] or 1, step)
    return mine if TOKENS[rank] else Batch(mine.x, mine.topk_idx, torch.zeros_like(mine.topk_weights))


def sglang_expanded(rank: int, pg: Any) -> None:
    """Prefill and decode: starts and counts of the experts come from their prefix sums, on the device."""
    buffer = sglang_buffer(pg)
    for step, decode in enumerate((False, True, False)):
        mine = sglang_batch(rank, step)
        (recv_x, scale), ids, weights, handle, _ = buffer.dispatch(
            quantized(mine.x),
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=BLOCK,
            expert_alignment=BLOCK,
            num_sms=0,
            use_tma_aligned_col_major_sf=True,
            do_cpu_sync=not decode,
            do_expand=True,
        )
        assert ids is None
        assert weights.shape == (recv_x.shape[0],)
        assert scale.stride() == (1, recv_x.shape[0]) or recv_x.shape[0] == 0
        psum = handle.psum_num_recv_tokens_per_expert
        ends = psum.tolist()
        if not decode:
            assert recv_x.shape[0] == -(-ends[-1] // BLOCK) * BLOCK
        y = torch.full((recv_x.shape[0], H), torch.nan, dtype=torch.bfloat16)
        for expert, end in enumerate(ends):
            start = -(-ends[expert - 1] // BLOCK) * BLOCK if expert else 0
            label = torch.full((end - start, 1), first_expert(rank, pg) + expert)
            y[start:end] = weighted((recv_x[start:end], scale[start:end]), label, weights[start:end].unsqueeze(1))
        out, _, _ = buffer.combine(y, handle=handle, topk_weights=None)
        close(out, mine.expected)


def sglang_rows(rank: int, pg: Any) -> None:
    """Prefill without expansion, with scales in four bytes each, padded by column."""
    buffer = sglang_buffer(pg)
    mine = sglang_batch(rank, 0)
    data, scale = quantized(mine.x)
    num_tokens = data.shape[0]
    packed = torch.empty(1, -(-num_tokens // 4) * 4).view(torch.int32).t()[:num_tokens].copy_(scale.view(torch.int32))
    (recv_x, recv_scale), ids, weights, handle, _ = buffer.dispatch(
        (data, packed),
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        num_experts=E,
        num_max_tokens_per_rank=BLOCK,
        expert_alignment=BLOCK,
        do_cpu_sync=True,
        do_expand=False,
    )
    assert recv_scale.dtype == torch.int32
    assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()) == recv_x.shape[0]
    assert weights.shape == ids.shape == (recv_x.shape[0], K)
    labels = torch.where(ids >= 0, ids + first_expert(rank, pg), -1)
    out, _, _ = buffer.combine(weighted((recv_x, recv_scale.view(torch.float32)), labels, weights), handle=handle)
    close(out, mine.expected)


# ---------------------------------------------------------------------- torchtitan


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, buffer: ElasticBuffer) -> Any:
        recv_x, ids, weights, ctx.handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=buffer.num_max_tokens_per_rank,
            num_sms=buffer.get_theoretical_num_sms(E, K),
            do_cpu_sync=True,
        )
        ctx.buffer = buffer
        ctx.mark_non_differentiable(ids)
        return recv_x, ids, weights, _Held(ctx.handle)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor, __: Any) -> Any:
        grad, weights, event = ctx.buffer.combine(
            grad_x.bfloat16().contiguous(),
            handle=ctx.handle,
            topk_weights=grad_weights.float().contiguous(),
            num_sms=ctx.handle.num_sms,
            async_with_compute_stream=True,
        )
        event.current_stream_wait()
        return grad.to(grad_x.dtype), None, weights, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, held: "_Held", buffer: ElasticBuffer) -> Tensor:
        ctx.handle, ctx.buffer = held.handle, buffer
        out, _, event = buffer.combine(y, handle=held.handle, async_with_compute_stream=True)
        event.current_stream_wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, _, _, same, _ = ctx.buffer.dispatch(
            grad.bfloat16().contiguous(), handle=ctx.handle, num_sms=ctx.handle.num_sms, do_cpu_sync=False
        )
        assert same is ctx.handle
        return grad_y, None, None


@dataclass
class _Held:
    """Carries a handle past autograd."""

    handle: EPHandle


def titan_buffer(pg: Any, **more: Any) -> ElasticBuffer:
    hint = ElasticBuffer.get_buffer_size_hint(pg, max(TOKENS), H, num_topk=K, use_fp8_dispatch=False)
    buffer = ElasticBuffer(
        pg,
        num_bytes=hint,
        num_max_tokens_per_rank=max(TOKENS),
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=False,
        explicitly_destroy=True,
        **more,
    )
    assert buffer.group == pg
    assert buffer.num_bytes >= hint
    return buffer


def titan_training(rank: int, pg: Any) -> None:
    """Three layers whose backward passes run after all forward ones, so that three handles are alive."""
    buffer = titan_buffer(pg, deterministic=True)
    mine = batch(rank, TOKENS[rank])
    x = mine.x.requires_grad_()
    gates = mine.topk_weights.requires_grad_()
    same_x, same_gates = x.detach().float().requires_grad_(), gates.detach().clone().requires_grad_()
    h, same = x, same_x
    for _ in range(3):
        recv_x, ids, weights, held = _Dispatch.apply(h, mine.topk_idx, gates, buffer)
        assert sum(held.handle.num_recv_tokens_per_expert_list) == (ids >= 0).sum()
        labels = torch.where(ids >= 0, ids + first_expert(rank, pg), -1)
        y = (recv_x.float() * (weights * (labels + 1)).masked_fill(ids < 0, 0).sum(1, keepdim=True) / E).bfloat16()
        h = _Combine.apply(y, held, buffer)
        same = same * (same_gates * (mine.topk_idx + 1)).sum(1, keepdim=True) / E
    close(h, same)
    h.float().square().sum().backward()
    same.square().sum().backward()
    close(x.grad, same_x.grad)
    unused = mine.topk_idx < 0
    assert not gates.grad[unused].any()
    torch.testing.assert_close(gates.grad, same_gates.grad.masked_fill(unused, 0), rtol=0.1, atol=0.1 * H)
    buffer.destroy()


def titan_inference(rank: int, pg: Any) -> None:
    """Expanded rows without a wait; group sizes are differences of the prefix sum."""
    buffer = titan_buffer(pg)
    for step in range(2):
        mine = batch(rank, TOKENS[rank], step)
        recv_x, _, weights, handle, _ = buffer.dispatch(
            mine.x,
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=max(TOKENS),
            num_sms=buffer.get_theoretical_num_sms(E, K),
            do_expand=True,
            do_cpu_sync=False,
        )
        psum = handle.psum_num_recv_tokens_per_expert
        sizes = torch.diff(psum, prepend=psum.new_zeros(1))
        y = torch.full_like(recv_x, torch.nan)
        labels = torch.repeat_interleave(torch.arange(sizes.shape[0]) + first_expert(rank, pg), sizes)
        used = labels.shape[0]
        y[:used] = weighted(recv_x[:used], labels.unsqueeze(1), weights[:used].unsqueeze(1))
        out, _, event = buffer.combine(y, handle=handle, async_with_compute_stream=True)
        event.current_stream_wait()
        close(out, mine.expected)
    buffer.destroy()


JOBS = (
    vllm_prefill,
    vllm_decode,
    sglang_expanded,
    sglang_rows,
    titan_training,
    titan_inference,
)
