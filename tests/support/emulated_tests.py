"""Which tests of tests/cuda run on the emulator: a selection, or with EMULATE=all every one that can."""

from __future__ import annotations

import os

import pytest

FILES = (
    *(
        "test_dispatch_plan.py",
        "test_dispatch_layout.py",
        "test_dispatch_kernel.py",
        "test_dispatch_fused.py",
        "test_combine_pull.py",
        "test_combine_push.py",
        "test_dispatch_expand.py",
        "test_node_kernels.py",
        "test_sync.py",
    ),
    *("test_decode_dispatch.py", "test_decode_combine.py", "test_decode_rails.py", "test_rail_messages.py"),
)
"""Tests of single kernels."""
RANKS = (1, 2, 3)
NEED_TIME = (
    "test_a_late_rank_is_waited_for_and_the_time_counted",
    "test_the_time_is_added_up",
    "test_a_rank_that_never_launches",
    "test_all_waiting_ranks_name_the_same_rank",
)
"""Tests of deadlines of milliseconds, which busy CPUs do not keep."""
LARGE_ROWS = 10_000
"""Bytes: rows of this size take seconds in dispatch_expand."""


def is_possible(item: pytest.Item) -> bool:
    """Return whether the emulator can run a test."""
    return item.path.name in FILES


def is_chosen(item: pytest.Item) -> bool:
    """Return whether a test runs wherever there is no GPU."""
    if os.environ.get("EMULATE") == "all":
        return True
    name, params = item.originalname, item.callspec.params if hasattr(item, "callspec") else {}
    if name in NEED_TIME or params.get("num_ranks", 1) not in RANKS:
        return False
    return not (
        item.path.name == "test_dispatch_expand.py" and "sizes" in params and params["sizes"].row_bytes > LARGE_ROWS
    )
