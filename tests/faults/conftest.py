"""Faults are tested on the pairs of the contract suite."""

import pytest

from support.pairs import PAIRS, Pair


@pytest.fixture(params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param
