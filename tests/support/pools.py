"""Jobs that make pools of ranks ready for tests."""

import os
import sys

import torch
import torch.distributed as dist


def prefer(rank, pg, backend: str) -> None:
    """Make backend="auto" choose, on this rank, the backend that the pool is for."""
    if backend == "cpu":
        os.environ["TOKENFERRY_BACKEND"] = "cpu"
    else:
        os.environ.pop("TOKENFERRY_BACKEND", None)


def forget_compiled(*rank_and_group: object) -> None:
    """Drop what torch.compile keeps in this process: it does not try again, in a later test, what once failed."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset()


def meet(rank: int, pg: dist.ProcessGroup) -> None:
    """Fail if the ranks' process group has ended, as with a group of several nodes that breaks."""
    here = torch.ones(1, dtype=torch.int64, device="cpu")
    pg.allreduce([here]).wait()
    assert here.item() == pg.size()
