"""Megatron-Core, as it is published, with whatever `deep_ep` is on the path.

FusedDispatch, FusedCombine and MoEFlexTokenDispatcher, forward and backward, on four gloo ranks of this host. Nothing
of Megatron is changed or replaced, and none of what is run here calls CUDA, except where its HybridEP dispatcher is
compared with its all-to-all: see `support.megatron_hybrid_jobs`. It gets process groups made here instead
of by its own set-up, and experts written here: its router and its experts want a GPU. The test sets
TORCHDYNAMO_DISABLE=1, since Megatron wraps small functions in torch.compile: without it all this passes as well, but
needs a C++ compiler and five times as long.
"""

import multiprocessing
import sys
import tempfile

import deep_ep
import megatron.core
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from support import megatron_hybrid_jobs

R, E, K, H = 4, 8, 2, 32
TOKENS = (6, 5, 0, 7)


def rows(rank: int, salt: int) -> Tensor:
    return torch.randn(TOKENS[rank], H, generator=torch.Generator().manual_seed(10 * salt + rank))


def gates(rank: int) -> tuple[Tensor, Tensor]:
    """``[T, E]`` router probabilities, 0 outside the top K, and the map of the chosen experts."""
    logits = torch.randn(TOKENS[rank], E, generator=torch.Generator().manual_seed(100 + rank))
    chosen = torch.zeros(TOKENS[rank], E, dtype=torch.bool).scatter_(1, logits.topk(K, dim=1).indices, True)
    return logits.softmax(1) * chosen, chosen


def close(what: str, got: Tensor | None, want: Tensor | None) -> None:
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


