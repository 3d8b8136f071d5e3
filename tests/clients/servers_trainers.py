"""torchtitan and NeMo Automodel over our `deep_ep`: the checks of `servers.py`, in the environment that it makes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from servers_ranks import TOKENS, E, H, K, L, M, R, batch, close, on_ranks, say
from torch import Tensor


def multiplied(rank: int, rows: Tensor, counts: Tensor) -> Tensor:
    """What the experts of a rank make of rows that lie by expert; ``counts``: rows of each, with padding."""
    experts = torch.repeat_interleave(torch.arange(rank * L, rank * L + L), counts.long())
    factors = torch.zeros(rows.shape[0]).index_copy_(0, torch.arange(len(experts)), experts + 1.0)
    return (rows.float() * factors.unsqueeze(1)).to(rows.dtype)


def check_gradients(x: Tensor, weights: Tensor, ids: Tensor, of_weights: Tensor) -> None:
    """Check the gradients of the sum of all results; ``of_weights``: those of the weights of the chosen experts."""
    close(x.grad, (weights * (ids + 1)).sum(1, keepdim=True).expand_as(x))
    expected = x.detach().float().sum(1, keepdim=True) * (ids + 1)
    torch.testing.assert_close(of_weights, expected, rtol=0.05, atol=2.0)


# ---------------------------------------------------------------------- torchtitan


def load_torchtitan(name: str) -> ModuleType:
    """Return one of its files alone."""
    path = Path(sys.argv[3]) / f"torchtitan/distributed/deepep/{name}.py"
    spec = importlib.util.spec_from_file_location(f"torchtitan_{name}", path)
    titan = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = titan
    spec.loader.exec_module(titan)
    return titan


def torchtitan_layer(*, training: bool) -> None:
    """Its file about DeepEP alone. Its two operators are registered for CUDA; here for the CPU as well."""
    titan = load_torchtitan("deepep")
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
            out = titan.combine_tokens(multiplied(rank, rows, counts), state)
            titan.sync_combine()
        close(out, want)
        if training:
            out.float().sum().backward()
            check_gradients(x, weights, ids, weights.grad)

    on_ranks(job)
    say(f"dispatch_tokens, combine_tokens{', backward' if training else ' without gradients'}, {R} ranks")


def torchtitan_hybrid(*, blocking: bool) -> None:
    """Its file about `HybridEPBuffer` alone. Its four operators are for CUDA only; here for the CPU as well.

    Where torch has no `CustomClassBase` yet, its own name for that class stands for it.
    """
    from torch._library import opaque_object

    opaque_object.CustomClassBase = getattr(opaque_object, "CustomClassBase", opaque_object.OpaqueBase)
    titan = load_torchtitan("hybridep")
    for name in ("dispatch", "combine", "dispatch_bwd", "combine_bwd"):
        operator = getattr(titan, f"_{name}_impl")
        operator.register_kernel("cpu")(operator._init_fn)

    def job(rank: int) -> None:
        for _ in range(2):
            titan.get_buffer(dist.group.WORLD, H, M, L)
        x, weights, ids, want = batch(rank)
        x.requires_grad_()
        weights.requires_grad_()
        for pad in (None, 8):
            x.grad = weights.grad = None
            rows, counts, state = titan.dispatch_tokens(
                x, ids, weights, L, E, dist.group.WORLD,
                non_blocking_expert_capacity_factor=None if blocking else 1.0, pad_multiple=pad,
            )  # fmt: skip
            out = titan.combine_tokens(multiplied(rank, rows, counts), state, pad)
            close(out, want)
            out.float().sum().backward()
            check_gradients(x, weights, ids, weights.grad)

    on_ranks(job)
    say(f"dispatch_tokens, combine_tokens, backward, padded and not, {R} ranks")


# ---------------------------------------------------------------------- NeMo Automodel


def automodel_deepep() -> None:
    """Its manager of `Buffer`, with activation checkpointing that dispatches along a handle of forward."""
    from nemo_automodel.components.moe.megatron import fused_a2a
    from nemo_automodel.components.moe.megatron.token_dispatcher import _DeepepManager

    def job(rank: int) -> None:
        manager = _DeepepManager(dist.group.WORLD, router_topk=K, num_experts=E, num_local_experts=L)
        x, weights, ids, want = batch(rank)
        for asynchronous in (False, True):
            x = x.detach().requires_grad_()
            probs = torch.zeros(TOKENS, E).scatter(1, ids, weights).requires_grad_()
            recorder, sent = fused_a2a.DispatchReplayRecorder(), []
            for mode in ("record", "replay"):
                recorder.rewind()
                with fused_a2a.dispatch_replay_scope(recorder, mode):
                    manager.setup_metadata(TOKENS, probs)
                    sent.append(manager.dispatch(x, asynchronous, asynchronous))
            assert recorder.replay_misses == 0
            assert torch.equal(*sent)
            rows, row_probs = manager.get_permuted_hidden_states_by_experts(sent[0])
            y = multiplied(rank, rows, manager.get_number_of_tokens_per_expert()) * row_probs.unsqueeze(1)
            y = manager.get_restored_hidden_states_by_experts(y.to(x.dtype))
            out = manager.combine(y, asynchronous, asynchronous)
            close(out, want)
            out.float().sum().backward()
            check_gradients(x, weights, ids, probs.grad.gather(1, ids))
        fused_a2a.free_buffer()

    on_ranks(job)
    say(f"dispatch, combine, backward, replayed dispatch, synchronous and asynchronous, {R} ranks")


def automodel_hybrid() -> None:
    """Its manager of `HybridEPBuffer`. Its first call waits for a GPU, which nothing stands for here."""
    from nemo_automodel.components.moe.megatron import fused_a2a
    from nemo_automodel.components.moe.megatron.token_dispatcher import _HybridEPManager

    torch.cuda.synchronize = lambda *_: None

    def job(rank: int) -> None:
        group = dist.group.WORLD
        x, weights, ids, want = batch(rank)
        num = TOKENS - 2 * rank  # it fills up what ranks have less
        x, weights, ids, want = (each[:num] for each in (x, weights, ids, want))
        for compact in (False, True):
            manager = _HybridEPManager(group, L, E, K, moe_hybridep_compact_routing=compact)
            manager.initialize_runtime(num_tokens=M, hidden_dim=H, dtype=x.dtype, device=x.device)
            for pad in (None, 8):
                manager.pad_multiple = pad
                x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
                recorder, sent = fused_a2a.HybridEPDispatchReplayRecorder(), []
                for mode in ("record", "replay"):
                    recorder.finalize()
                    recorder.rewind()
                    with fused_a2a.hybridep_dispatch_replay_scope(recorder, mode):
                        manager.setup_metadata_from_indices(ids, weights)
                        if compact:
                            manager.token_indices, manager.routing_map = ids, None
                        sent.append(manager.dispatch(x))
                assert recorder.replay_misses == 0
                assert torch.equal(*sent)
                rows, row_probs = manager.get_permuted_hidden_states_by_experts(sent[-1])
                y = multiplied(rank, rows, manager.get_number_of_tokens_per_expert()) * row_probs.unsqueeze(1)
                out = manager.combine(manager.get_restored_hidden_states_by_experts(y.to(x.dtype)))
                close(out, want)
                out.float().sum().backward()
                check_gradients(x, weights, ids, weights.grad)
        fused_a2a.reset_hybrid_ep_buffer()

    on_ranks(job)
    say(f"dispatch, combine, backward, replayed dispatch, maps and compact choices, padded and not, {R} ranks")
