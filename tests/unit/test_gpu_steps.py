"""`tests/cuda/steps.py`: its files exist, and it tells steps that passed from those that hang, fail or lack a GPU."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("gpu_steps", ROOT / "tests" / "cuda" / "steps.py")
    module = sys.modules["gpu_steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ends(pid: int) -> bool:
    """Return whether a process ends soon: one that was killed is gone only once it has been scheduled again."""
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        try:
            # Where nobody waits for orphans they stay as zombies.
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_steps_run_exists(steps):
    for name, step in steps.STEPS.items():
        for argument in step.tests:
            path = argument.removeprefix("--ignore=")
            assert "/" not in path or (ROOT / path).exists(), name


def test_steps_that_do_not_pass_are_told(steps, monkeypatch, tmp_path, capsys):
    script, child = tmp_path / "rank.sh", tmp_path / "child"
    script.write_text(f"trap : INT; echo $$ > {child}; while true; do sleep 300; done")
    bodies = {
        "good": "assert os.environ['TEST_STEP'] == '1'",
        "bad": "assert not os.environ['TEST_STEP']",
        "hangs": "signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(300)",
        "skips": "pytest.skip('no GPU')",
        "ends": "os._exit(3)",
        "leaves": f"subprocess.Popen(['sh', {str(script)!r}])\n    time.sleep(300)",
    }
    made = {}
    for name, body in bodies.items():
        file = tmp_path / f"test_{name}.py"
        file.write_text(f"import os, pytest, signal, subprocess, time\ndef test():\n    {body}\n")
        made[name] = steps.Step((str(file),), 8.0 if name in ("hangs", "leaves") else 100.0, 0, {"TEST_STEP": "1"})
    monkeypatch.setattr(steps, "ENDING_S", 2.0)
    monkeypatch.setattr(steps, "STEPS", made | {"large": steps.Step(("tests",), 100.0, 99)})
    run = ["--out", str(tmp_path / "logs")]
    assert steps.main([*made, "large", *run]) == 1
    table = dict(line.split(" | ", 1) for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()[1:])
    assert table["good"].startswith("yes | ")
    assert "1 passed" in table["good"]
    assert "1 failed" in table["bad"]
    assert table["bad"].startswith("NO | ")
    assert table["hangs"].endswith("stopped after 8 s")
    assert "needs 99 GPUs" in table["large"]
    assert table["skips"].startswith("NO | ")
    assert "1 skipped" in table["skips"]
    assert table["ends"].startswith("NO | ")
    assert not table["ends"].endswith("| ")
    assert table["leaves"].startswith("NO | ")
    assert ends(int(child.read_text())), "it outlived the step"
    assert steps.main(["good", *run]) == 0
    assert steps.main(["good", "--within-s", "0", *run]) == 1
    with pytest.raises(SystemExit) as ended:
        steps.main(["other"])
    assert ended.value.code == 2
