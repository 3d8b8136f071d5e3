"""Jobs that run a `MoELayer` on the GPUs of the ranks, and the same layer on their CPUs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.pairs import Pair
from tokenferry import ExpertGroup, MoeShape, Scale
from tokenferry.nn import (
    GELUExperts,
    GroupLimit,
    LayerOptions,
    MoELayer,
    Router,
    RouterOptions,
    SwiGLUExperts,
    auxiliary_losses,
)
from tokenferry.nn.balance import ExpertLoads, PlacedRouter, Placement, balance, rebalance

HIDDEN, FFN = 64, 48
SHAPE = MoeShape(num_experts=4, top_k=2, hidden=HIDDEN, max_tokens=32)
SLOTS = replace(SHAPE, num_experts=8)
"""Two slots for each expert, for placements."""


@dataclass(frozen=True)
class Kind:
    """What a layer is made of.

    Attributes:
        dtype: Of its rows and experts.
        shared: Whether it has a shared expert.
        experts: Makes its experts; None: SwiGLU.
        losses: Whether its router has auxiliary losses, drops choices, and keeps to one of two groups of experts.
        rows: FP8 rows on the way to the experts.
        products: Products in FP8.
        placed: Whether each expert has a replica.
        bound: Norm of the difference to the layer on the CPU over the norm. Products on a GPU round otherwise.
    """

    dtype: torch.dtype
    shared: bool = False
    experts: Callable[..., nn.Module] | None = None
    losses: bool = False
    rows: Scale | None = None
    products: bool = False
    placed: bool = False
    bound: float = 2e-2


KINDS = {
    "float32": Kind(torch.float32, bound=1e-5),
    "bfloat16": Kind(torch.bfloat16),
    "float16": Kind(torch.float16, bound=5e-3),
    "shared": Kind(torch.bfloat16, shared=True),
    "gelu": Kind(torch.bfloat16, experts=GELUExperts),
    "losses and capacity": Kind(torch.bfloat16, losses=True),
    "FP8 rows": Kind(torch.bfloat16, rows=Scale.POWER_OF_TWO),
    "FP8 products": Kind(torch.bfloat16, products=True, bound=5e-2),
    "placed": Kind(torch.bfloat16, placed=True),
}


def make_layer(group: ExpertGroup, kind: Kind) -> MoELayer:
    """Return the same layer on each device."""
    shared = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=kind.dtype) if kind.shared else None
    if shared is not None:
        nn.init.normal_(shared.weight, std=HIDDEN**-0.5, generator=torch.Generator().manual_seed(3))
        shared.to(group.device)
    options = LayerOptions(shared=shared, quantize=kind.rows)
    with group.device:
        router = Router(
            HIDDEN,
            4,
            2,
            group_limit=GroupLimit(2, 1) if kind.losses else None,
            options=RouterOptions(losses=kind.losses, capacity_factor=1.25 if kind.losses else None),
        )
    if kind.placed:
        router = PlacedRouter(router, Placement.of(torch.arange(8) % 4, group.num_ranks), group)
    if kind.experts is None and not kind.products:
        return MoELayer(group, FFN, router=router, options=options, dtype=kind.dtype)
    make = kind.experts or SwiGLUExperts
    experts = make(group, FFN, dtype=kind.dtype, **({"fp8": True} if kind.products else {}))
    return MoELayer(group, experts=experts, router=router, options=options)


def draw(rank: int, num_tokens: int, kind: Kind) -> Tensor:
    """Return rows of this rank, on the CPU."""
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(8 + rank)).to(kind.dtype)


def stepped(layer: MoELayer, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the output, the gradients of rows and weights, and what the layer counted; on the CPU."""
    x = x.clone().requires_grad_()
    out = run(x)
    loss = out.float().square().mean()
    router = layer.router.router if isinstance(layer.router, PlacedRouter) else layer.router
    if router.options.losses:
        losses = auxiliary_losses(layer)
        loss = loss + 0.1 * losses.balance + 0.01 * losses.z
    loss.backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: local(p.grad) for name, p in layer.named_parameters()}
    layer.zero_grad()
    return {name: value.float().cpu() for name, value in found.items()} | {"counts": layer.expert_counts.cpu()}


def local(x: Tensor) -> Tensor:
    """Return the part of this rank."""
    return x.to_local() if hasattr(x, "to_local") else x


HOW: dict[str, Callable[[MoELayer], Callable[[Tensor], Tensor]]] = {
    "eager": lambda layer: layer,
    "checkpointed": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager"),
    "generated": lambda layer: torch.compile(layer),
}
"""How a layer runs; "generated": with the code that torch.compile generates, for which it needs compilers."""


def layers(rank: int, pg: dist.ProcessGroup, pair: Pair, name: str, hows: tuple[str, ...]) -> None:
    """Compare a layer on GPUs with the same one on CPUs, and the ways to run it with one another."""
    kind = KINDS[name]
    shape = SLOTS if kind.placed else SHAPE
    opened = pair.open(pg, shape, timeout_s=120.0)  # ranks may compile for as long
    with opened as group, ExpertGroup(pg, shape, backend="cpu") as on_cpu:
        group.warmup()
        layer, reference = make_layer(group, kind), make_layer(on_cpu, kind)
        for how in hows:
            torch._dynamo.reset()
            run = HOW[how](layer)
            for num_tokens in (24, 7 * rank):
                x = draw(rank, num_tokens, kind)
                want = stepped(reference, reference, x)
                got = stepped(layer, run, x.to(group.device))
                assert got.keys() == want.keys()
                for part, value in want.items():
                    compare(f"{name}, {how}, T={num_tokens}: {part}", got[part], value, kind.bound)


def compare(what: str, got: Tensor, want: Tensor, bound: float) -> None:
    """Check the norm of the difference, and numbers of rows exactly."""
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what}: {got.tolist()}, expected {want.tolist()}"
        return
    off, size = (got - want).norm().item(), want.norm().item()
    assert off <= bound * size, f"{what}: off by {off:.3g} of {size:.3g}"


def balanced(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """Count loads, place experts by them, and move the experts; the layer computes what it did before."""
    with pair.open(pg, SLOTS) as group:
        group.warmup()
        layer = make_layer(group, KINDS["placed"])
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        x = draw(rank, 24, KINDS["placed"]).to(group.device)
        layer(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        want, loads = stepped(layer, layer, x), ExpertLoads(group)
        loads.add(layer.expert_counts)
        found = loads.take(layer.router.placement)
        assert int(found.sum()) == group.num_ranks * 24 * 2
        placement = balance(found, num_slots=8, num_ranks=group.num_ranks).layer(0)
        assert placement != layer.router.placement
        rebalance(layer, placement, optimizer=optimizer)
        got = stepped(layer, layer, x)
        for part in ("out", "x", "router.router.weight"):
            compare(part, got[part], want[part], 1e-2)
