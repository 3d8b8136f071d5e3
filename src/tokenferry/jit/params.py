"""Params structs: from one list of fields, make the struct that Python fills and the one that the kernel reads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenferry.errors import ConfigError

_CTYPES: dict[str, Any] = {
    "ptr": ctypes.c_uint64,
    "u64": ctypes.c_uint64,
    "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32,
    "i32": ctypes.c_int32,
    "f32": ctypes.c_float,
}
_CODES = {
    ctypes.c_uint64: "Q",
    ctypes.c_int64: "q",
    ctypes.c_uint32: "I",
    ctypes.c_int32: "i",
    ctypes.c_float: "f",
}
"""Format characters of the field types for Python's ``struct`` module."""
_TYPE = re.compile(r"(?P<kind>ptr|u64|i64|u32|i32|f32)(?::(?P<target>[A-Za-z_][\w: ]*))?(?:\[(?P<count>[1-9]\d*)\])?")


class Struct(ctypes.Structure):
    """A params struct, with the argument list that the driver expects for it.

    Fields are plain attributes; numbers that do not fit wrap around, as in C. Setting a field that does not exist
    raises AttributeError. Pointer fields hold addresses: the caller keeps the memory alive.
    """

    # No __dict__: a misspelt field must not become an attribute that no kernel sees.
    __slots__ = ("_arguments", "arguments_address")

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as ctypes.Structure
        super().__init__(*args, **kwargs)
        self._arguments = ctypes.c_void_p(ctypes.addressof(self))
        self.arguments_address = ctypes.addressof(self._arguments)


class Params:
    """The params struct of a kernel.

    Args:
        name: Name of the C++ struct, such as ``"DispatchParams"``.
        fields: ``(name, type)`` in order. Types: ``"u64" "i64" "u32" "i32" "f32"``; ``"ptr"`` (``unsigned char*``) and
            ``"ptr:T"`` (``T*``, such as ``"ptr:const int"``); arrays of these: ``"ptr[8]"``, ``"u32[4]"``.
            Alignment is natural, as in C++.

    Attributes:
        name: Name of the C++ struct.
        cpp: The C++ struct, followed by a static_assert on its size and on the offset of every field.
        struct: The ctypes struct (a ``Struct``); pointers are 64-bit integers.

    Raises:
        ConfigError: a type is unknown, or a name is used twice, starts with ``_`` or is no identifier.
    """

    def __init__(self, name: str, fields: Sequence[tuple[str, str]]) -> None:
        self.name = name
        seen: set[str] = set()
        members, lines = [], []
        for field, kind in fields:
            if not field.isidentifier() or field.startswith("_") or field in seen or field in Struct.__slots__:
                raise ConfigError(f"{name}: field name {field!r} is used twice, reserved or no public identifier")
            seen.add(field)
            ctype, declaration = _member(name, field, kind)
            members.append((field, ctype))
            lines.append(f"  {declaration};")
        self.struct: type[Struct] = type(name, (Struct,), {"__slots__": (), "_fields_": members})
        self.cpp = "\n".join([f"struct {name} {{", *lines, "};", *self._asserts(members), ""])

    def _asserts(self, members: list[tuple[str, Any]]) -> list[str]:
        text = 'static_assert(%s == %d, "Python and C++ lay out %s differently");'
        size = text % (f"sizeof({self.name})", ctypes.sizeof(self.struct), self.name)
        offsets = (
            text % (f"TOKENFERRY_OFFSET({self.name}, {field})", getattr(self.struct, field).offset, self.name)
            for field, _ in members
        )
        return [size, *offsets]


def _member(struct: str, field: str, kind: str) -> tuple[Any, str]:
    """Return the ctypes type and the C++ declaration of one field."""
    match = _TYPE.fullmatch(kind)
    if match is None or (match["target"] and match["kind"] != "ptr"):
        raise ConfigError(
            f"{struct}.{field}: type {kind!r} is unknown; expected {', '.join(_CTYPES)} or ptr:T, and [n] for an array"
        )
    cpp = f"{(match['target'] or 'unsigned char').strip()}*" if match["kind"] == "ptr" else match["kind"]
    ctype = _CTYPES[match["kind"]]
    if match["count"] is None:
        return ctype, f"{cpp} {field}"
    return ctype * int(match["count"]), f"{cpp} {field}[{match['count']}]"


