"""The SM resources that a kernel needs, as reported by the assembler."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\s.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\s*ptxas info\s*: Used (?P<registers>\d+) registers(?:[^\n]*?, (?P<smem>\d+) bytes smem)?)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel.

    Attributes:
        registers: Registers per thread.
        spill_bytes: Bytes of spill stores and loads, of the kernel and the functions that it calls.
        stack_bytes: Bytes of stack per thread, of the kernel and the functions that it calls.
        static_smem_bytes: Bytes of static shared memory per block.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    static_smem_bytes: int


def parse(log: str) -> dict[str, Resources]:
    """Return the resources of every kernel in a log of ``--ptxas-options=-v``, by name.

    The log does not say which kernel calls a function that was not inlined, so it counts for every kernel in the log.
    A kernel whose registers are missing from the log is left out.
    """
    found = {match["name"]: match for match in _FUNCTION.finditer(log)}
    entries = set(_ENTRY.findall(log))
    called = [match for name, match in found.items() if name not in entries]
    kernels = {}
    for name in sorted(entries):
        own = found.get(name)
        if own is None or own["registers"] is None:
            continue
        frames = [own, *called]
        kernels[name] = Resources(
            registers=int(own["registers"]),
            spill_bytes=sum(int(f["stores"]) + int(f["loads"]) for f in frames),
            stack_bytes=sum(int(f["stack"]) for f in frames),
            static_smem_bytes=int(own["smem"] or 0),
        )
    return kernels
