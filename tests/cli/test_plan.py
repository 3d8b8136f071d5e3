"""`tokenferry plan` needs neither GPUs nor a network."""

import json
from dataclasses import fields

import pytest

from tokenferry.backends.cuda import decode
from tokenferry.backends.cuda.across import decode_forms
from tokenferry.cli import cuda_limits, plan, screen
from tokenferry.cli.main import main
from tokenferry.cli.parser import parse
from tokenferry.cost.calls import CallCost, Times
from tokenferry.cost.case import Case, Cluster, Links
from tokenferry.cost.deep_ep_v1 import LowLatency
from tokenferry.cost.estimate import DecodeSizes, Estimate, Family, estimate
from tokenferry.cost.memory import Memory
from tokenferry.cost.rows import RankRows
from tokenferry.cost.sampling import Sampling
from tokenferry.types import MoeShape

ISSUE = "plan --nodes 32 --ranks-per-node 8 --experts 256 --top-k 8 --hidden 7168 --tokens 4096"


def names(thing):
    return {field.name for field in fields(thing)}


@pytest.fixture(autouse=True)
def _whole_notes(monkeypatch):
    """Tests look for whole sentences."""
    monkeypatch.setattr(screen, "NOTE_COLUMNS", 10_000)


def line(out, start):
    return next(each for each in out.splitlines() if each.startswith(start)).split()


def test_a_large_cluster(capsys):
    assert main([*ISSUE.split(), "--network-gbs", "50", "--nvlink-gbs", "330"]) == 0
    out = capsys.readouterr().out
    assert "N=32 P=8 R=256 E=256 K=8 H=7168, routing uniform (exact)" in out
    assert "7.040 of them others (at most 8), and to 8.000 ranks" in out
    # 4096 * 7.040 rows of 7392 bytes; at 50 GB/s, and an exchange of 10 us with each of 31 nodes.
    assert line(out, "throughput dispatch  ") == [
        "throughput",
        "dispatch",
        "7392",
        *["213.15"] * 2,
        "1.50",
        *["211.94"] * 2,
    ]
    assert "throughput dispatch       70     4573     642      123     20   4786       4716   network" in out
    assert (
        "dispatch: 1 chunk for the last node, of about 919 tokens at most (6.59 MB), 1 with rows: 31 exchanges" in out
    )
    assert (
        "combine: 2 chunks for the first node, of about 689 tokens at most (9.88 MB), 2 with rows: 32 exchanges" in out
    )
    assert (
        "decode calls send 128 slots to each other node, of which 29.1 are filled; 0 overflows expected in a call"
        in out
    )
    assert "a model: no time across a network was measured on GPUs" in out


def test_two_thousand_ranks(capsys):
    assert main(["plan", "--nodes", "256", "--experts", "2048"]) == 0
    assert "R=2048" in capsys.readouterr().out


def test_one_node_has_no_slots(capsys):
    assert main(["plan", "--nodes", "1"]) == 0
    out = capsys.readouterr().out
    assert "0.000 of them others (at most 0)" in out
    assert "slots" not in out
    assert "chunk" not in out
    assert "rows across:" not in out
    assert "DeepEP V1" not in out


