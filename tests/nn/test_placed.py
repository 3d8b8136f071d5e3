"""Routings of slots, loads of experts, and experts that move: nothing but the ranks that work is different."""

import copy
import gc
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokenferry
from support import placed_jobs as jobs
from tokenferry import MoeShape, Routing
from tokenferry.nn import GroupLimit, MoELayer, Router, clip_grad_norm_, update_biases
from tokenferry.nn.balance import (
    ExpertLoads,
    PlacedRouter,
    Placement,
    ReplicaMap,
    balance,
    move_experts,
    rebalance,
)
from tokenferry.nn.balance.carrier import carried_on
from tokenferry.testing.compare import same_bits

SLOTS = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4])
"""Expert 0 in slots 0, 3 and 6; expert 1 in slots 1 and 5."""
FOUR_RANKS = Placement.of(SLOTS, 4)


def member(rank, nodes=((0, 1, 2, 3),), num_slots=8):
    """What a `ReplicaMap` reads of a group."""
    topology = tokenferry.Topology(rank, nodes)
    made = MoeShape(num_slots, 1, 16, max_tokens=64)
    return SimpleNamespace(shape=made, num_ranks=4, rank=rank, topology=topology, device=torch.device("cpu"))


def group_of_one(num_slots=8, **sizes):
    return tokenferry.ExpertGroup(None, MoeShape(num_slots, 2, 16, **{"max_tokens": 64, **sizes}), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_are_spread_over_replicas(dtype):
    idx = torch.tensor([[0, 1], [0, -1], [0, 4], [1, 0], [0, 0], [-1, 0]], dtype=dtype)
    weights = torch.rand(6, 2)
    got = ReplicaMap(FOUR_RANKS, member(1))(Routing(idx, weights))
    assert got.topk_idx.dtype == dtype
    assert got.topk_weights is weights
    # Token t of rank 1 goes to replica (t + 1) % n.
    assert got.topk_idx.tolist() == [[3, 5], [6, -1], [0, 7], [1, 3], [6, 6], [-1, 0]]


def test_one_token_of_each_rank_does_not_go_to_one_replica():
    found = [ReplicaMap(FOUR_RANKS, member(r))(Routing(torch.tensor([[0]]))).topk_idx.item() for r in range(4)]
    assert found == [0, 3, 6, 0]


def test_ids_out_of_range_stay_out_of_range():
    got = ReplicaMap(FOUR_RANKS, member(0))(Routing(torch.tensor([[5, 8, -2, -1]])))
    outside = got.topk_idx.tolist()[0]
    assert min(outside[:2]) >= 8
    assert outside[2:] == [-2, -1]


@pytest.mark.parametrize(
    "idx", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64, device="meta")]
)
def test_routings_that_are_none(idx):
    with pytest.raises(tokenferry.ShapeError, match=re.escape("expected integers [T, K] on cpu, got")):
        ReplicaMap(FOUR_RANKS, member(0))(Routing(idx))


def test_nearest_replicas():
    """Nodes (0, 2) and (1, 3): expert 0 is on ranks 0, 1, 3; expert 1 on 0 and 2; expert 3 on 2 only."""
    nodes = ((0, 2), (1, 3))
    idx = torch.tensor([[0, 1, 3]] * 4)
    got = [ReplicaMap(FOUR_RANKS, member(r, nodes), nearest=True)(Routing(idx)).topk_idx.T.tolist() for r in range(4)]
    assert got[0] == [[0, 0, 0, 0], [1, 5, 1, 5], [4] * 4]
    assert got[1] == [[3, 6, 3, 6], [5, 1, 5, 1], [4] * 4]
    assert got[2] == [[0, 0, 0, 0], [5, 1, 5, 1], [4] * 4]
    assert got[3] == [[6, 3, 6, 3], [5, 1, 5, 1], [4] * 4]


