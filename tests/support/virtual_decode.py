"""Decode calls on all virtual ranks, one kernel at a time: workspaces, inputs, and a check of every byte written."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from support.row_bytes import as_bytes, check_rows
from support.virtual_ranks import MACHINE, Block, Ranks, dynamic_bytes, same_bytes
from tokenferry import Scale
from tokenferry.backends.cuda.decode import prepared_choices
from tokenferry.backends.cuda.workspace import Workspace, bytes_of, sizes_for
from tokenferry.kernels.codes import RAW
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
"""The emulator runs fewer threads, to be fast: kernels accept any number of warps a block."""
SCALES = (None, Scale.FLOAT32, Scale.POWER_OF_TWO, Scale.UE8M0)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
ENCODINGS = ("same", "fp8", "logfmt10")

SHORT_S = 0.2
"""Deadline of kernels whose peer never comes, in seconds."""

_ranks: dict[int, Ranks] = {}


def decode_ranks(num_ranks: int) -> Ranks:
    """Return R virtual ranks, whose epochs continue from test to test; new ones after a failed test."""
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


def late_s(num_ranks: int) -> float:
    """Return a deadline in seconds that all ranks but a missing one meet."""
    return SHORT_S if num_ranks == 2 or MACHINE.device.type == "cuda" else 3.0


class VirtualGroup:
    """Virtual ranks with a decode workspace each.

    Args:
        ranks: The ranks that call.
        shape: The largest sizes of a call.
        item_bytes: The most bytes of an element of a row.

    Attributes:
        sends: Number of sends so far, by channel; the same on all ranks.
        masked: The masks that the kernels of each rank write for its host: one word a rank.
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
    def of(cls, case: Case, max_tokens: int = 0) -> VirtualGroup:
        """Make the group for one case; M is ``max_tokens``, or if that is 0 as small as possible."""
        shape = case.shape if max_tokens == 0 else replace(case.shape, max_tokens=max_tokens)
        ranks = decode_ranks(case.ranks) if max_tokens == 0 else Ranks(case.ranks, LARGE_HEAP_BYTES)
        return cls(ranks, shape, case.dtype.itemsize)

    def fields(self, rank: int) -> dict[str, object]:
        """Return the params that both kernels share."""
        windows = self.ranks.windows
        bases = [block.address - window.base for block, window in zip(self.blocks, windows, strict=True)]
        return {
            "workspaces": tuple(base + at for base, at in zip(windows[rank].bases, bases, strict=True)),
            "masked_out": self.masked[rank],
            "max_tokens": self.shape.max_tokens,
        }

    def start_after(self, epoch: int) -> None:
        """Set both channels of all ranks to the state after call ``epoch``, a signed 32-bit number."""
        R, halves = self.ranks.num_ranks, torch.tensor([epoch - epoch % 2, epoch - 1 + epoch % 2], dtype=torch.int32)
        for rank in range(R):
            self.ranks.words(rank, "sends", 2).fill_(epoch)
            for field, many in (("received", 2), ("acks", 2 * MAX_RANKS)):
                self.ranks.words(rank, field, 2 * many).copy_(halves.repeat(many))
        self.sends = [epoch, epoch]

    def check_clear(self, only: Sequence[int] | None = None) -> None:
        """Check that these ranks (default: all) hold no packets, and that nothing was written around the workspaces."""
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


