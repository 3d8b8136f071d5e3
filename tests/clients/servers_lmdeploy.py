"""LMDeploy over our `deep_ep`: the checks of `servers.py`, in the environment that it makes."""

import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from servers_ranks import E, H, L, R, batch, close, on_ranks, say, unscaled
from servers_trainers import multiplied
from torch import Tensor


def load_lmdeploy() -> ModuleType:
    """Return its file about DeepEP. Packages around it import what a server needs, so they are entered, not run."""
    folder = Path(sys.argv[3])
    names = "lmdeploy", "lmdeploy.pytorch", *(f"lmdeploy.pytorch.backends{each}" for each in ("", ".cuda", ".default"))
    for name in names:
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    from lmdeploy.pytorch.backends.cuda import token_dispatcher

    assert token_dispatcher.use_deepep
    return token_dispatcher


def normal() -> None:
    """Its dispatcher for prompts: as its layers call it, and with events, as where two batches overlap."""
    lmdeploy = load_lmdeploy()

    def job(rank: int) -> None:
        layer = lmdeploy.TokenDispatcherBuilder.build(dist.group.WORLD, E, L, H, torch.bfloat16)
        x, weights, ids, want = batch(rank)
        rows, _, _, counts = layer.dispatch(x, ids, weights)
        close(layer.combine(multiplied(rank, rows, counts)), want)
        layer.release()

        previous = layer.buffer_normal.capture()
        rows, here, row_weights, counts, handle, event = layer.dispatch_normal_async(
            x, ids, weights, previous_event=previous
        )
        event.current_stream_wait()
        permuted, shape, routing, probs, places = layer.get_permuted_hidden_states_by_experts(rows, here, row_weights)
        y = multiplied(rank, permuted, torch.tensor(counts))
        y = layer.get_restored_hidden_states_by_experts(y, places, shape, routing, probs)
        out, event = layer.combine_normal_async(y, handle, previous_event=layer.buffer_normal.capture())
        event.current_stream_wait()
        close(out, want)

    on_ranks(job)
    say(f"dispatch and combine, synchronous and asynchronous, {R} ranks")


def low_latency() -> None:
    """Its dispatcher for decoding, with events and with hooks; and with rows in BF16, which it offers beside FP8."""
    lmdeploy = load_lmdeploy()

    def job(rank: int) -> None:
        x, weights, ids, want = batch(rank)
        factors = torch.arange(rank * L, rank * L + L).reshape(L, 1, 1) + 1

        def experts(rows: Tensor | tuple[Tensor, Tensor]) -> Tensor:
            rows = unscaled(*rows) if isinstance(rows, tuple) else rows.float()
            return (rows * factors).bfloat16()

        for hooks in (False, True):
            layer = lmdeploy.DeepEPTokenDispatcherLowLatency(
                dist.group.WORLD, E, L, H, torch.bfloat16, return_recv_hook=hooks
            )
            rows, chosen, _, _, _ = layer.dispatch(x, ids, weights, E)
            close(layer.combine(experts(rows), chosen, weights), want, fp8=True)

            for fp8 in (False, True):
                rows, _, handle, event, hook = layer.dispatch_async(x, ids, use_fp8=fp8, async_finish=not hooks)
                hook() if hooks else event.current_stream_wait()
                out, event, hook = layer.combine_async(experts(rows), ids, weights, handle, async_finish=not hooks)
                hook() if hooks else event.current_stream_wait()
                close(out, want, fp8=fp8)

    on_ranks(job)
    say(f"dispatch and combine, BF16 and FP8, with and without hooks, {R} ranks")
