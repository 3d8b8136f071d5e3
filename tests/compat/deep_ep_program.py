"""A program written for DeepEP; it does not mention tokenferry. A layer's forward and backward, and decoding.

Its argument is the number of ranks. It prints where `deep_ep` is, and the number of nodes.
"""

import multiprocessing
import sys
import tempfile

import deep_ep
import deep_ep.buffer
import deep_ep.buffers.elastic
import deep_ep.buffers.ep
import deep_ep.buffers.legacy
import torch
import torch.distributed as dist
from deep_ep import Buffer, Config, ElasticBuffer, EventOverlap, topk_idx_t
from deep_ep.utils import EventHandle
from deep_ep.utils.event import EventOverlap as SameEventOverlap

E, K, H, T, M = 8, 2, 256, 6, 8


def get_buffer(group: dist.ProcessGroup) -> Buffer:
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(H * 2, group.size()), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(H * 2, group.size()), num_rdma_bytes)
    num_rdma_bytes = max(num_rdma_bytes, Buffer.get_low_latency_rdma_size_hint(M, H, group.size(), E))
    return Buffer(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=E // group.size())


def rank_main(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    x = torch.randn(T, H).bfloat16()
    scores = torch.rand(T, E).softmax(1)
    topk_weights, topk_idx = scores.topk(K, dim=1)
    topk_idx = topk_idx.to(topk_idx_t)
    buffer = get_buffer(dist.group.WORLD)
    nodes = buffer.runtime.get_num_rdma_ranks()

    previous = EventOverlap(EventHandle())
    per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(
        topk_idx, E, previous_event=previous, async_finish=True, allocate_on_comm_stream=True
    )
    if nodes == 1:
        assert per_rdma_rank is None
    else:
        assert torch.equal(per_rdma_rank, in_rank.view(T, nodes, -1).any(2).sum(0))
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    assert len(counts) == E // ranks
    if nodes > 1:
        assert handle[-4][-1] == len(recv_x)
    assert sum(counts) == (recv_idx >= 0).sum()
    combined, _, event = buffer.combine(recv_x, handle, async_finish=True, previous_event=Buffer.capture())
    with event:
        pass
    assert torch.equal(combined.float(), x.float() * in_rank.sum(1, keepdim=True))
    _, grad_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    assert torch.equal(grad_weights, topk_weights)

    recv, _, handle, event, hook = buffer.low_latency_dispatch(x, topk_idx, M, E, use_fp8=False, return_recv_hook=True)
    hook()
    out, event, hook = buffer.low_latency_combine(recv, topk_idx, topk_weights, handle)
    assert hook is None
    assert event.event is None
    torch.testing.assert_close(out.float(), x.float() * topk_weights.sum(1, keepdim=True), rtol=1e-2, atol=1e-2)
    if rank == 0:
        sys.stdout.write(f"{deep_ep.__file__}\n{nodes}\n")
    dist.barrier()

    elastic = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=M, hidden=H, num_topk=K)
    recv_x, recv_idx, recv_weights, handle, event = elastic.dispatch(x, topk_idx, topk_weights, num_experts=E)
    assert recv_idx.shape == recv_weights.shape == (recv_x.shape[0], K)
    assert sum(handle.num_recv_tokens_per_expert_list) == (recv_idx >= 0).sum()
    combined, grad_weights, event = elastic.combine(recv_x, handle=handle, topk_weights=recv_weights)
    assert event.event is None
    assert torch.equal(combined.float(), x.float() * in_rank.sum(1, keepdim=True))
    assert torch.equal(grad_weights, topk_weights)


def main() -> None:
    assert deep_ep.buffers.elastic.ElasticBuffer is ElasticBuffer
    assert Buffer is deep_ep.buffer.Buffer is deep_ep.buffers.legacy.Buffer
    assert SameEventOverlap is EventOverlap
    assert isinstance(Config(num_sms=24), deep_ep.Config)
    context, ranks = multiprocessing.get_context("fork"), int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=rank_main, args=(rank, ranks, f"{folder}/store")) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)


if __name__ == "__main__":
    main()
