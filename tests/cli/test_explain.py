"""`tokenferry explain` needs no GPU."""

import pytest

from tokenferry.cli.main import main


def test_the_case_of_the_targets(capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    for text in ("5.295 ranks, 4.633 of them others", "140.27", "272.04", "dispatch: 16 SMs", "combine: 16 SMs"):
        assert text in out
    assert "window of each rank" in out
    # At the rate of the 13 SMs that push, not of all 32.
    assert next(line for line in out.splitlines() if "user's rows" in line).split()[-2:] == ["32", "870.2"]


def test_other_links(capsys):
    """Over PCIe no number of SMs is faster than the slot: 4.633 rows of 14336 bytes for each of 4096 tokens."""
    assert main(["explain", "--gbps", "25"]) == 0
    out = capsys.readouterr().out
    us = f"{4.633 * 14336 * 4096 / 25e3:.0f}"[:4]
    row = next(line for line in out.splitlines() if "user's rows" in line).split()
    assert row[-3].startswith(us)
    assert row[-1] == row[-3]
    assert "at 25 GB/s;" in out
    assert "behind NVSwitch" not in out


@pytest.mark.parametrize("text", ["0", "-1", "inf", "much"])
def test_a_rate_has_to_be_a_number_above_0(text, capsys):
    with pytest.raises(SystemExit):
        main(["explain", f"--gbps={text}"])
    assert "--gbps" in capsys.readouterr().err


def test_other_sizes(capsys):
    assert main(["explain", "--tokens", "8", "--ranks", "1", "--experts", "4", "--top-k", "2", "--sms", "78"]) == 0
    out = capsys.readouterr().out
    assert "a token goes to 1.000 ranks, 0.000 of them others" in out
    assert "R=1 T=M=8" in out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--experts", "9"], "--experts 9 is no multiple of --ranks 8"),
        (["--top-k", "300"], "--top-k 300 exceeds"),
        (["--top-k", "65"], "--top-k 65: backend cuda takes at most 64"),
        (["--experts", "4104"], "--experts 4104: backend cuda takes at most 4096"),
        (["--ranks", "16"], "--ranks 16: backend cuda takes at most 8; a node has no more; `tokenferry plan`"),
        (["--hidden", "12"], "--hidden 12: a BF16 row has to be a multiple of 16 bytes"),
    ],
)
def test_sizes_that_do_not_fit(args, complaint, capsys):
    assert main(["explain", *args]) == 2
    assert complaint in capsys.readouterr().err


def test_rows_that_no_call_could_carry_are_left_out(capsys):
    assert main(["explain", "--hidden", "24"]) == 0
    out = capsys.readouterr().out
    assert "dispatch BF16" in out
    assert "dispatch FP8" not in out
