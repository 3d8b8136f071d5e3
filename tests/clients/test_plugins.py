"""The plug-ins of vLLM and SGLang: which deep_ep their processes find, and what the doctor says about it."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import tokenferry
from tokenferry import ConfigError, env
from tokenferry.cli import doctor_clients
from tokenferry.compat import deep_ep_path
from tokenferry.compat.deep_ep import Buffer
from tokenferry.integrations import deep_ep, versions

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "plugin_program.py"
GROUPS = ["vllm.general_plugins", "sglang.srt.plugins"]
ENDS = [(GROUPS[0], ConfigError), (GROUPS[1], SystemExit)]


def distribution(folder: Path, name: str, version: str, **files: str) -> None:
    """What pip leaves of a distribution: its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)


def declared() -> str:
    """The entry points of pyproject.toml, as pip writes them into an environment."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'\[project\.entry-points\."([\w.]+)"\]\ntokenferry = "([\w.:]+)"', text)
    assert [group for group, _ in found] == GROUPS
    return "".join(f"[{group}]\ntokenferry = {value}\n" for group, value in found)


@pytest.fixture
def packages(tmp_path) -> Path:
    """A folder of packages with the metadata of tokenferry and another deep_ep."""
    distribution(tmp_path, "tokenferry", "0", entry_points_txt=declared())
    distribution(tmp_path, "other-deep-ep", "7.0", top_level_txt="deep_ep\n")
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("class Buffer: ...\n")
    return tmp_path


@pytest.fixture
def process(packages, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """This process as a client's that has the packages, without deep_ep having been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deep_ep"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.delenv("TOKENFERRY_AS_DEEP_EP", raising=False)
    yield monkeypatch
    for name in [name for name in sys.modules if name.partition(".")[0] == "deep_ep"]:
        del sys.modules[name]


def plug_in(group: str) -> None:
    """Call what a client finds under its entry point, twice, as it may."""
    (point,) = [each for each in entry_points(group=group) if each.dist.version == "0"]
    for _ in range(2):
        point.load()()


def test_every_process_of_a_client_finds_tokenferry_before_another_deep_ep(packages):
    path = os.pathsep.join([str(packages), str(Path(tokenferry.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, PROGRAM, GROUPS[0]],
        env=os.environ | {"PYTHONPATH": path, "TOKENFERRY_AS_DEEP_EP": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = Path(deep_ep_path.folder(), "deep_ep", "__init__.py")
    assert done.stdout.splitlines() == [f"{who} {ours}" for who in ("front end", "fork", "spawn")]


@pytest.mark.parametrize("group", GROUPS)
def test_tokenferry_is_found_if_it_is_chosen(process, group):
    process.setenv("TOKENFERRY_AS_DEEP_EP", "1")
    plug_in(group)
    assert sys.modules["deep_ep"].Buffer is Buffer
    assert sys.path.count(deep_ep_path.folder()) == 1


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("variables", [{}, {"TOKENFERRY_AS_DEEP_EP": "0", "TOKENFERRY_TIMEOUT_S": "soon"}])
def test_nothing_happens_unless_it_is_chosen(process, packages, group, variables, caplog):
    """Not even a complaint about variables of a library that is not used, or about the version of a client."""
    distribution(packages, group.partition(".")[0], "9.0")
    for name, value in variables.items():
        process.setenv(name, value)
    before = list(sys.path)
    plug_in(group)
    assert sys.path == before
    assert "deep_ep" not in sys.modules
    assert not caplog.records


@pytest.mark.parametrize(("group", "error"), ENDS)
def test_another_deep_ep_that_is_in_use_ends_the_program(process, packages, group, error):
    """SGLang logs exceptions of plug-ins and goes on, with the other one: it gets no exception that it would catch."""
    importlib.import_module("deep_ep")
    process.setenv("TOKENFERRY_AS_DEEP_EP", "1")
    used = packages / "deep_ep" / "__init__.py"
    with pytest.raises(error, match=re.escape(f"imported {used} before it called the plug-in")):
        plug_in(group)


@pytest.mark.parametrize(("group", "error"), ENDS)
def test_a_value_that_is_neither_0_nor_1_is_named(process, group, error):
    process.setenv("TOKENFERRY_AS_DEEP_EP", "yes")
    with pytest.raises(error, match="TOKENFERRY_AS_DEEP_EP='yes': expected one of 0, 1"):
        plug_in(group)


@pytest.mark.parametrize(("version", "tried"), [("0.33.0", True), ("0.33.4", True), ("0.331", False), ("9.0", False)])
def test_a_version_that_was_not_tried_is_warned_about(process, packages, version, tried, caplog):
    distribution(packages, "vllm", version)
    process.setenv("TOKENFERRY_AS_DEEP_EP", "1")
    deep_ep.for_vllm()
    warning = f"tokenferry: vllm {version} was not tried, but 0.33; if it fails, install one of these"
    assert caplog.messages == ([] if tried else [warning])


def test_a_list_of_plugins_is_read_as_its_client_does():
    assert env.allowed_plugins("vllm", {}) is None
    assert env.allowed_plugins("vllm", {"VLLM_PLUGINS": ""}) == ("",)
    assert env.allowed_plugins("sglang", {"SGLANG_PLUGINS": ""}) is None
    assert env.allowed_plugins("sglang", {"SGLANG_PLUGINS": "a, b"}) == ("a", "b")


def texts() -> dict[str, str]:
    return {found.name: f"{'PASS' if found.passed else 'no'} {found.text}" for found in doctor_clients.findings()}


def test_the_doctor_names_the_deep_ep_of_a_program(process, packages):
    said = texts()
    assert said["deep_ep"].startswith(f"PASS `import deep_ep` finds other-deep-ep 7.0, in {packages}")
    assert said["plug-ins"].startswith("PASS not active: with TOKENFERRY_AS_DEEP_EP=1")
    assert len(said) == 2, "one line for both programs"
    process.syspath_prepend(deep_ep_path.folder())
    assert texts()["deep_ep"].startswith(f"PASS `import deep_ep` finds tokenferry, in {deep_ep_path.folder()}")
    process.setattr(deep_ep, "found", lambda: deep_ep.Found(None, ours=False, owner=""))
    assert texts()["deep_ep"].startswith("PASS `import deep_ep` finds nothing")


def test_the_doctor_says_whether_a_plugin_is_active(process, packages):
    process.setenv("TOKENFERRY_AS_DEEP_EP", "1")
    process.setattr(versions, "installed", lambda client: None)
    assert texts()["plug-in of SGLang"].endswith("finds tokenferry in SGLang, which is not installed")
    process.setattr(versions, "installed", {"vllm": "0.33.0", "sglang": "9.0"}.get)
    assert texts()["plug-in of vLLM"].endswith("finds tokenferry in vLLM, 0.33.0")
    assert texts()["plug-in of SGLang"].startswith("no BackendUnavailable: active, but sglang 9.0 was not tried")
    process.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS names only other; add tokenferry" in texts()["plug-in of vLLM"]
    process.setenv("TOKENFERRY_AS_DEEP_EP", "yes")
    assert list(texts()) == ["deep_ep"], "the line about the environment names the value"


def test_the_doctor_finds_out_that_there_is_no_entry_point(process):
    process.setenv("TOKENFERRY_AS_DEEP_EP", "1")
    process.setattr(doctor_clients, "entry_points", lambda group: [])
    assert "but this environment has no entry point of tokenferry in vllm" in texts()["plug-in of vLLM"]
