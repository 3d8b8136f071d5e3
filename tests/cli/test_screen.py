"""The terminal output has the same content with rich and without."""

import io
import re

import pytest

from tokenferry.cli import screen
from tokenferry.cli.screen import Screen


def words(text):
    """Return the readable text: no colours, cursor movements or frames."""
    return re.findall(r"[\w.:%/=-]*\w[\w.:%/=-]*", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", " ", text))


def show(screen):
    screen.line("a line with [brackets] and 42", style="green")
    screen.table("title", ("call", "us"), [("dispatch", "12"), ("combine, exact", "3456")])
    screen.line("the end")


def test_same_content_with_rich_and_without(any_terminal):
    show(Screen())
    plain = io.StringIO()
    show(Screen(plain))
    assert words(any_terminal.getvalue()) == [w for w in words(plain.getvalue()) if set(w) != {"-"}]


WIDE = ("library", "call", "rows", "T", "isolated us", "p05", "p95", "launch", "back to back us", "MB out", "of limit")
ROWS = [
    ["tokenferry", "dispatch", rows, "4096", "1234567.8", "1234.5", "2345.6", "12.3", "123456.7", "272.04", limit]
    for rows, limit in (("fp8", "91 %"), ("bf16", "92 %"))
]


@pytest.mark.parametrize("columns", [80, 100, 250])
def test_a_wide_table_fits_the_terminal_and_breaks_no_number(any_terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    Screen().table("cases", WIDE, ROWS, heat=[[0.0] * len(WIDE)] * 2)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", any_terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    seen = [words(line) for line in lines]
    for row in ROWS:
        parts = [line for line in seen if line[:3] == row[:3]]
        assert [word for line in parts for word in line[3:]] == " ".join(row[3:]).replace(" %", "").split()
        assert (len(parts) == 1) == (columns == 250)
    assert [line for line in seen if "cases" in line] == [["cases"]]


def test_whole_lines_into_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Screen().table("cases", WIDE, ROWS)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 100


LONG = "  us at least: at 340 GB/s, the best that 8 H200 behind NVSwitch reach; see https://docs.example/tokenferry/benchmarks/#gpus"


def test_a_long_line_is_broken_between_words_on_a_terminal_only(any_terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    Screen().line(LONG)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", any_terminal.getvalue()).splitlines()
    assert [word for line in lines for word in line.split()] == LONG.split()
    assert all(line.startswith("  ") for line in lines)
    assert all(len(line) <= 40 or "https:" in line for line in lines)
    any_terminal.truncate(0)
    Screen().line(LONG, whole=True)
    assert LONG in any_terminal.getvalue()
    pipe = io.StringIO()
    Screen(pipe).line(LONG)
    assert pipe.getvalue() == LONG + "\n"


def test_notes_are_broken_into_a_pipe_too(any_terminal, monkeypatch):
    """Further lines are indented, so that each note is seen as one."""
    note, pipe = f"network: {'many words ' * 30}end", io.StringIO()
    Screen(pipe).note(f"{note}\nshort")
    *lines, end = pipe.getvalue().splitlines()
    assert end == "short"
    assert max(map(len, lines)) <= screen.NOTE_COLUMNS
    assert len(lines) > 1
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == note
    monkeypatch.setenv("COLUMNS", "60")
    Screen().note(note)
    assert max(map(len, any_terminal.getvalue().splitlines())) <= 60


def test_a_column_that_does_not_fit_gets_a_part_of_its_own():
    assert screen._parts([10, 30, 100, 5, 5], 1, 60) == [[0, 1], [0, 2], [0, 3, 4]]
    assert screen._parts([10, 31, 100, 5, 5], 2, 60) == [[0, 1], [0, 2], [0, 3, 4]], "keys leave a third to the others"
    assert screen._parts([10, 30, 100, 5, 5], 2, 60) == [[0, 1, 2], [0, 1, 3, 4]]
    assert screen._num_keys([["a", "x", "1"], ["a", "y", "1"]]) == 2
    assert screen._num_keys([["a", "x"], ["a", "x"]]) == screen._num_keys([]) == 1


def test_rich_is_used_on_a_terminal(terminal):
    Screen().line("x", style="green")
    assert "\x1b[" in terminal.getvalue()


def test_no_colour_without_rich(terminal, without_rich):
    Screen().line("x", style="green")
    assert terminal.getvalue() == "x\n"


def test_plain_into_a_pipe(capsys):
    show(Screen())
    assert capsys.readouterr().out.splitlines() == [
        "a line with [brackets] and 42",
        "title",
        "call              us",
        "--------------  ----",
        "dispatch          12",
        "combine, exact  3456",
        "the end",
    ]


def test_plain_progress_is_a_line_for_each_tenth_that_has_a_text(capsys):
    with Screen().progress("work", 40) as advance:
        for i in range(40):
            advance(1, "" if i < 20 else f"at {i}")
    assert capsys.readouterr().out.splitlines() == [
        "work:  60 % at 23",
        "work:  70 % at 27",
        "work:  80 % at 31",
        "work:  90 % at 35",
        "work: 100 % at 39",
    ]


def test_progress_with_rich_shows_the_text_and_leaves_lines(terminal):
    screen = Screen()
    with screen.progress("work", 2) as advance:
        advance(1, "half")
        screen.line("between")
        advance(1, "all")
    seen = words(terminal.getvalue())
    assert "between" in seen
    assert "work" in seen
    assert "100%" in seen


def test_a_text_behind_its_head_keeps_clear_of_it_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    for stream, expected in (
        (io.StringIO(), "name  one two three four five six seven eight nine\n"),
        (Terminal(), "name  one two three four five six seven\n      eight nine\n"),
    ):
        Screen(stream, fancy=False).item("name  ", "one two three four five six seven eight nine")
        assert stream.getvalue() == expected
