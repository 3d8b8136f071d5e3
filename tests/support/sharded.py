"""What a rank holds of the parameters of a layer."""

from collections.abc import Mapping

from torch import Tensor

EXPERT_NAMES = ("experts.gate", "experts.up", "experts.down")
"""Parameters of a `MoELayer` of which each rank has its own part."""


def local_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of each DTensor, and other tensors as they are: results of a job can be sent."""
    return {name: value.to_local() if hasattr(value, "to_local") else value for name, value in tensors.items()}
