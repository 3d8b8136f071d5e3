"""Reports of calls across nodes: their times beside each leg alone, and what crossed the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.tables import Shown, Table, with_percentiles

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

Item = dict[str, Any]

LEGS = ("whole us", "between nodes us", "within a node us")
HEADER = ("call", "T", "rows across", "MB of rows", "MB besides", *LEGS, "over slower leg", "torch.empty(8) us")
NOTE = (
    "whole: ranks synchronised before each call, the slowest rank's time. The legs alone, in turns with it: the same "
    "rows, between nodes already packed, by send and receive of torch.distributed; within a node by a group of one "
    "node. rows across: those that a rank receives from other nodes, mean over ranks; MB of rows: their data; MB "
    "besides: all other bytes that a rank gives to the network in a call (ids, weights, headers), mean over ranks, "
    "counted in the run; torch.empty(8): the host's time of it, right behind"
)
CHECKED = (
    "rows bit-equal to their sources, sums within rounding; as many rows crossed as there are pairs of a token and "
    "another node that it goes to"
)
REPLAYED_HEADER = ("call", "T", *LEGS, "over slower leg")
REPLAYED_NOTE = (
    "CUDA graphs: replayed back to back, so that no host takes part (CPUs have none: calls back to back); the slowest "
    "rank's time. Here a dispatch leaves its counts on the device and, on GPUs, sends M rows to each other "
    "node, used or not. The legs alone are the same as above, replayed as well"
)
DECODE_HEADER = ("pair", "T", "rows across", "MB of leg", "MB sent", *LEGS, "over both legs", "eager us")
DECODE_NOTE = (
    "decode pair: dispatch in FP8, combine in BF16, back to back, the slowest rank's time. The legs alone: M rows to "
    "each other node and M sums back, by send and receive of torch.distributed; a pair in a group of one node, with "
    "the tokens that a rank acts for. MB of leg: the data of these rows and sums; MB sent: all bytes that a rank gives "
    "to the network in a pair, mean over ranks, counted in the run (on CPUs only for tokens that cross). A pair cannot "
    "overlap its legs: rows cross before they are passed on, sums after they are added up"
)
DECODE_CHECKED = "sums of experts that return their rows near the tokens, and bit-equal from a graph"
BETWEEN = {
    "sockets": "Between nodes the rows take TCP on this machine's loopback: this shows bytes and overlap, not rates of "
    "a network",
    "nvlink": "Between nodes the rows take NVLink, by NCCL: a network of its rate; inside nodes it carries nothing",
}

MEMORY_HEADER = ("T=M", "group MB", "its heap MB", "calls MB", "V1 NVLink MB", "V1 network MB")
MEMORY_PARTS = ("group_bytes", "window_bytes", "call_bytes", "v1_nvl_bytes", "v1_rdma_bytes")
MEMORY = (
    "group: what it takes on a GPU outside of torch: its heap, NCCL's buffers, and in the first group of a run what "
    "NCCL, the driver and kernels take once. calls: what torch allocates in a dispatch and a combine, with results. "
    "V1: the hints of DeepEP's default configs for as many ranks, nodes and bytes"
)


def line(item: Item) -> str:
    """Return one case as a line."""
    return f"{item['nodes']}: {item['call']}, T={item['tokens']}: {item['whole']['median_us']:.1f} us"


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    table = []
    for item in items:
        across = item["rows_across"]
        rows_bytes = across * item["row_bytes"]
        cells = _cells(item, f"{across:.1f}", rows_bytes, item["besides_bytes"], _slower_us(item))
        table.append([item["call"], *cells, f"{item['empty_us']:.2f}"])
    return table


def replayed_line(item: Item) -> str:
    """Return a call in graphs as a line."""
    how = "in a graph" if item["graphs"] else "back to back"
    return f"{item['nodes']}: {item['call']}, T={item['tokens']}: {item['whole']['median_us']:.1f} us {how}"


def replayed_rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `REPLAYED_HEADER`."""
    return [[item["call"], str(item["tokens"]), *_times(item, _slower_us(item))] for item in items]


