"""The kernels of groups of several nodes alone: what a rank sends to other nodes, and adds up at home."""

import ctypes
import itertools
from typing import NamedTuple

import pytest
import torch

from support.virtual_nodes import Nodes, Parcels, Split, Splitter
from support.virtual_ranks import POISON, Ranks, ranks_of
from tokenferry.kernels.across_check import spec as check_spec
from tokenferry.kernels.across_open import spec as open_spec
from tokenferry.kernels.codes import RAIL_CHUNKS, TYPES
from tokenferry.kernels.combine_nodes import spec as sum_spec
from tokenferry.kernels.control_block import (
    HOST_CAME_WORD,
    NOTHING_CAME,
    RAIL_SPACE_WORD,
    RAIL_WORDS,
    ROWS_WORD,
    SIGNATURE_WORDS,
    Fault,
)
from tokenferry.kernels.dispatch_pack import spec as pack_spec
from tokenferry.kernels.dispatch_relay import spec as relay_spec

TOPOLOGIES = ((2, 2, 2), (6, 3, 4), (4, 1, 1), (70, 35, 2))
"""Ranks, nodes, and experts of a rank."""
RELAY_TOP_K = 3


def check_start(found: torch.Tensor, want: list, what: str) -> None:
    """Check the first values; the others, if any, have not been written."""
    assert found[: len(want)].tolist() == want, what
    assert bool((found[len(want) :].contiguous().view(torch.uint8) == POISON).all()), f"{what}: too much is written"


def check_parcels(splitter: Splitter, rank: int, want: Split) -> None:
    """Check what goes to other nodes: the tokens and their ids, and ids of -1 in what crosses besides."""
    goes, nodes, first = splitter.parcels[rank], splitter.nodes[rank], 0
    for m in range(nodes.num_nodes):
        if m == nodes.node:
            continue
        tokens, ids = (part.cpu() for part in goes.of(m))
        end = first + want.counts[m]
        check_start(tokens, want.tokens_out[first:end], f"tokens for node {m}")
        assert ids[: end - first].tolist() == want.ids_out[first:end]
        assert bool((ids[end - first :] == -1).all()), "what crosses besides names experts"
        first = end
    goes.check_gaps()


def split_and_check(splitter: Splitter) -> None:
    splitter.split()
    splitter.ranks.wait()
    splitter.ranks.check_quiet()
    for came, states in zip(splitter.came, splitter.states, strict=True):
        assert not came.any(), "something has come"
        check_start(states.cpu(), [[-1, -1]] * (len(states) - 1), "states")
    made = splitter.rails()
    for rank, nodes in enumerate(splitter.nodes):
        want = Split(nodes, splitter.index[rank].cpu().tolist())
        assert splitter.dst_counts[rank].cpu().tolist() == want.dst_counts
        call = splitter.ranks.call
        assert splitter.host[rank].tolist() == [call, len(want.dst_token), *want.counts]
        headers = splitter.headers[rank].cpu()
        assert headers.tolist() == [[7 + rank] * SIGNATURE_WORDS + [count, 0] for count in want.counts]
        splitter.check_ids(rank, made[rank].pop("ids"))
        for name, found in made[rank].items():
            check_start(found, getattr(want, name), f"rank {rank} {nodes} {name}")
        check_parcels(splitter, rank, want)


