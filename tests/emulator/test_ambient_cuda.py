"""The states of torch that tests/contract/test_ambient.py tries, on the CUDA backend, on the emulator."""

from contextlib import nullcontext
from typing import Any

import pytest

from support.ambient import RANKS, SHAPE, STATES, Results, calls, handed_over, one_after_the_other, same
from support.emulated_group import EmulatedPair, emulate
from support.emulator import Emulator

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


def results(rank: int, pg: Any, pair: EmulatedPair, name: str | None) -> Results:
    """Ranks are threads here, so the test itself enters what belongs to the process."""
    with STATES[name].of_a_thread(pair.device.type) if name else nullcontext(), pair.open(pg, SHAPE) as group:
        return calls(group, pg)


@pytest.fixture(scope="module")
def plain(pytestconfig) -> list[Results]:
    return emulate(pytestconfig)(RANKS, results, None)


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(run, plain, name):
    with STATES[name].of_the_process():
        found = run(RANKS, results, name)
    for got, want in zip(found, plain, strict=True):
        assert same(got, want) > 100


def test_groups_pass_in_and_out_of_inference_mode(run):
    run(RANKS, one_after_the_other)


@pytest.mark.parametrize("per_node", [RANKS, 1])
def test_what_was_made_in_inference_mode_is_filled_outside_of_it(run, per_node):
    run(RANKS, handed_over, ranks_per_node=per_node)
