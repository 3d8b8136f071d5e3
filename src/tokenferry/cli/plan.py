"""`tokenferry plan`: the cost of dispatch and combine across nodes, from a model."""

from __future__ import annotations

import argparse
from typing import Any

from tokenferry import tuning
from tokenferry.bench.report import about
from tokenferry.bench.report.costs import plot_costs
from tokenferry.bench.report.plots import need_matplotlib
from tokenferry.cli.cuda_limits import refused_decoding, refused_nodes, refused_ranks, refused_shape
from tokenferry.cli.options import SIZES, number, positive, seed
from tokenferry.cli.output import add_json, picture_file, write_json
from tokenferry.cli.screen import Screen
from tokenferry.cost.calls import CallCost, sent_slots
from tokenferry.cost.case import Case, Cluster, Gate, Links
from tokenferry.cost.estimate import MOST_OVERFLOWS, DecodeSizes, Estimate, Family, as_json, estimate, over_nodes
from tokenferry.cost.sampling import Sampling
from tokenferry.errors import ConfigError, page_place, several
from tokenferry.types import MoeShape

DESCRIPTION = """\
Computes, without any GPU, for up to 2048 ranks: the rows and bytes on the links of a rank, the parts of the time of
each call, the memory of its buffers, and what bounds it. Two families of calls: throughput (dispatch, combine) and
decoding (decode_dispatch, decode_combine).

This is a model, not a measurement: docs/cost-model.md has its formulas, its assumptions and how far it was compared.
"""
ROWS = ("family", "T=M", "network out", "network in", "NVLink out", "NVLink in", "received", "mean")
BYTES = ("call", "row bytes", "network out", "network in", "routing out", "NVLink out", "NVLink in")
TIMES = ("call", "routing", "network", "NVLink", "exposed", "fixed", "whole", "plan kept", "bound by")
MEMORY = ("family", "rows across", "at most", "counts on device", "rows of a dispatch", "worst case")

OPTIONS = {
    "Links: network_gbs": "--network-gbs",
    "Links: nvlink_gbs": "--nvlink-gbs",
    "Links: network_us": "--network-us",
    "Gate: skew": "--skew",
    "DecodeSizes: slots": "--slots",
    "(tokens)": "(--decode-tokens)",
    "Case: hidden=": "--hidden ",
    "Case: top_k=": "--top-k ",
    'rows="bf16"': "--dtype bf16",
    "Case: ": "",
    "Cluster: ": "",
}
"""Names in errors of the model, and what stands for them on a command line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; the defaults are DeepSeek-V3's sizes on four nodes."""
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--nodes", type=positive, default=4, help="number of nodes, N (default: 4)")
    sizes.add_argument("--ranks-per-node", type=positive, default=8, help="ranks of each node, P (default: 8)")
    sizes.add_argument("--experts", type=positive, default=256, help=f"{SIZES['experts']} (default: 256)")
    sizes.add_argument("--top-k", type=positive, default=8, help=f"{SIZES['top_k']} (default: 8)")
    sizes.add_argument("--hidden", type=positive, default=7168, help=f"{SIZES['hidden']} (default: 7168)")
    sizes.add_argument(
        "--tokens", type=positive, default=4096, help="tokens of each rank in throughput calls (default: 4096)"
    )
    sizes.add_argument("--decode-tokens", type=positive, default=128, help="the same in decode calls (default: 128)")
    sizes.add_argument(
        "--slots", type=positive, help="most rows of a rank for each other node in a decode call (default: as tokens)"
    )
    sizes.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8", help="rows of dispatches (default: fp8)")
    links = parser.add_argument_group("links, in each direction, 10^9 bytes a second a rank")
    links.add_argument("--network-gbs", type=number, default=50.0, help="between nodes (default: 50, 400 Gb/s)")
    links.add_argument("--nvlink-gbs", type=number, default=330.0, help="inside a node (default: 330, H200)")
    links.add_argument(
        "--network-us", type=number, default=10.0, help="time of an exchange without bytes, us (default: 10)"
    )
    gate = parser.add_argument_group("routing; uniform without these")
    gate.add_argument("--groups", type=positive, metavar="G", help="groups of experts; DeepSeek-V3: 8")
    gate.add_argument("--top-groups", type=positive, metavar="L", help="groups that a token may use; DeepSeek-V3: 4")
    gate.add_argument("--limited-nodes", type=positive, metavar="L", help="--top-groups, with one group for each node")
    gate.add_argument(
        "--skew", type=number, default=0.0, metavar="S", help="expert i has popularity 1 / i^S (default: 0)"
    )
    gate.add_argument(
        "--placement",
        choices=("shuffled", "sorted"),
        default="shuffled",
        help="where popular experts are: anywhere, or on the first ranks (default: shuffled)",
    )
    gate.add_argument("--samples", type=positive, default=32768, help="tokens drawn if not uniform (default: 32768)")
    gate.add_argument("--seed", type=seed, default=0, help="seed of these tokens (default: 0)")
    add_json(parser, "estimate")
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE", help="write a picture over nodes to FILE; needs matplotlib"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print the estimate."""
    if args.plot is not None:
        need_matplotlib()
    try:
        shape = MoeShape(args.experts, args.top_k, args.hidden, args.tokens)
        case = Case(Cluster(args.nodes, args.ranks_per_node), shape, _gate(args), args.dtype)
        links = Links(args.network_gbs, args.nvlink_gbs, args.network_us)
        decode = DecodeSizes(args.decode_tokens, args.slots)
    except ConfigError as error:
        raise ConfigError(_in_options(str(error), args)) from error
    sampling = Sampling(args.samples, args.seed)
    found = estimate(case, links, decode, sampling)
    show(found, screen)
    if args.json is not None:
        write_json(report(found, args.command_line), args.json, screen)
    if args.plot is not None:
        plot_costs(list(over_nodes(case, links, decode, sampling)), args.plot)
        screen.line(f"written: {args.plot}")
    return 0


