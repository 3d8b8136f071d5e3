"""The entry point of the command line: help, version, completion, exit statuses."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import tokenferry
from support.commands import options_of_all_commands
from tokenferry.cli import deep_ep_path, doctor, failure, main, parser
from tokenferry.cli.bench import PARTS
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.testing.world import WorldError


def stopped(argv):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    return stop.value.code


def test_version(capsys):
    assert stopped(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenferry {tokenferry.__version__}\n"


@pytest.mark.parametrize("command", list(parser.COMMANDS))
def test_help_explains_each_command(command, capsys):
    assert stopped([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(parser.load(command).DESCRIPTION.split())[:80] in text
    assert "Exit status" in text


@pytest.mark.parametrize(("name", "part"), PARTS.items())
def test_help_explains_each_part_of_the_benchmark(name, part, capsys):
    assert stopped(["bench", name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(part.description.split()) in text
    assert part.text in parts_in_help(capsys)


def parts_in_help(capsys):
    assert stopped(["bench", "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_no_command_prints_the_help(capsys):
    assert main.main([]) == 0
    without = capsys.readouterr().out
    assert stopped(["--help"]) == 0
    assert without == capsys.readouterr().out


@pytest.mark.parametrize("argv", [["fly"], ["bench", "cpu", "--wings", "2"], ["demo", "--steps", "none"]])
def test_wrong_command_lines(argv, capsys):
    assert stopped(argv) == 2
    assert "usage: tokenferry" in capsys.readouterr().err


def test_a_word_that_is_nearly_a_command(capsys):
    assert stopped(["bnech", "--quick"]) == 2
    assert capsys.readouterr().err.endswith("error: there is no command 'bnech'; did you mean bench?\n")
    assert stopped(["fly"]) == 2
    assert capsys.readouterr().err.endswith("choose one of " + ", ".join(parser.COMMANDS) + "\n")


def test_what_is_wrong_is_broken_between_words(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stderr", terminal)
    assert stopped(["fly"]) == 2
    said = terminal.getvalue()
    assert max(map(len, said.splitlines())) <= 60
    assert " ".join(said.split()).endswith("choose one of " + ", ".join(parser.COMMANDS))


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        (["bench", "gpu", "--quik"], "gpu: error: unrecognized arguments: --quik; did you mean --quick?\n"),
        (
            ["explain", "--token", "1", "--expert", "2", "--zzz"],
            "explain: error: unrecognized arguments: --zzz\n",
        ),
        (["bench", "decode", "--device", "cpu"], "bench decode: error: unrecognized arguments: --device cpu\n"),
        (["bench"], f"one of {', '.join(PARTS)}; `tokenferry bench --help` says what they measure\n"),
    ],
)
def test_options_that_a_command_does_not_have(argv, end, capsys):
    assert stopped(argv) == 2
    assert capsys.readouterr().err.endswith(end)


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        (["explain", "--tokens", "1e6"], "argument --tokens: expected a positive integer, such as 8, got '1e6'\n"),
        (["bench", "cpu", "--ranks", "x"], "--ranks: expected a positive integer, such as 8, got 'x'\n"),
        (["explain", "--tokens", "0"], "argument --tokens: expected a positive integer, such as 8, got '0'\n"),
        (["explain", "--gbps", "pcie6"], "--gbps: expected GB/s above 0, or nvlink, pcie4, pcie5, got 'pcie6'\n"),
        (["explain", "--gbps", "nan"], "--gbps: expected GB/s above 0, or nvlink, pcie4, pcie5, got 'nan'\n"),
        (["plan", "--network-gbs", "fast"], "argument --network-gbs: expected a number, got 'fast'\n"),
        (["plan", "--seed", "-1"], "argument --seed: expected an integer from 0 to 549755813887, got '-1'\n"),
        (["bench", "gpu", "--tokens", "8,x"], "--tokens: expected a positive integer, such as 8, got 'x'\n"),
        (["trace", "--seed", "x"], "argument --seed: expected an integer, got 'x'\n"),
        (["diagnose", "--slow-rank", "x"], "argument --slow-rank: expected an integer, got 'x'\n"),
    ],
)
def test_numbers_that_are_none(argv, end, capsys):
    """What is expected is said, not the name of a function of ours."""
    assert stopped(argv) == 2
    assert capsys.readouterr().err.endswith(end)


def test_help_names_sizes_in_words():
    """Who runs a command for the first time does not know the letters."""
    sizes = {"--ranks", "--tokens", "--hidden", "--top-k", "--experts", "--nodes"}
    found = [(command, one) for command, one in options_of_all_commands() if set(one.option_strings) & sizes]
    assert {"explain", "plan", "limits", "trace", "diagnose", "bench nodes"} <= {command for command, _ in found}
    assert [(command, one.help) for command, one in found if re.match(r"[A-Z]\b", one.help)] == []


@pytest.mark.parametrize(
    "argv", [["--version"], ["--help"], [], ["fly"], ["deep-ep-path"], ["explain-error", "PeerTimeout"]]
)
def test_what_needs_no_torch_does_not_import_it(argv):
    program = f"import sys; sys.modules['torch'] = None; from tokenferry.cli.main import main; sys.exit(main({argv}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == (2 if argv == ["fly"] else 0), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv", [[], *([command] for command in parser.COMMANDS), *(["bench", name] for name in PARTS)]
)
def test_help_fits_a_terminal(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert stopped([*argv, "--help"]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]


COMPLETE = """
source /dev/stdin <<< "$SCRIPT"
for line in "b" "bench nodes --dev" "bench nodes --device " "bench deco" "bench decode --tw" "explain --to" \\
    "nothing --"; do
    IFS=' ' read -ra COMP_WORDS <<< "tokenferry $line."
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMP_WORDS[COMP_CWORD]=${COMP_WORDS[COMP_CWORD]%.}
    _tokenferry
    echo "$line: ${COMPREPLY[*]}"
