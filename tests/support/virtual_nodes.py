"""The kernels of several nodes on virtual ranks, and what they have to write, by plain loops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from support.virtual_ranks import POISON, Ranks
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
        """Launch dispatch_rails, wait, and return what it has written on each rank."""
        found, fields = [], []
        segment = segment_for(max(apart, *map(len, self.index)))
        for rank, (index, nodes) in enumerate(zip(self.index, self.nodes, strict=True)):
            T, K = index.shape
            most = (apart or self.capacity) * (nodes.num_nodes - 1) or T * min(K, nodes.num_nodes)
            self.came[rank][:, ROWS_WORD] = self.ranks.on_device(torch.tensor(self.comes(rank, segment)).int())
            poisoned = self.ranks.poisoned
            found.append(
                {
                    "slots": poisoned(T, nodes.num_nodes, dtype=torch.int32),
                    "ids": poisoned(nodes.num_nodes * segment, K, dtype=index.dtype),
                    "ids_out": poisoned(most, K, dtype=index.dtype),
                    "tokens_out": poisoned(most, dtype=torch.int32),
                    "dst_token": poisoned(T * min(K, nodes.num_ranks), dtype=torch.int64),
                }
            )
            words = {"mine": self.headers[rank], "came": self.came[rank], "apart": apart, "segment": segment}
            fields.append({**self.common(rank), **found[-1], **words})
        self.ranks.launch(rails_spec.SPEC, fields, (2, rails_spec.THREADS, self.smem()), self.config)
        self.ranks.wait()
        return [{name: tensor.cpu() for name, tensor in one.items()} for one in found]

    def comes(self, rank: int, segment: int) -> list[int]:
        """Return how many tokens the ranks across say that they send, as the words are before dispatch_rails."""
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
