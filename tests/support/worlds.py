"""Jobs on several worlds at the same time: most of what jobs with lost ranks do is wait for a deadline."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, TypeVar

from tokenferry.testing.world import World, WorldError

_Key = TypeVar("_Key")


def run_at_once(
    num_ranks: int, devices: str, jobs: Mapping[_Key, Callable[..., Any]], timeout_s: float = 240.0
) -> dict[_Key, Future[list[Any]]]:
    """Run each job on a world of its own; ranks that share GPUs run one job after the other.

    Args:
        num_ranks: R of each world.
        devices: As `World` takes it.
        jobs: By name, ``job(rank, process_group)``; ``functools.partial`` binds other arguments.
        timeout_s: As `World` takes it.

    Returns:
        dict: by name, the results by rank, or the WorldError of the job.
    """
    worlds: dict[_Key, World] = {}
    results: dict[_Key, Future[list[Any]]] = {name: Future() for name in jobs}
    with ExitStack() as stack:
        for name, job in jobs.items():
            worlds[name] = stack.enter_context(World(num_ranks, devices=devices, timeout_s=timeout_s))
            worlds[name].submit(job)
            if devices != "cpu":
                _collect(worlds[name], results[name])
        for name, world in worlds.items():
            if not results[name].done():
                _collect(world, results[name])
    return results


def _collect(world: World, result: Future[list[Any]]) -> None:
    try:
        result.set_result(world.collect())
    except WorldError as error:
        result.set_exception(error)
