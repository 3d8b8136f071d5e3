"""Terminal output of all commands: through rich if it is installed, otherwise as plain text with the same content."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Advance = Callable[[int, str], None]
"""``advance(done, text)``: add ``done`` to the progress, and show ``text`` as the current activity."""

NOTE_COLUMNS = 100
"""The width of notes where no terminal has one."""


class OutputClosed(Exception):  # noqa: N818 - not an error: ``tokenferry doctor | head -1`` has what it wants
    """Nobody reads the output any more. Not an OSError, which commands take for a failure of what they measure."""


class Screen:
    """Prints lines, tables and progress.

    Args:
        stream: The output stream; None: standard output.
        fancy: Whether to use rich; None: if it is installed and the stream is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, fancy: bool | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self._console = _console(self.stream) if fancy or (fancy is None and self.stream.isatty()) else None

    def line(self, text: str = "", *, style: str | None = None, whole: bool = False) -> None:
        """Print a line, which a terminal that is narrower gets in several, broken between words.

        Args:
            text: The line.
            style: A style of rich, ignored in plain text.
            whole: Do not break it: it is to be copied.

        Raises:
            OutputClosed: the other end of the pipe is closed.
        """
        if not whole and self.stream.isatty():
            text = "\n".join(fitted(line, shutil.get_terminal_size().columns) for line in text.split("\n"))
        if self._console is None:
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:
                raise OutputClosed from None
        else:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print sentences that explain what stands above them: fitted to the terminal, elsewhere to `NOTE_COLUMNS`."""
        width = shutil.get_terminal_size().columns if self.stream.isatty() else NOTE_COLUMNS
        self.line("\n".join(fitted(line, width, more="  ") for line in text.split("\n")), whole=True)

    def item(self, head: str, text: str, *, style: str | None = None) -> None:
        """Print a text behind its head; on a terminal further lines are indented as far as the first."""
        if self.stream.isatty():
            width = max(shutil.get_terminal_size().columns - 1, len(head) + 20)
            lines = textwrap.wrap(text, width - len(head), break_long_words=False, break_on_hyphens=False)
            text = f"\n{' ' * len(head)}".join(lines)
        self.line(head + text, style=style, whole=True)

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        heat: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Print a table; the first column is aligned to the left, the others to the right.

        On a terminal that is too narrow for all columns it is printed in parts, of which each begins with the columns
        that name a row. ``heat`` is the colour of each cell, from 0 (none) to 1 (red), ignored in plain text.
        """
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        parts = _parts([width + self._gap for width in widths], _num_keys(rows), self._width)
        if self._console is None:
            self.line(title)
            for part in parts:
                if part is not parts[0]:
                    self.line()
                for row in (header, ["-" * width for width in widths], *rows):
                    cells = (f"{row[i]:>{widths[i]}}" if i else f"{row[0]:<{widths[0]}}" for i in part)
                    self.line("  ".join(cells).rstrip(), whole=True)
            return
        from rich.table import Table

        for part in parts:
            table = Table(title=title if part is parts[0] else None, title_justify="left")
            for i in part:
                table.add_column(header[i], justify="right" if i else "left", overflow="fold")
            for number, row in enumerate(rows):
                table.add_row(*(row[i] if heat is None else _warm(row[i], heat[number][i]) for i in part))
            self._console.print(table)

    @property
    def _gap(self) -> int:
        """What a column takes beside its text."""
        return 2 if self._console is None else 3  # spaces; a line between two of them

    @property
    def _width(self) -> int | None:
        """What fits into a line; None: everything, since programs and pagers read whole lines."""
        if self._console is not None:
            return self._console.width - 1  # the last line
        return shutil.get_terminal_size().columns + self._gap if self.stream.isatty() else None

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """Show progress: as a bar with rich, else as a line for each tenth, if it comes with a text."""
        if self._console is None:
            yield self._plain_progress(title, total)
            return
        from rich.progress import Progress

        with Progress(console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=total)

            def advance(done: int, text: str) -> None:
                progress.update(task, advance=done, description=f"{title} {text}".rstrip())

            yield advance

    def _plain_progress(self, title: str, total: int) -> Advance:
        so_far = 0

        def advance(done: int, text: str) -> None:
            nonlocal so_far
            tenth, so_far = so_far * 10 // total, so_far + done
            if text and so_far * 10 // total > tenth:
                self.line(f"{title}: {so_far * 100 // total:3d} % {text}")

        return advance


def fitted(line: str, width: int, *, more: str = "") -> str:
    """Return a line in as many as it takes, indented like the first; words, such as paths, are never broken.

    Args:
        line: The line.
        width: The columns that there are.
        more: What the further lines are indented beyond the first.
    """
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip(" "))) + more
    wrapped = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapped)


def _num_keys(rows: Sequence[Sequence[str]]) -> int:
    """Return how many columns, from the left, it takes to tell the rows apart; one if they cannot be."""
    columns = len(rows[0]) if rows else 1
    return next((n for n in range(1, columns) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)


def _parts(widths: Sequence[int], num_keys: int, width: int | None) -> list[list[int]]:
    """Return the columns of each part of a table; a column that does not fit at all gets a part of its own."""
    if width is None or sum(widths) <= width:
        return [list(range(len(widths)))]
    while num_keys > 1 and 3 * sum(widths[:num_keys]) > 2 * width:
        num_keys -= 1
    keys = list(range(num_keys))
    parts = [[*keys]]
    for i in range(num_keys, len(widths)):
        if len(parts[-1]) > num_keys and sum(widths[j] for j in (*parts[-1], i)) > width:
            parts.append([*keys])
        parts[-1].append(i)
    return parts


def _warm(text: str, heat: float) -> Text:
    from rich.text import Text

    return Text(text, style=f"on rgb({round(200 * heat)},0,0)" if heat > 0 else "")


def _console(stream: TextIO) -> Console | None:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream)
