"""The text that the compiler gets, and the key of the result in the cache."""

import dataclasses
from pathlib import Path

import pytest

from tokenferry.errors import ConfigError
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.jit.source import Unit, check_arch, constant_name, target

UNIT = Unit("toy", "text", {"a.cuh": "1", "b.cuh": "2"}, ("-x", "-y"))


def spec(folder: Path, configs=({"num_stages": 4},)) -> KernelSpec:
    (folder / "toy").mkdir()
    (folder / "device").mkdir()
    (folder / "toy" / "kernel.cuh").write_text('// a comment: #include "not/this.cuh"\n#include "device/a.cuh"\n')
    (folder / "device" / "a.cuh").write_text(' #  include "device/b.cuh"\n#include "device/a.cuh"\n')
    (folder / "device" / "b.cuh").write_text('#include "device/a.cuh"\nint b;\n')
    params = Params("ToyParams", [("n", "i32")])
    return KernelSpec("toy", folder / "toy" / "kernel.cuh", folder, params, 32, 128, 0, configs)


def test_headers_are_found_through_headers_and_once(tmp_path):
    assert sorted(spec(tmp_path).unit({"num_stages": 4}, "sm_90a").headers) == [
        "device/a.cuh",
        "device/b.cuh",
        "toy/kernel.cuh",
    ]


def test_the_unit(tmp_path):
    toy = spec(tmp_path)
    unit = toy.unit({"num_stages": 4}, "sm_100")
    assert unit.text.index("typedef") < unit.text.index("constexpr int kNumStages = 4;")
    assert unit.text.index("constexpr int kMaxThreads = 128;") < unit.text.index("struct ToyParams {")
    assert unit.text.endswith('#include "toy/kernel.cuh"\n')
    assert unit.options[0] == "-arch=sm_100"


def test_a_source_outside_the_root_goes_by_its_own_name(tmp_path):
    toy = spec(tmp_path)
    other = dataclasses.replace(toy, include=tmp_path / "device")
    (tmp_path / "toy" / "kernel.cuh").write_text('#include "b.cuh"')
    (tmp_path / "device" / "b.cuh").write_text("int b;")
    assert sorted(other.unit({"num_stages": 4}, "sm_90a").headers) == ["b.cuh", "kernel.cuh"]


def test_generated_headers_need_no_file(tmp_path):
    """They are part of the unit, and so of its key, once a file includes them; like files, they may include others."""
    toy = spec(tmp_path)
    (tmp_path / "device" / "b.cuh").write_text('#include "generated/c.cuh"\n')
    generated = {"generated/c.cuh": '#include "generated/d.cuh"\n', "generated/d.cuh": "int d;", "generated/e.cuh": ""}
    toy = dataclasses.replace(toy, generated=generated)
    headers = toy.unit({"num_stages": 4}, "sm_90a").headers
    assert sorted(headers) == ["device/a.cuh", "device/b.cuh", "generated/c.cuh", "generated/d.cuh", "toy/kernel.cuh"]
    assert headers["generated/d.cuh"] == "int d;"


def test_a_missing_header_is_named(tmp_path):
    toy = spec(tmp_path)
    (tmp_path / "device" / "b.cuh").unlink()
    with pytest.raises(ConfigError, match=r'kernel toy/kernel.cuh: device/a.cuh includes "device/b.cuh", which cannot'):
        toy.unit({"num_stages": 4}, "sm_90a")


def test_only_configs_of_the_spec_are_compiled(tmp_path):
    with pytest.raises(ConfigError, match=r"kernel toy: config \{'num_stages': 5\} is not one that it is compiled and"):
        spec(tmp_path).unit({"num_stages": 5}, "sm_90a")


@pytest.mark.parametrize("config", [{"num_stages": 0.5}, {"kStages": 4}, {"Stages": 4}, {"num stages": 4}])
def test_bad_constants(tmp_path, config):
    with pytest.raises(ConfigError, match="config: "):
        spec(tmp_path, configs=(config,)).unit(config, "sm_90a")


def test_names_of_constants():
    assert constant_name("wide") == "kWide"
    assert constant_name("max_rows_2") == "kMaxRows2"


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(UNIT, name="toys"),
        dataclasses.replace(UNIT, text="texts"),
        dataclasses.replace(UNIT, options=("-x", "-z")),
        dataclasses.replace(UNIT, options=("-x-y",)),
        dataclasses.replace(UNIT, headers={"a.cuh": "1", "b.cuh": "3"}),
        dataclasses.replace(UNIT, headers={"a.cuh": "1", "c.cuh": "2"}),
        dataclasses.replace(UNIT, headers={"a.cuh": "1"}),
        dataclasses.replace(UNIT, headers={"a.cuh": "2", "b.cuh": "1"}),
    ],
)
def test_whatever_changes_the_binary_changes_the_key(other):
    assert UNIT.key("13.0.88") == dataclasses.replace(UNIT, headers=dict(reversed(UNIT.headers.items()))).key("13.0.88")
    assert UNIT.key("13.0.88") != other.key("13.0.88")
    assert UNIT.key("13.0.88") != UNIT.key("13.0.89")


def test_an_architecture_says_what_its_gpus_have():
    assert target("sm_90a") == {"sm": 90, "dependent_launch": True}
    assert target("compute_80") == {"sm": 80, "dependent_launch": False}
    assert target("sm_120a")["sm"] == 120


@pytest.mark.parametrize("arch", ["sm_75", "90", "sm_90b", "compute_"])
def test_architectures_that_no_kernel_is_written_for(arch):
    with pytest.raises(ConfigError, match=rf"architecture '{arch}': expected .* from 8\.0 on"):
        target(arch)


@pytest.mark.parametrize(
    ("wanted", "gpu"),
    [
        ("sm_90a", "sm_90a"),
        ("compute_80", "sm_90a"),
        ("compute_90", "sm_120a"),
        ("sm_80", "sm_89"),
        ("sm_90", "sm_90a"),
    ],
)
def test_code_that_a_gpu_runs(wanted, gpu):
    check_arch(wanted, gpu)


@pytest.mark.parametrize(
    ("wanted", "gpu"),
    [("sm_80", "sm_90a"), ("compute_100", "sm_90a"), ("compute_90a", "sm_100a"), ("sm_89", "sm_86")],
)
def test_code_that_a_gpu_does_not_run(wanted, gpu):
    """PTX runs on all later GPUs, machine code on later ones of the same generation, code for a variant on it alone."""
    with pytest.raises(
        ConfigError, match=rf"^TOKENFERRY_ARCH={wanted}: a GPU of {gpu} cannot run such code; .*compute_80"
    ):
        check_arch(wanted, gpu)
