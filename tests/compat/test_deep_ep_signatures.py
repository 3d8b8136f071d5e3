"""The shim takes the arguments of DeepEP and its forks; the files `golden_*.json` hold what it takes of each version.

That is the parameters of each method, in order and with their defaults.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenferry.compat.deep_ep as deep_ep

GOLDEN = {
    method: parameters
    for version in ("v1", "v2", "v2_5", "hybrid")
    for method, parameters in json.loads((Path(__file__).parent / f"golden_{version}.json").read_text()).items()
}

# Keywords that forks and later versions of DeepEP add to V1, and those of methods that take nothing else.
DIALECTS = {
    "HybridEPBuffer.dispatch_with_permute": {
        *("hidden", "topk_idx", "topk_weights", "num_of_experts_per_rank", "num_of_experts", "use_fp8", "routing_map"),
        *("probs", "scaling_factor", "num_permuted_tokens", "pad_multiple", "handle", "non_blocking"),
        "fuse_permute_dispatch",
    },
    "HybridEPBuffer.combine_with_unpermute": {
        *("hidden", "probs", "handle", "pad_multiple", "fuse_unpermute_combine"),
    },
    "Buffer.__init__": {"use_fabric"},
    "Buffer.low_latency_dispatch": {"use_nvfp4", "x_global_scale"},
    "Buffer.low_latency_combine": {
        *("overlap", "src_signals", "src_signal_expect_value"),
        *("packed_recv_count", "comp_signal", "block_m", "threshold", "num_sms"),
    },
}


def parameters(name: str) -> list[inspect.Parameter]:
    owner, method = name.split(".")
    found = inspect.signature(getattr(getattr(deep_ep, owner), method)).parameters.values()
    given = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p for p in given if p.name != "self"]


def written(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


@pytest.mark.parametrize("name", GOLDEN)
def test_takes_what_deep_ep_takes_in_its_order(name):
    positional = [p for p in parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [written(p) for p in positional] == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_adds_the_keywords_of_the_dialects_and_no_others(name):
    extra = [p for p in parameters(name) if p.kind is p.KEYWORD_ONLY]
    assert {p.name for p in extra} == DIALECTS.get(name, set())
    needed = {p.name for p in extra if p.default is p.empty}
    assert needed <= ({"hidden", "handle"} if name.startswith("HybridEPBuffer") else set())


REFUSED = {"EPBuffer.lb_prefetch_weights", "EPBuffer.lb_reduce_grads"}
"""They take any arguments, in order to refuse them."""


def test_records_every_public_method():
    for owner in ("Buffer", "Config", "ElasticBuffer", "EPBuffer", "HybridEPBuffer"):
        public = {n for n, v in inspect.getmembers(getattr(deep_ep, owner), callable) if not n.startswith("_")}
        assert {f"{owner}.{name}" for name in public} <= set(GOLDEN) | REFUSED


def test_exports_the_names_of_all_versions():
    assert set(deep_ep.__all__) == {
        *("Buffer", "Config", "EPBuffer", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "HybridEPBuffer"),
        *("__version__", "get_logical_domain_size", "get_physical_domain_size", "topk_idx_t"),
    }
    assert deep_ep.topk_idx_t is torch.int64
    assert deep_ep.__version__.startswith("2.1.0+tokenferry.")


@pytest.mark.parametrize("prefix", ["engram", "pp", "agrs", "all_gather"])
def test_programs_find_out_that_methods_are_missing(prefix):
    assert not [name for name in dir(deep_ep.ElasticBuffer) if name.startswith(prefix)]


def test_answers_on_every_module_path():
    from tokenferry.compat.deep_ep import buffer, hybrid_ep_buffer, utils
    from tokenferry.compat.deep_ep.buffers import elastic, ep, legacy
    from tokenferry.compat.deep_ep.utils import event

    assert legacy.Buffer is buffer.Buffer is deep_ep.Buffer
    assert (elastic.ElasticBuffer, elastic.EPHandle) == (deep_ep.ElasticBuffer, deep_ep.EPHandle)
    assert (ep.EPBuffer, ep.EPHandle) == (deep_ep.EPBuffer, deep_ep.EPHandle)
    assert hybrid_ep_buffer.HybridEPBuffer is deep_ep.HybridEPBuffer
    assert event.EventOverlap is utils.EventOverlap is deep_ep.EventOverlap
    assert utils.EventHandle is deep_ep.EventHandle
    assert isinstance(deep_ep.Config | None, object)  # evaluated in annotations of clients
    assert isinstance(deep_ep.ElasticBuffer | None, object)


def test_import_starts_nothing():
    program = (
        "import torch, tokenferry.compat.deep_ep as deep_ep, threading\n"
        "deep_ep.buffer.Buffer, deep_ep.hybrid_ep_buffer.indices_to_map, deep_ep.utils.event.EventOverlap\n"
        "deep_ep.buffers.elastic.ElasticBuffer, deep_ep.buffers.ep.EPBuffer, deep_ep.buffers.legacy.Buffer\n"
        "print(torch.cuda.is_initialized(), torch.distributed.is_initialized(), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout == "False False 1\n"
