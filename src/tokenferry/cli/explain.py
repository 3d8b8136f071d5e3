"""`tokenferry explain`: the bytes of calls, the time that links need for them, the SMs chosen, and why."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenferry import tuning
from tokenferry.bench.core.inputs import FP8_COLUMNS
from tokenferry.bench.report import about
from tokenferry.cli.cuda_limits import refused_ranks, refused_shape
from tokenferry.cli.options import SIZES, check_experts, positive
from tokenferry.cli.output import add_json, write_json
from tokenferry.cli.screen import Screen
from tokenferry.cost.calls import FIXED_US, PLACES_US
from tokenferry.errors import ConfigError
from tokenferry.tuning import Machine
from tokenferry.types import MoeShape

DESCRIPTION = """\
Computes, without any GPU: the bytes that leave each GPU in one call (routing uniform), their time at the rate of the
links, the SMs that calls take without num_sms, with the reasons, and the GPU memory of a group. It looks at no machine:
it assumes NVLink behind NVSwitch, as the times of SMs were measured with it, unless --gbps names other links.
"""
CONTROL_BLOCK_MIB = 1
FROM_TOKENS = 2048
"""With fewer tokens the host decides how long a dispatch with a new routing takes."""


@dataclass(frozen=True, slots=True)
class Link:
    """What carries bytes out of a GPU.

    Attributes:
        gbps: 10^9 bytes a second at most.
        why: Where that is from.
        measured: Whether that is what the times of SMs were measured with.
    """

    gbps: float
    why: str
    measured: bool = False


NVLINK = Link(tuning.LINK_GBPS, "NVLink, the best rate of 8 H200 behind NVSwitch; 4 reached 356", measured=True)
LINKS = {
    "nvlink": NVLINK,
    "pcie4": Link(31.5, "PCIe 4.0: 16 lanes of 16 GT/s, 128 bits of 130, of which headers take a part; not measured"),
    "pcie5": Link(63.0, "PCIe 5.0: 16 lanes of 32 GT/s, 128 bits of 130, of which headers take a part; not measured"),
}
"""The links that have a name; those of PCIe are the rates of the standard."""


def link(text: str) -> Link:
    """Parse a rate in GB/s, or the name of a link.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text in LINKS:
        return LINKS[text]
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return Link(float(text), "as --gbps says")
    raise argparse.ArgumentTypeError(f"expected GB/s above 0, or {', '.join(LINKS)}, got {text!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes; the defaults are DeepSeek-V3's."""
    parser.add_argument("--experts", type=positive, default=256, help=f"{SIZES['experts']} (default: 256)")
    parser.add_argument("--top-k", type=positive, default=8, help=f"{SIZES['top_k']} (default: 8)")
    parser.add_argument("--hidden", type=positive, default=7168, help=f"{SIZES['hidden']} (default: 7168)")
    parser.add_argument(
        "--tokens", type=positive, default=4096, help="tokens of each rank, T, and the most of any, M (default: 4096)"
    )
    parser.add_argument("--ranks", type=positive, default=8, help=f"{SIZES['ranks']} (default: 8)")
    parser.add_argument("--sms", type=positive, default=132, help="SMs of each device (default: 132, an H100 or H200)")
    parser.add_argument(
        "--gbps",
        type=link,
        default=NVLINK,
        metavar="GBPS",
        help=f"GB/s that leave each device at most, or {', '.join(LINKS)} (default: nvlink, {NVLINK.gbps:.0f} GB/s, "
        "measured; `tokenferry doctor` says what the links of a machine are, `tokenferry limits` measures them)",
    )
    add_json(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print it."""
    check_experts(args, args.ranks)
    _check_cuda(args)
    shape, machine = MoeShape(args.experts, args.top_k, args.hidden, args.tokens), Machine(args.ranks, args.sms)
    found = explained(shape, machine, args.gbps)
    show(found, args.gbps, screen)
    if args.json is not None:
        write_json({"schema": 1, **about.about(args.command_line), **found}, args.json, screen)
    return 0


def _check_cuda(args: argparse.Namespace) -> None:
    """Check that a group on GPUs could have these sizes.

    Raises:
        ConfigError: none can.
    """
    shape = MoeShape(args.experts, args.top_k, args.hidden, args.tokens)
    remedy = "a node has no more; `tokenferry plan` estimates several"
    for why in (*refused_ranks("--ranks", args.ranks, remedy), *refused_shape(shape)):
        raise ConfigError(why)


def explained(shape: MoeShape, machine: Machine, link: Link = NVLINK) -> dict[str, Any]:
    """Return everything that is computed, ready for JSON. Pure."""
    ranks, tokens = machine.num_ranks, shape.max_tokens
    moved = tuning.travel(shape, ranks, tokens, 1)
    return {
        "sizes": {"ranks": ranks, "sms": machine.num_sms, **asdict(shape)},
        "link_gbps": link.gbps,
        "link": link.why,
        "ranks_per_token": moved.ranks_per_token,
        "remote_per_token": moved.remote_per_token,
        "rows_received": moved.rows_received,
        "calls": list(_calls(shape, machine, link.gbps)),
        "reasons": list(tuning.tune(shape, machine).reasons),
        "heap_bytes": tuning.heap_bytes(shape, ranks),
        "heap_rows": ranks * tokens,
    }


def show(found: Mapping[str, Any], link: Link, screen: Screen) -> None:
    """Print it."""
    sizes = found["sizes"]
    screen.line(
        f"R={sizes['ranks']} T=M={sizes['max_tokens']} H={sizes['hidden']} K={sizes['top_k']} "
        f"E={sizes['num_experts']}, routing uniform"
    )
    screen.line()
    screen.line(
        f"a token goes to {found['ranks_per_token']:.3f} ranks, {found['remote_per_token']:.3f} of them others; "
        f"a rank receives {found['rows_received']:.0f} rows"
    )
    rows = [
        [
            one["call"],
            str(one["row_bytes"]),
            f"{one['bytes_out'] / 1e6:.2f}",
            f"{one['us_at_link_gbps']:.1f}",
            str(one["num_sms"]),
            f"{one['us']:.1f}",
        ]
        for one in found["calls"]
    ]
    at = f"us at {link.gbps:g} GB/s"
    screen.table("what leaves each GPU", ("call", "row bytes", "MB", at, "SMs", "us, its SMs"), rows)
    assumed = (
        "" if link is not NVLINK else "; assumed, since no machine was looked at: --gbps names others, such as pcie4"
    )
    screen.line(f"{at}: {link.why}{assumed};")
    screen.line(
        f"us, its SMs: at what H200 reach with that many SMs{'' if link.measured else ', and no faster than that'}. "
        "`tokenferry limits` measures this machine, `tokenferry doctor` says what its links are"
    )
    screen.line(
        f"both are of bytes alone. A call takes about {FIXED_US:.0f} us more, and a dispatch with a new routing about "
        f"{PLACES_US:.0f} beyond that, below T={FROM_TOKENS} more, since it waits for its host. "
        "`tokenferry plan --nodes 1` adds these, and has decode calls, which are for few tokens"
    )
    screen.line()
    for reason in found["reasons"]:
        screen.line(reason)
    screen.line("num_sms of each call takes precedence")
    screen.line()
    heap = f"{CONTROL_BLOCK_MIB} MiB of flags and counts, and a heap of {found['heap_bytes'] / 2**20:.0f} MiB"
    screen.line(f"window of each rank: {heap},")
    screen.line(
        f"holding five dispatches of {found['heap_rows']} rows of {2 * sizes['hidden']} bytes (the worst routing), "
        "and for small M the data under way of decode calls;"
    )
    screen.line("at most a quarter of the device's memory; TOKENFERRY_HEAP_MB (MiB) takes precedence")


def _calls(shape: MoeShape, machine: Machine, gbps: float) -> Iterator[dict[str, Any]]:
    tuned = tuning.tune(shape, machine)
    fp8, bf16 = shape.hidden + 4 * -(-shape.hidden // FP8_COLUMNS), 2 * shape.hidden
    store = tuning.gbps(tuning.STORE_GBPS, tuned.dispatch_sms)
    load = tuning.gbps(tuning.LOAD_GBPS, tuned.combine_sms)
    push = tuning.gbps(tuning.STORE_GBPS, tuning.num_pushers(tuned.push_sms))
    for name, row_bytes, num_sms, reached in (
        ("dispatch FP8 + scales", fp8, tuned.dispatch_sms, store),
        ("dispatch BF16", bf16, tuned.dispatch_sms, store),
        ("combine BF16", bf16, tuned.combine_sms, load),
        ("combine BF16, user's rows", bf16, tuned.push_sms, push),
    ):
        if row_bytes == fp8 and shape.hidden % 16:
            continue  # such rows are no multiple of 16 bytes
        moved = tuning.travel(shape, machine.num_ranks, shape.max_tokens, row_bytes).bytes_out
        yield {
            "call": name,
            "row_bytes": row_bytes,
            "bytes_out": moved,
            "us_at_link_gbps": moved / gbps / 1e3,
            "num_sms": num_sms,
            "us": moved / min(reached, gbps) / 1e3,
        }
