"""`tokenferry explain` needs no GPU."""

import json

import pytest

from tokenferry.cli.main import main


def test_the_case_of_the_targets(capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    for text in ("5.295 ranks, 4.633 of them others", "140.27", "272.04", "dispatch: 16 SMs", "combine: 16 SMs"):
        assert text in out
    assert "FP8 rows of T=4096, with the plan kept and calls back to back, took 247 us with 12 to 24 SMs" in out
    assert "window of each rank" in out
    assert "us at 340 GB/s: NVLink, the best rate of 8 H200 behind NVSwitch; 4 reached 356; assumed" in out
    assert "at least" not in out, "fewer GPUs have taken less time"
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
    assert "at 25 GB/s: as --gbps says;" in out
    assert "behind NVSwitch" not in out


@pytest.mark.parametrize(("name", "version", "gbps"), [("pcie4", "4.0", 31.5), ("pcie5", "5.0", 63.0)])
def test_links_that_have_a_name(name, version, gbps, capsys, tmp_path):
    """By the standard: 16 lanes of 16 or 32 GT/s, of 130 bits 128."""
    assert gbps == pytest.approx(16 * {"4.0": 16, "5.0": 32}[version] * (128 / 130) / 8, rel=1e-3)
    assert main(["explain", "--gbps", name, "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert f"us at {gbps:g} GB/s: PCIe {version}: 16 lanes" in out
    assert "assumed" not in out
    row = next(line for line in out.splitlines() if "user's rows" in line).split()
    assert row[-1] == row[-3] == f"{272.04e3 / gbps:.1f}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["link_gbps"], found["link"].split(":")[0]) == (gbps, f"PCIe {version}")


@pytest.mark.parametrize("text", ["0", "-1", "inf", "much", "pcie3"])
def test_a_rate_has_to_be_a_number_above_0(text, capsys):
    with pytest.raises(SystemExit):
        main(["explain", f"--gbps={text}"])
    assert "--gbps" in capsys.readouterr().err


def test_what_a_call_takes_beside_its_bytes_is_said(capsys):
    """As much as `tokenferry plan` adds."""
    assert main(["explain", "--tokens", "128"]) == 0
    out = capsys.readouterr().out
    assert "both are of bytes alone. A call takes about 20 us more, and a dispatch with a new routing about 30" in out
    assert "`tokenferry plan --nodes 1` adds these, and has decode calls" in out
    assert main(["plan", "--nodes", "1"]) == 0
    times = capsys.readouterr().out.partition("time of a call, us")[2].splitlines()
    row = next(line for line in times if line.startswith("throughput dispatch")).split()
    assert (row[2], row[6]) == ("30", "20"), "routing and fixed"


def test_units(capsys):
    """Rows are in units of 10^6 bytes, memory in those of 2^20."""
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    num_bytes = 5 * 8 * 4096 * (2 * 7168 + 24 * 8 + 8)  # no decode calls at this M
    assert f"1 MiB of flags and counts, and a heap of {num_bytes / 2**20:.0f} MiB" in out


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
