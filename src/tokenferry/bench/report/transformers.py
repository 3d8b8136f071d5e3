"""Reports of models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.tables import Shown, Table, differences, in_ms

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

Item = dict[str, Any]

NOTE = (
    "a Qwen3-MoE model of transformers with random weights; wall clock. training: forward and backward of one sequence "
    "of T tokens; generation: greedy, prompts included. batches: one each: each rank has its own (fsdp_size=R); one "
    "for all: all ranks have the same one (tp_size=R). Tokens a second are those of all ranks; a batch that is shared "
    "counts once. differ_by: norm of the difference over the norm, the worst rank"
)
HEADER = (
    *("batches", "experts by", "T", "training, isolated ms", "back to back ms", "tokens/s", "over its own"),
    *("generation ms", "tokens/s", "over its own"),
)


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    own = {_case(item): item for item in items if item["experts"] == item["own"]}
    table = []
    for item in items:
        training, generation, other = item["training"], item["generation"], own[_case(item)]
        steps = training["back_to_back"]
        table.append(
            [
                *(item["batches"], item["experts"], str(item["tokens"])),
                *(in_ms(training["isolated"]), in_ms(steps), f"{_rate(item['trained'], steps):.0f}"),
                f"{steps['median_us'] / other['training']['back_to_back']['median_us']:.2f}",
                *(in_ms(generation), f"{_rate(item['generated'], generation):.0f}"),
                f"{generation['median_us'] / other['generation']['median_us']:.2f}",
            ]
        )
    return table


def _version(item: Item) -> str:
    """Return what was compared with what, in the installed version of transformers."""
    text = f"transformers {item['version']}; its own: {', '.join(item['own'])}"
    return text if "all_to_all" in item["own"] else f"{text}, since this version has no all_to_all"


def show(report: Report) -> Shown:
    """Show the times of each way to reach experts, and how far their results are apart."""
    items = report.items("transformers")
    if items:
        yield Table(f"a model, {items[0]['dtype']}, medians (5th-95th percentile)", HEADER, rows(items))
        yield NOTE
    yield from map(_version, report.items("transformers version"))
    for item in report.items("transformers results"):
        what = f"{item['experts']} and {item['own']}, batches: {item['batches']}, {item['dtype']}, T={item['tokens']}"
        yield f"{what}: {differences(item)}"


def _case(item: Item) -> str:
    return f"{item['batches']}, {item['tokens']}"


def _rate(tokens: int, times: dict[str, float]) -> float:
    """Return tokens a second."""
    return tokens / times["median_us"] * 1e6
