"""`tokenferry explain-error`: the section of docs/errors.md about an exception, on the terminal."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from pathlib import Path

from tokenferry import errors
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError, page_address, page_place

DESCRIPTION = """\
Shows what an exception of tokenferry means, whether the group is still usable, and what to do; without a name, lists
the exceptions. It is the section of docs/errors.md, and needs no network.
"""
WIDEST = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the name."""
    parser.add_argument("name", nargs="?", help="an exception, such as PeerTimeout")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print the section, or the list."""
    page, width = read_page(), min(WIDEST, shutil.get_terminal_size().columns)
    known = sections(page)
    if args.name is None:
        for name in known:
            screen.line(name, style="bold")
            for line in textwrap.wrap(_summary(name), width, initial_indent="    ", subsequent_indent="    "):
                screen.line(line)
        return 0
    name = _known(args.name, list(known))
    screen.line(name, style="bold")
    for line in [*textwrap.wrap(afterwards(page, name), width), "", *as_text(known[name], width)]:
        screen.line(line)
    address = page_address("errors", name.lower())
    if address:
        screen.line(f"\n{address}")
    return 0


def _known(given: str, names: list[str]) -> str:
    """Return an exception by its name, however it was written.

    Raises:
        ConfigError: there is none.
    """
    by_lower = {name.lower(): name for name in names}
    name = given.rpartition(".")[2].lower()
    if name not in by_lower:
        near = _with_word(name.removesuffix("error"), names) or [
            by_lower[one] for one in difflib.get_close_matches(name, by_lower, n=1)
        ]
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
        raise ConfigError(f"tokenferry has no exception {given!r}; {hint}")
    return by_lower[name]


def _with_word(part: str, names: list[str]) -> list[str]:
    """Return the names of which a word begins with ``part``, in lower case: for "timeout" `PeerTimeout`."""
    return [
        name
        for name in names
        if len(part) > 2 and any(name.lower().startswith(part, word.start()) for word in re.finditer("[A-Z]", name))
    ]


def read_page() -> str:
    """Return docs/errors.md: of the clone, or the copy that an installed package holds beside this file."""
    copy = Path(__file__).with_name("errors.md")
    clone = Path(__file__).resolve().parents[3] / "docs" / "errors.md"
    return (copy if copy.exists() else clone).read_text(encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    """Return the text below each heading that is the name of an exception; other headings of its rank belong to it."""
    parts = re.split(r"^(##+) (.*)$", page, flags=re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for marks, heading, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if heading.isidentifier():
            name = heading
            found[name] = text.strip()
        elif marks == "##":
            name = ""
        elif name:
            found[name] += f"\n\n{heading}:\n\n{text.strip()}"
    return found


def afterwards(page: str, name: str) -> str:
    """Return what the table says of an exception, or of its parent: what else it is, and how the group is then."""
    rows = re.findall(r"^\| \[(\w+)\]\(#\w+\)[^|]* \| (.*?) \| (.*?) \|$", page, flags=re.MULTILINE)
    by_name = {row: f"also: {plain(also)}; the group afterwards: {plain(state)}" for row, also, state in rows}
    parents = (parent.__name__ for parent in getattr(errors, name).__mro__)
    return next((by_name[parent] for parent in parents if parent in by_name), "")


def as_text(section: str, width: int) -> list[str]:
    """Return the lines of a section without its marks, fitted to a width; blocks of code as they are."""
    lines: list[str] = []
    for i, part in enumerate(re.split(r"^```.*$", section, flags=re.MULTILINE)):
        if i % 2:
            lines += [*textwrap.indent(part.strip("\n"), "    ").splitlines(), ""]
            continue
        for block in filter(None, re.split(r"\n\s*\n", part.strip())):
            for item in re.split(r"\n(?=- |\d+\. )", block):
                mark = re.match(r"- |\d+\. |", item)
                indent = " " * len(mark[0] if mark else "")
                lines += textwrap.wrap(plain(item), width, subsequent_indent=indent, break_on_hyphens=False)
            lines.append("")
    return lines[:-1]


def plain(markdown: str) -> str:
    """Return text without emphasis and code marks, on one line; a link to another page names it."""
    text = re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", " ".join(markdown.split()))
    text = re.sub(r"\[([^\]]*)\]\(([\w-]+)\.md[^)]*\)", lambda link: f"{link[1]} ({page_place(link[2])})", text)
    parts = re.split(r"`+([^`]*)`+", text)
    return "".join(part if i % 2 else re.sub(r"\*+", "", part) for i, part in enumerate(parts))


def _summary(name: str) -> str:
    """Return the first paragraph of an exception's docstring, without marks."""
    return plain(getattr(errors, name).__doc__.split("\n\n", 1)[0])
