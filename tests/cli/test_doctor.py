"""The doctor: every check, passing and failing."""

import json
import logging
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from support.bench_jobs import broken
from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.cli import doctor, doctor_cuda
from tokenferry.cli.finding import run_check
from tokenferry.cli.main import main
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.types import MoeShape


def by_name(**options):
    return {finding.name: finding for finding in doctor.findings(**options)}


def test_a_machine_that_works(any_terminal):
    assert main(["doctor", "--no-compile"]) == 0
    out = any_terminal.getvalue()
    for name in (
        "versions",
        "group of one",
        "gloo",
        "transport shared_memory",
        "transport process_group",
        "backend cuda",
        "rich",
        "matplotlib",
    ):
        assert name in out
    for variable in env.VARIABLES:
        assert variable.name in out
    assert "PASS: it works; no: it does not, and why; !: without it nothing works" in out.replace("\n", " ")
    assert "over 2 rank(s), transport shared_memory" in out
    assert "over 2 rank(s), transport process_group" in out
    assert "1 node of 2 ranks (ranks 0 1): all ranks are on one host; shared_memory inside, backend cpu" in out
    assert "2 nodes of 2 ranks (ranks 0 1, 2 3): ranks_per_node=2; shared_memory inside, process_group between" in out
    assert "tokenferry works on this machine" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="groups on GPUs work here")
def test_an_environment_whose_groups_cannot_be_made(monkeypatch, any_terminal):
    monkeypatch.setattr(doctor, "_ranks", lambda: iter(()))
    monkeypatch.setenv("TOKENFERRY_BACKEND", "cuda")
    assert main(["doctor", "--no-compile"]) == 1
    out = " ".join(any_terminal.getvalue().split())
    assert "ExpertGroup: backend='cuda' cannot run: rank 0 has no CUDA device" in out
    assert "does not work: group of defaults" in out


def test_the_choice_of_a_backend_is_not_logged_among_the_findings(monkeypatch, caplog):
    monkeypatch.delenv("TOKENFERRY_BACKEND", raising=False)
    caplog.set_level(logging.INFO, "tokenferry")
    assert doctor._group_of_defaults().passed
    assert not caplog.records
    with ExpertGroup(None, MoeShape(1, 1, 16, 1)):
        assert caplog.records, "such a group says nothing, with which the test is no test"
    assert not logging.getLogger("tokenferry").disabled


FORBIDDEN = """
import ctypes, errno, json, platform, struct, sys
from tokenferry.cli import doctor

def forbid_memfd_create():
    '''As the seccomp profiles of hardened containers do; what this process starts inherits it.'''
    number = {"x86_64": 319, "aarch64": 279}[platform.machine()]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp")

if __name__ == "__main__":
    try:
        forbid_memfd_create()
    except (OSError, KeyError) as error:
        sys.exit(f"SKIP {error}")
    shared = next(finding.text for finding in doctor._ranks() if finding.name == "transport shared_memory")
    print(json.dumps([shared, doctor._on_ranks(doctor.over_transport, "auto"), doctor._group_of_one().text]))
"""


def test_where_memfd_create_is_forbidden_the_doctor_says_what_groups_do():
    run = subprocess.run([sys.executable, "-c", FORBIDDEN], capture_output=True, text=True, timeout=240, check=False)
    if run.stderr.startswith("SKIP"):
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    shared, auto, alone = json.loads(run.stdout)
    assert shared.startswith(
        "BackendUnavailable: ExpertGroup: transport='shared_memory' cannot run: rank 0: cannot alloc"
    )
    assert "65536 bytes of shared memory: a call of the system refused (EPERM: Operation not permitted)" in shared
    assert "groups fall back to the transport 'process_group'" in shared
    assert "transport process_group, backend cpu" in auto
    assert "over 1 rank(s), transport none" in alone


def test_both_compilers_are_checked(monkeypatch):
    monkeypatch.setattr(doctor, "_ranks", lambda: iter(()))
    tried = []
    monkeypatch.setattr(doctor, "_compiles", lambda backend: tried.append(backend) or "fine")
    assert by_name(compiler=True)["torch.compile, code"].passed
    assert tried == ["aot_eager", "inductor"]


def test_a_graph_compiles():
    assert "one graph, by aot_eager" in doctor._compiles("aot_eager")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def cuda_lines(alone, on_ranks=lambda: "fine"):
    return {finding.name: finding for finding in doctor_cuda.findings(alone, on_ranks)}


