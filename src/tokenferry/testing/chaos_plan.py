"""The plan of a chaos soak: everything that is drawn from its seed. Timing is not part of it, and differs each time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from tokenferry.types import BackendName, TimeoutPolicy, TransportName

FaultKind = Literal[
    "late",
    "fork",
    "bad argument",
    "kill",
    "stop",
    "leave",
    "close",
    "fork and kill",
    "no descriptors",
    "no memory",
]
"""What happens to a rank.

late: it is stopped for a moment. fork: a child lives on. bad argument: it makes a wrong call first. kill: SIGKILL.
stop: it is stopped until the others have given it up. leave: an exception between two calls; it makes no call any more.
close: it closes the group between two calls. fork and kill: it dies, and a child lives on. no descriptors, no memory:
it gets no new ones for a moment.
"""

RoundKind = Literal["throughput", "decode", "large", "replay", "shim", "shim decode"]
"""What a rank calls: dispatch and what follows it; the same of decoding; many rows; a CUDA graph; DeepEP's API."""

HARMLESS: tuple[FaultKind, ...] = ("late", "fork", "bad argument")
"""Faults after which every call has to succeed."""
PROMPT: dict[str, tuple[FaultKind, ...]] = {
    "shared_memory": ("kill", "close", "fork and kill", "no descriptors", "no memory"),
    "process_group": (),
    "cuda": ("kill",),
}
"""By transport, or backend cuda: faults that peers notice at once; of others they notice that their deadline passes."""
IN_MAKING: tuple[FaultKind, ...] = ("kill", "stop", "fork and kill", "no descriptors", "no memory")
"""Faults that may happen while groups are made."""
STARVED: tuple[FaultKind, ...] = ("no descriptors", "no memory")

SHORT_S = {"cpu": 3.0, "cuda": 5.0}
"""Deadline of groups in which a rank has to run into it."""
LONG_S = 30.0
"""Deadline of groups in which no rank must run into it."""


