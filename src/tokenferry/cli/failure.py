"""What to print when ranks failed: one line for a reason that has a name, everything for one that has none."""

from __future__ import annotations

from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.errors import TokenferryError
from tokenferry.testing.world import WorldError


def explain(error: WorldError) -> str:
    """Return why a job failed: each different reason once, with the ranks that gave it."""
    if not all(isinstance(one, TokenferryError | WrongAnswer | ChildProcessError) for one in error.errors.values()):
        return str(error)  # with the tracebacks of all ranks
    ranks: dict[str, list[int]] = {}
    for rank, one in sorted(error.errors.items()):
        ranks.setdefault(f"{type(one).__name__}: {one}", []).append(rank)
    return "\n".join(f"rank {', '.join(map(str, which))}: {reason}" for reason, which in ranks.items())
