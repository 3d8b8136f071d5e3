"""The screen: the same content with rich and without."""

import io
import re

from tokenferry.cli.screen import Screen


def words(text):
    """The readable text, without colours, cursor movements and frames."""
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
