"""What the soaks draw, call and compare: small dispatches, and the combines of their results."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.testing import soak_large
from tokenferry.testing.cases import ROUTINGS, Case, answers, returned_weights
from tokenferry.testing.oracle import Oracle
from tokenferry.types import Combined, CountsLocation, Dispatched, DispatchOptions, Layout, MoeShape, Quantized

_COUNTS: tuple[CountsLocation, ...] = ("host", "device")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two tensors that have to be equal, bit for bit, and what they are."""

    what: str
    got: Tensor
    want: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """A result that is kept for a while, and its expected contents."""

    what: str
    case: Case
    options: DispatchOptions
    oracle: Oracle
    sent: Dispatched[Tensor | Quantized]

    def places(self, rank: int) -> Tensor:
        """Return the places of all rows that hold data."""
        places = [row.place for row in self.oracle.rows(rank)]
        return torch.tensor(places, dtype=torch.int64, device=self.sent.expert_counts.device)

    def compared(self, rank: int) -> list[Comparison]:
        """Return comparisons of everything that the dispatch delivered to ``rank`` as a tensor."""
        case, oracle, sent, places = self.case, self.oracle, self.sent, self.places(rank)
        found = []
        if isinstance(sent.x, Tensor):
            rows = sent.x.reshape(-1, case.hidden)[places]
            found.append(Comparison(f"{self.what} x", rows, oracle.x(rank)))
        counts = torch.tensor(oracle.expert_counts(rank), dtype=torch.int32, device="cpu")
        found.append(Comparison(f"{self.what} expert_counts", sent.expert_counts, counts))
        if sent.topk_weights is not None:
            columns = (case.top_k,) if self.options.layout is Layout.ROWS else ()
            weights = sent.topk_weights.reshape(-1, *columns)[places]
            found.append(Comparison(f"{self.what} topk_weights", weights, oracle.weights(rank)))
        if sent.topk_idx is not None:
            ids = oracle.topk_idx(rank)
            found.append(Comparison(f"{self.what} topk_idx", sent.topk_idx[: ids.shape[0]], ids))
        return found


class Combining:
    """One combine of a dispatch, drawn for all ranks: dtype, biases, weights that return, and ``out``.

    Args:
        pick: The source of what is drawn; the same on all ranks.
        live: The dispatch.
        rank: This rank.
    """

    def __init__(self, pick: random.Random, live: Live, rank: int) -> None:
        case = live.case
        self._live, self._rank = live, rank
        wide = case.hidden * 2 % 16 == 0
        self._dtype = pick.choice((case.dtype, torch.bfloat16)) if wide else case.dtype
        num_biases, self._weighted, self._into = pick.randrange(3), pick.random() < 0.3, pick.random() < 0.3
        self._biases = tuple(case.rows(rank, self._dtype, case.hidden, 3 + i) for i in range(num_biases))
        self._nodes: tuple[tuple[int, ...], ...] = ()

    def call(self, group: ExpertGroup, num_sms: int | None = None) -> Combined:
        """Make the call; collective."""
        case, rank, device, x = self._live.case, self._rank, group.device, self._live.sent.x
        self._nodes = group.topology.nodes
        layout = self._live.options.layout
        rows = (x.data if isinstance(x, Quantized) else x).shape[:-1]
        shape = rows if layout is Layout.MASKED else (self._size(rank),)
        weights = None
        if self._weighted:
            columns = (case.top_k,) if layout is Layout.ROWS else ()
            weights = returned_weights(case, self._live.oracle, rank, self._size(rank)).reshape(*shape, *columns)
        biases = tuple(bias.to(device) for bias in self._biases)
        return group.for_shape(case.shape).combine(
            answers(case, self._live.oracle, rank, self._size(rank), self._dtype)
            .to(device)
            .reshape(*shape, case.hidden),
            self._live.sent.plan,
            topk_weights=None if weights is None else weights.to(device),
            bias=biases or None,
            out=torch.full_like(biases[0], torch.nan) if self._into and biases else None,
            num_sms=num_sms,
        )

    def compared(self, home: Combined) -> list[Comparison]:
        """Return comparisons of the result."""
        live, ranks, rank = self._live, range(self._live.case.ranks), self._rank
        case, oracle, sizes = live.case, live.oracle, [self._size(there) for there in range(self._live.case.ranks)]
        ys = [answers(case, oracle, there, sizes[there], self._dtype) for there in ranks]
        what = f"{live.what} combine {self._dtype} num_biases={len(self._biases)}"
        found = [Comparison(what, home.x, oracle.combine(rank, ys, self._biases, self._nodes))]
        if self._weighted:
            ws = [returned_weights(case, oracle, there, sizes[there]) for there in ranks]
            assert home.topk_weights is not None, f"{what}: weights were lost"
            want = oracle.combine_weights(rank, ws, self._nodes)
            found.append(Comparison(f"{what} weights", home.topk_weights, want))
        return found

    def _size(self, there: int) -> int:
        """Return the rows of the first axis (masked: of both) on a rank; with device counts all have the capacity."""
        x = self._live.sent.x
        flat = x.data if isinstance(x, Quantized) else x
        host = self._live.options.counts == "host"
        return self._live.oracle.num_delivered(there) if host else flat.numel() // flat.shape[-1]


