"""`tokenferry doctor`: find out by small runs what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.bench.report import about
from tokenferry.cli import doctor_clients, doctor_cuda, doctor_nodes
from tokenferry.cli.doctor_nodes import JOB_TIMEOUT_S, over_nodes, round_trip, shape_for
from tokenferry.cli.finding import Finding, run_check
from tokenferry.cli.output import add_json, write_json
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError
from tokenferry.types import Routing, TransportName

DESCRIPTION = """\
Runs a small round trip on every backend and transport, and prints PASS, or no with the reason and the remedy. Lines
with ! are required for tokenferry to work at all; if one of them says no, the exit status is 1. Started by torchrun, it
checks the group of all ranks instead: which nodes it has, how they were found, and what carries rows.
"""
PACKAGES = {"rich": ("colours and progress bars", "cli"), "matplotlib": ("plots", "plots")}
RANKS = 2
RANKS_PER_NODE = 2
NODES_REMEDY = "see the lines about transports above"
ENVIRONMENT = "environment"
LEGEND = "PASS: it works; no: it does not, and why; !: without it nothing works, the rest is optional"
WIDTH = 25
"""Of the names of findings: that of the longest variable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--no-compile", action="store_true", help="do not check torch.compile (it can take half a minute)"
    )
    add_json(parser, "findings")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print each finding as it comes; return 1 if something that is required does not work."""
    if dist.is_torchelastic_launched():
        if args.json is not None:
            raise ConfigError("--json: the ranks of a job would write one file; leave it out, or run without torchrun")
        return _run_job(screen)
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    machine = about.machine()
    screen.line(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    screen.line(LEGEND)
    found = []
    for finding in findings(compiler=not args.no_compile):
        _show(finding, screen)
        found.append(finding)
    failed = [finding.name for finding in found if finding.required and not finding.passed]
    screen.line()
    screen.line(f"does not work: {', '.join(failed)}" if failed else "tokenferry works on this machine")
    if ENVIRONMENT in failed:
        screen.line("nothing else was tried: correct the variable, and run doctor again")
    if args.json is not None:
        report = {"schema": 1, **about.about(args.command_line), "works": not failed}
        write_json({**report, "findings": [asdict(finding) for finding in found]}, args.json, screen)
    return 1 if failed else 0


def _show(finding: Finding, screen: Screen) -> None:
    verdict = "PASS" if finding.passed else "no"
    mark = "!" if finding.required else " "
    style = "green" if finding.passed else "yellow"
    screen.item(f"{mark} {finding.name:<{WIDTH}} {verdict:<4}  ", finding.text, style=style)


def _run_job(screen: Screen) -> int:
    """Check the ranks that torchrun started, of which this is one: rank 0 prints, and each that found an error."""
    finding = doctor_nodes.of_job()
    if not finding.passed or dist.get_node_local_rank(0) == 0:
        _show(finding, screen)
    return 0 if finding.passed else 1


def findings(*, compiler: bool) -> Iterator[Finding]:
    """Run all checks in turn; none but the first ones if a variable of the environment is wrong."""
    yield _versions()
    for finding in _variables():
        yield finding
        if finding.required and not finding.passed:
            return  # all else would fail for the same reason
    yield _group_of_one()
    yield _group_of_defaults()
    yield from _ranks()
    yield from doctor_cuda.findings(_gpu_alone, lambda: _on_ranks(over_gpus, devices="cuda"))
    if compiler:
        yield run_check(
            "torch.compile, graph", lambda: _compiles("aot_eager"), "report it; eager calls are not affected"
        )
        yield run_check("torch.compile, code", lambda: _compiles("inductor"), "install a C++ compiler, such as g++")
    yield from doctor_clients.findings()
    for name, (use, extra) in PACKAGES.items():
        yield _package(name, use, extra)


def _versions() -> Finding:
    passed = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
    text = f"Python {platform.python_version()}, torch {torch.__version__}"
    return Finding("versions", passed, text if passed else f"{text}; install torch 2.11 or newer", required=True)


def _variables() -> Iterator[Finding]:
    try:
        settings = env.read()
    except ConfigError as error:
        yield Finding(ENVIRONMENT, False, str(error), required=True)
        return
    for variable in env.VARIABLES:
        value = getattr(settings, variable.name.removeprefix("TOKENFERRY_").lower())
        is_default = value == variable.parse(variable.default)
        shown, origin = (variable.default, "default") if is_default else (value, f"default: {variable.default}")
        yield Finding(variable.name, True, f"{shown} ({origin}); {variable.meaning}")
    for name, near in env.unknown().items():
        yield Finding(name, False, f"no variable of tokenferry, which ignores it; did you mean {near}?")


def _group_of_one() -> Finding:
    def attempt() -> str:
        with ExpertGroup(None, shape_for(1), backend="cpu") as group:
            return round_trip(group)

    return run_check("group of one", attempt, "report it: this needs only torch", required=True)


def _group_of_defaults() -> Finding:
    """Make a group as a program does that leaves everything to the environment, which may name what cannot run here."""

    def attempt() -> str:
        log = logging.getLogger("tokenferry")
        before, log.disabled = log.disabled, True  # the line says which backend was chosen, and so does the log
        try:
            with ExpertGroup(None, shape_for(1)) as group:
                return round_trip(group)
        finally:
            log.disabled = before

    return run_check("group of defaults", attempt, "programs that name no backend get this error", required=True)


def over_gloo(rank: int, pg: dist.ProcessGroup) -> str:
    """Sum the ranks over gloo; a job of `World`."""
    total = torch.tensor([rank + 1], dtype=torch.int64, device="cpu")
    dist.all_reduce(total, group=pg)
    if total.item() != sum(range(1, pg.size() + 1)):
        raise ArithmeticError(f"all_reduce gave {total.item()}")
    return f"all_reduce over {pg.size()} rank processes"


def over_transport(rank: int, pg: dist.ProcessGroup, transport: TransportName) -> str:
    """Make a round trip over one transport; a job of `World`."""
    with ExpertGroup(
        pg, shape_for(pg.size()), backend="cpu", transport=transport, timeout_s=JOB_TIMEOUT_S / 2
    ) as group:
        return round_trip(group)


def _ranks() -> Iterator[Finding]:
    """How ranks reach each other; which nodes they form, and whether ranks that play two nodes reach each other."""
    remedies = {
        "gloo": "several ranks need gloo; use a torch that includes it",
        "transport shared_memory": "groups fall back to the transport 'process_group'; this one needs a single host, "
        "memfd_create, and Unix sockets that pass descriptors",
        "transport process_group": "report it: this needs only gloo",
    }
    jobs = {
        "gloo": (over_gloo,),
        "transport shared_memory": (over_transport, "shared_memory"),
        "transport process_group": (over_transport, "process_group"),
    }
    for name, job in jobs.items():
        required = name != "transport shared_memory"
        finding = run_check(name, lambda job=job: _on_ranks(*job), remedies[name], required=required)  # type: ignore[misc]
        yield finding
        if required and not finding.passed:
            return  # what follows would fail for the same reason
    yield run_check("nodes", lambda: _on_ranks(over_nodes, None), NODES_REMEDY)
    two = 2 * RANKS_PER_NODE
    yield run_check("nodes, two of them", lambda: _on_ranks(over_nodes, RANKS_PER_NODE, ranks=two), NODES_REMEDY)


def _on_ranks(fn: Callable[..., str], *args: object, devices: str = "cpu", ranks: int = RANKS) -> str:
    """Run one job in a world of its own, so that a failed check does not affect the next."""
    try:
        with World(ranks, devices=devices, timeout_s=JOB_TIMEOUT_S) as world:
            text: str = world.run(fn, *args)[0]
            return text
    except WorldError as error:
        raise next(iter(error.errors.values())) from None


def _gpu_alone() -> str:
    with ExpertGroup(None, shape_for(1), backend="cuda") as group:
        return round_trip(group)


def over_gpus(rank: int, pg: dist.ProcessGroup) -> str:
    """Make a round trip over ranks on GPUs; a job of `World`."""
    with ExpertGroup(pg, shape_for(pg.size()), backend="cuda", timeout_s=JOB_TIMEOUT_S / 2) as group:
        group.warmup()
        return round_trip(group)


def _compiles(backend: str) -> str:
    from tokenferry import autograd

    with ExpertGroup(None, shape_for(1), backend="cpu") as group:
        routing = Routing(torch.tensor([[0, 1]] * 16, dtype=torch.int64, device="cpu"))

        def layer(x: torch.Tensor) -> torch.Tensor:
            sent = autograd.dispatch(group, x, routing)
            assert isinstance(sent.x, torch.Tensor)
            return autograd.combine(group, torch.tanh(sent.x), sent.plan).x

        x = torch.randn(16, group.shape.hidden, requires_grad=True, dtype=torch.float32, device="cpu")
        compiled = torch.compile(layer, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(compiled, layer(x))
        return f"dispatch, an expert and combine in one graph, by {backend}"


def _package(name: str, use: str, extra: str) -> Finding:
    try:
        return Finding(name, True, f"{version(name)}: {use}")
    except PackageNotFoundError:
        return Finding(name, False, f"not installed, so no {use}; pip install 'tokenferry[{extra}]'")
