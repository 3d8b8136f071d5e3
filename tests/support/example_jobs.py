"""Programs of `examples/`: as jobs on the ranks of a world, and as users start them."""

import gc
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tokenferry


def run_example(rank: int, pg: dist.ProcessGroup, path: str, *arguments: str) -> str:
    """Run a program on the process group that this rank has, as on ranks of torchrun; return what it prints."""
    printed = io.StringIO()
    gc.collect()
    before = set(map(id, sharded_tensors()))

    def destroy() -> None:
        """Leave the process group to the next job. Ranks of torchrun may abort if anything holds theirs."""
        assert all(id(one) in before for one in sharded_tensors()), "DTensors would outlive their process group"

    stays, command = patch.object(dist, "destroy_process_group", destroy), patch.object(sys, "argv", [path, *arguments])
    with redirect_stdout(printed), stays, command:
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def sharded_tensors() -> list[DTensor]:
    """Return all DTensors of this process."""
    return [one for one in gc.get_objects() if isinstance(one, DTensor)]


def refuse_example(rank: int, pg: dist.ProcessGroup, path: str, *arguments: str) -> str:
    """Run a program that ends at once; return what it says."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            run_example(rank, pg, path, *arguments)
    except SystemExit as end:
        return f"{said.getvalue()}{end.code}"
    return ""


def start_example(program: Path, *arguments: object, path: str = "", ranks: int = 1) -> str:
    """Start a program on CPUs as users do, on several ranks by torchrun; return what it prints.

    Args:
        program: The program.
        arguments: Those of its command line.
        path: A folder to be found before what is installed, or empty.
        ranks: R.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    source = str(Path(tokenferry.__file__).parents[1])
    folders = os.pathsep.join(filter(None, [path, source, os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": folders, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
