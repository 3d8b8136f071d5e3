"""The input of the compiler: a prelude, the params struct, and the kernel with all headers that it includes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenferry.errors import ConfigError

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_CONSTANT = re.compile(r"[a-z][a-z0-9_]*")
_ARCH = re.compile(r"(?:sm|compute)_(\d{2,3})a?")
OLDEST = 80
"""The least compute capability that kernels are written for: 8.0, Ampere."""
_DEPENDENT_LAUNCH = 90
"""The first with programmatic dependent launch."""

_PRELUDE = """\
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
#ifdef __CUDACC_RTC__  // NVRTC has neither offsetof nor __builtin_offsetof
#define TOKENFERRY_OFFSET(type, field) __INTADDR__(&(((type*)0)->field))
#else
#define TOKENFERRY_OFFSET(type, field) __builtin_offsetof(type, field)
#endif
"""


@dataclass(frozen=True)
class Unit:
    """One translation unit: everything that determines the binary, except the version of the compiler.

    Attributes:
        name: Name of the kernel.
        text: Source text of the unit, which includes the headers by name.
        headers: Text of each header that it includes, directly or not, by the name in the ``#include`` line.
        options: Options for NVRTC, the architecture first.
    """

    name: str
    text: str
    headers: Mapping[str, str]
    options: tuple[str, ...]

    @property
    def is_ptx(self) -> bool:
        """Whether it becomes PTX, which the driver assembles when it loads it, instead of machine code."""
        return self.options[0].startswith("-arch=compute_")

    def key(self, compiler: str) -> str:
        """Return the SHA-256 of the unit and of the compiler's version, in hexadecimal."""
        digest = hashlib.sha256()
        parts = [compiler, self.name, self.text, *self.options]
        for name in sorted(self.headers):
            parts += [name, self.headers[name]]
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)  # the length keeps "ab", "c" apart from "a", "bc"
        return digest.hexdigest()


def compute_capability(arch: str) -> int:
    """Return the constant ``kSm`` for an architecture: 90 for ``"sm_90a"``, 80 for ``"compute_80"``.

    Raises:
        ConfigError: it is not the name of an architecture, or one that no kernel is written for.
    """
    found = _ARCH.fullmatch(arch)
    if found is None or int(found[1]) < OLDEST:
        raise ConfigError(
            f"architecture {arch!r}: expected sm_XY for machine code or compute_XY for PTX, of a compute capability "
            f"X.Y from {OLDEST // 10}.{OLDEST % 10} on, such as sm_90a or compute_80"
        )
    return int(found[1])


def target(arch: str) -> dict[str, int]:
    """Return the constants that say what the GPUs of an architecture have.

    Raises:
        ConfigError: as `compute_capability`.
    """
    capability = compute_capability(arch)
    return {"sm": capability, "dependent_launch": capability >= _DEPENDENT_LAUNCH}


def check_arch(wanted: str, gpu: str) -> None:
    """Check that a GPU of one architecture can run code for another.

    Args:
        wanted: What kernels are to be compiled for.
        gpu: The architecture of the GPU, such as ``"sm_90a"``.

    Raises:
        ConfigError: it cannot, or no kernel is written for it.
    """
    code, own = compute_capability(wanted), compute_capability(gpu)
    same = code == own if wanted.endswith("a") else code <= own
    if not same or (wanted.startswith("sm_") and code // 10 != own // 10):
        raise ConfigError(
            f"TOKENFERRY_ARCH={wanted}: a GPU of {gpu} cannot run such code; it runs PTX of compute capabilities up to "
            f"its own (compute_{OLDEST} to compute_{own}), and {gpu}"
        )


def options(arch: str, *, relocatable: bool = False) -> tuple[str, ...]:
    """Return the options that every kernel is compiled with, for an architecture such as ``"sm_90a"``.

    Args:
        arch: The architecture.
        relocatable: Whether the kernel is to be linked.
    """
    # Without the last one, NVRTC would also find headers in the current folder, which the key of the cache ignores.
    common = (f"-arch={arch}", "-std=c++17", "--ptxas-options=-v", "-lineinfo", "--no-source-include")
    return (*common, "-rdc=true") if relocatable else common


def translation_unit(source: Path, params_cpp: str, constants: Mapping[str, int], include: Path) -> tuple[str, str]:
    """Return the text of a kernel's translation unit, and the name by which it includes the kernel's source.

    Args:
        source: The kernel's ``.cuh`` file.
        params_cpp: ``Params.cpp``.
        constants: ``{"num_stages": 4}`` becomes ``constexpr int kNumStages = 4;``.
        include: Root folder of the ``#include`` lines.

    Raises:
        ConfigError: the name of a constant is not in snake_case, or its value is not an int.
    """
    constant = "[[maybe_unused]] constexpr int"  # some say what a GPU has, which not every kernel asks for
    lines = [f"{constant} {constant_name(name)} = {_int(name, value)};" for name, value in sorted(constants.items())]
    try:
        own = source.relative_to(include).as_posix()
    except ValueError:
        own = source.name
    return "\n".join([_PRELUDE, *lines, "", params_cpp, f'#include "{own}"', ""]), own


def constant_name(name: str) -> str:
    """Return the C++ name of a constant: ``kNumStages`` for ``num_stages``.

    Raises:
        ConfigError: the name is not in snake_case.
    """
    if not _CONSTANT.fullmatch(name):
        raise ConfigError(f"config: {name!r} is not in snake_case; write 'num_stages' for the constant kNumStages")
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def _int(name: str, value: int) -> int:
    if not isinstance(value, int):
        raise ConfigError(f"config: {name}={value!r}: expected an int")
    return int(value)  # True is written as 1


def headers(own: str, source: Path, include: Path, generated: Mapping[str, str]) -> dict[str, str]:
    """Return the kernel's text and that of every header that it includes, directly or not, by name.

    Args:
        own: Name by which the unit includes the kernel's source.
        source: The kernel's ``.cuh`` file.
        include: Root folder of the ``#include`` lines.
        generated: Text of headers that are not files, by name; they take precedence.

    Raises:
        ConfigError: a header is neither generated nor a file below ``include``; names it and the file that includes it.
    """
    found = {own: source.read_text()}
    waiting = [own]
    while waiting:
        user = waiting.pop()
        for name in _INCLUDE.findall(found[user]):
            if name in found:
                continue
            try:
                found[name] = generated[name] if name in generated else (include / name).read_text()
            except OSError as error:
                raise ConfigError(f'kernel {own}: {user} includes "{name}", which cannot be read: {error}') from error
            waiting.append(name)
    return found
