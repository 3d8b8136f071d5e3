"""Parser of the project's Markdown files: blocks of code, headings, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "packages").glob("*/*.md"),
    ]
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line``: where its text starts; ``adjacent``: nothing but blank lines since the block before."""

    language: str
    text: str
    line: int
    adjacent: bool


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order; ``adjacent``: nothing but blank lines lies between this block and the one before."""
    found: list[Block] = []
    language, start, between = None, 0, "x"
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r"```(.*)$", line)
        if fence and language is None:
            language, start, lines = fence[1].strip(), number + 1, []
        elif fence:
            assert not fence[1], f"line {number}: a fence inside a fence"
            found.append(Block(language or "", "\n".join(lines) + "\n", start, not between.strip()))
            language, between = None, ""
        elif language is not None:
            lines.append(line)
        else:
            between += line
    assert language is None, f"line {start - 1}: a fence without an end"
    return found


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of all headings, spelled as the usual Markdown sites do."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = 1
        unique = slug
        while unique in found:
            unique, count = f"{slug}-{count}", count + 1
        found.add(unique)
    return found


def links(text: str) -> list[str]:
    """The targets of all links and images outside of code."""
    plain = re.sub(r"`[^`\n]*`", "code", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", plain)