def draw_case(pick: random.Random, ranks: int, *, decode: bool = False) -> Case:
    """Draw any small case; ``decode``: one for the decode calls."""
    dtype = pick.choice(_DTYPES[:3] if decode else _DTYPES)
    most = pick.choice((0, 1, 9, 40))
    return Case(
        tokens=tuple(pick.randint(0, most) for _ in range(ranks)),
        experts=ranks * pick.choice((1, 2, 3, 5, 8)),
        top_k=pick.choice((1, 2, 3, 4, 6, 8, 11)),
        hidden=16 // dtype.itemsize * pick.choice((1, 2, 3, 7, 16, 33, 80)),
        dtype=dtype,
        idx_dtype=pick.choice((torch.int32, torch.int64)),
        routing=pick.choice(ROUTINGS),
        weights=decode or pick.random() < 0.7,
        seed=pick.randrange(1 << 20),
    )


def draw_options(pick: random.Random, case: Case) -> DispatchOptions:
    """Any delivery that the rows of ``case`` fit into."""
    layout, counts = pick.choice(tuple(Layout)), pick.choice(_COUNTS)
    alignment = pick.randint(1, 9) if layout is Layout.EXPERTS else 1
    capacity = None
    if (counts == "device" or layout is Layout.MASKED) and pick.random() < 0.5:
        capacity = least_capacity(case, layout, alignment) + pick.randint(0, 3)
    zero = layout is not Layout.ROWS and pick.random() < 0.5
    return DispatchOptions(layout, alignment, zero_padding=zero, counts=counts, capacity=capacity)


def least_capacity(case: Case, layout: Layout, alignment: int) -> int:
    """Return the least capacity that holds the rows of every rank (MASKED: of every expert)."""
    oracle = Oracle(case.inputs(), case.experts, layout.value, alignment=alignment)
    if layout is Layout.MASKED:
        return max(1, *(count for rank in range(case.ranks) for count in oracle.expert_counts(rank)))
    return max(1, *(oracle.num_delivered(rank) for rank in range(case.ranks)))


def oracle_of(case: Case, options: DispatchOptions) -> Oracle:
    """Return the oracle of a dispatch of ``case``."""
    capacity = (options.capacity or case.ranks * case.shape.max_tokens) if options.layout is Layout.MASKED else 0
    return Oracle(case.inputs(), case.experts, options.layout.value, alignment=options.alignment, capacity=capacity)


def shape_of(num_ranks: int) -> MoeShape:
    """Return the sizes of a group whose memory holds the large cases."""
    # Rows as wide as a token's rows for all of its experts together: so EXPERTS fits at its worst.
    return MoeShape(num_ranks, 1, soak_large.MOST_CHOICES * soak_large.MOST_HIDDEN, soak_large.MOST_TOKENS)
