"""What the parts of `tokenferry bench` for GPUs print of a report."""

from __future__ import annotations

from tokenferry.bench.report import decode as decode_report
from tokenferry.bench.report import eager as eager_report
from tokenferry.bench.report import language as language_report
from tokenferry.bench.report import nodes as nodes_report
from tokenferry.bench.report import tables
from tokenferry.bench.report import training as training_report
from tokenferry.bench.report import transformers as models_report
from tokenferry.bench.report.report import GPU_NOTES, Report
from tokenferry.cli.screen import Screen


def show(report: Report, screen: Screen) -> None:
    """Print everything."""
    screen.line()
    if report.results:
        rows = [tables.cells(result, report.fraction(result)) for result in report.results]
        screen.table("all cases, median us", tables.HEADER, rows)
        screen.line(f"MB out: {GPU_NOTES['bytes']}. of limit: against the best rate of the links in this run.")
        screen.line(f"isolated: {GPU_NOTES['isolated']}")
        screen.line(f"checked: {GPU_NOTES['checked']}")
    show_decode(report, screen)
    show_eager(report, screen)
    show_training(report, screen)
    show_models(report, screen)
    show_language(report, screen)
    show_nodes(report, screen)
    if "overlap" in report.others:
        screen.table("overlap", tables.OVERLAP_HEADER, tables.overlap_rows(report.others["overlap"]))
    for line in tables.kernel_lines(report.others.get("gemm kernels", [])):
        screen.line(line)
    for item in report.others.get("overlap left out", []):
        screen.line(f"overlap beside {item['gemm']}, {item['carve_out']} SMs left out: not measured: {item['why']}")
    if "host" in report.others:
        screen.table("host", tables.HOST_HEADER, tables.host_rows(report.others["host"]))
    for item in report.others.get("memory", []):
        screen.line("memory of a group: " + ", ".join(f"{name} {value:.1f}" for name, value in item.items()))
    for item in report.others.get("first call", []):
        for name, seconds in item.items():
            screen.line(f"{name}: " + ", ".join(f"{step} {s:.3f} s" for step, s in seconds.items()))
    screen.line()


def show_decode(report: Report, screen: Screen) -> None:
    """Print the results of the decode phases."""
    cases, two_batch = report.others.get("decode", []), report.others.get("two_batch", [])
    if cases:
        rows = decode_report.rows(cases, report.limits, report.node_us)
        screen.table("decode calls, median us (5th-95th percentile)", decode_report.HEADER, rows)
        screen.line(f"M={cases[0]['max_tokens']}. KB out: {GPU_NOTES['bytes']}. {decode_report.HOOK}")
        screen.line(f"limit: {decode_report.LIMIT}. of limit: of the graph's time")
        if report.node_us is not None:
            screen.line(f"an empty kernel of a graph: {report.node_us:.2f} us")
        screen.line(f"checked: {decode_report.CHECKED}")
    if two_batch:
        rows = decode_report.two_batch_rows(two_batch)
        screen.table("two-batch overlap, as CUDA graphs", decode_report.TWO_BATCH_HEADER, rows)
        screen.line("hidden: (work alone + calls alone - by hooks) / calls alone")


def show_eager(report: Report, screen: Screen) -> None:
    """Print the results of the eager calls."""
    items = report.others.get("eager", [])
    if not items:
        return
    rows = eager_report.rows(items, report.empty_us)
    screen.table("eager calls, wall clock, median us (5th-95th percentile)", eager_report.HEADER, rows)
    screen.table("back to back, median us", eager_report.SHORT_HEADER, eager_report.short_rows(items))
    for line in eager_report.notes(report.settings, report.empty_us):
        screen.line(line)


def show_training(report: Report, screen: Screen) -> None:
    """Print how the dispatchers of Megatron-Core compare."""
    items, compared = report.others.get("training", []), report.others.get("training results", [])
    if items:
        screen.table("a training step, ms (5th-95th percentile)", training_report.HEADER, training_report.rows(items))
    for item in compared:
        screen.line(training_report.difference_line(item))
    for item in report.others.get("training repeated", []):
        screen.line(training_report.repeated_line(item))


def show_models(report: Report, screen: Screen) -> None:
    """Print the results of models of transformers."""
    items = report.others.get("transformers", [])
    if items:
        title = f"a model, {items[0]['dtype']}, medians (5th-95th percentile)"
        screen.table(title, models_report.HEADER, models_report.rows(items))
        screen.line(models_report.NOTE)
    for item in report.others.get("transformers version", []):
        screen.line(models_report.version_line(item))
    for item in report.others.get("transformers results", []):
        screen.line(models_report.difference_line(item))


def show_language(report: Report, screen: Screen) -> None:
    """Print the results of the language model."""
    items = report.others.get("language", [])
    if items:
        title = "a training step of a language model, medians (5th-95th percentile)"
        screen.table(title, language_report.HEADER, language_report.rows(items))
        screen.line(language_report.NOTE)
    for item in report.others.get("language results", []):
        screen.line(language_report.difference_line(item))


def show_nodes(report: Report, screen: Screen) -> None:
    """Print the results of calls across nodes."""
    items = report.others.get("nodes", [])
    if items:
        title = f"{items[0]['nodes']}, {items[0]['transport']}, median us (5th-95th percentile)"
        screen.table(title, nodes_report.HEADER, nodes_report.rows(items))
        screen.line(nodes_report.NOTE)
        screen.line(nodes_report.BETWEEN[report.settings.between])
        gpus = report.about["gpus"]["count"]
        if report.settings.backend == "cuda" and report.settings.ranks > gpus:
            screen.line(nodes_report.sharing(report.settings.ranks, gpus))
        for item in report.others.get("nodes memory", []):
            screen.line(nodes_report.memory_line(item))
        if "nodes memory" in report.others:
            screen.line(nodes_report.MEMORY)
        screen.line(f"checked: {nodes_report.CHECKED}")
    pairs = report.others.get("nodes decode", [])
    if pairs:
        graphs = ", CUDA graphs" if pairs[0]["graphs"] else ""
        title = f"{pairs[0]['nodes']}, {pairs[0]['transport']}{graphs}, median us (5th-95th percentile)"
        screen.table(title, nodes_report.DECODE_HEADER, nodes_report.decode_rows(pairs))
        screen.line(nodes_report.DECODE_NOTE)
        screen.line(f"checked: {nodes_report.DECODE_CHECKED}")


def show_short(report: Report, screen: Screen) -> None:
    """Print what failed, and the short table."""
    for one in report.failed:
        screen.line(f"not measured: {one['what']}: {one['why']}")
    rows = tables.short_rows(report.results, [report.fraction(result) for result in report.results])
    if rows:
        screen.table(f"{report.about['title']}; medians", tables.SHORT_HEADER, rows)
