"""Tests that need a GPU; they use the helpers of the contract suite. Without a GPU some of them run on the emulator."""

from pathlib import Path

import pytest
import torch

from support.emulated_tests import is_chosen, is_possible
from support.emulator import Emulator

HERE = Path(__file__).parent

LEFT_OUT = "needs an NVIDIA GPU; with EMULATE=all the emulator runs it, too"


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)
    if cache is not None:
        Emulator.folder = cache.mkdir("emulator")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    missing = Emulator.missing()
    for item in items:
        if HERE not in item.path.parents:
            continue
        if not is_possible(item):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        elif missing or not is_chosen(item):
            item.add_marker(pytest.mark.skip(reason=missing or LEFT_OUT))