@pytest.mark.usefixtures("no_gpu")
def test_one_cause_has_one_line(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (line,) = cuda_lines(broken_gpu).values()
    assert not line.required
    assert re.fullmatch(r"BackendUnavailable: this torch .* is built without CUDA; backend cuda needs a .*", line.text)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor_cuda, "_driver", lambda: "CUDA 13.1")
    *passed, gpus = cuda_lines(broken_gpu).values()
    assert all(line.passed for line in passed)
    assert gpus.text.startswith("BackendUnavailable: torch sees no GPU; backend cuda needs")


def broken_gpu():
    raise AssertionError("what cannot work is not tried")


def pretend_gpus(monkeypatch, *capabilities, no_access=(), pcie=()):
    about = [
        SimpleNamespace(name="NVIDIA H200", major=major, minor=minor, total_memory=139 << 30)
        for major, minor in capabilities
    ]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor_cuda, "_driver", lambda: "CUDA 13.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(about))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about[index])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) not in no_access)
    monkeypatch.setattr(doctor_cuda, "has_peer_atomics", lambda one, other: (one, other) not in pcie)


def test_the_cuda_checks_of_a_host_with_gpus(monkeypatch):
    pretend_gpus(monkeypatch, (9, 0), (9, 0), (9, 0))
    lines = cuda_lines(lambda: "round trip")
    assert lines["cuda GPUs"].text == "0, 1, 2: NVIDIA H200, 139 GiB, compute capability 9.0"
    assert lines["cuda peer access"].text.startswith("each of 3 GPUs can access every other; links: NVLink; ")
    assert lines["backend cuda, ranks"].text == "fine"


def test_two_ranks_on_one_gpu(monkeypatch):
    pretend_gpus(monkeypatch, (9, 0))
    assert cuda_lines(lambda: "round trip")["backend cuda, ranks"].text == "fine, both on one GPU"


def test_gpus_that_are_too_old(monkeypatch):
    pretend_gpus(monkeypatch, (9, 0), (7, 5), (8, 6))
    *_, gpus = cuda_lines(broken_gpu).values()
    assert not gpus.passed
    assert (
        "GPU 1 is a NVIDIA H200, 139 GiB, compute capability 7.5; backend cuda needs compute capability 8.0"
        in gpus.text
    )


def test_gpus_without_peer_access(monkeypatch):
    pretend_gpus(monkeypatch, (9, 0), (9, 0), (9, 0), no_access=((0, 1), (2, 0)))
    lines = cuda_lines(lambda: "round trip", broken_gpu)
    assert not lines["cuda peer access"].passed
    assert "2 of 6 directions have no access: 0 -> 1, 2 -> 0" in lines["cuda peer access"].text
    assert "nodes of their own, connected by NCCL, or use backend cpu" in lines["cuda peer access"].text
    assert lines["backend cuda"].passed
    assert "backend cuda, ranks" not in lines


@pytest.mark.parametrize(
    ("pcie", "links"),
    [
        ([(0, 1), (1, 0)], "links: PCIe, which carries less than 31.5 GB/s for each GPU"),
        ([(1, 0)], "links: NVLink, but for 1 -> 0: PCIe, which carries"),
    ],
)
def test_what_the_links_are(monkeypatch, pcie, links):
    pretend_gpus(monkeypatch, (8, 9), (8, 9), pcie=pcie)
    lines = cuda_lines(lambda: "round trip")
    assert links in lines["cuda peer access"].text
    assert lines["backend cuda, ranks"].text == "fine"


def test_the_cuda_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor_cuda._build() == "built for CUDA 13.0"
    monkeypatch.setattr(
        "tokenferry.jit.driver.bindings", lambda: SimpleNamespace(cuDriverGetVersion=lambda: (0, 13010))
    )
    assert doctor_cuda._driver() == "CUDA 13.1"


