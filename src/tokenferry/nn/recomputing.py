"""Whether a forward pass only repeats an earlier one, for activation checkpointing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Return whether this code runs inside of a backward pass, as what `torch.utils.checkpoint` repeats does."""
    # torch.utils.checkpoint asks the same; there is no public way. A compiled graph repeats what it wants by itself.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
