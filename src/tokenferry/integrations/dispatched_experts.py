"""tokenferry in transformers 5.19 to 5.22, which have no registry of expert-parallel implementations.

There a style of its plans, ``"ep_dispatch_experts"``, holds its one exchange of tokens. Styles have a registry, and so
have functions that run experts. Their names are bound together here: a model that chose the function ``"tokenferry"``
gets our exchange where its plan has that style, and any other model gets transformers' own, as before.

Where ranks have different batches, these versions divide the gradients of experts by the number of batches twice, with
their own exchange, too: such layouts are for inference.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tokenferry.autograd.local_parts import trained_part
from tokenferry.errors import ConfigError

STYLE = "ep_dispatch_experts"
_INSTALLED = "_tokenferry_dispatches"


class MakeExchange(Protocol):
    """What makes the exchange of a layer, such as the class `ExpertParallel`."""

    def __call__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> Any:  # noqa: ANN401 - any module
        """Return a function of rows, choices and weights."""


class DispatchedExperts:
    """The style, with another exchange for the experts of models that chose it.

    Args:
        own: The style of transformers, which does everything else.
        name: That of the experts function.
        make: Makes the exchange of a layer.
    """

    def __init__(self, own: Any, name: str, make: MakeExchange) -> None:  # noqa: ANN401 - of transformers
        self.own = own
        self.name = name
        self.make = make

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401 - of transformers
        return getattr(self.own, attribute)

    def install_forward(self, module: Any, ep_mesh: DeviceMesh, *, tp_mesh: DeviceMesh) -> Any:  # noqa: ANN401
        """Replace the forward of the experts of a layer, and return them. Local.

        Args:
            module: They, with the parameters of this rank.
            ep_mesh: The ranks that share all experts.
            tp_mesh: The ranks with this rank's batch.

        The new forward raises `ConfigError` with gradients on, unless all ranks of ``ep_mesh`` have the same batch.
        """
        if module.config._experts_implementation != self.name:
            return self.own.install_forward(module, ep_mesh, tp_mesh=tp_mesh)
        exchange, trains = self.make(module, ep_mesh, tp_mesh), ep_mesh.size() == tp_mesh.size()

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not trains:
                raise ConfigError(
                    "transformers: versions before 5.23 divide the gradients of experts twice where ranks have several "
                    "batches; train with tp_size equal to ep_size, or install 5.23 or newer; infer in torch.no_grad()"
                )
            x, weights = _local(hidden_states), _local(top_k_weights)
            with self.own.context_around_forward(module, ep_mesh):
                out: Tensor = exchange(x, top_k_index, weights)
            return out.to(x.dtype)

        module.__dict__[_INSTALLED] = True
        module.forward = forward
        return module


def _local(tensor: Tensor) -> Tensor:
    return trained_part(tensor) if isinstance(tensor, DTensor) else tensor


def run_local_experts(experts: nn.Module, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run the experts of this rank on rows that were sent to it, as an experts function of transformers. Local.

    Raises:
        ConfigError: nothing sends rows to these experts.
    """
    if _INSTALLED not in experts.__dict__:
        raise ConfigError(
            'transformers: experts_implementation="tokenferry" needs from_pretrained with '
            f'distributed_config=DistributedConfig(ep_size=...), and a model whose plan has "{STYLE}"'
        )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    out: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, rows, index, weights)
    return out
