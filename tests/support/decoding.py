"""Checks of decode_dispatch and decode_combine against the oracle; they run on the ranks."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from support.not_finite import spoil
from support.throughput import ORACLES
from tokenferry import DecodeDispatched, ExpertGroup, Quantized, Routing, Scale
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import close_each, same_bits
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast, ue8m0

CASTS = (None, Scale.FLOAT32, Scale.POWER_OF_TWO, Scale.UE8M0)


@dataclass(frozen=True)
class Step:
    """A decode_dispatch and a decode_combine under test.

    Attributes:
        case: Sizes and inputs.
        rank: The rank that checks.
        away: Ranks that this one has masked.
        spoilt: Whether rows and answers hold infinities and NaNs.
        relays: The nodes, if rows between them pass the rail peer of their source even while ranks are masked, and
            are lost if it is one of them; else masked ranks are in nobody's way.
        unaware: Whether this rank has not masked them itself, and its plans still have their experts.
    """

    case: Case
    rank: int
    away: frozenset[int] = frozenset()
    spoilt: bool = False
    relays: tuple[tuple[int, ...], ...] = ()
    unaware: bool = False

    @property
    def capacity(self) -> int:
        return self.case.ranks * self.case.shape.max_tokens

    def oracle(self) -> Oracle:
        """Return the oracle of the case in which masked ranks send nothing and no token chooses their experts."""
        with ORACLES:
            return known_oracle(replace(self, rank=0, unaware=False))

    def unreachable(self, source: int) -> set[int]:
        """Return the ranks that get nothing of a rank."""
        found = set(self.away)
        for ranks in self.relays:
            if source not in ranks and ranks[source % len(ranks)] in self.away:
                found |= set(ranks)
        return found

    def inputs(self) -> list[Sent]:
        return [replace(one, x=spoil(one.x)) if self.spoilt else one for one in self.case.inputs()]

    def mine(self) -> Sent:
        return self.inputs()[self.rank]

    def routing(self) -> Routing:
        return Routing(self.mine().topk_idx, self.mine().topk_weights)

    def levels(self, group: ExpertGroup) -> tuple[tuple[int, ...], ...]:
        """Return the nodes whose sums are rounded on the way: none if rows go directly."""
        if group.backend == "cpu" and group._backend._exchange.mask_on_timeout:
            return ()
        return () if self.away and not self.relays else group.topology.nodes

    def __str__(self) -> str:
        return f"rank {self.rank} {self.case} away={sorted(self.away)} spoilt={self.spoilt}"


@functools.lru_cache(maxsize=64)
def known_oracle(step: Step) -> Oracle:
    """Return the oracle of a step, which is the same for all ranks that have masked the same."""
    sent = step.inputs()
    local = step.case.experts // step.case.ranks
    for rank, one in enumerate(sent):
        gone = torch.zeros_like(one.topk_idx, dtype=torch.bool)
        for away in step.unreachable(rank):
            gone |= (one.topk_idx >= away * local) & (one.topk_idx < (away + 1) * local)
        if rank in step.away:
            gone[:] = True
        sent[rank] = replace(one, topk_idx=torch.where(gone, -1, one.topk_idx))
    return Oracle(sent, step.case.experts, "masked", capacity=step.capacity)


def check_received(step: Step, sent: DecodeDispatched, fp8: Scale | None) -> None:
    """Check rows, scales, counts, source tokens, ranges and weights."""
    oracle, rank = step.oracle(), step.rank
    rows = oracle.rows(rank)
    places = torch.tensor([row.place for row in rows], dtype=torch.int64)
    local, capacity = oracle.num_local, step.capacity
    want = oracle.x(rank)
    if fp8 is None:
        assert isinstance(sent.x, Tensor)
        assert sent.x.shape == (local, capacity, step.case.hidden), f"{step}: got shape {list(sent.x.shape)}"
        assert sent.x.is_contiguous()
        same_bits(f"{step} x", sent.x.reshape(-1, step.case.hidden)[places], want)
    else:
        check_cast(f"{step} {fp8}", sent.x, places, want, fp8, (local, capacity))
    counts = torch.tensor(oracle.expert_counts(rank), dtype=torch.int32)
    same_bits(f"{step} expert_counts", sent.expert_counts, counts)
    plan = sent.plan
    assert plan.num_tokens == step.case.tokens[rank]
    assert plan.num_experts == step.case.experts
    assert plan.src_token.shape == (local, capacity)
    tokens = torch.tensor([row.src_token for row in rows], dtype=torch.int32)
    same_bits(f"{step} src_token", plan.src_token.reshape(-1)[places], tokens)
    ranges = torch.tensor([[start << 32 | count for start, count in line] for line in oracle.decode_ranges(rank)])
    # Where there are no rows, their start is undefined.
    full = (ranges & 0xFFFFFFFF) > 0
    same_bits(f"{step} counts in src_range", plan.src_range & 0xFFFFFFFF, ranges & 0xFFFFFFFF)
    same_bits(f"{step} src_range", plan.src_range[full], ranges[full])
    chosen = step.mine() if step.unaware else oracle.sent[rank]
    same_bits(f"{step} topk_idx", plan.topk_idx, chosen.topk_idx)
    if step.case.weights:
        assert plan.row_weights is not None, f"{step}: weights were lost"
        same_bits(f"{step} row_weights", plan.row_weights.reshape(-1)[places], oracle.weights(rank))
    else:
        assert plan.row_weights is None, f"{step}: weights that were not sent"
        assert plan.topk_weights is None, f"{step}: weights that were not sent"


def check_cast(
    what: str, x: Tensor | Quantized, places: Tensor, want: Tensor, fp8: Scale, sizes: tuple[int, int]
) -> None:
    """Check the FP8 bytes and scales of each row, and that scales are column-major."""
    assert isinstance(x, Quantized), f"{what}: got {type(x).__name__}"
    hidden = want.shape[1]
    width = -(-hidden // (512 if fp8 is Scale.UE8M0 else 128))
    assert x.data.shape == (*sizes, hidden), f"{what}: got shape {list(x.data.shape)}"
    assert x.scale.shape == (*sizes, width), f"{what}: got scales {list(x.scale.shape)}"
    assert x.scale.stride(1) == 1, f"{what}: scales have strides {x.scale.stride()}"
    casts = [fp8_cast(row, power_of_two=fp8 is not Scale.FLOAT32) for row in want]
    if not casts:
        return
    scales = [ue8m0(scale) if fp8 is Scale.UE8M0 else scale for _, scale in casts]
    data = torch.stack([cast.view(torch.uint8) for cast, _ in casts])
    same_bits(f"{what} data", x.data.view(torch.uint8).reshape(-1, hidden)[places], data)
    same_bits(f"{what} scale", x.scale.reshape(-1, width)[places], torch.stack(scales))


def check_combined(group: ExpertGroup, step: Step, sent: DecodeDispatched, dtype: torch.dtype, **options: bool) -> None:
    """Check a combine, exact or fast, into ``out`` or not, by hook or not; rows that are not read hold NaN."""
    fast, into, hook = (options.get(name, False) for name in ("fast", "into", "hook"))
    oracle, case = step.oracle(), step.case
    size = oracle.num_local * step.capacity
    ys = [answers(case, oracle, there, size, dtype) for there in range(case.ranks)]
    out = torch.full((case.tokens[step.rank], case.hidden), torch.nan, dtype=dtype) if into else None
    y = ys[step.rank].clone().reshape(oracle.num_local, step.capacity, case.hidden)
    numerics = "fast" if fast else "exact"
    got = group.decode_combine(y, sent.plan, numerics=numerics, out=out, return_hook=hook)
    if hook:
        y.fill_(torch.nan)  # it was sent already, or the hook would be too late
        got.hook()
        got.hook()
    what = f"{step} decode_combine {dtype} {options}"
    same_bits(what, got.x, oracle.decode_combine(step.rank, ys, fast=fast, nodes=step.levels(group)))
    if out is not None:
        assert got.x.data_ptr() == out.data_ptr(), f"{what}: the sum is not in out"


def check_encoding(
    group: ExpertGroup, step: Step, sent: DecodeDispatched, dtype: torch.dtype, encoding: str, fast: bool
) -> None:
    """Check sums of rows that were encoded on the way: FP8 bit for bit, logfmt10 except for a few codes."""
    oracle, case = step.oracle(), step.case
    size = oracle.num_local * step.capacity
    ys = [uneven(answers(case, oracle, there, size, dtype)) for there in range(case.ranks)]
    ys = [spoil(y) for y in ys] if step.spoilt else ys
    y = ys[step.rank].clone().reshape(oracle.num_local, step.capacity, case.hidden)
    got = group.decode_combine(y, sent.plan, numerics="fast" if fast else "exact", encoding=encoding, return_hook=fast)
    y.fill_(torch.nan)  # it was sent already
    got.hook()
    what = f"{step} decode_combine {dtype} {encoding} {fast=}"
    nodes = step.levels(group)
    want = oracle.decode_combine(step.rank, ys, fast=fast, encoding=encoding, nodes=nodes)
    if encoding == "fp8":
        same_bits(what, got.x, want)
        return
    # Logarithms and powers differ in their last bits, and a number that is half-way between two codes takes either.
    one_code, magnitude = oracle.decode_slack(step.rank, ys, fast=fast, nodes=nodes)
    rounded = want.float().abs() * (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    fine = magnitude * 2.0**-16 + rounded
    close_each(what, got.x, want, fine + 1.01 * one_code)
    half_way = (got.x.cpu().float() - want.float()).abs() > fine
    assert int(half_way.sum()) <= max(2, half_way.numel() // 100), f"{what}: {int(half_way.sum())} have other codes"


def uneven(y: Tensor) -> Tensor:
    """Return rows whose groups of 128 columns have different magnitudes, so that the scale of another group shows."""
    groups = torch.arange(y.shape[1]) // 128
    return y * torch.exp2(((5 * torch.arange(len(y))[:, None] + 3 * groups) % 10 - 5).float()).to(y.dtype)