def test_the_worked_example():
    """The examples in the heads of the kernels."""
    want = Split(Nodes(4, 4, 2, 0), [[0, 1], [1, 3]])
    assert (want.dst_counts, want.counts, want.dst_token) == ([1, 2, 0, 1], [2, 1], [0, 0, 1, 1])
    assert (want.slots, want.ids_out) == ([[0, -1], [1, 0]], [[-1, 1]])
    splitter = Splitter(ranks_of(1), [Nodes(4, 4, 2, 0)], [torch.tensor([[0, 1], [1, 3]])])
    split_and_check(splitter)
    assert splitter.rails()[0]["ids"][:2].tolist() == [[0, 1], [1, -1]]
    assert splitter.bases[0].cpu().tolist() == [0, 1, 3, 3, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize(("all_ranks", "num_nodes", "local"), TOPOLOGIES)
def test_any_routing(all_ranks, num_nodes, local, dtype):
    ranks, make = ranks_of(3), torch.Generator().manual_seed(all_ranks)
    experts = all_ranks * local
    for top_k, tokens in ((1, (129, 0, 1)), (8, (300, 128, 7)), (3, (0, 0, 260))):
        nodes = [Nodes(experts, all_ranks, num_nodes, rank % num_nodes) for rank in range(3)]
        index = [torch.randint(-1, experts, (T, top_k), generator=make).to(dtype) for T in tokens]
        split_and_check(Splitter(ranks, nodes, index))


@pytest.mark.parametrize(("bad", "seen"), [(12, 12), ((1 << 32) + 9, 0x7FFFFFFF)])
def test_room_for_all_tokens_on_each_node(bad, seen):
    """Where counts stay on the device. A bad index is recorded, and counts as unused."""
    ranks = ranks_of(2)
    choices = [[[0, 4], [9, 2], [-1, 11]], [[4, 8]] * 130]
    index = [torch.tensor(one) for one in choices]
    index[0][2, 0] = bad
    splitter = Splitter(ranks, [Nodes(12, 6, 3, 1), Nodes(12, 6, 3, 0)], index, capacity=200)
    splitter.split()
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.peer, record.seen) == (Fault.bad_routing, 2, 0, seen)
    ranks.check_quiet()
    made = splitter.rails(200)
    for rank, nodes in enumerate(splitter.nodes):
        want = Split(nodes, choices[rank], 200)
        assert made[rank]["slots"].tolist() == want.slots
        assert splitter.dst_counts[rank].cpu().tolist() == want.dst_counts
        check_parcels(splitter, rank, want)


@pytest.mark.parametrize("capacity", [0, 200])
def test_routing_for_each_node_in_the_room_of_all_tokens(capacity):
    """Slots stay as they are without it."""
    ranks, apart = ranks_of(2), 200
    choices = [[[0, 4], [9, 2], [-1, 11]], [[4, 8]] * 130]
    splitter = Splitter(
        ranks, [Nodes(12, 6, 3, 1), Nodes(12, 6, 3, 0)], [torch.tensor(one) for one in choices], capacity=capacity
    )
    splitter.split()
    ranks.wait()
    ranks.check_quiet()
    made = splitter.rails(apart)
    for rank, nodes in enumerate(splitter.nodes):
        want = Split(nodes, choices[rank], capacity)
        assert made[rank]["slots"].tolist() == want.slots
        check_parcels(splitter, rank, want)
        splitter.check_ids(rank, made[rank]["ids"], apart)


def test_a_bad_index():
    ranks = ranks_of(2)
    index = [torch.tensor([[0, 1]] * 200), torch.tensor([[0, 1]] * 200)]
    index[1][150, 1] = 4
    splitter = Splitter(ranks, [Nodes(4, 4, 2, 0)] * 2, index)
    splitter.split()
    ranks.wait()
    record = ranks.record(1)
    assert record is not None
    assert (record.code, record.word, record.peer, record.seen, record.expected) == (Fault.bad_routing, 150, 1, 4, 4)
    assert splitter.dst_counts[1].cpu().tolist() == [-1] * 4
    assert splitter.host[1].tolist() == [-1] * 4, "the host is told counts"
    made = splitter.rails()[1]
    segments = made.pop("ids").view(2, -1, 2)
    assert bool((segments[0] == -1).all()), "tokens of a call that was aborted"
    assert bool((segments[1, splitter.comes(1, segments.shape[1])[1] :] == -1).all())
    assert all(bool((found.view(torch.uint8) == POISON).all()) for found in made.values())
    splitter.rails(apart=256)
    crosses = splitter.parcels[1].of(1).ids
    assert bool((crosses == -1).all()), "the host sends them, if counts stay on the device"
    split_and_check(Splitter(ranks, [Nodes(4, 4, 2, 1)] * 2, [index[0]] * 2))