def test_maps_are_captured_whole_and_follow_placements():
    """A CUDA graph cannot capture what breaks a graph of torch.compile, and keeps the addresses of tensors."""
    with torch.inference_mode():
        to_slots = ReplicaMap(Placement.of(torch.tensor([0, 0, 1, 0, 2, 3, 0, 4]), 4), member(0))
    to_slots.place(FOUR_RANKS)
    tables = [t.data_ptr() for t in vars(to_slots).values() if isinstance(t, torch.Tensor)]
    compiled = torch.compile(lambda idx: to_slots(Routing(idx)).topk_idx, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([[0], [0]])).tolist() == [[0], [3]]
    with torch.inference_mode():
        to_slots.place(Placement.of(SLOTS.flip(0), 4))
    assert [t.data_ptr() for t in vars(to_slots).values() if isinstance(t, torch.Tensor)] == tables
    assert to_slots(Routing(torch.tensor([[4], [0], [0], [0]]))).topk_idx.tolist() == [[0], [4], [7], [1]]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement.of(SLOTS, 2), "expected 8 slots on 4 ranks like the group, got 8 on 2"),
        (Placement.of(torch.arange(12), 4), "got 12 on 4; make the group with MoeShape(num_experts=12, ...)"),
        (Placement.of(SLOTS.expand(2, -1), 4), "expected that of one layer, got 2; use placement.layer(i)"),
        (Placement.of(torch.arange(8), 4), "expected 5 logical experts like before, got 8"),
    ],
)
def test_placements_that_do_not_fit(placement, message):
    to_slots = ReplicaMap(FOUR_RANKS, member(0))
    with pytest.raises(tokenferry.ConfigError, match=re.escape(message)):
        to_slots.place(placement)
    if "before" not in message:
        with pytest.raises(tokenferry.ConfigError, match=re.escape(message)):
            ReplicaMap(placement, member(0))


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpoint"])
def test_replicas_on_one_rank_have_one_gradient(how):
    placement, x = Placement.of(SLOTS, 1), torch.randn(30, 16, dtype=torch.float64)
    with group_of_one(5) as group:
        plain = MoELayer(group, 12, router=Router(16, 5, 2, seed=2), seed=1, dtype=torch.float64)
        (want_out := plain(x)).square().sum().backward()
    with group_of_one() as group:
        router = PlacedRouter(Router(16, 5, 2, seed=2), placement, group)
        layer = MoELayer(group, 12, router=router, seed=1, dtype=torch.float64)
        layer.experts.up.requires_grad_(False)
        if how == "checkpoint":
            out = checkpoint(layer, x, use_reentrant=False)
        else:
            out = (torch.compile(layer, backend="eager") if how == "compiled" else layer)(x)
        torch.testing.assert_close(out, want_out)
        out.square().sum().backward()
        assert layer.experts.up.grad is None
        for name in ("gate", "down"):
            got, want = (getattr(one.experts, name).grad for one in (layer, plain))
            torch.testing.assert_close(got, want[placement.physical_to_logical])
            same_bits(name, got[placement.logical_to_physical[0]], got[[0, 0, 0]])
        torch.testing.assert_close(layer._choice.weight.grad, plain.router.weight.grad)


@pytest.mark.parametrize(
    ("tool", "transport"), [("hand", "process_group"), ("ddp", "auto"), ("fsdp", "auto")], ids=["hand", "ddp", "fsdp"]
)
def test_replicas_are_trained_as_one_expert(worlds, tool, transport):
    """Also while they move; and replicas stay equal, bit for bit."""
    want = jobs.trained_alone()
    slots = jobs.REDUNDANT.physical_to_logical
    assert jobs.REDUNDANT.num_replicas.max() >= 3
    assert min(want["norms"]) > jobs.LIMIT, "clipping is not tried"
    for rank, got in enumerate(worlds(4).run(jobs.replicas_trained, tool, transport)):
        for i in range(5):
            torch.testing.assert_close(got["losses"][i], want["losses"][i][rank], rtol=1e-12, atol=0)
            torch.testing.assert_close(got["norms"][i], want["norms"][i], rtol=1e-12, atol=0)
        for name in got.keys() - {"losses", "norms"}:
            torch.testing.assert_close(got[name], want[name][slots], rtol=1e-9, atol=1e-14)
            first = jobs.REDUNDANT.logical_to_physical[slots, 0]
            same_bits(name, got[name], got[name][first])


