"""The soak of decode graphs, without graphs: that it runs, finds what is wrong, and says how to see it again."""

import pytest
import torch

from tokenferry import ExpertGroup, MoeShape, Quantized
from tokenferry.testing import soak, soak_graphs
from tokenferry.testing.world import World, WorldError


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_kind(ranks):
    with World(ranks) as world:
        tallies = world.run(soak_graphs.run, soak_graphs.Soak(100, seed=5))
    drawn = [soak_graphs.kind_of(5, number) for number in range(100)]
    assert set(drawn) == {*soak_graphs.KINDS, soak_graphs.WIDE}
    scaled = sum(kind.fp8 is not None for kind in drawn)
    assert {tally.checks for tally in tallies} == {6 * 100 + scaled}


def spoil_one(result, plan, what: str) -> None:
    """Change one value of a result, or of its plan."""
    if what == "sum":
        result.x.view(torch.int16)[-1, 5] ^= 1
    elif what == "rows":
        data = result.x.data.view(torch.uint8) if isinstance(result.x, Quantized) else result.x.view(torch.int16)
        data[0, 0, 3] ^= 1
    elif what == "scales" and isinstance(result.x, Quantized):
        result.x.scale[0, 0, -1] *= 2
    elif what == "expert_counts":
        result.expert_counts[1] += 1
    elif what == "src_range":
        plan.src_range[0] += 1 << 32
    elif what == "src_token":
        plan.src_token[0, 0] += 1
    elif what == "row_weights":
        plan.row_weights[0, 0] += 1.0


def wrong(rank, pg, what: str, from_call: int) -> None:
    """From some call on, results have a wrong value."""
    method = "decode_combine" if what in ("sum", "src_range") else "decode_dispatch"  # a combine looks at its plan
    right, calls = getattr(ExpertGroup, method), 0

    def spoil(self, *args, **kwargs):
        nonlocal calls
        result = right(self, *args, **{**kwargs, "return_hook": False})
        calls += 1
        if calls >= from_call:
            spoil_one(result, args[1] if method == "decode_combine" else result.plan, what)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertGroup, method, spoil)
        soak_graphs.run(rank, pg, soak_graphs.Soak(60, seed=1))


@pytest.mark.parametrize("what", soak_graphs.Findings.NAMES)
def test_it_finds_a_wrong_value(what):
    """It says which, and in which replay: not before the first that is wrong."""
    with World(1) as world, pytest.raises(WorldError) as caught:
        world.run(wrong, what, 21)
    error = caught.value.errors[0]
    assert isinstance(error, AssertionError)
    text = str(error)
    assert f"{what}: " in text
    number = int(text.split("replay ")[1].split()[0])
    assert 20 <= number < 40, text
    assert f"--seed 1 --first {number} --replays 1" in text
    assert str(soak_graphs.kind_of(1, number)) in text


def test_a_replay_can_be_drawn_again():
    device, kind = torch.device("cpu"), soak_graphs.KINDS[0]
    one, again, other = (soak_graphs.draw(kind, 3, device, 7, number) for number in (4, 4, 5))
    assert one.x.equal(again.x)
    assert one.topk_idx.equal(again.topk_idx)
    assert one.topk_weights.equal(again.topk_weights)
    assert not one.x.equal(other.x)


def test_weights_add_up_exactly_and_products_do_not():
    inputs = soak_graphs.draw(soak_graphs.KINDS[0], 2, torch.device("cpu"), 1, 0)
    weights = inputs.topk_weights
    assert weights.sum(2).double().equal(weights.double().sum(2))
    products = weights[0, :, :1] * inputs.x[0].float()
    assert not products.double().equal(weights[0, :, :1].double() * inputs.x[0].double())


def test_the_command(capsys):
    assert soak_graphs.main(["--replays", "4", "--ranks", "2", "--seed", "3", "--first", "97"]) == 0
    assert "4 replays over 2 ranks (cpu)" in capsys.readouterr().out


def nodes_of(rank, pg, plan) -> soak_graphs.Tally:
    with ExpertGroup(pg, MoeShape(4, 1, 16, 1), backend=plan.device) as group:
        return soak_graphs.Tally(1, group.topology.num_nodes)


def test_the_command_across_nodes(capsys, monkeypatch):
    assert soak_graphs.main(["--replays", "3", "--ranks", "4", "--ranks-per-node", "2", "--first", "97"]) == 0
    monkeypatch.setattr(soak_graphs, "run", nodes_of)
    assert soak_graphs.main(["--replays", "1", "--ranks", "4", "--ranks-per-node", "2"]) == 0
    assert ", 2 results of rank 0 checked" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("command", [soak_graphs.main, soak.main])
def test_nodes_that_are_not_equally_large(capsys, command):
    with pytest.raises(SystemExit):
        command(["--ranks", "4", "--ranks-per-node", "3"])
    assert "--ranks-per-node 3: does not divide --ranks 4" in capsys.readouterr().err


def fail(rank, pg, plan) -> None:
    raise AssertionError("3 of 4 values differ")


def test_the_command_fails_if_a_result_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(soak_graphs, "run", fail)
    assert soak_graphs.main(["--replays", "1", "--ranks", "1", "--seed", "11"]) == 1
    assert "FAILED: seed 11, after replay 0" in capsys.readouterr().out
