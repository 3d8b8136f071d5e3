"""`import deep_ep`: by PYTHONPATH, and by the distribution in packages/deep_ep, each in an environment of its own."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import tokenferry
from tokenferry.compat import deep_ep_path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "packages" / "deep_ep"
PROGRAM = HERE / "deep_ep_program.py"
SOURCE = str(Path(tokenferry.__file__).parents[1])
"""Where tokenferry is, for environments in which it is not installed but on PYTHONPATH."""


MODULES = (
    "import sys, deep_ep\n"
    "assert deep_ep.buffer.Buffer is deep_ep.buffers.legacy.Buffer is deep_ep.Buffer\n"
    "assert deep_ep.utils.EventOverlap is deep_ep.utils.event.EventOverlap is deep_ep.EventOverlap\n"
    "assert deep_ep.buffers.elastic.ElasticBuffer is deep_ep.ElasticBuffer\n"
    "assert deep_ep.buffers.ep.EPBuffer is deep_ep.EPBuffer\n"
    "assert callable(deep_ep.hybrid_ep_buffer.indices_to_map)\n"
    "assert deep_ep.buffers.ep is sys.modules['deep_ep.buffers.ep']\n"
)
"""A program that finds the modules of DeepEP by attributes, as `import deep_ep` alone binds them there."""


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=clean | env, check=False)


def test_the_folder_holds_nothing_but_the_name():
    assert [name for name in os.listdir(deep_ep_path.folder()) if name != "__pycache__"] == ["deep_ep"]


def test_installing_tokenferry_alone_shadows_nothing():
    done = run(sys.executable, "-c", "import importlib.util as u; print(u.find_spec('deep_ep'))", PYTHONPATH=SOURCE)
    assert done.returncode == 0, done.stderr
    assert "tokenferry" not in done.stdout


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 2)])
def test_a_program_for_deep_ep_runs_with_pythonpath(ranks, nodes):
    path = os.pathsep.join([deep_ep_path.folder(), SOURCE])
    done = run(sys.executable, PROGRAM, str(ranks), PYTHONPATH=path, TOKENFERRY_RANKS_PER_NODE=str(ranks // nodes))
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.split()
    assert where.startswith(deep_ep_path.folder())
    assert int(found) == nodes


def test_the_name_alone_brings_its_modules():
    path = os.pathsep.join([deep_ep_path.folder(), SOURCE])
    done = run(sys.executable, "-c", MODULES, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


class Environment:
    """A fresh virtual environment that also sees the packages of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({path!r})" for path in seen]
        (self.packages / "outside.pth").write_text("\n".join([SOURCE, *lines]) + "\n")
        self.source = folder / "source"
        shutil.copytree(PACKAGE, self.source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))

    def install(self) -> subprocess.CompletedProcess:
        flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-input")
        return run(self.python, "-m", "pip", "install", *flags, self.source)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "env")


def test_a_program_for_deep_ep_runs_with_the_distribution(environment):
    done = environment.install()
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(environment.python, PROGRAM, "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(environment.packages / "deep_ep" / "__init__.py"), "1"]
    done = run(environment.python, "-c", MODULES)
    assert done.returncode == 0, done.stderr
    # Another distribution that is installed over it leaves files behind: no mixture is run.
    (environment.packages / "deep_ep" / "utils.py").write_text("")
    done = run(environment.python, "-c", "import deep_ep")
    assert "ImportError: deep_ep: utils.py in" in done.stderr


def test_the_distribution_refuses_to_overwrite_another(environment):
    other = environment.packages / "deep_ep"
    info = environment.packages / "other_deep_ep-7.0.dist-info"
    other.mkdir()
    info.mkdir()
    (other / "__init__.py").write_text("ours = False\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-deep-ep\nVersion: 7.0\n")
    (info / "RECORD").write_text("deep_ep/__init__.py,,\nother_deep_ep-7.0.dist-info/METADATA,,\n")
    done = environment.install()
    assert done.returncode != 0
    assert "belongs to other-deep-ep 7.0" in done.stdout + done.stderr
    assert (other / "__init__.py").read_text() == "ours = False\n"
    assert not list(environment.packages.glob("tokenferry_deep_ep*"))
