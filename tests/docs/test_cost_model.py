"""The numbers of docs/cost-model.md are those of the model, of our measurements and of the published bandwidths."""

import json
import re
from dataclasses import replace

import pytest

from support import documents
from tokenferry.cli.main import main
from tokenferry.cost.case import Case, Cluster, Gate, Links
from tokenferry.cost.estimate import DecodeSizes, estimate, expected_overflows
from tokenferry.cost.reach import uniform_reach
from tokenferry.cost.sampling import Sampling
from tokenferry.types import MoeShape

PAGE = (documents.ROOT / "docs" / "cost-model.md").read_text()
V3 = MoeShape(256, 8, 7168, 4096)
H200 = Links(50.0, 330.0)
LIMIT_OF_V1 = 4  # nodes of a token


def table(heading):
    """The rows of the table whose header begins with these cells."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def one_node(links, tokens, rows):
    case = Case(Cluster(1, 4), replace(V3, max_tokens=tokens), rows=rows)
    return estimate(case, links, DecodeSizes(tokens), Sampling())


def on_nodes(nodes, *, links=H200, gate=Gate(), tokens=4096, slots=None):  # noqa: B008 - frozen
    case = Case(Cluster(nodes, 8), replace(V3, max_tokens=tokens), gate)
    return estimate(case, links, DecodeSizes(128, slots), Sampling())


def measured(file, results):
    return json.loads((documents.ROOT / "benchmarks" / file).read_text())[results]


def test_the_output_is_that_of_the_command(capsys):
    (shown,) = re.findall(r"```bash\ntokenferry (plan [^\n]*--slots[^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert main(shown[0].split()) == 0
    assert capsys.readouterr().out == shown[1]


def test_throughput_calls_of_one_node():
    ratios = {}
    for result in measured("2026-11-21_4xh200_0e5c001-calls.json", "results"):
        label, tokens = result["label"], result["label"]["tokens"]
        if (label["who"], label["routing"]) == ("tokenferry", "uniform"):
            combine = label["call"].startswith("combine")
            family = one_node(Links(50.0, 330.0 if combine else 356.0), tokens, label["rows"]).throughput
            times = (family.combine if combine else family.dispatch).times
            modelled = times.total_us if label["call"] == "dispatch" else times.kept_us
            ratios[label["call"], label["rows"], tokens] = result["drained"]["median_us"] / modelled
    shown = table("call | T=1 | 8 | 32 | 128 | 512 | 1024")
    assert len(shown) == 5
    for name, *cells in shown:
        call, rows, kept = re.fullmatch(r"(\w+) (FP8|BF16)(, .*)?", name).groups()
        call = call + (kept or "")
        for tokens, cell in zip((1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384), cells, strict=True):
            assert f"{ratios[call, rows.lower(), tokens]:.2f}" == cell, (name, tokens)
    pushed = [ratio for (call, _, tokens), ratio in ratios.items() if call.endswith("user memory") and tokens < 1024]
    assert f"takes up to {max(pushed):.2f} times as long as modelled below T = 1024" in PAGE


def test_decode_calls_of_one_node():
    calls = {"dispatch FP8": "decode dispatch FP8", "dispatch BF16": "decode dispatch BF16"}
    calls |= {"combine fast": "decode combine, fast", "combine exact": "exact"}
    ratios = {name: [] for name in calls.values()}
    for result in measured("2026-11-21_4xh200_f4c8043-decode.json", "decode"):
        if result["call"] in calls:
            rows = "fp8" if "FP8" in result["call"] else "bf16"
            family = one_node(Links(50.0, 356.0), result["tokens"], rows).decoding
            times = (family.combine if "combine" in result["call"] else family.dispatch).times
            ratios[calls[result["call"]]].append(f"{result['graph']['median_us'] / times.total_us:.2f}")
    assert f"combine with exact sums up to {max(map(float, ratios.pop('exact'))):.1f} times" in PAGE
    assert {name: cells for name, *cells in table("call | T=1 | 8 | 32 | 64")} == ratios


def test_published_bandwidths():
    rows = table("table | ranks | call | GB/s")
    assert len(rows) == 12
    for name, ranks, call, gbs, *numbers, bound, ratio in rows:
        nodes, tokens = int(ranks) // 8, {"V1": 4096, "V2": 8192}[name]
        gate = Gate(nodes, min(nodes, LIMIT_OF_V1))
        each = on_nodes(nodes, links=Links(50.0, {"V1": 160.0, "V2": 330.0}[name]), gate=gate, tokens=tokens)
        cost = getattr(each.throughput, call)
        places = each.reach.ranks_per_token if nodes == 1 else each.reach.nodes_per_token
        published = tokens * places * cost.row_bytes / float(gbs) / 1e3
        found = (published, cost.times.kept_us, cost.times.network_us, cost.times.nvlink_us)
        # Eight nodes are sampled, and torch draws other numbers on other machines.
        assert [float(number) for number in numbers] == pytest.approx(found, rel=0.004, abs=0.6)
        assert bound == cost.times.bound_by
        assert float(ratio) == pytest.approx(published / cost.times.kept_us, abs=0.012)


def test_published_latencies():
    rows = table("ranks | V1, published")
    assert [row[0] for row in rows] == ["16", "32", "64", "128", "256"]
    for ranks, published, its_bytes, over, whole, slots, fewer in rows:
        nodes = int(ranks) // 8
        each = on_nodes(nodes)
        v1 = each.deep_ep_v1
        assert its_bytes == f"{v1.dispatch_us:.0f} / {v1.combine_us:.0f}"
        dispatch, combine = map(float, published.split(" / "))
        assert over == f"{dispatch / v1.dispatch_us:.2f} / {combine / v1.combine_us:.2f}"
        assert whole == both(each)
        assert fewer == both(on_nodes(nodes, slots=int(slots)))
        assert int(slots) == (128 if each.enough_slots > 120 else each.enough_slots)
        if int(slots) == 128:  # M, which nothing overflows
            continue
        reach = uniform_reach(each.case)
        overflows = [expected_overflows(each.case.cluster, reach, DecodeSizes(128, int(slots) - n)) for n in (0, 1)]
        assert overflows[0] < 1e-3 <= overflows[1]


def both(each):
    calls = (each.decoding.dispatch, each.decoding.combine)
    return " / ".join(f"{cost.times.total_us:.0f}" for cost in calls)


def test_what_follows():
    limited, free = (on_nodes(8, gate=gate).throughput.dispatch.times.total_us for gate in (Gate(8, 4), Gate()))
    shown = re.search(r"\((\d+) instead of (\d+) us\)", PAGE).groups()
    assert [float(us) for us in shown] == pytest.approx([limited, free], rel=0.004)
    for nodes, links in ((2, H200), (4, Links(50.0, 160.0))):
        assert on_nodes(nodes, links=links).throughput.dispatch.times.bound_by == "network"
    assert on_nodes(2, links=Links(50.0, 160.0)).throughput.dispatch.times.bound_by == "NVLink"
    many = estimate(Case(Cluster(64, 8), replace(V3, num_experts=512)), H200, DecodeSizes(), Sampling())
    assert many.throughput.dispatch.num_exchanges == 63
    assert many.throughput.dispatch.times.total_us == pytest.approx(5387, abs=1)