def test_too_few_slots(capsys):
    """Every call would raise, whatever their times: 115.7 tokens for 16 slots."""
    assert main(["plan", "--slots", "16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("too few slots: with --slots 16 96 overflows are expected in a decode call")
    assert "use --slots 127 or more" in out.splitlines()[0]
    assert "decode calls send 16 slots to each other node, and 115.7 tokens need one; 96 overflows expected" in out
    for slots, warned in (("107", True), ("108", False)):
        assert main(["plan", "--nodes", "8", "--slots", slots]) == 0
        out = capsys.readouterr().out
        assert out.startswith("too few slots") == warned
        assert "112 slots (108, rounded up to a multiple of eight)" in out or warned


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--ranks-per-node 16",
            "--ranks-per-node 16: backend cuda takes at most 8; a node has no more; use more nodes",
        ),
        ("--top-k 65", "--top-k 65: backend cuda takes at most 64; choose fewer"),
        ("--experts 8192", "--experts 8192: backend cuda takes at most 4096; choose fewer"),
        ("--hidden 12 --dtype bf16", "--hidden 12: a BF16 row has to be a multiple of 16 bytes; use a multiple of 8"),
        ("--nodes 512 --ranks-per-node 1 --experts 512", "--nodes 512: backend cuda takes at most 256; use fewer"),
        ("--nodes 1 --decode-tokens 65537", "--decode-tokens 65537: decode calls of backend cuda take at most 65536"),
        (
            "--nodes 32 --decode-tokens 2049",
            "--decode-tokens 2049: 256 ranks have 524544 tokens in all, and decode calls of backend cuda across nodes "
            "take at most 524288; use fewer",
        ),
    ],
)
def test_what_backend_cuda_refuses_is_said(words, complaint, capsys, tmp_path):
    """The model has a say on larger systems, too."""
    assert main(["plan", *words.split(), "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith(f"backend cuda refuses this: {complaint}")
    (refused,) = json.loads((tmp_path / "out.json").read_text())["refused"]
    assert refused.startswith(complaint)


def test_what_backend_cuda_takes_at_most():
    """The limits of the kernels, which commands must not import."""
    assert cuda_limits.MAX_DECODE_TOKENS == decode._MAX_TOKENS
    assert cuda_limits.MAX_DECODE_TOKENS_ACROSS == decode_forms._MAX_TOKENS
    for words in ("--nodes 256 --experts 2048", "--nodes 32 --decode-tokens 2048", "--nodes 1 --decode-tokens 65536"):
        args = parse(["plan", *words.split()])
        shape = MoeShape(args.experts, args.top_k, args.hidden, args.tokens)
        case = Case(Cluster(args.nodes, args.ranks_per_node), shape)
        found = estimate(case, Links(50.0, 330.0), DecodeSizes(args.decode_tokens), Sampling())
        assert plan.refused(found) == [], words


@pytest.mark.parametrize("words", ["--groups 8 --limited-nodes 4", "--limited-nodes 4", "--groups 8 --top-groups 4"])
def test_group_limits(words, capsys):
    assert main(["plan", "--nodes", "8", "--samples", "500", *words.split()]) == 0
    out = capsys.readouterr().out
    assert "routing 4 of 8 groups (sampled, 500 tokens)" in out
    assert "(at most 4)" in out
    assert "at most: for 16384 and 28672 rows, with MoeShape(max_nodes=4)" in out
    assert "counts on device: 28672 rows both ways, whatever max_nodes is" in out
    across, most, fixed = map(float, line(out, "throughput   ")[1:4])
    assert most == round(4096 * (4 + 7 + 1) * 14336 / 1e6), "sums of three kinds: sent, received, and the own node's"
    assert fixed == round(4096 * (7 + 7 + 1) * 14336 / 1e6)
    assert 0.5 * most < across < most


def test_no_limit_is_named_where_there_is_none(capsys):
    assert main(["plan", "--nodes", "8", "--tokens", "1200"]) == 0
    out = capsys.readouterr().out
    assert "at most: for 8400 and 8400 rows\n" in out
    assert (
        "combine: 2 chunks for the first node, of about 591 tokens at most (8.47 MB), 2 with rows: 8 exchanges" in out
    )
    assert (
        "with one more the longest would have less than 8 MiB, and cross faster than the host can start the next" in out
    )


def test_skewed_routing(capsys):
    assert main(["plan", "--skew", "1", "--placement", "sorted", "--samples", "2000"]) == 0
    out = capsys.readouterr().out
    assert "routing popularity 1 / i^1, sorted (sampled, 2000 tokens)" in out
    assert "the busiest node gets" in out
    received = line(out, "throughput  4096")
    assert float(received[-2]) > 3 * float(received[-1]), "the first rank receives far more than the mean"


def test_other_options(capsys):
    words = "plan --dtype bf16 --decode-tokens 64 --slots 40 --network-us 25 --network-gbs 25 --nvlink-gbs 160"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "network 25 GB/s (200 Gb/s), NVLink 160 GB/s a rank" in out
    assert line(out, "decoding dispatch  ")[2] == "14336"
    # (3 * 40 * (14336 + 64)) bytes at 25 GB/s, and 25 us.
    assert "decoding dispatch          0       94 " in out
    assert "decode calls send 40 slots" in out


def test_the_same_seed_prints_the_same(capsys):
    printed = []
    for seed in ("1", "1", "2"):
        assert main(["plan", "--skew", "1", "--samples", "300", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["plan", "--nodes", "8", "--limited-nodes", "4", "--samples", "300", "--json", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert set(report) == {"schema", "tokenferry", "commit", "date", "command", "machine", "refused", "estimate"}
    assert report["refused"] == []
    assert report["schema"] == 1
    assert report["command"].startswith("tokenferry plan --nodes 8")
    found = report["estimate"]
    assert set(found) == names(Estimate)
    assert found["case"]["cluster"] == {"num_nodes": 8, "ranks_per_node": 8}
    assert found["case"]["gate"] == {"num_groups": 8, "top_groups": 4, "skew": 0.0, "placement": "shuffled"}
    assert set(found["reach"]) == {
        *("nodes_per_token", "remote_nodes_per_token", "ranks_per_token"),
        *("busiest_node", "busiest_rank", "sampled_tokens"),
    }
    assert found["reach"]["sampled_tokens"] == 300
    assert set(found["deep_ep_v1"]) == names(LowLatency)
    for family in (found["throughput"], found["decoding"]):
        assert set(family) == names(Family)
        assert set(family["mean_rows"]) == set(family["busiest_rows"]) == names(RankRows)
        assert set(family["memory"]) == names(Memory)
        for call in ("dispatch", "combine"):
            assert set(family[call]) == names(CallCost)
            assert set(family[call]["times"]) == {*names(Times), "total_us", "kept_us", "bound_by"}


def test_a_picture(tmp_path, capsys):
    file = tmp_path / "new" / "plan.png"
    assert main(["plan", "--nodes", "4", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"written: {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--nodes 3", "256 experts are no multiple of 24 ranks"),
        ("--top-k 300", "--top-k 300 exceeds 256 experts"),
        ("--nodes 512", "512 nodes of 8 ranks are 4096 ranks; the model covers up to 2048"),
        ("--hidden 100", "--hidden 100 is no multiple of 128"),
        ("--network-gbs 0", "--network-gbs: expected a rate of at least 1e-06"),
        ("--slots 129", "slots: expected 1 .. 128"),
        ("--nodes 2 --limited-nodes 3", "--limited-nodes: expected 1 .. 2, got 3"),
        ("--nodes 8 --limited-nodes 4 --groups 4", "--groups 4 is not --nodes 8; give --top-groups instead"),
        ("--nodes 8 --limited-nodes 4 --top-groups 4", "--limited-nodes and --top-groups say the same"),
        ("--groups 8", "--groups and --top-groups limit together"),
        ("--top-groups 4", "--groups and --top-groups limit together"),
        ("--groups 7 --top-groups 2", "7 groups do not divide 256 experts"),
        ("--skew -1", "skew: expected 0 or more"),
    ],
)
def test_what_does_not_fit(words, complaint, capsys):
    assert main(["plan", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "9" * 23])
def test_seeds_out_of_range(capsys, seed):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--skew", "1", "--samples", "300", "--seed", seed])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err
