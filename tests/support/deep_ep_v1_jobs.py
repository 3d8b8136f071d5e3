"""Jobs that do what DeepEP's own V1 tests do: its sweeps of options, in its order, with the checks that it makes.

They set the default device and dtype before anything else, as DeepEP's tests do; all tensors here name both. Payloads
follow from the rank and the token: each row of rank r holds r - 128, and in its last 128 columns its token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from support.ambient import default_device, default_dtype
from tokenferry.compat.deep_ep import Buffer, Config, topk_idx_t

BLOCK = 128
SHIFT = 128
FORMATS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
"""use_fp8, round_scale, use_ue8m0."""
LEAVING = {"dispatch": 1, "combine": 3, "clean": 5}
"""The rank that stops before its first call of each kind, in shrink mode."""


@dataclass(frozen=True)
class Sizes:
    """The same number of tokens on all ranks, as in DeepEP's tests."""

    tokens: int
    hidden: int
    experts: int
    top_k: int


@contextmanager
def as_deep_ep_begins(device: str) -> Iterator[torch.device]:
    """Set the defaults; on the CPU to a device on which nothing can be computed, so that no tensor may rely on it."""
    class_wide = mock.patch.multiple(Buffer, num_sms=Buffer.num_sms, _asked_num_sms=Buffer._asked_num_sms)
    with class_wide, default_dtype(torch.bfloat16), default_device("cuda" if device == "cuda" else "meta"):
        yield torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def calc_diff(x: Tensor, y: Tensor) -> float:
    """One minus the similarity of two tensors, both moved away from 0."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def hashed(t: Tensor) -> int:
    return int(t.view(torch.int32).sum().item())


def restored(data: Tensor, scale: Tensor) -> Tensor:
    """Return the rows that were cast, from ``[N, H]`` FP8 and float32 or packed scales."""
    if scale.dtype == torch.int32:
        scale = (scale.contiguous().view(torch.uint8).int() << 23).view(torch.float32)
    rows = data.float().view(data.shape[0], -1, BLOCK) * scale.reshape(data.shape[0], -1, 1)
    return rows.view(data.shape).bfloat16()


def cast(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.float().view(x.shape[0], -1, BLOCK)
    amax = blocks.abs().amax(2).clamp(1e-4)
    return (blocks * (448 / amax.unsqueeze(2))).to(torch.float8_e4m3fn).view(x.shape), amax / 448


def routing_of(rank: int, seed: int, sizes: Sizes, device: torch.device) -> Tensor:
    """Return the routing of a rank, with a few slots unused; every rank can tell those of all others."""
    seeded = torch.Generator().manual_seed(1000 * seed + rank)
    scores = torch.randn(sizes.tokens, sizes.experts, dtype=torch.float32, device="cpu", generator=seeded)
    chosen = scores.topk(sizes.top_k, dim=1).indices.to(topk_idx_t)
    unused = random.Random(seed + rank)
    for _ in range(min(10, sizes.tokens)):
        chosen[unused.randrange(sizes.tokens), unused.randrange(sizes.top_k)] = -1
    return chosen.to(device)


# ---------------------------------------------------------------------- low latency


class Decoding:
    """The data of one run of DeepEP's low-latency test on one rank."""

    def __init__(self, rank: int, num_ranks: int, sizes: Sizes, device: torch.device, seed: int) -> None:
        self.rank, self.num_ranks, self.sizes, self.device = rank, num_ranks, sizes, device
        self.local = sizes.experts // num_ranks
        self.routings = [routing_of(r, seed, sizes, device) for r in range(num_ranks)]
        self.topk_idx = self.routings[rank].clone()
        seeded = torch.Generator().manual_seed(seed + rank)
        self.seeded = seeded
        self.weights = torch.randn(sizes.tokens, sizes.top_k, dtype=torch.float32, device="cpu", generator=seeded)
        self.weights = self.weights.abs().to(device)
        self.x = torch.full((sizes.tokens, sizes.hidden), rank - SHIFT, dtype=torch.bfloat16, device=device)
        self.x[:, -BLOCK:] = torch.arange(sizes.tokens, dtype=torch.bfloat16, device=device).unsqueeze(1)
        self.masked = torch.zeros(num_ranks, dtype=torch.int32, device=device)

    def rows(self, factor: float) -> Tensor:
        shape = (self.sizes.tokens, self.sizes.hidden)
        made = torch.randn(shape, dtype=torch.bfloat16, device="cpu", generator=self.seeded)
        return (made * factor).to(self.device)

    def check_received(self, rows: Tensor, handle: Any, counts: Tensor, i: int, *, constant: bool, exact: bool) -> None:
        """Check the rows of a local expert by the two tensors of the handle, as DeepEP's test reads them."""
        expert, ranges = self.rank * self.local + i, handle[1][i]
        num_rows = int(counts[i].item())
        assert num_rows == (ranges & 0xFFFFFFFF).sum().item()
        there = [0 if self.masked[r] else int((one == expert).sum().item()) for r, one in enumerate(self.routings)]
        assert num_rows == sum(there)
        if not constant or not num_rows:
            return
        for src, expected in enumerate(there):
            begin, count = int(ranges[src].item()) >> 32, int(ranges[src].item()) & 0xFFFFFFFF
            assert count == expected
            part, tokens = rows[begin : begin + count], handle[0][i, begin : begin + count]
            if exact:
                assert bool((part[:, :-BLOCK] == src - SHIFT).all())
                assert bool((part[:, -BLOCK:] == tokens.unsqueeze(1)).all())
            elif count:
                assert calc_diff(part[:, -1], tokens) < 0.007

    def check_combined(self, got: Tensor, x: Tensor, limit: float) -> None:
        owner = self.topk_idx // self.local
        self.topk_idx[(self.topk_idx >= 0) & (self.masked[owner.clamp(min=0)] == 1)] = -1
        total = self.weights.masked_fill(self.topk_idx < 0, 0.0).sum(1, keepdim=True)
        assert not got.isnan().any()
        assert calc_diff(x * total, got) < limit


