"""The GPUs that numbers belong to, from nvidia-smi and torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import torch

from tokenferry.errors import BackendUnavailable

_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of this host.

    Attributes:
        count: Number of GPUs.
        name: Name of the first GPU.
        torch_cuda: The CUDA version that torch was built with.
        smi: Per GPU the output of nvidia-smi now, by field; empty without nvidia-smi.
    """

    count: int
    name: str
    torch_cuda: str
    smi: tuple[dict[str, str], ...]

    def line(self) -> str:
        """Return one line for people."""
        first = self.smi[0] if self.smi else {}
        clocks = f", SM clock {first['clocks.sm']} of {first['clocks.max.sm']}" if first else ""
        driver = f", driver {first['driver_version']}" if first else ""
        return f"{self.count} x {self.name}{driver}, CUDA {self.torch_cuda}{clocks}"


def need_gpus() -> int:
    """Return how many GPUs torch sees.

    Raises:
        BackendUnavailable: torch sees none; says why.
    """
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise BackendUnavailable(f"this needs GPUs, and {why}; `tokenferry doctor` says more")
    return torch.cuda.device_count()


def find_gpus() -> Gpus:
    """Query nvidia-smi; starts no CUDA context in this process. There has to be a GPU."""
    smi = _smi()
    name = smi[0]["name"] if smi else "GPU"
    return Gpus(torch.cuda.device_count(), name, torch.version.cuda or "none", smi)


def _smi() -> tuple[dict[str, str], ...]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(dict(zip(_FIELDS, line, strict=True)) for line in lines if len(line) == len(_FIELDS))
