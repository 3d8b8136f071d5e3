"""The kernels of decode calls across nodes alone: what crosses, on both sides, by plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from support.virtual_nodes import Nodes
from support.virtual_ranks import Ranks, ranks_of
from tokenferry.kernels.codes import RAW
from tokenferry.kernels.control_block import NOTHING_CAME, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS, Fault
from tokenferry.kernels.decode_open import spec as open_spec
from tokenferry.kernels.decode_pack import spec as pack_spec
from tokenferry.kernels.decode_unpack import spec as unpack_spec

HIDDEN = 24
"""Columns of bfloat16: 48 bytes, three packets of 16."""
SEGMENT = 8


class Packed:
    """decode_pack on one rank of three nodes: inputs, results, and what they have to be."""

    def __init__(
        self, ranks: Ranks, index: Tensor, *, node: int, node_slots: int = SEGMENT, max_nodes: int = 0
    ) -> None:
        T, K = index.shape
        self.ranks, self.nodes, self.index = ranks, Nodes(12, 6, 3, node), index
        self.x = torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(T)).bfloat16()
        self.weights = torch.arange(T * K, dtype=torch.float32).view(T, K) / 8
        self.units = pack_spec.record_units(HIDDEN, 2, K, cast=False, weighted=True)
        self.routing_at = pack_spec.routing_at(HIDDEN, 2, cast=False)
        made = ranks.poisoned
        self.records = made(2 * SEGMENT, 16 * self.units, dtype=torch.uint8)
        self.slots, self.ids, self.kept = (
            made(T, n, dtype=d) for n, d in ((3, torch.int32), (K, torch.int32), (K, torch.float32))
        )
        self.headers, self.came = (made(3, RAIL_WORDS, dtype=torch.int32) for _ in range(2))
        self.states, self.overflows = made(3, 2, dtype=torch.int32), made(3, dtype=torch.int32)
        self.number = made(1, dtype=torch.int32)
        self.fields = {
            "x": ranks.on_device(self.x),
            "topk_idx": ranks.on_device(index),
            "weights": ranks.on_device(self.weights),
            "records": self.records,
            "slots": self.slots,
            "number": self.number,
            "ids_here": self.ids,
            "weights_here": self.kept,
            "headers": self.headers,
            "came": self.came,
            "states": self.states,
            "overflows": self.overflows,
            "num_tokens": T,
            "top_k": K,
            "num_experts": 12,
            "num_nodes": 3,
            "node": node,
            "segment": SEGMENT,
            "node_slots": node_slots,
            "max_nodes": max_nodes,
            "columns": HIDDEN,
            "row_units": HIDDEN * 2 // 16,
            "record_units": self.units,
            "routing_at": self.routing_at,
            "wide": int(index.dtype == torch.int64),
            "weighted": 1,
            "handshake": dict.fromkeys(range(SIGNATURE_WORDS), 9),
        }

    def launch(self) -> None:
        smem_bytes = pack_spec.smem_bytes(max(1, len(self.index)), 3)
        self.ranks.call += 1
        self.ranks.launch(pack_spec.SPEC, [self.fields], (2, pack_spec.THREADS, smem_bytes), {"type": RAW})
        self.ranks.wait()

    def routing(self, record: int) -> tuple[int, list[float], list[int]]:
        """Return token, weights and experts of a record."""
        K, found = self.index.shape[1], self.records[record, self.routing_at :].cpu()
        experts = found[4 + 4 * K : 4 + 6 * K].view(torch.int16).tolist()
        return int(found[:4].view(torch.int32)), found[4 : 4 + 4 * K].view(torch.float32).tolist(), experts

    def check(self, overflow: int = 0) -> None:
        """Compare everything that was written."""
        choices = [[e if 0 <= e < 12 else -1 for e in line] for line in self.index.tolist()]
        others, node = [m for m in range(3) if m != self.nodes.node], self.nodes.node
        free = {m: itertools.count(i * SEGMENT) for i, m in enumerate(others)}
        for t, experts in enumerate([] if overflow else choices):
            goes = self.nodes.nodes_of(experts)
            slots = [-1 if m not in goes else t if m == node else next(free[m]) for m in range(3)]
            assert self.slots[t].tolist() == slots
            assert self.ids[t].tolist() == self.nodes.ids_on(node, experts)
            for m in goes - {node}:
                record = slots[m]
                assert self.records[record, : 2 * HIDDEN].cpu().equal(self.x[t].view(torch.uint8))
                assert self.routing(record) == (t, self.weights[t].tolist(), self.nodes.ids_on(m, experts))
        for i, m in enumerate(others):
            for record in range(next(free[m]), (i + 1) * SEGMENT):
                assert set(self.routing(record)[2]) == {-1}, "not used"
        assert self.kept.cpu().equal(self.weights)
        assert self.headers.tolist() == [[9] * SIGNATURE_WORDS + [overflow, 0]] * 3
        assert not self.came.any()
        assert self.states.tolist() == [[0 if m == node else -1] * 2 for m in range(3)]
        assert int(self.overflows[node]) == overflow


def some_routing(tokens: int, top_k: int, dtype: torch.dtype) -> Tensor:
    index = torch.randint(-1, 12, (tokens, top_k), generator=torch.Generator().manual_seed(tokens + top_k))
    return index.to(dtype)


@pytest.mark.parametrize("node", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "top_k"), [(8, 3), (5, 1), (7, 33), (0, 2)])
def test_records(node, tokens, top_k):
    packed = Packed(ranks_of(1), some_routing(tokens, top_k, (torch.int64, torch.int32)[node % 2]), node=node)
    packed.launch()
    packed.ranks.check_quiet()
    packed.check()


def test_dispatches_are_numbered():
    packed, numbers = Packed(ranks_of(1), some_routing(4, 3, torch.int64), node=0), []
    for _ in range(3):
        packed.launch()
        numbers.append(packed.number.item() - packed.ranks.words(0, "packed").item())
        packed.ranks.words(0, "packed").add_(5)
    assert numbers == [0, 0, 0]
    assert packed.number.item() > 12


def test_nothing_goes_to_masked_nodes():
    """Their records are empty, no token has a slot there, and their tokens do not count as too many."""
    index = torch.tensor([[4, 8], [5, 0], [6, 9], [-1, 5]])
    packed = Packed(ranks_of(1), index, node=0, node_slots=3)
    packed.ranks.words(0, "masked_nodes").fill_(0b010)
    packed.launch()
    assert packed.slots.tolist() == [[-1, -1, SEGMENT], [1, -1, -1], [-1, -1, SEGMENT + 1], [-1, -1, -1]]
    assert packed.overflows[0].item() == 0
    packed.ranks.words(0, "masked_nodes").fill_(0)
    packed.launch()
    assert bool(packed.slots.eq(-1).all()), "four tokens for node 1"
    assert packed.overflows[0].item() == 4


def test_more_tokens_than_slots():
    """Nothing is sent but how many they were; as many as there are slots are none too many."""
    packed = Packed(ranks_of(1), torch.tensor([[4, 8], [5, 0], [6, 1], [-1, 2]]), node=0, node_slots=2)
    packed.launch()
    packed.check(overflow=3)
    assert bool(packed.ids.eq(-1).all())
    assert bool(packed.slots.eq(-1).all())
    packed = Packed(ranks_of(1), packed.index, node=0, node_slots=3)
    packed.launch()
    packed.check()


@pytest.mark.parametrize("bad", [12, -2, 1 << 40])
def test_a_bad_index_counts_as_unused(bad):
    packed = Packed(ranks_of(1), torch.tensor([[4, 8], [5, bad], [bad, 1]]), node=1)
    packed.launch()
    record = packed.ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.peer, record.expected) == (Fault.bad_routing, 1, 1, 12)
    packed.check()
    assert not packed.ranks.words(0, "stopped").any()


def test_a_token_for_too_many_nodes_goes_to_all_of_them():
    packed = Packed(ranks_of(1), torch.tensor([[4, 4, 4], [5, 0, -1], [8, 1, 5]]), node=1, max_nodes=2)
    packed.launch()
    record = packed.ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.seen, record.expected) == (Fault.too_many_nodes, 2, 3, 2)
    packed.check()


def came_from(packed: Packed) -> dict[str, object]:
    """Return the fields of decode_unpack on a rank of node 2, to which ranks of both other nodes send the same."""
    ranks, K = packed.ranks, packed.index.shape[1]
    return {
        "headers": packed.headers,
        "states": ranks.on_device(torch.zeros(3, 2, dtype=torch.int32)),
        "records": packed.records,
        "ids": ranks.poisoned(2 * SEGMENT, K, dtype=torch.int32),
        "weights": ranks.poisoned(2 * SEGMENT, K, dtype=torch.float32),
        "overflows": ranks.on_device(torch.full((3,), 7, dtype=torch.int32)),
        "num_states": 3,
        "chunks": 1,
        "top_k": K,
        "num_nodes": 3,
        "node": 2,
        "segment": SEGMENT,
        "record_units": packed.units,
        "routing_at": packed.routing_at,
        "handshake": dict.fromkeys(range(SIGNATURE_WORDS), 9),
    }


def test_what_came_is_taken_apart():
    packed = Packed(ranks_of(1), some_routing(8, 5, torch.int64), node=0)
    packed.launch()
    packed.headers[1, ROWS_WORD] = 99
    fields = came_from(packed)
    packed.ranks.run(unpack_spec.SPEC, [fields], (2, unpack_spec.THREADS, 0))
    for record in range(2 * SEGMENT):
        _, weights, experts = packed.routing(record)
        assert fields["ids"][record].tolist() == experts
        if set(experts) != {-1}:
            assert fields["weights"][record].tolist() == weights
    assert fields["overflows"].tolist() == [0, 99, 7], "nothing comes from the own node"


@pytest.mark.parametrize(("what", "code", "word"), [("headers", 9, 3), ("header", 11, 1), ("states", 9, 3)])
def test_what_did_not_come_ends_the_call(what, code, word):
    """Rank 0 of node 2: rank 1 of the group is on node 1."""
    packed = Packed(ranks_of(1), some_routing(8, 5, torch.int64), node=0)
    packed.launch()
    fields = came_from(packed)
    if what == "headers":
        packed.headers[1] = 0
    elif what == "header":
        packed.headers[1, 1] += 1
    else:
        fields["states"][1] = -1
    packed.ranks.launch(unpack_spec.SPEC, [fields], (2, unpack_spec.THREADS, 0))
    packed.ranks.wait()
    record = packed.ranks.record(0)
    assert record is not None
    assert record.code == code
    if code == Fault.node_gave_up:
        assert (record.word, record.seen) == (1, NOTHING_CAME)
    else:
        assert (record.word, record.blamed) == (word, 1)


@pytest.mark.parametrize("weighted", [True, False])
def test_weights_for_other_nodes(weighted):
    """The epoch of the dispatch stands in its word of the signature."""
    packed = Packed(ranks_of(1), some_routing(8, 5, torch.int64), node=1)
    packed.launch()
    ranks, K = packed.ranks, 5
    later = ranks.on_device(torch.randn(8, K, generator=torch.Generator().manual_seed(1)))
    here, out = ranks.poisoned(8, K, dtype=torch.float32), ranks.on_device(torch.full((2 * SEGMENT, K), -9.0))
    fields = {name: packed.fields[name] for name in ("headers", "came", "states", "slots", "num_tokens", "top_k")}
    fields |= {
        "num_nodes": 3,
        "node": 1,
        "weights_here": here,
        "weights_out": out,
        "handshake": packed.fields["handshake"],
    }
    fields |= {"epoch": ranks.on_device(torch.tensor([77, 1], dtype=torch.int32))}
    fields |= {"weights": later} if weighted else {}
    ranks.run(open_spec.SPEC, [fields], (2, open_spec.THREADS, 0))
    assert packed.headers.tolist() == [[*[9] * (SIGNATURE_WORDS - 1), 77, 0, 0]] * 3
    want = torch.full((2 * SEGMENT, K), -9.0)
    for t, slots in enumerate(packed.slots.tolist() if weighted else []):
        for m in (0, 2):
            if slots[m] >= 0:
                want[slots[m]] = later[t].cpu()
    assert out.cpu().equal(want)
    if weighted:
        assert here.cpu().equal(later.cpu())
