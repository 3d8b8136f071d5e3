"""Run compute-sanitizer over the virtual-rank tests: python tests/cuda/sanitize.py [tool ...] [pytest options].

Tools: memcheck, racecheck, synccheck (default: all three). A tool makes kernels 10 to 50 times slower, so it gets a
choice of tests: each kernel, each way through it, on up to three ranks. Kernels of several ranks wait for each other,
so they have to run side by side; for a tool that runs them one after another there is ``--one-rank``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMEOUT_S = "120"
PADDING = "4096"
"""Bytes behind each allocation that memcheck keeps free."""
FOUND = 9
"""Exit status of a run in which a tool found something."""

ONE_RANK = (
    "test_dispatch_plan.py::test_every_routing[even-1]",
    "test_dispatch_plan.py::test_most_experts_and_choices[experts-1-4096-64-dtype0]",
    "test_dispatch_plan.py::test_too_many_rows_for_a_tight_capacity_are_recorded_by_all[1-masked]",
    "test_dispatch_kernel.py::test_every_kind_of_row[1-16-w1-first-int64]",
    "test_dispatch_kernel.py::test_every_kind_of_row[1-7168-56xint32-columns-w0-first-int32]",
    "test_dispatch_kernel.py::test_every_kind_of_row[1-65536-4xfloat32-rows-w1-first-int64]",
    "test_dispatch_fused.py::test_every_routing[half_dropped-1]",
    "test_dispatch_fused.py::test_too_many_rows_for_a_tight_capacity_are_recorded_by_all[1-experts-three0]",
    "test_dispatch_expand.py::test_copies_and_zeros[experts-1-Sizes(row_bytes=48, scale_bytes=4, weights=True)]",
    "test_dispatch_expand.py::test_copies_and_zeros[masked-1-Sizes(row_bytes=2000, scale_bytes=3, weights=False)]",
    "test_combine_pull.py::test_every_type[1-bfloat16]",
    "test_combine_pull.py::test_every_type[1-float64]",
    "test_combine_push.py::test_every_type[1-bfloat16]",
    "test_combine_push.py::test_uneven_plans[1-own]",
    "test_decode_dispatch.py::test_every_routing[half_dropped-1]",
    "test_decode_dispatch.py::test_choices_that_the_host_prepares[33-1]",
    "test_decode_dispatch.py::test_many_experts[4096-64-1]",
    "test_decode_dispatch.py::test_rows_of_every_size[1-1032]",
    "test_decode_dispatch.py::test_no_rank_has_tokens[1]",
    "test_decode_combine.py::test_every_routing[repeated-1-exact]",
    "test_decode_combine.py::test_every_routing[repeated-1-fast]",
    "test_decode_combine.py::test_many_experts[255-33-1-exact]",
    "test_decode_combine.py::test_no_rank_has_tokens[1-fast]",
    "test_node_kernels.py::test_the_worked_example",
    "test_node_kernels.py::test_any_routing[6-3-4-int64]",
    "test_node_kernels.py::test_routing_for_each_node_in_the_room_of_all_tokens[200]",
    "test_node_kernels.py::test_what_comes_from_other_nodes[0-140-int64]",
    "test_node_kernels.py::test_what_comes_from_other_nodes[0-0-int32]",
    "test_node_kernels.py::test_parcels_for_other_nodes[2064-scale_dtype2-3-columns-cut1]",
    "test_node_kernels.py::test_sums_at_home[torch.bfloat16-1]",
    "test_node_kernels.py::test_other_calls_on_other_nodes[True-0]",
    "test_node_kernels.py::test_the_state_of_a_chunk[7]",
    "test_decode_rails.py::test_records[8-3-1]",
    "test_decode_rails.py::test_what_came_is_taken_apart",
    "test_decode_rails.py::test_weights_for_other_nodes[True]",
)
MORE_RANKS = (
    "test_dispatch_plan.py::test_the_worked_example",
    "test_dispatch_plan.py::test_every_routing[half_dropped-3]",
    "test_dispatch_plan.py::test_a_bad_index_on_every_rank",
    "test_dispatch_kernel.py::test_every_kind_of_row[3-48-1xfloat32-rows-w1-first-int32]",
    "test_dispatch_kernel.py::test_every_kind_of_row[2-8208-3xfloat64-columns-w1-first-int64]",
    "test_dispatch_kernel.py::test_one_plan_again_and_again",
    "test_dispatch_fused.py::test_every_routing[repeated-3]",
    "test_dispatch_fused.py::test_any_number_of_blocks[3]",
    "test_dispatch_fused.py::test_some_ranks_run_three_kernels[large1]",
    "test_combine_pull.py::test_every_type[2-float32]",
    "test_combine_pull.py::test_tables_of_every_width[33]",
    "test_combine_pull.py::test_weights_are_returned",
    "test_combine_pull.py::test_stage_copies_rows_below_the_counts",
    "test_combine_push.py::test_every_type[3-bfloat16]",
    "test_combine_push.py::test_rows_of_every_size[14336-(1,)]",
    "test_combine_push.py::test_any_grid_and_a_late_rank[1-1-None]",
    "test_combine_push.py::test_any_grid_and_a_late_rank[4-2-0]",
    "test_combine_push.py::test_some_ranks_rows_are_fetched[3-fetched1]",
    "test_combine_push.py::test_weights_are_returned[8]",
    "test_sync.py::test_plans_of_different_dispatches[dispatch]",
    "test_decode_dispatch.py::test_every_routing[repeated-3]",
    "test_decode_dispatch.py::test_every_number_of_choices[repeated-33]",
    "test_decode_dispatch.py::test_casts[2-bfloat16-FLOAT32]",
    "test_decode_dispatch.py::test_casts[2-float32-UE8M0]",
    "test_decode_dispatch.py::test_many_calls_at_once[2]",
    "test_decode_dispatch.py::test_sends_before_their_receives[2]",
    "test_decode_dispatch.py::test_a_bad_index_sends_nothing[False-12]",
    "test_decode_combine.py::test_every_routing[half_dropped-3-exact]",
    "test_decode_combine.py::test_rows_of_every_size[3-float32-fast]",
    "test_decode_combine.py::test_every_encoding[2-bfloat16-fp8-exact]",
    "test_decode_combine.py::test_every_encoding[2-float16-logfmt10-fast]",
    "test_decode_combine.py::test_many_calls_at_once[2]",
    "test_decode_combine.py::test_sends_before_their_receives[2-exact]",
    "test_rail_messages.py::test_messages_come_as_they_were_sent[2-some]",
    "test_rail_messages.py::test_bodies_of_other_sizes_are_left_where_they_are",
)


def command(sanitizer: str, tool: str, tests: list[str]) -> list[str]:
    """One run of one tool."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    # Failed calls of the driver are checked where they are made, and the bindings ask for functions that it may lack.
    # memcheck keeps bytes free behind each allocation, and finds accesses that would otherwise hit the next one.
    more = ["--report-api-errors", "no", "--padding", PADDING] if tool == "memcheck" else []
    return [sanitizer, "--tool", tool, *more, "--error-exitcode", str(FOUND), *pytest]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help="which tools; all if none is named")
    parser.add_argument("--one-rank", action="store_true", help="only tests in which no rank waits for another")
    options, more = parser.parse_known_args()
    unknown = set(options.tools) - set(TOOLS)
    if unknown:
        parser.error(f"tools: expected some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error(f"compute-sanitizer is neither on PATH nor at {sanitizer}; it comes with the CUDA toolkit")
    tests = [str(HERE / test) for test in (ONE_RANK if options.one_rank else ONE_RANK + MORE_RANKS)]
    environment = {**os.environ, "VIRTUAL_TIMEOUT_S": TIMEOUT_S, "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or tensors are parts of larger blocks, and all is in bounds
    failed = []
    for tool in options.tools or TOOLS:
        sys.stdout.write(f"compute-sanitizer --tool {tool}: {len(tests)} tests\n")
        sys.stdout.flush()
        code = subprocess.run(command(sanitizer, tool, [*tests, *more]), env=environment, check=False).returncode
        if code:
            failed.append(f"{tool} ({'it found something' if code == FOUND else f'exit status {code}'})")
    if failed:
        sys.stderr.write(f"sanitize: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
