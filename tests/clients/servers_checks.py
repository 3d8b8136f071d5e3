"""One check of `servers.py`, in the environment that it makes: ``servers_checks.py CLIENT CHECK FOLDER``."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import servers_lmdeploy
import servers_sglang
import servers_trainers
import torch
import torch.distributed as dist
from servers_ranks import E, H, K, L, M, R, batch, close, in_fp8, on_ranks, say, unscaled, weighted
from torch import Tensor

# ---------------------------------------------------------------------- vLLM


def load_vllm() -> ModuleType:
    """Let vLLM load its plug-ins as its front end does; return the deep_ep that it then has."""
    importlib.import_module("vllm.engine.arg_utils")  # what its front end imports before it loads plug-ins
    assert "deep_ep" not in sys.modules, "vLLM imports deep_ep before its plug-ins"
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_ht, deepep_ll, deepep_v2

    assert deepep_ht.deep_ep is deepep_ll.deep_ep is deepep_v2.deep_ep
    return deepep_ht.deep_ep


def vllm_plug_in() -> None:
    say(f"vLLM finds {load_vllm().Buffer.__module__}")


SCALES = {"bf16": None, "fp8": torch.float32, "fp8 ue8m0": torch.int32, "mxfp8": torch.uint8}
"""How rows are sent, and what their scales are."""


def quantization(name: str) -> object:
    """vLLM's configuration of experts in BF16, FP8 by blocks, or MXFP8, with ours for its CUDA kernels."""
    from vllm.model_executor.layers.fused_moe import config, utils

    utils.per_token_group_quant_fp8 = lambda x, block, **_: in_fp8(x, block)
    utils.mxfp8_e4m3_quantize = lambda x, *_: in_fp8(x, 32, exponents=True)
    if name == "bf16":
        return config.FUSED_MOE_UNQUANTIZED_CONFIG
    if name == "mxfp8":
        return config.FusedMoEQuantConfig.make("mxfp8", is_scale_swizzled=False)
    return config.FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=[128, 128])


def run_layer(rank: int, layer: object, experts: Callable[..., Tensor], reduction: object, quantized: str) -> None:
    """prepare, the experts, and finalize in both ways that vLLM knows."""
    x, weights, ids, want = batch(rank)
    for is_async in (False, True):
        rows, scales, *rest = layer.prepare(x, weights, ids, E, None, False, quantization(quantized))
        assert rows.dtype == (torch.bfloat16 if quantized == "bf16" else torch.float8_e4m3fn)
        assert (None if scales is None else scales.dtype) == SCALES[quantized]
        y = experts(unscaled(rows, scales), *rest)
        out = torch.zeros_like(x)
        args = (out, y, weights, ids, False, reduction)
        if is_async:
            received = layer.finalize_async(*args)
            for each in received if isinstance(received, tuple) else (received,):
                each()
        else:
            layer.finalize(*args)
        close(out, want, fp8=quantized != "bf16")


def vllm_high_throughput() -> None:
    deep_ep = load_vllm()
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import DeepEPHTPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    def job(rank: int) -> None:
        buffer = deep_ep.Buffer(
            group=dist.group.WORLD,
            num_nvl_bytes=1 << 30,
            num_rdma_bytes=0,
            low_latency_mode=False,
            num_qps_per_rank=1,
            explicitly_destroy=True,
        )
        deep_ep.Buffer.set_num_sms(20)
        layer = DeepEPHTPrepareAndFinalize(buffer, R, 1, rank * L)

        def experts(rows, counts, ids, weights):
            return weighted(rows, ids, weights, rank)

        for quantized in ("bf16", "fp8"):
            run_layer(rank, layer, experts, TopKWeightAndReduceNoOP(), quantized)
        buffer.destroy()

    on_ranks(job)
    say(f"prepare and finalize, BF16 and FP8, synchronous and asynchronous, {R} ranks")


