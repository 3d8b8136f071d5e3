"""Bytes and times of one dispatch and one combine of either family, from the rows on the links.

What is measured on one node is taken from benchmarks/README.md; docs/cost-model.md says which constants are assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tokenferry import tuning
from tokenferry.cost.case import Case, Links
from tokenferry.cost.rows import RankRows
from tokenferry.errors import ConfigError

CallName = Literal["dispatch", "combine"]

FIXED_US = 20.0
"""Launch, entry, flags and exit of a throughput call: what one node takes beyond its bytes, for T from 512 to 8192."""

PLACES_US = 30.0
"""Counts and places of a new routing: what a dispatch takes beyond one whose plan is kept, T=4096 and 8192."""

DECODE_US = {"dispatch": 7.0, "combine": 5.0}
"""A decode call in a CUDA graph beyond its bytes: T=1 on one node."""

DECODE_SHARE = {"dispatch": 0.62, "combine": 0.81}
"""The share of the links' rate that decode calls of one node reach, from the time that T=512 takes longer than T=1."""

COPY_GBS = 4143.0
"""Rate of a copy in a GPU's memory, bytes read and bytes written."""

PEER_BYTES = 16
"""What the exchange of routings adds for each peer: counts."""

_TOKEN_BYTES = 4
_WEIGHT_BYTES = 4
_SLOT_ALIGN = 16
_SLOTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Times:
    """The parts of the time of a call, on the busiest rank, in microseconds.

    Attributes:
        routing_us: Exchange of the routing, counts and places; a call whose plan is kept does without.
        network_us: The network leg alone.
        nvlink_us: The NVLink leg alone.
        exposed_us: What is not hidden behind the slower leg: the first or last chunk of the other (decode calls: all
            of it); packing the rows of a dispatch; in a combine, adding up what the last chunk completes.
        fixed_us: Launch and flags.
    """

    routing_us: float
    network_us: float
    nvlink_us: float
    exposed_us: float
    fixed_us: float

    @property
    def kept_us(self) -> float:
        """Return the time of the call if its plan is kept."""
        return max(self.network_us, self.nvlink_us) + self.exposed_us + self.fixed_us

    @property
    def total_us(self) -> float:
        """Return the time of the call."""
        return self.routing_us + self.kept_us

    @property
    def bound_by(self) -> str:
        """Return the largest part: ``"network"``, ``"NVLink"`` or ``"overheads"``."""
        parts = {
            "network": self.network_us,
            "NVLink": self.nvlink_us,
            "overheads": self.total_us - max(self.network_us, self.nvlink_us),
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class CallCost:
    """The bytes that one call moves over the links of the busiest rank, and its time.

    Attributes:
        call: Its name.
        row_bytes: Bytes of a row with its scales.
        network_out_bytes: Rows to other nodes; decode calls send every slot, filled or not.
        network_in_bytes: Rows from other nodes.
        routing_out_bytes: What is sent to other nodes beside the rows: ids, weights, counts; of a decode combine, the
            weights with which the other node adds up.
        nvlink_out_bytes: Rows to other ranks of the node.
        nvlink_in_bytes: Rows from other ranks of the node.
        num_chunks: Chunks in which the rows for one of the other nodes can cross; see `tokenferry.tuning.rail_chunks`.
        chunk_tokens: Tokens of the largest one, if as many go to that node as are expected.
        num_exchanges: Exchanges in which the rows cross the network: one for each chunk of that node that has rows,
            and one for each other one, if all nodes get equally many. Decode calls have one for all nodes.
        times: Its time.
    """

    call: CallName
    row_bytes: int
    network_out_bytes: float
    network_in_bytes: float
    routing_out_bytes: float
    nvlink_out_bytes: float
    nvlink_in_bytes: float
    num_chunks: int
    chunk_tokens: int
    num_exchanges: int
    times: Times


def entry_bytes(case: Case) -> int:
    """Return the bytes of the routing of one (token, node): token, ids of 16 bits if they suffice, weights. Pure."""
    id_bytes = 2 if case.shape.num_experts < 1 << 15 else 4
    return _TOKEN_BYTES + case.shape.top_k * (id_bytes + _WEIGHT_BYTES)


def slot_header_bytes(case: Case) -> int:
    """Return the bytes of the same in the header of a slot of a decode call. Pure."""
    return -(-entry_bytes(case) // _SLOT_ALIGN) * _SLOT_ALIGN


def sent_slots(slots: int) -> int:
    """Return how many slots a decode call on GPUs sends to each other node: a multiple of eight. Pure.

    Args:
        slots: The most tokens of a rank that may go to the same other node, S.
    """
    return -(-slots // _SLOTS_AT_ONCE) * _SLOTS_AT_ONCE


def slot_weight_bytes(case: Case) -> int:
    """Return the bytes of the weights of a slot, with which the other node adds up in a decode combine. Pure."""
    return _WEIGHT_BYTES * case.shape.top_k


@dataclass(frozen=True, slots=True)
class _Load:
    """Bytes of rows on the links, each of the rank where they are most; ``relayed`` is a part of ``nvlink_*``."""

    row_bytes: int
    network_out: float
    network_in: float
    nvlink_out: float
    nvlink_in: float
    relayed: float

    @property
    def network(self) -> float:
        return max(self.network_out, self.network_in)

    @property
    def nvlink(self) -> float:
        return max(self.nvlink_out, self.nvlink_in)


@dataclass(frozen=True, slots=True)
class _Crossing:
    """How the rows of a call cross; see `CallCost`.

    ``shares``: of the rows of the busiest rank, in the order in which they cross in a dispatch; in a combine it is the
    other way round. ``last``: the share of the rows for a node that are in the last chunk of a combine.
    """

    num_chunks: int
    chunk_tokens: int
    shares: tuple[float, ...] = ()
    last: float = 1.0

    @property
    def num_exchanges(self) -> int:
        return len(self.shares)

    def end_us(self, network_us: float, own_us: float, relayed_us: float) -> float:
        """Return when both legs have ended, of which one passes on what the other one has brought.

        The rows of the own node fill the time until the first others are there. In a combine all is the mirror image.
        """
        arrived, left = 0.0, 1.0
        end_us = own_us + relayed_us
        for share in self.shares:
            arrived += share
            end_us = max(end_us, network_us * arrived + relayed_us * left)
            left -= share
        return end_us


_NOTHING = _Crossing(0, 0)


def throughput_call(call: CallName, case: Case, rows: Sequence[RankRows], links: Links) -> CallCost:
    """Return the cost of `dispatch` or `combine`, whose legs overlap by chunks. Pure.

    Args:
        call: Which one.
        case: Sizes and cluster.
        rows: The rows of the dispatch on the links of every rank, expected or counted.
        links: Their rates.

    Raises:
        ConfigError: ``call`` is neither.
    """
    load, peers = _load(call, case, rows), case.cluster.num_nodes - 1
    routing_us, entries = PLACES_US if call == "dispatch" else 0.0, 0.0
    nvlink_us, network_us, exposed_us, crossing = _us(load.nvlink, links.nvlink_gbs), 0.0, 0.0, _NOTHING
    if peers:
        crossing = _crossing(call, case, load)
        network_us = _us(load.network, links.network_gbs) + crossing.num_exchanges * links.network_us
        relayed_us = _us(load.relayed, links.nvlink_gbs)
        end_us = crossing.end_us(network_us, nvlink_us - relayed_us, relayed_us)
        # Before the first row crosses all are packed; when all sums have come those are added up that the last chunk
        # completes.
        added = load.network_in + 2 * case.shape.max_tokens * load.row_bytes
        copied = 2 * load.network_out if call == "dispatch" else added * crossing.last
        exposed_us = end_us - max(nvlink_us, network_us) + _us(copied, COPY_GBS)
        if call == "dispatch":
            per_row = entry_bytes(case) / load.row_bytes
            entries = load.network_out * per_row + peers * PEER_BYTES
            routing_us += links.network_us + _us(load.network * per_row + peers * PEER_BYTES, links.network_gbs)
    times = Times(routing_us, network_us, nvlink_us, exposed_us, FIXED_US)
    return _call_cost(call, load, entries, crossing, times)


def decode_call(call: CallName, case: Case, rows: Sequence[RankRows], links: Links, slots: int) -> CallCost:
    """Return the cost of `decode_dispatch` or `decode_combine`, whose legs follow each other. Pure.

    Args:
        call: Which one.
        case: Sizes and cluster.
        rows: The rows of the dispatch on the links of every rank, expected or counted.
        links: Their rates.
        slots: The most rows that a rank may have for each other node, S; it sends `sent_slots` of them, used or not.

    Raises:
        ConfigError: ``call`` is neither.
    """
    load, peers, slots = _load(call, case, rows), case.cluster.num_nodes - 1, sent_slots(slots)
    filled = load.network_out
    beside = peers * slots * (slot_header_bytes(case) if call == "dispatch" else slot_weight_bytes(case))
    slot_bytes = float(peers * slots * load.row_bytes)
    load = replace(load, network_out=slot_bytes, network_in=slot_bytes)
    nvlink_us = _us(load.nvlink, links.nvlink_gbs * DECODE_SHARE[call])
    # Weights cross while the nodes collect the rows that they are for.
    timed_bytes = slot_bytes + (beside if call == "dispatch" else 0)
    network_us = _us(timed_bytes, links.network_gbs) + links.network_us if peers else 0.0
    exposed_us = min(network_us, nvlink_us) + _us(2 * filled, COPY_GBS)
    times = Times(0.0, network_us, nvlink_us, exposed_us, DECODE_US[call])
    return _call_cost(call, load, beside, _Crossing(1, slots, (1.0,)) if peers else _NOTHING, times)


def _load(call: CallName, case: Case, rows: Sequence[RankRows]) -> _Load:
    if call not in ("dispatch", "combine"):
        raise ConfigError(f'{call!r} is no call of the model; expected "dispatch" or "combine"')
    if call == "dispatch":
        row_bytes, directed = case.dispatch_row_bytes, list(rows)
    else:
        row_bytes, directed = case.combine_row_bytes, [each.reversed() for each in rows]
    return _Load(
        row_bytes,
        row_bytes * max(each.network_out for each in directed),
        row_bytes * max(each.network_in for each in directed),
        row_bytes * max(each.own_out + each.relayed_out for each in directed),
        row_bytes * max(each.own_in + each.relayed_in for each in directed),
        row_bytes * max(max(each.relayed_out, each.relayed_in) for each in directed),
    )


def _crossing(call: CallName, case: Case, load: _Load) -> _Crossing:
    """Return in which chunks the rows cross; those without rows are left out."""
    num_nodes, peers = case.cluster.num_nodes, case.cluster.num_nodes - 1
    data_bytes = case.dispatch_data_bytes if call == "dispatch" else case.combine_row_bytes
    expected = tuning.tokens_for_node(case.group_shape, num_nodes)
    firsts = list(tuning.rail_chunks(expected, data_bytes, case.cluster.ranks_per_node))
    rows = max(load.network_out, load.network_in) / load.row_bytes / peers
    used = [first for first in firsts if first < rows] or [0]
    tokens = [after - first for first, after in itertools.pairwise([*used, rows])]
    cut = [num / rows / peers for num in reversed(tokens)] if rows else [1 / peers]
    last = 1 - used[-1] / case.shape.max_tokens if peers == 1 else 1.0
    return _Crossing(len(firsts), expected - firsts[-1], (*[1 / peers] * (peers - 1), *cut), last)


def _call_cost(call: CallName, load: _Load, routing_bytes: float, crossing: _Crossing, times: Times) -> CallCost:
    return CallCost(
        call,
        load.row_bytes,
        load.network_out,
        load.network_in,
        routing_bytes,
        load.nvlink_out,
        load.nvlink_in,
        crossing.num_chunks,
        crossing.chunk_tokens,
        crossing.num_exchanges,
        times,
    )


def _us(num_bytes: float, gbs: float) -> float:
    return num_bytes / gbs / 1e3
