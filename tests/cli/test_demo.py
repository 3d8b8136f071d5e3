"""The demo: both training runs, their comparison, and the plot."""

import sys

import pytest
import torch

from support.bench_jobs import broken
from tokenferry.cli import demo
from tokenferry.cli.main import main
from tokenferry.demo import train as demo_train
from tokenferry.demo.compare import GPU_FACTOR, MOVED_ROWS, OTHER_ROUTING, SAME_ROUTING, compare
from tokenferry.demo.devices import choose
from tokenferry.demo.train import History
from tokenferry.errors import BackendUnavailable

TINY = ["demo", "--device", "cpu", "--steps", "3", "--ranks", "2"]


def test_learns_the_same_on_any_terminal(any_terminal, tmp_path):
    assert main([*TINY, "--out", str(tmp_path / "new")]) == 0
    out = any_terminal.getvalue()
    for word in (
        "step    3  loss",
        "dispatch",
        "combine",
        "rows per expert",
        "SAME: ",
        "(3 of 3 steps)",
        "1e-09 is allowed",
        "device: cpu, 2 ranks",
    ):
        assert word in out
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_float32_and_other_ranks_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--device", "cpu", "--steps", "2", "--ranks", "4", "--dtype", "float32"]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "for float32 sums" in out
    assert "matplotlib is not installed" in out
    assert not list(tmp_path.iterdir())


def test_fails_if_one_expert_differs(capsys, monkeypatch, tmp_path):
    make = demo_train.dense_layer

    def perturbed(options, layer):
        dense = make(options, layer)
        with torch.no_grad():
            dense.down[5] *= 1.0001
        return dense

    monkeypatch.setattr(demo_train, "dense_layer", perturbed)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "DIFFERENT: " in capsys.readouterr().out


def test_fails_if_gradients_differ(capsys, monkeypatch, tmp_path):
    make = demo_train.make_optimizer  # rank processes use the original

    def slower(options, model):
        optimizer = make(options, model)
        optimizer.param_groups[0]["lr"] *= 0.999
        return optimizer

    monkeypatch.setattr(demo_train, "make_optimizer", slower)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "DIFFERENT: " in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_learns_the_same_on_gpus(capsys, tmp_path, dtype):
    options = ["--device", "cuda", "--ranks", "2", "--steps", "5", "--dtype", dtype]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device: cuda, 2 ranks")
    assert "SAME: " in out


H200 = (9, 0)


@pytest.mark.parametrize(
    ("requested", "ranks", "capabilities", "device", "chosen", "text"),
    [
        ("auto", None, [], "cpu", 4, "auto: torch sees 0 GPU(s); at least two are needed"),
        ("auto", None, [H200], "cpu", 4, "auto: torch sees 1 GPU(s); at least two are needed"),
        ("auto", None, [H200] * 2, "cuda", 2, "one on each of 2 GPU(s)"),
        ("auto", None, [H200] * 5, "cuda", 4, "one on each of 4 GPU(s)"),
        ("auto", None, [(10, 0)] * 8, "cuda", 8, "one on each of 8 GPU(s)"),
        ("auto", 4, [H200] * 2, "cpu", 4, "--ranks 4 needs one for each rank"),
        ("auto", 2, [H200, (7, 5)], "cpu", 2, "one has compute capability 7.5, 8.0 is needed"),
        ("cuda", None, [H200], "cuda", 1, "one on each of 1 GPU(s)"),
        ("cuda", 4, [H200], "cuda", 4, "sharing 1 GPU(s): slow"),
        ("cpu", None, [H200] * 8, "cpu", 4, "device: cpu, 4 ranks"),
    ],
)
def test_the_choice_of_devices(requested, ranks, capabilities, device, chosen, text):
    placement = choose(requested, ranks, capabilities)
    assert (placement.device, placement.ranks) == (device, chosen)
    assert text in placement.text


