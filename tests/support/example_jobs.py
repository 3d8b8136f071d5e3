"""Jobs that run a program of `examples/` on the ranks of a world."""

import io
import runpy
from contextlib import redirect_stdout
from unittest.mock import patch

import torch.distributed as dist


def run_example(rank: int, pg: dist.ProcessGroup, path: str) -> str:
    """Run a program on the process group that this rank has, as on ranks of torchrun; return what it prints."""
    printed = io.StringIO()
    # The process group is there already, and has to stay for the next job.
    with redirect_stdout(printed), patch.object(dist, "destroy_process_group"):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()
