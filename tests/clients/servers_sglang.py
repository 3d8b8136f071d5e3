"""The checks of `servers.py` on SGLang: its dispatchers, and what it puts between them and its matrix products.

A layer is what `FusedMoE` does with the runner of DeepGEMM: dispatch, permute, experts, permute back, combine. All but
the experts are SGLang's, and chosen by its own configuration.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from servers_ranks import TOKENS, E, H, K, L, R, batch, close, in_fp8, on_ranks, say, unscaled
from torch import Tensor

ALIGNED = 128
"""DeepGEMM takes the rows of an expert in multiples of this."""


def load_sglang() -> None:
    """Let SGLang load its plug-ins as its engine does."""
    # torchvision lies here without its compiled part, and its Python files describe two operators of that part.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from sglang.srt.plugins import load_plugins

    assert "deep_ep" not in sys.modules, "SGLang imports deep_ep before its plug-ins"
    load_plugins()
    importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")


def plug_in() -> None:
    load_sglang()
    say(f"SGLang finds {sys.modules['deep_ep'].Buffer.__module__}")


def interpret_loops() -> None:
    """Let loops of interpreted Triton kernels count in Triton's scalars, as those of compiled ones do."""
    from sglang.kernels.ops.moe import ep_moe_kernels
    from triton import language
    from triton.runtime import interpreter

    def indices(*bounds: object, **_: object) -> Iterator[object]:
        return map(interpreter._implicit_cvt, range(*bounds))

    patched = interpreter._patch_lang

    def patch(function: object) -> object:
        scope = patched(function)
        scope.set_attr(language, "range", indices)
        return scope

    interpreter._patch_lang = patch
    ep_moe_kernels.range = indices


def quantized(x: Tensor, block: int, **layout: bool) -> tuple[Tensor, Tensor]:
    """What stands for SGLang's CUDA kernel: rows in FP8, and scales in the layout that SGLang makes for them."""
    from sglang.kernels.ops.quantization.fp8_kernel import create_per_token_group_quant_fp8_output_scale

    rows, scales = in_fp8(x, block)
    return rows, create_per_token_group_quant_fp8_output_scale(x.shape, x.device, block, **layout).copy_(scales)


def stand_in_for_gpu(*, blackwell: bool) -> None:
    """Say that DeepGEMM is there, without which these paths end, and replace what SGLang asks of a GPU."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher import deepep, deepep_v2

    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    deep_gemm_wrapper.DEEPGEMM_BLACKWELL = blackwell
    deepep.sglang_per_token_group_quant_fp8 = deepep_v2.sglang_per_token_group_quant_fp8 = quantized
    torch.cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(multi_processor_count=132)
    torch.cuda.is_current_stream_capturing = lambda: True  # else a kernel stores as the interpreter cannot
    interpret_loops()
    Tensor.cuda = lambda self, *args, **kwargs: self


@contextmanager
def configured(**words: object) -> Iterator[None]:
    """Publish the configuration of a server with these arguments, as its scheduler does."""
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import get_context, get_parallel, get_resources

    group = SimpleNamespace(device_group=dist.group.WORLD, barrier=dist.barrier)
    with (
        get_context().override_server_args(tp_size=R, ep_size=R, device="cpu", **words),
        get_parallel().override(tp_group=group),
    ):
        initialize_moe_config()
        yield
        get_resources().buffers.clear()


@dataclass(frozen=True)
class Layer:
    """What SGLang makes for a layer of this configuration whose experts are in BF16 or FP8."""

    rank: int
    dispatcher: object
    config: object
    fp8: bool


def make_layer(rank: int, *, fp8: bool) -> Layer:
    from sglang.srt.layers.moe.fused_moe_triton.layer import create_moe_dispatcher
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    config = MoeRunnerConfig(
        num_experts=E, num_local_experts=L, hidden_size=H, top_k=K, params_dtype=torch.bfloat16, activation="silu"
    )
    method = object() if fp8 else object.__new__(UnquantizedFusedMoEMethod)
    return Layer(rank, create_moe_dispatcher(config, method), config, fp8)


def experts(given: object, rank: int, counts: Tensor) -> Tensor:
    """What stands for DeepGEMM: it reads the rows that belong to an expert, and returns NaN for all others."""
    first = rank * L + 1
    x = unscaled(given.hidden_states, given.hidden_states_scale)
    if given.use_masked_gemm:
        assert torch.equal(given.masked_m.long(), counts), "rows of each expert"
        factors = torch.arange(first, first + L).reshape(L, 1, 1)
        nothing = torch.arange(x.shape[1]) >= given.masked_m.unsqueeze(1)
    else:
        assert x.shape[0] % ALIGNED == 0, "rows of an expert are padded"
        factors = (given.m_indices + first).unsqueeze(1)
        nothing = given.m_indices < 0
    return (x * factors).bfloat16().masked_fill(nothing.unsqueeze(-1), torch.nan)


def run_experts(layer: Layer, sent: object, counts: Tensor) -> object:
    """From the output of a dispatcher to the input of its combine, by the functions that SGLang registers."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.moe_runner.base import PermuteMethodPool
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmRunnerOutput

    assert sent.hidden_states.dtype == (torch.float8_e4m3fn if layer.fp8 else torch.bfloat16)
    if layer.fp8:
        packed = deep_gemm_wrapper.DEEPGEMM_BLACKWELL
        assert sent.hidden_states_scale.dtype == (torch.int32 if packed else torch.float32)
    before = PermuteMethodPool.get_pre_permute(sent.format.value, "deep_gemm")
    state: dict[str, object] = {}
    y = experts(before(sent, None, layer.config, state), layer.rank, counts)
    after = PermuteMethodPool.get_post_permute("deep_gemm", sent.format.value)
    return after(DeepGemmRunnerOutput(y), None, layer.config, state)