def decode_line(item: Item) -> str:
    """Return a pair of decode calls as a line."""
    times = f"{item['whole']['median_us']:.1f} us{' in a graph' if item['graphs'] else ''}"
    return f"{item['nodes']}: decode pair, {item['numerics']}, T={item['tokens']}: {times}"


def decode_rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `DECODE_HEADER`."""
    table = []
    for item in items:
        legs = item["network"]["median_us"] + item["inside"]["median_us"]
        cells = _cells(item, str(item["rows_across"]), item["bytes_across"], item["sent_bytes"], legs)
        table.append([item["numerics"], *cells, with_percentiles(item["eager"])])
    return table


def _cells(item: Item, rows_across: str, rows_bytes: float, other_bytes: float, legs_us: float) -> list[str]:
    sizes = (f"{size / 1e6:.3f}" for size in (rows_bytes, other_bytes))
    return [str(item["tokens"]), rows_across, *sizes, *_times(item, legs_us)]


def _slower_us(item: Item) -> float:
    return float(max(item["network"]["median_us"], item["inside"]["median_us"]))


def _times(item: Item, legs_us: float) -> list[str]:
    parts = [with_percentiles(item[part]) for part in ("whole", "network", "inside")]
    return [*parts, f"{item['whole']['median_us'] / legs_us:.2f}"]


def memory_rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `MEMORY_HEADER`."""
    return [[str(item["tokens"]), *(f"{item[name] / 1e6:.1f}" for name in MEMORY_PARTS)] for item in items]


def memory_line(item: Item) -> str:
    """Return the memory that one T takes on each rank."""
    group, call, nvl, rdma = (
        item[name] / 1e6 for name in ("group_bytes", "call_bytes", "v1_nvl_bytes", "v1_rdma_bytes")
    )
    return (
        f"memory of a rank, T={item['tokens']}: group {group:.0f} MB, calls {call:.0f} MB; "
        f"V1 {nvl:.0f} MB for NVLink, {rdma:.0f} MB for the network"
    )


def show(report: Report) -> Shown:
    """Show calls across nodes, the same in graphs, their memory, and pairs of decode calls."""
    kinds = ("nodes", "nodes replayed", "nodes decode", "nodes memory")
    items, replayed, pairs, memory = (report.items(kind) for kind in kinds)
    if items:
        title = f"{items[0]['nodes']}, {items[0]['transport']}, median us (5th-95th percentile)"
        yield Table(title, HEADER, rows(items))
        yield NOTE
        yield BETWEEN[report.settings.between]
        ranks, gpus = report.settings.ranks, report.about["gpus"]["count"]
        if report.settings.backend == "cuda" and ranks > gpus:
            what = "take turns on them: times are not those of ranks with their own"
            yield f"{ranks} ranks share {gpus} GPU(s) and {what}"
        if replayed:
            how = "CUDA graphs" if replayed[0]["graphs"] else "back to back"
            title = f"{items[0]['nodes']}, {items[0]['transport']}, {how}, median us (5th-95th percentile)"
            yield Table(title, REPLAYED_HEADER, replayed_rows(replayed))
            yield REPLAYED_NOTE
        if memory:
            yield Table("memory of a rank", MEMORY_HEADER, memory_rows(memory))
            yield MEMORY
        yield f"checked: {CHECKED}"
    if pairs:
        graphs = ", CUDA graphs" if pairs[0]["graphs"] else ""
        title = f"{pairs[0]['nodes']}, {pairs[0]['transport']}{graphs}, median us (5th-95th percentile)"
        yield Table(title, DECODE_HEADER, decode_rows(pairs))
        yield DECODE_NOTE
        yield f"checked: {DECODE_CHECKED}"