@pytest.mark.parametrize("norm_type", [1, 2.0, math.inf])
def test_norms_count_each_expert_once(norm_type):
    x = torch.randn(30, 16, dtype=torch.float64)
    found = {}
    for name, slots in (("plain", torch.arange(5)), ("replicas", SLOTS)):
        with group_of_one(len(slots)) as group:
            router = PlacedRouter(Router(16, 5, 2, seed=2), Placement.of(slots, 1), group)
            layer = MoELayer(group, 12, router=router, seed=1, dtype=torch.float64)
            layer(x).square().sum().backward()
            by_torch = nn.utils.get_total_norm([p.grad for p in layer.parameters()], norm_type)
            before = [p.grad.clone() for p in layer.parameters()]
            found[name] = norm = clip_grad_norm_(layer, 0.5, norm_type)
            for p, grad in zip(layer.parameters(), before, strict=True):
                torch.testing.assert_close(p.grad, (grad * 0.5 / norm).to(p.grad.dtype))
            torch.testing.assert_close(clip_grad_norm_(layer, math.inf, norm_type), norm.new_tensor(0.5))
            assert torch.isclose(norm, by_torch) == (name == "plain" or norm_type == math.inf)
    torch.testing.assert_close(found["replicas"], found["plain"], rtol=1e-12, atol=0)


def test_what_clipping_refuses():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), math.inf)
    for wrong in (model.parameters(), [model.weight]):
        with pytest.raises(tokenferry.ArgumentError, match="pass the model, not its parameters"):
            clip_grad_norm_(wrong, 1.0)
    for wrong in (0, -1.0, math.nan, "2"):
        with pytest.raises(tokenferry.ArgumentError, match="norm_type: expected a number above 0"):
            clip_grad_norm_(model, 1.0, wrong)
    for wrong in (-1.0, math.nan, None):
        with pytest.raises(tokenferry.ArgumentError, match="max_norm: expected a number from 0 on"):
            clip_grad_norm_(model, wrong)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    assert model.weight.grad.isinf().all()


def test_the_state_dict_knows_the_placement():
    placement, other = (Placement.of(slots, 1) for slots in (torch.arange(4), torch.tensor([2, 0, 3, 1])))
    with group_of_one(4) as group:
        one, two = (PlacedRouter(Router(16, 4, 2, seed=i), p, group) for i, p in enumerate((placement, other)))
        x = torch.randn(5, 16)
        want = two(x).topk_idx
        one.load_state_dict(two.state_dict())
        assert torch.equal(one.placement.physical_to_logical, other.physical_to_logical)
        assert torch.equal(one(x).topk_idx, want)
        copied = copy.deepcopy(two)
        two.place(placement)
        assert torch.equal(copied(x).topk_idx, want)
        one.to_empty(device="cpu")
        one.reset_parameters()
        assert torch.equal(
            one(x).topk_idx,
            Placement.of(other.logical_to_physical[:, 0], 1).physical_to_logical[Router(16, 4, 2)(x).topk_idx],
        )


def test_placed_layers_compile():
    with group_of_one() as group, torch.no_grad():
        layer = MoELayer(group, 12, router=PlacedRouter(Router(16, 5, 2), Placement.of(SLOTS, 1), group))
        x = torch.randn(5, 16)
        want, compiled = layer(x), torch.compile(layer, backend="eager")
        torch.testing.assert_close(compiled(x), want)
        layer.router.place(Placement.of(SLOTS.flip(0), 1))
        layer.reset_parameters()
        torch.testing.assert_close(compiled(x), want)


