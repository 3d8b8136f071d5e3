"""The state of torch around a call changes neither bits nor dtypes of its results, and breaks no group."""

import pytest

from support.ambient import CUDA_STATES, RANKS, STATES, compare, handed_over, one_after_the_other
from support.pairs import CPU_PAIRS, CUDA_PAIRS
from tokenferry.testing import soak, soak_graphs

PLACES = [
    *((pair, state) for pair in CPU_PAIRS for state in STATES),
    *((pair, state) for pair in CUDA_PAIRS for state in CUDA_STATES),
]


@pytest.mark.parametrize(("pair", "state"), PLACES, ids=str)
def test_the_state_of_torch_has_no_say(run, pair, state):
    compared = run(pair, RANKS, compare, state)
    assert min(compared) > 100


def test_groups_pass_in_and_out_of_inference_mode(run, pair):
    run(pair, RANKS, one_after_the_other)


def test_what_was_made_in_inference_mode_is_filled_outside_of_it(run, pair):
    run(pair, RANKS, handed_over)


def soaked(rank, pg, name: str, device: str) -> int:
    """Random calls of every kind, compared with the oracle and the reference, all in a state."""
    state = CUDA_STATES[name]
    with state.of_the_process(), state.of_a_thread(device):
        calls = soak.run(rank, pg, soak.Soak(0.7, seed=7, device=device))
        return calls.checks + soak_graphs.run(rank, pg, soak_graphs.Soak(8, seed=5, device=device)).checks


SOAKED = [
    ("cpu", "float64, set_default_device"),
    ("cpu", "bfloat16, with device"),
    *((p.backend, "cuda") for p in CUDA_PAIRS),
]


@pytest.mark.parametrize(("device", "name"), SOAKED)
def test_soaks_pass_in_other_states(worlds, device, name):
    assert min(worlds(RANKS, device).run(soaked, name, device)) > 48
