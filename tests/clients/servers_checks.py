"""One check of `servers.py`, in the environment that it makes: ``servers_checks.py CLIENT CHECK FOLDER``.

Expert e multiplies its rows by ``e + 1``, so that the result of a layer follows from the routing.
"""

import importlib
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

R, E, K, H, M = 2, 8, 3, 2048, 8
L = E // R
TOKENS = 5


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights and choices of a rank, and the sums that its tokens get."""
    seeded = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, H, generator=seeded).bfloat16()
    weights, ids = torch.rand(TOKENS, E, generator=seeded).topk(K)
    return x, weights, ids, x.float() * (weights * (ids + 1)).sum(1, keepdim=True)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=0.03, atol=0.05)


def weighted(x: Tensor, ids: Tensor, weights: Tensor, rank: int) -> Tensor:
    """What the experts of a rank add up to for each row, ids being those of all experts."""
    here = torch.div(ids, L, rounding_mode="floor") == rank
    return (x.float() * (weights * (ids + 1)).masked_fill(~here, 0).sum(1, keepdim=True)).bfloat16()


def on_ranks(job: Callable[[int], None]) -> None:
    """Run a job on R gloo ranks, which are forked after the client has been imported."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(job, rank, folder)) for rank in range(R)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("a rank failed")


def _rank(job: Callable[[int], None], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    made = torch.tensor  # vLLM makes lists of counts in pinned memory, which there is only with a GPU
    torch.tensor = lambda *args, pin_memory=False, **kwargs: made(*args, **kwargs)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=R)
    job(rank)
    dist.barrier()
    dist.destroy_process_group()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


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


def unquantized() -> object:
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

    return FUSED_MOE_UNQUANTIZED_CONFIG


def run_layer(rank: int, layer: object, experts: Callable[..., Tensor], reduction: object) -> None:
    """prepare, the experts, and finalize in both ways that vLLM knows."""
    x, weights, ids, want = batch(rank)
    for is_async in (False, True):
        prepared = layer.prepare(x, weights, ids, E, None, False, unquantized())
        y = experts(*prepared)
        out = torch.zeros_like(x)
        args = (out, y, weights, ids, False, reduction)
        if is_async:
            received = layer.finalize_async(*args)
            for each in received if isinstance(received, tuple) else (received,):
                each()
        else:
            layer.finalize(*args)
        close(out, want)


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

        def experts(rows, scales, counts, ids, weights):
            return weighted(rows, ids, weights, rank)

        run_layer(rank, layer, experts, TopKWeightAndReduceNoOP())
        buffer.destroy()

    on_ranks(job)
    say(f"prepare and finalize, synchronous and asynchronous, {R} ranks")


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
        layer = DeepEPLLPrepareAndFinalize(buffer, M, R)

        def experts(rows, scales, counts, ids, weights):
            factors = torch.arange(rank * L, rank * L + L).reshape(L, 1, 1) + 1
            return (rows.float() * factors).bfloat16()

        run_layer(rank, layer, experts, TopKWeightAndReduceDelegate())
        buffer.destroy()

    on_ranks(job)
    say(f"prepare and finalize, with and without hooks, {R} ranks")


def vllm_v2(*, decode: bool) -> None:
    deep_ep = load_vllm()
    from vllm.forward_context import override_forward_context
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2 import DeepEPV2PrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    def job(rank: int) -> None:
        buffer = deep_ep.ElasticBuffer(
            group=dist.group.WORLD,
            num_max_tokens_per_rank=M,
            hidden=H,
            num_topk=K,
            use_fp8_dispatch=False,
            allow_hybrid_mode=True,
            prefer_overlap_with_compute=False,
            allow_multiple_reduction=False,
            explicitly_destroy=True,
        )
        layer = DeepEPV2PrepareAndFinalize(buffer, R, 1, rank * L, E, K, use_cudagraph=decode)

        def experts(rows, scales, counts, ids, weights):
            y = weighted(rows, ids, weights.masked_fill(ids < 0, 0), rank)
            return y.masked_fill((ids < 0).all(1, keepdim=True), torch.nan)  # rows that hold nothing

        with override_forward_context(SimpleNamespace(dp_metadata=None)):
            run_layer(rank, layer, experts, TopKWeightAndReduceNoOP())
        buffer.destroy()

    on_ranks(job)
    rows = "not expanded, no host synchronisation" if decode else "expanded, host synchronisation"
    say(f"prepare and finalize, {rows}, {R} ranks")


# ---------------------------------------------------------------------- SGLang


def sglang_plug_in() -> None:
    from sglang.srt.plugins import load_plugins

    assert "deep_ep" not in sys.modules, "SGLang imports deep_ep before its plug-ins"
    load_plugins()
    say(f"SGLang finds {sys.modules['deep_ep'].Buffer.__module__}")


# ---------------------------------------------------------------------- torchtitan


def torchtitan_layer(*, training: bool) -> None:
    """Its file about DeepEP alone. Its two operators are registered for CUDA; here for the CPU as well."""
    path = Path(sys.argv[3]) / "torchtitan/distributed/deepep/deepep.py"
    spec = importlib.util.spec_from_file_location("torchtitan_deepep", path)
    titan = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = titan
    spec.loader.exec_module(titan)
    titan._lib.impl("dispatch", titan._dispatch_op_impl, "CPU")
    titan._lib.impl("combine", titan._combine_op_impl, "CPU")

    def job(rank: int) -> None:
        titan.get_buffer(dist.group.WORLD, hidden=H, num_max_tokens_per_rank=M, num_topk=K)
        assert titan.get_buffer(dist.group.WORLD, hidden=H, num_max_tokens_per_rank=M, num_topk=K) is titan._buffer
        x, weights, ids, want = batch(rank)
        x.requires_grad_(training)
        weights.requires_grad_(training)
        with torch.set_grad_enabled(training):
            rows, counts, state = titan.dispatch_tokens(
                x, ids, weights, L, E, num_tokens_per_rank=TOKENS, cudagraphable=not training
            )
            experts = torch.repeat_interleave(torch.arange(rank * L, rank * L + L), counts.long())
            factors = torch.zeros(rows.shape[0]).index_copy_(0, torch.arange(len(experts)), experts + 1.0)
            out = titan.combine_tokens((rows.float() * factors.unsqueeze(1)).bfloat16(), state)
            titan.sync_combine()
        close(out, want)
        if training:
            out.float().sum().backward()
            close(x.grad, (weights * (ids + 1)).sum(1, keepdim=True).expand_as(x))
            expected = x.detach().float().sum(1, keepdim=True) * (ids + 1)
            torch.testing.assert_close(weights.grad, expected, rtol=0.05, atol=2.0)

    on_ranks(job)
    say(f"dispatch_tokens, combine_tokens{', backward' if training else ' without gradients'}, {R} ranks")


CHECKS = {
    ("vllm", "plug-in"): vllm_plug_in,
    ("vllm", "high throughput"): vllm_high_throughput,
    ("vllm", "low latency"): vllm_low_latency,
    ("vllm", "v2, prefill"): lambda: vllm_v2(decode=False),
    ("vllm", "v2, decode"): lambda: vllm_v2(decode=True),
    ("sglang", "plug-in"): sglang_plug_in,
    ("torchtitan", "training"): lambda: torchtitan_layer(training=True),
    ("torchtitan", "inference"): lambda: torchtitan_layer(training=False),
}

if __name__ == "__main__":
    CHECKS[sys.argv[1], sys.argv[2]]()
