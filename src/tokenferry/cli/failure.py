"""The text of a failed job: one line for each expected error, all tracebacks for any other; and the exit status."""

from __future__ import annotations

from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.cli.parser import NOT_POSSIBLE
from tokenferry.errors import BackendUnavailable, TokenferryError
from tokenferry.testing.world import WorldError


def status(error: WorldError) -> int:
    """Return the exit status of a failed job."""
    impossible = all(isinstance(one, BackendUnavailable) for one in error.errors.values())
    return NOT_POSSIBLE if error.errors and impossible else 1


def explain(error: WorldError) -> str:
    """Return why a job failed: each distinct error once, with its ranks."""
    if not all(isinstance(one, TokenferryError | WrongAnswer | ChildProcessError) for one in error.errors.values()):
        return str(error)  # includes the tracebacks of all ranks
    by_error: dict[str, list[int]] = {}
    for rank, one in sorted(error.errors.items()):
        by_error.setdefault(f"{type(one).__name__}: {one}", []).append(rank)
    return "\n".join(f"rank {', '.join(map(str, ranks))}: {reason}" for reason, ranks in by_error.items())