def test_a_token_for_too_many_nodes():
    """The first is recorded, with its nodes; unused slots and experts of one node count once."""
    ranks = ranks_of(2)
    near, far = [[0, 1, -1, 4], [4, 4, 5, 8]] * 70, [0, 9, 5, 1]
    choices = [near, [*near, far, near[0], far]]
    splitter = Splitter(ranks, [Nodes(12, 6, 3, 1)] * 2, [torch.tensor(one) for one in choices], max_nodes=2)
    splitter.split()
    ranks.wait()
    assert ranks.record(0) is None
    record = ranks.record(1)
    assert record is not None
    assert (record.code, record.word, record.seen, record.expected) == (Fault.too_many_nodes, 140, 3, 2)
    assert splitter.dst_counts[1].cpu().tolist() == [-1] * 6
    assert splitter.host[1].tolist() == [-1] * 5, "the host is told counts"


def test_a_bad_index_of_a_token_for_too_many_nodes():
    ranks = ranks_of(1)
    splitter = Splitter(ranks, [Nodes(12, 6, 3, 1)], [torch.tensor([[0, 12, 5, 9]])], max_nodes=2)
    splitter.split()
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.peer, record.seen) == (Fault.bad_routing, 0, 1, 12)


class Cut(NamedTuple):
    """Of which node the rows cross in chunks, and the first one of each."""

    node: int
    firsts: tuple[int, ...]

    def fields(self) -> dict[str, object]:
        """Return what the kernels have of it."""
        table = (ctypes.c_uint32 * RAIL_CHUNKS)(*self.firsts)
        return {"chunks": len(self.firsts), "cut_node": self.node, "chunk_first": table}

    def rows(self, node: int, num: int) -> list[range]:
        """Return the rows of each chunk of a node, of so many in all."""
        firsts = self.firsts if node == self.node else (0,)
        ends = [min(first, num) for first in firsts] + [num]
        return [range(*pair) for pair in itertools.pairwise(ends)]


def parcels(parts: list[torch.Tensor], counts: dict[int, int], cut: Cut, pitch: int) -> torch.Tensor:
    """Return what crosses, laid out in parcels by plain loops.

    ``parts``: rows, scales and weights, as bytes, in the order of nodes; ``counts``: how many rows of each node.
    """
    out, before = torch.full((pitch * sum(counts.values()),), POISON, dtype=torch.uint8), 0
    for node, count in counts.items():
        for rows in cut.rows(node, count):
            at = (before + rows.start) * pitch
            for part in parts:
                data = part[before + rows.start : before + rows.stop].contiguous().flatten()
                if part is parts[-1]:
                    at += -at % 4
                out[at : at + len(data)] = data
                at += len(data)
        before += count
    return out


