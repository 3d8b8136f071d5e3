"""The contents of a message of the CPU backend: how rows and their metadata are packed and unpacked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.routing import as_bytes, as_words
from tokenferry.layout import Sections


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedRows:
    """The rows that one rank sent.

    Attributes:
        num_rows: How many there are.
        sections: Per section, ``[num_rows, width]`` uint8; empty if the rows are this rank's own and were not copied.
        own: Then: which rows of the payload they are.
        note: See `Outgoing`.
    """

    num_rows: int
    sections: list[Tensor]
    own: Tensor | slice | None = None
    note: int = 0


class Payload:
    """The data of each row and its metadata, such as ids and weights, which are joined so that one copy moves them all.

    Rows that a rank sends to itself need not be copied into a message: they are then read from the payload.

    Args:
        rows: ``[rows, width]`` of any dtype.
        metadata: By name: ``[rows]`` or ``[rows, width]`` of any dtype, or None for what is not sent.
    """

    def __init__(self, rows: Tensor, **metadata: Tensor | None) -> None:
        self._rows = rows.contiguous()
        pieces = {
            name: (piece if piece.ndim == 2 else piece[:, None]).contiguous()
            for name, piece in metadata.items()
            if piece is not None
        }
        columns = [as_bytes(piece) for piece in pieces.values()]
        padding = -sum(piece.shape[1] for piece in columns) % 8
        fill = torch.zeros(rows.shape[0], padding, dtype=torch.uint8, device="cpu")
        self._joined = torch.cat([*columns, fill], dim=1)
        self._columns = {name: (piece.dtype, piece.shape[1]) for name, piece in pieces.items()}
        self.sections = Sections((rows.shape[1] * rows.element_size(), self._joined.shape[1]))
        widths = dict(zip(pieces, (piece.shape[1] for piece in columns), strict=True))
        self.fields = {
            "bytes of rows": self.sections.widths[0],
            **{f"bytes of {name}": widths.get(name, 0) for name in metadata},
        }

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self._rows.shape[0]

    def has(self, name: str) -> bool:
        """Return whether each row has metadata of this name."""
        return name in self._columns

    def arrived(self, source: ReceivedRows) -> Payload:
        """Return the payload that consists of the rows of one source, to pass them on; they are not copied."""
        payload = copy.copy(self)
        payload._rows, payload._joined = self.view_rows(source), self._joined[:0]
        if source.sections:
            payload._joined = source.sections[1]
        return payload

    def write(self, which: Tensor | slice, sections: list[Tensor]) -> None:
        """Write rows and their metadata into a message: per section, ``[num_rows, width]`` uint8."""
        if isinstance(which, slice):
            sections[0].copy_(as_bytes(self._rows[which]))
            sections[1].copy_(self._joined[which])
            return
        for section, piece in zip(sections, (self._rows, self._joined), strict=True):
            if section.numel():
                words, out = as_words(piece, section)
                torch.index_select(words, 0, which, out=out)

    def view_rows(self, source: ReceivedRows) -> Tensor:
        """Return the rows of one source as ``[rows, width]``, without a copy if they are contiguous."""
        if not source.num_rows:
            return self._rows[:0]
        return source.sections[0].view(self._rows.dtype) if source.sections else self._rows[source.own]

    def gather_rows(
        self, received: Sequence[ReceivedRows], allocator: Allocator, num_rows: int | None = None
    ) -> Tensor:
        """Copy the rows of all sources to ``[rows, width]``; with ``num_rows``, the rows beyond them are undefined."""
        if num_rows is None:
            num_rows = sum(source.num_rows for source in received)
        whole = allocator.empty(num_rows, self._rows.shape[1], dtype=self._rows.dtype)
        start = 0
        for source in received:
            num = source.num_rows
            part = whole[start : start + num]
            if num and isinstance(source.own, Tensor):
                rows, out = as_words(self._rows, part)
                torch.index_select(rows, 0, source.own, out=out)
            elif num:
                rows, out = as_words(source.sections[0] if source.sections else self._rows[source.own], part)
                out.copy_(rows)
            start += num
        return whole

    def metadata(self) -> dict[str, Tensor]:
        """Copy the metadata of all rows; see `gather_metadata`."""
        return self.gather_metadata([ReceivedRows(self.num_rows, [], slice(None))])

    def gather_metadata(self, received: Sequence[ReceivedRows]) -> dict[str, Tensor]:
        """Copy the metadata of all sources; returns ``[rows, width]`` in the original dtype, by name."""
        parts = [
            source.sections[1] if source.sections else self._joined[source.own]
            for source in received
            if source.num_rows
        ]
        joined = torch.cat([self._joined[:0], *parts])
        out, start = {}, 0
        for name, (dtype, width) in self._columns.items():
            end = start + width * dtype.itemsize
            flat = joined[:, start:end].reshape(-1).clone()
            out[name] = flat.view(dtype).view(joined.shape[0], width)
            start = end
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """What one exchange sends.

    Attributes:
        payload: All rows.
        rows: Per destination rank, its rows of the payload.
        counts: Per destination rank, how many they are.
        note: A number for all receivers that goes along with the rows; the call defines what it means.
    """

    payload: Payload
    rows: Sequence[Tensor | slice]
    counts: Sequence[int]
    note: int = 0
