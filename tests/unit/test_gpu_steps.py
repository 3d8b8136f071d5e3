"""`tests/cuda/steps.py`: its files exist, and it tells steps that passed from those that hang, fail or lack a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("gpu_steps", ROOT / "tests" / "cuda" / "steps.py")
    module = sys.modules["gpu_steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_steps_run_exists(steps):
    for name, step in steps.STEPS.items():
        for argument in step.tests:
            path = argument.removeprefix("--ignore=")
            assert "/" not in path or (ROOT / path).exists(), name


def test_steps_that_do_not_pass_are_told(steps, monkeypatch, tmp_path, capsys):
    bodies = {
        "good": "assert os.environ['TEST_STEP'] == '1'",
        "bad": "assert not os.environ['TEST_STEP']",
        "hangs": "signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(300)",
    }
    made = {}
    for name, body in bodies.items():
        file = tmp_path / f"test_{name}.py"
        file.write_text(f"import os, signal, time\ndef test():\n    {body}\n")
        made[name] = steps.Step((str(file),), 3.0 if name == "hangs" else 100.0, 0, {"TEST_STEP": "1"})
    monkeypatch.setattr(steps, "ENDING_S", 0.1)
    monkeypatch.setattr(steps, "STEPS", made | {"large": steps.Step(("tests",), 100.0, 99)})
    run = ["--out", str(tmp_path / "logs")]
    assert steps.main(["good", "bad", "hangs", "large", *run]) == 1
    table = dict(line.split(" | ", 1) for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()[1:])
    assert table["good"].startswith("yes | ")
    assert "1 passed" in table["good"]
    assert "1 failed" in table["bad"]
    assert table["bad"].startswith("NO | ")
    assert table["hangs"].endswith("stopped after 3 s")
    assert "needs 99 GPUs" in table["large"]
    assert steps.main(["good", *run]) == 0
    assert steps.main(["good", "--within-s", "0", *run]) == 1
    with pytest.raises(SystemExit) as ended:
        steps.main(["other"])
    assert ended.value.code == 2
