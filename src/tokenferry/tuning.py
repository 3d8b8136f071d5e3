"""Choice of the number of SMs for each call, with the reasons, from the sizes of a group and its machine.

The figures were measured on H200 GPUs behind NVSwitch; `tokenferry limits` measures them on any machine.
All functions are pure; `tokenferry explain` prints what they return.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tokenferry.errors import ConfigError, several
from tokenferry.types import MoeShape

LINK_GBPS = 340.0
"""Peak rate of bulk stores of whole rows, from every GPU to all its peers: 10^9 bytes per second leaving a GPU."""

STORE_GBPS = ((4, 172.0), (8, 317.0), (16, 310.0), (24, 322.0), (48, 330.0), (64, 335.0), (132, 340.0))
"""The same rate by number of storing SMs, on 8 GPUs."""

LOAD_GBPS = ((4, 196.0), (8, 314.0), (12, 320.0), (24, 320.0), (48, 290.0), (64, 289.0), (132, 316.0))
"""Rate of bulk loads from peers by number of loading SMs, on 8 GPUs."""

DISPATCH_US = ((8, 288), (12, 247), (16, 248), (24, 251), (32, 255), (48, 263))
"""Microseconds of a redispatch by number of SMs: FP8, T=4096, H=7168, K=8, E=256, 4 H200, back to back; the run of
67d3d47 over numbers of SMs, in benchmarks/README.md."""

COMBINE_US = ((8, 851), (12, 570), (16, 494), (24, 495), (32, 504), (48, 508))
"""The same for a combine of bfloat16 rows in the heap, which are fetched."""

COMBINE_US_OF_TWO = {16: (17, 17), 128: (24, 21), 512: (61, 39), 1024: (105, 62), 4096: (371, 189), 8192: (719, 365)}
"""The same on 2 H200, by T, with 16 SMs and with 40: a third as many rows are fetched, and the SMs that add up are the
limit until there are 32."""

FETCHED_OR_PUSHED_US = {128: (36, 46), 1024: (141, 169), 4096: (494, 504)}
"""The same on 4 H200, by T: rows in the heap that are fetched, and rows in the user's memory that are pushed, each with
as many SMs as help. Few tokens were measured isolated, since back to back the host is the limit: the run of calls of
the same commit."""

FETCHED_OR_PUSHED_US_OF_TWO = {
    16: (17, 24),
    128: (21, 32),
    512: (39, 56),
    1024: (62, 86),
    4096: (189, 212),
    8192: (365, 366),
}
"""The same on 2 H200."""

PUSH_US = ((8, 1315), (12, 812), (16, 687), (24, 547), (32, 519), (48, 504))
"""As `DISPATCH_US`, for a combine of rows in the user's memory, which are pushed. On a machine whose links answered
sooner (a flag's way took 1.2 us instead of 1.37) 24 SMs took 502 us, and 66 took 498; 1024 rows took 166 us with 24 SMs
and 162 with 66."""

PUSH_US_OF_TWO = ((24, 307), (32, 250), (48, 220), (66, 212), (132, 202))
"""The same on 2 H200."""

ONE_RANK_US = {16: (86, 328, 191), 40: (43, 139, 86), 64: (41, 92, 60), 132: (41, 57, 48)}
"""Where one rank is alone, as on a node of one GPU, by number of SMs: a redispatch, a combine of rows in the heap, and
one of rows in the user's memory. BF16, T=4096, H=7168, K=8, E=128, one H200; benchmarks/NOTES.md, 2026-11-30. Nothing
but the SMs is the limit."""

DISPATCH_SMS = 16
DISPATCH_SMS_OF_ONE = 40
COMBINE_SMS = 16
COMBINE_SMS_OF_ONE = 64
MOST_COMBINE_SMS = 40
PUSH_SMS = 32
PUSH_SMS_OF_TWO = 48
NCCL_SMS = 16
"""SMs that calls across nodes leave to NCCL, and the most that it uses: a kernel that waits for the ranks of its node
must not keep NCCL from what a rank of another node waits for."""

RAIL_CHUNK_BYTES = 8 << 20
"""Least bytes of the largest chunk between nodes. A card of 100 GB/s takes 84 us for so many, and a slow host as long
for a chunk (an exchange and two launches). Shorter ones wait for the host. NVLink takes 25 us, and so does a GPU for a
chunk by itself (H200)."""
MOST_RAIL_CHUNKS = 8
"""Most chunks between two nodes: of so many the shortest one is less than a thousandth of all."""
RAIL_CHUNK_RATIO = 3
"""How many times as large a chunk between nodes is as the next smaller one. NVLink moves what comes from a node of
eight over a card of 50 GB/s in a third of the time that the card takes."""
ROUTING_AT_ONCE_BYTES = 1 << 20
"""Most bytes of a routing of M tokens for all other nodes that crosses along with the headers of a dispatch, used or
not. A network card of 400 Gb/s takes 21 us for so many, one of 200 Gb/s 42; headers in an exchange of their own, for
which the host waits, take it alone 40 to 80 us."""

_ROWS_AT_ONCE = 8  # rows that the warps of one SM move concurrently
_PIECES_AT_ONCE = 12  # pieces of a row that the warps of one SM sum concurrently
_PIECE_BYTES = 2048
_FEW_ROWS = 512  # tokens for which what was measured with 128 says more than what was with 4096
_ADDING_GBPS = 9.8  # bytes of sums that one SM completes: 14336 in 1.46 us, on 2 and on 4 GPUs alike
_SHORT_PUSH = (
    2048  # tokens; with fewer, most of the time passes before the first rows land and after the last ones have landed
)
_LEAST_HEAP = 64 << 20
_MOST_DECODE = 512 << 20
"""The heap reserves no memory for decode calls that need more than this: such a shape is not meant for decoding."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The ranks of a group, or of one of its nodes, and the SMs of their GPUs.

    Args:
        num_ranks: R.
        num_sms: SMs of each GPU.

    Raises:
        ConfigError: a number is not positive.
    """

    num_ranks: int
    num_sms: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_sms"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"Machine: {name}: expected a positive integer, got {value!r}")


@dataclass(frozen=True, slots=True)
class Tuning:
    """The number of SMs of calls that do not give one, with the reasons.

    Attributes:
        dispatch_sms: SMs of `dispatch` and `redispatch`.
        combine_sms: SMs of `combine` for rows in the group's memory, or by expert.
        push_sms: SMs of `combine` for ROWS in the user's memory.
        reasons: A sentence for each number, and one for the way of rows in the heap.
    """

    dispatch_sms: int
    combine_sms: int
    push_sms: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Travel:
    """The average traffic of a call of T tokens, if every choice of K distinct experts is equally likely.

    Attributes:
        ranks_per_token: Distinct ranks that hold a chosen expert, including this rank.
        remote_per_token: The same without this rank: copies of a row that leave the GPU.
        rows_received: Rows received on a rank, N.
        bytes_out: Bytes that leave a GPU: rows to other ranks.
    """

    ranks_per_token: float
    remote_per_token: float
    rows_received: float
    bytes_out: float


def tune(shape: MoeShape, machine: Machine) -> Tuning:
    """Choose the number of SMs of each call, for M tokens with bfloat16 rows. Pure."""
    dispatch, why_dispatch = _dispatch_sms(shape, machine)
    combine, why_combine = _combine_sms(shape, machine)
    push, why_push = _push_sms(shape, machine)
    reasons = {
        "dispatch": (dispatch, why_dispatch),
        "combine": (combine, why_combine),
        "combine of rows in the user's memory": (push, why_push),
    }
    sentences = [f"{call}: {several(num_sms, 'SM')}: {why}" for call, (num_sms, why) in reasons.items()]
    return Tuning(dispatch, combine, push, (*sentences, _why_fetched(shape, machine)))


def travel(shape: MoeShape, num_ranks: int, num_tokens: int, row_bytes: int) -> Travel:
    """Return the traffic of a call of ``num_tokens`` rows of ``row_bytes``, for routings drawn uniformly. Pure."""
    hit = hit_probability(shape.num_experts, shape.num_experts // num_ranks, shape.top_k)
    ranks, remote = num_ranks * hit, (num_ranks - 1) * hit
    return Travel(ranks, remote, num_tokens * ranks, num_tokens * remote * row_bytes)


def hit_probability(num_experts: int, num_local: int, top_k: int) -> float:
    """Return the probability that K distinct experts, drawn uniformly, include one of ``num_local`` given ones. Pure.

    ``1 - C(E - L, K) / C(E, K)``, which is exact.
    """
    miss = 1.0
    for k in range(min(top_k, num_experts)):
        miss *= max(0, num_experts - num_local - k) / (num_experts - k)
    return 1 - miss


def gbps(curve: tuple[tuple[int, float], ...], num_sms: int) -> float:
    """Interpolate a measured curve at a number of SMs: linear between points, proportional below the first. Pure."""
    first_sms, first_rate = curve[0]
    if num_sms <= first_sms:
        return first_rate * num_sms / first_sms
    for (low, low_rate), (high, high_rate) in itertools.pairwise(curve):
        if num_sms <= high:
            return low_rate + (high_rate - low_rate) * (num_sms - low) / (high - low)
    return curve[-1][1]


def _dispatch_sms(shape: MoeShape, machine: Machine) -> tuple[int, str]:
    """Return how many SMs, and why; likewise the next ones."""
    needed = -(-shape.max_tokens // _ROWS_AT_ONCE)
    wanted = DISPATCH_SMS_OF_ONE if machine.num_ranks == 1 else DISPATCH_SMS
    if needed < wanted:
        chosen = min(needed, machine.num_sms)
        return chosen, (
            f"an SM moves {_ROWS_AT_ONCE} rows at a time, so more would be idle at "
            f"M={shape.max_tokens} (for 128 rows the time was the same with 16 to 132)"
        )
    chosen = min(wanted, machine.num_sms)
    if chosen < wanted:
        return chosen, f"all that the device has; {wanted} would be used on a larger one"
    if machine.num_ranks == 1:
        return chosen, _why_of_one(chosen, 0)
    if shape.max_tokens < _FEW_ROWS:
        return chosen, (f"for 128 rows the time was the same with 16 to 132, so {_left(machine, chosen)}")
    best, least = min(us for _, us in DISPATCH_US), DISPATCH_US[0]
    return chosen, (
        f"FP8 rows of T=4096, with the plan kept and calls back to back, took {best} us with 12 to 24 SMs, within 2 %, "
        f"and {least[1]} us with {least[0]} (4 H200); more slow one another down, and {_left(machine, chosen)}"
    )


def _left(machine: Machine, chosen: int) -> str:
    left = machine.num_sms - chosen
    return f"{several(left, 'SM')} {'is' if left == 1 else 'are'} left to others"


def _combine_sms(shape: MoeShape, machine: Machine) -> tuple[int, str]:
    pieces = -(-2 * shape.hidden // _PIECE_BYTES)
    needed = -(-shape.max_tokens * pieces // _PIECES_AT_ONCE)
    wanted = _adding_sms(shape, machine.num_ranks)
    if needed < wanted:
        chosen = min(needed, machine.num_sms)
        return chosen, (
            f"an SM sums {_PIECES_AT_ONCE} pieces of {_PIECE_BYTES} bytes at a time, so more "
            f"would be idle at M={shape.max_tokens}"
        )
    chosen = min(wanted, machine.num_sms)
    if chosen < wanted:
        return chosen, f"all that the device has; {wanted} would be used on a larger one"
    if machine.num_ranks == 1:
        return chosen, _why_of_one(chosen, 1)
    if chosen > COMBINE_SMS:
        measured = _nearest(COMBINE_US_OF_TWO, shape.max_tokens)
        with_16, with_40 = COMBINE_US_OF_TWO[measured]
        return chosen, (
            f"few rows cross the links for each token, so more SMs are needed to add up as fast "
            f"as rows arrive: bfloat16 rows of T={measured} took {with_40} us with 40 and {with_16} us with 16 (2 H200)"
        )
    best, fewer = min(us for _, us in COMBINE_US), COMBINE_US[1]
    return chosen, (
        f"bfloat16 rows of T=4096 took {best} us with 16 to 24 SMs and {fewer[1]} us with "
        f"{fewer[0]} (4 H200); bulk loads from peers are slower with many ({gbps(LOAD_GBPS, 48):.0f} GB/s with 48)"
    )


def _why_of_one(num_sms: int, call: int) -> str:
    """Return the reason for a number of SMs of one rank; ``call``: see `ONE_RANK_US`."""
    times = {sms: us[call] for sms, us in ONE_RANK_US.items()}
    fewer, most = min(times), max(times)
    return (
        f"one rank, nothing leaves the GPU: T=4096 took {times[num_sms]} us, {times[fewer]} with {fewer} and "
        f"{times[most]} with {most} (one H200)"
    )


def _why_fetched(shape: MoeShape, machine: Machine) -> str:
    """Return why peers fetch rows in the heap, where they could be pushed as rows in the user's memory are."""
    what = "combine of rows in the heap: fetched, not pushed"
    if machine.num_ranks == 1:
        return f"{what}: one rank, nothing leaves the GPU"
    table, gpus = (FETCHED_OR_PUSHED_US_OF_TWO, 2) if machine.num_ranks == 2 else (FETCHED_OR_PUSHED_US, 4)
    measured = _nearest(table, shape.max_tokens)
    fetched, pushed = table[measured]
    return (
        f"{what}: bfloat16 rows of T={measured} took {fetched} us, and {pushed} when they were pushed, with as many "
        f"SMs as help ({gpus} H200): they are added up as they are fetched, but only after they have been pushed"
    )


def _nearest(table: Mapping[int, object], max_tokens: int) -> int:
    """Return the number of tokens in a table that is the nearest by its ratio to M."""
    return min(table, key=lambda tokens: max(tokens / max_tokens, max_tokens / tokens))


def _adding_sms(shape: MoeShape, num_ranks: int) -> int:
    """Return how many SMs add up as fast as the links bring rows, if every choice of experts is equally likely."""
    remote = travel(shape, num_ranks, 1, 0).remote_per_token
    if not remote:
        return COMBINE_SMS_OF_ONE
    return min(max(COMBINE_SMS, math.ceil(LINK_GBPS / (_ADDING_GBPS * remote))), MOST_COMBINE_SMS)


def _push_sms(shape: MoeShape, machine: Machine) -> tuple[int, str]:
    most = machine.num_sms
    pieces = -(-2 * shape.hidden // _PIECE_BYTES)
    needed = 2 * -(-shape.max_tokens * pieces // _PIECES_AT_ONCE)  # half of them push, half add up
    least = {1: COMBINE_SMS_OF_ONE, 2: PUSH_SMS_OF_TWO}.get(machine.num_ranks, PUSH_SMS)
    wanted = least if shape.max_tokens >= _SHORT_PUSH or machine.num_ranks == 1 else max(least, most // 2)
    if needed < wanted:
        chosen = min(needed, most)
        return chosen, f"more would be idle at M={shape.max_tokens}"
    chosen = min(wanted, most)
    if chosen < least:
        return chosen, f"all that the device has; {least} would be used on a larger one"
    if machine.num_ranks == 1:
        return chosen, _why_of_one(chosen, 2)
    if chosen > least:
        return chosen, (
            f"half of the device, if fewer than {_SHORT_PUSH} tokens are combined: rows land "
            "late and all at once (T=128 took 53 us with 24 SMs and 42 with 66; 4 H200)"
        )
    curve, gpus = (PUSH_US_OF_TWO, 2) if machine.num_ranks == 2 else (PUSH_US, 4)
    times = dict(curve)
    more = 66 if machine.num_ranks == 2 else 48
    return chosen, (
        f"some push, the others add up what lands: bfloat16 rows of T=4096 took "
        f"{times[chosen]} us, {times[24]} with 24 and {times[more]} with {more} ({gpus} H200)"
    )


def tokens_for_node(shape: MoeShape, num_nodes: int) -> int:
    """Return how many of M tokens of a rank go to the same other node if experts are chosen evenly, rounded up. Pure.

    With `MoeShape.max_nodes` they are at most so many of the nodes.
    """
    M, N = shape.max_tokens, num_nodes
    K = min(shape.top_k, 64 * N)  # with more all but one of 10^27 tokens go there, and numbers become large
    tokens: int = -(-M * (N**K - (N - 1) ** K) // N**K)  # integers: the same number on all machines
    return tokens if shape.max_nodes is None else min(tokens, -(-M * shape.max_nodes // N))


def rail_chunks(num_tokens: int, row_bytes: int, ranks_per_node: int) -> tuple[int, ...]:
    """Return the first token of each chunk in which about so many tokens of a node cross, the shortest one first. Pure.

    In a dispatch they cross in the reverse order: one is passed on while the next one crosses, and when the network is
    done the shortest one is left. Each row goes to about two ranks of its node, or is copied in a tenth of the time
    where a node has one rank. Each chunk costs as much by itself as NVLink takes for RAIL_CHUNK_BYTES, and is a third
    of the next longer one, which is passed on meanwhile; the best of such numbers of chunks is taken. The longest one
    also has what goes beyond ``num_tokens``. ``row_bytes``: of a row without its scales.
    """
    num, ratio = _num_rail_chunks(num_tokens, row_bytes, ranks_per_node), RAIL_CHUNK_RATIO
    firsts = {round(num_tokens * (ratio**i - 1) / (ratio**num - 1)) for i in range(num)}
    return tuple(sorted(firsts))


def _num_rail_chunks(num_tokens: int, row_bytes: int, ranks_per_node: int) -> int:
    units = num_tokens * row_bytes / RAIL_CHUNK_BYTES
    passed_on = units * (2 if ranks_per_node > 1 else 0.2)

    def cost(num: int) -> float:
        return num + passed_on * _share(0, num)

    num = 1
    while num < MOST_RAIL_CHUNKS and _share(num, num + 1) * units >= 1 and cost(num + 1) < cost(num):
        num += 1
    return num


def _share(i: int, num: int) -> float:
    """Return the share of a chunk between nodes, of so many, of which the shortest one has number 0."""
    ratio = float(RAIL_CHUNK_RATIO)
    return ratio**i * (ratio - 1) / (ratio**num - 1)


def why_rail_chunks(num_tokens: int, row_bytes: int, ranks_per_node: int) -> str:
    """Return the reason for their number. Pure."""
    num = _num_rail_chunks(num_tokens, row_bytes, ranks_per_node)
    if _share(num, num + 1) * num_tokens * row_bytes < RAIL_CHUNK_BYTES:
        return (
            f"with one more the longest would have less than {RAIL_CHUNK_BYTES >> 20} MiB, and cross faster than the "
            "host can start the next"
        )
    return "one more would cost as much as it saves of the shortest one, which is passed on while no other crosses"


def routing_at_once(max_tokens: int, token_bytes: int, num_others: int) -> bool:
    """Return whether the routing for the other nodes crosses before its size is known, for M tokens each. Pure."""
    return num_others * max_tokens * token_bytes <= ROUTING_AT_ONCE_BYTES


def num_pushers(num_sms: int) -> int:
    """Return how many SMs of a pushing combine push: 10 fill the links, and the others must keep up. Pure."""
    return max(1, min(num_sms * 5 // 12, 16))


def heap_bytes(shape: MoeShape, num_ranks: int, num_nodes: int = 1) -> int:
    """Return the bytes of GPU memory for rows that peers write or read; TOKENFERRY_HEAP_MB overrides it. Pure.

    The heap holds the bfloat16 rows of five worst-case dispatches: the rows received and the expert outputs, both a
    second time while the next ones arrive, and one more set into which rows land. For small M it also holds the memory
    of decode calls.
    """
    rows = num_ranks * shape.max_tokens
    row_bytes = 2 * shape.hidden + 24 * shape.top_k + 8  # data; weights, ids and places; source token
    decode = decode_bytes(shape, num_ranks, num_nodes)
    return max(_LEAST_HEAP, 5 * rows * row_bytes + (decode if decode <= _MOST_DECODE else 0))


def decode_bytes(shape: MoeShape, num_ranks: int, num_nodes: int = 1) -> int:
    """Return an upper estimate of the bytes of GPU memory that decode calls of bfloat16 rows need. Pure.

    Two calls of each direction may be under way: dispatches, with rows, metadata and counts from every rank, and
    combines, with the rows that return. Across nodes a rank acts for the tokens that reach it from other nodes, too, in
    segments of a multiple of eight, and its peers are those of its node.
    """
    M, K, line = shape.max_tokens, shape.top_k, 128
    slots = M if shape.node_slots is None else min(M, shape.node_slots)
    tokens, per_node = M + (num_nodes - 1) * -(-slots // 8) * 8, num_ranks // num_nodes
    row = 2 * -(-shape.hidden // 512) * 512
    counts = 8 * (1 + shape.num_experts // per_node + -(-tokens // 32)) + line
    dispatch = per_node * (tokens * (row + 32 * -(-(K + (num_nodes > 1)) // 3)) + counts + 2 * line)
    return 2 * (dispatch + tokens * max(K, per_node) * row + line)
