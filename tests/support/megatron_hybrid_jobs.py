"""Megatron-Core's HybridEP dispatcher over our `HybridEPBuffer`, against its own all-to-all, on CPU ranks."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from support.bench_megatron_jobs import Stream, moved_to_cpu

E, K, H = 8, 2, 32
TOKENS = (6, 5, 1, 7)


@contextmanager
def without_gpus() -> Any:
    """Give Megatron stand-ins for the streams of CUDA, and the CPU where it asks for a GPU; the rest is as it is."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch._dynamo.config.disable = True  # Megatron compiles small functions, for which a C++ compiler is needed
    stream, zeros = Stream(), torch.zeros

    def zeros_anywhere(*size: Any, device: Any = None, **how: Any) -> Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **how)

    with ExitStack() as stack:
        for patched in (
            mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
            mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", moved_to_cpu),
            mock.patch.object(torch, "zeros", zeros_anywhere),
            mock.patch.multiple(
                torch.cuda,
                current_device=lambda: torch.device("cpu"),
                current_stream=lambda *_: stream,
                Stream=Stream,
                stream=lambda _: nullcontext(),
            ),
        ):
            stack.enter_context(patched)
        yield


def process_groups(pg: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    found = ProcessGroupCollection()
    found.ep = found.tp_ep = pg
    singles = [dist.new_group([rank], backend="gloo") for rank in range(pg.size())]
    found.expt_tp = found.tp = found.cp = found.tp_cp = singles[pg.rank()]
    return found


def dispatcher_of(kind: str, pg: Any, groups: Any, **more: Any) -> Any:
    """A dispatcher of Megatron-Core: its "hybridep", or "alltoall"."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    flex = kind == "hybridep"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=4,
        num_moe_experts=E,
        moe_router_topk=K,
        moe_token_dispatcher_type="flex" if flex else "alltoall",
        moe_router_dtype="fp32",
        add_bias_linear=False,
        expert_model_parallel_size=pg.size(),
        **({"moe_flex_dispatcher_backend": "hybridep"} if flex else {}),
        **more,
    )
    local = E // pg.size()
    mine = list(range(pg.rank() * local, (pg.rank() + 1) * local))
    made = token_dispatcher.MoEFlexTokenDispatcher if flex else token_dispatcher.MoEAlltoAllTokenDispatcher
    return made(local, mine, config, groups)


def step(dispatcher: Any, experts: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
    """The loss of a layer of linear experts, and the gradients of rows, experts and router."""
    seeded = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(TOKENS[rank], 1, H, generator=seeded).requires_grad_()
    logits = torch.randn(TOKENS[rank], E, generator=seeded).requires_grad_()
    chosen = torch.zeros(TOKENS[rank], E, dtype=torch.bool)
    chosen.scatter_(1, logits.detach().topk(K, dim=1).indices, True)
    probs = logits.softmax(1) * chosen
    weights = experts.clone().requires_grad_()
    hidden, gate = dispatcher.dispatch_preprocess(x, chosen, probs)
    hidden, gate = dispatcher.token_dispatch(hidden, gate)
    hidden, counts, gate = dispatcher.dispatch_postprocess(hidden, gate)
    blocks = hidden.split(counts.tolist())
    y = torch.cat([block @ weight for block, weight in zip(blocks, weights, strict=True)]) * gate.unsqueeze(1)
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y)))
    loss = (out - torch.ones_like(out)).square().mean()
    loss.backward()
    found = {"loss": loss.detach(), "rows": x.grad, "experts": weights.grad, "router": logits.grad}
    return {name: value for name, value in found.items() if value is not None}


def as_all_to_all(rank: int, pg: Any) -> None:
    """Compare losses and gradients over several steps."""
    warnings.simplefilter("ignore")  # Megatron names each optional package that is missing
    with without_gpus():
        from megatron.core.transformer.moe import fused_a2a

        from tokenferry.compat.deep_ep import HybridEPBuffer

        assert fused_a2a.HybridEPBuffer is HybridEPBuffer
        groups = process_groups(pg)
        ours, theirs = (dispatcher_of(kind, pg, groups) for kind in ("hybridep", "alltoall"))
        experts = torch.randn(E // pg.size(), H, H, generator=torch.Generator().manual_seed(rank)) / H**0.5
        for seed in range(3):
            got, want = (step(dispatcher, experts, rank, seed) for dispatcher in (ours, theirs))
            assert set(got) == set(want) == {"loss", "rows", "experts", "router"}
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
        assert isinstance(fused_a2a._hybrid_ep_buffer, HybridEPBuffer)
        fused_a2a.reset_hybrid_ep_buffer()
