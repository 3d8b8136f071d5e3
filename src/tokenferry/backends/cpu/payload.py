"""The contents of a message of the CPU backend: how rows and their metadata are packed and unpacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.routing import as_bytes, as_words
from tokenferry.layout import Sections

Fill = Callable[[int, list[Tensor]], None]
"""Writes the message to one rank: gets the rank and, per section, ``[num_rows, width]`` uint8 to write to."""


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedRows:
    """The rows that one rank sent.

    Attributes:
        num_rows: How many there are.
        sections: Per section, ``[num_rows, width]`` uint8; empty if the rows are this rank's own and were not copied.
    """

    num_rows: int
    sections: list[Tensor]


class Payload:
    """The data of each row and its metadata, such as ids and weights, which are joined so that one copy moves them all.

    Rows that a rank sends to itself need not be copied into a message: they are then read from the payload.

    Args:
        rows: ``[rows, width]`` of any dtype.
        metadata: By name: ``[rows]`` or ``[rows, width]`` of any dtype, or None for what is not sent.
    """

    def __init__(self, rows: Tensor, **metadata: Tensor | None) -> None:
        self._rows = rows.contiguous()
        self._metadata = {
            name: (piece if piece.ndim == 2 else piece[:, None]).contiguous()
            for name, piece in metadata.items()
            if piece is not None
        }
        columns = [as_bytes(piece) for piece in self._metadata.values()]
        padding = -sum(piece.shape[1] for piece in columns) % 8
        fill = torch.zeros(rows.shape[0], padding, dtype=torch.uint8, device="cpu")
        self._joined = torch.cat([*columns, fill], dim=1)
        self.sections = Sections((rows.shape[1] * rows.element_size(), self._joined.shape[1]))
        widths = dict(zip(self._metadata, (piece.shape[1] for piece in columns), strict=True))
        self.fields = {
            "bytes of rows": self.sections.widths[0],
            **{f"bytes of {name}": widths.get(name, 0) for name in metadata},
        }
        self._own: Tensor | slice = slice(0, 0)

    def fill(self, rows: Sequence[Tensor | slice], own: int) -> Fill:
        """Return a function that writes the rows ``rows[r]`` and their metadata into the message to rank r.

        ``own`` is this rank.
        """
        self._own = rows[own]

        def write(dst: int, sections: list[Tensor]) -> None:
            which = rows[dst]
            if isinstance(which, slice):
                sections[0].copy_(as_bytes(self._rows[which]))
                sections[1].copy_(self._joined[which])
                return
            for section, piece in zip(sections, (as_words(self._rows), as_words(self._joined)), strict=True):
                if section.numel():
                    torch.index_select(piece, 0, which, out=as_words(section))

        return write

    def view_rows(self, source: ReceivedRows) -> Tensor:
        """Return the rows of one source as ``[rows, width]``, without a copy if they are contiguous."""
        if not source.num_rows:
            return self._rows[:0]
        return source.sections[0].view(self._rows.dtype) if source.sections else self._rows[self._own]

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
            part = as_words(whole[start : start + num])
            if num and source.sections:
                part.copy_(as_words(source.sections[0]))
            elif num and isinstance(self._own, Tensor):
                torch.index_select(as_words(self._rows), 0, self._own, out=part)
            elif num:
                part.copy_(as_words(self._rows[self._own]))
            start += num
        return whole

    def gather_metadata(self, received: Sequence[ReceivedRows]) -> dict[str, Tensor]:
        """Copy the metadata of all sources; returns ``[rows, width]`` in the original dtype, by name."""
        parts = [
            source.sections[1] if source.sections else self._joined[self._own] for source in received if source.num_rows
        ]
        joined = torch.cat([self._joined[:0], *parts])
        out, start = {}, 0
        for name, piece in self._metadata.items():
            end = start + piece.shape[1] * piece.element_size()
            flat = joined[:, start:end].reshape(-1).clone()
            out[name] = flat.view(piece.dtype).view(joined.shape[0], piece.shape[1])
            start = end
        return out
