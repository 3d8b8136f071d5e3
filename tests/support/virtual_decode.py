"""Decode calls of all virtual ranks, a kernel at a time: regions, what ranks bring, every byte that may be written."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from support.row_bytes import as_bytes, check_rows
from support.virtual_ranks import MACHINE, Block, Ranks, same_bytes
from tokenferry import Scale
from tokenferry.backends.cuda.decode import prepared_choices
from tokenferry.backends.cuda.workspace import Workspace, bytes_of, sizes_for
from tokenferry.kernels.control_block import MAX_RANKS
from tokenferry.kernels.decode_combine import spec as decode_combine_spec
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import close_each, same_bits
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast, ue8m0
from tokenferry.types import MoeShape

DISPATCH, COMBINE = 0, 1
SEND, RECEIVE, BOTH = 1, 2, 3
EPOCH, ALIVE, TOKENS, PLACES = 0, 1, 8, 16
"""Words of a plan's table."""
LARGE_HEAP_BYTES = 128 << 20
BLOCKS = 3
THREADS = 512 if MACHINE.device.type == "cuda" else 96
"""Fibers take time, and kernels take blocks of any number of warps."""
SCALES = (None, Scale.FLOAT32, Scale.POWER_OF_TWO, Scale.UE8M0)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
ENCODINGS = ("same", "fp8", "logfmt10")

_ranks: dict[int, Ranks] = {}


def decode_ranks(num_ranks: int) -> Ranks:
    """R virtual ranks whose channels go on from test to test; new ones after a failed test."""
    found = _ranks.get(num_ranks)
    if found is not None:
        sends = {tuple(found.words(rank, "sends", 2).tolist()) for rank in range(num_ranks)}
        masked = [int(found.words(rank, "masked")) for rank in range(num_ranks)]
        if any(found.failed()) or any(masked) or len(sends) > 1 or bool(found.records.any()):
            found = None
    if found is None:
        found = _ranks[num_ranks] = Ranks(num_ranks)
    found.reset()
    return found


class Bed:
    """A region on each rank, and how often was sent.

    Args:
        ranks: Who calls.
        shape: The largest sizes of a call.
        item_bytes: The most bytes of a number in a row.

    Attributes:
        sends: Of each channel, on all ranks.
        masked: What each rank's kernels tell the host: a word a rank.
    """

    def __init__(self, ranks: Ranks, shape: MoeShape, item_bytes: int = 4) -> None:
        R = ranks.num_ranks
        self.ranks, self.shape = ranks, shape
        self.sizes = sizes_for(shape, R, item_bytes)
        self.blocks = [ranks.block(rank, bytes_of(self.sizes, R)) for rank in range(R)]
        context = SimpleNamespace(num_ranks=R, device=ranks.device)
        self.workspaces = [Workspace(context, self.sizes, block) for block in self.blocks]
        for workspace in self.workspaces:
            workspace.clear()
        self.masked = [ranks.pinned(torch.zeros(MAX_RANKS, dtype=torch.int32)) for _ in range(R)]
        self.sends = ranks.words(0, "sends", 2).tolist()

    @classmethod
    def of(cls, case: Case, max_tokens: int = 0) -> Bed:
        """For one case; M is ``max_tokens``, or as small as can be."""
        shape = case.shape if max_tokens == 0 else replace(case.shape, max_tokens=max_tokens)
        ranks = decode_ranks(case.ranks) if max_tokens == 0 else Ranks(case.ranks, LARGE_HEAP_BYTES)
        return cls(ranks, shape, case.dtype.itemsize)

    def fields(self, rank: int) -> dict[str, object]:
        """What the params of both kernels have in common."""
        windows = self.ranks.windows
        bases = [block.address - window.base for block, window in zip(self.blocks, windows, strict=True)]
        return {
            "workspaces": tuple(base + at for base, at in zip(windows[rank].bases, bases, strict=True)),
            "masked_out": self.masked[rank],
            "max_tokens": self.shape.max_tokens,
        }

    def start_at(self, epoch: int) -> None:
        """As if all had sent and received so often, in both channels; a number of 32 bits with a sign."""
        R, halves = self.ranks.num_ranks, torch.tensor([epoch - epoch % 2, epoch - 1 + epoch % 2], dtype=torch.int32)
        for rank in range(R):
            self.ranks.words(rank, "sends", 2).fill_(epoch)
            for field, many in (("received", 2), ("acks", 2 * MAX_RANKS)):
                self.ranks.words(rank, field, 2 * many).copy_(halves.repeat(many))
        self.sends = [epoch, epoch]

    def check_clear(self, only: Sequence[int] | None = None) -> None:
        """No packet is under way to these ranks, or any, and nobody wrote around the regions."""
        R = self.ranks.num_ranks
        for rank, (workspace, block) in enumerate(zip(self.workspaces, self.blocks, strict=True)):
            if only is not None and rank not in only:
                continue
            left = (block.cpu()[workspace.rows_at :] != 0xFF).nonzero()
            if left.numel() == 0:
                continue
            at = int(left[0])
            rows = 2 * R * self.sizes.rows
            part, stride = ("rows", self.sizes.rows) if at < rows else ("answers", self.sizes.answers)
            at -= 0 if at < rows else rows
            where = f"{part} {at // stride} (half * R + from for rows, half for answers), byte {at % stride}"
            raise AssertionError(f"rank {rank}: {left.numel()} bytes of packets were not cleared, the first in {where}")


