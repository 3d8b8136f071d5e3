"""Scaled losses, for float16, where experts are DTensors and the rest of a model is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.nn.balance.sharers import layers
from tokenferry.nn.sharding import local_with_gradient


class GradScaler(torch.amp.GradScaler):
    """torch's `torch.amp.GradScaler`, for optimizers whose parameters are DTensors and plain tensors at once.

    torch's own raises an `AttributeError` for these. With FSDP2, where all are DTensors, either will do. All arguments
    and methods are torch's.

    Contract:
        Collective: `unscale_`, and `step` unless `unscale_` came before, over the ranks of all experts among the
            parameters of the optimizer, and over those that hold the same experts, if `parallelize` was given them. An
            infinity or NaN in a gradient of one rank makes all of them leave the step out, and `update` lowers the
            scale of all alike.
        Gradients: those of replicated parameters have to be averaged over the ranks before, as always. They may be
            float32 or bfloat16, since `unscale_` takes no float16, like torch's: keep parameters in float32, and let
            torch.autocast, or FSDP2's ``MixedPrecisionPolicy``, compute in float16.

    Raises:
        ValueError: torch's, where gradients in float16 would have to be unscaled.
        RuntimeError: torch's, by `unscale_`, if it was called before since `update`; or if a rank does not come within
            the timeout of the process group (NCCL's watchdog may end the process instead).
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscale what this rank holds of the gradients; return, by device, whether one of any rank is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held = [local_with_gradient(p) for p in parameters if p.grad is not None]
        local = cast(torch.optim.Optimizer, SimpleNamespace(param_groups=[{"params": held}]))
        found: dict[torch.device, Tensor] = super()._unscale_grads_(local, inv_scale, found_inf, allow_fp16)
        worst = found_inf.clone()
        for on_device in found.values():
            worst = torch.maximum(worst, on_device.to(worst.device))
        for process_group in _process_groups(parameters):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=process_group)
        # A rank without gradients, too, has to know: its scale must stay that of the others.
        return {device: worst.to(device) for device in (*found, worst.device)}


def _process_groups(parameters: list[Any]) -> list[dist.ProcessGroup]:
    """Return those over which parameters are sharded, then those that hold the same experts.

    In the order of the parameters, which is that of all ranks.
    """
    meshes = (p.device_mesh for p in parameters if hasattr(p, "device_mesh"))
    same = {
        parameter: layer._same_experts.group
        for layer in layers()
        if layer._same_experts is not None and layer.group.num_ranks > 1
        for parameter in layer.expert_parameters()
    }
    found = [group for mesh in meshes for group in mesh.get_all_groups()]
    return list(dict.fromkeys([*found, *(same[p] for p in parameters if p in same)]))
