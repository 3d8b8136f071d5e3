"""A training step of Megatron-Core, unmodified: its flex dispatchers over our `deep_ep` against its own two."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenferry.bench.core.checks import changed_bits, worst_differences
from tokenferry.bench.core.models import STEPS, Precision, in_turns, take_gradients
from tokenferry.bench.core.session import Session, baseline_group
from tokenferry.bench.core.wall import wall_times
from tokenferry.compat import deep_ep_path
from tokenferry.errors import BackendUnavailable

NOT_INSTALLED = "Megatron-Core is not installed, so its training step is not measured; pip install megatron-core"

LAYERS = 2
ROUTED = 32
"""Routers read one column in so many, and no expert writes those: so all dispatchers route alike in every layer."""

OWN = "alltoall"
DISPATCHERS = {
    OWN: {"moe_token_dispatcher_type": "alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "flex, deepep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
    "flex, hybridep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
}
"""Dispatchers by their names here, and Megatron's options for them."""

LEARNING_RATE = 1e-4


PRECISIONS = (Precision(torch.float32, 1e-5), Precision(torch.bfloat16, 2e-2))
"""Compared in this order; the last one is timed."""

KINDS = {f"{i}.{part}": f"gradient of the {part}, layer {i}" for i in range(LAYERS) for part in ("router", "experts")}
"""Kinds of gradients, by what the names of weights contain."""


def version() -> str | None:
    """Return the version of Megatron-Core that can be imported; ``""`` if it does not say; None if there is none."""
    try:
        if importlib.util.find_spec("megatron.core") is None:
            return None
    except ModuleNotFoundError:
        return None
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return ""  # an unpacked wheel without its metadata


def measure_megatron(session: Session) -> None:
    """Compare losses and gradients, also those of repeated steps, then time steps."""
    for tokens in session.settings.tokens:
        what = f"Megatron-Core: training step, T={tokens}"
        session.attempt(what, _measure, session, tokens)


def _measure(session: Session, tokens: int) -> None:
    provide_deep_ep()
    groups = _process_groups(session)
    models: dict[str, Model] = {}
    for precision in PRECISIONS:
        models = {name: Model(session, groups, name, precision.dtype) for name in DISPATCHERS}
        batch = Batch.draw(session, tokens, precision.dtype)
        found = {name: model.results(batch) for name, model in models.items()}
        for name, results in found.items():
            if name != OWN:
                worst = worst_differences(session.pg, results, found[OWN])
                label = {"dispatcher": name, "tokens": tokens, "dtype": precision.name}
                session.send({"training results": {**label, "differ_by": worst}})
                precision.check(name, OWN, worst)
        for name, model in models.items():
            _repeat(session, precision, name, model, batch)
    steps = {name: partial(wall_times, session, model.stepper(batch), STEPS) for name, model in models.items()}
    for name, times in in_turns(session, steps).items():
        session.send({"training": {"dispatcher": name, "tokens": tokens, "dtype": precision.name, **times}})


