"""NVRTC itself, on a machine with or without a GPU."""

import importlib.metadata
from types import SimpleNamespace

import pytest

from tokenferry.errors import BackendUnavailable
from tokenferry.jit import compiler, resources
from tokenferry.jit.source import Unit, options

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: nothing can be compiled here")

OPTIONS = options("sm_90a")
TEXT = '#include "a/b.cuh"\nextern "C" __global__ void toy(int* x) { *x = kSeven; }\n'


def test_a_unit_becomes_a_cubin():
    built = compiler.compile_unit(Unit("toy", TEXT, {"a/b.cuh": "constexpr int kSeven = 7;"}, OPTIONS))
    assert built.image.startswith(b"\x7fELF")
    assert resources.parse(built.log)["toy"].registers > 0
    assert not built.log.endswith(("\0", "\n"))


def test_a_unit_for_a_virtual_architecture_becomes_ptx():
    """Which the driver assembles for the GPU; it ends with a zero, as the driver expects."""
    unit = Unit("toy", TEXT, {"a/b.cuh": "constexpr int kSeven = 7;"}, options("compute_80"))
    image = compiler.compile_unit(unit).image
    assert image.startswith(b"//")
    assert b".target sm_80" in image
    assert image.endswith(b"\0")


def test_text_that_does_not_compile_gives_the_first_lines_of_the_log():
    text = TEXT + "".join(f"int v{i} = nothing{i};\n" for i in range(30))
    with pytest.raises(BackendUnavailable, match=r"(?s)^kernel toy: NVRTC 13\..*toy.cu.*nothing0") as caught:
        compiler.compile_unit(Unit("toy", text, {"a/b.cuh": "constexpr int kSeven = 7;"}, OPTIONS))
    assert len(str(caught.value).splitlines()) <= 21


def test_a_header_that_was_not_given_is_not_looked_for(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.cuh").write_text("constexpr int kSeven = 7;")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"a/b\.cuh"):
        compiler.compile_unit(Unit("toy", TEXT, {}, OPTIONS))


def test_the_version_of_the_package_is_that_of_the_library(monkeypatch):
    packaged = compiler.version()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert packaged.startswith(compiler.version())


def test_no_library(monkeypatch):
    def fail():
        raise RuntimeError("libnvrtc.so.13 not found")

    monkeypatch.setattr(compiler, "bindings", lambda name: SimpleNamespace(nvrtcVersion=fail))
    with pytest.raises(BackendUnavailable, match=r"cannot load NVRTC \(libnvrtc.so.13 not found\).*pip install"):
        compiler.compile_unit(Unit("toy", TEXT, {}, OPTIONS))
