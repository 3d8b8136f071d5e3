"""Errors of `tokenferry plan` name its options, not the arguments in Python that stand behind them."""

import pytest

from tokenferry.cli.main import main

WRONG = {
    "--hidden 8": "--hidden 8 is no multiple of 128, the columns of one FP8 scale; use --dtype bf16",
    "--slots 200": "--slots: expected 1 .. 128 (--decode-tokens), got 200",
    "--network-gbs 0": "--network-gbs: expected a rate of at least 1e-06, got 0.0",
    "--nvlink-gbs -1": "--nvlink-gbs: expected a rate of at least 1e-06, got -1.0",
    "--network-us -1": "--network-us: expected 0 or more microseconds, got -1.0",
    "--skew -1": "--skew: expected 0 or more, got -1.0",
    "--groups 4 --top-groups 5": "--top-groups: expected 1 .. 4, got 5",
    "--limited-nodes 9": "--limited-nodes: expected 1 .. 4, got 9",
    "--groups 7 --top-groups 2": "7 groups do not divide 256 experts; use a divisor",
    "--groups 256 --top-groups 1": "--top-k 8 exceeds 1, the experts of 1 of 256 groups; allow more groups",
    "--experts 100": "100 experts are no multiple of 32 ranks; change one of them",
    "--top-k 300": "--top-k 300 exceeds 256 experts; choose at most as many",
    "--nodes 3000": "3000 nodes of 8 ranks are 24000 ranks; the model covers up to 2048",
}


@pytest.mark.parametrize("options", WRONG)
def test_an_error_names_options(options, capsys):
    assert main(["plan", *options.split()]) == 2
    assert capsys.readouterr().err.split() == f"tokenferry plan: {WRONG[options]}".split()


def test_a_number_that_no_size_can_be(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--hidden", "99999999999"])
    assert "argument --hidden: 99999999999 is above 2147483647, the largest size" in capsys.readouterr().err
