"""Timelines of decode calls: aligned clocks of several GPUs, phases, events for Perfetto and Chrome.

Everything here is a function of the time stamps of kernels (see `tokenferry.kernels.control_block`, ``TRACE``): tensors
in, numbers out. Nothing here needs a GPU. Letters: N calls, R ranks, B blocks of a kernel, W = ``TRACE_WORDS``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenferry.errors import ArgumentError
from tokenferry.kernels.control_block import MAX_RANKS, TRACE, TRACE_ROWS, TRACE_SIGNATURE

PHASES = {"ready": "read, wait for space", "sent": "send", "counts": "wait for counts", "end": "receive"}
"""The phase of a block that ends with the time stamp of this name; if that is 0, it was not written and there is no
such phase."""
LAST_BLOCK_PHASES = {**PHASES, "sent": "send counts"}
"""The same of a kernel's last block, which sends counts and signatures instead of rows."""
WAIT = "wait for messages"
"""The phase of the last block after that, until every rank's message has arrived."""
_SIGNATURES = slice(TRACE_SIGNATURE, TRACE_SIGNATURE + MAX_RANKS)
_ROWS = slice(TRACE_ROWS, TRACE_ROWS + MAX_RANKS)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The differences between the clocks of ranks.

    Attributes:
        offset_ns: By rank: its clock minus that of rank 0.
        error_ns: A bound of the error of each offset.
    """

    offset_ns: tuple[int, ...]
    error_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One call as all ranks recorded it.

    Attributes:
        name: Name of the call, such as ``"decode_dispatch"``.
        words: ``[R, B, W]`` int64, nanoseconds; 0: not written.
    """

    name: str
    words: Tensor


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one block, nanoseconds."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def lasts_ns(self) -> int:
        """The duration of the phase."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One call on one rank, in microseconds.

    Attributes:
        rank: The rank.
        late_us: Time by which it began later than the first rank.
        lasts_us: From its first block's begin to its last block's end.
        phases: Name to median and maximum over its blocks, the last one apart.
        waits_us: By rank: the wait for its message.
    """

    rank: int
    late_us: float
    lasts_us: float
    phases: Mapping[str, tuple[float, float]]
    waits_us: Mapping[int, float]

    @property
    def waited_longest(self) -> int | None:
        """The rank that was waited for longest; None without peers."""
        return max(self.waits_us, key=lambda rank: self.waits_us[rank], default=None)


def stacked(words: Sequence[Tensor]) -> Tensor:
    """Put the words of all ranks together, by rank.

    Args:
        words: By rank ``[..., B, W]``; ranks may have different numbers of blocks: missing ones are zero.

    Returns:
        Tensor: ``[..., R, B, W]``.
    """
    most = max(one.shape[-2] for one in words)
    return torch.stack([pad(one, (0, 0, 0, most - one.shape[-2])) for one in words], dim=-3)


# ------------------------------------------------------------------ clocks


