"""One list of fields gives the struct that Python fills and the struct that the kernel reads."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
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
_TYPE = re.compile(r"(?P<kind>ptr|u64|i64|u32|i32|f32)(?::(?P<target>[A-Za-z_][\w: ]*))?(?:\[(?P<count>[1-9]\d*)\])?")


class Struct(ctypes.Structure):
    """A params struct with the argument list that the driver wants, packed once.

    Fields are plain attributes; numbers that do not fit wrap around, as in C. A field that does not exist raises
    AttributeError. Fields of pointers hold addresses: the caller keeps alive what they point to.
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
        name: Name of the C++ struct, such as ``"MoveParams"``.
        fields: ``(name, type)`` in order. Types: ``"u64" "i64" "u32" "i32" "f32"``; ``"ptr"`` (``unsigned char*``) and
            ``"ptr:T"`` (``T*``, such as ``"ptr:const int"``); arrays of these: ``"ptr[8]"``, ``"u32[4]"``.
            Alignment is natural, as in C++.

    Attributes:
        name: As given.
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
    """The ctypes type and the C++ declaration of one field."""
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