def test_loads_of_one_rank():
    with group_of_one(8) as group:
        idx = torch.tensor([[0, 1], [0, -1], [0, 4], [1, 0]])
        with torch.inference_mode():
            loads, to_slots = ExpertLoads(group, 2), ReplicaMap(Placement.of(SLOTS, 1), group)
            sent = group.dispatch(torch.ones(4, 16), to_slots(Routing(idx)))
            loads.add(sent.expert_counts, layer=1)
        group.decode_dispatch(torch.ones(4, 16), to_slots(Routing(idx)), stats=loads.stats(0))
        loads.add(torch.ones(8, dtype=torch.int32))
    placement = Placement.of(SLOTS, 1)
    assert loads.take(placement).tolist() == [[7, 4, 1, 1, 2], [4, 2, 0, 0, 1]]
    assert loads.take(placement).tolist() == [[0] * 5] * 2
    loads.add(torch.ones(8, dtype=torch.int32), layer=1)
    layers = Placement.of(torch.stack([SLOTS, torch.tensor([4, 3, 2, 1, 0, 0, 0, 0])]), 1)
    assert loads.take(layers).tolist() == [[0] * 5, [4, 1, 1, 1, 1]]
    with pytest.raises(tokenferry.ShapeError, match=re.escape("expected [L] = [8], got [4]")):
        loads.add(torch.ones(4))
    for wrong in (Placement.of(torch.arange(4), 1), Placement.of(SLOTS.expand(3, -1), 1)):
        with pytest.raises(tokenferry.ShapeError, match=re.escape("expected [8] or [2, 8] slots, got")):
            loads.take(wrong)


@pytest.mark.parametrize("slots", [[2, 0, 3, 1], [2, 0, 3, 1, 2, 3]])
def test_layers_draw_the_experts_in_their_slots(slots):
    """So that replicas are equal, and a seed gives the same layer wherever its experts are."""
    x = torch.randn(5, 16)
    placement = Placement.of(torch.tensor(slots), 1)
    with group_of_one(4) as group, torch.no_grad():
        plain = MoELayer(group, 12, seed=3)
        want, weights = plain(x), [p.clone() for p in plain.expert_parameters()]
    with group_of_one(len(slots)) as group, torch.no_grad():
        layer = MoELayer(group, 12, router=PlacedRouter(Router(16, 4, 2, seed=3), placement, group), seed=3)
        for _ in range(2):
            for p, full in zip(layer.expert_parameters(), weights, strict=True):
                assert torch.equal(p, full[layer.router.placement.physical_to_logical])
            torch.testing.assert_close(layer(x), want)
            layer.router.place(Placement.of(placement.physical_to_logical.flip(0), 1))
            for p in layer.parameters():
                p.fill_(torch.nan)
            layer.reset_parameters()


def test_biases_follow_the_loads_of_logical_experts():
    x = torch.randn(9, 16)
    biases = []
    for slots in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        with group_of_one(4) as group:
            router = Router(16, 4, 2, group_limit=GroupLimit(1, 1))
            layer = MoELayer(group, 12, router=PlacedRouter(router, Placement.of(slots, 1), group))
            layer(x)
            update_biases(layer)
            biases.append(router.bias.tolist())
    assert biases[0] == biases[1]
    assert any(biases[0])


@pytest.mark.parametrize(("ranks_per_node", "nearest"), [(4, False), (2, False), (2, True)])
def test_four_ranks_with_replicas_are_one_process(worlds, ranks_per_node, nearest):
    want, rows = jobs.alone()
    full = jobs.weights()
    placements = {"before": jobs.REDUNDANT, "after": jobs.OTHER, "back": jobs.REDUNDANT}
    for rank, got in enumerate(worlds(4).run(jobs.serve, ranks_per_node, nearest)):
        for name, placement in placements.items():
            torch.testing.assert_close(got[f"{name} out"], want[rank], rtol=1e-12, atol=1e-12)
            assert got[f"{name} counts"].tolist() == [rows.tolist()] * 2
            here = placement.physical_to_logical[3 * rank : 3 * rank + 3]
            for part, of_all in zip(got[f"{name} held"], full, strict=True):
                assert torch.equal(part, of_all[here]), f"{name}: wrong experts on rank {rank}"


