"""The entry point of the command line: help, version, exit statuses."""

import os
import subprocess
import sys

import pytest

import tokenferry
from tokenferry.cli import deep_ep_path, doctor, main
from tokenferry.errors import BackendUnavailable


def stopped(argv):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    return stop.value.code


def test_version(capsys):
    assert stopped(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenferry {tokenferry.__version__}\n"


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_help_explains_each_command(command, capsys):
    assert stopped([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(main.COMMANDS[command].DESCRIPTION.split())[:80] in text
    assert "Exit status" in text


@pytest.mark.parametrize("argv", [[], ["fly"], ["bench", "--wings", "2"], ["demo", "--steps", "none"]])
def test_wrong_command_lines(argv, capsys):
    assert stopped(argv) == 2
    assert "usage: tokenferry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (BackendUnavailable("no transport"), 1, "tokenferry doctor: no transport"),
        (FileNotFoundError("no text"), 1, "tokenferry doctor: no text"),
        (KeyboardInterrupt(), 130, "tokenferry doctor: interrupted"),
    ],
)
def test_status_of_errors(monkeypatch, capsys, error, status, text):
    def fail(args, screen):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert main.main(["doctor"]) == status
    assert text in capsys.readouterr().err


def test_bad_variable_is_a_wrong_option(monkeypatch, capsys):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "soon")
    assert main.main(["demo", "--steps", "1", "--ranks", "3"]) == 2
    assert "--ranks 3" in capsys.readouterr().err


def test_deep_ep_path_prints_a_folder_that_works(capsys):
    assert main.main(["deep-ep-path"]) == 0
    out = capsys.readouterr().out
    assert out == deep_ep_path.folder() + "\n"
    program = "import deep_ep; print(deep_ep.Buffer.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([out.strip(), os.path.dirname(tokenferry.__path__[0])])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("tokenferry.compat.deep_ep")


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tokenferry.cli", "deep-ep-path"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert os.path.isdir(done.stdout.strip())
    assert done.stderr == ""
