"""The package: what the sdist holds, what the wheel says of itself, and that it runs where only torch is installed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata as metadata_of_packages
from pathlib import Path

import pytest

import tokenferry
from support import documents
from tokenferry import errors
from tokenferry.cli import doctor

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "tokenferry"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
RUN = """
import sys, tokenferry, torch
shape = tokenferry.MoeShape(num_experts=4, top_k=1, hidden=16, max_tokens=4)
group = tokenferry.ExpertGroup(None, shape, backend="cpu")
x = torch.ones(4, 16, dtype=torch.float32, device="cpu")
sent = group.dispatch(x, tokenferry.Routing(torch.arange(4, dtype=torch.int64, device="cpu")[:, None]))
assert torch.equal(group.combine(sent.x, sent.plan).x, x)
print(tokenferry.__file__, sorted({name.partition(".")[0] for name in sys.modules} & {"cuda", "rich", "matplotlib"}))
"""


def git_files():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, so that there is nothing to compare with")
    listed = ("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    done = subprocess.run(listed, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}


def build(what, source, folder):
    """Build with the setuptools that is installed: a test needs no network."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, folder],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist of a copy of this clone: building writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("sdist")
    for name in git_files():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    shutil.unpack_archive(build("build_sdist", folder / "clone", folder), folder, filter="data")
    return folder / f"tokenferry-{tokenferry.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build("build_wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = f"tokenferry-{tokenferry.__version__}.dist-info/METADATA"
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_the_sdist_is_complete(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held - made if ".egg-info/" not in name} == git_files()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        page = archive.read("tokenferry/cli/errors.md").decode()
    sources = {name.removeprefix("src/") for name in git_files() if name.startswith("src/tokenferry/")}
    assert held == sources | {"tokenferry/cli/errors.md"}
    assert page == (ROOT / "docs" / "errors.md").read_text()


def test_extras(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {"cli", "plots", "transformers", "test", "all"}
    needs = [one for one in metadata.get_all("Requires-Dist") if 'extra == "all"' in one]
    assert needs == ['tokenferry[cli,plots,transformers]; extra == "all"']


def test_extras_that_messages_and_documents_name_exist(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *SOURCE.rglob("*.py")]
    named = {extra for _, extra in doctor.PACKAGES.values()}
    for page in pages:
        for words in re.findall(r"(?:tokenferry|'\.)\[([a-z,]+)\]", page.read_text()):
            named.update(words.split(","))
    assert named >= {"cli", "plots"}
    assert named <= extras


def test_what_an_index_shows(metadata):
    makefile, classifiers = (ROOT / "Makefile").read_text(), metadata.get_all("Classifier")
    assert metadata["Requires-Python"] == ">=3.10"
    versions = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in classifiers]
    assert [one[1] for one in versions if one] == ["3.10", "3.11", "3.12", "3.13"]
    assert "Python 3.10 to 3.13" in makefile
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "MIT"


def test_runs_where_only_torch_is_installed(wheel, tmp_path):
    """Installed from the wheel, without GPUs, and with neither packages of extras nor the bindings of CUDA."""
    pytest.importorskip("pip")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index")
    subprocess.run([*pip, "--target", tmp_path / "site", wheel], timeout=240, check=True)
    for missing in ("rich", "matplotlib", "cuda"):  # as if they were not installed
        (tmp_path / "site" / f"{missing}.py").write_text(f"raise ModuleNotFoundError({missing!r})")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
    command = str(tmp_path / "site" / "bin" / "tokenferry")
    for words in (["-c", RUN], [command, "explain", "--ranks", "4"], [command, "explain-error", "PeerTimeout"]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        if words[0] == "-c":
            assert done.stdout.split() == [str(tmp_path / "site" / "tokenferry" / "__init__.py"), "[]"]


SITE = "https://docs.example/tokenferry/"
TIMEOUT = """
from tokenferry.transports.base import CallId, peer_timeout
print(peer_timeout(CallId("dispatch", 3), 0, [1], "nothing came", 1.0, "Nothing was received."))
"""
SHAPE = """
import traceback
import tokenferry
for error in (tokenferry.ShapeError("x: expected [T, H]"), tokenferry.ResourceError("no", resource="memory", errno=12)):
    print("".join(traceback.format_exception(error)))
"""


def test_the_address_of_the_site_is_set_in_one_place(sdist, tmp_path):
    """With it, errors, commands and the README that an index shows link to the site."""
    clone = tmp_path / "clone"
    shutil.copytree(sdist, clone)
    project = (clone / "pyproject.toml").read_text()
    assert "\n[project.urls]\n" in project
    (clone / "pyproject.toml").write_text(
        project.replace("\n[project.urls]\n", f'\n[project.urls]\nDocumentation = "{SITE}"\n')
    )
    made = build("prepare_metadata_for_build_wheel", clone, tmp_path)
    metadata = Parser().parsestr((made / "METADATA").read_text())
    assert metadata.get_all("Project-URL") == [f"Documentation, {SITE}"]
    links = documents.links(metadata.get_payload())
    assert {f"{SITE}errors/#ranks-that-come-back", f"{SITE}files/benchmarks/chart.svg"} <= set(links)
    assert all(link.startswith(("https://", "#")) for link in links)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE.parent}", "CUDA_VISIBLE_DEVICES": ""}
    for words in (["-c", TIMEOUT], ["-m", "tokenferry", "explain-error", "PeerTimeout"]):
        run = subprocess.run(
            [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=240, check=True
        )
        assert run.stdout.count(f"{SITE}errors/#peertimeout") == 1
        assert "(docs/" not in run.stdout
    if sys.version_info >= (3, 11):
        run = subprocess.run([sys.executable, "-c", SHAPE], env=environ, capture_output=True, text=True, check=True)
        assert f"ShapeError: x: expected [T, H]\nWhat to do: {SITE}errors/#shapeerror\n" in run.stdout
        assert f"What to do: {SITE}errors/#resourceerror\n" in run.stdout


def test_without_an_address_files_are_named(monkeypatch):
    monkeypatch.setattr(metadata_of_packages, "metadata", lambda name: Parser().parsestr("Name: tokenferry\n"))
    errors._site.cache_clear()
    assert not hasattr(errors.ShapeError("x"), "__notes__")
    assert errors.page_address("errors", "peertimeout") is None
    assert errors.page_place("across-nodes") == "docs/across-nodes.md"


def test_files_around_the_code_agree_with_it(metadata):
    assert (
        re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[1] == metadata["Version"]
    )
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["run"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert workflow["jobs"]["run"]["steps"][-1] == {"run": ".ci/run"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert hooks
    for hook in hooks:
        make, target = hook["entry"].split()
        assert make == "make"
        assert target in targets
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= set(yaml.safe_load(form.read_text()))
