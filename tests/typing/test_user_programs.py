"""Typed programs of users: they run, and two type checkers find their mistakes and nothing else.

mypy runs with ``--strict``, basedpyright in strict mode but for members of torch whose types are only partly known.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tokenferry
from support.example_jobs import refuse_example, run_example

MISTAKES = Path(__file__).parent / "mistakes.py"
PROGRAMS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
TRAINING = {"train_language_model", "finetune_transformers"}
"""Programs with tests of their own: tests/nn/test_training_program.py, tests/clients/test_finetuning.py."""
CHECKED = [str(path) for path in (*PROGRAMS, MISTAKES) if path.stem != "finetune_transformers"]
"""transformers is typed in part, and to read its types takes longer than all else."""
LIBRARY = Path(tokenferry.__file__).parents[1]
OLDEST_PYTHON = "3.10"


def wrong_lines() -> set[tuple[str, int]]:
    lines = MISTAKES.read_text().splitlines()
    return {(MISTAKES.name, number) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


def complaints(found: list[tuple[str, int, str]]) -> str:
    """Return the reports where nothing is wrong, and the mistakes that were not reported."""
    wrong, reported = wrong_lines(), {(name, line) for name, line, _ in found}
    extra = [f"{name}:{line}: {text}" for name, line, text in found if (name, line) not in wrong]
    missed = [f"{name}:{line}: no error was reported" for name, line in sorted(wrong - reported)]
    return "\n".join(extra + missed)


@pytest.mark.parametrize("path", [p for p in PROGRAMS if p.stem not in TRAINING], ids=lambda path: path.stem)
def test_programs_run(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert "rows" in capsys.readouterr().out


def test_numbers_of_the_server_are_kept(worlds, tmp_path):
    """What it prints, and what the slowest rank took; a file that cannot be written is refused before anything runs."""
    path = next(path for path in PROGRAMS if path.stem == "serve")
    file = tmp_path / "serve.json"
    printed = worlds(2).run(run_example, str(path), "--parts", "--json", str(file))
    kept = json.loads(file.read_text())
    found = re.search(r"a step ([\d.]+) ms, its calls ([\d.]+) ms, its computation ([\d.]+) ms; ", printed[0])
    assert found is not None
    assert [f"{1e3 * part['seconds']:.3f}" for part in kept["parts"].values()] == list(found.groups())
    assert all(part["seconds"] > 0 for part in kept["parts"].values())
    for one, text in zip(kept["served"], printed, strict=True):
        assert f" {one['prompt_rows']} rows of " in text
        assert f" {one['tokens']} tokens in {one['steps']} steps of " in text
        assert f": {one['tokens'] / one['seconds']:.0f} tokens a second" in text
    assert (kept["group"]["ranks"], kept["size"]["dtype"], kept["tokenferry"]) == (2, "float32", tokenferry.__version__)
    for said in worlds(2).run(refuse_example, str(path), "--json", str(tmp_path / "none" / "serve.json")):
        assert "there is no folder" in said


def test_the_server_checks_its_answers_in_bfloat16(capsys):
    """Its two ways to a token round differently then; a token from anywhere else is far less likely."""
    program = runpy.run_path(str(next(path for path in PROGRAMS if path.stem == "serve")))
    size = replace(program["SMALL"], dtype=torch.bfloat16)
    shape = tokenferry.MoeShape(size.num_experts, size.top_k, size.hidden, size.prompt_rows)
    with tokenferry.ExpertGroup(None, shape, backend="cpu") as group, torch.no_grad():
        server = program["Server"](group, size)
        program["serve"](server, group, size)
        (scores,), _ = server.prefill([[1, 2]])
        wrong = program["Request"]([1, 2], 1, [int(scores[-1].argmin())])
        with pytest.raises(AssertionError):
            program["check"](server, 0, [wrong])
    assert "prefill alone would choose" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["first_look", "training_step", "decode_loop", "serve", "deep_ep_side_by_side"])
def test_programs_run_on_several_ranks(worlds, name):
    path = next(path for path in PROGRAMS if path.stem == name)
    for rank, printed in enumerate(worlds(2).run(run_example, str(path))):
        assert printed.startswith(f"rank {rank} of 2: ")


def test_there_are_mistakes_to_find():
    assert len(wrong_lines()) >= 15


def test_mypy(pytestconfig):
    pytest.importorskip("mypy", reason="mypy is not installed")
    environ = dict(os.environ)
    if "site-packages" not in LIBRARY.parts:  # mypy looks there by itself, and insists on doing so
        environ["MYPYPATH"] = str(LIBRARY)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", f"--python-version={OLDEST_PYTHON}"]
    command += [f"--cache-dir={pytestconfig.cache.mkdir('mypy')}", "--no-error-summary", *CHECKED]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = re.findall(r"^(.+?):(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE)
    wrong = complaints([(Path(name).name, int(line), text) for name, line, text in lines])
    assert not wrong, wrong


def test_basedpyright(tmp_path):
    pytest.importorskip("basedpyright", reason="basedpyright is not installed")
    config = {
        "include": CHECKED,
        "extraPaths": [str(LIBRARY)],
        "pythonVersion": OLDEST_PYTHON,
        "typeCheckingMode": "strict",
        "reportUnknownMemberType": False,  # torch is typed in part
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--project", str(tmp_path), "--outputjson"]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(CHECKED)
    errors = [
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])
        for one in found["generalDiagnostics"]
    ]
    wrong = complaints(errors)
    assert not wrong, wrong