@pytest.mark.parametrize("capabilities", [[], [(7, 5)]])
def test_no_supported_gpu(capabilities):
    with pytest.raises(
        BackendUnavailable, match=rf"--device cuda: torch sees {len(capabilities)} GPU\(s\).*use --device cpu"
    ):
        choose("cuda", None, capabilities)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus_is_no_wrong_command_line(capsys):
    assert main(["demo", "--device", "cuda"]) == 3
    assert "tokenferry demo: --device cuda: torch sees 0 GPU(s); use --device cpu" in capsys.readouterr().err


def test_one_rank_is_not_ranks():
    assert choose("cpu", 1, []).text == "device: cpu, 1 rank"


def test_a_failing_rank(capsys, monkeypatch):
    monkeypatch.setattr(demo, "train_sharded", broken)
    assert main(TINY) == 1
    assert "no reason at all" in capsys.readouterr().out


def test_the_loss_falls():
    history = demo_train.train_dense(demo_train.Options(25, 1, 0, batch=4, context=32, hidden=32), lambda loss: None)
    assert history.losses[0] > 5
    assert history.losses[-1] < 4
    assert all(sum(counts) == 2 * 2 * 4 * 32 for counts in history.expert_tokens), "layers * top-2 * tokens"


def test_batches_depend_on_seed_and_step_only():
    text, options = demo_train.load_text(), demo_train.Options(1, 1, 0)
    first = demo_train.batch_of(text, options, 0)
    assert first.shape == (options.batch, options.context + 1)
    assert torch.equal(first, demo_train.batch_of(text, options, 0))
    assert not torch.equal(first, demo_train.batch_of(text, options, 1))
    assert not torch.equal(first, demo_train.batch_of(text, demo_train.Options(1, 1, 1), 0))


def test_no_text(tmp_path):
    (tmp_path / "small.py").write_text("pass")
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}, found 4 bytes"):
        demo_train.load_text(tmp_path)


def verdict(losses, counts, dtype=torch.float32, device="cpu"):
    """Compare with a run whose loss stays 1 and whose experts get 50 rows each."""
    steps = len(losses)
    sharded = History(2, [1.0] * steps, [[50, 50]] * len(counts))
    return compare(sharded, History(1, losses, counts), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_routing_allows_rounding_only(dtype):
    near, far = 1 + 0.9 * SAME_ROUTING[dtype], 1 + 1.1 * SAME_ROUTING[dtype]
    assert verdict([1.0, near], [[50, 50]] * 2, dtype).same
    assert not verdict([1.0, far], [[50, 50]] * 2, dtype).same
    assert not verdict([1.0, float("nan")], [[50, 50]] * 2, dtype).same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpus_may_differ_by_more(dtype):
    near, far = (1 + factor * GPU_FACTOR * SAME_ROUTING[dtype] for factor in (0.9, 1.1))
    for loss, good in ((near, True), (far, False)):
        assert verdict([loss], [[50, 50]], dtype, "cuda").same == good


def test_diverged_routing_allows_few_moved_rows_and_larger_differences():
    few, many = [50 - MOVED_ROWS, 50 + MOVED_ROWS], [49 - MOVED_ROWS, 51 + MOVED_ROWS]
    later = 1 + 0.9 * OTHER_ROUTING
    good = verdict([1.0, 1.0001, later], [[50, 50], few, many])
    assert good.same
    assert "(1 of 3 steps)" in good.text
    assert f"at step 2 {MOVED_ROWS} row(s)" in good.text
    assert not verdict([1.0, 1.0001, later], [[50, 50], many, few]).same, "too many rows at once"
    assert not verdict([1.0, 1.0001, 1 + 1.1 * OTHER_ROUTING], [[50, 50], few, few]).same
    assert not verdict([1.0, 1.0001, float("nan")], [[50, 50], few, few]).same
    assert not verdict([1.001, 1.0, 1.0], [[50, 50], few, few]).same, "the losses differ before the routing does"


def test_compare_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="expected as many losses as counts"):
        verdict([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        verdict([1.0], [[50, 50]] * 2)


@pytest.mark.parametrize("seed", ["-1", str(1 << 39), "x"])
def test_seeds_out_of_range_are_refused_before_anything_is_trained(capsys, seed):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--ranks", "1", "--steps", "1", "--seed", seed])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err
