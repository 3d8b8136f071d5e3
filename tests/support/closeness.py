"""Compare what jobs that train return with what one process computes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def close(what: str, got: Tensor, want: Tensor, within: float) -> None:
    """Compare by norm: single numbers of a sum in float32 may cancel."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    assert error <= within, f"{what}: relative error {error:.1e}"


def all_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], within: float) -> None:
    """Compare tensors by name; there are some."""
    assert got.keys() == want.keys()
    assert want
    for name, value in want.items():
        close(name, got[name], value, within)


def same_training(results: Sequence[dict[str, Any]], want: dict[str, Any], within: float) -> None:
    """Compare what `training_jobs.train` returns on each rank with `train_alone`; ranks agree to the bit."""
    for got in results:
        for kind in ("losses", "norms"):
            for i in range(3):
                close(f"{kind} {i}", got[kind][i], want[kind][i], within)
        for kind in got.keys() - {"losses", "norms"}:
            all_close(got[kind], want[kind], within)
            for name, value in got[kind].items():
                assert torch.equal(value, results[0][kind][name]), f"ranks disagree about {kind} {name}"
