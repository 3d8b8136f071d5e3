"""Jobs that make a new pool of ranks ready for tests."""

import os


def prefer(rank, pg, backend: str) -> None:
    """Make backend="auto" choose, on this rank, the backend that the pool is for."""
    if backend == "cpu":
        os.environ["TOKENFERRY_BACKEND"] = "cpu"
    else:
        os.environ.pop("TOKENFERRY_BACKEND", None)