class DecodeCall(ABC):
    """One call of a decode kernel on all ranks: inputs and expected results.

    Attributes:
        epoch: Epoch of its channel, once it was sent.
        alive: Bit r: rank r takes part.
    """

    channel = DISPATCH

    def __init__(self, group: VirtualGroup, case: Case, sent: Sequence[Sent] | None = None) -> None:
        assert case.shape.max_tokens <= group.shape.max_tokens
        self.group, self.case, self.ranks = group, case, group.ranks
        self.inputs = tuple(case.inputs()) if sent is None else tuple(sent)
        self.capacity = case.ranks * group.shape.max_tokens
        self.num_local = case.experts // case.ranks
        self.oracle = Oracle(self.inputs, case.experts, "masked", capacity=self.capacity)
        self.epoch, self.alive = 0, (1 << case.ranks) - 1

    def __str__(self) -> str:
        return f"{self.case} M{self.group.shape.max_tokens} epoch {self.epoch}"

    def begin(self, phases: int) -> None:
        """Count a send."""
        if phases & SEND:
            self.group.sends[self.channel] += 1
            self.epoch = self.group.sends[self.channel]

    @abstractmethod
    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on these ranks (default: all), without waiting."""

    @abstractmethod
    def check_rank(self, rank: int) -> None:
        """Check all that the kernel writes on a rank."""

    def run(self, phases: int = BOTH) -> None:
        self.ranks.call += 1
        self.launch(phases)
        self.ranks.wait()
        self.ranks.check_quiet()

    def check(self, only: Sequence[int] | None = None) -> None:
        for rank in range(self.case.ranks) if only is None else only:
            self.check_rank(rank)

    def table(self, rank: int) -> Tensor:
        """Return the expected table ``[16 + R*M*K]`` int32 of a rank; words that are not written are poison."""
        R, M, K = self.case.ranks, self.group.shape.max_tokens, self.case.top_k
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
        """Return the weight of each of the oracle's rows: the sum over the slots with its expert, in slot order."""
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
        """Return the places of the oracle's rows."""
        return [row.place for row in self.oracle.rows(rank)]