def low_latency(rank: int, pg: Any, device: str, sizes: Sizes, use_logfmt: bool = False) -> None:
    """DeepEP's test of low-latency calls: all options, and the same bits in every run with a seed."""
    with as_deep_ep_begins(device) as on:
        buffer = _decoding_buffer(pg, sizes, enable_shrink=False)
        first, again = (_all_options(buffer, Decoding(rank, pg.size(), sizes, on, 1), use_logfmt) for _ in range(2))
        assert first == again
        assert len(set(first)) > len(FORMATS), "the hashes tell nothing"
        buffer.destroy()


def shrinking(rank: int, pg: Any, device: str, sizes: Sizes) -> None:
    """DeepEP's test of shrink mode; a rank that stops destroys its buffer, as there."""
    with as_deep_ep_begins(device) as on:
        buffer = _decoding_buffer(pg, sizes, enable_shrink=True)
        _without_those_that_stop(buffer, Decoding(rank, pg.size(), sizes, on, 1))
        buffer.destroy()


def profiled(rank: int, pg: Any, sizes: Sizes) -> None:
    """On GPUs: the names that DeepEP's test looks for in a profiler's table and trace, with hooks and without."""
    with as_deep_ep_begins("cuda") as on:
        buffer, run = _decoding_buffer(pg, sizes, enable_shrink=False), Decoding(rank, pg.size(), sizes, on, 1)
        y = _restored(_dispatched(buffer, run, run.x, FORMATS[1], hook=False)[0])

        def both_ways(hook: bool) -> None:
            handle = _dispatched(buffer, run, run.x, FORMATS[1], hook)[2]
            _combined(buffer, run, y, handle, hook)

        for hook in (False, True):
            both_ways(hook)
            torch.cuda.synchronize()
            pg.barrier().wait()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(3):
                    both_ways(hook)
                torch.cuda.synchronize()
            lines = profile.key_averages().table(max_name_column_width=100).splitlines()
            for word in ("dispatch", "combine"):
                assert sum(word in line for line in lines) == 1, lines
                assert sum(f"::{word}" in event.name for event in profile.events()) == (6 if hook else 3)
        buffer.destroy()


