"""`tokenferry explain-error`: every exception has a section, which reads well on a terminal."""

import re

import pytest

import tokenferry
from support import documents
from tokenferry import errors
from tokenferry.cli import explain_error, main

NAMES = [name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)]


@pytest.mark.parametrize("name", NAMES)
def test_every_exception_is_explained(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main(["explain-error", name]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == name
    assert name == "TokenferryError" or re.match("also: .*; the group afterwards: ", lines[0])
    assert len(" ".join(lines[2:])) > 100
    assert max(map(len, lines)) <= 80
    assert not re.search(r"`|\]\(|\*\*", "\n".join(lines))


def test_a_section_goes_on_below_headings_that_are_no_exceptions(capsys):
    assert main.main(["explain-error", "PeerTimeout"]) == 0
    said = capsys.readouterr().out
    assert said.index("A masked rank can come back.") < said.index("Ranks that come back:\n")
    assert "        group.mask(rank, masked=False)" in said
    assert main.main(["explain-error", "ResourceError"]) == 0
    assert "Broken groups" not in capsys.readouterr().out, "a heading of a higher rank begins another part of the page"


@pytest.mark.parametrize("name", ["peertimeout", "tokenferry.PeerTimeout", "tokenferry.errors.PeerTimeout"])
def test_names_as_tracebacks_and_people_write_them(name, capsys):
    assert main.main(["explain-error", name]) == 0
    assert capsys.readouterr().out.startswith("PeerTimeout\n")


def test_another_name(capsys):
    assert main.main(["explain-error", "PeerTimout"]) == 2
    assert capsys.readouterr().err.endswith("did you mean PeerTimeout?\n")
    for part in ("TimeoutError", "Peer", "timeout"):
        assert main.main(["explain-error", part]) == 2
        assert capsys.readouterr().err.endswith(f"no exception '{part}'; did you mean PeerTimeout?\n")
    assert main.main(["explain-error", "xyz"]) == 2
    assert "choose one of TokenferryError, ArgumentError" in capsys.readouterr().err


def test_without_a_name_all_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main(["explain-error"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if not line.startswith(" ")) == sorted(NAMES)
    assert max(map(len, lines)) <= 80
    assert "    A constructor option, a MoeShape or a TOKENFERRY_* variable is wrong;" in lines


def test_marks_become_text():
    section = "One *word* and `a*b` of [x](#y),\nsee [z](p.md#q).\n\n- a b\n- c\n\nEnd.\n\n```text\n  code *\n```\n"
    assert explain_error.as_text(section, 24) == [
        "One word and a*b of x,",
        "see z (docs/p.md).",
        "",
        "- a b",
        "- c",
        "",
        "End.",
        "",
        "      code *",
    ]


def test_exceptions_that_messages_send_to_exist():
    package = documents.ROOT / "src" / "tokenferry"
    text = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    named = set(re.findall(r"`tokenferry explain-error (\w+)`", text))
    assert "PeerTimeout" in named
    assert named <= set(tokenferry.__all__)
