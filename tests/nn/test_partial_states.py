"""State dicts with a part of a placed layer: experts and their slots come together, or the layer stays as it is."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import MoELayer, Router
from tokenferry.nn.balance import PlacedRouter, Placement, rebalance

ELSEWHERE = [2, 0, 3, 1]
SLOTS = "router._extra_state"
NO_EXPERTS = re.escape(f"{SLOTS} says that the slots hold the experts {ELSEWHERE}, this layer has [0, 1, 2, 3], and")
NO_SLOTS = re.escape(f"the state has experts.* but not {SLOTS}")


def group_of(pg=None):
    return tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, max_tokens=32), backend="cpu")


def placed(group, slots=(0, 1, 2, 3), **options):
    placement = Placement.of(torch.tensor(slots, device="cpu"), group.num_ranks)
    return MoELayer(group, 8, router=PlacedRouter(Router(16, 4, 2, **options), placement, group))


def rows(rank=0):
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(rank))


def without(state, word):
    return {name: value for name, value in state.items() if word not in name}


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(
    ("word", "message"), [("experts", NO_EXPERTS), ("experts.up", NO_EXPERTS), ("_extra", NO_SLOTS)]
)
def test_half_of_a_placed_layer_is_refused(word, message, around):
    with group_of() as group, torch.no_grad():
        one, two = placed(group, seed=1), placed(group)
        rebalance(one, Placement.of(torch.tensor(ELSEWHERE), 1))
        if word == "_extra":
            one, two = placed(group, seed=1), one
            message = f"{message}, .* this layer has the experts {re.escape(str(ELSEWHERE))} in its slots"
        want, state = two(rows()), one.state_dict()
        target = two
        if around:
            target = nn.ModuleDict({"block": nn.ModuleList([two])})
            state = {f"block.0.{name}": value for name, value in state.items()}
            message = message.replace(re.escape(SLOTS), re.escape(f"block.0.{SLOTS}")).replace("experts\\.", "block.*")
        for module in (target, copy.deepcopy(target)):
            for strict in (False, True):
                with pytest.raises(tokenferry.ConfigError, match=message):
                    module.load_state_dict(without(state, word), strict=strict)
        assert torch.equal(two(rows()), want), "something was loaded"


def test_what_the_errors_advise_works():
    with group_of() as group, torch.no_grad():
        one, two = placed(group, seed=1), placed(group)
        want = one(rows())
        rebalance(one, Placement.of(torch.tensor(ELSEWHERE), 1))
        state = one.state_dict()
        with pytest.raises(tokenferry.ConfigError, match=NO_EXPERTS) as caught:
            two.load_state_dict(without(state, "experts"), strict=False)
        slots = re.search(r"rebalance\(layer, (Placement.of\(.*\))\)$", str(caught.value)).group(1)
        rebalance(two, eval(slots, {"Placement": Placement, "torch": torch}))
        two.load_state_dict(without(state, "experts"), strict=False)
        torch.testing.assert_close(two(rows()), want)
        # And the other way round, with experts that were brought into the order of the slots by hand.
        experts = without(without(state, "router"), "_extra")
        with pytest.raises(tokenferry.ConfigError, match=r"put router\._extra_state = layer.router.placement"):
            two.load_state_dict(experts, strict=False)
        two.load_state_dict({**experts, SLOTS: two.router.placement.physical_to_logical}, strict=False)
        torch.testing.assert_close(two(rows()), want)


def test_experts_in_slots_are_refused_by_layers_without_slots():
    with group_of() as group, torch.no_grad():
        one, two = placed(group), MoELayer(group, 8, seed=5)
        want = two(rows())
        two.load_state_dict(one.state_dict(), strict=False)  # in the order of their numbers
        torch.testing.assert_close(two.experts.up, one.experts.up)
        assert not torch.equal(two(rows()), want)
        rebalance(one, Placement.of(torch.tensor(ELSEWHERE), 1))
        with pytest.raises(tokenferry.ConfigError, match="this layer has them in the order of their numbers"):
            two.load_state_dict(one.state_dict(), strict=False)


class Renamed(nn.Module):
    """Experts that know older names of their parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        state[f"{prefix}scale"] = state.pop(f"{prefix}old", state.get(f"{prefix}scale"))

    def forward(self, rows, offsets):
        return rows * self.scale.repeat_interleave(offsets.diff())[:, None]


def test_right_loads_are_not_refused():
    with group_of() as group, torch.no_grad():
        one, there = placed(group, seed=1), placed(group, ELSEWHERE, seed=1)
        state = there.state_dict()
        one.load_state_dict(state)
        assert torch.equal(one(rows()), there(rows()))
        one.load_state_dict(without(state, "experts"), strict=False)  # the same slots
        one.load_state_dict({"router.router.weight": state["router.router.weight"]}, strict=False)
        one.load_state_dict({}, strict=False)
        # A state of a layer without slots has its experts in the order of their numbers.
        placed(group).load_state_dict(MoELayer(group, 8).state_dict(), strict=False)
        plain, adapted = MoELayer(group, 8), MoELayer(group, 8)
        for layer in (plain, adapted):
            layer.experts.adapter = nn.Parameter(torch.zeros(4, 2))
        plain.load_state_dict({"experts.adapter": adapted.experts.adapter}, strict=False)
        # In place first, as by torch.distributed.checkpoint, and then by a call.
        for keep_vars in (False, True):
            other = placed(group)
            own = other.state_dict(keep_vars=keep_vars)
            for name, value in own.items():
                value.copy_(state[name])
            other.load_state_dict(own)
            assert torch.equal(other(rows()), there(rows()))
        routers = [
            PlacedRouter(Router(16, 4, 2), Placement.of(torch.tensor(s), 1), group) for s in ([0, 1, 2, 3], ELSEWHERE)
        ]
        layers = [MoELayer(group, experts=Renamed(), router=router) for router in routers]
        old = {name.replace("scale", "old"): value for name, value in layers[1].state_dict().items()}
        layers[0].load_state_dict(old)


