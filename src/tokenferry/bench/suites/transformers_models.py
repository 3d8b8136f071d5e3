"""A Qwen3-MoE model of transformers with random weights, and the ways in which its experts can be shared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenferry.bench.core.session import Settings
from tokenferry.integrations import transformers as integration
from tokenferry.integrations.dispatched_experts import STYLE

VOCABULARY = 8192
"""Few, so that most of a step is that of the layers."""

HEAD = 64
OURS = integration.NAME


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How the ranks share the experts of a model.

    Attributes:
        name: ``"tokenferry"``, or an implementation of transformers.
        arguments: Those of ``from_pretrained`` that choose it.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class ParallelLayout:
    """Ways to share the experts of a model between ranks that have their batches in the same manner.

    Attributes:
        batches: What is said of the batches.
        shared: Whether all ranks have the same batch.
        own: The way of transformers that others are compared with.
        others: These.
    """

    batches: str
    shared: bool
    own: Way
    others: tuple[Way, ...]


def layouts(num_ranks: int) -> tuple[ParallelLayout, ...]:
    """Return what the installed version of transformers can do, after making tokenferry known to it.

    Raises:
        BackendUnavailable: tokenferry cannot be used with this version.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    integration.register()
    if _has_registry():

        def way(name: str, *, shared: bool) -> Way:
            sizes = {"tp_size" if shared else "fsdp_size": num_ranks, "ep_size": num_ranks}
            parallel = DistributedConfig(ep_implementation=name, **sizes)
            return Way(name, {"distributed_config": parallel})

        return (
            ParallelLayout("one each", False, way("all_to_all", shared=False), (way(OURS, shared=False),)),
            ParallelLayout(
                "one for all",
                True,
                way("all_to_all", shared=True),
                (way("all_reduce", shared=True), way(OURS, shared=True)),
            ),
        )
    if STYLE in ALL_PARALLEL_STYLES:  # 5.19 to 5.22, of whose layouts it has all gradients right in this one
        sizes = {"tp_size": num_ranks, "ep_size": num_ranks}
        arguments = {"distributed_config": DistributedConfig(**sizes)}
        ours = Way(OURS, {**arguments, "experts_implementation": OURS})
        return (ParallelLayout("one for all", True, Way("all_to_all", arguments), (ours,)),)
    experts = "model.layers.*.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    own = DistributedConfig(tp_size=num_ranks, enable_expert_parallel=True)
    ours = DistributedConfig(tp_size=num_ranks, tp_plan=plan)
    return (
        ParallelLayout(
            "one for all",
            True,
            Way("all_reduce", {"distributed_config": own}),
            (Way(OURS, {"distributed_config": ours, "experts_implementation": OURS}),),
        ),
    )


def _has_registry() -> bool:
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: F401
    except ImportError:
        return False
    return True


def save_model(settings: Settings, device: torch.device, folder: Path) -> None:
    """Write a model with random bfloat16 weights, from which every rank loads its part.

    Which experts a token goes to depends on nothing but its id, and on that by a wide margin. So no rounding makes a
    token of a later layer choose another expert, and results can be compared.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = settings.model
    assert sizes is not None
    heads = settings.hidden // HEAD
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden,
        moe_intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        initializer_range=settings.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), device:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            _choose_by_id(model, settings)
    model.save_pretrained(folder)


def _choose_by_id(model: nn.Module, settings: Settings) -> None:
    """Let the first E columns of rows name the experts of a token, in all layers: routers read nothing else."""
    num_experts = settings.experts
    body: Any = model.get_submodule("model")
    body.embed_tokens.weight *= settings.hidden**0.5
    body.embed_tokens.weight[:, :num_experts] = _names(settings, body.embed_tokens.weight)
    for number, layer in enumerate(body.layers):
        layer.self_attn.o_proj.weight[:num_experts] = 0
        layer.mlp.experts.down_proj[:, :num_experts] = 0
        router = layer.mlp.gate.weight
        router.zero_()
        router[:, :num_experts] = torch.eye(num_experts, dtype=router.dtype, device=router.device).roll(number, 0)


def _names(settings: Settings, like: Tensor) -> Tensor:
    """Return ``[V, E]``: from 1 to 2 at the K experts of each id, 0 at all others."""
    chances = torch.rand(VOCABULARY, settings.experts, dtype=torch.float32, device=like.device)
    chosen = chances.topk(settings.top_k).indices
    strengths = 1 + torch.arange(settings.top_k, dtype=like.dtype, device=like.device) / settings.top_k
    names = torch.zeros(VOCABULARY, settings.experts, dtype=like.dtype, device=like.device)
    return names.scatter_(1, chosen, strengths.expand_as(chosen))
