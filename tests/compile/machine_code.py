"""Compares the machine code of every kernel in two trees, without a GPU.

    PYTHONPATH=old/src python tests/compile/machine_code.py before.json
    PYTHONPATH=src python tests/compile/machine_code.py after.json before.json [old_word=new_word ...]

The words rename kernels and config constants of the old tree. Where a change only moves out-of-line functions, calls to
them differ and nothing else, which the number of differing instructions shows.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tokenferry.kernels
from tokenferry.jit import compiler
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.resources import parse

ARCH = "sm_90a"
INSTRUCTION_BYTES = 16


def specs() -> Iterator[KernelSpec]:
    """Yield the kernels of the package, by folder."""
    for module in pkgutil.iter_modules(tokenferry.kernels.__path__):
        if module.ispkg and module.name != "device":
            spec = importlib.import_module(f"tokenferry.kernels.{module.name}.spec")
            yield from (value for value in vars(spec).values() if isinstance(value, KernelSpec))


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each section of an ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        at = strings + header[0]
        yield elf[at : elf.index(b"\0", at)].decode(), elf[header[4] : header[4] + header[5]]


def measure() -> dict[str, dict[str, object]]:
    """Return the instructions and registers of every config of every kernel."""
    found = {}
    for spec in specs():
        for config in spec.configs:
            built = compiler.compile_unit(spec.unit(config, ARCH))
            code = b"".join(data for name, data in sorted(sections(built.image)) if name.startswith(".text"))
            registers = max(used.registers for used in parse(built.log).values())
            name = " ".join([spec.name, *(f"{key}={value}" for key, value in sorted(config.items()))])
            found[name] = {"code": code.hex(), "registers": registers}
    return found


def instructions(code: str) -> Counter[str]:
    """Count the instructions of a kernel."""
    step = 2 * INSTRUCTION_BYTES
    return Counter(code[i : i + step] for i in range(0, len(code), step))


def compare(before: dict[str, dict[str, object]], after: dict[str, dict[str, object]]) -> Iterator[str]:
    """Yield a line for each kernel of ``after``."""
    for name, kernel in after.items():
        old = before.get(name)
        if old is None:
            yield f"{name}: new"
        elif old["code"] == kernel["code"]:
            yield f"{name}: the same"
        else:
            was, now = instructions(str(old["code"])), instructions(str(kernel["code"]))
            sizes = f"{was.total()} -> {now.total()}, {(was - now).total()} differ"
            yield f"{name}: instructions {sizes}; registers {old['registers']} -> {kernel['registers']}"


def renamed(kernels: dict[str, dict[str, object]], words: list[str]) -> dict[str, dict[str, object]]:
    """Return kernels under new names: ``words`` are ``old=new``, for whole words of a name."""
    pairs = dict(word.split("=") for word in words)
    return {
        " ".join(sorted_config(re.sub(r"[a-z_0-9]+", lambda word: pairs.get(word[0], word[0]), name))): kernel
        for name, kernel in kernels.items()
    }


def sorted_config(name: str) -> list[str]:
    """Return the kernel and its constants, in order."""
    kernel, *config = name.split()
    return [kernel, *sorted(config)]


if __name__ == "__main__":
    now = measure()
    Path(sys.argv[1]).write_text(json.dumps(now))
    if len(sys.argv) > 2:
        was = renamed(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3:])
        sys.stdout.writelines(f"{line}\n" for line in compare(was, now))
