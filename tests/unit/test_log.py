"""What a program shows of the logger `tokenferry`: one line about `auto`, and what TOKENFERRY_LOG asks for."""

import os
import subprocess
import sys

import pytest

GROUPS = """
import tokenferry
shape = tokenferry.MoeShape(num_experts=4, top_k=1, hidden=16, max_tokens=4)
for _ in range(2):
    tokenferry.ExpertGroup(None, shape).close()
"""
CHOICE = (
    "ExpertGroup: backend 'auto' chose cpu (a group of one rank needs no transport); not cuda: rank 0 has no CUDA "
    "device"
)
HOW_TO_HIDE = ". To hide this line, name the backend, or set TOKENFERRY_LOG=error"


def shown(program, **variables):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TOKENFERRY_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stderr.splitlines()


def test_what_auto_chose_is_said_once():
    assert shown(GROUPS) == [CHOICE + HOW_TO_HIDE]


@pytest.mark.parametrize("level", ["error", "off"])
def test_it_can_be_hidden(level):
    assert shown(GROUPS, TOKENFERRY_LOG=level) == []
    assert shown(GROUPS, TOKENFERRY_BACKEND="cpu") == []


def test_more_can_be_shown():
    first, second = shown(GROUPS, TOKENFERRY_LOG="info")
    assert first == f"tokenferry: {CHOICE}{HOW_TO_HIDE}"
    assert second == f"tokenferry: {CHOICE}"


def test_a_program_that_sets_up_its_logs_decides():
    program = f"import logging; logging.basicConfig(level=%s, format='mine %%(message)s')\n{GROUPS}"
    assert shown(program % "logging.ERROR") == []
    assert shown(program % "logging.WARNING") == [f"mine {CHOICE}{HOW_TO_HIDE}"]
    assert len(shown(program % "logging.WARNING", TOKENFERRY_LOG="info")) == 2


def test_a_variable_that_is_misspelt_is_shown_at_that_level_too():
    assert shown(GROUPS, TOKENFERRY_BACKEN="cpu", TOKENFERRY_LOG="error") == []
    assert any("did you mean TOKENFERRY_BACKEND?" in line for line in shown(GROUPS, TOKENFERRY_BACKEN="cpu"))
