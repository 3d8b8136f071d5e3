"""The soak itself: that it runs, and that it finds what is wrong."""

import argparse
from unittest import mock

import pytest
import torch

from tokenferry import ExpertGroup, Quantized
from tokenferry.testing import chaos, soak, soak_graphs
from tokenferry.testing.world import World, WorldError, check_gpus


def test_a_soak_of_three_seconds():
    with World(3) as world:
        tallies = world.run(soak.run, soak.Soak(3.0, seed=5))
    assert len({tally.calls for tally in tallies}) == 1
    assert tallies[0].calls > 20
    assert tallies[0].checks > 20


def wrong(rank, pg, method: str, call_number: int) -> None:
    """From some call on, one method gives rows with other signs in their first column."""
    right, calls = getattr(ExpertGroup, method), 0

    def spoil(self, *args, **kwargs):
        nonlocal calls
        result = right(self, *args, **kwargs)
        x = result.x.data if isinstance(result.x, Quantized) else result.x
        calls += x.numel() > 0
        if calls >= call_number:
            x.view(-1, x.shape[-1])[..., 0] *= -1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertGroup, method, spoil)
        soak.run(rank, pg, soak.Soak(40.0, seed=1))  # ends with the first wrong row


@pytest.mark.parametrize("method", ["dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine"])
def test_a_soak_finds_a_wrong_row(method):
    with World(1) as world, pytest.raises(WorldError) as caught:
        world.run(wrong, method, 5)
    assert isinstance(caught.value.errors[0], AssertionError)
    assert "differ" in str(caught.value.errors[0])


@pytest.mark.parametrize("nodes", [["--ranks", "2"], ["--ranks", "4", "--ranks-per-node", "2"]], ids=" ".join)
def test_the_command(capsys, nodes):
    assert soak.main(["--seconds", "0.2", *nodes, "--seed", "3"]) == 0
    assert f"over {nodes[1]} ranks (cpu)" in capsys.readouterr().out


def test_gpus_are_counted_without_cuda():
    """Ranks of `chaos` are forked, and CUDA works in no child of a process that has asked it."""
    with (
        mock.patch.object(torch.cuda, "is_available", side_effect=AssertionError("it asks CUDA")),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
    ):
        check_gpus(argparse.ArgumentParser(), "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [soak, soak_graphs, chaos], ids=lambda module: module.__name__)
def test_a_machine_without_gpus(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cuda"])
    assert ended.value.code == 3
    assert "--device cuda: torch sees no GPU; use --device cpu" in capsys.readouterr().err


def fail(rank, pg, plan) -> None:
    raise AssertionError("3 of 4 values differ")


def test_the_command_fails_if_a_result_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(soak, "run", fail)
    assert soak.main(["--seconds", "0.2", "--ranks", "1"]) == 1
    assert "FAILED in chunk 0 of seed 0" in capsys.readouterr().out


def test_large_values_are_exact():
    numbers = torch.arange(100)
    rows = soak.soak_large.numbered(numbers, 64)
    assert rows.abs().max() <= 15
    assert rows.abs().min() >= 1
    assert len({tuple(row.tolist()) for row in rows}) == 100, "every token has a row of its own"
