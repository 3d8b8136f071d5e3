"""Cases, plans and launches of the kernel combine_push, and the expected output."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from support.virtual_ranks import POISON, Block, Ranks, dynamic_bytes, offsets, ranks_of, same_bytes
from tokenferry.kernels.codes import PIECE_BYTES, TYPES
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import MAX_LANDED, MAX_RANKS, ROWS_AT_WORD, SHIFT_WORD
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits


@dataclass(frozen=True)
class Sizes:
    """One case.

    Attributes:
        tokens: T of each rank.
        row_bytes: Bytes of a row.
        biases: Number of biases.
        blocks: Blocks of the grid.
        pushers: Blocks that push, of a rank whose rows are not fetched.
        whole: The share of the tokens, from the first on, that a warp sums as a whole; the others by single pieces.
        bits: log2 of the rows of a unit that is pushed: of each rank, in turn.
        fetched: Ranks whose rows lie in the heap, for peers to fetch.
        top_k: K, if weights come home.
        routing: random; own: each token has a row on its own rank only; last: on the last; nowhere.
        seed: Seed of the tokens.
    """

    tokens: tuple[int, ...]
    row_bytes: int
    biases: int = 0
    blocks: int = 2
    pushers: int = 1
    whole: float = 0.5
    bits: tuple[int, ...] = (0,)
    fetched: tuple[int, ...] = ()
    top_k: int = 0
    routing: str = "random"
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def pieces(self) -> int:
        return -(-self.row_bytes // PIECE_BYTES)

    def bits_of(self, rank: int) -> int:
        return self.bits[rank % len(self.bits)]


class Plan:
    """Which rank has which rows.

    Attributes:
        received: (src, token) of the rows of each rank.
        table: ``[T, R]`` for each rank: the row that a token has on rank r, or -1.
        out: ``out[rank][r]``: the rows of a rank that came from r and return there.
    """

    def __init__(self, sizes: Sizes) -> None:
        R, pick = sizes.num_ranks, random.Random(f"{sizes}")
        chosen = [[self._choose(sizes, rank, pick) for _ in range(T)] for rank, T in enumerate(sizes.tokens)]
        self.received = [
            [(src, t) for src in range(R) for t, ranks in enumerate(chosen[src]) if rank in ranks] for rank in range(R)
        ]
        self.table = [torch.full((T, R), -1, dtype=torch.int32) for T in sizes.tokens]
        for rank, received in enumerate(self.received):
            for row, (src, t) in enumerate(received):
                self.table[src][t, rank] = row
        self.out = [[sum(src == r for src, _ in received) for r in range(R)] for received in self.received]

    @staticmethod
    def _choose(sizes: Sizes, rank: int, pick: random.Random) -> Sequence[int]:
        R = sizes.num_ranks
        if sizes.routing == "random":
            return pick.sample(range(R), pick.choice((0, 1, R, pick.randint(0, R))))
        return {"own": (rank,), "last": (R - 1,), "nowhere": ()}[sizes.routing]

    def first(self, rank: int, src: int) -> int:
        """The first row of a rank that came from ``src``."""
        return sum(self.out[rank][:src])


class Push:
    """Launches on all ranks along one plan."""

    def __init__(self, ranks: Ranks, sizes: Sizes, dtype: torch.dtype, alive: int | None = None) -> None:
        self.ranks, self.sizes, self.dtype = ranks, sizes, dtype
        self.alive = [r for r in range(ranks.num_ranks) if alive is None or alive >> r & 1]
        self.hidden = sizes.row_bytes // dtype.itemsize
        self.plan = Plan(sizes)
        self.biases = [
            [payload(torch.arange(T) + 31 * rank + 7 * i, self.hidden, dtype) for i in range(sizes.biases)]
            for rank, T in enumerate(sizes.tokens)
        ]
        here = range(ranks.num_ranks)
        self.recv = [ranks.block(r, len(self._landed(r)) * sizes.row_bytes) for r in here]
        self.heap = {r: ranks.block(r, len(self.plan.received[r]) * sizes.row_bytes) for r in sizes.fetched}
        self.weights = [payload(torch.arange(len(self.plan.received[r])) + r, sizes.top_k, torch.float32) for r in here]
        self.weight_blocks = [self._block_of(r, self.weights[r]) for r in here] if sizes.top_k else [None] * len(here)
        self.out = [ranks.poisoned(T, self.hidden, dtype=dtype) for T in sizes.tokens]
        self.weights_out = [ranks.poisoned(T, sizes.top_k, dtype=torch.float32) for T in sizes.tokens]
        self.fill(sizes.seed)

    def fill(self, seed: int) -> None:
        """Replace the rows by others along the same plan."""
        self.rows = [
            payload(torch.arange(len(received)) + 100_003 * rank + 11 * seed, self.hidden, self.dtype)
            for rank, received in enumerate(self.plan.received)
        ]
        for rank, block in self.heap.items():
            block.tensor.copy_(as_bytes(self.rows[rank]))

    def _block_of(self, rank: int, values: Tensor) -> Block:
        block = self.ranks.block(rank, values.numel() * 4)
        block.tensor.copy_(as_bytes(values))
        return block

    def _landed(self, rank: int) -> list[tuple[int, int]]:
        """Return (peer, row there) of the rows that are pushed to a rank, in the order of its memory."""
        counts = enumerate(self.plan.out)
        firsts = [(r, self.plan.first(r, rank), out[rank]) for r, out in counts if r != rank]
        return [(r, first + i) for r, first, many in firsts for i in range(many)]

    # ------------------------------------------------------------------ the launch

    def table(self, rank: int, behind: int) -> Tensor:
        """Return the rows of a rank's tokens, part of a wider table."""
        wide = torch.full((self.sizes.tokens[rank], 1 + self.ranks.num_ranks + behind), 0x0FFFFFF7, dtype=torch.int32)
        wide[:, 1 : 1 + self.ranks.num_ranks] = self.plan.table[rank]
        return self.ranks.on_device(wide)[:, 1 : 1 + self.ranks.num_ranks]

    def source(self, rank: int) -> Tensor:
        """Return a rank's rows outside of the heap, with NaN around them."""
        around = torch.full((1, self.hidden), torch.nan, dtype=self.dtype)
        return self.ranks.on_device(torch.cat([around, self.rows[rank], around]))[1:-1]

    def fields(self, rank: int, **more: object) -> dict[str, object]:
        """Return the params of combine_push."""
        sizes, up, plan = self.sizes, self.ranks.on_device, self.plan
        table, places = self.table(rank, 1), self.table(rank, 4)
        rings = push_spec.cut(sizes.row_bytes, dynamic_bytes(push_spec.SPEC))
        heap = self.heap.get(rank)
        values: dict[str, object] = {
            "alive": sum(1 << r for r in self.alive),
            "table": table,
            "table_stride": table.stride(0),
            "places": places,
            "places_stride": places.stride(0),
            "width": self.ranks.num_ranks,
            "source": heap.address if heap else self.source(rank),
            "out": self.out[rank],
            "rows_out": up(torch.tensor(plan.out[rank])),
            "rows_in": up(torch.tensor([out[rank] for out in plan.out])),
            "num_tokens": sizes.tokens[rank],
            "row_bytes": sizes.row_bytes,
            "pieces": sizes.pieces,
            "whole": int(sizes.whole * sizes.tokens[rank]),
            "top_k": sizes.top_k,
            "pushers": 0 if heap else sizes.pushers,
            "warps": rings.warps,
            "stages": rings.stages,
            "row_pieces": rings.pieces,
            "piece_bytes": rings.piece_bytes,
            "pitch": rings.pitch,
            "handshake": {
                0: 3,
                2: sizes.row_bytes,
                **offsets(self.recv[rank], self.weight_blocks[rank]),
                SHIFT_WORD: sizes.bits_of(rank),
                ROWS_AT_WORD: heap.handshake if heap else 0,
            },
        }
        values |= {f"bias{i}": up(bias) for i, bias in enumerate(self.biases[rank])}
        if sizes.top_k:
            values["weights_out"] = self.weights_out[rank]
        return {**values, **more}

    def all_fields(self, **more: object) -> list[dict[str, object] | None]:
        return [self.fields(r, **more) if r in self.alive else None for r in range(self.ranks.num_ranks)]

    def launch_sizes(self) -> tuple[int, int, int]:
        smem_bytes = dynamic_bytes(push_spec.SPEC)
        rings = push_spec.cut(self.sizes.row_bytes, smem_bytes)
        return self.sizes.blocks, push_spec.num_warps(smem_bytes) * 32, rings.smem_bytes

    @property
    def config(self) -> dict[str, int]:
        return {"type": TYPES[self.dtype]}

    def run(self) -> None:
        """Launch on all ranks; of the flags only those of units that were pushed may change."""
        want = [landed(self.ranks, rank).clone() for rank in range(self.ranks.num_ranks)]
        epoch = max(self.ranks.epochs()) + 1
        for rank, src in itertools.permutations(self.alive, 2):
            if src not in self.heap:
                units = -(-self.plan.out[src][rank] >> self.sizes.bits_of(rank))
                want[rank][src, :units] = epoch
        self.ranks.run(push_spec.SPEC, self.all_fields(), self.launch_sizes(), self.config)
        for rank in range(self.ranks.num_ranks):
            assert torch.equal(landed(self.ranks, rank), want[rank]), f"{self.sizes}: wrong units of rank {rank}"

    # ------------------------------------------------------------------ expected output

    def want(self, rank: int) -> Tensor:
        """Return the sums, by torch on the CPU, one operation after the other."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = torch.zeros(self.sizes.tokens[rank], self.hidden, dtype=wide)
        for bias in self.biases[rank]:
            sums = sums + bias.to(wide)
        for r in self.alive:
            row = self.plan.table[rank][:, r].long()
            sums[row >= 0] = sums[row >= 0] + self.rows[r][row[row >= 0]].to(wide)
        return sums.to(self.dtype)

    def want_weights(self, rank: int) -> Tensor:
        sums = torch.zeros(self.sizes.tokens[rank], self.sizes.top_k)
        for r in self.alive:
            row = self.plan.table[rank][:, r].long()
            sums[row >= 0] = sums[row >= 0] + self.weights[r][row[row >= 0]]
        return sums

    def check(self) -> None:
        for rank in self.alive:
            what = f"{self.sizes} {self.dtype} rank {rank}"
            same_bits(what, self.out[rank], self.want(rank))
            if self.sizes.top_k:
                same_bits(f"{what} weights", self.weights_out[rank], self.want_weights(rank))
            self.check_landing(what, rank)
        for rank, block in self.heap.items():
            same_bytes(f"rows in the heap of rank {rank}", block.cpu(), as_bytes(self.rows[rank]), self.sizes.row_bytes)

    def check_landing(self, what: str, rank: int) -> None:
        """Check every pushed row; the rest is poison: fetched rows, and those of ranks that take no part."""
        want = torch.full((len(self._landed(rank)), self.sizes.row_bytes), POISON, dtype=torch.uint8)
        for i, (r, row) in enumerate(self._landed(rank)):
            if r in self.alive and r not in self.heap:
                want[i] = self.rows[r][row].view(torch.uint8)
        same_bytes(f"{what} landing", self.recv[rank].cpu(), want.flatten(), self.sizes.row_bytes)

    def check_untouched(self, rank: int) -> None:
        """Check that nothing was summed and nothing pushed."""
        assert (self.out[rank].view(torch.uint8) == POISON).all()
        assert (self.recv[rank].cpu() == POISON).all()


def as_bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).flatten()


def landed(ranks: Ranks, rank: int) -> Tensor:
    """Return ``[from, unit]``: the flags in a rank's control block."""
    return ranks.words(rank, "landed", MAX_RANKS * MAX_LANDED).view(MAX_RANKS, MAX_LANDED)


def push(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
    one = Push(ranks_of(sizes.num_ranks), sizes, dtype)
    one.run()
    one.check()