@dataclass(frozen=True, slots=True)
class Soak:
    """What a soak draws from.

    Args:
        seed: Seed of everything that is drawn.
        ranks: R.
        device: The backend, and where tensors are.
        transport: ``"shared_memory"``, ``"process_group"``, or ``"both"`` to take one of them in each episode.
        ranks_per_node: Consecutive ranks that form a node, on both transports; None: all ranks are one node.
    """

    seed: int = 0
    ranks: int = 4
    device: BackendName = "cpu"
    transport: str = "both"
    ranks_per_node: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        rank: To which rank.
        delay_s: Seconds after the start of the step; by then the rank is in the middle of its calls.
        lasts_s: Seconds until a late rank goes on, or a starved one is fed.
        before_call: The call of the step before which the rank does it to itself.
        child_calls: Whether a forked child tries to use the group.
    """

    kind: FaultKind
    rank: int
    delay_s: float
    lasts_s: float
    before_call: int
    child_calls: bool


@dataclass(frozen=True, slots=True)
class Round:
    """Some calls that belong together; their details are drawn from ``seed``."""

    kind: RoundKind
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """What all ranks do after a common start.

    Attributes:
        name: "making", "step 1", ..., "fatal step", "aftermath".
        rounds: Rounds whose calls alternate; none: the groups are made.
        faults: What happens meanwhile.
        seed: Seed of the order in which calls of the rounds alternate.
    """

    name: str
    rounds: tuple[Round, ...]
    faults: tuple[Fault, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Episode:
    """One life of R processes.

    Attributes:
        number: Its number in the soak.
        ranks: R.
        device: The backend.
        transport: How ranks reach each other; with several nodes, how nodes do.
        ranks_per_node: Consecutive ranks that form a node; None: all ranks do.
        shim: Whether ranks use DeepEP's API.
        on_timeout: Policy of the groups.
        timeout_s: Deadline of the groups.
        prompt: Whether the loss of a rank is seen at once.
        num_groups: How many groups are open at the same time.
        steps: Making the groups; steps without loss; if a rank is lost, the step in which that happens, and the
            aftermath, in which the others make some more calls.
        after: A round for the ranks that are left, in a new group of their own.
        graph_seed: Seed of the kind of the CUDA graph.
    """

    number: int
    ranks: int
    device: BackendName
    transport: TransportName
    ranks_per_node: int | None
    shim: bool
    on_timeout: TimeoutPolicy
    timeout_s: float
    prompt: bool
    num_groups: int
    steps: tuple[Step, ...]
    after: Round
    graph_seed: int

    @property
    def fatal(self) -> tuple[Fault, ...]:
        """The faults that may cost the group a rank."""
        return tuple(fault for step in self.steps for fault in step.faults if fault.kind not in HARMLESS)

    def __str__(self) -> str:
        api = "Buffer" if self.shim else f"{self.num_groups} group(s)"
        nodes = "" if self.ranks_per_node is None else f", {self.ranks_per_node} a node"
        return (
            f"episode {self.number}: {self.ranks} ranks ({self.device}, {self.transport}{nodes}), {api}, "
            f"on_timeout={self.on_timeout}, timeout_s={self.timeout_s:g}"
        )


class Draw:
    """Draws one episode.

    Args:
        soak: What to draw from.
        number: The number of the episode.
    """

    def __init__(self, soak: Soak, number: int) -> None:
        self._soak, self._number = soak, number
        self._pick = random.Random(f"{soak.seed} {number}")

    def episode(self) -> Episode:
        """Return the episode; the same seed and number give the same."""
        pick, soak, cuda = self._pick, self._soak, self._soak.device == "cuda"
        transports: tuple[TransportName, ...] = ("shared_memory", "process_group")
        transport: TransportName = pick.choice(transports)
        if soak.transport != "both":
            transport = next(name for name in transports if name == soak.transport)
        if soak.ranks_per_node is not None:
            transport = "process_group"
        if cuda:
            transport = "auto"
        fatal = self._fatal(transport)
        first = fatal[0].kind if fatal else ""
        in_making = first in IN_MAKING and pick.random() < 0.15
        prompt = all(fault.kind in PROMPT["cuda" if cuda else transport] for fault in fatal)
        # While ranks meet over gloo, a child that has its sockets hides the end of its parent until the deadline.
        prompt = prompt and not (in_making and first == "fork and kill")
        # DeepEP's API has no timeout of its own, so its ranks are lost in ways that are noticed at once.
        shim = transport == "shared_memory" and prompt and not in_making and pick.random() < 0.25
        silent = first in ("kill", "stop") and not in_making
        masks = transport != "process_group" and silent and pick.random() < 0.5
        steps = [Step("making", (), fatal if in_making else (), 0)]
        if not in_making:
            for i in range(pick.randint(1, 3)):
                harmless = tuple(self._fault(pick.choice(self._harmless())) for _ in range(pick.choice((0, 1, 1, 2))))
                steps.append(self._step(f"step {i + 1}", harmless, shim=shim, masks=False))
            if fatal:
                steps.append(self._step("fatal step", fatal, shim=shim, masks=masks))
        if fatal:
            steps.append(self._step("aftermath", (), shim=shim, masks=masks))
        return Episode(
            number=self._number,
            ranks=soak.ranks,
            device=soak.device,
            transport=transport,
            ranks_per_node=soak.ranks_per_node,
            shim=shim,
            on_timeout="mask" if masks else "raise",
            timeout_s=LONG_S if prompt else SHORT_S[soak.device],
            prompt=prompt,
            num_groups=1 if cuda or shim else pick.choice((1, 1, 2)),
            steps=tuple(steps),
            after=self._round(shim=shim, masks=False),
            graph_seed=pick.randrange(1 << 30),
        )

    def _harmless(self) -> tuple[FaultKind, ...]:
        # Kernels find wrong indices later, and a process that uses CUDA does not fork.
        return ("late",) if self._soak.device == "cuda" else HARMLESS

    def _fatal(self, transport: TransportName) -> tuple[Fault, ...]:
        pick = self._pick
        kinds: tuple[FaultKind, ...] = ("kill", "stop", "leave", "close")
        if self._soak.device == "cpu":
            kinds += ("fork and kill", "no descriptors", "no memory")
        if pick.random() < 0.15:
            return ()
        first = self._fault(pick.choice(kinds))
        if self._soak.ranks < 3 or pick.random() < 0.75:
            return (first,)
        second = self._fault(first.kind)
        return (first,) if second.rank == first.rank else (first, second)

    def _fault(self, kind: FaultKind) -> Fault:
        pick = self._pick
        return Fault(
            kind=kind,
            rank=pick.randrange(self._soak.ranks),
            delay_s=pick.random() ** 2 * 0.04 * (kind not in STARVED or pick.random() < 0.5),
            lasts_s=pick.random() * (0.4 if kind == "late" else 0.1),
            before_call=pick.randrange(6),
            child_calls=pick.random() < 0.5,
        )

    def _step(self, name: str, faults: tuple[Fault, ...], *, shim: bool, masks: bool) -> Step:
        pick = self._pick
        rounds = tuple(self._round(shim=shim, masks=masks) for _ in range(pick.randint(1, 3)))
        return Step(name, rounds, faults, pick.randrange(1 << 30))

    def _round(self, *, shim: bool, masks: bool) -> Round:
        """Draw a round; with ``masks`` one that goes on without a lost rank."""
        pick = self._pick
        kinds: tuple[RoundKind, ...] = ("throughput", "throughput", "decode", "decode", "large", "replay")
        if shim:
            kinds = ("shim", "shim decode")
        if masks:
            kinds = ("shim decode",) if shim else ("decode", "decode", "replay")
        return Round(pick.choice(kinds), pick.randrange(1 << 30))