def report(found: Estimate, command: str) -> dict[str, Any]:
    """Return the JSON report."""
    return {"schema": 1, **about.about(command), "refused": refused(found), "estimate": as_json(found)}


def refused(found: Estimate) -> list[str]:
    """Return why backend cuda cannot make these calls, by the names of options; empty if it can."""
    cluster = found.case.cluster
    return [
        *refused_ranks("--ranks-per-node", cluster.ranks_per_node, "a node has no more; use more nodes"),
        *refused_nodes(cluster.num_nodes),
        *refused_shape(found.case.shape),
        *refused_decoding(found.decoding.tokens, cluster.num_ranks, cluster.num_nodes),
    ]


def show(found: Estimate, screen: Screen) -> None:
    """Print the tables."""
    for line in _warnings(found):
        screen.line(line, style="yellow")
    for line in _head(found):
        screen.line(line)
    screen.line()
    families = (found.throughput, found.decoding)
    calls = [(f"{family.name} {cost.call}", cost) for family in families for cost in (family.dispatch, family.combine)]
    for title, header, rows in (
        ("rows of one dispatch, on the busiest rank", ROWS, [_rows(family) for family in families]),
        ("MB on the links of the busiest rank", BYTES, [[name, *_bytes(cost)] for name, cost in calls]),
        ("time of a call, us", TIMES, [[name, *_times(cost)] for name, cost in calls]),
        ("MB of memory, on the busiest rank", MEMORY, [_memory(family) for family in families]),
    ):
        screen.table(title, header, rows)
        screen.line()
    for line in _foot(found):
        screen.note(line)


def _in_options(text: str, args: argparse.Namespace) -> str:
    """Return the text of an error with the names of options instead of those of arguments in Python."""
    groups = "--top-groups" if args.limited_nodes is None else "--limited-nodes"
    for name, option in {**OPTIONS, "Gate: top_groups": groups}.items():
        text = text.replace(name, option)
    return text


def _gate(args: argparse.Namespace) -> Gate:
    groups, top_groups = args.groups, args.top_groups
    if args.limited_nodes is not None:
        if top_groups is not None:
            raise ConfigError("--limited-nodes and --top-groups say the same; give one of them")
        if groups not in (None, args.nodes):
            raise ConfigError(
                f"--limited-nodes {args.limited_nodes} needs one group for each node, but --groups {groups} is not "
                f"--nodes {args.nodes}; give --top-groups instead"
            )
        groups, top_groups = args.nodes, args.limited_nodes
    if (groups is None) != (top_groups is None):
        raise ConfigError("--groups and --top-groups limit together: give both of them, or --limited-nodes")
    return Gate(groups or 1, top_groups or 1, args.skew, args.placement)


def _warnings(found: Estimate) -> list[str]:
    lines = [f"backend cuda refuses this: {why}" for why in refused(found)]
    if found.overflows >= MOST_OVERFLOWS:
        lines.append(
            f"too few slots: with --slots {found.decode_slots} {_overflows(found)} are expected in a decode "
            f"call, each of which raises a CapacityError on all ranks; use --slots {found.enough_slots} or more"
        )
    return lines


def _head(found: Estimate) -> list[str]:
    case, reach, gate = found.case, found.reach, found.case.gate
    cluster, shape = case.cluster, case.shape
    how = f"sampled, {reach.sampled_tokens} tokens" if reach.sampled_tokens else "exact"
    lines = [
        f"N={cluster.num_nodes} P={cluster.ranks_per_node} R={cluster.num_ranks} E={shape.num_experts} "
        f"K={shape.top_k} H={shape.hidden}, routing {gate} ({how})",
        f"network {found.links.network_gbs:g} GB/s ({8 * found.links.network_gbs:g} Gb/s), "
        f"NVLink {found.links.nvlink_gbs:g} GB/s a rank",
        f"a token goes to {reach.nodes_per_token:.3f} nodes, {reach.remote_nodes_per_token:.3f} of them others "
        f"(at most {case.most_remote_nodes}), and to {reach.ranks_per_token:.3f} ranks",
    ]
    if gate.skew:
        node, rank = max(reach.nodes) * cluster.num_nodes, max(reach.ranks) * cluster.num_ranks
        lines.append(
            f"the busiest node gets {node / reach.nodes_per_token:.2f} times the mean, "
            f"the busiest rank {rank / reach.ranks_per_token:.2f} times"
        )
    return lines


