"""A soak: random shapes, routings, layouts, lifetimes, streams and delays for a given time; all results checked.

    python -m tokenferry.testing.soak --seconds 600 --device cuda --ranks 2

Everything that ranks have to agree on is drawn from one seed, so that each of them knows the inputs of all; what each
does for itself (how late it is, on which stream) is drawn separately. Small calls are compared with the oracle, bit for
bit, large ones with values made from their token numbers. Results are kept for a while, also longer than their group,
and compared again before they are dropped, to find memory that was reused too early.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.testing import soak_large
from tokenferry.testing.cases import answers
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle
from tokenferry.testing.soak_cases import Combining, Comparison, Live, draw_case, draw_options, oracle_of, shape_of
from tokenferry.testing.world import World, WorldError, check_gpus, check_nodes
from tokenferry.types import BackendName, Routing

CHUNK_S = 20.0
"""Seconds of one job of the command, after which it prints its progress."""
STEPS_BETWEEN_AGREEMENTS = 16
STEPS_OF_A_GROUP = 200
MOST_ALIVE = 6
SLACK_S = 120.0


@dataclass(frozen=True, slots=True)
class Soak:
    """Length and place of a soak.

    Args:
        seconds: Length of the soak.
        seed: Seed of everything that is drawn.
        device: ``"cpu"`` or ``"cuda"``: the backend, and where tensors are.
        timeout_s: Timeout of the groups.
    """

    seconds: float
    seed: int = 0
    device: BackendName = "cpu"
    timeout_s: float = 30.0


@dataclass(slots=True)
class Tally:
    """Counts of what was done, the same on all ranks."""

    groups: int = 1
    calls: int = 0
    checks: int = 0


class Soaker:
    """The soak of one rank.

    Attributes:
        group: The open group; closed by the caller.
        tally: Counts so far.
    """

    def __init__(self, rank: int, pg: dist.ProcessGroup, soak: Soak) -> None:
        self.rank, self.ranks = rank, pg.size()
        self.tally = Tally()
        self._pg, self._soak = pg, soak
        self._shared, self._own = random.Random(soak.seed), random.Random(f"{soak.seed} {rank}")
        self._alive: list[Live] = []
        self._pending: list[Comparison] = []
        cuda = soak.device == "cuda"
        self._streams = [torch.cuda.Stream() for _ in range(3)] if cuda else []  # type: ignore[no-untyped-call]
        self._stream = self._streams[0] if cuda else None
        self.group = open_group(pg, soak)

    def step(self) -> None:
        """Take one action, drawn for all ranks."""
        if self._shared.random() < 0.1 and self._shared.randrange(self.ranks) == self.rank:
            time.sleep(self._own.random() * 0.02)
        actions = (self._dispatch, self._combine, self._redispatch, self._decode, self._drop, self._large)
        action = self._shared.choices(actions, weights=(30, 40, 15, 10, 10, 3))[0]
        with self._some_stream():
            action()
        if self._own.random() < 0.2 or len(self._pending) > 20:
            self.settle()

    def settle(self) -> None:
        """Wait for the device, and make all pending comparisons."""
        self.group.synchronize()
        if self._streams:
            torch.cuda.synchronize()
        for one in self._pending:
            same_bits(one.what, one.got, one.want)
            self.tally.checks += 1
        self._pending.clear()

    def change_group(self) -> None:
        """Close the group while its results are kept, and open another."""
        self.settle()
        self.group.close()
        self.group = open_group(self._pg, self._soak)
        self.tally.groups += 1
        # Plans belong to the old group: these results can only be compared once more.
        for live in self._alive:
            self._compare(live)
        self.settle()
        self._alive.clear()

    def _some_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._stream is None:
            return contextlib.nullcontext()
        before, self._stream = self._stream, self._own.choice(self._streams)
        if before is not self._stream:
            self._stream.wait_stream(before)  # what is compared on this stream may have been computed on the other
        return torch.cuda.stream(self._stream)

    # ------------------------------------------------------------------ actions

    def _dispatch(self) -> None:
        case = draw_case(self._shared, self.ranks)
        options = draw_options(self._shared, case)
        oracle = oracle_of(case, options)
        mine = oracle.sent[self.rank]
        routing = Routing(self._to_device(mine.topk_idx), self._maybe(mine.topk_weights))
        view = self.group.for_shape(case.shape)
        sent = view.dispatch(self._to_device(mine.x), routing, options=options, num_sms=self._num_sms())
        live = Live(f"rank {self.rank}, {case}, {options}", case, options, oracle, sent)
        self._compare(live)
        self._keep(live)

    def _redispatch(self) -> None:
        live = self._any_alive()
        if live is None:
            return
        values = [one.x * 2 for one in live.oracle.sent]
        again = self.group.for_shape(live.case.shape).redispatch(
            self._to_device(values[self.rank]), live.sent.plan, num_sms=self._num_sms()
        )
        self.tally.calls += 1
        assert isinstance(again.x, Tensor)
        rows = again.x.reshape(-1, live.case.hidden)[live.places(self.rank)]
        self._pending.append(Comparison(f"{live.what} redispatch", rows, live.oracle.x(self.rank, values)))

    def _combine(self) -> None:
        live = self._any_alive()
        if live is None:
            return
        combining = Combining(self._shared, live, self.rank)
        home = combining.call(self.group, self._num_sms())
        self.tally.calls += 1
        self._pending += combining.compared(home)

    def _decode(self) -> None:
        case = draw_case(self._shared, self.ranks, decode=True)
        oracle = Oracle(case.inputs(), case.experts, "masked", capacity=self.ranks * case.shape.max_tokens)
        mine, view = oracle.sent[self.rank], self.group.for_shape(case.shape)
        fast, hook = self._shared.random() < 0.5, self._shared.random() < 0.5
        routing = Routing(self._to_device(mine.topk_idx), self._maybe(mine.topk_weights))
        sent = view.decode_dispatch(self._to_device(mine.x), routing, return_hook=hook)
        sent.hook()
        size = oracle.num_local * oracle.capacity
        ys = [answers(case, oracle, there, size, case.dtype) for there in range(self.ranks)]
        y = self._to_device(ys[self.rank]).reshape(oracle.num_local, oracle.capacity, case.hidden)
        home = view.decode_combine(y, sent.plan, numerics="fast" if fast else "exact", return_hook=hook)
        home.hook()
        self.tally.calls += 2
        what = f"rank {self.rank}, {case} decode {fast=}"
        assert isinstance(sent.x, Tensor)
        places = torch.tensor([row.place for row in oracle.rows(self.rank)], dtype=torch.int64, device="cpu")
        rows = sent.x.reshape(-1, case.hidden)[self._to_device(places)]
        self._pending.append(Comparison(what, rows, oracle.x(self.rank)))
        want = oracle.decode_combine(self.rank, ys, fast=fast, nodes=self.group.topology.nodes)
        self._pending.append(Comparison(f"{what} combine", home.x, want))

    def _large(self) -> None:
        large = soak_large.draw(self._shared, self.ranks)
        self.tally.calls += soak_large.round_trip(self.group.for_shape(large.shape), large, self._num_sms())
        self.tally.checks += 1

    def _drop(self) -> None:
        if self._alive:
            self._drop_result(self._alive.pop(self._shared.randrange(len(self._alive))))

    # ------------------------------------------------------------------ helpers

    def _keep(self, live: Live) -> None:
        self.tally.calls += 1
        self._alive.append(live)
        if len(self._alive) > MOST_ALIVE:
            self._drop_result(self._alive.pop(0))

    def _drop_result(self, live: Live) -> None:
        self._compare(live)
        self.settle()

    def _compare(self, live: Live) -> None:
        """Add comparisons of everything that a dispatch delivered."""
        self._pending += live.compared(self.rank)

    def _any_alive(self) -> Live | None:
        return self._shared.choice(self._alive) if self._alive else None

    def _num_sms(self) -> int | None:
        return self._own.choice((None, None, 1, 3, 16)) if self._soak.device == "cuda" else None

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.group.device)

    def _maybe(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._to_device(tensor)


def open_group(pg: dist.ProcessGroup, soak: Soak) -> ExpertGroup:
    """Open a group whose memory holds the large cases; collective."""
    return ExpertGroup(
        pg,
        shape_of(pg.size()),
        backend=soak.device,
        timeout_s=soak.timeout_s,
    )


def run(rank: int, pg: dist.ProcessGroup, soak: Soak) -> Tally:
    """Run the soak; a job of `World`. Collective: rank 0 decides when it ends.

    Raises:
        AssertionError: a result is wrong; names the case.
    """
    soaker = Soaker(rank, pg, soak)
    deadline = time.monotonic() + soak.seconds
    try:
        while True:
            for _ in range(STEPS_BETWEEN_AGREEMENTS):
                soaker.step()
            if not _agreed(pg, time.monotonic() < deadline):
                break
            if soaker.tally.groups * STEPS_OF_A_GROUP < soaker.tally.calls:
                soaker.change_group()
        soaker.settle()
    finally:
        soaker.group.close()
    return soaker.tally


def _agreed(pg: dist.ProcessGroup, more: bool) -> bool:
    """Return ``more`` of rank 0."""
    decision = torch.tensor([int(more)], dtype=torch.int64, device="cpu")
    dist.broadcast(decision, src=0, group=pg)
    return bool(decision.item())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every result was right. The same seed gives the same soak."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tokenferry.testing.soak", description=about)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--ranks", type=int, default=2, help="R (default: 2)")
    parser.add_argument("--ranks-per-node", type=int, help="consecutive ranks that form a node (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the backend (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    args = parser.parse_args(argv)
    check_nodes(parser, args.ranks, args.ranks_per_node)
    check_gpus(parser, args.device)
    total = Tally(groups=0)
    start = time.monotonic()
    per_node: int | None = args.ranks_per_node
    with World(args.ranks, devices=args.device, timeout_s=CHUNK_S + SLACK_S, ranks_per_node=per_node) as world:
        for chunk in range(max(1, round(args.seconds / CHUNK_S))):
            seconds = min(CHUNK_S, args.seconds)
            try:
                seed = args.seed * 1_000_003 + chunk
                done: Tally = world.run(run, Soak(seconds, seed, args.device))[0]
            except WorldError as error:
                sys.stdout.write(f"FAILED in chunk {chunk} of seed {args.seed}:\n{error}\n")
                return 1
            total = Tally(total.groups + done.groups, total.calls + done.calls, total.checks + done.checks)
            sys.stdout.write(
                f"{time.monotonic() - start:6.0f} s: {total.calls} calls in {total.groups} groups over {args.ranks} "
                f"ranks ({args.device}), {total.checks} results of rank 0 checked, all right\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
