"""A soak of CUDA graphs: decode_dispatch, experts, decode_combine in a graph a rank, replayed with ever new inputs.

    python -m tokenferry.testing.soak_graphs --replays 10000 --ranks 4 --seed 7 --device cuda

There are several graphs, each of another kind of call, and they take turns; now and then their calls are made without
the graph. Before each replay new rows, weights and choices are written into the inputs of the graph, rows of -1 where a
rank has fewer tokens; sometimes a rank comes late. After each replay all of its results are compared on the device, bit
for bit (but a number half-way between two codes of logfmt10 may take either). All that belongs to a replay is drawn
from the seed and the replay's number, on every rank for all ranks, so that ranks need not exchange their inputs, and
``--first N --replays 1`` makes the N-th again.

With ``--device cpu`` the same calls are made without graphs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.testing.reference import fp8_values, unpacked
from tokenferry.testing.soak_graphs_reference import AllInputs, Reference, factors
from tokenferry.testing.world import World, WorldError, check_gpus, check_nodes
from tokenferry.types import BackendName, DecodeDispatched, EncodingName, MoeShape, Numerics, Quantized, Routing, Scale

CHUNK = 2500
"""Replays of one group of the command; then it says how far it is, and makes another."""
LOOK_EVERY = 50
"""Replays between two looks at what the device has found."""
WIDE_EVERY = 100
CHUNK_TIMEOUT_S = 600.0
_WEIGHT_BITS = 18
"""Bits of weights: sums of a token's weights are exact in float32, products with rows are not."""


@dataclass(frozen=True, slots=True)
class GraphKind:
    """One graph: sizes and options of its calls.

    Attributes:
        fp8: FP8 cast of the dispatch.
        fast: Whether the numerics of the combine are "fast".
        encoding: Encoding of the combine.
        hooks: Whether each call sends first, and receives by its hook.
        hidden: H.
        tokens: M.
        local: L.
        top_k: K.
        idx_dtype: Dtype of ``topk_idx``.
    """

    fp8: Scale | None = None
    fast: bool = False
    encoding: EncodingName = "same"
    hooks: bool = False
    hidden: int = 1024
    tokens: int = 32
    local: int = 8
    top_k: int = 8
    idx_dtype: torch.dtype = torch.int64

    def shape(self, num_ranks: int) -> MoeShape:
        """Return the sizes."""
        return MoeShape(self.local * num_ranks, self.top_k, self.hidden, self.tokens)


KINDS = (
    GraphKind(),
    GraphKind(fp8=Scale.FLOAT32),
    GraphKind(fp8=Scale.FLOAT32, fast=True),
    GraphKind(fast=True, hooks=True, tokens=17),
    GraphKind(fp8=Scale.UE8M0, hooks=True, hidden=640),
    GraphKind(fp8=Scale.POWER_OF_TWO, fast=True, encoding="fp8", idx_dtype=torch.int32),
    GraphKind(encoding="fp8", hooks=True, tokens=9, local=3, top_k=5),
    GraphKind(encoding="logfmt10", hooks=True, hidden=640),
    GraphKind(fp8=Scale.FLOAT32, fast=True, encoding="logfmt10", tokens=17),
    GraphKind(tokens=1, local=2, top_k=2, hidden=128),
)
WIDE = GraphKind(fp8=Scale.FLOAT32, hidden=7168)


