"""Checks of dispatch, redispatch and combine against the oracle; they run on the ranks."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry import Combined, Dispatched, DispatchOptions, ExpertGroup, Layout, Quantized, Routing
from tokenferry.testing.cases import Case, answers, returned_weights
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle, Sent

Combines = Sequence[tuple[torch.dtype | None, int, bool, bool]]
COMBINES: Combines = (
    # (dtype of y or None for the rows', number of biases, out=, weights)
    (None, 0, False, False),
    (torch.float32, 1, True, True),
    (torch.float64, 2, False, True),
    (torch.float16, 2, True, False),
)


def routing_of(sent: Sent) -> Routing:
    return Routing(sent.topk_idx, sent.topk_weights)


ORACLES = threading.Lock()
"""Held while an oracle is looked up: ranks that are threads share them, and ask for the same one at the same time."""


@functools.lru_cache(maxsize=64)
def known_oracle(case: Case, layout: Layout, alignment: int, capacity: int) -> Oracle:
    return Oracle(case.inputs(), case.experts, layout.value, alignment=alignment, capacity=capacity)


def oracle_for(case: Case, options: DispatchOptions) -> Oracle:
    """Return the oracle of a dispatch, which must not be written to: other calls get the same."""
    capacity = (options.capacity or case.ranks * case.shape.max_tokens) if options.layout is Layout.MASKED else 0
    with ORACLES:
        return known_oracle(case, options.layout, options.alignment, capacity)


def needed(case: Case, layout: Layout, alignment: int = 1) -> int:
    """Return the least capacity that holds every rank's rows (MASKED: every expert's)."""
    with ORACLES:
        oracle = known_oracle(case, layout, alignment, 0)
    ranks = range(case.ranks)
    if layout is Layout.MASKED:
        return max(1, *(count for rank in ranks for count in oracle.expert_counts(rank)))
    return max(1, *(oracle.num_delivered(rank) for rank in ranks))


def all_options(case: Case) -> list[DispatchOptions]:
    """Return options of every layout, with counts on host and device, aligned and not, with free rows and without."""
    tight = {layout: needed(case, layout) for layout in Layout}
    return [
        DispatchOptions(),
        DispatchOptions(counts="device"),
        DispatchOptions(counts="device", capacity=tight[Layout.ROWS]),
        DispatchOptions(Layout.EXPERTS),
        DispatchOptions(Layout.EXPERTS, alignment=8, zero_padding=True),
        DispatchOptions(Layout.EXPERTS, alignment=3, counts="device", zero_padding=True),
        DispatchOptions(Layout.EXPERTS, alignment=4, counts="device", capacity=needed(case, Layout.EXPERTS, 4)),
        DispatchOptions(Layout.MASKED, zero_padding=True),
        DispatchOptions(Layout.MASKED, capacity=tight[Layout.MASKED]),
        DispatchOptions(Layout.MASKED, counts="device"),
        DispatchOptions(Layout.MASKED, counts="device", capacity=tight[Layout.MASKED] + 1, zero_padding=True),
    ]


@dataclass(frozen=True)
class Deal:
    """A dispatch under test."""

    case: Case
    options: DispatchOptions
    oracle: Oracle
    rank: int

    def __str__(self) -> str:
        d = self.options
        how = f"{d.layout.value}-A{d.alignment}-{d.counts}-capacity{d.capacity}-zero{int(d.zero_padding)}"
        return f"rank {self.rank} {self.case} {how}"

    @property
    def places(self) -> Tensor:
        """Delivered rows that hold data."""
        return torch.tensor([row.place for row in self.oracle.rows(self.rank)], dtype=torch.int64)

    def num_rows(self, rank: int, like: Tensor) -> int:
        """Return the rows of the delivered tensor of a rank; with counts on the device they are those of ``like``."""
        return self.oracle.num_delivered(rank) if self.options.counts == "host" else like.shape[0]


def check_round_trip(group: ExpertGroup, case: Case, options: DispatchOptions, combines: Combines = COMBINES) -> None:
    """Check dispatch, redispatch, and combine in every variant or in some."""
    deal = Deal(case, options, oracle_for(case, options), group.rank)
    mine = deal.oracle.sent[group.rank]
    sent = group.dispatch(mine.x, routing_of(mine), options=options)
    check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
    check_plan(deal, sent)
    for variant in combines:
        check_combine(group, deal, sent, *variant)
    check_redispatch(group, deal, sent)


def check_delivered(
    deal: Deal, sent: Dispatched, values: list[Tensor] | None, weights: list[Tensor | None] | list[Tensor]
) -> None:
    """Check the rows, ids, weights, counts and zero padding of a result."""
    oracle, options, rank = deal.oracle, deal.options, deal.rank
    assert isinstance(sent.x, Tensor), f"{deal}: got {type(sent.x).__name__} for tensor rows"
    check_rows(f"{deal} x", deal, sent.x, oracle.x(rank, values))
    counts = oracle.expert_counts(rank)
    same_bits(f"{deal} expert_counts", sent.expert_counts, torch.tensor(counts, dtype=torch.int32))
    assert sent.host_counts == (tuple(counts) if options.counts == "host" else None), f"{deal} {sent.host_counts=}"
    if options.layout is Layout.EXPERTS:
        offsets = torch.tensor(oracle.expert_offsets(rank), dtype=torch.int32)
        assert sent.expert_offsets is not None
        same_bits(f"{deal} expert_offsets", sent.expert_offsets, offsets)
    else:
        assert sent.expert_offsets is None, f"{deal}: expert_offsets in {options.layout}"
    num = len(oracle.received(rank))
    if options.layout is Layout.ROWS:
        assert sent.topk_idx is not None
        same_bits(f"{deal} topk_idx", sent.topk_idx[:num], oracle.topk_idx(rank))
    else:
        assert sent.topk_idx is None, f"{deal}: topk_idx in {options.layout}"
    if weights[rank] is None:
        assert sent.topk_weights is None, f"{deal}: weights that were not sent"
    else:
        assert sent.topk_weights is not None, f"{deal}: weights were lost"
        check_rows(f"{deal} topk_weights", deal, sent.topk_weights, oracle.weights(rank, weights))


def check_rows(what: str, deal: Deal, got: Tensor, want: Tensor) -> None:
    """Check the rows that hold data, the number of rows in all, and zero padding."""
    options, case = deal.options, deal.case
    if options.layout is Layout.MASKED:
        assert got.shape[:2] == (deal.oracle.num_local, deal.oracle.capacity), f"{what}: got shape {list(got.shape)}"
        got = got.flatten(0, 1)
    if options.counts == "host":
        assert got.shape[0] == deal.oracle.num_delivered(deal.rank), f"{what}: got {got.shape[0]} rows"
    elif options.capacity is not None and options.layout is not Layout.MASKED:
        assert got.shape[0] == options.capacity, f"{what}: got {got.shape[0]} rows, capacity {options.capacity}"
    elif options.layout is Layout.ROWS:
        assert got.shape[0] == case.ranks * case.shape.max_tokens, f"{what}: got {got.shape[0]} rows"
    same_bits(what, got[deal.places], want)
    if options.zero_padding:
        padding = torch.ones(got.shape[0], dtype=torch.bool)
        padding[deal.places] = False
        same_bits(f"{what} padding", got[padding], torch.zeros_like(got[padding]))


def check_plan(deal: Deal, sent: Dispatched) -> None:
    """Check the fields of a plan."""
    plan, oracle, rank = sent.plan, deal.oracle, deal.rank
    received = oracle.received(rank)
    num = len(received)
    assert plan.options == deal.options, f"{deal} {plan.options=}"
    assert plan.num_tokens == deal.case.tokens[rank], f"{deal} {plan.num_tokens=}"
    assert plan.num_received == (num if deal.options.counts == "host" else None), f"{deal} {plan.num_received=}"
    assert isinstance(sent.x, Tensor)
    rows = sent.x.shape[0] * (sent.x.shape[1] if deal.options.layout is Layout.MASKED else 1)
    assert plan.num_delivered == rows, f"{deal} {plan.num_delivered=}"
    goes = [[token for src, token in oracle.received(there) if src == rank] for there in range(oracle.num_ranks)]
    flat = torch.tensor([token for there in goes for token in there], dtype=torch.int64)
    same_bits(f"{deal} dst_token", plan.dst_token[: flat.numel()], flat)
    assert deal.options.counts == "device" or plan.dst_token.numel() == flat.numel(), f"{deal} {plan.dst_token=}"
    same_bits(f"{deal} dst_counts", plan.dst_counts, torch.tensor([len(there) for there in goes]))
    same_bits(f"{deal} src_token", plan.src_token[:num], torch.tensor([t for _, t in received], dtype=torch.int64))
    same_bits(f"{deal} src_rank", plan.src_rank[:num], torch.tensor([src for src, _ in received], dtype=torch.int64))
    assert int(plan.src_counts.sum()) == num, f"{deal} {plan.src_counts=}"
    same_bits(f"{deal} plan.topk_idx", plan.topk_idx[:num], oracle.topk_idx(rank))
    if deal.options.layout is Layout.ROWS:
        assert plan.row_idx.shape == (0, deal.case.top_k), f"{deal} row_idx {list(plan.row_idx.shape)}"
    else:
        same_bits(f"{deal} row_idx", plan.row_idx[:num], oracle.row_idx(rank))


def check_combine(
    group: ExpertGroup,
    deal: Deal,
    sent: Dispatched,
    dtype: torch.dtype | None,
    num_biases: int,
    into: bool,
    weights: bool,
) -> Combined:
    """Check a combine; rows that may not be read hold NaN, and so does ``out`` before."""
    case, oracle, rank = deal.case, deal.oracle, deal.rank
    dtype = legal(case, dtype)
    assert isinstance(sent.x, Tensor)
    flat = sent.x.reshape(-1, case.hidden)
    sizes = [deal.num_rows(there, flat) for there in range(case.ranks)]
    ys = [answers(case, oracle, there, sizes[there], dtype) for there in range(case.ranks)]
    ws = [returned_weights(case, oracle, there, sizes[there]) for there in range(case.ranks)]
    biases = tuple(case.rows(rank, dtype, case.hidden, 3 + i) for i in range(num_biases))
    out = torch.full((case.tokens[rank], case.hidden), torch.nan, dtype=dtype) if into else None
    if deal.options.layout is Layout.MASKED:
        y, w = ys[rank].reshape(sent.x.shape), ws[rank].reshape(sent.x.shape[:2])
    else:
        y, w = ys[rank], ws[rank]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases
    got = group.combine(y, sent.plan, topk_weights=w if weights else None, bias=bias, out=out)
    what = f"{deal} combine {dtype} {num_biases=} {into=} {weights=}"
    nodes = group.topology.nodes
    try:
        same_bits(what, got.x, oracle.combine(rank, ys, biases, nodes))
    except AssertionError:
        group.synchronize()  # raises if the call has failed on the device, which says more
        raise
    if out is not None:
        assert got.x.data_ptr() == out.data_ptr(), f"{what}: the sum is not in out"
        same_bits(f"{what} out", out, got.x)
    if weights:
        assert got.topk_weights is not None, f"{what}: no weights"
        same_bits(f"{what} topk_weights", got.topk_weights, oracle.combine_weights(rank, ws, nodes))
    else:
        assert got.topk_weights is None, f"{what}: weights that were not sent"
    return got


def legal(case: Case, dtype: torch.dtype | None) -> torch.dtype:
    """Return ``dtype`` if a row of it is a multiple of 16 bytes, else that of the case."""
    return dtype if dtype is not None and case.hidden * dtype.itemsize % 16 == 0 else case.dtype


def check_redispatch(group: ExpertGroup, deal: Deal, sent: Dispatched) -> None:
    """Check other rows, of other dtypes and widths, along the same plan; with and without weights; twice."""
    case, rank = deal.case, deal.rank
    for dtype, weights in ((torch.float32, True), (torch.float64, False)):
        values = [case.rows(there, legal(case, dtype), case.hidden, 5) for there in range(case.ranks)]
        gates = [case.gates(there, 1) for there in range(case.ranks)]
        again = group.redispatch(values[rank], sent.plan, topk_weights=gates[rank] if weights else None)
        check_delivered(deal, again, values, gates if weights else [None] * case.ranks)
        check_plan(deal, again)
    check_combine(group, deal, again, torch.float32, 1, True, True)
    rows = [quantized(case, there, width=48, num_scales=3, scale_dtype=torch.float16) for there in range(case.ranks)]
    packed = group.redispatch(rows[rank], sent.plan)
    check_quantized(deal, packed, rows)


def quantized(
    case: Case,
    rank: int,
    *,
    width: int,
    num_scales: int,
    scale_dtype: torch.dtype,
    data_dtype: torch.dtype = torch.uint8,
) -> Quantized:
    """Return random bytes with column-major scales of any width."""
    data = case.rows(rank, torch.float64, width * data_dtype.itemsize // 8, 7).view(torch.uint8).view(data_dtype)
    size = scale_dtype.itemsize
    scale_bytes = case.rows(rank, torch.float64, -(-num_scales * size // 8), 8).view(torch.uint8)[
        :, : num_scales * size
    ]
    scale = scale_bytes.contiguous().view(scale_dtype).reshape(case.tokens[rank], num_scales)
    return Quantized(data, scale.t().contiguous().t())


def check_quantized(deal: Deal, sent: Dispatched, rows: list[Quantized]) -> None:
    """Check the bytes of data and scales, each in its place."""
    assert isinstance(sent.x, Quantized), f"{deal}: got {type(sent.x).__name__} for quantized rows"
    for part in ("data", "scale"):
        want = deal.oracle.x(deal.rank, [getattr(one, part) for one in rows])
        check_rows(f"{deal} {part}", deal, getattr(sent.x, part), want)
