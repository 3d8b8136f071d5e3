"""The rounds of a chaos soak that use DeepEP's API; the one part of ``testing`` that imports the shim."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.compat.deep_ep import Buffer as Buffer
from tokenferry.testing.cases import answers, returned_weights
from tokenferry.testing.chaos_calls import Call, without
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle
from tokenferry.testing.soak_cases import draw_case


def open_buffer(pg: dist.ProcessGroup, *, shrink: bool) -> Buffer:
    """Make a Buffer for both kinds of calls; collective."""
    return Buffer(pg, 1 << 20, low_latency_mode=True, explicitly_destroy=True, enable_shrink=shrink)


def masked_ranks(buffer: Buffer) -> frozenset[int]:
    """Return the ranks that low-latency calls skip."""
    if not buffer.enable_shrink:
        return frozenset()
    status = torch.zeros(buffer.group_size, dtype=torch.int32, device="cpu")
    buffer.low_latency_query_mask_buffer(status)
    return frozenset(rank for rank, masked in enumerate(status.tolist()) if masked)


def _call(buffer: Buffer, name: str, run: Callable[[], object]) -> Call:
    return Call(name, run, lambda: masked_ranks(buffer))


class Shim:
    """Buffer.dispatch, the same with its handle, and combine."""

    def __init__(self, buffer: Buffer, seed: int) -> None:
        pick = random.Random(seed)
        self._case = case = draw_case(pick, buffer.group_size)
        self._buffer, self._rank = buffer, buffer.rank
        self._oracle = Oracle(case.inputs(), case.experts)
        self._alignment = pick.randint(1, 4)
        self._sent: tuple[Tensor, Tensor, Tensor | None, list[int]] | None = None
        self._handle: Any = ()
        self._again: Tensor | None = None
        self._home: tuple[Tensor, Tensor | None] | None = None
        call = partial(_call, buffer)
        more = [call("redispatch", self._dispatch_again), call("combine", self._combine)]
        pick.shuffle(more)
        self.calls = [call("dispatch", self._dispatch), *more[: pick.randint(1, 2)]]

    def check(self) -> int:
        """See `Rounds.check`."""
        rank, oracle, what, checks = self._rank, self._oracle, f"rank {self._rank}, {self._case} Buffer", 0
        if self._sent is not None:
            x, ids, weights, counts = self._sent
            same_bits(f"{what} recv_x", x, oracle.x(rank))
            same_bits(f"{what} recv_topk_idx", ids, oracle.topk_idx(rank))
            if weights is not None:
                same_bits(f"{what} recv_topk_weights", weights, oracle.weights(rank))
            step = self._alignment
            assert counts == [-(-count // step) * step for count in oracle.expert_counts(rank)], f"{what} counts"
            checks += 4
        if self._again is not None:
            same_bits(f"{what} with a handle", self._again, oracle.x(rank) * 2)
            checks += 1
        if self._home is not None:
            ranks, size, dtype = range(self._case.ranks), oracle.num_delivered, self._case.dtype
            ys = [answers(self._case, oracle, there, size(there), dtype) for there in ranks]
            same_bits(f"{what} combined_x", self._home[0], oracle.combine(rank, ys))
            ws = [returned_weights(self._case, oracle, there, size(there)) for there in ranks]
            assert self._home[1] is not None, f"{what} combine lost the weights"
            same_bits(f"{what} combined_topk_weights", self._home[1], oracle.combine_weights(rank, ws))
            checks += 2
        return checks

    def _dispatch(self) -> None:
        mine, buffer, case = self._oracle.sent[self._rank], self._buffer, self._case
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(mine.topk_idx, case.experts)
        x, ids, weights, counts, self._handle, _ = buffer.dispatch(
            mine.x,
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            expert_alignment=self._alignment,
        )
        assert isinstance(x, Tensor)
        assert ids is not None
        assert counts is not None
        self._sent = x, ids, weights, counts

    def _dispatch_again(self) -> None:
        again = self._buffer.dispatch(self._oracle.sent[self._rank].x * 2, handle=self._handle)[0]
        assert isinstance(again, Tensor)
        self._again = again

    def _combine(self) -> None:
        case, oracle, rank = self._case, self._oracle, self._rank
        size = oracle.num_delivered(rank)
        y, w = answers(case, oracle, rank, size, case.dtype), returned_weights(case, oracle, rank, size)
        self._home = self._buffer.combine(y, self._handle, w)[:2]


class ShimDecode:
    """Buffer.low_latency_dispatch and low_latency_combine, with or without hooks; also after ranks were lost."""

    def __init__(self, buffer: Buffer, seed: int) -> None:
        pick = random.Random(seed)
        case = replace(draw_case(pick, buffer.group_size, decode=True), hidden=128 * pick.choice((1, 2, 4)))
        self._case = case = replace(case, dtype=torch.bfloat16)
        self._buffer, self._rank, self._inputs = buffer, buffer.rank, case.inputs()
        self._max_tokens = case.shape.max_tokens
        self._capacity = case.ranks * self._max_tokens
        self._rows: object = None
        self._counts = self._home = torch.empty(0, dtype=torch.bfloat16, device="cpu")
        self._handle: Any = ()
        self._hook: Callable[[], None] | None = None
        hooks, call = (pick.random() < 0.5, pick.random() < 0.5), partial(_call, buffer)
        self._arrival = call("decode_dispatch", lambda: self._dispatch(hook=hooks[0]))
        self.calls = [self._arrival]
        if hooks[0]:
            self._arrival = call("decode_dispatch hook", self._receive)
            self.calls.append(self._arrival)
        self._return = call("decode_combine", lambda: self._combine(hook=hooks[1]))
        self.calls.append(self._return)
        if hooks[1]:
            self._return = call("decode_combine hook", self._receive)
            self.calls.append(self._return)

    def check(self) -> int:
        """See `Rounds.check`."""
        what, checks = f"rank {self._rank}, {self._case} low latency", 0
        if self._arrival.returned:
            assert isinstance(self._rows, Tensor)
            oracle = self._oracle(self._arrival)
            places = torch.tensor([row.place for row in oracle.rows(self._rank)], dtype=torch.int64, device="cpu")
            same_bits(f"{what} rows", self._rows.view(-1, self._case.hidden)[places], oracle.x(self._rank))
            assert self._counts.tolist() == oracle.expert_counts(self._rank), f"{what} counts"
            checks += 2
        if self._return.returned:
            oracle = self._oracle(self._return)
            ys = [self._answers(oracle, there) for there in range(self._case.ranks)]
            same_bits(f"{what} combined", self._home, oracle.decode_combine(self._rank, ys))
            checks += 1
        return checks

    def _oracle(self, call: Call) -> Oracle:
        return without(self._inputs, self._case.experts, self._capacity, call.masked)

    def _answers(self, oracle: Oracle, there: int) -> Tensor:
        return answers(self._case, oracle, there, oracle.num_local * self._capacity, self._case.dtype)

    def _dispatch(self, *, hook: bool) -> None:
        mine = self._inputs[self._rank]
        self._rows, self._counts, self._handle, _, self._hook = self._buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, self._max_tokens, self._case.experts, use_fp8=False, return_recv_hook=hook
        )

    def _receive(self) -> None:
        assert self._hook is not None
        self._hook()

    def _combine(self, *, hook: bool) -> None:
        mine, oracle = self._inputs[self._rank], self._oracle(self._arrival)
        assert mine.topk_weights is not None
        y = self._answers(oracle, self._rank).view(oracle.num_local, self._capacity, self._case.hidden)
        self._home, _, self._hook = self._buffer.low_latency_combine(
            y,
            mine.topk_idx,
            mine.topk_weights,
            self._handle,
            return_recv_hook=hook,
        )
