"""Jobs about experts that are not in the order of their numbers, on ranks of a world."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import tokenferry
from support.training_jobs import whole
from tokenferry import MoeShape, Routing
from tokenferry.nn import MoELayer, Router, clip_grad_norm_, parallelize
from tokenferry.nn.balance import ExpertLoads, PlacedRouter, Placement, ReplicaMap, balance, move_experts, rebalance

EXPERTS, TOP_K, HIDDEN, FFN, TOKENS = 8, 2, 16, 12, 24
ZIPF = 1 / torch.arange(1, EXPERTS + 1)
PLAIN = Placement.of(torch.arange(EXPERTS), 4)
SHUFFLED = Placement.of(torch.tensor([5, 0, 7, 2, 1, 3, 4, 6]), 4)
"""From PLAIN, expert 2 and 3 swap ranks with others, 6 and 4 change slots, and some go round in a circle."""
REDUNDANT = balance(ZIPF, 4, 12)
OTHER = balance(ZIPF.flip(0), 4, 12)
LIMIT = 0.02
"""The norm to which gradients are clipped, below that of every step."""


class Steep(nn.Module):
    """A router without gradients that chooses the first experts most often."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = Router(HIDDEN, EXPERTS, TOP_K, seed=4).requires_grad_(False)

    def forward(self, x: Tensor) -> Routing:
        logits = x.detach().float() @ self.choice.weight.T + (8 * ZIPF).log()
        weights, experts = logits.softmax(-1).topk(TOP_K)
        return Routing(experts, weights)


