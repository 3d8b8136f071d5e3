"""Terminal output of all commands: through rich if it is installed, otherwise as plain text with the same content."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Advance = Callable[[int, str], None]
"""``advance(done, text)``: add ``done`` to the progress, and show ``text`` as the current activity."""


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

    def line(self, text: str = "", *, style: str | None = None) -> None:
        """Print one line; ``style`` is a style of rich, ignored in plain text.

        Raises:
            OutputClosed: the other end of the pipe is closed.
        """
        if self._console is None:
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:
                raise OutputClosed from None
        else:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        heat: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Print a table; the first column is aligned to the left, the others to the right.

        ``heat`` is the colour of each cell, from 0 (none) to 1 (red), ignored in plain text.
        """
        if self._console is None:
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            self.line(title)
            for row in (header, ["-" * width for width in widths], *rows):
                cells = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
                self.line("  ".join(cells).rstrip())
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for i, row in enumerate(rows):
            table.add_row(*(row if heat is None else map(_warm, row, heat[i])))
        self._console.print(table)

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


def _warm(text: str, heat: float) -> Text:
    from rich.text import Text

    return Text(text, style=f"on rgb({round(200 * heat)},0,0)" if heat > 0 else "")


def _console(stream: TextIO) -> Console | None:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream)
