"""Jobs that make a new pool of ranks ready for tests."""

import os


def prefer(rank, pg, backend: str) -> None:
    """Groups of this rank that leave the backend open shall choose among what the pool is for."""
    if backend == "cpu":
        os.environ["TOKENFERRY_BACKEND"] = "cpu"
    else:
        os.environ.pop("TOKENFERRY_BACKEND", None)