def parts_of(layer: MoELayer) -> list[Tensor]:
    """This rank's part of the parameters of the experts."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in layer.expert_parameters()]


def shape(placement: Placement) -> MoeShape:
    return MoeShape(placement.num_slots, TOP_K, HIDDEN, max_tokens=4 * TOKENS)


def rows(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)


def weights() -> list[Tensor]:
    """The parameters of all experts, by number."""
    with tokenferry.ExpertGroup(None, shape(PLAIN), backend="cpu") as group:
        layer = MoELayer(group, FFN, router=Steep(), seed=3, dtype=torch.float64)
        return [p.detach().clone() for p in layer.expert_parameters()]


def placed_layer(group: tokenferry.ExpertGroup, placement: Placement, *, nearest: bool = False) -> MoELayer:
    """A layer with the experts of `weights` in the slots of a placement."""
    router = PlacedRouter(Steep(), placement, group, nearest=nearest)
    return MoELayer(group, FFN, router=router, seed=3, dtype=torch.float64)


def alone(step: int = 0) -> tuple[list[Tensor], Tensor]:
    """What each of four ranks gets for its tokens from all experts, and the rows of each expert."""
    with tokenferry.ExpertGroup(None, shape(PLAIN), backend="cpu") as group, torch.no_grad():
        layer = placed_layer(group, Placement.of(torch.arange(EXPERTS), 1))
        found = [layer(rows(rank, step)) for rank in range(4)]
        chosen = torch.cat([layer.router(rows(rank, step)).topk_idx for rank in range(4)])
        return found, torch.bincount(chosen.flatten(), minlength=EXPERTS)


def serve(rank: int, pg: dist.ProcessGroup, ranks_per_node: int, nearest: bool) -> dict[str, Any]:
    """Outputs with replicas, before and after the experts have moved; where they are; counts of both kinds of calls."""
    found: dict[str, Any] = {}
    with tokenferry.ExpertGroup(pg, shape(REDUNDANT), ranks_per_node=ranks_per_node) as group, torch.no_grad():
        layer, loads = placed_layer(group, REDUNDANT, nearest=nearest), ExpertLoads(group, 2)
        parameters = layer.expert_parameters()
        for name, placement in (("before", None), ("after", OTHER), ("back", REDUNDANT)):
            if placement is not None:
                rebalance(layer, placement)
            found[f"{name} out"] = layer(rows(rank))
            assert layer.expert_counts is not None
            loads.add(layer.expert_counts, layer=1)
            x = rows(rank).float()
            group.decode_dispatch(x, layer.router(rows(rank)), stats=loads.stats(0))
            found[f"{name} counts"] = loads.take(layer.router.placement)
            found[f"{name} held"] = [part.clone() for part in parts_of(layer)]
        assert all(p is q for p, q in zip(layer.expert_parameters(), parameters, strict=True))
    return found


def nodes_of_rows(rank: int, pg: dist.ProcessGroup) -> tuple[set[int], set[int]]:
    """The nodes that this rank sends an expert's tokens to: one with replicas on both nodes, one with all on one."""
    placement = Placement.of(torch.tensor([0, 1, 1, 2, 0, 3, 0, 4]), 4)
    made = MoeShape(8, 1, HIDDEN, max_tokens=TOKENS)
    with tokenferry.ExpertGroup(pg, made, ranks_per_node=2) as group:
        nearest = ReplicaMap(placement, group, nearest=True)
        slots = [nearest(Routing(torch.full((TOKENS, 1), e))).topk_idx for e in (0, 1)]
        return tuple(set((s // 4).flatten().tolist()) for s in slots)


def trained(rank: int, pg: dist.ProcessGroup, tool: str, moves: bool) -> dict[str, Any]:
    """Four steps of AdamW; experts move after each, or never. Losses, then parameters and states by expert."""
    found: dict[str, Any] = {"losses": []}
    with tokenferry.ExpertGroup(pg, shape(PLAIN)) as group:
        torch.manual_seed(0)
        layer = placed_layer(group, PLAIN)
        model = prepared(nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), layer), tool, pg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=tool == "fsdp")
        for step in range(4):
            loss = (model(rows(rank, step)) - rows(rank, step).roll(1, -1)).square().mean()
            loss.backward()
            if moves and step == 1:  # with gradients that are still to be used
                rebalance(layer, SHUFFLED, optimizer=optimizer)
            optimizer.step()
            if moves and step == 2:
                rebalance(layer, PLAIN, optimizer=optimizer)
            optimizer.zero_grad()
            if moves and step == 0:
                rebalance(layer, balance(ZIPF, 4, EXPERTS), optimizer=optimizer)
            found["losses"].append(loss.detach())
        for i, p in enumerate(layer.expert_parameters()):
            found[f"parameter {i}"] = whole(p)
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {i}"] = whole(optimizer.state[p][name])
    return found


def replicas_trained(rank: int, pg: dist.ProcessGroup, tool: str, transport: str) -> dict[str, Any]:
    """Five clipped steps of AdamW of experts with replicas, some of which move, as does a moving average of them.

    Return losses and norms; parameters, averages and states by slot.
    """
    found: dict[str, Any] = {"losses": [], "norms": []}
    with tokenferry.ExpertGroup(pg, shape(REDUNDANT), transport=transport) as group:
        torch.manual_seed(0)
        layer = placed_layer(group, REDUNDANT)
        model = prepared(nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), layer), tool, pg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=tool == "fsdp")
        average = None if tool == "fsdp" else AveragedModel(layer, avg_fn=get_ema_avg_fn(0.5))

        def move(placement: Placement) -> None:
            rebalance(layer, placement, optimizer=optimizer)
            if average is not None:
                rebalance(average.module, placement)

        for step in range(5):
            for part in range(2):  # gradients add up
                loss_of(model, rank, 2 * step + part).backward()
            if step == 1:
                move(OTHER)
            if tool == "hand":
                for p in layer.replicated_parameters() + list(model[0].parameters()):
                    if p.grad is not None:
                        dist.all_reduce(p.grad, group=pg)
                        p.grad /= pg.size()
            found["norms"].append(clip_grad_norm_(model, LIMIT))
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(layer)
            if step == 2:
                move(REDUNDANT)
            found["losses"].append(loss_of(model, rank, 100).detach())
        for i, p in enumerate(layer.expert_parameters()):
            found[f"parameter {i}"] = whole(p)
            if average is not None:
                found[f"average {i}"] = whole(average.module.expert_parameters()[i])
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {i}"] = whole(optimizer.state[p][name])
    return found


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """The loss of a rank's tokens."""
    return (model(rows(rank, step)) - rows(rank, step).roll(1, -1)).square().mean()


def trained_alone() -> dict[str, Any]:
    """What `replicas_trained` should find, by one process without replicas: losses of all ranks; by expert."""
    found: dict[str, Any] = {"losses": [], "norms": []}
    with tokenferry.ExpertGroup(None, shape(PLAIN), backend="cpu") as group:
        torch.manual_seed(0)
        layer = placed_layer(group, Placement.of(torch.arange(EXPERTS), 1))
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), layer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        average = AveragedModel(layer, avg_fn=get_ema_avg_fn(0.5))
        for step in range(5):
            for part in range(2):
                torch.stack([loss_of(model, rank, 2 * step + part) for rank in range(4)]).mean().backward()
            found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT))
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(layer)
            found["losses"].append([loss_of(model, rank, 100).detach() for rank in range(4)])
        for i, p in enumerate(layer.expert_parameters()):
            found[f"parameter {i}"] = p.detach()
            found[f"average {i}"] = average.module.expert_parameters()[i].detach()
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {i}"] = optimizer.state[p][name]
    return found


