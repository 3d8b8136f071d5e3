"""Files of commands: checked before the run, and ``-`` for standard output."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import options_of_all_commands
from tokenferry.cli import bench_phases, doctor, explain, output
from tokenferry.cli.finding import Finding
from tokenferry.cli.main import main

TINY = ["--ranks", "2", "--tokens", "8", "--hidden", "64", "--top-k", "2", "--experts", "4", "--iterations", "2"]


@pytest.fixture
def one_finding(monkeypatch):
    found = Finding("wings", passed=False, text="none; grow some", required=True)
    monkeypatch.setattr(doctor, "findings", lambda compiler: iter([found]))


@pytest.mark.parametrize(
    ("command", "key", "text", "status"),
    [
        (["explain", "--ranks", "4"], "calls", "what leaves each GPU", 0),
        (["plan", "--nodes", "2", "--samples", "50"], "estimate", "MB of memory", 0),
        (["doctor", "--no-compile"], "findings", "does not work: wings", 1),
        (["bench", "cpu", *TINY, "--transport", "process_group"], "results", "transport process_group", 0),
        (["bench", "eager", "--device", "cpu", *TINY, "--hidden", "128"], "settings", "2 iterations", 0),
    ],
)
@pytest.mark.usefixtures("one_finding")
def test_standard_output_gets_the_report_and_nothing_else(command, key, text, status, capsys, monkeypatch):
    monkeypatch.setattr(bench_phases.Worlds, "phase", lambda self, name: None)
    assert main([*command, "--json", "-"]) == status
    seen = capsys.readouterr()
    report = json.loads(seen.out)
    assert report[key]
    assert report["command"] == " ".join(["tokenferry", *command, "--json", "-"])
    assert text in seen.err
    assert not Path("-").exists()
    assert not Path("-.part").exists()


@pytest.mark.parametrize("option", ["--json ", "--json="])
def test_the_command_in_a_report_names_the_file_without_its_folder(tmp_path, option):
    """A folder is one of the machine."""
    path = tmp_path / "out=1.json"
    assert main(["explain", *f"{option}{path}".split()]) == 0
    assert json.loads(path.read_text())["command"] == f"tokenferry explain {option}out=1.json"


@pytest.mark.usefixtures("one_finding")
def test_findings_in_a_file(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 1
    assert f"written: {tmp_path / 'found.json'}" in capsys.readouterr().out
    report = json.loads((tmp_path / "found.json").read_text())
    assert not report["works"]
    assert report["findings"] == [{"name": "wings", "passed": False, "text": "none; grow some", "required": True}]


def test_the_doctor_of_a_job_writes_no_file(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["doctor", "--json", "-"]) == 2
    assert "the ranks of a job would write one file" in capsys.readouterr().err


def test_the_report_of_explain_has_the_numbers_of_its_table(capsys, tmp_path):
    assert main(["explain", "--json", str(tmp_path / "a.json")]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert report["sizes"]["ranks"] == 8
    for call in report["calls"]:
        line = next(line for line in out.splitlines() if line.startswith(call["call"] + "  "))
        assert line.split()[-5:] == [
            str(call["row_bytes"]),
            f"{call['bytes_out'] / 1e6:.2f}",
            f"{call['us_at_link_gbps']:.1f}",
            str(call["num_sms"]),
            f"{call['us']:.1f}",
        ]


@pytest.mark.parametrize(
    ("command", "option", "where", "complaint"),
    [
        ("explain", "--json", "file/a.json", "is not a folder"),
        ("plan", "--json", "", "is a folder; name a file in it"),
        ("plan", "--json", "none/", "is a folder; name a file in it"),
        ("plan", "--plot", "", "is a folder; name a file in it"),
        ("plan", "--plot", "file/a.png", "is not a folder"),
        ("plan", "--plot", "a.xyz", "expected a name that ends in .png, .svg, .pdf"),
        ("plan", "--plot", "picture", "expected a name that ends in .png, .svg, .pdf"),
        ("bench gpu", "--json", "file/a.json", "is not a folder"),
        ("bench gpu", "--plot", "file", "is not a folder"),
        ("trace", "--json", "file/none/a.json", "is not a folder"),
        ("limits", "--plot", "file/folder", "is not a folder"),
        ("diagnose", "--json", "file/a.json", "is not a folder"),
        ("diagnose", "--plot", "file", "is not a folder"),
        ("demo", "--out", "file", "is not a folder"),
        ("doctor", "--json", "file/a.json", "is not a folder"),
    ],
)
def test_files_that_cannot_be_written_are_noticed_first(command, option, where, complaint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), option, f"{tmp_path}/{where}"])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


OUTPUTS = ("--json", "--plot", "--out")


def test_every_output_may_lie_in_a_folder_that_does_not_exist_and_is_not_made_yet(tmp_path):
    options = [(command, one) for command, one in options_of_all_commands() if set(one.option_strings) & set(OUTPUTS)]
    assert {one.option_strings[0] for _, one in options} == set(OUTPUTS)
    assert {"plan", "trace", "bench cpu", "bench gpu"} <= {command for command, _ in options}
    for command, one in options:
        assert one.type(f"{tmp_path}/a/b/c.png") == tmp_path / "a" / "b" / "c.png", (command, one.option_strings)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("one_finding")
@pytest.mark.parametrize("command", ["doctor --no-compile", f"bench eager --device cpu {' '.join(TINY)} --hidden 128"])
def test_the_folder_of_a_report_is_made(command, tmp_path, capsys, monkeypatch):
    """By what writes most reports, and by what writes those of `bench` again and again."""
    monkeypatch.setattr(bench_phases.Worlds, "phase", lambda self, name: None)
    main([*command.split(), "--json", f"{tmp_path}/a/b.json"])
    assert json.loads((tmp_path / "a" / "b.json").read_text())["schema"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    ("parse", "name"),
    [(output.output_file, "a.json"), (output.picture_file, "there.png"), (output.output_folder, "plots/new")],
)
def test_without_the_right_to_write(parse, name, tmp_path, monkeypatch):
    (tmp_path / "there.png").touch()
    assert parse(str(tmp_path / name)) == tmp_path / name
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(argparse.ArgumentTypeError, match="may not be written; choose another"):
        parse(str(tmp_path / name))


def test_a_reader_of_a_report_that_has_seen_enough():
    """As by ``tokenferry explain --json - | head -1``."""
    words = [sys.executable, "-m", "tokenferry", "explain", "--json", "-"]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    assert "Traceback" not in program.stderr.read()
    assert program.wait(60) == 141


def test_what_is_explained_is_ready_for_json():
    found = explain.explained(explain.MoeShape(8, 2, 128, 16), explain.Machine(2, 132))
    assert json.loads(json.dumps(found)) == found
