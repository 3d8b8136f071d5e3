"""Every kernel that we ship compiles for each kind of GPU, without one, and needs no more than its header promises."""

import ctypes
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from support import kernel_promises as promises
from support.toy_kernel.spec import ROOT, SCALE
from tokenferry.errors import BackendUnavailable
from tokenferry.jit import compiler
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.jit.resources import Resources
from tokenferry.jit.source import constant_name
from tokenferry.kernels import control_block
from tokenferry.kernels.codes import RAW
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import MAX_EXPERTS, MAX_NODES, MAX_RANKS
from tokenferry.kernels.decode_combine.spec import SPEC as DECODE_COMBINE
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.kernels.dispatch_layout import spec as layout_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.dispatch_split import spec as split_spec
from tokenferry.kernels.stage_input.spec import SPEC as STAGE_INPUT

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: kernels cannot be compiled here")


def shipped() -> list[KernelSpec]:
    """Return every spec in a ``spec.py``: those that groups warm up, and those that only a command uses."""
    found: dict[KernelSpec, None] = {}
    for path in sorted(KERNELS.glob("*/spec.py")):
        module = importlib.import_module(f"tokenferry.kernels.{path.parent.name}.spec")
        things = [*vars(module).values(), *getattr(module, "SPECS", ())]
        found |= {thing: None for thing in things if isinstance(thing, KernelSpec)}
    return list(found)


MOST_ROW = 64 * 1024
MOST_SHARED = promises.SMEM_BYTES[promises.ARCH]
OTHERS = [arch for arch in promises.SMEM_BYTES if arch != promises.ARCH]
KERNELS = Path(compiler.__file__).parents[1] / "kernels"
SPECS = [SCALE, *shipped()]


def forms(spec: KernelSpec) -> list[Mapping[str, int]]:
    """Return the configs of a kernel without those that differ from an earlier one by the type of numbers alone."""
    found: dict[tuple[object, ...], Mapping[str, int]] = {}
    for config in spec.configs:
        form = *(item for item in config.items() if item[0] != "type"), config.get("type") == RAW
        found.setdefault(form, config)
    return list(found.values())


def params(configs_of: Callable[[KernelSpec], Iterable[Mapping[str, int]]]) -> list[ParameterSet]:
    """Return each kernel with each of these configs."""
    return [
        pytest.param(spec, config, id=" ".join([spec.name, *(f"{k}={v}" for k, v in config.items())]))
        for spec in SPECS
        for config in configs_of(spec)
    ]


CONFIGS = params(lambda spec: spec.configs)
FORMS = params(forms)


@pytest.mark.parametrize(("spec", "config"), CONFIGS)
def test_needs_no_more_than_promised(spec, config):
    needs, log = promises.compiled(spec, config)
    assert not promises.broken_promises(spec, needs, log), f"{spec.source}\n{log}"


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize(("spec", "config"), FORMS)
def test_needs_no_more_than_promised_elsewhere(spec, config, arch):
    """In each form of a kernel, for one type of numbers, and for rows of bytes where there are such."""
    needs, log = promises.compiled(spec, config, arch)
    assert not promises.broken_promises(spec, needs, log, arch), f"{spec.source}\n{log}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_header_says_what_is_promised(spec):
    missing = promises.unwritten_promises(spec)
    assert not missing, f"the lines '// Cost' of {spec.source} do not say {missing}"


def room(spec: KernelSpec, arch: str = promises.ARCH) -> int:
    """Return the dynamic shared memory that a block may have."""
    return promises.SMEM_BYTES[arch] - spec.static_smem


def rings(arch: str = promises.ARCH) -> dict[str, int]:
    """Return the most dynamic shared memory that kernels with rings ask for, rows of any size."""
    push, plain, fused = room(push_spec.SPEC, arch), room(dispatch_spec.SPEC, arch), room(fused_spec.SPEC, arch)
    rows = [(row, scale) for row in range(16, MOST_ROW + 1, 16) for scale in (0, 16, 224)]
    masks = [fused_spec.rings_at(E, R) for E, R in ((1, 1), (256, 8), (MAX_EXPERTS, MAX_RANKS))]
    return {
        "combine_pull": pull_spec.num_warps(room(pull_spec.SPEC, arch)) * pull_spec.WARP_BYTES,
        "combine_push": max(push_spec.cut(row, push).smem_bytes for row, _ in rows),
        "dispatch": max(dispatch_spec.cut(*row, plain).smem_bytes for row in rows),
        "dispatch_fused": max(at + fused_spec.cut_rings(*row, fused - at).smem_bytes for row in rows for at in masks),
    }


