"""Declarations that the host and the kernels share: written once, in Python, and emitted as a C++ header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ITEM_BYTES = {"u8": 1, "u32": 4, "u64": 8}


@dataclass(frozen=True)
class Field:
    """A field of a struct: a word or an array of words.

    Attributes:
        name: Name in Python and in C++.
        type: Type of an item: ``"u8"``, ``"u32"`` or ``"u64"``.
        shape: Shape of the array; empty for a single word.
        meaning: One line for the reader of the C++ struct.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    meaning: str

    @property
    def item_bytes(self) -> int:
        """Size of an item."""
        return _ITEM_BYTES[self.type]

    @property
    def num_bytes(self) -> int:
        """Size of the whole field."""
        return self.item_bytes * math.prod(self.shape)


@dataclass(frozen=True)
class StructLayout:
    """Where the fields of a struct lie.

    Attributes:
        fields: The fields, in order.
        offsets: Offset of each field in bytes, by name.
        num_bytes: Size of the struct.
    """

    fields: tuple[Field, ...]
    offsets: Mapping[str, int]
    num_bytes: int


class Header:
    """A C++ header that grows by one declaration at a time, in the order in which Python makes them.

    Args:
        name: Name in ``#include`` lines, such as ``"generated/codes.cuh"``.
        source: The Python file that declares, for the header's first line.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self._lines = [f"// Generated from {source}: change it there.", "#pragma once", ""]

    @property
    def text(self) -> str:
        """The header, with all that has been declared so far."""
        return "\n".join([*self._lines, ""])

    def constant(self, name: str, value: int, meaning: str) -> int:
        """Declare ``constexpr u32 <name> = <value>;``.

        Args:
            name: Name in C++.
            value: An unsigned number of 32 bits.
            meaning: One line for the reader of the header.

        Returns:
            int: The value.
        """
        self._lines.append(f"constexpr u32 {name} = {value};  // {meaning}")
        return value

    def struct(self, name: str, fields: Sequence[Field]) -> StructLayout:
        """Declare a struct of words, with a static_assert on its size and on the offset of every field.

        Args:
            name: Name in C++.
            fields: The fields, in order; each has to lie at a multiple of its item's size, so that there is no padding.

        Returns:
            StructLayout: Where the fields lie.
        """
        offsets, end = {}, 0
        for field in fields:
            offsets[field.name] = end
            end += field.num_bytes
        members = [
            f"    {field.type} {field.name}{''.join(f'[{size}]' for size in field.shape)};  // {field.meaning}"
            for field in fields
        ]
        asserts = [
            f"static_assert(TOKENFERRY_OFFSET({name}, {field}) == {offset});" for field, offset in offsets.items()
        ]
        self._lines += [
            "",
            f"struct {name} {{",
            *members,
            "};",
            *asserts,
            f"static_assert(sizeof({name}) == {end});",
            "",
        ]
        return StructLayout(tuple(fields), offsets, end)
