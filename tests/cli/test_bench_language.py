"""`tokenferry bench language`: both models compared, then timed, on CPU ranks."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from support.bench_language_jobs import wrong_scale, wrong_sum
from support.bench_runs import bench_gpu_phases
from tokenferry.bench.baselines.all_to_all_layer import AllToAllLayer
from tokenferry.bench.core import models
from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.report import language as report
from tokenferry.bench.suites.language import OURS, OWN, measure_language
from tokenferry.cli.bench_settings import make_settings
from tokenferry.cli.main import make_parser
from tokenferry.errors import ConfigError

WORDS = ["language", "--tokens", "24", "--layers", "2", "--intermediate", "32"]


def test_a_step_of_each_model(tmp_path):
    run = bench_gpu_phases(tmp_path, *WORDS, language=measure_language)
    assert run.status == 0
    assert run.report["failed"] == []
    assert [item["experts"] for item in run.report["language"]] == [OWN, OURS]
    for item in run.report["language"]:
        for mode in ("isolated", "back_to_back"):
            assert 0 < item[mode]["p05_us"] <= item[mode]["median_us"] <= item[mode]["p95_us"]
    assert [item["dtype"] for item in run.report["language results"]] == ["float32", "bfloat16"]
    for item in run.report["language results"]:
        assert set(item["differ_by"]) == {
            "loss",
            *(f"gradients of {kind}" for kind in ("experts", "routers", "all else")),
        }
        assert max(item["differ_by"].values()) <= (1e-5 if item["dtype"] == "float32" else 3e-2)
    for text in ("tokens/s", "over all_to_all_single", "spread by FSDP2", "products in float32, T=24"):
        assert text in run.output


@pytest.mark.parametrize(("job", "wrong"), [(wrong_sum, "loss"), (wrong_scale, "gradients of experts")])
def test_a_wrong_answer_gets_no_time(tmp_path, job, wrong):
    run = bench_gpu_phases(tmp_path, *WORDS, language=job)
    assert run.status == 1
    assert "tokenferry differs from all_to_all_single in float32" in run.report["failed"][0]["why"]
    assert f"'{wrong}'" in run.report["failed"][0]["why"]
    assert "language" not in run.report


def test_models_take_turns(monkeypatch):
    monkeypatch.setattr(models, "TURNS", 3)
    done = []

    def measure(name):
        done.append(name)
        return {"isolated": [len(done)], "back_to_back": [0.5, 0.5]}

    session = SimpleNamespace(summaries=dict)
    found = models.in_turns(session, {name: partial(measure, name) for name in "ab"})
    assert done == list("ababab")
    assert found["b"] == {"isolated": [2, 4, 6], "back_to_back": [0.5] * 6}


@pytest.mark.parametrize("by", [0.2, float("nan")])
def test_results_that_are_too_far_apart(by):
    precision = models.Precision(torch.bfloat16, 0.1)
    precision.check("a", "b", {"loss": 0.1})
    with pytest.raises(WrongAnswer, match=f"a differs from b in bfloat16 by more than 0.1: {{'logits': {by}}}"):
        precision.check("a", "b", {"loss": 0.1, "logits": by})


def settings_of(*words):
    return make_settings(make_parser().parse_args(["bench", "language", *words]), 2)


def test_sizes():
    settings = settings_of("--device", "cpu", "--layers", "3")
    assert (settings.tokens, settings.hidden, settings.experts, settings.top_k) == ((128,), 256, 16, 4)
    assert (settings.model.layers, settings.model.intermediate) == (3, 128)
    with pytest.raises(ConfigError, match="--hidden 160: expected a multiple of 64, the columns of a head"):
        settings_of("--device", "cpu", "--hidden", "160")
    with pytest.raises(ConfigError, match="language: one rank shares its experts with none"):
        settings_of("--ranks", "1")


def test_rows_of_the_table():
    times = {"n": 2, "median_us": 2000.0, "p05_us": 1000.0, "p95_us": 3000.0}
    half = {name: us / 2 for name, us in times.items()}
    label = {"tokens": 8, "ranks": 4, "dtype": "bfloat16"}
    own = {"experts": OWN, **label, "isolated": times, "back_to_back": times}
    ours = {"experts": OURS, **label, "isolated": times, "back_to_back": half}
    assert report.rows([own, ours])[1] == [
        *("tokenferry", "bfloat16", "8", "2.00 (1.00-3.00)", "1.00 (0.50-1.50)", "32000", "0.50"),
    ]


def layer_of_one_rank(rank, pg):
    """A layer of one rank computes each token's sum, in the order of its choices or not."""
    from tokenferry import ExpertGroup, MoeShape
    from tokenferry.nn import Router, SwiGLUExperts

    group = ExpertGroup(None, MoeShape(6, 2, 16, 8), backend="cpu")
    router, experts = Router(16, 6, 2, seed=1), SwiGLUExperts(group, 8, seed=2, dtype=torch.float32)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32, device="cpu")
    got, routing = AllToAllLayer(pg, experts, router, 6)(x), router(x)
    wanted = torch.zeros_like(x)
    for token, (ids, weights) in enumerate(zip(routing.topk_idx.tolist(), routing.topk_weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up, down = experts.gate[expert], experts.up[expert], experts.down[expert]
            wanted[token] += weight * ((torch.nn.functional.silu(x[token] @ gate) * (x[token] @ up)) @ down)
    torch.testing.assert_close(got, wanted)


def test_the_baseline_is_a_mixture_of_experts(worlds):
    worlds(1).run(layer_of_one_rank)
