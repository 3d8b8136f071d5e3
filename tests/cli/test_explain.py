"""`tokenferry explain` needs no GPU."""

import pytest

from tokenferry.cli.main import main


def test_the_case_of_the_targets(capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    for text in ("5.295 ranks, 4.633 of them others", "140.27", "272.04", "dispatch: 16 SMs", "combine: 16 SMs"):
        assert text in out
    assert "window of each rank" in out
    # At the rate of the 10 SMs that push, not of all 24.
    assert next(line for line in out.splitlines() if "user's rows" in line).split()[-2:] == ["24", "862.9"]


def test_other_sizes(capsys):
    assert main(["explain", "--tokens", "8", "--ranks", "1", "--experts", "4", "--top-k", "2", "--sms", "78"]) == 0
    out = capsys.readouterr().out
    assert "a token goes to 1.000 ranks, 0.000 of them others" in out
    assert "R=1 T=M=8" in out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [(["--experts", "9"], "--experts 9 is no multiple of --ranks 8"), (["--top-k", "300"], "--top-k 300 exceeds")],
)
def test_sizes_that_do_not_fit(args, complaint, capsys):
    assert main(["explain", *args]) == 2
    assert complaint in capsys.readouterr().err