DYNAMIC = {
    "dispatch_notify": max(
        notify_spec.smem_bytes(-(-E // N), R, N)
        for E in (1, MAX_EXPERTS)
        for R in (1, MAX_RANKS)
        for N in (1, 2, MAX_NODES)
    ),
    "dispatch_split": split_spec.smem_bytes(MAX_RANKS * MAX_NODES, MAX_NODES),
    "dispatch_rails": split_spec.smem_bytes(MAX_RANKS * MAX_NODES, MAX_NODES),
    "dispatch_layout": layout_spec.smem_bytes(MAX_EXPERTS, MAX_RANKS * MAX_NODES),
    "dispatch_assign": notify_spec.smem_bytes(MAX_EXPERTS, MAX_RANKS),
    **rings(),
    "decode_dispatch": max(
        decode_dispatch_spec.smem_bytes(1 << n, decode_dispatch_spec.CHOICES_BYTES, MAX_EXPERTS, MAX_RANKS, 1 << 16)
        for n in range(24)
    ),
}
"""The most dynamic shared memory that the host asks for, within the limits of sizes; other kernels have none."""


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name in DYNAMIC], ids=lambda spec: spec.name)
def test_the_header_says_how_much_dynamic_shared_memory(spec):
    text = re.sub(r"\n//\s+", " ", spec.source.read_text())
    assert f"at most {DYNAMIC[spec.name]} B of dynamic." in text
    assert DYNAMIC[spec.name] + spec.static_smem <= MOST_SHARED


@pytest.mark.parametrize("arch", OTHERS)
def test_rings_fit_into_the_shared_memory_of_each_gpu(arch):
    specs = {spec.name: spec for spec in SPECS}
    assert all(needed <= room(specs[name], arch) for name, needed in rings(arch).items())
    assert push_spec.num_warps(room(push_spec.SPEC, arch)) >= 2  # one pushes, one sets flags
    assert pull_spec.num_warps(room(pull_spec.SPEC, arch)) >= 1


def test_every_kernel_file_has_a_spec():
    """A kernel that no spec names would be shipped untested, and a file that no kernel includes would be dead."""
    used = {spec.source for spec in SPECS}
    for spec in SPECS:
        used |= {KERNELS / name for name in spec.unit(spec.configs[0], "sm_90a").headers}
    assert set(KERNELS.rglob("*.cuh")) <= used


def code(spec: KernelSpec) -> str:
    """Return the text of a kernel and its headers, without comments and generated headers."""
    headers = spec.unit(spec.configs[0], "sm_90a").headers
    return "\n".join(re.sub(r"//.*", "", text) for name, text in headers.items() if name not in spec.generated)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_field_and_every_constant_is_read(spec):
    text = code(spec)
    fields = [name for name, _ in spec.params.struct._fields_ if not re.search(rf"\bp\.{name}\b", text)]
    constants = [name for name in spec.configs[0] if not re.search(rf"\b{constant_name(name)}\b", text)]
    assert (fields, constants) == ([], []), f"{spec.name} reads neither"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_do_not_cast_pointers_that_have_a_type(spec):
    """Only pointers to bytes are cast: to memory that holds one type or another."""
    typed = re.findall(r"^  (?!unsigned char|u8|const u8|void|const void)[\w ]+\* (\w+)", spec.params.cpp, re.MULTILINE)
    cast = re.findall(r"reinterpret_cast<[^>]*>\(p\.(\w+)", code(spec))
    assert not set(typed) & set(cast)


def test_no_shared_constant_is_declared_in_device_code():
    text = "\n".join(path.read_text() for path in KERNELS.rglob("*.cuh"))
    headers = {text for spec in SPECS for text in spec.generated.values()}
    declared = re.findall(r"^constexpr u32 (\w+) =", "\n".join(sorted(headers)), re.MULTILINE)
    assert "kMaxRanks" in declared
    assert not set(declared) & set(re.findall(r"\b(k[A-Z]\w*) =[^=]", text))


def test_what_groups_warm_up_is_tested_here():
    from tokenferry.kernels.all import SPECS as WARMED_UP

    assert set(WARMED_UP) <= set(SPECS)


def demangled(symbol):
    """Return the name of a symbol in profiles."""
    demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    demangle.restype = ctypes.c_char_p
    status = ctypes.c_int()
    found = demangle(symbol.encode(), None, None, ctypes.byref(status))
    return symbol if status.value else found.decode()


@pytest.mark.parametrize("word", ["dispatch", "combine"])
def test_each_direction_of_decode_calls_is_one_kernel_in_profiles(word):
    """DeepEP's tests count the lines with the word in a table, and look for ``::`` and the word in a trace."""
    names = [demangled(spec.symbol) for spec in (decode_dispatch_spec.SPEC, DECODE_COMBINE)]
    assert sum(word in name for name in names) == sum(f"::{word}(" in name for name in names) == 1


def test_names_are_unique():
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)


# ---- the tests above, tested: each breaks one promise of the toy kernel


