"""Which memory a process group can move."""

from __future__ import annotations

import torch
import torch.distributed as dist


def carried_on(process_group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device itself if the process group sends and receives its tensors, else the CPU. Local.

    gloo takes tensors of GPUs in some collectives, but sends only those of the CPU.
    """
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return cpu
    try:
        name = process_group._get_backend(device).name()
    except RuntimeError:
        return cpu
    return cpu if name == "gloo" else device
