"""The wall clock of a program: the time that a call takes until its result is complete, host and device together."""

from __future__ import annotations

import time

from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.session import Session, Step

Seconds = dict[str, list[float]]
"""The times of one call on this rank, by mode: ``"isolated"``: of each call, with the ranks synchronised and the device
idle before it; ``"back_to_back"``: of each run of calls without a pause, divided by their number."""


def wall_times(session: Session, step: Step, calls: int) -> Seconds:
    """Time one call in both modes, as often as the settings say. Collective.

    Args:
        session: The session.
        step: The call.
        calls: Calls of a run back to back.
    """
    with no_collections():
        isolated, runs = (seconds_of_runs(session, step, count) for count in (1, calls))
    return {"isolated": isolated, "back_to_back": [seconds / calls for seconds in runs]}


def seconds_of_runs(session: Session, step: Step, calls: int) -> list[float]:
    """Return the time of each run, from an idle device to an idle device. Collective.

    Some runs come first and do not count.

    Args:
        session: The session.
        step: The call.
        calls: Calls of a run.
    """
    seconds = []
    for run in range(session.settings.warmup + session.settings.iterations):
        session.synchronize_ranks()
        session.device.synchronize()  # the gate of the devices lets hosts start closer together than a barrier does
        start = time.perf_counter()
        for i in range(run * calls, (run + 1) * calls):
            step(i)
        session.device.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[session.settings.warmup :]
