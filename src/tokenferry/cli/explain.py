"""`tokenferry explain`: the bytes of calls, the time that links need for them, the SMs chosen, and why."""

from __future__ import annotations

import argparse

from tokenferry import tuning
from tokenferry.bench.core.inputs import FP8_COLUMNS
from tokenferry.cli.options import check_experts, positive
from tokenferry.cli.screen import Screen
from tokenferry.tuning import Topology
from tokenferry.types import MoeShape

DESCRIPTION = """\
Computes, without any GPU: the bytes that leave each GPU in one call (routing uniform), the time that the links need for
them at least, the SMs that calls take without num_sms, with the reasons, and the GPU memory of a group.
"""
CONTROL_BLOCK_MB = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes; the defaults are DeepSeek-V3's."""
    parser.add_argument("--experts", type=positive, default=256, help="E (default: 256)")
    parser.add_argument("--top-k", type=positive, default=8, help="K (default: 8)")
    parser.add_argument("--hidden", type=positive, default=7168, help="H (default: 7168)")
    parser.add_argument("--tokens", type=positive, default=4096, help="T of the call, and M (default: 4096)")
    parser.add_argument("--ranks", type=positive, default=8, help="R (default: 8)")
    parser.add_argument("--sms", type=positive, default=132, help="SMs of each device (default: 132, an H100 or H200)")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print it."""
    check_experts(args, args.ranks)
    shape = MoeShape(args.experts, args.top_k, args.hidden, args.tokens)
    tuned = tuning.tune(shape, Topology(args.ranks, args.sms))
    moved = tuning.travel(shape, args.ranks, args.tokens, 1)
    screen.line(f"R={args.ranks} T=M={args.tokens} H={args.hidden} K={args.top_k} E={args.experts}, routing uniform")
    screen.line()
    screen.line(
        f"a token goes to {moved.ranks_per_token:.3f} ranks, {moved.remote_per_token:.3f} of them others; "
        f"a rank receives {moved.rows_received:.0f} rows"
    )
    screen.table("what leaves each GPU", ("call", "row bytes", "MB", "us at least", "SMs", "us, its SMs"), _calls(args))
    screen.line(f"us at least: at {tuning.LINK_GBPS:.0f} GB/s, the best that H200 GPUs behind NVSwitch reach;")
    screen.line("us, its SMs: at what they reach with that many SMs. `tokenferry limits` measures this machine")
    screen.line()
    for reason in tuned.reasons:
        screen.line(reason)
    screen.line("num_sms of each call takes precedence")
    screen.line()
    heap = tuning.heap_bytes(shape, args.ranks)
    sizes = f"{CONTROL_BLOCK_MB} MB of flags and counts, and a heap of {heap / 2**20:.0f} MB"
    screen.line(f"window of each rank: {sizes},")
    screen.line(
        f"holding five dispatches of {args.ranks * args.tokens} rows of {2 * args.hidden} bytes (the worst routing), "
        "and for small M the data under way of decode calls;"
    )
    screen.line("at most a quarter of the device's memory; TOKENFERRY_HEAP_MB takes precedence")
    return 0


def _calls(args: argparse.Namespace) -> list[list[str]]:
    shape = MoeShape(args.experts, args.top_k, args.hidden, args.tokens)
    tuned = tuning.tune(shape, Topology(args.ranks, args.sms))
    fp8 = args.hidden + 4 * -(-args.hidden // FP8_COLUMNS)
    bf16, rows = 2 * args.hidden, []
    store = tuning.gbps(tuning.STORE_GBPS, tuned.dispatch_sms)
    load = tuning.gbps(tuning.LOAD_GBPS, tuned.combine_sms)
    push = tuning.gbps(tuning.STORE_GBPS, tuning.num_pushers(tuned.push_sms))
    for name, row_bytes, num_sms, rate in (
        ("dispatch FP8 + scales", fp8, tuned.dispatch_sms, store),
        ("dispatch BF16", bf16, tuned.dispatch_sms, store),
        ("combine BF16", bf16, tuned.combine_sms, load),
        ("combine BF16, user's rows", bf16, tuned.push_sms, push),
    ):
        moved = tuning.travel(shape, args.ranks, args.tokens, row_bytes).bytes_out
        least, real = moved / tuning.LINK_GBPS / 1e3, moved / rate / 1e3
        rows.append([name, str(row_bytes), f"{moved / 1e6:.2f}", f"{least:.1f}", str(num_sms), f"{real:.1f}"])
    return rows