def prepared(model: nn.Sequential, tool: str, pg: dist.ProcessGroup) -> nn.Module:
    if tool == "fsdp":
        mesh = init_device_mesh("cpu", (pg.size(),))
        fully_shard(model, mesh=mesh, ignored_params=parallelize(model, mesh))
    elif tool == "ddp":
        parallelize(model)
        return DistributedDataParallel(model)
    return model


def brought_together(rank: int, pg: dist.ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """Give replicas that differ the values of the first one, as docs/balance.md says; return both, of all slots."""
    found, placement = [], Placement.of(torch.tensor([0, 1, 2, 0, 3, 1]), 2)
    with tokenferry.ExpertGroup(pg, shape(placement)) as group, torch.no_grad():
        layer = MoELayer(group, FFN, router=PlacedRouter(Router(HIDDEN, 4, TOP_K), placement, group))
        first = placement.logical_to_physical[placement.physical_to_logical, 0]
        for p in layer.expert_parameters():
            p.to_local().add_(torch.arange(3)[:, None, None] + 3 * rank)
            before = whole(p)
            p.copy_(distribute_tensor(p.full_tensor()[first], p.device_mesh, p.placements))
            found.append((before, whole(p)))
    return found


def saved(rank: int, pg: dist.ProcessGroup, folder: str, placement: Placement) -> None:
    """Save a layer with these experts in its slots."""
    with tokenferry.ExpertGroup(pg, shape(placement)) as group:
        dcp.save(placed_layer(group, placement).state_dict(), checkpoint_id=folder, process_group=pg)


def loaded(rank: int, pg: dist.ProcessGroup, folder: str, old: Placement) -> tuple[Tensor, Tensor]:
    """Load it into a layer with another placement; return the slots, and what this rank gets for its tokens."""
    with tokenferry.ExpertGroup(pg, shape(old)) as group, torch.no_grad():
        slots = old.physical_to_logical.flip(0)
        layer = placed_layer(group, Placement.of(slots, pg.size()))
        dcp.load(layer.state_dict(), checkpoint_id=folder, process_group=pg)
        out = layer(rows(rank))
        return layer.router.placement.physical_to_logical, out


def refusals(rank: int, pg: dist.ProcessGroup) -> tuple[dict[str, str], bool]:
    """The errors of calls that ranks disagree about, and whether nothing was moved and the group still works."""
    errors, last = {}, rank == pg.size() - 1
    with tokenferry.ExpertGroup(pg, shape(PLAIN)) as group:
        layer = placed_layer(group, PLAIN)
        before = [part.clone() for part in parts_of(layer)]
        factored = torch.optim.SGD(layer.expert_parameters(), momentum=0.9)
        factored.state[layer.expert_parameters()[0]]["row"] = torch.zeros(3)
        mine = torch.zeros(3 if last else 2, 4)
        calls = {
            "placement": lambda: rebalance(layer, SHUFFLED if last else PLAIN),
            "tensors": lambda: move_experts(group, [torch.zeros(2, 5 if last else 4)], PLAIN, SHUFFLED),
            "dtypes": lambda: move_experts(
                group, [torch.zeros(2, 4).to(torch.int32 if last else torch.float32)], PLAIN, SHUFFLED
            ),
            "rows": lambda: move_experts(group, [mine], PLAIN, SHUFFLED),
            "strides": lambda: move_experts(group, [torch.zeros(4, 2).T], PLAIN, SHUFFLED),
            "experts": lambda: rebalance(layer, Placement.of(torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), 4)),
            "slots": lambda: rebalance(layer, REDUNDANT),
            "state": lambda: rebalance(layer, SHUFFLED, optimizer=factored),
        }
        for name, call in calls.items():
            try:
                call()
            except tokenferry.TokenferryError as error:
                errors[name] = f"{type(error).__name__}: {error}"
        after = parts_of(layer)
        kept = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        kept &= torch.equal(layer.router.placement.physical_to_logical, PLAIN.physical_to_logical)
        layer(rows(rank))
        rebalance(layer, SHUFFLED)
        return errors, kept