def toy(tmp_path, old: str, new: str, **changes) -> KernelSpec:
    text = SCALE.source.read_text()
    assert old in text
    path = tmp_path / "kernel.cuh"
    path.write_text(text.replace(old, new))
    return dataclasses.replace(SCALE, source=path, **changes)


def broken(spec: KernelSpec) -> list[str]:
    return promises.broken_promises(spec, *promises.compiled(spec, spec.configs[0]))


SPILL = """float v[80];
  volatile float* f = (volatile float*)p.y;
#pragma unroll
  for (int j = 0; j < 80; j++) v[j] = f[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 80; j++) f[j] = v[79 - j] * v[j];
"""


def test_a_spill_is_seen(tmp_path):
    spec = toy(
        tmp_path, "__shared__ int", f"{SPILL}__shared__ int", max_threads=1024, static_smem=4096, max_registers=64
    )
    spec.source.write_text(spec.source.read_text().replace("(kMaxThreads) scale", "(kMaxThreads, 2) scale"))
    assert [line.split()[0] for line in broken(spec)] == ["spills"]


def test_too_many_registers_are_seen(tmp_path):
    spec = toy(tmp_path, "__shared__ int", f"{SPILL}__shared__ int")
    assert [line.split()[2] for line in broken(spec)] == ["registers,"]


def test_too_much_shared_memory_is_seen(tmp_path):
    assert broken(toy(tmp_path, "held[kMaxThreads]", "held[kMaxThreads + 1]")) == [
        "needs 1028 bytes of static shared memory, promised 1024"
    ]


def test_a_block_that_cannot_be_launched_is_seen():
    """1024 threads can have 64 registers each; registers are allocated in eights."""
    spec = dataclasses.replace(SCALE, max_threads=1024, max_registers=65)
    assert promises.broken_promises(spec, Resources(64, 0, 0, 0), "") == []
    assert ["no __launch_bounds__?" in line for line in promises.broken_promises(spec, Resources(65, 0, 0, 0), "")] == [
        True
    ]


def test_a_warning_of_the_assembler_is_seen():
    log = "scale.cu(3): warning of the front end\nptxas warning : setmaxnreg ignored"
    assert promises.broken_promises(SCALE, Resources(32, 0, 0, 0), log) == ["the assembler warns"]
    assert promises.broken_promises(SCALE, Resources(32, 0, 0, 0), log.splitlines()[0]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<= 32 registers", "<= 132 registers"),
        ("0 spills", "10 spills"),
        ("1024 B of static", "11024 B of static"),
        ("// Cost ", "// Price"),
    ],
)
def test_a_header_that_says_something_else_is_seen(tmp_path, old, new):
    assert promises.unwritten_promises(SCALE) == []
    assert promises.unwritten_promises(toy(tmp_path, old, new)) != []


def test_two_layouts_of_one_struct_do_not_compile(tmp_path):
    params = Params("ScaleParams", [("x", "ptr:const int"), ("y", "ptr:int"), ("num", "i32")])
    params.cpp = params.cpp.replace("int* y", "short y")
    with pytest.raises(BackendUnavailable, match=r"(?s)kernel any: NVRTC .*Python and C\+\+ lay out ScaleParams"):
        promises.compiled(dataclasses.replace(SCALE, params=params), {"offset": 0})


def test_two_layouts_of_the_control_block_do_not_compile():
    name = control_block.HEADER.name
    other = STAGE_INPUT.generated[name].replace("u32 masked;", "u64 masked;")
    assert other != STAGE_INPUT.generated[name]
    spec = dataclasses.replace(STAGE_INPUT, generated={**STAGE_INPUT.generated, name: other})
    with pytest.raises(BackendUnavailable, match=r"(?s)kernel any: NVRTC .*static assertion failed"):
        promises.compiled(spec, {})


def test_mixed_fields_lie_where_ctypes_puts_them():
    """The static_asserts of the struct are the test: every kind of field, with padding before, between and behind."""
    kinds = ["i32", "ptr", "f32", "ptr:const u64[3]", "u32[3]", "i64", "f32[1]", "u64[2]", "ptr:void[8]", "i32[5]"]
    fields = [("x", "ptr:const int"), ("y", "ptr:int"), ("num", "i32")]
    fields += [(f"f{i}", kind) for i, kind in enumerate(kinds)]
    params = Params("ScaleParams", fields)
    assert params.cpp.count("static_assert") == len(fields) + 1
    promises.compiled(dataclasses.replace(SCALE, params=params), {"offset": 0})


def test_the_root_is_where_the_headers_are():
    unit = SCALE.unit({"offset": 7}, promises.ARCH)
    assert sorted(unit.headers) == ["device/more/once.cuh", "device/twice.cuh", "scale/kernel.cuh"]
    assert unit.headers["device/twice.cuh"] == (ROOT / "device/twice.cuh").read_text()
    assert "constexpr int kOffset = 7;" in unit.text
    assert "constexpr int kMaxThreads = 256;" in unit.text
