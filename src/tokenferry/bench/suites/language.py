"""A training step of a byte-level language model: `MoELayer` beside experts reached through torch's all-to-all.

All but the experts is spread by FSDP2, and AdamW updates float32 parameters, as examples/train_language_model.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.baselines.all_to_all_layer import AllToAllLayer
from tokenferry.bench.core.checks import worst_differences
from tokenferry.bench.core.models import STEPS, Precision, in_turns, take_gradients
from tokenferry.bench.core.session import Session, Settings
from tokenferry.bench.core.wall import wall_times
from tokenferry.nn import MoELayer, Router, SwiGLUExperts, parallelize
from tokenferry.types import MoeShape

BYTES = 256
LENGTH = 256
"""Bytes of a sequence, where T is a multiple of it."""
HEAD = 64
"""Columns of an attention head."""
ROUTED = 32
"""Routers read one column in so many, and nothing but the embedding writes those: so both models route alike in every
layer, however their sums are rounded."""
LEARNING_RATE = 1e-4
OURS, OWN = "tokenferry", "all_to_all_single"
PRECISIONS = (Precision(torch.float32, 1e-5), Precision(torch.bfloat16, 3e-2))
"""In which the products are, by autocast; compared in this order; the last one is timed."""

KINDS = {"moe.experts": "gradients of experts", "moe.router": "gradients of routers", "": "gradients of all else"}
"""Kinds of gradients, by what the names of weights contain."""


def measure_language(session: Session) -> None:
    """Compare losses and gradients, then time steps."""
    for tokens in session.settings.tokens:
        session.attempt(f"language model: training step, T={tokens}", _measure, session, tokens)


def _measure(session: Session, tokens: int) -> None:
    settings = session.settings
    shape = MoeShape(settings.experts, settings.top_k, settings.hidden, tokens)
    with ExpertGroup(session.pg, shape, backend=settings.backend, timeout_s=settings.timeout_s) as group:
        models = {name: Model(session, group, name) for name in (OWN, OURS)}
        text = _draw(session, tokens)
        for precision in PRECISIONS:
            found = {name: model.results(text, precision.dtype) for name, model in models.items()}
            worst = worst_differences(session.pg, found[OURS], found[OWN])
            session.send({"language results": {"tokens": tokens, "dtype": precision.name, "differ_by": worst}})
            precision.check(OURS, OWN, worst)
        steps = {
            name: partial(wall_times, session, model.stepper(text, precision.dtype), STEPS)
            for name, model in models.items()
        }
        times = in_turns(session, steps)
    for name, modes in times.items():
        label = {"experts": name, "tokens": tokens, "ranks": settings.ranks, "dtype": precision.name}
        session.send({"language": {**label, **modes}})


def _draw(session: Session, tokens: int) -> Tensor:
    """Return random bytes ``[B, S + 1]``, others on each rank."""
    device = session.device.torch_device
    length = LENGTH if tokens % LENGTH == 0 else tokens
    draws = torch.Generator(device).manual_seed(session.settings.seed * 4096 + session.rank)
    return torch.randint(BYTES, (tokens // length, length + 1), generator=draws, dtype=torch.int64, device=device)


class Model:
    """A language model that is spread over the ranks; the same weights however its experts are reached. Collective.

    Args:
        session: The session.
        group: The group of the experts.
        name: `OURS`, or `OWN`.
    """

    def __init__(self, session: Session, group: ExpertGroup, name: str) -> None:
        device = session.device.torch_device
        self.device_type = device.type
        mesh = init_device_mesh(device.type, (group.num_ranks,))
        torch.manual_seed(session.settings.seed)
        with device:  # where a Router is made
            model = LanguageModel(session.settings, device, lambda seed: _experts(session, group, name, seed))
        experts = parallelize(model, mesh) if name == OURS else _expert_parameters(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=experts)
        fully_shard(model, mesh=mesh, ignored_params=experts)
        self.model = model
        parameters = list(model.parameters())
        # Foreach takes one kind of tensor only. On GPUs torch chooses it by itself; on CPUs, without it, each DTensor
        # would cost the host a dozen dispatches, of which experts that are plain tensors have none.
        kinds = [[one for one in parameters if isinstance(one, DTensor) == sharded] for sharded in (True, False)]
        self.optimizers = [torch.optim.AdamW(kind, lr=LEARNING_RATE, foreach=True) for kind in kinds if kind]

    def results(self, text: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the loss, and this rank's part of the gradients of all weights, by kind. Collective."""
        loss = self._backward(text, dtype)
        return {"loss": loss.detach(), **take_gradients(self.model, KINDS)}

    def stepper(self, text: Tensor, dtype: torch.dtype) -> Callable[[int], None]:
        """Return a training step: forward, backward, AdamW."""

        def step(i: int) -> None:
            self._backward(text, dtype)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad()

        return step

    def _backward(self, text: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = self.model(text[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss


def _expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {one for name, one in model.named_parameters() if "moe.experts" in name}


def _experts(session: Session, group: ExpertGroup, name: str, seed: int) -> nn.Module:
    """Return the experts of one block, with their router."""
    settings = session.settings
    assert settings.model is not None
    columns = settings.hidden // ROUTED
    router = Router(settings.hidden, settings.experts, settings.top_k, seed=seed)
    experts = SwiGLUExperts(group, settings.model.intermediate, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        router.weight[:, columns:] = 0
        router.weight.mul_(ROUTED**0.5)
        experts.down[:, :, :columns] = 0
    if name == OURS:
        return MoELayer(group, experts=experts, router=router)
    everyone = dist.group.WORLD
    assert everyone is not None
    return AllToAllLayer(everyone, experts, router, settings.experts)


class Block(nn.Module):
    """A layer of the model: attention to the bytes before, then experts."""

    def __init__(self, hidden: int, device: torch.device, moe: nn.Module) -> None:
        super().__init__()
        self.heads = hidden // HEAD
        self.attention_norm = nn.RMSNorm(hidden, dtype=torch.float32, device=device)
        self.expert_norm = nn.RMSNorm(hidden, dtype=torch.float32, device=device)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, dtype=torch.float32, device=device)
        self.out = nn.Linear(hidden, hidden, bias=False, dtype=torch.float32, device=device)
        with torch.no_grad():
            self.out.weight[: hidden // ROUTED] = 0
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, S, H]`` for ``[B, S, H]``."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        rows: Tensor = self.moe(self.expert_norm(x).flatten(0, 1))
        return x + rows.view_as(x)


class LanguageModel(nn.Module):
    """Predicts each byte from those before it.

    Args:
        settings: The sizes.
        device: Where the weights are.
        experts: Returns the experts of a block, for the seed of their weights.
    """

    def __init__(self, settings: Settings, device: torch.device, experts: Callable[[int], nn.Module]) -> None:
        super().__init__()
        assert settings.model is not None
        hidden, seeds = settings.hidden, range(settings.model.layers)
        self.embedding = nn.Embedding(BYTES, hidden, dtype=torch.float32, device=device)
        self.blocks = nn.ModuleList(Block(hidden, device, experts(seed)) for seed in seeds)
        self.norm = nn.RMSNorm(hidden, dtype=torch.float32, device=device)
        self.head = nn.Linear(hidden, BYTES, bias=False, dtype=torch.float32, device=device)

    def forward(self, text: Tensor) -> Tensor:
        """Return ``[B, S, 256]`` logits of the next byte for ``[B, S]`` bytes."""
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