class Call(ABC):
    """What both kernels' calls have in common: who brings what, and who takes part.

    Attributes:
        epoch: Of its channel, once it was sent.
        alive: A bit for each rank that takes part.
    """

    channel = DISPATCH

    def __init__(self, bed: Bed, case: Case, sent: Sequence[Sent] | None = None) -> None:
        assert case.shape.max_tokens <= bed.shape.max_tokens
        self.bed, self.case, self.ranks = bed, case, bed.ranks
        self.inputs = tuple(case.inputs()) if sent is None else tuple(sent)
        self.room = case.ranks * bed.shape.max_tokens
        self.num_local = case.experts // case.ranks
        self.oracle = Oracle(self.inputs, case.experts, "masked", capacity=self.room)
        self.epoch, self.alive = 0, (1 << case.ranks) - 1

    def __str__(self) -> str:
        return f"{self.case} M{self.bed.shape.max_tokens} epoch {self.epoch}"

    def begin(self, phases: int) -> None:
        """Count a send."""
        if phases & SEND:
            self.bed.sends[self.channel] += 1
            self.epoch = self.bed.sends[self.channel]

    @abstractmethod
    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on some ranks, or all; does not wait."""

    @abstractmethod
    def check_rank(self, rank: int) -> None:
        """All that the kernel writes on a rank is right."""

    def run(self, phases: int = BOTH) -> None:
        self.ranks.call += 1
        self.launch(phases)
        self.ranks.wait()
        self.ranks.check_quiet()

    def check(self, only: Sequence[int] | None = None) -> None:
        for rank in range(self.case.ranks) if only is None else only:
            self.check_rank(rank)

    def table(self, rank: int) -> Tensor:
        """The plan's table ``[16 + R*M*K]`` int32 of a rank; words that nobody writes are poison."""
        R, M, K = self.case.ranks, self.bed.shape.max_tokens, self.case.top_k
        table = torch.empty(PLACES + R * M * K, dtype=torch.int32)
        table.view(torch.uint8).fill_(0xA5)
        table[EPOCH], table[ALIVE] = self.epoch, self.alive
        for src in range(R):
            choices = self.oracle.choices[src]
            table[TOKENS + src] = len(choices)
            for token, experts in enumerate(choices):
                at = PLACES + (src * M + token) * K
                table[at : at + K] = torch.tensor(self._places(rank, src, token, experts), dtype=torch.int32)
        return table

    def _places(self, rank: int, src: int, token: int, experts: list[int]) -> list[int]:
        first, places = rank * self.num_local, []
        for slot, expert in enumerate(experts):
            here = first <= expert < first + self.num_local and expert not in experts[:slot]
            places.append(self.oracle.place(rank, src, token, expert - first) if here else -1)
        return places

    def row_weights(self, rank: int) -> Tensor:
        """One for each of the oracle's rows: weights of the slots with that expert, from the first to the last."""
        rows = self.oracle.rows(rank)
        total = torch.zeros(len(rows))
        if not rows:
            return total
        experts = torch.tensor([rank * self.num_local + row.expert for row in rows])
        K = self.case.top_k
        chosen = torch.stack([self.inputs[row.src_rank].topk_idx[row.src_token].long() for row in rows])
        weights = torch.stack([self.inputs[row.src_rank].topk_weights[row.src_token] for row in rows])
        for slot in range(K):
            total = total + torch.where(chosen[:, slot] == experts, weights[:, slot], 0.0)
        return total

    def places(self, rank: int) -> list[int]:
        """Of the oracle's rows."""
        return [row.place for row in self.oracle.rows(rank)]


