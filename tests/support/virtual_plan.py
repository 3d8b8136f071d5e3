"""Where every row goes, by plain loops over the choices of all ranks, in the terms of the heads of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from support.virtual_ranks import Ranks
from tokenferry.kernels.control_block import HOST_EXPERTS_WORD, RANK_SHIFT
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.testing.oracle import Oracle

LAYOUTS = ("rows", "experts", "masked")
NO_LIMIT = 0xFFFFFFFF


@dataclass(frozen=True)
class Form:
    """A layout of rows, with its alignment (experts), capacity of an expert (masked), and most rows of a rank."""

    layout: str
    alignment: int = 1
    capacity: int = 0
    row_limit: int = NO_LIMIT

    @property
    def by_expert(self) -> bool:
        return self.layout != "rows"


class Expected:
    """The plan of all ranks.

    Args:
        choices: The experts of each token of each source; -1: none. Sources are the ranks, or with several segments
            first those of the first segment, one of each rank, and so on.
        num_experts: E.
        form: The layout of rows.
        segments: How many segments the routing of each rank has.
    """

    def __init__(self, choices: Sequence[list[list[int]]], num_experts: int, form: Form, segments: int = 1) -> None:
        self.choices, self.num_experts, self.form, self.segments = choices, num_experts, form, segments
        self.num_sources = S = len(choices)
        self.num_ranks = R = S // segments
        self.num_local = L = num_experts // R
        self.top_k = max((len(tokens[0]) for tokens in choices if tokens), default=1)
        self.sent: list[list[list[int]]] = [[[] for _ in range(R)] for _ in range(S)]  # [from][to] tokens
        self.wanted: list[list[list[int]]] = [[[] for _ in range(num_experts)] for _ in range(S)]  # [from][e] tokens
        for src, tokens in enumerate(choices):
            for token, experts in enumerate(tokens):
                distinct = {e for e in experts if e >= 0}
                for e in distinct:
                    self.wanted[src][e].append(token)
                for rank in {e // L for e in distinct}:
                    self.sent[src][rank].append(token)
        self.starts, self.ends = self._lay_out()
        self.places: dict[tuple[int, int, int], int] = {}
        for e, start in enumerate(self.starts):
            for src in range(S):
                for token in self.wanted[src][e]:
                    self.places[src, token, e] = start
                    start += 1
        self.rows: dict[tuple[int, int, int], int] = {}
        for rank in range(R):
            order = [(src, token) for src in range(S) for token in self.sent[src][rank]]
            self.rows.update({(*one, rank): row for row, one in enumerate(order)})

    def _lay_out(self) -> tuple[list[int], list[int]]:
        """Return the first place of each expert in the layout of its rank, and the rows that each rank needs."""
        starts, ends = [], []
        for rank in range(self.num_ranks):
            end = 0
            for i, count in enumerate(self.expert_counts(rank)):
                starts.append(i * self.form.capacity if self.form.layout == "masked" else end)
                end += -(-count // self.form.alignment) * self.form.alignment
            needs = {"rows": sum(self.src_counts(rank)), "experts": end, "masked": max(self.expert_counts(rank))}
            ends.append(needs[self.form.layout])
        return starts, ends

    # ------------------------------------------------------------------ counts

    def sources(self, rank: int) -> list[int]:
        """Return the sources for which a rank acts, by segment."""
        return list(range(rank, self.num_sources, self.num_ranks))

    def dst_counts(self, rank: int) -> list[int]:
        return [len(tokens) for src in self.sources(rank) for tokens in self.sent[src]]

    def src_counts(self, rank: int) -> list[int]:
        return [len(self.sent[src][rank]) for src in range(self.num_sources)]

    def expert_counts(self, rank: int) -> list[int]:
        first = rank * self.num_local
        return [sum(len(wanted[first + i]) for wanted in self.wanted) for i in range(self.num_local)]

    def num_received(self, rank: int) -> int:
        return sum(self.src_counts(rank))

    def num_delivered(self, rank: int) -> int:
        return self.num_local * self.form.capacity if self.form.layout == "masked" else self.ends[rank]

    # ------------------------------------------------------------------ places

    def place(self, src: int, token: int, expert: int) -> int:
        """Return the place of an expert's row on its rank."""
        if self.form.by_expert:
            return self.places[src, token, expert]
        return self.rows[src, token, expert // self.num_local]

    def first_place(self, src: int, token: int, rank: int) -> int:
        """Return where a row is stored: its place (rows), or its place at its first expert there (other layouts)."""
        experts = [e for e in self.choices[src][token] if e >= 0 and e // self.num_local == rank]
        return self.place(src, token, min(experts)) if experts else -1

    def table(self, src: int) -> Tensor:
        """Return ``places`` of a rank: columns send and slot, and in layouts by expert row and pull."""
        K, lines = self.top_k, []
        for token, experts in enumerate(self.choices[src]):
            line = [self.first_place(src, token, rank) for rank in range(self.num_ranks)]
            slots = [-1 if e < 0 else self._slot(src, token, e) for e in experts]
            line += slots
            if self.form.by_expert:
                line += [self.rows.get((src, token, rank), -1) for rank in range(self.num_ranks)]
                pull = sorted({slot for slot in slots if slot >= 0})
                line += pull + [-1] * (K - len(pull))
            lines.append(line)
        columns = assign_spec.num_columns(self.num_ranks, K, by_expert=self.form.by_expert)
        return torch.tensor(lines, dtype=torch.int32).reshape(len(lines), columns)

    def _slot(self, src: int, token: int, expert: int) -> int:
        rank, local = divmod(expert, self.num_local)
        return rank << RANK_SHIFT | (self.place(src, token, expert) if self.form.by_expert else local)

    # ------------------------------------------------------------------ received rows

    def received(self, rank: int) -> list[tuple[int, int]]:
        """Return (source, token) of each received row."""
        return [(src, token) for src in range(self.num_sources) for token in self.sent[src][rank]]

    def ids(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Return the local experts ``[N, K]`` of received rows."""
        lines = [
            [e % self.num_local if e >= 0 and e // self.num_local == rank else -1 for e in self.choices[src][token]]
            for src, token in self.received(rank)
        ]
        return torch.tensor(lines, dtype=dtype).reshape(len(lines), self.top_k)

    def row_idx(self, rank: int) -> Tensor:
        """Return the places ``[N, K]`` of received rows."""
        lines = [
            [
                self.place(src, token, e) if e >= 0 and e // self.num_local == rank else -1
                for e in self.choices[src][token]
            ]
            for src, token in self.received(rank)
        ]
        return torch.tensor(lines, dtype=torch.int64).reshape(len(lines), self.top_k)

    def check_against(self, oracle: Oracle) -> None:
        """Compare this class with the oracle of the contract: both read the same documentation."""
        for rank in range(self.num_ranks):
            assert self.received(rank) == oracle.received(rank)
            assert self.expert_counts(rank) == oracle.expert_counts(rank)
            assert self.num_delivered(rank) == oracle.num_delivered(rank)
            assert self.ids(rank, oracle.sent[rank].topk_idx.dtype).equal(oracle.topk_idx(rank))
            if self.form.by_expert:
                assert self.row_idx(rank).equal(oracle.row_idx(rank))
            else:
                assert [self.rows[(*one, rank)] for one in self.received(rank)] == [r.place for r in oracle.rows(rank)]


# ---------------------------------------------------------------------- the two kernels


class Tables:
    """The output of dispatch_notify and dispatch_assign for one rank, poisoned."""

    def __init__(
        self, ranks: Ranks, num_tokens: int, top_k: int, num_experts: int, form: Form, segments: int = 1
    ) -> None:
        R, E, S = ranks.num_ranks, num_experts, segments
        units = max(notify_spec.num_units(num_tokens), 1)
        columns = assign_spec.num_columns(R, top_k, by_expert=form.by_expert)
        self.table = ranks.poisoned(units, E + R, dtype=torch.int32)
        self.bases = ranks.poisoned(S * (2 * R + E), dtype=torch.int32)
        self.dst_counts = ranks.poisoned(S * R, dtype=torch.int64)
        self.src_counts = ranks.poisoned(S * R, dtype=torch.int64)
        self.expert_counts = ranks.poisoned(E // R, dtype=torch.int32)
        self.expert_offsets = ranks.poisoned(E // R + 1, dtype=torch.int32)
        self.places = ranks.poisoned(num_tokens, columns, dtype=torch.int32)
        self.dst_token = ranks.poisoned(num_tokens * min(top_k, R), dtype=torch.int64)
        words = HOST_EXPERTS_WORD + E // R
        self.host = ranks.pinned(torch.full((words,), -1, dtype=torch.int32))


class Planner:
    """Makes the plan of a dispatch on all ranks.

    Args:
        ranks: The ranks.
        topk_idx: ``[T, K]`` of each rank, on the CPU. With several segments, all have equally many units of tokens.
        num_experts: E.
        form: The layout of rows.
        segments: How many segments each routing has.
    """

    def __init__(
        self, ranks: Ranks, topk_idx: Sequence[Tensor], num_experts: int, form: Form, segments: int = 1
    ) -> None:
        self.ranks, self.num_experts, self.form, self.segments = ranks, num_experts, form, segments
        units = notify_spec.num_units(topk_idx[0].shape[0])
        self.segment_units = units // segments if segments > 1 else notify_spec.ONE_SEGMENT
        self.topk_idx = [ranks.on_device(one.contiguous()) for one in topk_idx]
        self.top_k = topk_idx[0].shape[1]
        self.tables = [Tables(ranks, one.shape[0], self.top_k, num_experts, form, segments) for one in topk_idx]
        self.config = {"wide": int(topk_idx[0].dtype is torch.int64)}
        self.smem_bytes = notify_spec.smem_bytes(num_experts, ranks.num_ranks, segments)
        self.lengths = [self._lengths(one) for one in topk_idx] if segments > 1 else []
        """Tokens of each segment, on each rank."""
        self.sizes = [ranks.poisoned(2 * segments + 2, dtype=torch.int32) for _ in topk_idx]
        for sizes, lengths in zip(self.sizes, self.lengths, strict=False):
            sizes[:segments] = torch.tensor(lengths, dtype=torch.int32)

    @property
    def longest(self) -> int:
        """Units of the longest segment; 0 if there is only one."""
        return notify_spec.num_units(max((num for lengths in self.lengths for num in lengths), default=0))

    def _lengths(self, topk_idx: Tensor) -> list[int]:
        used = (topk_idx >= 0).any(1).view(self.segments, -1)
        return [int(one.nonzero().max()) + 1 if bool(one.any()) else 0 for one in used]

    def notify_fields(self, rank: int, **more: object) -> dict[str, object]:
        """Return the params of dispatch_notify."""
        t, form = self.tables[rank], self.form
        experts = form.layout == "experts"
        return {
            "topk_idx": self.topk_idx[rank],
            "table": t.table,
            "bases": t.bases,
            "dst_counts": t.dst_counts,
            "src_counts": t.src_counts,
            "expert_counts": t.expert_counts,
            "expert_offsets": t.expert_offsets if experts else 0,
            "sizes": self.sizes[rank] if self.segments > 1 else 0,
            "host": t.host,
            "num_tokens": self.topk_idx[rank].shape[0],
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            "layout": LAYOUTS.index(form.layout),
            "alignment": form.alignment,
            "capacity": form.capacity,
            "row_limit": form.row_limit,
            "segments": self.segments,
            "segment_units": self.segment_units,
            **more,
        }

    def assign_fields(self, rank: int) -> dict[str, object] | None:
        """Return the params of dispatch_assign; None without tokens: it is not launched."""
        t = self.tables[rank]
        if not self.topk_idx[rank].shape[0]:
            return None
        return {
            "topk_idx": self.topk_idx[rank],
            "table": t.table,
            "bases": t.bases,
            "dst_counts": t.dst_counts,
            "places": t.places,
            "dst_token": t.dst_token,
            "num_tokens": self.topk_idx[rank].shape[0],
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            "by_expert": int(self.form.by_expert),
            "segments": self.segments,
            "segment_units": self.segment_units,
        }

    def notify(self, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch dispatch_notify on some ranks, or all; does not wait."""
        here = range(self.ranks.num_ranks) if only is None else only
        fields = [self.notify_fields(rank, **more) if rank in here else None for rank in range(self.ranks.num_ranks)]
        self.ranks.launch(notify_spec.SPEC, fields, (2, notify_spec.THREADS, self.smem_bytes), self.config)

    def assign(self) -> None:
        """Launch dispatch_assign on all ranks; does not wait."""
        fields = [self.assign_fields(rank) for rank in range(self.ranks.num_ranks)]
        self.ranks.launch(assign_spec.SPEC, fields, (3, assign_spec.THREADS, self.smem_bytes), self.config)

    def run(self) -> None:
        """Make the whole plan, and wait for it."""
        self.ranks.call += 1
        self.notify()
        self.ranks.wait()
        self.assign()
        self.ranks.wait()
        self.ranks.check_quiet()
