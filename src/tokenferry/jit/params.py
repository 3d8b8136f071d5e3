"""Params structs: from one list of fields, make the struct that Python fills and the one that the kernel reads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

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


class Packer:
    """A writer of several adjacent fields of a params struct with one call.

    The fields are given by name, and checked when the packer is made: a field that was renamed, moved or separated from
    its neighbours causes an error at that point, instead of a value in the wrong place at a launch.

    Args:
        struct_type: The ``struct`` of a `Params`.
        names: The fields, in the order in which their values will be given.

    Attributes:
        offset: Bytes from the start of the struct to the first field.
        num_bytes: Bytes of all fields together.

    Raises:
        ConfigError: a name is no field of the struct or is an array, or the fields do not follow one another without a
            gap.

    Example:
        >>> params = Params("CopyParams", [("rows", "ptr"), ("num_rows", "u32")]).struct()
        >>> pack = Packer(type(params), "rows", "num_rows").bind(params)
        >>> pack(0x1000, 7)
        >>> params.rows, params.num_rows
        (4096, 7)
    """

    __slots__ = ("_struct", "_struct_type", "num_bytes", "offset")

    def __init__(self, struct_type: type[Struct], *names: str) -> None:
        types = _field_types(struct_type)
        codes = []
        for name in names:
            if types.get(name) not in _CODES:
                problem = "is an array; use Packer.items" if name in types else f"is none of {', '.join(types)}"
                raise ConfigError(f"Packer: {struct_type.__name__}.{name} {problem}")
            codes.append(_CODES[types[name]])
        if not names:
            raise ConfigError(f"Packer: {struct_type.__name__}: expected at least one field")
        self._check_neighbours(struct_type, names)
        self._set(struct_type, "".join(codes), getattr(struct_type, names[0]).offset)

    @classmethod
    def items(cls, struct_type: type[Struct], name: str, first: int, count: int) -> Packer:
        """Return a packer of ``count`` items of an array field, from index ``first`` on.

        Raises:
            ConfigError: the field is no array, or has fewer items.
        """
        kind = _field_types(struct_type).get(name)
        length = getattr(kind, "_length_", 0)
        if not (0 <= first < first + count <= length):
            raise ConfigError(
                f"Packer: {struct_type.__name__}.{name} has {length} items, expected items {first} to {first + count}"
            )
        made = cls.__new__(cls)
        item: Any = getattr(kind, "_type_", None)
        made._set(struct_type, _CODES[item] * count, getattr(struct_type, name).offset + first * ctypes.sizeof(item))
        return made

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

    def _set(self, struct_type: type[Struct], codes: str, offset: int) -> None:
        self._struct_type = struct_type
        self._struct = struct.Struct(f"<{codes}")
        self.offset = offset
        self.num_bytes = self._struct.size

    @staticmethod
    def _check_neighbours(struct_type: type[Struct], names: Sequence[str]) -> None:
        for before, name in itertools.pairwise(names):
            end = getattr(struct_type, before).offset + getattr(struct_type, before).size
            offset = getattr(struct_type, name).offset
            if offset != end:
                raise ConfigError(
                    f"Packer: {struct_type.__name__}.{name} is at byte {offset}, expected {end}, right behind {before}"
                )


def _field_types(struct_type: type[Struct]) -> dict[str, Any]:
    """Return the ctypes type of each field."""
    return {field[0]: field[1] for field in struct_type._fields_}
