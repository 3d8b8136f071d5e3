"""The resources that the specs of kernels promise, compared with those that the compiler reports."""

import dataclasses
import functools
import re
from collections.abc import Mapping

from tokenferry.jit import compiler, resources
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.resources import Resources
from tokenferry.jit.source import Unit

ARCH = "sm_90a"
SMEM_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    ARCH: 227 << 10,
    "sm_100a": 227 << 10,
    "sm_120a": 99 << 10,
}
"""Shared memory that a block may have, by architecture: 1 KB less than an SM has."""
SM_REGISTERS = 65536


class HashableUnit:
    """A unit that equals any other with the same content, so that the kernels of one file compile once."""

    def __init__(self, unit: Unit) -> None:
        self.unit = dataclasses.replace(unit, name="any")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashableUnit) and self.unit == other.unit

    def __hash__(self) -> int:
        return hash(self.unit.key(""))


@functools.cache
def built(unit: HashableUnit) -> compiler.Built:
    return compiler.compile_unit(unit.unit)


def compiled(spec: KernelSpec, config: Mapping[str, int], arch: str = ARCH) -> tuple[Resources, str]:
    """Return the resources that a kernel needs, and the whole log."""
    log = built(HashableUnit(spec.unit(config, arch))).log
    found = resources.parse(log)
    assert spec.symbol in found, f"{spec.source}: no kernel {spec.symbol}; it has {sorted(found)}"
    return found[spec.symbol], log


def broken_promises(spec: KernelSpec, needs: Resources, log: str, arch: str = ARCH) -> list[str]:
    """Return a line for each number that the compiler does not confirm."""
    promised = (arch != ARCH and spec.other_registers) or spec.max_registers
    allocated = -(-needs.registers // 8) * 8 * spec.max_threads
    wrong = {
        f"spills {needs.spill_bytes} bytes": needs.spill_bytes > 0,
        f"needs {needs.registers} registers, promised {promised}": needs.registers > promised,
        f"needs {needs.static_smem_bytes} bytes of static shared memory, promised {spec.static_smem}": (
            needs.static_smem_bytes > spec.static_smem
        ),
        f"{spec.max_threads} threads need {allocated} registers, an SM has {SM_REGISTERS}: no __launch_bounds__?": (
            allocated > SM_REGISTERS
        ),
        "the assembler warns": "warning" in "".join(line for line in log.splitlines() if line.startswith("ptxas")),
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def unwritten_promises(spec: KernelSpec) -> list[str]:
    """Return the phrases that are missing from the ``// Cost`` lines of the kernel's head."""
    header = re.match(r"(?://.*\n)+", spec.source.read_text())
    cost = re.search(r"^// Cost\b(?:.*\n)(?://  .*\n)*", header[0] if header else "", re.MULTILINE)
    text = " ".join(line.removeprefix("//").strip() for line in cost[0].splitlines()) if cost else ""
    elsewhere = f" (elsewhere <= {spec.other_registers})" if spec.other_registers else ""
    wanted = [f"<= {spec.max_registers} registers{elsewhere}", "0 spills"]
    if spec.static_smem:
        wanted.append(f"{spec.static_smem} B of static shared memory")
    return [phrase for phrase in wanted if not re.search(rf"(?<!\d){re.escape(phrase)}", text)]