def vllm_low_latency() -> None:
    deep_ep = load_vllm()
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import DeepEPLLPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

    def job(rank: int) -> None:
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=M, hidden=H, num_ranks=R, num_experts=E
        )
        buffer = deep_ep.Buffer(
            group=dist.group.WORLD,
            num_nvl_bytes=1 << 30,
            num_rdma_bytes=size,
            low_latency_mode=True,
            num_qps_per_rank=L,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=False,
        )

        def experts(rows, counts, ids, weights):
            factors = torch.arange(rank * L, rank * L + L).reshape(L, 1, 1) + 1
            return (rows.float() * factors).bfloat16()

        for quantized in ("bf16", "fp8", "fp8 ue8m0"):
            layer = DeepEPLLPrepareAndFinalize(buffer, M, R, use_fp8_dispatch=quantized != "bf16")
            packs = quantized == "fp8 ue8m0"
            layer.post_init_setup(SimpleNamespace(supports_packed_ue8m0_act_scales=lambda packs=packs: packs))
            run_layer(rank, layer, experts, TopKWeightAndReduceDelegate(), quantized)
        buffer.destroy()

    on_ranks(job)
    say(f"prepare and finalize, BF16 and FP8, scales as float32 and UE8M0, with and without hooks, {R} ranks")


def vllm_v2(*, decode: bool) -> None:
    deep_ep = load_vllm()
    from vllm.forward_context import override_forward_context
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2 import DeepEPV2PrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    def run(rank: int, quantized: str) -> None:
        fp8 = quantized != "bf16"
        buffer = deep_ep.ElasticBuffer(
            group=dist.group.WORLD,
            num_max_tokens_per_rank=M,
            hidden=H,
            num_topk=K,
            use_fp8_dispatch=fp8,
            allow_hybrid_mode=True,
            prefer_overlap_with_compute=False,
            allow_multiple_reduction=False,
            explicitly_destroy=True,
        )
        layer = DeepEPV2PrepareAndFinalize(buffer, R, 1, rank * L, E, K, use_fp8_dispatch=fp8, use_cudagraph=decode)

        def experts(rows, counts, ids, weights):
            y = weighted(rows, ids, weights.masked_fill(ids < 0, 0), rank)
            return y.masked_fill((ids < 0).all(1, keepdim=True), torch.nan)  # rows that hold nothing

        with override_forward_context(SimpleNamespace(dp_metadata=None)):
            run_layer(rank, layer, experts, TopKWeightAndReduceNoOP(), quantized)
        buffer.destroy()

    def job(rank: int) -> None:
        for quantized in ("bf16", "fp8", "mxfp8"):
            run(rank, quantized)

    on_ranks(job)
    rows = "not expanded, no host synchronisation" if decode else "expanded, host synchronisation"
    say(f"prepare and finalize, BF16, FP8 and MXFP8, {rows}, {R} ranks")


CHECKS = {
    ("vllm", "plug-in"): vllm_plug_in,
    ("vllm", "high throughput"): vllm_high_throughput,
    ("vllm", "low latency"): vllm_low_latency,
    ("vllm", "v2, prefill"): lambda: vllm_v2(decode=False),
    ("vllm", "v2, decode"): lambda: vllm_v2(decode=True),
    ("sglang", "plug-in"): servers_sglang.plug_in,
    ("sglang", "normal"): lambda: servers_sglang.deepep("normal"),
    ("sglang", "low latency"): lambda: servers_sglang.deepep("low_latency"),
    ("sglang", "auto"): lambda: servers_sglang.deepep("auto"),
    ("sglang", "v2, prefill"): lambda: servers_sglang.deepep_v2(prefill=True),
    ("sglang", "v2, decode"): lambda: servers_sglang.deepep_v2(prefill=False),
    ("lmdeploy", "normal"): servers_lmdeploy.normal,
    ("lmdeploy", "low latency"): servers_lmdeploy.low_latency,
    ("torchtitan", "training"): lambda: servers_trainers.torchtitan_layer(training=True),
    ("torchtitan", "inference"): lambda: servers_trainers.torchtitan_layer(training=False),
    ("torchtitan", "hybridep"): lambda: servers_trainers.torchtitan_hybrid(blocking=True),
    ("torchtitan", "hybridep, non-blocking"): lambda: servers_trainers.torchtitan_hybrid(blocking=False),
    ("nemo-automodel", "deepep"): servers_trainers.automodel_deepep,
    ("nemo-automodel", "hybridep"): servers_trainers.automodel_hybrid,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1], sys.argv[2]]()
