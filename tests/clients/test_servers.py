"""The command line of servers.py, which itself is not run in the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("servers.py")


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2), (["folder", "another"], 2)], ids=str)
def test_nothing_is_made_or_downloaded_for_a_wrong_command_line(words, status, tmp_path):
    command = [sys.executable, str(PROGRAM), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "usage: servers.py" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
