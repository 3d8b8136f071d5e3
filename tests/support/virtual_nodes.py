"""The kernels of several nodes on virtual ranks, and what they have to write, by plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from support.virtual_ranks import POISON, Ranks
from tokenferry.backends.cuda.across.parcels import RoutingParcels
from tokenferry.backends.cuda.across.relay import segment_for
from tokenferry.kernels.control_block import HOST_NODES_WORD, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.kernels.dispatch_rails import spec as rails_spec
from tokenferry.kernels.dispatch_split import spec as split_spec

CHUNKS = 3


@dataclass(frozen=True)
class Nodes:
    """E experts of R ranks on N nodes, seen from one of the nodes."""

    num_experts: int
    num_ranks: int
    num_nodes: int
    node: int

    @property
    def fields(self) -> dict[str, int]:
        """Return the params that say so."""
        return {
            "num_experts": self.num_experts,
            "all_ranks": self.num_ranks,
            "num_nodes": self.num_nodes,
            "node": self.node,
        }

    def nodes_of(self, experts: list[int]) -> set[int]:
        """Return the nodes that a token goes to."""
        return {e // (self.num_experts // self.num_nodes) for e in experts if e >= 0}

    def ids_on(self, node: int, experts: list[int]) -> list[int]:
        """Return the experts of a token on a node, counted from the first one there."""
        num = self.num_experts // self.num_nodes
        return [e - node * num if e >= 0 and e // num == node else -1 for e in experts]


class Split:
    """What dispatch_split and dispatch_rails have to write for one rank."""

    def __init__(self, nodes: Nodes, choices: list[list[int]], capacity: int = 0) -> None:
        R, N, local = nodes.num_ranks, nodes.num_nodes, nodes.num_experts // nodes.num_ranks
        ranks = [{e // local for e in experts if e >= 0} for experts in choices]
        goes = [nodes.nodes_of(experts) for experts in choices]
        self.dst_token = [t for r in range(R) for t, there in enumerate(ranks) if r in there]
        self.dst_counts = [sum(r in there for there in ranks) for r in range(R)]
        self.counts = [sum(m in there for there in goes) for m in range(N)]
        out = [(m, t) for m in range(N) for t, there in enumerate(goes) if m in there and m != nodes.node]
        self.tokens_out = [t for _, t in out]
        self.ids_out = [nodes.ids_on(m, choices[t]) for m, t in out]
        others = [m for m in range(N) if m != nodes.node]
        first = dict(zip(others, itertools.accumulate((self.counts[m] for m in others), initial=0), strict=False))
        rows = {
            (m, t): row if not capacity else others.index(m) * capacity + row - first[m]
            for row, (m, t) in enumerate(out)
        }
        self.slots = [
            [(t if m == nodes.node else rows[m, t]) if m in there else -1 for m in range(N)]
            for t, there in enumerate(goes)
        ]


class Parcel(NamedTuple):
    """A parcel of the routing."""

    tokens: Tensor
    ids: Tensor


class Parcels:
    """Where the host says that the parcels of a rank lie, by node, in memory that is poisoned.

    Args:
        ranks: The ranks.
        nodes: The nodes.
        tokens: Tokens of each parcel.
        top_k: K.
    """

    def __init__(self, ranks: Ranks, nodes: Nodes, tokens: Sequence[int], top_k: int) -> None:
        found, self._top_k = RoutingParcels(tokens, nodes.node, top_k), top_k
        self._places = dict.fromkeys(range(nodes.num_nodes), (0, 0, 0))
        """Where the tokens of each node begin, their ids, and what is behind them."""
        for at, num_bytes, node, _ in found.parts(0, is_sent=True):
            self._places[node] = at, at + 4 * tokens[node], at + num_bytes
        self.memory = ranks.poisoned(found.num_bytes, dtype=torch.uint8)

    def of(self, node: int) -> Parcel:
        """Return the parcel for a node, or from there: views of the memory."""
        start, ids_at, end = self._places[node]
        ids = self.memory[ids_at:end].view(torch.int16)
        return Parcel(self.memory[start:ids_at].view(torch.int32), ids.view(-1, self._top_k))

    def check_gaps(self) -> None:
        """Check that nothing lies between the parcels."""
        unused = torch.ones(len(self.memory), dtype=torch.bool)
        for start, _, end in self._places.values():
            unused[start:end] = False
        assert bool((self.memory.cpu()[unused] == POISON).all()), "something lies between parcels"


class Splitter:
    """Runs dispatch_split and dispatch_rails on all ranks, each with its own routing and nodes."""

    def __init__(
        self, ranks: Ranks, nodes: list[Nodes], topk_idx: list[Tensor], capacity: int = 0, max_nodes: int = 0
    ) -> None:
        self.capacity, self.max_nodes = capacity, max_nodes
        self.ranks, self.nodes, self.index = ranks, nodes, [ranks.on_device(one) for one in topk_idx]
        self.config = {"wide": int(topk_idx[0].dtype is torch.int64)}
        make = ranks.poisoned
        self.dst_counts = [make(one.num_ranks, dtype=torch.int64) for one in nodes]
        self.headers = [make(one.num_nodes, RAIL_WORDS, dtype=torch.int32) for one in nodes]
        self.came = [make(one.num_nodes, RAIL_WORDS, dtype=torch.int32) for one in nodes]
        self.states = [make(one.num_nodes * CHUNKS + 1, 2, dtype=torch.int32) for one in nodes]
        self.host = [ranks.pinned(torch.full((HOST_NODES_WORD + one.num_nodes,), -1).int()) for one in nodes]
        self.bases = [make(one.num_ranks + one.num_nodes, dtype=torch.int32) for one in nodes]
        self.table = [
            make(max(1, num_units(len(index))) * (one.num_ranks + one.num_nodes), dtype=torch.int32)
            for index, one in zip(topk_idx, nodes, strict=True)
        ]

    def smem(self) -> int:
        return max(split_spec.smem_bytes(one.num_ranks, one.num_nodes) for one in self.nodes)

    def split(self) -> None:
        """Launch dispatch_split; does not wait."""
        self.ranks.call += 1
        fields = [
            {
                **self.common(rank),
                "headers": self.headers[rank],
                "came": self.came[rank],
                "states": self.states[rank],
                "num_states": CHUNKS * self.nodes[rank].num_nodes,
                "host": self.host[rank],
                "capacity": self.capacity,
                "max_nodes": self.max_nodes,
                "handshake": dict.fromkeys(range(SIGNATURE_WORDS), 7 + rank),
            }
            for rank in range(self.ranks.num_ranks)
        ]
        self.ranks.launch(split_spec.SPEC, fields, (2, split_spec.THREADS, self.smem()), self.config)

    def rails(self, apart: int = 0) -> list[dict[str, Tensor]]:
        """Launch dispatch_rails, wait, and return what it has written on each rank; `parcels` has the rest."""
        found, fields = [], []
        self.parcels: list[Parcels] = []
        """Those for other nodes, of each rank."""
        segment = segment_for(max(apart, *map(len, self.index)))
        for rank, (index, nodes) in enumerate(zip(self.index, self.nodes, strict=True)):
            T, K = index.shape
            self.came[rank][:, ROWS_WORD] = self.ranks.on_device(torch.tensor(self.comes(rank, segment)).int())
            poisoned = self.ranks.poisoned
            found.append(
                {
                    "slots": poisoned(T, nodes.num_nodes, dtype=torch.int32),
                    "ids": poisoned(nodes.num_nodes * segment, K, dtype=index.dtype),
                    "dst_token": poisoned(T * min(K, nodes.num_ranks), dtype=torch.int64),
                }
            )
            went = [apart] * nodes.num_nodes if apart else self.headers[rank][:, ROWS_WORD].tolist()
            self.parcels.append(Parcels(self.ranks, nodes, went, K))
            words = {"mine": self.headers[rank], "came": self.came[rank], "apart": apart, "segment": segment}
            fields.append({**self.common(rank), **found[-1], **words, "parcels_out": self.parcels[-1].memory})
        self.ranks.launch(rails_spec.SPEC, fields, (2, rails_spec.THREADS, self.smem()), self.config)
        self.ranks.wait()
        return [{name: tensor.cpu() for name, tensor in one.items()} for one in found]

    def comes(self, rank: int, segment: int) -> list[int]:
        """Return how many tokens the rail peers say that they send, as the words are before dispatch_rails."""
        return [(37 * m + rank) % (segment + 1) for m in range(self.nodes[rank].num_nodes)]

    def check_ids(self, rank: int, found: Tensor, apart: int = 0) -> None:
        """Check ids: those of this rank's tokens, -1 where no token comes, and where some do nothing yet."""
        nodes, experts = self.nodes[rank], self.index[rank].cpu().tolist()
        for m, segment in enumerate(found.view(nodes.num_nodes, -1, found.shape[1])):
            if m == nodes.node:
                here = [nodes.ids_on(m, one) for one in experts]
                assert segment[: len(here)].tolist() == here
                num = len(here)
            else:
                num = apart or self.comes(rank, len(segment))[m]
                assert bool((segment[:num].contiguous().view(torch.uint8) == POISON).all()), "what comes is overwritten"
            assert bool((segment[num:] == -1).all())

    def common(self, rank: int) -> dict[str, object]:
        return {
            "topk_idx": self.index[rank],
            "table": self.table[rank],
            "bases": self.bases[rank],
            "dst_counts": self.dst_counts[rank],
            "num_tokens": len(self.index[rank]),
            "top_k": self.index[rank].shape[1],
            **self.nodes[rank].fields,
        }