def check_fused(rank: int, how: dict) -> None:
    """fused_dispatch and fused_combine in bfloat16: every row and every sum bit for bit, by loops over tokens."""
    local = E // R
    sent = []
    for r in range(R):
        probs, _ = gates(r)
        weights, ids = probs.topk(K, dim=1)
        sent.append((rows(r, 1).bfloat16(), ids.masked_fill(weights < 0.15, -1), weights))
    x, ids, weights = sent[rank]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    there, there_ids, there_weights, counts, handle = fused_a2a.fused_dispatch(
        x, ids, weights, E, dist.group.WORLD, **how
    )

    wanted = []
    for src_x, src_ids, src_weights in sent:
        for row, experts, gate in zip(src_x, src_ids.tolist(), src_weights, strict=True):
            here = [e - rank * local if e // local == rank else -1 for e in experts]
            if max(here) >= 0:
                wanted.append((row, here, [g.item() if e >= 0 else 0.0 for g, e in zip(gate, here, strict=True)]))
    assert torch.equal(there, torch.stack([row for row, _, _ in wanted]))
    assert there_ids.tolist() == [here for _, here, _ in wanted]
    assert there_weights.tolist() == [gate for _, _, gate in wanted]
    assert counts.tolist() == [sum(e in here for _, here, _ in wanted) for e in range(local)]

    out, _ = fused_a2a.fused_combine(there * 2, dist.group.WORLD, handle, **how)
    num_ranks = torch.tensor([len({e // local for e in experts if e >= 0}) for experts in ids.tolist()])
    copies = num_ranks.reshape(-1, 1).float()
    assert torch.equal(out, (x.float() * 2 * copies).bfloat16())

    grad = rows(rank, 2).bfloat16()
    on_this_rank = (there_weights * (there_ids >= 0) * (1 + rank)).sum()
    ((out * grad).sum() + on_this_rank).backward()
    assert torch.equal(x.grad, (grad.float() * 2 * copies).bfloat16())
    assert torch.equal(weights.grad, torch.where(ids >= 0, ids // local + 1.0, 0.0))


def groups(tp: int) -> tuple[ProcessGroupCollection, int, int]:
    """R ranks as expert parallel x tensor parallel, the latter inside; returns them and this rank's coordinates."""
    rank = dist.get_rank()
    found = ProcessGroupCollection()
    found.tp_ep = dist.group.WORLD
    found.ep, _ = dist.new_subgroups_by_enumeration([list(range(i, R, tp)) for i in range(tp)])
    found.expt_tp, _ = dist.new_subgroups_by_enumeration([list(range(i, i + tp)) for i in range(0, R, tp)])
    return found, rank // tp, rank % tp


def check_dispatcher(rank: int, tp: int, how: dict, capacity_factor: float | None) -> None:
    """A layer of E linear experts, each split into ``tp`` addends, against all of them applied to every token."""
    pg_collection, ep_rank, tp_rank = groups(tp)
    local = E * tp // R
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=4,
        num_moe_experts=E,
        moe_router_topk=K,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        moe_expert_capacity_factor=capacity_factor,
        add_bias_linear=False,
        expert_model_parallel_size=R // tp,
        expert_tensor_parallel_size=tp,
    )
    mine = range(ep_rank * local, ep_rank * local + local)
    dispatcher = MoEFlexTokenDispatcher(local, list(mine), config, pg_collection)
    experts = torch.randn(tp, E, H, H, generator=torch.Generator().manual_seed(7)) / H**0.5
    part = experts[tp_rank, mine.start : mine.stop].clone().requires_grad_()

    x = rows(rank, 3).requires_grad_()
    probs, chosen = gates(rank)
    if capacity_factor is not None:  # the router drops what exceeds the capacity by zeroing its probability
        chosen = chosen & (probs > 0.2)
        probs = probs * chosen
    probs.requires_grad_()
    hidden, gate = dispatcher.dispatch_preprocess(x.unsqueeze(1), chosen, probs)
    hidden, gate = dispatcher.token_dispatch(hidden, gate, **how)
    hidden, counts, gate = dispatcher.dispatch_postprocess(hidden, gate)
    blocks = hidden.split(counts.tolist())
    y = torch.cat([block @ weight for block, weight in zip(blocks, part, strict=True)]) * gate.unsqueeze(1)
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y), **how))
    (out.squeeze(1) * rows(rank, 4)).sum().backward()

    dense = experts.clone().requires_grad_()
    inputs = []
    for r in range(R):
        all_probs, _ = gates(r)
        if capacity_factor is not None:
            all_probs = all_probs * (all_probs > 0.2)
        inputs.append((rows(r, 3).requires_grad_(), all_probs.requires_grad_()))
    outs = [torch.einsum("th,pehf,te->tf", a, dense, p) for a, p in inputs]
    sum((o * rows(r, 4)).sum() for r, o in enumerate(outs)).backward()
    close("output", out.squeeze(1), outs[rank])
    close("gradient of the input", x.grad, inputs[rank][0].grad)
    close("gradient of the experts", part.grad, dense.grad[tp_rank, mine.start : mine.stop])
    close("gradient of the router", probs.grad, inputs[rank][1].grad * chosen)


def rank_main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=R)
    for is_async in (True, False):
        how = {"async_finish": is_async, "allocate_on_comm_stream": is_async}
        check_fused(rank, how)
        for tp, capacity_factor in ((1, None), (1, 2.0), (2, None)):
            check_dispatcher(rank, tp, how, capacity_factor)
    assert isinstance(fused_a2a._buffer, deep_ep.Buffer)
    megatron_hybrid_jobs.as_all_to_all(rank, dist.group.WORLD)
    if rank == 0:
        sys.stdout.write(f"{fused_a2a._buffer.runtime.get_num_rdma_ranks()} nodes\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    assert fused_a2a.HAVE_DEEP_EP
    assert fused_a2a.Buffer is deep_ep.Buffer
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank_main, args=(rank, f"{folder}/store")) for rank in range(R)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    if failed:
        sys.exit(f"ranks {failed} failed")
    sys.stdout.write(f"{deep_ep.__file__}\n{megatron.core.__version__} {megatron.core.__file__}\n")


if __name__ == "__main__":
    main()