def find_clocks(words: Tensor) -> Clocks:
    """Find how the clocks of R ranks differ, from the time stamps of N calls.

    As NTP does: in every call rank a records on its clock when it sent its message (``ready`` of its last block), and
    rank b on its own when it saw it (``TRACE_SIGNATURE + a``, also of the last block). The smallest difference over all
    calls is the one in which nothing but the transfer took time: the transfer plus b's clock minus a's. In the other
    direction it is the transfer minus that. So half the difference of these two minima is the offset, if both transfers
    take equally long; in any case its error is at most half their sum. Each rank's offset is the mean over all peers.

    The time stamp of a message that came before its reader looked for it is too late. So each rank has to be the last
    in some of the calls: `tokenferry.bench.profile.iterations` makes them late in turn. The calls should lie within
    milliseconds of those that are aligned with them: clocks drift.

    Args:
        words: ``[N, R, B, W]`` int64.

    Raises:
        ArgumentError: a rank has seen no message of another one.
    """
    last = _last_blocks(words)
    num_ranks = last.shape[1]
    sent = last[..., TRACE["ready"]].unsqueeze(2)  # [N, a, 1]
    seen = last[..., TRACE_SIGNATURE : TRACE_SIGNATURE + num_ranks].transpose(1, 2)  # [N, a, b]
    never = torch.iinfo(torch.int64).max
    way = torch.where((sent > 0) & (seen > 0), seen - sent, never).min(dim=0).values.fill_diagonal_(0)
    unseen = (way == never).nonzero().tolist()
    if unseen:
        raise ArgumentError(
            f"find_clocks: words: rank {unseen[0][1]} has seen no message of rank {unseen[0][0]} in any call"
        )
    apart = (way - way.T).double() / 2  # b's clock minus a's
    offset = apart.mean(dim=0)
    offset = (offset - offset[0]).round().long()
    return Clocks(tuple(offset.tolist()), int((way + way.T).max()) // 2)


def aligned(call: Recorded, clocks: Clocks) -> Recorded:
    """Put all ranks on the clock of rank 0."""
    offset = torch.tensor(clocks.offset_ns, dtype=torch.int64, device="cpu").view(-1, 1, 1)
    return replace(call, words=torch.where(call.words > 0, call.words - offset, 0))


def _last_blocks(words: Tensor) -> Tensor:
    """``[..., B, W]`` -> ``[..., W]``: of the last block that ran."""
    ran = words[..., TRACE["start"]] > 0
    last = (ran * torch.arange(words.shape[-2], dtype=torch.int64, device="cpu")).amax(dim=-1)
    index = last[..., None, None].expand(*last.shape, 1, words.shape[-1])
    return words.gather(-2, index).squeeze(-2)


# ------------------------------------------------------------------ phases


def phases(block: Sequence[int], *, last: bool = False) -> list[Phase]:
    """Return the phases of one block, in order.

    Args:
        block: ``[W]``, its words.
        last: Whether it is its kernel's last block.
    """
    found: list[Phase] = []
    before = block[TRACE["start"]]
    seen = max(block[_SIGNATURES])
    for name, text in (LAST_BLOCK_PHASES if last else PHASES).items():
        now = block[TRACE[name]]
        if last and name == "counts" and seen > before:
            found.append(Phase(WAIT, before, seen))
            before = seen
        if now > before and before:
            found.append(Phase(text, before, now))
            before = now
    return found


def rank_times(call: Recorded) -> list[RankTimes]:
    """Return the times of each rank in one call whose ranks are on one clock."""
    begin = _begin([call])
    last = _last_blocks(call.words)
    num_ranks = call.words.shape[0]
    found = []
    for rank, blocks in enumerate(_blocks(call)):
        by_name: dict[str, list[float]] = {name: [] for name in PHASES.values()}
        for block in blocks[:-1]:
            for phase in phases(block):
                by_name[phase.name].append(phase.lasts_ns / 1e3)
        first = min(block[TRACE["start"]] for block in blocks)
        asked = int(last[rank, TRACE["sent"]])
        seen = {s: int(last[rank, TRACE_SIGNATURE + s]) for s in range(num_ranks) if s != rank}
        found.append(
            RankTimes(
                rank,
                (first - begin) / 1e3,
                (max(map(_end, blocks)) - first) / 1e3,
                {name: (statistics.median(us), max(us)) for name, us in by_name.items() if us},
                {s: max(at - asked, 0) / 1e3 for s, at in seen.items() if at},
            )
        )
    return found


def row_waits(words: Tensor) -> Tensor:
    """Return ``[R, R]`` float64: nanoseconds from when rank r had the messages of all until it had the last row of s.

    The mean of the calls; 0 where no rows came, and for a rank's own. What `tokenferry.bench.profile.diagnose.judge`
    takes as ``row_ns``. A rank begins to receive rows only when it has the counts of all: a late message delays no
    row by this measure.

    Args:
        words: ``[N, R, B, W]`` int64, of dispatches.
    """
    num_ranks = words.shape[1]
    seen = _last_blocks(words)[..., TRACE_SIGNATURE : TRACE_SIGNATURE + num_ranks].amax(dim=-1, keepdim=True)
    rows = words[..., TRACE_ROWS : TRACE_ROWS + num_ranks].amax(dim=2)
    there = (rows > 0) & (seen > 0)
    waited = torch.where(there, (rows - seen).clamp(min=0), 0).double()
    return (waited.sum(dim=0) / there.sum(dim=0).clamp(min=1)).fill_diagonal_(0.0)


def _blocks(call: Recorded) -> list[list[list[int]]]:
    """Return, by rank, the words of the blocks that ran.

    Raises:
        ArgumentError: no block ran on some rank.
    """
    found = [[block for block in blocks if block[TRACE["start"]]] for blocks in call.words.tolist()]
    if not all(found):
        raise ArgumentError(f"{call.name}: rank {[bool(blocks) for blocks in found].index(False)} recorded nothing")
    return found


def _begin(calls: Sequence[Recorded]) -> int:
    return min(block[TRACE["start"]] for call in calls for blocks in _blocks(call) for block in blocks)


def _end(block: Sequence[int]) -> int:
    return max(block[: _ROWS.stop])


# ------------------------------------------------------------------ for Perfetto and chrome://tracing


def events(calls: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Return the trace events of calls whose ranks are on one clock: a process a rank, a thread a block.

    Phases are complete events. Below the blocks each rank has a line for each peer: the time from when its message was
    sent until it was seen (two clocks, so only as exact as these), and from then on until its last row had arrived. The
    time at which a block took the last row of a rank is an instant. ``ts`` and ``dur`` are microseconds since the
    first block of the first call began.
    """
    begin = _begin(calls)
    num_blocks = max(len(blocks) for call in calls for blocks in _blocks(call))
    found = list(_names(calls[0].words.shape[0], num_blocks))
    for call in calls:
        for rank, blocks in enumerate(_blocks(call)):
            for tid, block in enumerate(blocks):
                where = {"cat": call.name, "pid": rank, "tid": tid}
                for phase in phases(block, last=tid == len(blocks) - 1):
                    found.append({**where, **_span(phase, begin)})
                for source, at in enumerate(block[_ROWS]):
                    if at:
                        name = f"last row of rank {source}"
                        found.append({**where, "ph": "i", "s": "t", "name": name, "ts": (at - begin) / 1e3})
        for rank, source, phase in _journeys(call):
            found.append({"cat": call.name, "pid": rank, "tid": num_blocks + source, **_span(phase, begin)})
    return found


def _names(num_ranks: int, num_blocks: int) -> Iterator[dict[str, Any]]:
    for rank in range(num_ranks):
        named = {"ph": "M", "pid": rank}
        yield {**named, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {**named, "name": "process_sort_index", "args": {"sort_index": rank}}
        threads = [f"block {b}" for b in range(num_blocks - 1)] + [f"block {num_blocks - 1}: counts"]
        threads += [f"from rank {s}" for s in range(num_ranks)]
        for tid, text in enumerate(threads):
            if tid != num_blocks + rank:
                yield {**named, "tid": tid, "name": "thread_name", "args": {"name": text}}
                yield {**named, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _journeys(call: Recorded) -> Iterator[tuple[int, int, Phase]]:
    """Yield (receiver, sender, phase) of every message, and of the rows after it."""
    last = _last_blocks(call.words).tolist()
    rows = call.words[..., _ROWS].amax(dim=1).tolist()
    for rank in range(len(last)):
        for source in range(len(last)):
            sent, seen, end = last[source][TRACE["ready"]], last[rank][TRACE_SIGNATURE + source], rows[rank][source]
            if not seen:  # its own are no messages
                continue
            yield rank, source, Phase("message", min(sent, seen), seen)
            if end > seen:
                yield rank, source, Phase("rows", seen, end)


def _span(phase: Phase, begin: int) -> dict[str, Any]:
    return {"ph": "X", "name": phase.name, "ts": (phase.start_ns - begin) / 1e3, "dur": phase.lasts_ns / 1e3}
