"""The kernel dispatch alone, on virtual ranks, along plans made by plain loops: every byte that it may touch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_dispatch_plan import choices_of, form_for
from torch import Tensor

from support.virtual_plan import Expected, Form
from support.virtual_ranks import POISON, Block, Ranks, offsets, ranks_of, same_bytes
from tokenferry.kernels.control_block import RANK_SHIFT
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.testing.cases import Case

LAYOUTS = ("rows", "experts", "masked")


@dataclass(frozen=True)
class Scales:
    """Scales of a row: their number, type and layout: row by row, column by column, or in wider rows."""

    num: int
    dtype: torch.dtype
    lie: str = "rows"

    @property
    def row_bytes(self) -> int:
        return self.num * self.dtype.itemsize

    @property
    def bulk(self) -> bool:
        return self.lie == "rows" and self.row_bytes % 16 == 0

    def of(self, num_tokens: int, make: torch.Generator) -> Tensor:
        wide = self.num + (self.lie == "wide") * 3
        data = torch.randint(256, (num_tokens, wide * self.dtype.itemsize), dtype=torch.uint8, generator=make)
        made = data.view(self.dtype)[:, : self.num]
        return made.t().contiguous().t() if self.lie == "columns" else made


@dataclass(frozen=True)
class Payload:
    """The data of a row."""

    row_bytes: int
    scales: Scales | None = None
    weights: bool = False
    first: bool = True
    idx_dtype: torch.dtype = torch.int64
    blocks: int = 2

    def __str__(self) -> str:
        scales = f"-{self.scales.num}x{str(self.scales.dtype)[6:]}-{self.scales.lie}" if self.scales else ""
        kind = "first" if self.first else "again"
        return f"{self.row_bytes}{scales}-w{int(self.weights)}-{kind}-{str(self.idx_dtype)[6:]}"


PAYLOADS = (
    Payload(16, weights=True),
    Payload(48, Scales(1, torch.float32), weights=True, idx_dtype=torch.int32),
    Payload(2000, Scales(3, torch.uint8, "columns"), first=False),
    Payload(7168, Scales(56, torch.float32), weights=True),
    Payload(7168, Scales(56, torch.int32, "columns"), idx_dtype=torch.int32),
    Payload(512, Scales(40, torch.float32, "wide"), weights=True, first=False),
    Payload(112, Scales(7, torch.bfloat16), blocks=3),
    Payload(8208, Scales(3, torch.float64, "columns"), weights=True),  # two pieces, the second one short
    Payload(14336, weights=True, first=False, blocks=4),
    Payload(65536, Scales(4, torch.float32), weights=True),
    Payload(64, Scales(16, torch.uint8), blocks=1),
    Payload(32, Scales(2048, torch.float32)),  # more scales than row
)


@dataclass
class Brought:
    """The input of one rank."""

    x: Tensor
    scale: Tensor | None
    weights: Tensor | None
    topk_idx: Tensor


@dataclass
class Landed:
    """The receive buffers of one rank."""

    rows: Block
    scale: Block | None
    weights: Block | None
    ids: Block | None
    src_token: Block | None
    row_idx: Block | None

    def blocks(self) -> tuple[Block | None, ...]:
        return self.rows, self.scale, self.weights, self.ids, self.src_token, self.row_idx


class Delivery:
    """One launch of dispatch on all ranks."""

    def __init__(
        self, ranks: Ranks, expected: Expected, payload: Payload, topk_idx: list[Tensor], seed: int = 0
    ) -> None:
        self.ranks, self.expected, self.payload = ranks, expected, payload
        make = torch.Generator().manual_seed(seed)
        self.brought = []
        for index in topk_idx:
            T, K = index.shape
            x = torch.randint(256, (T, payload.row_bytes), dtype=torch.uint8, generator=make)
            scale = payload.scales.of(T, make) if payload.scales else None
            weights = torch.randn(T, K, generator=make) if payload.weights else None
            self.brought.append(Brought(x, scale, weights, index.to(payload.idx_dtype)))
        self.landed = [self._room(rank) for rank in range(ranks.num_ranks)]

    def _room(self, rank: int) -> Landed:
        ex, payload, block = self.expected, self.payload, self.ranks.block
        # A few places more than there are: where counts stay on the device, there are.
        N, D, K = ex.num_received(rank) + 3, ex.num_delivered(rank) + 5, ex.top_k
        by_expert, first = ex.form.by_expert, payload.first
        return Landed(
            rows=block(rank, D * payload.row_bytes),
            scale=block(rank, D * payload.scales.row_bytes) if payload.scales else None,
            weights=block(rank, D * 4 if by_expert else D * 4 * K) if payload.weights else None,
            ids=block(rank, N * K * payload.idx_dtype.itemsize) if first else None,
            src_token=block(rank, N * 8) if first else None,
            row_idx=block(rank, N * K * 8) if first and by_expert else None,
        )

    def fields(self, rank: int, **more: object) -> dict[str, object]:
        """Return the params of dispatch."""
        ex, payload, mine, up = self.expected, self.payload, self.brought[rank], self.ranks.on_device
        scales = payload.scales
        bulk = scales.row_bytes if scales and scales.bulk else 0
        rings = dispatch_spec.cut(payload.row_bytes, bulk)
        values: dict[str, object] = {
            "x": up(mine.x),
            "places": up(ex.table(rank)),
            "rows_out": up(torch.tensor(ex.dst_counts(rank))),
            "rows_in": up(torch.tensor(ex.src_counts(rank))),
            "num_tokens": mine.x.shape[0],
            "row_bytes": payload.row_bytes,
            "piece_bytes": rings.piece_bytes,
            "pitch": rings.pitch,
            "pieces": rings.pieces,
            "stages": rings.stages,
            "bulk_scale_bytes": bulk,
            "top_k": ex.top_k,
            "width": assign_spec.num_columns(ex.num_ranks, ex.top_k, by_expert=ex.form.by_expert),
            "num_local": ex.num_local,
            "by_expert": int(ex.form.by_expert),
            "wide": int(payload.idx_dtype is torch.int64),
            "handshake": {0: 1, 3: payload.row_bytes, **offsets(*self.landed[rank].blocks())},
        }
        if scales and mine.scale is not None:
            scale = up(mine.scale)
            values["scale"] = scale
            if not bulk:
                strides = {"scale_row_stride": scale.stride(0), "scale_stride": scale.stride(1)}
                values |= {"small_scale": 1, "scale_size": scales.dtype.itemsize, "num_scales": scales.num, **strides}
        if mine.weights is not None:
            values["weights"] = up(mine.weights)
        if payload.first:
            values["topk_idx"] = up(mine.topk_idx)
        return {**values, **more}

    def sizes(self) -> tuple[int, int, int]:
        scales = self.payload.scales
        rings = dispatch_spec.cut(self.payload.row_bytes, scales.row_bytes if scales and scales.bulk else 0)
        return self.payload.blocks, rings.warps * 32, rings.smem_bytes

    def run(self) -> None:
        self.ranks.run(dispatch_spec.SPEC, [self.fields(rank) for rank in range(self.ranks.num_ranks)], self.sizes())

    # ------------------------------------------------------------------ expected output

    def check(self) -> None:
        for rank in range(self.ranks.num_ranks):
            self.check_rank(rank)

    def check_rank(self, rank: int) -> None:
        ex, payload, landed, K = self.expected, self.payload, self.landed[rank], self.expected.top_k
        what = f"{payload} {ex.form.layout} rank {rank}"
        received = ex.received(rank)
        places = [ex.first_place(src, token, rank) for src, token in received]
        x = [self.brought[src].x[token] for src, token in received]
        check_rows(f"{what} rows", landed.rows, places, x, payload.row_bytes)
        if landed.scale:
            scale = [as_bytes(self.brought[src].scale[token]) for src, token in received]
            check_rows(f"{what} scale", landed.scale, places, scale, payload.scales.row_bytes)
        if landed.weights and ex.form.by_expert:
            sums = self.weight_sums(rank)
            check_rows(f"{what} weights", landed.weights, list(sums), [as_bytes(one) for one in sums.values()], 4)
        elif landed.weights:
            check_rows(f"{what} weights", landed.weights, places, self.weight_rows(rank), 4 * K)
        if landed.ids:
            order, size = list(range(len(received))), payload.idx_dtype.itemsize
            ids = [as_bytes(one) for one in ex.ids(rank, payload.idx_dtype)]
            check_rows(f"{what} ids", landed.ids, order, ids, K * size)
            tokens = [as_bytes(torch.tensor([token])) for _, token in received]
            check_rows(f"{what} src_token", landed.src_token, order, tokens, 8)
        if landed.row_idx:
            row_idx = [as_bytes(one) for one in ex.row_idx(rank)]
            check_rows(f"{what} row_idx", landed.row_idx, order, row_idx, K * 8)

    def weight_rows(self, rank: int) -> list[Tensor]:
        """Return the weights of each row (ROWS): those of slots on this rank, 0 for others."""
        ids = self.expected.ids(rank, torch.int64)
        rows = []
        for row, (src, token) in enumerate(self.expected.received(rank)):
            rows.append(as_bytes(torch.where(ids[row] >= 0, self.brought[src].weights[token], 0.0)))
        return rows

    def weight_sums(self, rank: int) -> dict[int, Tensor]:
        """Return the weight of each place (by expert): the sum over the slots that name it, in slot order."""
        ex, sums = self.expected, {}
        for src, token in ex.received(rank):
            for k, e in enumerate(ex.choices[src][token]):
                if e >= 0 and e // ex.num_local == rank:
                    place = ex.place(src, token, e)
                    sums[place] = sums.get(place, torch.zeros(1)) + self.brought[src].weights[token, k]
        return sums


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_rows(what: str, block: Block, places: list[int], rows: list[Tensor], row_bytes: int) -> None:
    """Check the rows at their places, and poison everywhere else."""
    want = torch.full((block.tensor.numel() // row_bytes, row_bytes), POISON, dtype=torch.uint8)
    if places:
        want[torch.tensor(places)] = torch.stack(rows).reshape(len(places), row_bytes)
    same_bytes(what, block.cpu(), want.flatten(), row_bytes)


def deliver(num_ranks, case, layout, payload):
    topk_idx = [one.topk_idx for one in case.inputs()]
    expected = Expected(choices_of(topk_idx), case.experts, form_for(layout, choices_of(topk_idx), case.experts, 4))
    delivery = Delivery(ranks_of(num_ranks), expected, payload, topk_idx, seed=case.seed)
    delivery.run()
    delivery.check()
    return delivery


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_kind_of_row(num_ranks, payload):
    """In every layout. More tokens than warps, so that rings wrap around; but few of the large rows."""
    i = PAYLOADS.index(payload)
    few = 20 if payload.row_bytes > 10_000 else 90
    tokens = (few, 0, 33, 1, 7, 2, 12, 5)[:num_ranks]
    routing = ("half_dropped", "even", "repeated")[i % 3]
    case = Case(tokens, num_ranks * (2, 3, 8)[i % 3], (3, 8, 4, 64)[i % 4], routing=routing, seed=i)
    for layout in LAYOUTS:
        deliver(num_ranks, case, layout, payload)


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("routing", ["one_rank_idle", "all_to_expert_0", "nothing", "own_rank", "one_token_all"])
def test_uneven_routings(num_ranks, routing):
    case = Case((40, 3, 0, 17, 50)[:num_ranks], 2 * num_ranks, 4, routing=routing)
    for layout in LAYOUTS:
        deliver(num_ranks, case, layout, Payload(256, Scales(2, torch.float32), weights=True))


def test_no_rank_has_tokens():
    for layout in LAYOUTS:
        deliver(3, Case((0, 0, 0), 6, 2), layout, Payload(256, weights=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_units_than_the_rings_hold(layout):
    """One block has up to 24 warps with 3 buffers each; every ring wraps around many times."""
    deliver(2, Case((700, 301), 8, 2, routing="even"), layout, Payload(1024, Scales(4, torch.float32), True, blocks=1))


def test_one_plan_again_and_again():
    """Handshakes alternate between two halves: ten calls along one plan, other sizes, a late rank each time."""
    ranks = ranks_of(3)
    case = Case((31, 4, 18), 6, 3, routing="repeated")
    topk_idx = [one.topk_idx for one in case.inputs()]
    expected = Expected(choices_of(topk_idx), 6, Form("experts", alignment=2))
    for i in range(10):
        ranks.reset()
        payload = Payload((16, 2048, 9000 // 16 * 16)[i % 3], weights=i % 2 == 0, first=i % 4 == 0)
        delivery = Delivery(ranks, expected, payload, topk_idx, seed=i)
        ranks.delay(i % 3, 1)
        delivery.run()
        delivery.check()


def test_an_aborted_plan_moves_nothing():
    """After an aborted call the counts are -1 on all ranks: kernels no-op, nothing is written."""
    ranks = ranks_of(2)
    topk_idx = [one.topk_idx for one in Case((9, 5), 4, 2).inputs()]
    expected = Expected(choices_of(topk_idx), 4, Form("experts"))
    delivery = Delivery(ranks, expected, Payload(64, weights=True), topk_idx)
    epochs, void = ranks.epochs(), ranks.on_device(torch.tensor([-1, -1]))
    fields = [delivery.fields(rank, rows_out=void, rows_in=void) for rank in range(2)]
    ranks.run(dispatch_spec.SPEC, fields, delivery.sizes())
    assert ranks.epochs() == epochs
    for landed in delivery.landed:
        for block in landed.blocks():
            assert block is None or (block.cpu() == POISON).all()


def test_places_of_the_highest_rank_fit_into_an_int32():
    assert 7 << RANK_SHIFT | (1 << RANK_SHIFT) - 1 == (1 << 31) - 1
