"""The program of `examples/` that trains a language model: its losses depend neither on the ranks nor on the tool."""

import re
from pathlib import Path

import pytest
import torch

from support.example_jobs import refuse_example, run_example, start_example

PROGRAM = Path(__file__).parents[2] / "examples" / "train_language_model.py"
STEPS, SAVED = 7, 4


def losses(printed: str) -> dict[int, float]:
    """Return the loss of each step that a run printed."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss ([\d.]+), ", printed, re.MULTILINE)}


def trained(worlds, ranks: int, *arguments: object) -> dict[int, float]:
    printed, *others = worlds(ranks).run(run_example, str(PROGRAM), "--steps", str(STEPS), *map(str, arguments))
    assert not any(others), "rank 0 speaks for all"
    assert "experts received 1024 rows in the last step" in printed
    return losses(printed)


@pytest.fixture(scope="module")
def whole_run(worlds, tmp_path_factory):
    """Return the losses of two ranks with FSDP2, and a checkpoint from the middle of that run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = trained(worlds, 2, "--checkpoints", folder, "--save-every", SAVED)
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
    return found, folder / f"step-{SAVED}"


def test_both_tools_have_the_same_losses(worlds, whole_run):
    assert trained(worlds, 2, "--parallel", "ddp") == pytest.approx(whole_run[0], rel=1e-5)


def test_a_run_goes_on_with_other_ranks_and_the_other_tool(worlds, whole_run):
    """On four ranks with DistributedDataParallel, and on one, as a user starts it."""
    want, checkpoint = whole_run
    rest = {step: loss for step, loss in want.items() if step > SAVED}
    assert trained(worlds, 4, "--resume", checkpoint, "--parallel", "ddp") == pytest.approx(rest, rel=1e-5)
    alone = start_example(PROGRAM, "--steps", STEPS, "--resume", checkpoint)
    assert losses(alone) == pytest.approx(rest, rel=1e-5)


@pytest.mark.parametrize("tool", ["fsdp", "ddp"])
def test_bfloat16(worlds, whole_run, tool):
    got = trained(worlds, 2, "--parallel", tool, "--bf16")
    assert got == pytest.approx(whole_run[0], rel=1e-2)
    assert got != whole_run[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--save-every", 2), "expected a positive number, and --checkpoints"),
        (("--text", Path(__file__).parents[1] / "nn"), "expected more than 32 bytes in .md and .txt files, got 0"),
        (("--text", "nowhere"), "--text: there is no folder nowhere"),
        (("--resume", "step-9"), "--resume: there is no folder step-9"),
        (("--steps", 0), "expected more than the 0 that are done"),
    ],
    ids=["--save-every", "--text", "no folder", "--resume", "--steps"],
)
def test_what_is_refused(worlds, arguments, message):
    assert message in worlds(2).run(refuse_example, str(PROGRAM), *map(str, arguments))[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_large_model_is_not_made_on_cpus(worlds):
    said = worlds(2).run(refuse_example, str(PROGRAM), "--large")[0]
    assert "--large: a model of 6.7 billion parameters is for GPUs, and torch sees none" in said