def _decoding_buffer(pg: Any, sizes: Sizes, *, enable_shrink: bool) -> Buffer:
    return Buffer(
        pg,
        num_rdma_bytes=Buffer.get_low_latency_rdma_size_hint(sizes.tokens, sizes.hidden, pg.size(), sizes.experts),
        low_latency_mode=True,
        num_qps_per_rank=sizes.experts // pg.size(),
        allow_nvlink_for_low_latency_mode=True,
        explicitly_destroy=True,
        allow_mnnvl=False,
        enable_shrink=enable_shrink,
    )


def _all_options(buffer: Buffer, run: Decoding, use_logfmt: bool) -> list[int]:
    """Return the hashes of all results."""
    found = []
    all_x = [run.x, *(run.rows(0.5 * factor) for factor in ((0.9,) if use_logfmt else ())), run.rows(0.1)]
    for times, (x, hook, kind) in enumerate(itertools.product(all_x, (False, True), FORMATS)):
        for _ in range(times % 2 + 1):  # results that nobody combines
            received = torch.zeros(run.local, dtype=torch.int32, device=run.device)
            rows, counts, handle = _dispatched(buffer, run, x, kind, hook, received)
        assert torch.equal(received, counts)
        parts = rows if isinstance(rows, tuple) else (rows,)
        y = rows.clone() if isinstance(rows, Tensor) else _restored(rows)
        for i in range(run.local):
            run.check_received(y[i], handle, counts, i, constant=x is run.x, exact=not kind[1])
            for part in parts:
                found.append(hashed(part[i, : int(counts[i].item())].contiguous()))
        for zero_copy in (False,) if use_logfmt else (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
            got = _combined(buffer, run, y, handle, hook, use_logfmt=use_logfmt, zero_copy=zero_copy)
            run.check_combined(got, x, 1.0 if kind[1] else 9e-4 if kind[0] else 1e-5)
            found.append(hashed(got))
    return found


def _restored(rows: tuple[Tensor, Tensor]) -> Tensor:
    data, scale = rows
    return restored(data.view(-1, data.shape[2]), scale.reshape(-1, scale.shape[2])).view(data.shape)


def _dispatched(
    buffer: Buffer, run: Decoding, x: Tensor, kind: tuple[bool, bool, bool], hook: bool, received: Tensor | None = None
) -> tuple[Any, Tensor, Any]:
    use_fp8, round_scale, use_ue8m0 = kind
    rows, counts, handle, event, receive = buffer.low_latency_dispatch(
        x,
        run.topk_idx,
        run.sizes.tokens,
        run.sizes.experts,
        use_fp8=use_fp8,
        round_scale=round_scale,
        use_ue8m0=use_ue8m0,
        cumulative_local_expert_recv_stats=received,
        async_finish=not hook,
        return_recv_hook=hook,
    )
    receive() if hook else event.current_stream_wait()
    return rows, counts, handle


def _combined(buffer: Buffer, run: Decoding, y: Tensor, handle: Any, hook: bool, **how: bool) -> Tensor:
    out = torch.empty(run.sizes.tokens, run.sizes.hidden, dtype=torch.bfloat16, device=run.device)
    got, event, receive = buffer.low_latency_combine(
        y, run.topk_idx, run.weights, handle, async_finish=not hook, return_recv_hook=hook, out=out, **how
    )
    receive() if hook else event.current_stream_wait()
    assert got is out
    return out


def _without_those_that_stop(buffer: Buffer, run: Decoding) -> None:
    """Ranks stop before their first dispatch, their first combine and their first cleaning; each is masked at once."""
    gone: set[int] = set()

    def leaves(call: str) -> bool:
        gone.add(LEAVING[call])
        return run.rank in gone

    def check_masks() -> None:
        buffer.low_latency_query_mask_buffer(run.masked)
        assert set(run.masked.nonzero().squeeze(-1).tolist()) == gone

    for hook, kind in itertools.product((False, True), FORMATS):
        if leaves("dispatch"):
            return
        rows, counts, handle = _dispatched(buffer, run, run.x, kind, hook)
        check_masks()
        y = rows if isinstance(rows, Tensor) else _restored(rows)
        for i in range(run.local):
            run.check_received(y[i], handle, counts, i, constant=True, exact=not kind[1])
        if leaves("combine"):
            return
        for zero_copy in (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
            got = _combined(buffer, run, y, handle, hook, zero_copy=zero_copy)
            check_masks()
            run.check_combined(got, run.x, 1.0 if kind[1] else 9e-4 if kind[0] else 1e-5)
        if leaves("clean"):
            return
        buffer.clean_low_latency_buffer(run.sizes.tokens, run.sizes.hidden, run.sizes.experts)
        check_masks()


# ---------------------------------------------------------------------- normal mode


class Layout:
    """A routing of one rank and its layout, made by the program instead of by `Buffer.get_dispatch_layout`."""

    def __init__(self, rank: int, num_ranks: int, sizes: Sizes, device: torch.device) -> None:
        routings = [routing_of(r, 0, sizes, device) for r in range(num_ranks)]
        self.topk_idx, local = routings[rank], sizes.experts // num_ranks
        ranks = torch.arange(num_ranks, dtype=torch.int64, device=device)
        owner = torch.where(self.topk_idx >= 0, self.topk_idx // local, -1)
        self.in_rank = (owner.unsqueeze(2) == ranks).any(1)
        experts = torch.arange(sizes.experts, dtype=torch.int64, device=device)
        self.per_expert = (self.topk_idx.unsqueeze(2) == experts).sum((0, 1), dtype=torch.int32)
        self.all_here = [[int((r == rank * local + i).sum()) for i in range(local)] for r in routings]
        self.num_here = [int((r // local).eq(rank).logical_and(r >= 0).any(1).sum()) for r in routings]

    def arguments(self) -> dict[str, Any]:
        return {
            "num_tokens_per_rank": self.in_rank.sum(0, dtype=torch.int32),
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
        }


def normal_mode(rank: int, pg: Any, device: str, sizes: Sizes, num_sms: int) -> None:
    """DeepEP's test of normal mode within a node: all options, then the configs of its tuning."""
    with as_deep_ep_begins(device) as on:
        buffer = Buffer(pg, int(1e9), 0, low_latency_mode=False, num_qps_per_rank=1)
        layout = Layout(rank, pg.size(), sizes, on)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(layout.topk_idx, sizes.experts)
        own = layout.arguments()
        assert torch.equal(per_rank, own["num_tokens_per_rank"])
        assert torch.equal(per_expert, own["num_tokens_per_expert"])
        assert torch.equal(in_rank, own["is_token_in_rank"])
        x = torch.full((sizes.tokens, sizes.hidden), rank, dtype=torch.bfloat16, device=on)
        seeded = torch.Generator().manual_seed(rank)
        other = torch.randn(x.shape, dtype=torch.bfloat16, device="cpu", generator=seeded).to(on)
        config = Config(num_sms, 8, 256)
        for previous, asynchronous, rows, with_topk in itertools.product(
            (False, True), (False, True), (other, x, cast(x)), (False, True)
        ):
            how = {"config": config, "async_finish": asynchronous}
            recv, handle = _sent(buffer, layout, rows, rank, how, previous=previous, with_topk=with_topk)
            _sent_home(buffer, layout, recv, handle, other if rows is other else x, how, previous=previous)
        worst = buffer.dispatch(
            x,
            topk_idx=layout.topk_idx,
            topk_weights=layout.topk_idx.float(),
            num_worst_tokens=sizes.tokens * pg.size(),
            config=config,
            **own,
        )
        assert (worst[0].shape[0], worst[3]) == (sizes.tokens * pg.size(), [])
        assert bool((worst[1][sum(layout.num_here) :] == -1).all())
        _tune(buffer, layout, x, rank, num_sms)


def _check_sources(rows: Tensor, layout: Layout, prefix: Tensor, rank: int) -> None:
    """Each rank's rows hold its number, and the matrix of the handle says where they begin."""
    begin = 0
    for src, count in enumerate(layout.num_here):
        end = int(prefix[src][rank].item())
        assert end - begin == count
        assert bool((rows[begin:end].float() == src).all())
        begin = end


def _sent(
    buffer: Buffer, layout: Layout, rows: Any, rank: int, how: dict[str, Any], *, previous: bool, with_topk: bool
) -> tuple[Any, Any]:
    """A dispatch, and without expert ids a cached one; returns what arrived, and the handle."""
    constant = isinstance(rows, tuple) or bool((rows == rank).all())
    more: dict[str, Any] = {"previous_event": Buffer.capture()} if previous else {}
    weights = torch.full(layout.topk_idx.shape, rank, dtype=torch.float32, device=layout.topk_idx.device)
    if with_topk:
        more |= {"topk_idx": layout.topk_idx, "topk_weights": weights}
    recv, ids, recv_weights, counts, handle, event = buffer.dispatch(rows, **layout.arguments(), **how, **more)
    if how["async_finish"]:
        event.current_stream_wait()
    got = restored(*recv) if isinstance(recv, tuple) else recv
    assert got.shape[0] == sum(layout.num_here)
    assert counts == [sum(column) for column in zip(*layout.all_here, strict=True)]
    if constant:
        _check_sources(got, layout, handle[0], rank)
    if with_topk:
        assert [int((ids == i).sum()) for i in range(len(counts))] == counts
        recv_weights[ids == -1] = recv_weights.amax(1, keepdim=True).expand_as(recv_weights)[ids == -1]
        _check_sources(recv_weights, layout, handle[0], rank)
        _, back, event = buffer.combine(got, handle, topk_weights=recv_weights, **how)
        if how["async_finish"]:
            event.current_stream_wait()
        copies = layout.in_rank.sum(1, keepdim=True)
        assert calc_diff(back / copies.clamp(min=1), weights.masked_fill(copies == 0, 0.0)) < 1e-9
        return got, handle
    cached, *nothing, event = buffer.dispatch(rows, handle=handle, **how, **more)
    assert nothing == [None] * 4
    if how["async_finish"]:
        event.current_stream_wait()
    again = restored(*cached) if isinstance(cached, tuple) else cached
    assert torch.equal(again, got)
    return again, handle


def _sent_home(
    buffer: Buffer, layout: Layout, rows: Tensor, handle: Any, x: Tensor, how: dict[str, Any], *, previous: bool
) -> None:
    more = {"previous_event": Buffer.capture()} if previous else {}
    home, weights, event = buffer.combine(rows, handle, **how, **more)
    if how["async_finish"]:
        event.current_stream_wait()
    assert weights is None
    copies = layout.in_rank.sum(1, keepdim=True)
    assert calc_diff(home.float() / copies.clamp(min=1), x.masked_fill(copies == 0, 0.0)) < 5e-6


def _tune(buffer: Buffer, layout: Layout, x: Tensor, rank: int, num_sms: int) -> None:
    """Every config of DeepEP's tuning, the default ones included, gives the same."""
    *_, handle, _ = buffer.dispatch(x, **layout.arguments(), config=Config(num_sms, 8, 256))
    for rows in (cast(x), x):
        for chunk in (*range(4, 33, 2), 0):
            config = _config(num_sms, chunk, Buffer.get_dispatch_config(buffer.group_size))
            recv = buffer.dispatch(rows, handle=handle, config=config)[0]
            _check_sources(restored(*recv) if isinstance(recv, tuple) else recv, layout, handle[0], rank)
    home = None
    for chunk in (*range(1, 7), 0):
        config = _config(num_sms, chunk, Buffer.get_combine_config(buffer.group_size))
        combined = buffer.combine(recv, handle, config=config)[0]
        assert home is None or torch.equal(combined, home)
        home = combined


def _config(num_sms: int, chunk: int, default: Config) -> Config:
    if chunk:
        return Config(num_sms, chunk, 256)
    Buffer.set_num_sms(num_sms)
    return default