def test_rows_stay_on_the_node_of_their_sender(worlds):
    for rank, nodes in enumerate(worlds(4).run(jobs.nodes_of_rows)):
        assert nodes == ({rank // 2}, {0})


@pytest.mark.parametrize("placement", [jobs.SHUFFLED, jobs.REDUNDANT], ids=["plain", "replicas"])
def test_checkpoints_know_the_placement(worlds, placement, tmp_path):
    worlds(4).run(jobs.saved, str(tmp_path), placement)
    want, _ = jobs.alone()
    for num_ranks in (4, 2):
        for rank, (slots, out) in enumerate(worlds(num_ranks).run(jobs.loaded, str(tmp_path), placement)):
            assert torch.equal(slots, placement.physical_to_logical)
            torch.testing.assert_close(out, want[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tool", ["hand", "ddp", "fsdp"])
def test_experts_move_while_they_are_trained(worlds, tool):
    """Parameters, gradients and states of AdamW go along: every number is as if nothing had moved."""
    want, got = (worlds(4).run(jobs.trained, tool, moves) for moves in (False, True))
    for one, other in zip(want, got, strict=True):
        for i in range(4):
            torch.testing.assert_close(other["losses"][i], one["losses"][i], rtol=1e-12, atol=0)
        for name in one.keys() - {"losses"}:
            torch.testing.assert_close(
                other[name], one[name], rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_ranks_disagree_about(worlds):
    different = "ArgumentError: move_experts: ranks 0 and 3 passed different placements or tensors; nothing was moved"
    for rank, (errors, kept) in enumerate(worlds(4).run(jobs.refusals)):
        assert kept
        assert [errors[name] for name in ("placement", "tensors", "dtypes")] == [different] * 3
        if rank == 3:
            assert "expected contiguous [L, ...] with L=2, got [3, 4]" in errors["rows"]
        else:
            assert errors["rows"] == "ArgumentError: move_experts: arguments of rank 3 are wrong; nothing was moved"
        assert "got [2, 4] with strides (1, 2)" in errors["strides"]
        assert "got [8] and [8] slots of 8 and 7 experts" in errors["experts"]
        assert "got [8] and [12] slots" in errors["slots"]
        assert "its state 'row' is [3] for a parameter [8, 16, 12]" in errors["state"]


@pytest.mark.parametrize(("backend", "moved_on"), [("nccl", "cuda"), ("gloo", "cpu"), (None, "cpu")])
def test_rows_of_gpus_travel_in_memory_that_the_process_group_can_send(backend, moved_on):
    """gloo says that it has a backend for GPUs, which it has for some collectives only."""

    def backend_of(device):
        if backend is None:
            raise RuntimeError("no backend for cuda")
        return SimpleNamespace(name=lambda: backend)

    found = carried_on(SimpleNamespace(_get_backend=backend_of), torch.device("cuda", 1))
    assert found == torch.device("cuda", 1) if moved_on == "cuda" else found == torch.device("cpu")


def test_only_placed_layers_are_balanced():
    message = "expected a router that is a PlacedRouter, got Identity"
    with group_of_one(4) as group, pytest.raises(tokenferry.ConfigError, match=message):
        rebalance(MoELayer(group, 12, router=nn.Identity()), Placement.of(torch.arange(4), 1))


def placed(group, seed=0, **parts):
    """A layer with 4 experts in 4 slots, by number; ``parts`` are those of another layer."""
    router = parts.pop("router", None) or PlacedRouter(Router(16, 4, 2, seed=seed), NUMBERED, group)
    return MoELayer(group, router=router, seed=seed, **(parts or {"ffn_hidden": 12}))


NUMBERED, REVERSED = (Placement.of(torch.tensor(slots), 1) for slots in ([0, 1, 2, 3], [3, 2, 1, 0]))


@pytest.mark.parametrize(("shared", "own"), [("experts", "a router"), ("router", "experts")])
@pytest.mark.parametrize("copies", [False, True])
def test_experts_that_another_layer_needs_where_they_are_stay(shared, own, copies):
    with group_of_one(4) as group, torch.no_grad():
        one = placed(group, seed=1)
        layers = nn.ModuleList([one, placed(group, seed=2, **{shared: getattr(one, shared)})])
        if copies:
            layers, one = copy.deepcopy(layers), None
        x = torch.randn(5, 16)
        want = [layer(x) for layer in layers]
        for layer in layers:
            with pytest.raises(
                tokenferry.ConfigError, match=f"another MoELayer shares its {shared}, .* it has {own} of"
            ):
                rebalance(layer, REVERSED)
        for layer, out in zip(layers, want, strict=True):
            assert torch.equal(layer(x), out)
        kept = layers[0]
        del layers, layer
        gc.collect()  # the errors had traces
        rebalance(kept, REVERSED)
        torch.testing.assert_close(kept(x), want[0])


def reverse_given(layer, given):
    """Write to the placement with which the layer was made."""
    given.physical_to_logical.copy_(REVERSED.physical_to_logical)


def reverse_returned(layer, given):
    layer.router.placement.physical_to_logical.copy_(REVERSED.physical_to_logical)


@pytest.mark.parametrize("write", [reverse_given, reverse_returned])
def test_placements_that_are_written_to_place_nothing(write):
    with group_of_one(4) as group, torch.no_grad():
        given = Placement.of(torch.arange(4), 1)
        layer, x = placed(group, router=PlacedRouter(Router(16, 4, 2), given, group)), torch.randn(5, 16)
        want, up = layer(x), layer.experts.up.clone()
        write(layer, given)
        assert torch.equal(layer(x), want)
        assert layer.router.placement.physical_to_logical.tolist() == [0, 1, 2, 3]
        rebalance(layer, REVERSED)
        torch.testing.assert_close(layer(x), want)
        assert torch.equal(layer.experts.up, up.flip(0))


def test_experts_go_where_a_written_placement_says():
    """Not by half: its tensors say the same only until one of them is written to."""
    with group_of_one(4) as group, torch.no_grad():
        layer, x = placed(group), torch.randn(5, 16)
        want, other = layer(x), Placement.of(torch.arange(4), 1)
        other.physical_to_logical.copy_(torch.tensor([2, 1, 0, 3]))
        rebalance(layer, other)
        torch.testing.assert_close(layer(x), want)
        other.physical_to_logical[0] = 1
        with pytest.raises(tokenferry.ConfigError, match="no slot of layer 0 holds expert 2"):
            rebalance(layer, other)
        torch.testing.assert_close(layer(x), want)


def test_a_placement_loaded_past_autograd_is_seen():
    with group_of_one(4) as group:
        layer = placed(group)
        layer.state_dict()["router._extra_state"].data.copy_(REVERSED.physical_to_logical)
        assert layer.router.placement.physical_to_logical.tolist() == [3, 2, 1, 0]


def test_layers_that_share_experts_and_router_move_together():
    with group_of_one(4) as group, torch.no_grad():
        one = placed(group)
        other, x = placed(group, experts=one.experts, router=one.router), torch.randn(5, 16)
        want, copied = one(x), copy.deepcopy(one)
        rebalance(one, REVERSED)
        assert torch.equal(one.experts.up, copied.experts.up.flip(0))
        rebalance(copied, REVERSED)
        for layer in (one, other, copied):
            torch.testing.assert_close(layer(x), want)


STATES_THAT_STAY = (
    ({"factors": [torch.ones(4)]}, "its state 'factors' is a list for a parameter"),
    ({"factors": {"row": torch.ones(4)}}, "its state 'factors' is a dict for a parameter"),
    ({"row": torch.ones(3)}, r"its state 'row' is \[3\] for a parameter"),
)


@pytest.mark.parametrize(("state", "message"), STATES_THAT_STAY)
def test_states_that_cannot_be_moved_are_refused(state, message):
    with group_of_one(4) as group:
        layer = placed(group)
        optimizer = torch.optim.SGD(layer.parameters())
        optimizer.state[layer.experts.up].update(step=1, rate=0.5, kind="x", unused=None, count=torch.tensor(2.0))
        rebalance(layer, REVERSED, optimizer=optimizer)
        optimizer.state[layer.experts.up].update(state)
        before = layer.experts.up.clone()
        with pytest.raises(tokenferry.ConfigError, match=message):
            rebalance(layer, NUMBERED, optimizer=optimizer)
        assert torch.equal(layer.experts.up, before)
        assert layer.router.placement.physical_to_logical.tolist() == [3, 2, 1, 0]


def test_an_optimizer_has_all_experts_that_are_trained():
    with group_of_one(4) as group:
        layer = placed(group)
        some = torch.optim.SGD([layer.experts.gate, layer.experts.up])
        for optimizer, lacks in ((some, "down"), (torch.optim.SGD(layer.router.parameters()), "gate")):
            with pytest.raises(tokenferry.ConfigError, match=f"it does not have the parameter {lacks} of the experts"):
                rebalance(layer, REVERSED, optimizer=optimizer)
        layer.experts.down.requires_grad_(False)
        rebalance(layer, REVERSED, optimizer=some)


def test_replicas_are_brought_together_as_the_documents_say(worlds):
    for parameters in worlds(2).run(jobs.brought_together):
        for before, after in parameters:
            assert not torch.equal(before[0], before[3])
            assert torch.equal(after, before[[0, 1, 2, 0, 4, 1]])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.bool])
def test_one_rank_moves_any_dtype(dtype):
    old, new = (Placement.of(slots, 1) for slots in (torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 1, 0])))
    rows = torch.arange(4)[:, None].repeat(1, 3).to(dtype)
    scalars = torch.tensor([0, 1, 2, 0]).to(dtype)
    with group_of_one(4) as group:
        move_experts(group, [rows, scalars], old, new)
    assert scalars.float().tolist() == torch.tensor([2, 1, 1, 0]).to(dtype).float().tolist()
    assert rows.float()[:3, 0].tolist() == scalars.float()[:3].tolist()


def test_balanced_loads_of_a_skewed_router():
    """The rows that ranks really get are what `rank_loads` says."""
    draws = torch.Generator().manual_seed(0)
    idx = torch.multinomial(1 / torch.arange(1, 33), 4096, replacement=True, generator=draws)[:, None]
    loads = torch.bincount(idx.flatten(), minlength=32)
    placement = balance(loads, 4, 36)
    slots = [ReplicaMap(placement, member(r, num_slots=36))(Routing(idx[r::4])).topk_idx for r in range(4)]
    got = torch.bincount(torch.cat(slots).flatten() // 9, minlength=4)
    assert got.tolist() == pytest.approx(placement.rank_loads(loads).tolist(), rel=0.05)
    assert got.max() <= 1.05 * got.float().mean()


class ToTheFirst(Router):
    """Chooses expert 0 for every token."""

    def forward(self, x):
        found = super().forward(x)
        return Routing(torch.zeros_like(found.topk_idx), torch.ones_like(found.topk_weights))


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_loads_belong_to_the_experts_that_had_them(moves):
    """They are counted by slot, and another expert may be there when the biases are updated."""
    group = tokenferry.ExpertGroup(None, MoeShape(4, 1, 16, 64), backend="cpu")
    router = ToTheFirst(16, 4, 1, group_limit=GroupLimit(1, 1))
    layer = MoELayer(group, 32, router=PlacedRouter(router, Placement.of(torch.arange(4), 1), group))
    layer(torch.randn(20, 16))
    for slots in ([3, 2, 1, 0], [1, 0, 3, 2])[:moves]:
        rebalance(layer, Placement.of(torch.tensor(slots), 1))
        layer(torch.randn(20, 16))
    update_biases(layer, rate=1.0)
    assert router.bias.tolist() == [-1, 1, 1, 1]
    update_biases(layer, rate=1.0)
    assert router.bias.tolist() == [-1, 1, 1, 1], "no load is counted twice"


@pytest.mark.parametrize("moves", range(4))
def test_a_copy_follows_what_is_loaded_into_it(moves):
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, 64), backend="cpu")
    layer = MoELayer(
        group, 32, router=PlacedRouter(Router(16, 4, 2), Placement.of(torch.tensor([1, 0, 3, 2]), 1), group)
    )
    for _ in range(moves):
        rebalance(layer, Placement.of(torch.tensor([1, 0, 3, 2]), 1))
    copied = copy.deepcopy(layer)
    copied.state_dict()["router._extra_state"].copy_(torch.arange(4))
    assert copied.router.placement.physical_to_logical.tolist() == [0, 1, 2, 3]
    assert layer.router.placement.physical_to_logical.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("num_experts", [3, 8])
def test_the_router_has_the_experts_of_the_placement(num_experts):
    group = tokenferry.ExpertGroup(None, MoeShape(6, 2, 16, 64), backend="cpu")
    placement = Placement.of(torch.tensor([0, 1, 2, 3, 0, 1]), 1)
    with pytest.raises(tokenferry.ConfigError, match=f"num_experts={num_experts}.*; expected 4, as the placement has"):
        MoELayer(group, 8, router=PlacedRouter(Router(16, num_experts, 2), placement, group))