done
complete -p tokenferry
"""


def test_completion(capsys):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main.main(["completion", "bash"]) == 0
    environ = {**os.environ, "SCRIPT": capsys.readouterr().out}
    done = subprocess.run(
        ["bash", "-c", COMPLETE], env=environ, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.splitlines() == [
        "b: bench",
        "bench nodes --dev: --device",
        "bench nodes --device : cpu cuda",
        "bench deco: decode",
        "bench decode --tw: --two-batch-tokens",
        "explain --to: --top-k --tokens",
        "nothing --: ",
        "complete -o default -F _tokenferry tokenferry",
    ]
    assert done.stderr == ""


def test_completion_of_zsh_is_that_of_bash_after_one_line(capsys):
    assert main.main(["completion", "bash"]) == main.main(["completion", "zsh"]) == 0
    bash, zsh = capsys.readouterr().out.split("autoload -U +X bashcompinit && bashcompinit\n")
    assert bash == zsh


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([BackendUnavailable("no link")], 3),
        ([BackendUnavailable("no link"), BackendUnavailable("no GPU")], 3),
        ([BackendUnavailable("no link"), ValueError("no sense")], 1),
        ([], 1),
    ],
)
def test_status_of_failed_jobs(errors, status):
    assert failure.status(WorldError(dict(enumerate(errors)), {}, {})) == status


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (BackendUnavailable("no transport"), 3, "tokenferry doctor: no transport"),
        (ConfigError("no sense"), 2, "tokenferry doctor: no sense"),
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
        timeout=240,
        check=True,
    )
    assert done.stdout.startswith("tokenferry.compat.deep_ep")


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tokenferry", "deep-ep-path"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert os.path.isdir(done.stdout.strip())
    assert done.stderr == ""


CLOSED = """
import os, sys
from tokenferry.cli import main
for descriptor in (0, 1, 2):
    os.close(descriptor)
sys.stdin = sys.stdout = sys.stderr = None  # as Python finds them at its start
for name in sys.argv[2:]:
    try:
        status = main.main(name.split())
    except SystemExit as stop:
        status = stop.code
    with open(sys.argv[1], "a") as file:
        file.write(f"{name}: {status}\\n")
os.fstat(1), os.fstat(2)
"""


def test_closed_standard_streams(tmp_path):
    """As by ``tokenferry doctor >&- 2>&- <&-``. Their numbers are then free, and the next socket would get one."""
    statuses = {
        "": 0,
        "--version": 0,
        "doctor --help": 0,
        "fly": 2,
        "explain --experts 8 --top-k 2 --hidden 128 --tokens 16 --ranks 2": 0,
        "deep-ep-path": 0,
        "limits --ranks 9": 2,
        "trace --ranks 9": 2,
        "bench --ranks 3": 2,
        "demo --ranks 3": 2,
        "diagnose --device cpu --ranks 2 --iterations 1 --tokens 8 --hidden 128 --experts 8 --top-k 2": 0,
        "doctor --no-compile": 0,
    }
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(tmp_path / "statuses"), *statuses], timeout=240, check=False
    )
    assert (tmp_path / "statuses").read_text().splitlines() == [f"{name}: {code}" for name, code in statuses.items()]
    assert done.returncode == 0


def test_a_reader_that_has_seen_enough():
    """As by ``tokenferry explain | head -1``."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tokenferry", "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait(60) == 141


def test_a_disk_that_is_full():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokenferry", "deep-ep-path"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.stderr == "tokenferry deep-ep-path: [Errno 28] No space left on device\n"
    assert done.returncode == 1


def test_ctrl_c_ends_a_command_and_its_ranks_quietly():
    words = [sys.executable, "-m", "tokenferry", "bench", "cpu", "--ranks", "2", "--tokens", "8", "--hidden", "64"]
    program = subprocess.Popen(
        [*words, "--iterations", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_sigint,
    )
    try:
        assert any("checking every answer" in line for line in program.stdout), "the ranks run from here on"
        os.killpg(program.pid, signal.SIGINT)  # a terminal sends it to all processes
        out, err = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130
    assert err == "tokenferry bench: interrupted\n"
    assert "Traceback" not in out


def take_sigint():
    """What a shell runs in the background ignores the signal, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(parser, "load", interrupted)
    assert main.main(["bench", "cpu"]) == 130
    assert capsys.readouterr().err == "tokenferry: interrupted\n"


def test_sigterm_ends_a_command_as_an_exception_does(monkeypatch):
    """The handler is there while a command runs only."""
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def wait(args, screen):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(doctor, "run", wait)
    assert stopped(["doctor"]) == 143
    assert cleaned == [signal.SIG_DFL], "a second one would not end the program at once"
    assert signal.getsignal(signal.SIGTERM) is before
