"""Find the rank that holds the others up, and whether by its computation or by its link, from counters.

Works on an application's own counters: `judge` takes the sums in each rank's ``DecodeStats.wait_ns``.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.errors import ArgumentError

WAITS_LESS = 0.5
"""A rank that waits less than this part of the longest wait of any rank is late itself."""
ROWS_TAKE = 2.0
"""Rows that take so many times the usual time are late."""
NOTICED = 0.1
"""Less than this part of the whole time is not reported."""
_EXPLAINS = 0.5
_ALIKE = 1.5


class Where(enum.Enum):
    """The places where a rank loses time."""

    COMPUTE = "compute"
    LINK_OUT = "its link, outwards"
    LINK_IN = "its link, inwards"
    UNKNOWN = "compute or link"


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank that holds others up.

    Attributes:
        rank: The rank.
        where: Where it loses time.
        late_ns: The time it loses; for a link: the most by which the last row is later than usual.
        peers: The ranks at the other end, for a link.
    """

    rank: int
    where: Where
    late_ns: float
    peers: tuple[int, ...] = ()

    def line(self) -> str:
        """Return one line for people."""
        late = show_ns(self.late_ns)
        ends = f"rank{'s' if len(self.peers) > 1 else ''} {', '.join(map(str, self.peers))}"
        if self.where is Where.LINK_OUT:
            return f"rank {self.rank}: slow in its link: its messages come in time, its rows {late} late at {ends}"
        if self.where is Where.LINK_IN:
            return f"rank {self.rank}: slow in its link: rows of {ends} come {late} late here, and not elsewhere"
        if self.where is Where.COMPUTE:
            return (
                f"rank {self.rank}: slow in compute: it comes {late} late to its calls, and all wait for its messages"
            )
        return (
            f"rank {self.rank}: slow: its messages come {late} late; whether it computes for too long or its link is "
            "slow is unknown without the times of rows, which GPUs record"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of `judge`.

    Attributes:
        slow: The ranks that hold others up, the worst first; empty: none stands out.
        late_ns: By rank: how much less it waits than the rank that waits longest, which is by how much it is late.
            Where several are late at once and waits run at the same time (GPUs), they are later than that.
    """

    slow: tuple[Slow, ...]
    late_ns: tuple[float, ...]

    def lines(self) -> list[str]:
        """Return lines for people, one for each slow rank."""
        if not self.slow:
            return ["no rank stands out"]
        lines = [one.line() for one in self.slow]
        late = [one.rank for one in self.slow if one.where in (Where.COMPUTE, Where.UNKNOWN)]
        if 2 * len(late) > len(self.late_ns) > 2:
            early = sorted(set(range(len(self.late_ns))) - set(late))
            lines.append(f"most ranks are late: or is there less to do for rank {', '.join(map(str, early))}?")
        return lines


def judge(wait_ns: Tensor, row_ns: Tensor | None = None, *, took_ns: float = 0.0) -> Verdict:
    """Find the ranks that hold the others up, and where they lose the time.

    Rules, in this order. All times are sums, or means, over the same calls.

    1. *Late*: rank r waits ``W[r]``, the sum of its row of ``wait_ns``. A rank that is late to the calls finds the
       messages of the others there and waits for none: a rank is late if ``W`` is less than `WAITS_LESS` of the
       longest. Sums count, not single places: where a rank waits for one peer after the other (CPU), the wait for the
       first covers that for a second which is as late. A rank that comes *early* makes all others late by this rule;
       `Verdict.lines` says so.
    2. *Link* (with ``row_ns``): rank r takes rows of r + 1, r + 2 and so on, modulo R, in this order. Those of r + d
       are late if they take `ROWS_TAKE` times what is usual: the median over ranks of what the d-th adds to those
       before, added up. Most late pairs with one sender: its link outwards; with one receiver: its link inwards; then
       again without these. Rows that follow late ones and are about as late only queued behind them.
    3. A late rank to which rows came late, by at least half of what it is waited for, is late because of that link,
       and not named itself. Every other late rank: *compute*; without ``row_ns``: *compute or link*, since these
       cannot be told apart. Rows of such a rank are on their way when those of the others have arrived: they are its
       link's fault only if they are later than the rank itself.

    Args:
        wait_ns: ``[R, R]``: the waits of rank r for messages of rank s: row r is the ``DecodeStats.wait_ns`` of rank r.
        row_ns: ``[R, R]``: from when r had the messages of all until it had the last row of s; 0: none came. See
            `tokenferry.bench.profile.timeline.row_waits`. None: not known.
        took_ns: The time of the calls and of everything between them: ranks that are late by less than `NOTICED` of it
            are not named. 0: all that are late are named.

    Returns:
        Verdict: ``late_ns`` in the unit of ``wait_ns``.

    Raises:
        ArgumentError: a matrix is not ``[R, R]``, or holds negative times.
    """
    _check("wait_ns", wait_ns, wait_ns.shape[0])
    num_ranks = wait_ns.shape[0]
    waits = wait_ns.detach().cpu().double().clone().fill_diagonal_(0.0)
    total = waits.sum(dim=1)
    late = total.max() - total
    enough = NOTICED * took_ns
    suspects = [r for r in range(num_ranks) if total[r] < WAITS_LESS * total.max() and late[r] > enough]
    links: list[Slow] = []
    if row_ns is not None:
        _check("row_ns", row_ns, num_ranks)
        excess = _excess(row_ns.detach().cpu().double(), enough)
        links = _links(excess, num_ranks)
        waited_for = waits.max(dim=0).values.tolist()
        own = {r: max((ns for (at, _), ns in excess.items() if at == r), default=0.0) for r in suspects}
        suspects = [r for r in suspects if own[r] == 0 or own[r] < _EXPLAINS * waited_for[r]]
        behind = {r: float(late[r]) for r in suspects}
        links = [one for one in links if one.where is Where.LINK_IN or one.late_ns > behind.get(one.rank, 0.0)]
    where = Where.UNKNOWN if row_ns is None else Where.COMPUTE
    slow = [Slow(r, where, float(late[r])) for r in suspects] + links
    return Verdict(tuple(sorted(slow, key=lambda one: -one.late_ns)), tuple(late.tolist()))


def show_ns(ns: float) -> str:
    """Format a time for people."""
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns / 1e3:.1f} us"


def _check(name: str, matrix: Tensor, num_ranks: int) -> None:
    if matrix.shape != (num_ranks, num_ranks):
        raise ArgumentError(f"judge: {name}: expected [R, R] = [{num_ranks}, {num_ranks}], got {list(matrix.shape)}")
    if bool((matrix < 0).any()):
        raise ArgumentError(f"judge: {name}: expected nanoseconds >= 0, got {float(matrix.min()):.0f}")


def _excess(rows: Tensor, enough: float) -> dict[tuple[int, int], float]:
    """Return by (receiver, sender) how much later than usual rows are, of the pairs whose rows are late."""
    num_ranks = rows.shape[0]
    found: dict[tuple[int, int], float] = {}
    receiver, usual = torch.arange(num_ranks, dtype=torch.int64, device="cpu"), 0.0
    before = torch.zeros(num_ranks, dtype=rows.dtype, device="cpu")
    for d in range(1, num_ranks):
        sender = (receiver + d) % num_ranks
        times = rows[receiver, sender]
        if not bool((times > 0).any()):
            continue
        # Only what comes on top of the rows before: where these were late, so are all that follow.
        usual += float((times - before).clamp(min=0)[times > 0].median())
        before = before.maximum(times)
        for r, s, ns in zip(receiver.tolist(), sender.tolist(), times.tolist(), strict=True):
            if ns >= ROWS_TAKE * usual and ns - usual > enough:
                found[r, s] = ns - usual
    return found


def _links(excess: dict[tuple[int, int], float], num_ranks: int) -> list[Slow]:
    """Return the links that explain the late pairs: each time the one that explains most."""
    left, found = dict(excess), []
    while left:
        sender, as_sender = Counter(s for _, s in left).most_common(1)[0]
        receiver, as_receiver = Counter(r for r, _ in left).most_common(1)[0]
        if as_sender >= as_receiver:
            pairs = [(r, s) for r, s in left if s == sender]
            slow = Slow(sender, Where.LINK_OUT, max(left[p] for p in pairs), tuple(sorted(r for r, _ in pairs)))
            queued = {pair for pair in left for late in pairs if _queued(pair, late, left, num_ranks)}
        else:
            pairs = [(r, s) for r, s in left if r == receiver]
            slow = Slow(receiver, Where.LINK_IN, max(left[p] for p in pairs), tuple(sorted(s for _, s in pairs)))
            queued = set()
        found.append(slow)
        left = {pair: ns for pair, ns in left.items() if pair not in queued and pair not in pairs}
    return found


def _queued(pair: tuple[int, int], late: tuple[int, int], excess: dict[tuple[int, int], float], num_ranks: int) -> bool:
    """Return whether rows of ``pair`` waited behind those of ``late`` at the same receiver."""
    (at, sender), (receiver, first) = pair, late
    behind = (sender - at) % num_ranks > (first - at) % num_ranks
    return at == receiver and behind and excess[pair] < _ALIKE * excess[late]