def test_full_states_that_torch_completes_are_partial():
    whole = StateDictOptions(full_state_dict=True, strict=False)
    with group_of() as group, torch.no_grad():
        there, layer = placed(group, ELSEWHERE, seed=1), placed(group, seed=1)
        state = get_model_state_dict(there, options=whole)
        with pytest.raises(tokenferry.ConfigError, match=NO_EXPERTS):
            set_model_state_dict(layer, without(state, "experts"), options=whole)
        set_model_state_dict(layer, state, options=whole)
        want = layer(rows())
        set_model_state_dict(layer, {"router.router.weight": state["router.router.weight"]}, options=whole)
        assert torch.equal(layer(rows()), want)


def test_experts_on_meta_get_their_slots_first():
    """They have no values that could be in the wrong ones, and are drawn by their slots later."""
    with group_of() as group, torch.no_grad():
        there = placed(group, ELSEWHERE)
        with torch.device("meta"):
            layer = placed(group)
        layer.load_state_dict({SLOTS: there.router.placement.physical_to_logical}, strict=False)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert torch.equal(layer(rows()), there(rows()))


def frozen(group):
    layer = placed(group).requires_grad_(False)
    layer.router.requires_grad_(True)
    return layer


def resume(rank, pg, folder):
    """Resume the trained part of a layer whose frozen experts have moved; return the errors, and what was kept."""
    trained, errors = StateDictOptions(ignore_frozen_params=True, strict=False), []
    with group_of(pg) as group, torch.no_grad():
        layer, x = frozen(group), rows(rank)
        want = layer(x)
        elsewhere = Placement.of(torch.tensor(ELSEWHERE), pg.size())
        rebalance(layer, elsewhere)
        state = get_model_state_dict(layer, options=trained)
        dcp.save(state, checkpoint_id=folder, process_group=pg)
        shared = [get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))]
        dist.broadcast_object_list(shared, group=pg)
        whole = shared[0]

        def loaded_in_place(again):
            mine = get_model_state_dict(again, options=trained)
            dcp.load(mine, checkpoint_id=folder, process_group=pg)
            set_model_state_dict(again, mine, options=trained)

        loads = {
            "in place": loaded_in_place,
            "by a call": lambda again: again.load_state_dict(state, strict=False),
            "from rank 0": lambda again: set_model_state_dict(
                again,
                without(whole, "experts") if rank == 0 else {},
                options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
            ),
        }
        for name, load in loads.items():
            again = frozen(group)
            with pytest.raises(tokenferry.ConfigError, match=NO_EXPERTS) as caught:
                load(again)
            errors.append(f"{name}: {caught.value}")
            torch.testing.assert_close(again(x), want)
            rebalance(again, elsewhere)
            if name != "from rank 0":  # where torch asks for all keys
                load(again)
            torch.testing.assert_close(again(x), want)
        # A full state without slots leaves those of the layer, whose experts it does not have.
        router_only = without(without(whole, "experts"), "_extra")
        set_model_state_dict(layer, router_only, options=StateDictOptions(full_state_dict=True, strict=False))
        torch.testing.assert_close(layer(x), want)
        with pytest.raises(tokenferry.ConfigError, match=NO_SLOTS):
            layer.load_state_dict(without(layer.state_dict(), "_extra"), strict=False)
        complete = {"full_state_dict": True, "broadcast_from_rank0": True}
        again = frozen(group)
        set_model_state_dict(again, dict(whole) if rank == 0 else {}, options=StateDictOptions(**complete))
        torch.testing.assert_close(again(x), want)
    return errors


def test_frozen_experts_that_have_moved_are_not_forgotten(worlds, tmp_path):
    for errors in worlds(2).run(resume, str(tmp_path)):
        assert len(errors) == 3


class Remembers(Router):
    """A router with a state of its own."""

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


@pytest.mark.parametrize("state", [torch.tensor(3.0), torch.arange(4).flip(0), torch.empty(4, device="meta")])
def test_the_state_of_a_router_of_ones_own_is_not_read(state):
    with group_of() as group:
        one, two = (MoELayer(group, 8, router=Remembers(16, 4, 2)) for _ in range(2))
        one.router.kept, two.router.kept = state, None
        two.load_state_dict(one.state_dict())
        assert two.router.kept is state
        plain = MoELayer(group, 8)
        if state.shape == (4,) and not state.is_meta:
            with pytest.raises(tokenferry.ConfigError, match="make it with a PlacedRouter"):
                plain.load_state_dict(one.state_dict(), strict=False)
        else:
            plain.load_state_dict(one.state_dict(), strict=False)
