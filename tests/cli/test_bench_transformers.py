"""`tokenferry bench transformers`: the program on CPU ranks, and what it says without transformers."""

import importlib.util

import pytest
import torch

from support import clients
from support.bench_runs import bench_gpu_phases
from support.bench_transformers_jobs import measure_transformers, wrong_combine, wrong_id
from tokenferry import ConfigError
from tokenferry.bench.core.session import ModelSizes
from tokenferry.bench.report import transformers as report
from tokenferry.bench.suites import transformers
from tokenferry.bench.suites.transformers_models import VOCABULARY, save_model
from tokenferry.cli.bench_settings import make_settings
from tokenferry.cli.main import main, make_parser

needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "tokenizers", "accelerate")),
    reason="transformers is not installed",
)
SMALL = ("--tokens", "12", "--layers", "2", "--intermediate", "32", "--batch", "2", "--new-tokens", "3")


@needs_transformers
def test_a_model_in_each_way(tmp_path):
    run = bench_gpu_phases(tmp_path, "transformers", *SMALL, transformers=measure_transformers)
    assert run.status == 0
    assert run.report["failed"] == []
    ways = [(item["batches"], item["experts"]) for item in run.report["transformers"]]
    assert ways == [
        *(("one each", "all_to_all"), ("one each", "tokenferry")),
        *(("one for all", "all_to_all"), ("one for all", "all_reduce"), ("one for all", "tokenferry")),
    ]
    assert [item["trained"] for item in run.report["transformers"]] == [24, 24, 12, 12, 12]
    assert [item["generated"] for item in run.report["transformers"]] == [12, 12, 6, 6, 6]
    assert len(run.report["transformers results"]) == 6
    for item in run.report["transformers results"]:
        assert len(item["differ_by"]) == 5, "logits, the loss, and gradients of experts, routers and all else"
        assert max(item["differ_by"].values()) <= (1e-5 if item["dtype"] == "float32" else 3e-2)
    assert "over its own" in run.output
    assert "; its own: all_to_all\n" in run.output
    assert "all_reduce and all_to_all, batches: one for all, float32, T=12: norm" in run.output


@needs_transformers
def test_a_wrong_sum_gets_no_time(tmp_path):
    run = bench_gpu_phases(tmp_path, "transformers", *SMALL, transformers=wrong_combine)
    assert run.status == 1
    assert [one["what"].partition(":")[0] for one in run.report["failed"]] == ["transformers", "transformers"]
    assert "tokenferry differs from all_to_all in float32" in run.report["failed"][0]["why"]
    assert "transformers" not in run.report


@needs_transformers
def test_a_wrong_id_gets_no_time(tmp_path):
    run = bench_gpu_phases(tmp_path, "transformers", *SMALL, transformers=wrong_id)
    assert run.status == 1
    assert "tokenferry generates other tokens than all_to_all in float32" in run.report["failed"][0]["why"]
    assert "transformers" not in run.report


def test_an_older_version_is_compared_with_what_it_has():
    lines = clients.run(clients.BENCH, clients.folder_of("transformers", "5.18.0"))
    assert "transformers 5.18.0; its own: all_reduce, since this version has no all_to_all" in lines
    assert any(line.startswith("tokenferry and all_reduce, batches: one for all, bfloat16, T=12") for line in lines)


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setattr(transformers, "version", lambda: None)
    assert main(["bench", "transformers", "--device", "cpu"]) == 3
    assert "transformers is not installed" in capsys.readouterr().out


def settings_of(*words):
    return make_settings(make_parser().parse_args(["bench", *words]), 2)


def test_sizes_of_a_model():
    settings = settings_of("transformers")
    assert (settings.tokens, settings.hidden, settings.experts, settings.top_k) == ((4096,), 2048, 64, 8)
    assert settings.model == ModelSizes(layers=4, intermediate=768, batch=32, new_tokens=32)
    settings = settings_of("transformers", "--device", "cpu", "--new-tokens", "3")
    assert (settings.tokens, settings.hidden, settings.experts, settings.top_k) == ((128,), 256, 16, 4)
    assert settings.model == ModelSizes(layers=2, intermediate=128, batch=4, new_tokens=3)
    assert settings_of("megatron").model is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("transformers --ranks 1", "one rank shares its experts with none"),
        ("transformers --hidden 128 --experts 128", "at least twice as many columns"),
        ("transformers --hidden 384 --ranks 4 --experts 8", "use a multiple of 256"),
    ],
)
def test_sizes_that_do_not_fit(words, why):
    with pytest.raises(ConfigError, match=why):
        settings_of(*words.split())


@needs_transformers
def test_no_rounding_chooses_other_experts(tmp_path):
    """In all layers, whatever is added to the rows and in whatever precision, tokens go where their ids say."""
    from transformers import AutoModelForCausalLM

    settings = settings_of("transformers", "--device", "cpu", "--hidden", "128", "--experts", "8", "--seed", "1")
    save_model(settings, torch.device("cpu"), tmp_path)
    ids = torch.arange(256, dtype=torch.int64, device="cpu").unsqueeze(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        named = model.model.embed_tokens.weight[ids[0], :8] > 0
        assert (named.sum(1) == settings.top_k).all()
        assert named.any(0).all(), "all experts get tokens"
        found = []
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(
                lambda _, given, out, number=number, found=found: found.append((number, out[2]))
            )
        with torch.no_grad():
            model(input_ids=ids)
        assert [number for number, _ in found] == list(range(settings.model.layers))
        for number, chosen in found:
            expected = named.roll(number, 1)
            assert torch.equal(torch.zeros_like(expected).scatter_(1, chosen, value=True), expected)
    assert model.config.vocab_size == VOCABULARY


def test_rows_of_the_table():
    times = {"n": 2, "median_us": 2000.0, "p05_us": 1000.0, "p95_us": 3000.0}
    half = {name: us / 2 for name, us in times.items()}
    label = {"own": "all_to_all", "batches": "one each", "tokens": 8, "trained": 16, "generated": 4}
    own = {"experts": "all_to_all", **label, "training": {"isolated": times, "back_to_back": times}}
    ours = {"experts": "tokenferry", **label, "training": {"isolated": times, "back_to_back": half}}
    assert report.rows([own | {"generation": half}, ours | {"generation": times}])[1] == [
        *("one each", "tokenferry", "8", "2.00 (1.00-3.00)", "1.00 (0.50-1.50)", "16000", "0.50"),
        *("2.00 (1.00-3.00)", "2000", "2.00"),
    ]