def test_cuda_packages(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("tokenferry.jit.compiler.version", lambda: "13.0.88")
    assert doctor_cuda._nvrtc() == "13.0.88"
    monkeypatch.setattr(doctor_cuda, "version", lambda name: "13.3.1")
    assert doctor_cuda._bindings() == "13.3.1"
    monkeypatch.setattr(doctor_cuda, "version", missing)
    with pytest.raises(BackendUnavailable, match="not installed"):
        doctor_cuda._bindings()


def test_the_kernel_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENFERRY_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert doctor_cuda._cache() == f"{tmp_path / 'not' / 'yet'} can be written"
    assert not list(tmp_path.iterdir()), "the check left a folder"
    tmp_path.chmod(0o777)
    monkeypatch.setenv("TOKENFERRY_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="has mode 0777: others than its owner may write to it"):
        doctor_cuda._cache()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_machine_with_a_gpu():
    lines = cuda_lines(doctor._gpu_alone, lambda: doctor._on_ranks(doctor.over_gpus, devices="cuda"))
    assert all(line.passed for line in lines.values()), lines
    assert "over 2 rank(s), transport nvlink, backend cuda" in lines["backend cuda, ranks"].text


def test_failing_ranks(monkeypatch, capsys):
    def no_world(*args, **kwargs):
        raise OSError("no memory")

    monkeypatch.setattr(doctor, "World", no_world)
    assert main(["doctor", "--no-compile"]) == 1
    out = capsys.readouterr().out
    assert "no    OSError: no memory; several ranks need gloo" in out
    assert "does not work: gloo\n" in out
    assert "transport process_group" not in out, "it would fail for the same reason"


def test_the_error_of_a_rank_is_the_reason():
    with pytest.raises(RuntimeError, match="no reason at all"):
        doctor._on_ranks(broken, "news")


def test_wrong_rows_are_found(monkeypatch):
    combine = ExpertGroup.combine

    def wrong(self, y, plan):
        result = combine(self, y, plan)
        result.x[3, 5] += 1
        return result

    monkeypatch.setattr(ExpertGroup, "combine", wrong)
    finding = doctor._group_of_one()
    assert not finding.passed
    assert "ArithmeticError: the rows that came back are not the rows that were sent" in finding.text


def test_wrong_sums_over_gloo_are_found(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    with pytest.raises(ArithmeticError, match="all_reduce gave 1"):
        doctor.over_gloo(0, PairOfRanks())


class PairOfRanks:
    def size(self):
        return 2


def test_variables_that_are_set(monkeypatch):
    monkeypatch.delenv("TOKENFERRY_BACKEND", raising=False)
    monkeypatch.setenv("TOKENFERRY_TRANSPORT", "process_group")
    texts = {finding.name: finding.text for finding in doctor._variables()}
    assert texts["TOKENFERRY_TRANSPORT"].startswith("process_group (default: auto)")
    assert texts["TOKENFERRY_BACKEND"].startswith("auto (default)")


def test_a_variable_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "soon")
    [finding] = doctor._variables()
    assert not finding.passed
    assert finding.required
    assert "TOKENFERRY_TIMEOUT_S='soon'" in finding.text


def test_a_variable_that_is_mistyped(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT", "5")
    *known, unknown = doctor._variables()
    assert all(finding.passed for finding in known)
    assert (unknown.name, unknown.passed, unknown.required) == ("TOKENFERRY_TIMEOUT", False, False)
    assert "did you mean TOKENFERRY_TIMEOUT_S?" in unknown.text
    monkeypatch.setattr(doctor, "_ranks", lambda: iter(()))
    assert by_name(compiler=False)["group of one"].passed, "the rest is tried all the same"


def test_nothing_is_tried_in_an_environment_that_cannot_be_read(monkeypatch, any_terminal):
    """All else would fail for the same reason, and blame the library."""
    monkeypatch.setenv("TOKENFERRY_HEAP_MB", "2GB")
    assert main(["doctor", "--no-compile"]) == 1
    out = " ".join(any_terminal.getvalue().split())
    assert "TOKENFERRY_HEAP_MB='2GB': expected auto, or a whole number of MiB above 0, such as 2048" in out
    assert out.endswith("does not work: environment nothing else was tried: correct the variable, and run doctor again")
    assert "report it" not in out
    assert "group of one" not in out


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    finding = doctor._versions()
    assert not finding.passed
    assert "install torch 2.11 or newer" in finding.text


def test_a_missing_package():
    finding = doctor._package("no-such-package", "wings", "wings")
    assert not finding.passed
    assert finding.text == "not installed, so no wings; pip install 'tokenferry[wings]'"


def test_reasons_of_any_kind_fit_into_a_line():
    def fail():
        raise BackendUnavailable("first line\nsecond line")

    assert run_check("x", fail, "buy another").text == "BackendUnavailable: first line; buy another"
    assert run_check("x", fail, "").text == "BackendUnavailable: first line"