def _repeat(session: Session, precision: Precision, name: str, model: Model, batch: Batch) -> None:
    """Report what of a step has other bits when it is repeated. Collective.

    Megatron adds up a token's rows with `torch.Tensor.scatter_add_`, whose order on GPUs is fixed only where torch is
    told to; so this is asked both ways.
    """
    label = {"dispatcher": name, "tokens": len(batch.x), "dtype": precision.name}
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            changed = changed_bits(session.pg, model.results(batch), model.results(batch))
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        session.send({"training repeated": {**label, "deterministic_algorithms": deterministic, "changed": changed}})


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The inputs of a step on this rank: ``[T, 1, H]`` rows, and the rows that the layers should return."""

    x: Tensor
    target: Tensor

    @classmethod
    def draw(cls, session: Session, tokens: int, dtype: torch.dtype) -> Batch:
        """Draw random rows, others on each rank."""
        device = session.device.torch_device
        generator = torch.Generator(device).manual_seed(session.settings.seed * 4096 + session.rank)
        size = (2, tokens, 1, session.settings.hidden)
        x, target = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return cls(x, target)


class Model:
    """Two MoE layers of Megatron-Core with residual connections; the same weights whatever the dispatcher is.

    Args:
        session: The session.
        groups: Megatron's ProcessGroupCollection.
        dispatcher: One of `DISPATCHERS`.
        dtype: Of rows and weights.
    """

    def __init__(self, session: Session, groups: Any, dispatcher: str, dtype: torch.dtype) -> None:  # noqa: ANN401
        self.layers = _layers(session, groups, dispatcher, dtype)
        columns = session.settings.hidden // ROUTED
        for name, weight in self.layers.named_parameters():
            # Routers are the same on all ranks; experts are this rank's.
            own = 0 if "router" in name else 1 + session.rank
            generator = torch.Generator(weight.device).manual_seed(session.settings.seed * 4096 + own)
            nn.init.normal_(weight.data, std=weight.shape[-1] ** -0.5, generator=generator)
            if "router" in name:
                weight.data[:, columns:] = 0
                weight.data *= ROUTED**0.5
            elif "linear_fc2" in name:
                weight.data[:columns] = 0

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the mean square of the distance to the target, float32."""
        for layer in self.layers:
            x = x + layer(x)[0]
        return (x.float() - target.float()).square().mean()

    def results(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, and the gradients of the rows and of every weight, by name. Collective."""
        x = batch.x.clone().requires_grad_()
        loss = self.loss(x, batch.target)
        loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return {"loss": loss.detach(), "gradient of the rows": x.grad, **take_gradients(self.layers, KINDS)}

    def stepper(self, batch: Batch) -> Callable[[int], None]:
        """Return a training step: forward, backward, SGD."""
        optimizer = torch.optim.SGD(self.layers.parameters(), lr=LEARNING_RATE)

        def step(i: int) -> None:
            x = batch.x.clone().requires_grad_()
            self.loss(x, batch.target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        return step


def _layers(session: Session, groups: Any, dispatcher: str, dtype: torch.dtype) -> nn.ModuleList:  # noqa: ANN401
    """Make MoE layers of gated experts, one GEMM after another: what Megatron-Core has without Transformer Engine."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = session.settings
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=settings.hidden,
        ffn_hidden_size=settings.hidden,
        moe_ffn_hidden_size=settings.hidden // 2,
        num_attention_heads=1,
        num_moe_experts=settings.experts,
        moe_router_topk=settings.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=settings.ranks,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        **DISPATCHERS[dispatcher],
    )
    if not hasattr(moe_utils, "te_general_gemm"):
        raise BackendUnavailable(
            f"the router of Megatron-Core {version() or ''} needs Transformer Engine; install it, or Megatron-Core 0.19"
        )
    spec = get_moe_module_spec(use_te=False, num_experts=settings.experts, moe_grouped_gemm=False)
    # A function since 0.19, a description before.
    make = spec if callable(spec) else partial(spec.module, submodules=spec.submodules)
    layers = [make(config=config, layer_number=1 + i, pg_collection=groups) for i in range(LAYERS)]
    return nn.ModuleList(layers)


def _process_groups(session: Session) -> Any:  # noqa: ANN401 - Megatron's ProcessGroupCollection
    """Make Megatron's groups: all ranks share the experts, nothing else is split. Collective."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    # What `allgather` gathers into; part of `initialize_model_parallel`, which takes all that is in a process for its.
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    found = ProcessGroupCollection()
    found.ep = found.tp_ep = found.dp = found.tp_dp_cp = everyone = baseline_group(session)
    singles = [dist.new_group([rank], backend=everyone.name()) for rank in range(session.settings.ranks)]
    alone = singles[session.rank]
    found.tp = found.cp = found.tp_cp = found.pp = found.expt_tp = found.expt_dp = alone
    return found


def provide_deep_ep() -> None:
    """Let ``import deep_ep`` find our package in this rank, as ``PYTHONPATH=$(tokenferry deep-ep-path)`` does.

    Raises:
        BackendUnavailable: another `deep_ep` has been imported already.
    """
    folder = deep_ep_path.folder()
    sys.path.insert(0, folder)
    import deep_ep

    if not str(deep_ep.__file__).startswith(folder):
        raise BackendUnavailable(f"deep_ep has been imported from {deep_ep.__file__}; it has to be that of {folder}")