class DispatchCall(DecodeCall):
    """One call of the kernel `decode_dispatch` on all ranks.

    Args:
        group: The ranks and their workspaces.
        case: Sizes and inputs.
        fp8: Scale format of the FP8 cast; None: rows are not cast.
        sent: Inputs instead of those of the case.
        prepared: Whether the host prepares the choices, as it does for large routings.
        counts: Whether ``received`` and ``wait_ns`` are counted.
    """

    def __init__(
        self,
        group: VirtualGroup,
        case: Case,
        fp8: Scale | None = None,
        *,
        sent: Sequence[Sent] | None = None,
        prepared: bool = False,
        counts: bool = False,
    ) -> None:
        super().__init__(group, case, sent)
        self.fp8, self.prepared, ranks = fp8, prepared, group.ranks
        H, L, capacity, R = case.hidden, self.num_local, self.capacity, case.ranks
        self.row_bytes = H * (case.dtype.itemsize if fp8 is None else 1)
        self.groups = -(-H // 512) if fp8 is Scale.UE8M0 else -(-H // 128)
        sizes = {
            "out": L * capacity * self.row_bytes,
            "expert_counts": 4 * L,
            "src_token": 4 * L * capacity,
            "src_range": 8 * L * R,
            "table": 4 * (PLACES + capacity * case.top_k),
        }
        if fp8 is not None:
            sizes["scale_out"] = 4 * L * self.groups * capacity
        if case.weights:
            sizes["row_weights"] = 4 * L * capacity
        self.outputs = [{name: ranks.block(rank, size) for name, size in sizes.items()} for rank in range(R)]
        self.received: list[Tensor] = []
        self.wait_ns: list[Tensor] = []
        if counts:
            self.received = [torch.full((L,), 5, dtype=torch.int32, device=ranks.device) for _ in range(R)]
            self.wait_ns = [torch.zeros(R, dtype=torch.int64, device=ranks.device) for _ in range(R)]
        self._on_device = [[ranks.on_device(given.x), ranks.on_device(given.topk_idx)] for given in self.inputs]
        self._weights = [
            None if given.topk_weights is None else ranks.on_device(given.topk_weights) for given in self.inputs
        ]

    # ------------------------------------------------------------------ launches

    @property
    def config(self) -> dict[str, int]:
        return {"type": RAW if self.fp8 is None else TYPES.index(self.case.dtype), "relays": 0}

    @property
    def sizes(self) -> tuple[int, int, int]:
        case, M = self.case, self.group.shape.max_tokens
        return BLOCKS, THREADS, decode_dispatch_spec.smem_bytes(M * case.top_k, self.kept, case.experts, case.ranks, M)

    @property
    def kept(self) -> int:
        case, room = self.case, dynamic_bytes(decode_dispatch_spec.SPEC)
        return decode_dispatch_spec.kept_bytes(case.experts, case.ranks, self.group.shape.max_tokens, room)

    def fields(self, rank: int, phases: int = BOTH, **more: object) -> dict[str, object]:
        """Return the params of the kernel on a rank."""
        group, case, workspace = self.group, self.case, self.group.workspaces[rank]
        x, topk_idx = self._on_device[rank]
        values: dict[str, object] = {
            **group.fields(rank),
            **{name: block.address for name, block in self.outputs[rank].items()},
            "x": x,
            "topk_idx": topk_idx,
            "num_tokens": topk_idx.shape[0],
            "phases": phases,
            "notes_at": workspace.notes_at,
            "packets_at": workspace.rows_at,
            "words_stride": group.sizes.words,
            "notes_stride": group.sizes.notes,
            "packets_stride": group.sizes.rows,
            "top_k": case.top_k,
            "num_local": self.num_local,
            "columns": case.hidden,
            "capacity": self.capacity,
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
            choices = prepared_choices(topk_idx, case.experts, self.kept)
            values["choices"] = 0 if choices is None else choices  # without tokens there is nothing to prepare
        if self.received:
            values |= {"received": self.received[rank], "wait_ns": self.wait_ns[rank]}
        return {**values, **more}

    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on these ranks (default: all), without waiting."""
        self.begin(phases)
        fields = [self.fields(r, phases, **more) if only is None or r in only else None for r in range(self.case.ranks)]
        self.ranks.launch(decode_dispatch_spec.SPEC, fields, self.sizes, self.config)

    # ------------------------------------------------------------------ expected results

    def check_rank(self, rank: int) -> None:
        """Check every byte of the outputs: the expected values, and poison where the kernel writes nothing."""
        outputs, rows, places = self.outputs[rank], self.oracle.rows(rank), self.places(rank)
        what = f"{self} {self.fp8} rank {rank}"
        arrived = [self.rows_of(row.src_rank)[row.src_token] for row in rows]
        check_rows(f"{what} rows", outputs["out"], places, arrived, self.row_bytes)
        if self.fp8 is not None:
            self._check_scales(what, outputs["scale_out"], rank)
        tokens = as_bytes(torch.tensor([row.src_token for row in rows], dtype=torch.int32)).reshape(-1, 4)
        check_rows(f"{what} src_token", outputs["src_token"], places, list(tokens), 4)
        if self.case.weights:
            weights = as_bytes(self.row_weights(rank)).reshape(-1, 4)
            check_rows(f"{what} row_weights", outputs["row_weights"], places, list(weights), 4)
        counts = torch.tensor(self.oracle.expert_counts(rank), dtype=torch.int32)
        same_bytes(f"{what} expert_counts", outputs["expert_counts"].cpu(), as_bytes(counts), 4)
        ranges = torch.tensor([[start << 32 | count for start, count in e] for e in self.oracle.decode_ranges(rank)])
        same_bytes(f"{what} src_range", outputs["src_range"].cpu(), as_bytes(ranges).flatten(), 8)
        same_bytes(f"{what} table", outputs["table"].cpu(), as_bytes(self.table(rank)), 4)
        if self.received:
            same_bits(f"{what} received", self.received[rank], counts + 5)

    @functools.cache  # noqa: B019 - dies with the test
    def rows_of(self, src: int) -> Tensor:
        """Return the rows of a rank as they arrive, ``[T, row bytes]``. 16 bytes of ones lose their lowest bit."""
        if self.fp8 is not None:
            return torch.stack([data for data, _ in self.casts(src)])
        found = as_bytes(self.inputs[src].x).reshape(-1, self.row_bytes // 16, 16).clone()
        ones = (found == 0xFF).all(dim=-1)
        found[..., 0] -= ones.to(torch.uint8)
        return found.reshape(-1, self.row_bytes)

    def _check_scales(self, what: str, block: Block, rank: int) -> None:
        """Check the scales, which are column-major: ``[L, groups, capacity]``."""
        L, S, capacity = self.num_local, self.groups, self.capacity
        at, found = [], []
        for row in self.oracle.rows(rank):
            e, place = divmod(row.place, capacity)
            at += [(e * S + group) * capacity + place for group in range(S)]
            found += list(self.casts(row.src_rank)[row.src_token][1].reshape(S, 4))
        assert block.tensor.numel() == 4 * L * S * capacity
        check_rows(f"{what} scales", block, at, found, 4)

    @functools.cache  # noqa: B019 - dies with the test
    def casts(self, src: int) -> list[tuple[Tensor, Tensor]]:
        """Return (bytes of the row, bytes of its scales) of each token."""
        done = []
        for row in self.inputs[src].x:
            data, scale = fp8_cast(row, power_of_two=self.fp8 is not Scale.FLOAT32)
            done.append((as_bytes(data), as_bytes(ue8m0(scale) if self.fp8 is Scale.UE8M0 else scale)))
        return done


class CombineCall(DecodeCall):
    """One call of the kernel `decode_combine` on all ranks, along tables that are made here.

    Args:
        group: The ranks and their workspaces.
        case: Sizes and inputs; ``dtype`` is that of the experts' rows.
        fast: Whether each rank sums its rows before it sends them.
        encoding: Encoding of the rows on the way.
        hook: Whether there is a ``pending`` tensor, for separate launches that send and receive.
        sent: Inputs instead of those of the case.
        ys: Experts' rows of each rank, ``[L * capacity, H]``; None: made here, NaN in rows that must not be read.
    """

    channel = COMBINE

    def __init__(
        self,
        group: VirtualGroup,
        case: Case,
        *,
        fast: bool = False,
        encoding: str = "same",
        hook: bool = False,
        sent: Sequence[Sent] | None = None,
        ys: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(group, case, sent)
        self.fast, self.encoding, ranks, R = fast, encoding, group.ranks, case.ranks
        size = self.num_local * self.capacity
        made = [answers(case, self.oracle, rank, size, case.dtype) for rank in range(R)] if ys is None else ys
        self.ys = list(made)
        row_bytes = case.hidden * case.dtype.itemsize
        self.out = [ranks.block(rank, tokens * row_bytes) for rank, tokens in enumerate(case.tokens)]
        self.pending = [ranks.poisoned(2, dtype=torch.int32) if hook else None for _ in range(R)]
        self.wait_ns = [torch.zeros(R, dtype=torch.int64, device=ranks.device) for _ in range(R)]
        self.y_on_device = [ranks.on_device(y) for y in self.ys]
        self._on_device = [
            (ranks.on_device(given.topk_idx), ranks.on_device(given.topk_weights)) for given in self.inputs
        ]
        self.epoch = 77  # of the dispatch: any number but 0
        self._tables = [ranks.on_device(self.table(rank)) for rank in range(R)]
        self._row_weights = [ranks.on_device(self._weights_of(rank)) for rank in range(R)]

    def _weights_of(self, rank: int) -> Tensor:
        """Return a weight for each row of ``y``; NaN where there is no row."""
        weights = torch.full((self.num_local * self.capacity,), torch.nan)
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
        """Return the params of the kernel on a rank."""
        group, case, workspace = self.group, self.case, self.group.workspaces[rank]
        topk_idx, weights = self._on_device[rank]
        values: dict[str, object] = {
            **group.fields(rank),
            "y": self.y_on_device[rank],
            "out": self.out[rank].address,
            "topk_idx": topk_idx,
            "weights": weights,
            "row_weights": self._row_weights[rank],
            "table": self._tables[rank],
            "packets_at": workspace.answers_at,
            "packets_stride": group.sizes.answers,
            "num_tokens": topk_idx.shape[0],
            "phases": phases,
            "top_k": case.top_k,
            "num_local": self.num_local,
            "columns": case.hidden,
            "wide": int(topk_idx.dtype is torch.int64),
            "wait_ns": self.wait_ns[rank],
            "handshake": {0: 7, 1: int(self.fast)},
        }
        if self.pending[rank] is not None:
            values["pending"] = self.pending[rank]
        return {**values, **more}

    def launch(self, phases: int = BOTH, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch on these ranks (default: all), without waiting."""
        self.begin(phases)
        fields = [self.fields(r, phases, **more) if only is None or r in only else None for r in range(self.case.ranks)]
        self.ranks.launch(decode_combine_spec.SPEC, fields, (BLOCKS, THREADS, 0), self.config)

    # ------------------------------------------------------------------ expected results

    def sums(self, rank: int) -> Tensor:
        """Copy ``out [T, H]`` to the CPU; fails if anything was written around it."""
        return self.out[rank].cpu().view(self.case.dtype).reshape(-1, self.case.hidden)

    def check_rank(self, rank: int) -> None:
        what = f"{self} fast={self.fast} {self.encoding} rank {rank}"
        got = self.sums(rank)
        want = self.oracle.decode_combine(rank, self.ys, fast=self.fast, encoding=self.encoding)
        if self.encoding == "logfmt10":
            self._close(what, got, want, rank)
        else:
            same_bits(what, got, want)
        pending = self.pending[rank]
        assert pending is None or pending.tolist() == [self.epoch, self.alive], f"{what}: pending {pending}"

    def _close(self, what: str, got: Tensor, want: Tensor, rank: int) -> None:
        """Compare with tolerance: logarithms differ in their last bits, so a few numbers get the neighbouring code."""
        one_code, magnitude = self.oracle.decode_slack(rank, self.ys, fast=self.fast)
        rounded = want.float().abs() * (0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps)
        fine = magnitude * 2.0**-16 + rounded
        close_each(what, got, want, fine + 1.01 * one_code)
        half_way = (got.float() - want.float()).abs() > fine
        assert int(half_way.sum()) <= max(2, half_way.numel() // 100), (
            f"{what}: {int(half_way.sum())} got neighbouring codes"
        )


# ---------------------------------------------------------------------- sequences of calls, the same for both kernels


def _check_all(calls: Sequence[DecodeCall]) -> None:
    group = calls[0].group
    group.ranks.wait()
    group.ranks.check_quiet()
    for call in calls:
        call.check()
    group.check_clear()


def launch_back_to_back(calls: Sequence[DecodeCall]) -> None:
    """Launch all calls without waiting in between; in each another rank is late."""
    ranks = calls[0].ranks
    for i, call in enumerate(calls):
        ranks.delay(i % ranks.num_ranks, 1)
        call.launch()
    _check_all(calls)


def sends_and_receives_back_to_back(calls: Sequence[DecodeCall]) -> None:
    """Launch sends, and each receive before the second send after it, without waiting; every fourth call does both."""
    group, unreceived = calls[0].group, []
    for i, call in enumerate(calls):
        group.ranks.delay(i % group.ranks.num_ranks, 1)
        while unreceived and unreceived[0].epoch < group.sends[call.channel]:
            unreceived.pop(0).launch(RECEIVE)
        if i % 4 == 3:
            call.launch(BOTH)
            continue
        call.launch(SEND)
        unreceived.append(call)
    for call in unreceived:
        call.launch(RECEIVE)
    _check_all(calls)


def third_send_waits_for_acks(first: DecodeCall, second: DecodeCall, third: DecodeCall) -> None:
    """Let one of two ranks receive the first call late: the third send of the other waits for its acknowledgement."""
    group = first.group
    first.run(SEND)
    second.run(SEND)
    first.launch(RECEIVE, only=(0,))
    group.ranks.wait()
    third.launch(SEND, only=(0,))
    group.ranks.delay(1, 20)
    first.launch(RECEIVE, only=(1,))
    group.sends[third.channel] -= 1  # a launch on the other rank of the same call
    third.launch(SEND, only=(1,))
    group.ranks.wait()
    group.ranks.check_quiet()
    for call in (second, third):
        call.run(RECEIVE)
    _check_all((first, second, third))