def _foot(found: Estimate) -> list[str]:
    v1 = found.deep_ep_v1
    lines = ["whole: routing, the longer one of network and NVLink, what it does not hide, and launch and flags"]
    if found.case.cluster.num_nodes > 1:
        lines += [*_chunks(found), *_network_memory(found.case)]
        lines += [
            _slots(found),
            f"DeepEP V1 low latency: {v1.dispatch_us:.0f} us for the bytes of a dispatch, {v1.combine_us:.0f} of a "
            f"combine; {v1.buffer_bytes / 1e6:.0f} MB of buffers",
        ]
    lines.append(f"a model: no time across a network was measured on GPUs; see {page_place('cost-model')}")
    return lines


def _slots(found: Estimate) -> str:
    most, sent = found.decode_slots, sent_slots(found.decode_slots)
    needed = found.decoding.mean_rows.network_out / (found.case.cluster.num_nodes - 1)
    rounded = "" if sent == most else f" ({most}, rounded up to a multiple of eight)"
    used = f"of which {needed:.1f} are filled" if needed <= most else f"and {needed:.1f} tokens need one"
    return f"decode calls send {sent} slots{rounded} to each other node, {used}; {_overflows(found)} expected in a call"


def _overflows(found: Estimate) -> str:
    number = found.overflows
    return f"{number:.2g} overflows" if number < 10 else f"{number:.0f} overflows"


def _chunks(found: Estimate) -> list[str]:
    case, lines, num_nodes = found.case, [], found.case.cluster.num_nodes
    expected = tuning.tokens_for_node(case.group_shape, num_nodes)
    for cost, row_bytes in (
        (found.throughput.dispatch, case.dispatch_data_bytes),
        (found.throughput.combine, case.combine_row_bytes),
    ):
        used, end = cost.num_exchanges - (num_nodes - 2), "last" if cost.call == "dispatch" else "first"
        size = f"of about {cost.chunk_tokens} tokens at most ({cost.chunk_tokens * row_bytes / 1e6:.2f} MB)"
        exchanges = f"{used} with rows: {several(cost.num_exchanges, 'exchange')} with all other nodes"
        lines.append(
            f"{cost.call}: {several(cost.num_chunks, 'chunk')} for the {end} node, {size}, {exchanges}; "
            f"{tuning.why_rail_chunks(expected, row_bytes, case.cluster.ranks_per_node)}"
        )
    return lines


def _network_memory(case: Case) -> list[str]:
    most, others = case.shape.max_tokens, case.cluster.num_nodes - 1
    return [
        "rows across: what a call takes of torch's memory until it ends, for the rows that it sends and those that "
        f"come, with counts on the host; at most: for {most * case.most_remote_nodes} and {most * others} rows"
        + (f", with MoeShape(max_nodes={case.group_shape.max_nodes})" if case.gate.limited else ""),
        f"counts on device: {most * others} rows both ways, whatever max_nodes is: the host gives the size of each "
        "message beforehand, and all M rows of a rank may be for the same node",
    ]


def _rows(family: Family) -> list[str]:
    rows = family.busiest_rows
    numbers = (
        rows.network_out,
        rows.network_in,
        rows.own_out + rows.relayed_out,
        rows.own_in + rows.relayed_in,
        rows.received,
        family.mean_rows.received,
    )
    return [family.name, str(family.tokens), *(f"{number:.0f}" for number in numbers)]


def _bytes(cost: CallCost) -> list[str]:
    sizes = (
        cost.network_out_bytes,
        cost.network_in_bytes,
        cost.routing_out_bytes,
        cost.nvlink_out_bytes,
        cost.nvlink_in_bytes,
    )
    return [str(cost.row_bytes), *(f"{size / 1e6:.2f}" for size in sizes)]


def _times(cost: CallCost) -> list[str]:
    times = cost.times
    parts = (times.routing_us, times.network_us, times.nvlink_us, times.exposed_us, times.fixed_us)
    return [*(f"{us:.0f}" for us in (*parts, times.total_us, times.kept_us)), times.bound_by]


def _memory(family: Family) -> list[str]:
    memory = family.memory
    network = (memory.network_bytes, memory.worst_network_bytes, memory.fixed_network_bytes)
    sizes = (*network, memory.expected_rows_bytes, memory.worst_rows_bytes)
    return [family.name, *(f"{size / 1e6:.0f}" for size in sizes)]