@dataclass(frozen=True)
class Batch:
    """Rows of a rank, what SGLang's router returns for them, their results, and how many rows its experts get."""

    x: Tensor
    topk: object
    want: Tensor
    counts: Tensor


def make_batch(rank: int, *, number: int = 0, last: int = TOKENS) -> Batch:
    """A batch of TOKENS rows of each rank, but `last` of the last one."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    tokens = [TOKENS] * (R - 1) + [last]
    all_ids = [batch(each + R * number)[2][: tokens[each]] for each in range(R)]
    counts = torch.cat(all_ids).flatten().bincount(minlength=E)[rank * L : (rank + 1) * L]
    x, weights, ids, want = (each[: tokens[rank]] for each in batch(rank + R * number))
    return Batch(x, StandardTopKOutput(weights, ids.int(), None), want, counts)


def run_layer(layer: Layer) -> None:
    """A batch of every rank, then one where the last rank is idle."""
    for last in (TOKENS, 0):
        part = make_batch(layer.rank, last=last)
        sent = layer.dispatcher.dispatch(hidden_states=part.x, topk_output=part.topk)
        out = layer.dispatcher.combine(combine_input=run_experts(layer, sent, part.counts))
        close(out, part.want, fp8=layer.fp8)


def run_two_batches(layer: Layer) -> None:
    """Two-batch overlap: each stage of one batch is followed by the same stage of the other."""
    dispatcher = layer.dispatcher
    parts = [make_batch(layer.rank, number=number) for number in range(2)]
    for number, part in enumerate(parts):
        dispatcher.dispatch_a(hidden_states=part.x, topk_output=part.topk, tbo_subbatch_index=number)
    for number, part in enumerate(parts):
        sent = dispatcher.dispatch_b(tbo_subbatch_index=number)
        given = run_experts(layer, sent, part.counts)
        dispatcher.combine_a(combine_input=given, tbo_subbatch_index=number)
    for number, part in enumerate(parts):
        close(dispatcher.combine_b(tbo_subbatch_index=number), part.want, fp8=layer.fp8)


def in_phases(words: dict[str, object], prefills: list[bool], run: Callable[[Layer], None], *, fp8: bool) -> None:
    """Run a layer in prefills and decodes, one after another, on all ranks."""
    from sglang.srt.runtime_context import get_forward

    dtype = "fp8" if fp8 else "bf16"

    def job(rank: int) -> None:
        with configured(deepep_dispatcher_output_dtype=dtype, **words):
            layer = make_layer(rank, fp8=fp8)
            for prefill in prefills:
                with get_forward().scoped(is_extend_in_batch=prefill):
                    run(layer)

    on_ranks(job)


def deepep(mode: str) -> None:
    """`--moe-a2a-backend deepep`."""
    load_sglang()
    stand_in_for_gpu(blackwell=False)
    prefills = {"normal": [True], "low_latency": [False], "auto": [True, False, True, False]}[mode]
    words = {"moe_a2a_backend": "deepep", "deepep_mode": mode}
    for fp8 in (False, True):
        in_phases(words, prefills, run_layer, fp8=fp8)
        in_phases(words | {"enable_two_batch_overlap": True}, prefills, run_two_batches, fp8=fp8)
    if mode == "low_latency":
        stand_in_for_gpu(blackwell=True)
        in_phases(words, prefills, run_layer, fp8=True)
    scales = ", scales as float32 and UE8M0" if mode == "low_latency" else ""
    say(f"dispatch and combine, BF16 and FP8{scales}, one batch and two, {R} ranks")


def deepep_v2(*, prefill: bool) -> None:
    """`--moe-a2a-backend deepep_v2`."""
    load_sglang()
    stand_in_for_gpu(blackwell=False)
    from sglang.srt.environ import envs

    words = {"moe_a2a_backend": "deepep_v2"}
    for fp8 in (False, True):
        in_phases(words, [prefill], run_layer, fp8=fp8)
        if prefill:
            with envs.SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND.override(False):
                in_phases(words, [prefill], run_layer, fp8=fp8)
    rows = "expanded and not" if prefill else "expanded, no host synchronisation"
    say(f"dispatch and combine, BF16 and FP8, {rows}, {R} ranks")