CUTS = [Cut(0, (0,)), Cut(0, (0, 23, 31)), Cut(3, (0, 3, 11, 12)), Cut(0, (0, 1000)), Cut(3, tuple(range(8)))]
"""Some chunks have no rows, and the last one may have most; the node is the first or the last, or not among them."""


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("row_bytes", "scale_dtype", "num_scales", "lie"),
    [
        (48, None, 0, ""),
        (16, torch.float32, 4, "rows"),
        (2064, torch.float32, 3, "columns"),
        (32, torch.uint8, 5, "rows"),
        (32, torch.bfloat16, 33, "columns"),
        (64, torch.float64, 3, "columns"),
    ],
)
def test_parcels_for_other_nodes(row_bytes, scale_dtype, num_scales, lie, cut):
    ranks, make, T, K = ranks_of(1), torch.Generator().manual_seed(row_bytes), 70, 3
    nodes = Nodes(12, 6, 3, 1)
    cut = cut._replace(node=cut.node and 2)
    choices = torch.randint(-1, 12, (T, K), generator=make)
    want = Split(nodes, choices.tolist())
    x = torch.randint(256, (T, row_bytes), generator=make).to(torch.uint8)
    weights = torch.randn(T, K, generator=make)
    parts = [x]
    fields = {
        "x": ranks.on_device(x),
        "weights": ranks.on_device(weights),
        "slots": ranks.on_device(torch.tensor(want.slots, dtype=torch.int32)),
        "dst_counts": ranks.on_device(torch.tensor(want.dst_counts)),
        "went": ranks.on_device(torch.tensor([[num, -1] for num in want.counts], dtype=torch.int32)),
        "went_stride": 2,
        **cut.fields(),
        "num_tokens": T,
        "row_bytes": row_bytes,
        "top_k": K,
        "num_nodes": 3,
        "node": 1,
    }
    if scale_dtype is not None:
        size = scale_dtype.itemsize
        scale = torch.randint(256, (T, num_scales * size), generator=make).to(torch.uint8)
        parts.append(scale)
        scale = scale.view(scale_dtype)
        if lie == "columns":
            scale = scale.t().contiguous().t()
        scale = ranks.on_device(scale)
        bulk = num_scales * size if lie == "rows" and num_scales * size % 16 == 0 else 0
        strides = {"scale_row_stride": scale.stride(0), "scale_stride": scale.stride(1)}
        fields |= {"scale": scale, "bulk_scale_bytes": bulk, "scale_size": size, "num_scales": num_scales, **strides}
    parts.append(weights.view(torch.uint8))
    pitch = -(-sum(part.shape[1] for part in parts) // 16) * 16
    out = ranks.poisoned(pitch * len(want.tokens_out) + 16, dtype=torch.uint8)
    ranks.run(pack_spec.SPEC, [{**fields, "out": out, "pitch": pitch}], (2, pack_spec.THREADS, 0))
    expected = parcels([part[want.tokens_out] for part in parts], {0: want.counts[0], 2: want.counts[2]}, cut, pitch)
    found = out.cpu()
    assert found[:-16].equal(expected)
    assert bool((found[-16:] == POISON).all()), "too much is written"


@pytest.mark.parametrize("cut", CUTS)
def test_parcels_of_the_room_of_all_tokens(cut):
    """Where counts stay on the device, as many rows cross to each node: a chunk is as long, whoever is in it."""
    ranks, room = ranks_of(1), 90
    nodes = Nodes(12, 6, 3, 1)
    choices = [[t % 12, 11] if t % 3 else [5, -1] for t in range(70)]
    want = Split(nodes, choices, room)
    x, weights = torch.arange(70 * 16).view(70, 16).to(torch.uint8), torch.randn(70, 2)
    out = ranks.poisoned(32 * 2 * room, dtype=torch.uint8)
    fields = {
        "x": ranks.on_device(x),
        "weights": ranks.on_device(weights),
        "slots": ranks.on_device(torch.tensor(want.slots, dtype=torch.int32)),
        "dst_counts": ranks.on_device(torch.tensor(want.dst_counts)),
        "went": ranks.on_device(torch.tensor(want.counts, dtype=torch.int32)),
        "went_stride": 1,
        "capacity": room,
        **cut.fields(),
        "pitch": 32,
        "out": out,
        "num_tokens": 70,
        "row_bytes": 16,
        "top_k": 2,
        "num_nodes": 3,
        "node": 1,
    }
    ranks.run(pack_spec.SPEC, [fields], (2, pack_spec.THREADS, 0))
    parts = [torch.full((2 * room, width), POISON, dtype=torch.uint8) for width in (16, 8)]
    for t, slots in enumerate(want.slots):
        for m in (0, 2):
            if slots[m] >= 0:
                parts[0][slots[m]], parts[1][slots[m]] = x[t], weights[t].view(torch.uint8)
    assert out.cpu().equal(parcels(parts, {0: room, 2: room}, cut, 32))


@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_at_home(dtype, num_biases):
    check_sums(dtype, num_biases, Cut(1, (0, 20)), weighted=True)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_of_sums_at_home(weighted, cut):
    check_sums(torch.bfloat16, 1, cut, weighted=weighted)


def check_sums(dtype: torch.dtype, num_biases: int, cut: Cut, *, weighted: bool) -> None:
    """In the order of nodes, in float32, rounded once: other orders give other bits."""
    ranks, make, T, K, H = ranks_of(1), torch.Generator().manual_seed(num_biases), 90, 2, 24
    nodes = Nodes(12, 12, 4, 2)
    want = Split(nodes, torch.randint(-1, 12, (T, K), generator=make).tolist())
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def rows(num: int) -> torch.Tensor:
        return (torch.randn(num, H, generator=make, dtype=torch.float64) * 1000).to(dtype)

    own, parts, biases = rows(T), rows(len(want.tokens_out)), [rows(T) for _ in range(num_biases)]
    own_weights, parts_weights = torch.randn(T, K, generator=make), torch.randn(len(parts), K, generator=make)
    sums, weights = torch.zeros(T, H, dtype=wide), torch.zeros(T, K)
    for t, slots in enumerate(want.slots):
        for bias in biases:
            sums[t] += bias[t].to(wide)
        for m, slot in enumerate(slots):
            if slot >= 0:
                sums[t] += (own if m == 2 else parts)[slot].to(wide)
                weights[t] += (own_weights if m == 2 else parts_weights)[slot]
    out, weights_out = ranks.poisoned(T, H, dtype=dtype), ranks.poisoned(T, K, dtype=torch.float32)
    row_bytes, counts = H * dtype.itemsize, {m: num for m, num in enumerate(want.counts) if m != 2}
    crossed = [parts.view(torch.uint8).view(len(parts), row_bytes)]
    if weighted:
        crossed.append(parts_weights.view(torch.uint8))
    pitch = -(-(row_bytes + 4 * K * weighted) // 16) * 16
    fields = {
        "slots": ranks.on_device(torch.tensor(want.slots, dtype=torch.int32)),
        "dst_counts": ranks.on_device(torch.tensor(want.dst_counts)),
        "own": ranks.on_device(own),
        "parts": ranks.on_device(parcels(crossed, counts, cut, pitch)),
        "went": ranks.on_device(torch.tensor(want.counts, dtype=torch.int32)),
        **cut.fields(),
        "pitch": pitch,
        **{f"bias{i}": ranks.on_device(bias) for i, bias in enumerate(biases)},
        "out": out,
        "num_tokens": T,
        "row_bytes": row_bytes,
        "top_k": K,
        "num_nodes": 4,
        "node": 2,
    }
    if weighted:
        fields |= {"own_weights": ranks.on_device(own_weights), "weights_out": weights_out}
    ranks.run(sum_spec.SPEC, [fields], (2, sum_spec.THREADS, 0), {"type": TYPES[dtype]})
    assert out.cpu().equal(sums.to(dtype))
    if weighted:
        assert weights_out.cpu().equal(weights)


HEADER = [*range(7, 7 + SIGNATURE_WORDS), 30, 40]
"""A signature, then rows to the reader and from it."""
HANDSHAKE = dict(enumerate(HEADER[:SIGNATURE_WORDS]))


def of_check(ranks: Ranks) -> dict[str, object]:
    """Return the fields of across_check on node 0 of three; nothing is read of its own header."""
    headers = torch.tensor([[-1] * RAIL_WORDS, HEADER, HEADER], dtype=torch.int32)
    return {
        "headers": ranks.on_device(headers),
        "states": ranks.on_device(torch.zeros(12, 2, dtype=torch.int32)),
        "num_states": 12,
        "chunks": 4,
        "src_counts": ranks.on_device(torch.zeros(6, dtype=torch.int64)),
        "num_nodes": 3,
        "node": 0,
        "handshake": HANDSHAKE,
    }


def of_relay(ranks: Ranks, capacity: int, apart: int = 0, dtype: torch.dtype = torch.int64) -> dict[str, object]:
    """Return the fields of dispatch_relay on node 0 of three; nothing is read of its own header."""
    others = [[*HEADER[:SIGNATURE_WORDS], num, 0] for num in (30, 130)]
    headers = torch.tensor([[-1] * RAIL_WORDS, *others], dtype=torch.int32)
    tokens = [9, *(apart or num for num in (30, 130))]
    parcels = Parcels(ranks, Nodes(6, 6, 3, 0), tokens, RELAY_TOP_K)
    for m in (1, 2):
        parcel = parcels.of(m)
        parcel.tokens[:], parcel.ids[:] = tokens_from(m, tokens[m]), ids_from(m, tokens[m])
    return {
        "parcels_in": parcels.memory,
        "ids": ranks.poisoned(3 * 256, RELAY_TOP_K, dtype=dtype),
        "tokens": ranks.poisoned(sum(tokens[1:]), dtype=torch.int32),
        "top_k": RELAY_TOP_K,
        "apart": apart,
        "headers": ranks.on_device(headers),
        "mine": ranks.on_device(torch.tensor([[-1] * RAIL_WORDS, others[1], others[0]], dtype=torch.int32)),
        "sizes": ranks.poisoned(8, dtype=torch.int32),
        "dst_counts": ranks.on_device(torch.zeros(6, dtype=torch.int64)),
        "host": ranks.pinned(torch.full((HOST_CAME_WORD + 3,), -1).int()),
        "num_tokens": 9,
        "segment": 256,
        "capacity": capacity,
        "num_nodes": 3,
        "node": 0,
        "handshake": HANDSHAKE,
    }


def tokens_from(node: int, num: int) -> torch.Tensor:
    return torch.arange(num, dtype=torch.int32) * 3 + node


def ids_from(node: int, num: int) -> torch.Tensor:
    return torch.arange(num * RELAY_TOP_K).view(num, RELAY_TOP_K) % 7 - node


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize(("capacity", "apart"), [(0, 0), (0, 140), (200, 200)])
def test_what_comes_from_other_nodes(capacity, apart, dtype):
    """How many tokens, to the plan and the host, which gets the number of the call last; of the own node, all. And
    their numbers and experts, each in its segment.
    """
    ranks = ranks_of(1)
    ranks.call += 1
    fields = of_relay(ranks, capacity, apart, dtype)
    ranks.launch(relay_spec.SPEC, [fields], (3, relay_spec.THREADS, 0), {"wide": int(dtype is torch.int64)})
    ranks.wait()
    ranks.check_quiet()
    here, there = apart or 30, apart or 130
    assert fields["tokens"].tolist() == [*tokens_from(1, here).tolist(), *tokens_from(2, there).tolist()]
    for m, num in ((0, 0), (1, here), (2, there)):
        check_start(fields["ids"][256 * m : 256 * (m + 1)], ids_from(m, num).tolist(), f"segment {m}")
    came, went = ([9, 200, 200],) * 2 if capacity else ([9, 30, 130], [9, 130, 30])
    sizes = fields["sizes"].cpu()
    assert [*sizes[:6].tolist(), sizes[7].item()] == [*came, *went, 256]
    assert bool((sizes[6:7].view(torch.uint8) == POISON).all()), "that is for dispatch_notify"
    assert fields["host"].tolist() == [ranks.call, *came]


@pytest.mark.parametrize("word", [None, 0, SIGNATURE_WORDS - 1])
def test_a_rank_across_has_not_made_this_dispatch(word):
    """It made another call, or (None) nothing has come of it: the host gets no counts."""
    ranks = ranks_of(1)
    fields = of_relay(ranks, 0)
    if word is None:
        fields["headers"][2] = 0
    else:
        fields["headers"][2, word] += 1
    ranks.launch(relay_spec.SPEC, [fields], (1, relay_spec.THREADS, 0), {"wide": 1})
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert record.code == (Fault.node_gave_up if word is None else Fault.node_mismatch)
    assert fields["host"].tolist()[0] == -1, "the host is told counts"


@pytest.mark.parametrize("has_plan", [False, True])
def test_what_a_rank_says_about_a_call(has_plan):
    ranks = ranks_of(1)
    headers, came, states = (
        ranks.poisoned(rows, width, dtype=torch.int32) for rows, width in ((3, RAIL_WORDS),) * 2 + ((10, 2),)
    )
    fields = {"headers": headers, "came": came, "states": states, "num_nodes": 3, "node": 1, "handshake": HANDSHAKE}
    fields |= Cut(2, (0, 5, 8)).fields()
    if has_plan:
        fields["goes"] = ranks.on_device(torch.tensor([3, 4, 5], dtype=torch.int32))
        fields["comes"] = ranks.on_device(torch.tensor([6, 7, 8], dtype=torch.int32))
    ranks.run(open_spec.SPEC, [fields], (1, open_spec.THREADS, 0))
    assert not came.any(), "something has come"
    come = [-1, 0, 0, 0, 0, 0, -1, -1, 0] if has_plan else [0] * 9
    check_start(states.cpu(), [[state] * 2 for state in come], "states")
    rows = ([3, 6], [4, 7], [5, 8]) if has_plan else [[0, 0]] * 3
    assert headers.cpu().tolist() == [[*HEADER[:SIGNATURE_WORDS], *each] for each in rows]


@pytest.mark.parametrize("word", [None, 0, 1, SIGNATURE_WORDS - 1, ROWS_WORD, RAIL_SPACE_WORD])
@pytest.mark.parametrize("has_plan", [False, True])
def test_other_calls_on_other_nodes(word, has_plan):
    ranks = ranks_of(2)
    fields = of_check(ranks)
    if has_plan:
        fields["comes"] = ranks.on_device(torch.tensor([-5, 30, 30], dtype=torch.int32))
        fields["goes"] = ranks.on_device(torch.tensor([-5, 40, 40], dtype=torch.int32))
    if word is not None:
        fields["headers"][1, word] += 1
    ranks.launch(check_spec.SPEC, [None, fields], (1, check_spec.THREADS, 0))
    ranks.wait()
    record = ranks.record(1)
    if word is None or (word >= SIGNATURE_WORDS and not has_plan):
        assert record is None
        return
    assert record is not None
    assert (record.code, record.peer, record.word, record.blamed) == (Fault.node_mismatch, 1, word, 3)
    assert (record.seen, record.expected) == (HEADER[word] + 1, HEADER[word])
    assert ranks.words(0, "gave_up", 2, torch.int64).tolist() == [0, Fault.node_mismatch << 32 | 1]


def test_what_an_undefined_sender_sends_is_not_passed_on():
    ranks = ranks_of(2)
    fields = of_check(ranks)
    good = ranks.on_device(torch.zeros(12, 2, dtype=torch.int32))
    ranks.run(check_spec.SPEC, [{**fields, "states": good}] * 2, (1, check_spec.THREADS, 0))
    assert ranks.failed() == [0, 0]
    for word in (0, 1):
        ranks = ranks_of(2)
        bad = good.clone()
        bad[10, word] = 5  # chunk 2 of node 2
        ranks.launch(check_spec.SPEC, [None, {**fields, "states": bad}], (1, check_spec.THREADS, 0))
        ranks.wait()
        record = ranks.record(1)
        assert record is not None
        assert (record.code, record.word) == (Fault.node_gave_up, 5), "rank 1 of node 2 is rank 5 of the group"
        assert ranks.failed() == [0, Fault.node_gave_up]
        assert ranks.words(0, "gave_up", 2, torch.int64).tolist() == [0, Fault.node_gave_up << 32 | 1]


@pytest.mark.parametrize("first", [4, 7, 8])
def test_the_state_of_a_chunk(first):
    """Number 7 is the last chunk of node 1, whose rank 0 is rank 2 of the group."""
    ranks = ranks_of(2)
    states = ranks.on_device(torch.full((1, 2), -1, dtype=torch.int32))
    fields = {**of_check(ranks), "states": states, "num_states": 1, "first_state": first}
    ranks.launch(check_spec.SPEC, [fields, None], (1, check_spec.THREADS, 0))
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.seen) == (Fault.node_gave_up, 2 * (first // 4), NOTHING_CAME)


def test_a_header_that_has_not_come():
    ranks = ranks_of(2)
    fields = of_check(ranks)
    fields["headers"][2] = 0
    ranks.launch(check_spec.SPEC, [fields, None], (1, check_spec.THREADS, 0))
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.seen) == (Fault.node_gave_up, 4, NOTHING_CAME)