@dataclass(frozen=True, slots=True)
class Items:
    """Some items of an array field, for a `Packer`.

    Attributes:
        name: The field.
        first: Index of the first item.
        count: Number of items.
        raw: Whether they are given as one bytes object instead of numbers.
    """

    name: str
    first: int
    count: int
    raw: bool = False


class Packer:
    """A writer of several adjacent fields of a params struct with one call.

    The fields are given by name, and checked when the packer is made: a field that was renamed, moved or separated from
    its neighbours causes an error at that point, instead of a value in the wrong place at a launch.

    Args:
        struct_type: The ``struct`` of a `Params`.
        fields: Names of fields, or `Items` of an array field, in the order in which their values will be given. Items
            that are left out at the end of an array, or between `Items` of the same array, are set to 0.

    Attributes:
        offset: Bytes from the start of the struct to the first value.
        num_bytes: Bytes of all values together.

    Raises:
        ConfigError: a name is no field of the struct; or it is an array, and Items are no items of an array; or the
            values do not follow one another without a gap.

    Example:
        >>> params = Params("CopyParams", [("rows", "ptr"), ("num_rows", "u32")]).struct()
        >>> pack = Packer(type(params), "rows", "num_rows").bind(params)
        >>> pack(0x1000, 7)
        >>> params.rows, params.num_rows
        (4096, 7)
    """

    __slots__ = ("_struct", "_struct_type", "num_bytes", "offset")

    def __init__(self, struct_type: type[Struct], *fields: str | Items) -> None:
        if not fields:
            raise ConfigError(f"Packer: {struct_type.__name__}: expected at least one field")
        spans = [_span(struct_type, field) for field in fields]
        codes = "<" + spans[0].codes
        for before, span in itertools.pairwise(spans):
            codes += "x" * _gap(struct_type, before, span) + span.codes
        self._struct_type = struct_type
        self._struct = struct.Struct(codes)
        self.offset = spans[0].start
        self.num_bytes = self._struct.size

    def bind(self, params: Struct) -> Callable[..., None]:
        """Return a function that writes the fields of ``params``, given their values in order.

        It is `struct.Struct.pack_into` with its first arguments bound, with the same cost and exceptions. The memory of
        ``params`` stays alive as long as the function.

        Raises:
            ConfigError: ``params`` is another struct.
        """
        if type(params) is not self._struct_type:
            raise ConfigError(f"Packer: expected {self._struct_type.__name__}, got {type(params).__name__}")
        return functools.partial(self._struct.pack_into, memoryview(params).cast("B"), self.offset)


class _Span(NamedTuple):
    """Where a value lies in a struct: the bytes [start, end) of a field that ends at ``field_end``."""

    name: str
    start: int
    end: int
    field_end: int
    codes: str


def _span(struct_type: type[Struct], field: str | Items) -> _Span:
    name = field if isinstance(field, str) else field.name
    types = _field_types(struct_type)
    kind = types.get(name)
    label = f"{struct_type.__name__}.{name}"
    if kind is None:
        raise ConfigError(f"Packer: {label} is none of {', '.join(types)}")
    place = getattr(struct_type, name)
    field_end = place.offset + place.size
    if isinstance(field, str):
        if kind not in _CODES:
            raise ConfigError(f"Packer: {label} is an array; use Items")
        return _Span(name, place.offset, field_end, field_end, _CODES[kind])
    length: int = getattr(kind, "_length_", 0)
    item: Any = getattr(kind, "_type_", None)
    if not (0 <= field.first < field.first + field.count <= length):
        raise ConfigError(
            f"Packer: {label} has {length} items, expected items {field.first} to {field.first + field.count}"
        )
    width = ctypes.sizeof(item)
    start = place.offset + field.first * width
    end = start + field.count * width
    return _Span(name, start, end, field_end, f"{end - start}s" if field.raw else _CODES[item] * field.count)


def _gap(struct_type: type[Struct], before: _Span, span: _Span) -> int:
    """Return the bytes between two values: 0, or items of the first one's array that are left out."""
    gap = span.start - before.end
    inside = before.name == span.name and gap >= 0
    if gap and not inside and span.start != before.field_end:
        raise ConfigError(
            f"Packer: {struct_type.__name__}.{span.name} is at byte {span.start}, expected {before.field_end}, right "
            f"behind {before.name}"
        )
    return gap


def _field_types(struct_type: type[Struct]) -> dict[str, Any]:
    """Return the ctypes type of each field."""
    return {field[0]: field[1] for field in struct_type._fields_}