@dataclass(frozen=True, slots=True)
class Soak:
    """Length and place of a soak.

    Args:
        replays: Number of replays.
        seed: Seed of everything that is drawn.
        device: ``"cpu"`` or ``"cuda"``.
        first: Number of the first replay.
        timeout_s: Timeout of the group.
    """

    replays: int
    seed: int = 0
    device: BackendName = "cpu"
    first: int = 0
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of replays made and results compared; all were right."""

    replays: int
    checks: int


class Graph:
    """The calls of one kind on one rank, and where their inputs lie.

    Attributes:
        x: ``[M, H]``, as `topk_idx` and `topk_weights` written before each replay.
    """

    def __init__(self, group: ExpertGroup, kind: GraphKind) -> None:
        device, R = group.device, group.num_ranks
        self.kind = kind
        self.x = torch.zeros(kind.tokens, kind.hidden, dtype=torch.bfloat16, device=device)
        self.topk_idx = torch.full((kind.tokens, kind.top_k), -1, dtype=kind.idx_dtype, device=device)
        self.topk_weights = torch.zeros(kind.tokens, kind.top_k, device=device, dtype=torch.float32)
        first = group.rank * kind.local
        self._factors = factors(kind.local * R, device)[first : first + kind.local, None, None]
        self._group = group.for_shape(kind.shape(R))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[DecodeDispatched[Tensor | Quantized], Tensor] | None = None

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Make the graph; the calls have been made once without it."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._results = self.call()

    def replay(self, inputs: AllInputs, *, eager: bool) -> tuple[DecodeDispatched[Tensor | Quantized], Tensor]:
        """Write the inputs and make the calls: with the graph, if there is one and not ``eager``; collective."""
        rank = self._group.rank
        self.x.copy_(inputs.x[rank])
        self.topk_idx.copy_(inputs.topk_idx[rank])
        self.topk_weights.copy_(inputs.topk_weights[rank])
        if self._graph is None or self._results is None or eager:
            return self.call()
        self._graph.replay()
        return self._results

    def call(self) -> tuple[DecodeDispatched[Tensor | Quantized], Tensor]:
        """Dispatch, experts, combine. The input of a call may be overwritten before its hook is called: it is."""
        kind, group = self.kind, self._group
        routing = Routing(self.topk_idx, self.topk_weights)
        sent = group.decode_dispatch(self.x, routing, quantize=kind.fp8, return_hook=kind.hooks)
        if kind.hooks:
            self.x.fill_(torch.nan)
            sent.hook()
        if isinstance(sent.x, Quantized):
            rows = fp8_values(sent.x.data, unpacked(sent.x.scale, kind.hidden // 128))
        else:
            rows = sent.x.float()
        y = (rows * self._factors).to(torch.bfloat16)
        numerics: Numerics = "fast" if kind.fast else "exact"
        home = group.decode_combine(y, sent.plan, numerics=numerics, encoding=kind.encoding, return_hook=kind.hooks)
        if kind.hooks:
            y.fill_(torch.nan)
            home.hook()
        return sent, home.x


class Findings:
    """The results that were wrong, kept on the device until `look` reads them.

    Args:
        device: Device of the results.

    Attributes:
        checks: Results compared.
    """

    NAMES = ("expert_counts", "src_range", "src_token", "row_weights", "rows", "scales", "sum")

    def __init__(self, device: torch.device) -> None:
        # For each name: the first replay that was wrong, how many values, and the first of them.
        self._table = torch.full((len(self.NAMES), 3), -1, dtype=torch.int64, device=device)
        self._now = torch.zeros(len(self.NAMES), dtype=torch.int64, device=device)
        self._right = torch.zeros(2, dtype=torch.int64, device=device)
        self._shapes: dict[tuple[int, str], tuple[int, ...]] = {}
        self.checks = 0

    def note(self, number: int, wrong: dict[str, Tensor]) -> None:
        """Record the wrong results of a replay; does not wait for the device."""
        lines = []
        for name in self.NAMES:
            if name not in wrong:
                lines.append(self._right)
                continue
            self._shapes[number, name] = tuple(wrong[name].shape)
            flat = wrong[name].reshape(-1)
            lines.append(torch.stack((flat.sum(), flat.byte().argmax())))
            self.checks += 1
        self._now.fill_(number)
        update = torch.cat((self._now[:, None], torch.stack(lines)), dim=1)
        self._table = torch.where(((self._table[:, 0] < 0) & (update[:, 1] > 0))[:, None], update, self._table)

    def look(self, rank: int, soak: Soak, kinds: dict[int, GraphKind]) -> None:
        """Wait for the device and raise what was found; ``kinds``: of each replay since the last look.

        Raises:
            AssertionError: something was wrong; names the seed, the replay, its kind, and what.
        """
        found = [(*line, name) for line, name in zip(self._table.tolist(), self.NAMES, strict=True) if line[0] >= 0]
        if found:
            number = min(line[0] for line in found)
            texts = []
            for when, count, at, name in found:
                if when == number:
                    shape = self._shapes[number, name]
                    flat = torch.tensor(at, dtype=torch.int64, device="cpu")
                    place = [int(one) for one in torch.unravel_index(flat, shape)]
                    texts.append(f"{name}: {count} of {list(shape)} values, the first at {place}")
            raise AssertionError(
                f"rank {rank}: seed {soak.seed}, replay {number} has wrong results: {'; '.join(texts)}; "
                f"{kinds[number]}. Places are [source rank * M + token, local expert, column] for rows. "
                f"The same inputs again: --seed {soak.seed} --first {number} --replays 1"
            )
        self._shapes.clear()


# ---------------------------------------------------------------------- inputs


def kind_of(seed: int, number: int) -> GraphKind:
    """Return the kind of a replay."""
    if number % WIDE_EVERY == WIDE_EVERY - 1:
        return WIDE
    return random.Random(f"{seed} {number} kind").choice(KINDS)


def draw(kind: GraphKind, num_ranks: int, device: torch.device, seed: int, number: int) -> AllInputs:
    """Draw the inputs of all ranks for a replay; the same on every rank."""
    pick = random.Random(f"{seed} {number}")
    make = torch.Generator(device).manual_seed(pick.randrange(1 << 62))
    R, M, K, E = num_ranks, kind.tokens, kind.top_k, kind.local * num_ranks

    def integers(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high, sizes, generator=make, device=device, dtype=torch.int64)

    sizes = torch.exp2(integers(-8, 8, R, M, kind.hidden // 128).float()).repeat_interleave(128, dim=2)
    x = (torch.randn(R, M, kind.hidden, generator=make, device=device, dtype=torch.float32) * sizes).to(torch.bfloat16)
    weights = integers(1 - (1 << _WEIGHT_BITS), 1 << _WEIGHT_BITS, R, M, K).float() / (1 << _WEIGHT_BITS)
    way = pick.choice(("distinct", "distinct", "distinct", "repeated", "few"))
    if way == "distinct":
        chosen = torch.rand(R, M, E, generator=make, device=device, dtype=torch.float32).topk(min(K, E), dim=2).indices
        chosen = torch.nn.functional.pad(chosen, (0, K - chosen.shape[2]), value=-1)
    else:
        first = pick.randrange(E)
        chosen = integers(0, E, R, M, K) if way == "repeated" else integers(first, min(first + 2, E), R, M, K)
    share = pick.choice((0.0, 0.0, 0.1, 0.5, 1.0))
    dropped = torch.rand(R, M, K, generator=make, device=device, dtype=torch.float32) < share
    tokens = integers(0, M + 1, R, 1, 1)
    if pick.random() < 0.3:
        tokens = torch.full_like(tokens, M)
    absent = torch.arange(M, device=device, dtype=torch.int64)[:, None] >= tokens
    return AllInputs(x, torch.where(dropped | absent, -1, chosen).to(kind.idx_dtype), weights)


# ---------------------------------------------------------------------- the soak


def run(rank: int, pg: dist.ProcessGroup, soak: Soak) -> Tally:
    """Replay; a job of `World`. Collective.

    Raises:
        AssertionError: a result is wrong; names the seed and the replay.
    """
    shapes = [kind.shape(pg.size()) for kind in (*KINDS, WIDE)]
    largest = MoeShape(*(max(sizes) for sizes in zip(*map(_sizes, shapes), strict=True)))
    with ExpertGroup(pg, largest, backend=soak.device, timeout_s=soak.timeout_s) as group:
        group.warmup()
        if soak.device != "cuda":
            return _replay(group, soak, {})
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            graphs = {kind: Graph(group, kind) for kind in (*KINDS, WIDE)}
            for graph in graphs.values():
                graph.call()
            torch.cuda.synchronize()
            group.synchronize()
            for graph in graphs.values():
                graph.capture(stream)
            return _replay(group, soak, graphs)


def _sizes(shape: MoeShape) -> tuple[int, int, int, int]:
    return shape.num_experts, shape.top_k, shape.hidden, shape.max_tokens


def _replay(group: ExpertGroup, soak: Soak, graphs: dict[GraphKind, Graph]) -> Tally:
    """Make all replays; kinds without a graph are called."""
    device, R, rank = group.device, group.num_ranks, group.rank
    findings, since = Findings(device), dict[int, GraphKind]()
    for number in range(soak.first, soak.first + soak.replays):
        kind = since[number] = kind_of(soak.seed, number)
        graph = graphs[kind] = graphs.get(kind) or Graph(group, kind)
        inputs = draw(kind, R, device, soak.seed, number)
        _be_late(soak, rank, number)
        sent, total = graph.replay(inputs, eager=random.Random(f"{soak.seed} {number} eager").random() < 0.05)
        reference = Reference(inputs, kind.local * R, rank, kind.fp8, fast=kind.fast, encoding=kind.encoding)
        findings.note(number, reference.wrong(sent, total, group.topology.nodes))
        if len(since) == LOOK_EVERY or number == soak.first + soak.replays - 1:
            group.synchronize()  # what the kernels found comes first
            findings.look(rank, soak, since)
            since.clear()
    return Tally(soak.replays, findings.checks)


def _be_late(soak: Soak, rank: int, number: int) -> None:
    """Make the other ranks wait now and then, for up to a millisecond."""
    own = random.Random(f"{soak.seed} {number} {rank} late")
    if own.random() > 0.03:
        return
    if soak.device == "cuda":
        torch.cuda._sleep(own.randrange(1_500_000))  # type: ignore[no-untyped-call]
    else:
        time.sleep(own.random() / 1000)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every result was right."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tokenferry.testing.soak_graphs", description=about)
    parser.add_argument("--replays", type=int, default=10000, help="how many (default: 10000)")
    parser.add_argument("--ranks", type=int, default=2, help="R (default: 2)")
    parser.add_argument("--ranks-per-node", type=int, help="consecutive ranks that form a node (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the backend (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first replay (default: 0)")
    args = parser.parse_args(argv)
    check_nodes(parser, args.ranks, args.ranks_per_node)
    check_gpus(parser, args.device)
    start, end, checks = time.monotonic(), args.first + args.replays, 0
    per_node: int | None = args.ranks_per_node
    with World(args.ranks, devices=args.device, timeout_s=CHUNK_TIMEOUT_S, ranks_per_node=per_node) as world:
        for first in range(args.first, end, CHUNK):
            soak = Soak(min(CHUNK, end - first), args.seed, args.device, first)
            try:
                checks += world.run(run, soak)[0].checks
            except WorldError as error:
                sys.stdout.write(f"FAILED: seed {args.seed}, after replay {first}:\n{error}\n")
                return 1
            sys.stdout.write(
                f"{time.monotonic() - start:6.0f} s: {first + soak.replays - args.first} replays over {args.ranks} "
                f"ranks ({args.device}), {checks} results of rank 0 checked, all right\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