class Dispatch(Call):
    """One call of `spread` on all ranks.

    Args:
        bed: Where.
        case: Who brings what; ``sent`` instead of its inputs.
        fp8: How rows are cast; None: they are not.
        prepared: The host prepares the choices, as it does for large routings.
        counts: Whether ``received`` and ``wait_ns`` are counted.
    """

    def __init__(
        self,
        bed: Bed,
        case: Case,
        fp8: Scale | None = None,
        *,
        sent: Sequence[Sent] | None = None,
        prepared: bool = False,
        counts: bool = False,
    ) -> None:
        super().__init__(bed, case, sent)
        self.fp8, self.prepared, ranks = fp8, prepared, bed.ranks
        H, L, room, R = case.hidden, self.num_local, self.room, case.ranks
        self.row_bytes = H * (case.dtype.itemsize if fp8 is None else 1)
        self.groups = -(-H // 512) if fp8 is Scale.UE8M0 else -(-H // 128)
        sizes = {
            "out": L * room * self.row_bytes,
            "expert_counts": 4 * L,
            "src_token": 4 * L * room,
            "src_range": 8 * L * R,
            "table": 4 * (PLACES + room * case.top_k),
        }
        if fp8 is not None:
            sizes["scale_out"] = 4 * L * self.groups * room
        if case.weights:
            sizes["row_weights"] = 4 * L * room
        self.landed = [{name: ranks.block(rank, size) for name, size in sizes.items()} for rank in range(R)]
        self.received: list[Tensor] = []
        self.wait_ns: list[Tensor] = []
        if counts:
            self.received = [torch.full((L,), 5, dtype=torch.int32, device=ranks.device) for _ in range(R)]
            self.wait_ns = [torch.zeros(R, dtype=torch.int64, device=ranks.device) for _ in range(R)]
        self._up = [[ranks.on_device(one.x), ranks.on_device(one.topk_idx)] for one in self.inputs]
        self._weights = [None if one.topk_weights is None else ranks.on_device(one.topk_weights) for one in self.inputs]

    # ------------------------------------------------------------------ launches

    @property
    def config(self) -> dict[str, int]:
        return {"type": decode_dispatch_spec.RAW if self.fp8 is None else TYPES.index(self.case.dtype)}

    @property
    def sizes(self) -> tuple[int, int, int]:
        case, M = self.case, self.bed.shape.max_tokens
        return BLOCKS, THREADS, decode_dispatch_spec.smem_bytes(M * case.top_k, case.experts, case.ranks, M)

    def fields(self, rank: int, phases: int = BOTH, **more: object) -> dict[str, object]:
        """Params of `spread`."""
        bed, case, workspace = self.bed, self.case, self.bed.workspaces[rank]
        x, topk_idx = self._up[rank]
        values: dict[str, object] = {
            **bed.fields(rank),
            **{name: block.address for name, block in self.landed[rank].items()},
            "x": x,
            "topk_idx": topk_idx,
            "num_tokens": topk_idx.shape[0],
            "phases": phases,
            "notes_at": workspace.notes_at,
            "packets_at": workspace.rows_at,
            "words_stride": bed.sizes.words,
            "notes_stride": bed.sizes.notes,
            "packets_stride": bed.sizes.rows,
            "top_k": case.top_k,
            "num_local": self.num_local,
            "columns": case.hidden,
            "row_units": self.row_bytes // 16,
            "scale_units": 0 if self.fp8 is None else -(-case.hidden // 512),
            "scale_format": SCALES.index(self.fp8),
            "wide": int(topk_idx.dtype is torch.int64),
            "weighted": int(case.weights),
            "per_local": 1 / self.num_local,
            "handshake": {0: 6, 1: case.experts},
        }
        if self._weights[rank] is not None:
            values["weights"] = self._weights[rank]
        if self.prepared:
            choices = prepared_choices(topk_idx, case.experts)
            values["choices"] = 0 if choices is None else choices  # without tokens there is nothing to prepare
        if self.received:
            values |= {"received": self.received[rank], "wait_ns": self.wait_ns[rank]}
        return {**values, **more}

    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on some ranks, or all; does not wait."""
        self.begin(phases)
        fields = [self.fields(r, phases, **more) if only is None or r in only else None for r in range(self.case.ranks)]
        self.ranks.launch(decode_dispatch_spec.SPEC, fields, self.sizes, self.config)

    # ------------------------------------------------------------------ what has to be there

    def check_rank(self, rank: int) -> None:
        """Every byte of what the kernel writes: what has to be there, and poison where it has nothing to write."""
        landed, rows, places = self.landed[rank], self.oracle.rows(rank), self.places(rank)
        what = f"{self} {self.fp8} rank {rank}"
        came = [self.rows_of(row.src_rank)[row.src_token] for row in rows]
        check_rows(f"{what} rows", landed["out"], places, came, self.row_bytes)
        if self.fp8 is not None:
            self._check_scales(what, landed["scale_out"], rank)
        tokens = as_bytes(torch.tensor([row.src_token for row in rows], dtype=torch.int32)).reshape(-1, 4)
        check_rows(f"{what} src_token", landed["src_token"], places, list(tokens), 4)
        if self.case.weights:
            weights = as_bytes(self.row_weights(rank)).reshape(-1, 4)
            check_rows(f"{what} row_weights", landed["row_weights"], places, list(weights), 4)
        counts = torch.tensor(self.oracle.expert_counts(rank), dtype=torch.int32)
        same_bytes(f"{what} expert_counts", landed["expert_counts"].cpu(), as_bytes(counts), 4)
        ranges = torch.tensor([[start << 32 | count for start, count in e] for e in self.oracle.decode_ranges(rank)])
        same_bytes(f"{what} src_range", landed["src_range"].cpu(), as_bytes(ranges).flatten(), 8)
        same_bytes(f"{what} table", landed["table"].cpu(), as_bytes(self.table(rank)), 4)
        if self.received:
            same_bits(f"{what} received", self.received[rank], counts + 5)

    @functools.cache  # noqa: B019 - dies with the test
    def rows_of(self, src: int) -> Tensor:
        """``[T, row bytes]`` of a rank's tokens as they arrive. Where 16 bytes are all ones, the lowest bit is not."""
        if self.fp8 is not None:
            return torch.stack([data for data, _ in self.casts(src)])
        found = as_bytes(self.inputs[src].x).reshape(-1, self.row_bytes // 16, 16).clone()
        ones = (found == 0xFF).all(dim=-1)
        found[..., 0] -= ones.to(torch.uint8)
        return found.reshape(-1, self.row_bytes)

    def _check_scales(self, what: str, block: Block, rank: int) -> None:
        """Scales lie column by column: [L, groups, room]."""
        L, S, room = self.num_local, self.groups, self.room
        at, found = [], []
        for row in self.oracle.rows(rank):
            e, place = divmod(row.place, room)
            at += [(e * S + group) * room + place for group in range(S)]
            found += list(self.casts(row.src_rank)[row.src_token][1].reshape(S, 4))
        assert block.tensor.numel() == 4 * L * S * room
        check_rows(f"{what} scales", block, at, found, 4)

    @functools.cache  # noqa: B019 - dies with the test
    def casts(self, src: int) -> list[tuple[Tensor, Tensor]]:
        """(bytes of the row, bytes of its scales) of each token."""
        done = []
        for row in self.inputs[src].x:
            data, scale = fp8_cast(row, power_of_two=self.fp8 is not Scale.FLOAT32)
            done.append((as_bytes(data), as_bytes(ue8m0(scale) if self.fp8 is Scale.UE8M0 else scale)))
        return done


class Combine(Call):
    """One call of `collect` on all ranks, along tables made here.

    Args:
        bed: Where.
        case: Whose tokens; ``dtype`` is that of what experts answer.
        fast: Sum before the encoding.
        encoding: What travels.
        hook: Whether there is a ticket, for a launch that receives alone.
        sent: Instead of the case's inputs.
        ys: What each rank gives back, ``[L * room, H]``; None: made here, NaN where nobody may read.
    """

    channel = COMBINE

    def __init__(
        self,
        bed: Bed,
        case: Case,
        *,
        fast: bool = False,
        encoding: str = "same",
        hook: bool = False,
        sent: Sequence[Sent] | None = None,
        ys: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(bed, case, sent)
        self.fast, self.encoding, ranks, R = fast, encoding, bed.ranks, case.ranks
        size = self.num_local * self.room
        made = [answers(case, self.oracle, rank, size, case.dtype) for rank in range(R)] if ys is None else ys
        self.ys = list(made)
        row_bytes = case.hidden * case.dtype.itemsize
        self.out = [ranks.block(rank, tokens * row_bytes) for rank, tokens in enumerate(case.tokens)]
        self.tickets = [ranks.poisoned(2, dtype=torch.int32) if hook else None for _ in range(R)]
        self.wait_ns = [torch.zeros(R, dtype=torch.int64, device=ranks.device) for _ in range(R)]
        self.y_there = [ranks.on_device(y) for y in self.ys]
        self._up = [(ranks.on_device(one.topk_idx), ranks.on_device(one.topk_weights)) for one in self.inputs]
        self.epoch = 77  # of the dispatch: only 0 means something
        self._tables = [ranks.on_device(self.table(rank)) for rank in range(R)]
        self._row_weights = [ranks.on_device(self._weights_of(rank)) for rank in range(R)]

    def _weights_of(self, rank: int) -> Tensor:
        """Row by row; NaN where there is none."""
        weights = torch.full((self.num_local * self.room,), torch.nan)
        weights[torch.tensor(self.places(rank), dtype=torch.int64)] = self.row_weights(rank)
        return weights

    # ------------------------------------------------------------------ launches

    @property
    def config(self) -> dict[str, int]:
        return {
            "type": TYPES.index(self.case.dtype),
            "fast": int(self.fast),
            "encoding": ENCODINGS.index(self.encoding),
        }

    def fields(self, rank: int, phases: int = BOTH, **more: object) -> dict[str, object]:
        """Params of `collect`."""
        bed, case, workspace = self.bed, self.case, self.bed.workspaces[rank]
        topk_idx, weights = self._up[rank]
        values: dict[str, object] = {
            **bed.fields(rank),
            "y": self.y_there[rank],
            "out": self.out[rank].address,
            "topk_idx": topk_idx,
            "weights": weights,
            "row_weights": self._row_weights[rank],
            "table": self._tables[rank],
            "packets_at": workspace.answers_at,
            "packets_stride": bed.sizes.answers,
            "num_tokens": topk_idx.shape[0],
            "phases": phases,
            "top_k": case.top_k,
            "num_local": self.num_local,
            "columns": case.hidden,
            "wide": int(topk_idx.dtype is torch.int64),
            "wait_ns": self.wait_ns[rank],
            "handshake": {0: 7, 1: int(self.fast)},
        }
        if self.tickets[rank] is not None:
            values["pending"] = self.tickets[rank]
        return {**values, **more}

    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on some ranks, or all; does not wait."""
        self.begin(phases)
        fields = [self.fields(r, phases, **more) if only is None or r in only else None for r in range(self.case.ranks)]
        self.ranks.launch(decode_combine_spec.SPEC, fields, (BLOCKS, THREADS, 0), self.config)

    # ------------------------------------------------------------------ what has to be there

    def sums(self, rank: int) -> Tensor:
        """``[T, H]``, brought to the CPU; fails if somebody wrote around it."""
        return self.out[rank].cpu().view(self.case.dtype).reshape(-1, self.case.hidden)

    def check_rank(self, rank: int) -> None:
        what = f"{self} fast={self.fast} {self.encoding} rank {rank}"
        got = self.sums(rank)
        want = self.oracle.decode_combine(rank, self.ys, fast=self.fast, encoding=self.encoding)
        if self.encoding == "logfmt10":
            self._close(what, got, want, rank)
        else:
            same_bits(what, got, want)
        ticket = self.tickets[rank]
        assert ticket is None or ticket.tolist() == [self.epoch, self.alive], f"{what}: ticket {ticket}"

    def _close(self, what: str, got: Tensor, want: Tensor, rank: int) -> None:
        """Logarithms differ in their last bits, and a number half-way between two codes takes either: a few may."""
        one_code, magnitude = self.oracle.decode_slack(rank, self.ys, fast=self.fast)
        rounded = want.float().abs() * (0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps)
        fine = magnitude * 2.0**-16 + rounded
        close_each(what, got, want, fine + 1.01 * one_code)
        half_way = (got.float() - want.float()).abs() > fine
        assert int(half_way.sum()) <= max(2, half_way.numel() // 100), f"{what}: {int(half_way.sum())} have other codes"


# ---------------------------------------------------------------------- orders of calls, the same for both kernels


def _check_all(calls: Sequence[Call]) -> None:
    bed = calls[0].bed
    bed.ranks.wait()
    bed.ranks.check_quiet()
    for one in calls:
        one.check()
    bed.check_clear()


def all_at_once(calls: Sequence[Call]) -> None:
    """Launch all of them, each with another rank late."""
    ranks = calls[0].ranks
    for i, one in enumerate(calls):
        ranks.delay(i % ranks.num_ranks, 1)
        one.launch()
    _check_all(calls)


def sends_and_receipts_at_once(calls: Sequence[Call]) -> None:
    """Launch sends and, before two more, their receipts; every fourth call is both. Nobody waits in between."""
    bed, owed = calls[0].bed, []
    for i, one in enumerate(calls):
        bed.ranks.delay(i % bed.ranks.num_ranks, 1)
        while owed and owed[0].epoch < bed.sends[one.channel]:
            owed.pop(0).launch(RECEIVE)
        if i % 4 == 3:
            one.launch(BOTH)
            continue
        one.launch(SEND)
        owed.append(one)
    for one in owed:
        one.launch(RECEIVE)
    _check_all(calls)


def the_third_waits_for_room(first: Call, second: Call, third: Call) -> None:
    """Of two ranks, one receives the first call late: the other's third send waits for that."""
    bed = first.bed
    first.run(SEND)
    second.run(SEND)
    first.launch(RECEIVE, only=(0,))
    bed.ranks.wait()
    third.launch(SEND, only=(0,))
    bed.ranks.delay(1, 20)
    first.launch(RECEIVE, only=(1,))
    bed.sends[third.channel] -= 1  # the second half of one launch
    third.launch(SEND, only=(1,))
    bed.ranks.wait()
    bed.ranks.check_quiet()
    for one in (second, third):
        one.run(RECEIVE)
    _check_all((first, second, third))
