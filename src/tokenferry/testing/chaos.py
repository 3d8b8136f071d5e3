"""A chaos soak: ranks are killed, stopped, forked and starved inside of their calls, and every promise is checked.

    python -m tokenferry.testing.chaos --seconds 600 --ranks 4 --transport both --seed 1

It consists of episodes. In each of them R processes make groups and calls of all kinds; at random moments faults happen
to some of them; the others have to notice, go on in a new group of their own, and leave nothing behind. The promises:

- Each call returns or raises before its deadline.
- Each call that returns has the right result, bit for bit. Masked ranks have sent nothing.
- An error names ranks that were really lost, or that gave up because of one.
- All errors are `TokenferryError`; the others can make a new group in the same processes.
- A closed group leaves no descriptor and no mapping behind; the soak leaves no process, no folder and no shared memory.

What happens is drawn from the seed, in which moment of a call it happens is not repeatable. The first promise that is
broken ends the soak, with the seed and the number of the episode: ``--first N --episodes 1`` makes it again.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tokenferry.testing.chaos_crew import Crew, Violation, adopt_orphans
from tokenferry.testing.chaos_judge import PROMPT_S, SLACK_S, Judge
from tokenferry.testing.chaos_leftovers import descriptors
from tokenferry.testing.chaos_plan import HARMLESS, LONG_S, Draw, Episode, Fault, Soak, Step
from tokenferry.testing.chaos_reports import Close, ComeBack, Go, Join, Prepare, Report
from tokenferry.testing.world import check_gpus, check_nodes

PREPARE_S = 120.0
"""Seconds for what has no deadline of its own: joining a process group, making inputs, on a busy machine."""
FIRST_S = 300.0
"""The deadline while kernels are compiled."""
SAY_EVERY_S = 20.0


@dataclass(slots=True)
class Tally:
    """What was done."""

    episodes: int = 0
    groups: int = 0
    calls: int = 0
    checks: int = 0
    faults: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.faults.items())) or "none"
        return (
            f"{self.calls} calls in {self.groups} groups of {self.episodes} episodes, {self.checks} results checked, "
            f"{sum(self.faults.values())} faults ({faults})"
        )


class Supervisor:
    """Runs one episode.

    Args:
        episode: What is to happen.
        folder: An empty folder of its own.
        tally: What was done so far; counted on.
    """

    def __init__(self, episode: Episode, folder: Path, tally: Tally) -> None:
        self._episode, self._folder, self._tally = episode, folder, tally
        self._judge = Judge(episode)
        self._where = ""

    def run(self) -> None:
        """Run it.

        Raises:
            Violation: a promise was broken; says where.
        """
        before = _possessions()
        try:
            with Crew(self._episode.ranks, self._folder) as crew:
                self._live(crew)
                self._where = "afterwards"
                _none(crew.end())
            _none(sorted(_possessions() - before))
        except Violation as violation:
            raise Violation(f"{self._where}: {violation}") from None
        self._tally.episodes += 1

    def _live(self, crew: Crew) -> None:
        episode, everyone = self._episode, crew.alive()
        self._join(crew, everyone, episode, "first")
        for step in episode.steps:
            here = [rank for rank in everyone if self._goes_on(rank, crew)]
            self._do_step(crew, step, here)
        stopped, interrupted = crew.stopped(), crew.wake()
        self._where = "waking up"
        self._collect(crew, interrupted, self._within(episode) + SLACK_S)
        if stopped and episode.on_timeout == "mask" and not self._judge.broke:
            self._come_back(crew)
        self._where = "closing"
        self._finish(crew, crew.alive())
        self._where = "a forked child"
        _none(crew.children())
        self._go_on(crew)

    def _do_step(self, crew: Crew, step: Step, here: Sequence[int]) -> None:
        self._where = step.name
        self._prepare(crew, step, here)
        lost = [fault for fault in step.faults if fault.kind not in HARMLESS]
        self._judge.hurt.update({fault.rank: fault.kind for fault in lost})
        self._tally.faults.update(fault.kind for fault in step.faults)
        crew.send(here, Go())
        reports = self._collect(crew, here, self._within(self._episode), step.faults)
        if step.name == "aftermath":
            self._judge.aftermath(reports)

    def _goes_on(self, rank: int, crew: Crew) -> bool:
        """Return whether a rank makes the next step: it lives, is awake, and has an open group."""
        lost = rank in self._judge.hurt and self._judge.hurt[rank] in ("leave", "close")
        return rank in crew.alive() and rank not in crew.stopped() and rank not in self._judge.broke and not lost

    def _come_back(self, crew: Crew) -> None:
        """Let ranks that were masked come back, and make a step with all of them."""
        self._where = "coming back"
        here = crew.alive()
        if len(here) < self._episode.ranks:
            return
        crew.send(here, ComeBack())
        reports = self._collect(crew, here, self._within(self._episode))
        self._judge.hurt.clear()
        step = Step("all are back", (self._episode.after,), (), 0)
        self._do_step(crew, step, here)
        _none(f"rank {rank} has masked {sorted(one.masked)}" for rank, one in reports.items() if one.masked)

    def _go_on(self, crew: Crew) -> None:
        """Let the ranks that are left make a new group and calls."""
        episode, here = self._episode, crew.alive()
        self._judge = Judge(replace(episode, timeout_s=LONG_S))
        rest = replace(episode, timeout_s=LONG_S, on_timeout="raise", num_groups=1)
        self._join(crew, here, rest, "second")
        for step in (Step("a new group", (), (), 0), Step("calls of a new group", (episode.after,), (), 0)):
            self._do_step(crew, step, here)
        self._where = "closing the new group"
        self._finish(crew, here)

    # ------------------------------------------------------------------ commands

    def _join(self, crew: Crew, here: Sequence[int], episode: Episode, name: str) -> None:
        self._where = f"joining the {name} process group"
        for rank, number in enumerate(here):
            crew.send([number], Join(str(self._folder / name), rank, len(here), episode))
        self._collect(crew, here, PREPARE_S)
        self._tally.groups += episode.num_groups

    def _prepare(self, crew: Crew, step: Step, here: Sequence[int]) -> None:
        crew.send(here, Prepare(step))
        self._collect(crew, here, PREPARE_S)

    def _finish(self, crew: Crew, here: Sequence[int]) -> None:
        crew.send(here, Close())
        self._collect(crew, here, PREPARE_S)

    def _collect(
        self, crew: Crew, here: Sequence[int], within_s: float, faults: Sequence[Fault] = ()
    ) -> dict[int, Report]:
        """Wait for reports, and check them, and that no process has ended without a reason."""
        reports = crew.collect(here, within_s, faults)
        for rank in here:
            status = crew.status(rank)
            if status is not None and rank not in reports:
                self._judge.died(rank, status)
                self._judge.broke.add(rank)
        self._judge.step(reports)
        for report in reports.values():
            self._tally.calls += len(report.calls)
            self._tally.checks += report.checks
        return reports

    def _within(self, episode: Episode) -> float:
        """Return the seconds within which a step has to end: its calls, and some for the supervisor itself."""
        if episode.device == "cuda" and self._where in ("making", "a new group"):
            return PREPARE_S + episode.timeout_s
        return (PROMPT_S if episode.prompt else episode.timeout_s) + 2 * SLACK_S


def run_episode(episode: Episode, tally: Tally) -> None:
    """Run one episode in a folder of its own, and count what it did.

    Raises:
        Violation: a promise was broken.
    """
    before, usual = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else [], tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="tokenferry-chaos-") as folder:
        # Whatever the library puts into the temp directory is found there.
        temporary, notes = Path(folder, "temporary"), Path(folder, "notes")
        temporary.mkdir()
        notes.mkdir()
        tempfile.tempdir = str(temporary)
        try:
            Supervisor(episode, notes, tally).run()
        finally:
            tempfile.tempdir = usual
        left = [f"{name} in the temp directory" for name in sorted(os.listdir(temporary))]
    after = sorted(os.listdir("/dev/shm")) if before else []
    left += [f"/dev/shm/{name}" for name in after if name not in before and "tokenferry" in name]
    _none(left)


def _possessions() -> frozenset[str]:
    return frozenset(f"descriptor of {name}" for name in descriptors())


def _none(left: Iterable[str]) -> None:
    texts = list(left)
    if texts:
        raise Violation("; ".join(texts))


def soak(what: Soak, numbers: Iterable[int], seconds: float, *, keep_going: bool) -> Tally | None:
    """Run episodes for a while, and print what was done; return None if a promise was broken."""
    tally, start, said, broken = Tally(), time.monotonic(), 0.0, 0
    nodes = "" if what.ranks_per_node is None else f" --ranks-per-node {what.ranks_per_node}"
    for number in numbers:
        elapsed = time.monotonic() - start
        if elapsed > seconds:
            break
        if elapsed - said > SAY_EVERY_S:
            said = elapsed
            _say(f"{elapsed:6.0f} s: {tally}")
        episode = Draw(what, number).episode()
        try:
            run_episode(episode, tally)
        except Violation as violation:
            broken += 1
            _say(
                f"FAILED: seed {what.seed}, {episode}\nlost: {[(f.kind, f.rank) for f in episode.fatal]}\n{violation}\n"
                f"The same plan again: --seed {what.seed} --first {number} --episodes 1 --ranks {what.ranks} "
                f"--transport {what.transport} --device {what.device}{nodes}"
            )
            if not keep_going:
                break
    verdict = f"{broken} episode(s) FAILED" if broken else "all promises kept"
    _say(f"{what.ranks} ranks ({what.device}, {what.transport}{nodes}), seed {what.seed}: {tally}; {verdict}")
    return None if broken else tally


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every promise was kept. It forks: call it in a process that has one thread."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tokenferry.testing.chaos", description=about)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--ranks", type=int, default=4, help="R (default: 4)")
    parser.add_argument("--transport", choices=("shared_memory", "process_group", "both"), default="both")
    parser.add_argument("--ranks-per-node", type=int, help="as of ExpertGroup; excludes --transport (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the backend (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first episode (default: 0)")
    parser.add_argument("--episodes", type=int, default=1 << 30, help="how many at most (default: as many as fit)")
    parser.add_argument("--keep-going", action="store_true", help="run on after a promise was broken")
    args = parser.parse_args(argv)
    check_nodes(parser, args.ranks, args.ranks_per_node)
    if args.ranks_per_node is not None and (args.transport != "both" or args.device != "cpu"):
        parser.error("--ranks-per-node: nodes of CPUs use both transports; leave out --transport and --device")
    check_gpus(parser, args.device)
    what = Soak(args.seed, args.ranks, args.device, args.transport, args.ranks_per_node)
    adopt_orphans()
    torch.backends.cpu.get_cpu_capability()  # looked up once, from a file that a starved rank cannot open
    gc.freeze()  # collections in the ranks, which look for what is left, are a hundred times faster
    signal.signal(signal.SIGTERM, _terminate)
    if args.device == "cuda":
        # Kernels are compiled before deadlines are short.
        calm = replace(Draw(what, -1).episode(), timeout_s=FIRST_S, steps=(Step("making", (), (), 0),))
        run_episode(replace(calm, on_timeout="raise", prompt=False), Tally())
    numbers = range(args.first, args.first + args.episodes)
    return 1 if soak(what, numbers, args.seconds, keep_going=args.keep_going) is None else 0


if __name__ == "__main__":
    sys.exit(main())
