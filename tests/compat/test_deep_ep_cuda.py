"""DeepEP's API on GPUs: the jobs of the CPU, streams and events, CUDA graphs, errors."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from support import deep_ep_cuda_jobs as cuda_jobs
from support import deep_ep_jobs as jobs
from support import deep_ep_v1_jobs as v1_jobs
from support import pools
from support.children import end_process
from support.deep_ep_v1_jobs import Sizes
from tokenferry.compat.deep_ep import Buffer
from tokenferry.errors import CapacityError, RoutingError
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RANKS = 2
CASES = (
    Case((5, 3), experts=8, top_k=3, hidden=16),
    Case((4, 0), experts=4, top_k=2, hidden=24, routing="half_dropped", idx_dtype=torch.int32),
    Case((3, 6), experts=12, top_k=5, hidden=8, routing="one_rank_idle", dtype=torch.float32),
)
LARGE = Case((512, 300), experts=16, top_k=4, hidden=2048)

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
MORE_RANKS = 4 if NUM_GPUS >= 4 else 3
"""Each with a GPU of its own; up to three ranks may share one."""
at_ranks = pytest.mark.parametrize("ranks", [RANKS, MORE_RANKS])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("job", ["round_trip", "without_experts", "dropped_ranks"])
def test_as_on_the_cpu(worlds, job, case):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, job, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_with_scales(worlds, dtype):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, "scales", CASES[0], dtype)


def test_each_direction_is_the_transpose_of_the_other(worlds):
    sums = worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, "backward", CASES[0])
    there, home = (sum(side) for side in zip(*sums, strict=True))
    assert there == pytest.approx(home, rel=1e-5)


@pytest.mark.parametrize("job", ["streams", "overlap", "graph"])
def test_streams(worlds, job):
    worlds(RANKS, "cuda").run(getattr(cuda_jobs, job), LARGE)


def decode_case(ranks, **sizes):
    return Case((5, 3, 0, 7)[:ranks], 2 * ranks, **({"top_k": 3, "hidden": 256} | sizes))


@at_ranks
def test_low_latency_echo(worlds, ranks):
    worlds(ranks, "cuda").run(cuda_jobs.low_latency, decode_case(ranks, routing="half_dropped"))


@at_ranks
@pytest.mark.parametrize("routing", ["even", "nothing"])
def test_low_latency_round_trip(worlds, ranks, routing):
    worlds(ranks, "cuda").run(cuda_jobs.decode_as_on_the_cpu, "round_trip", decode_case(ranks, routing=routing), False)


@at_ranks
@pytest.mark.parametrize(("round_scale", "use_ue8m0"), [(False, False), (True, False), (True, True)])
def test_low_latency_fp8(worlds, ranks, round_scale, use_ue8m0):
    case = decode_case(ranks, hidden=1024, routing="repeated", idx_dtype=torch.int32)
    worlds(ranks, "cuda").run(cuda_jobs.decode_as_on_the_cpu, "fp8", case, round_scale, use_ue8m0)


@at_ranks
def test_low_latency_logfmt(worlds, ranks):
    worlds(ranks, "cuda").run(cuda_jobs.decode_as_on_the_cpu, "logfmt", decode_case(ranks), False)


@at_ranks
def test_low_latency_counters(worlds, ranks):
    worlds(ranks, "cuda").run(cuda_jobs.low_latency_counters, decode_case(ranks))


@at_ranks
@pytest.mark.parametrize("job", ["shrink", "three_alive"])
def test_low_latency_as_on_the_cpu(worlds, ranks, job):
    worlds(ranks, "cuda").run(cuda_jobs.decode_as_on_the_cpu, job, decode_case(ranks))


@at_ranks
@pytest.mark.parametrize("how", ["return_recv_hook", "async_finish"])
def test_low_latency_graph(worlds, ranks, how):
    worlds(ranks, "cuda").run(cuda_jobs.low_latency_graph, decode_case(ranks, hidden=512), {how: True})


def test_low_latency_without_a_lost_rank(worlds):
    worlds(MORE_RANKS, "cuda").run(cuda_jobs.low_latency_lost_rank, decode_case(MORE_RANKS, top_k=5, hidden=128))


@pytest.mark.parametrize("leave", [end_process, partial(time.sleep, 15.0)], ids=["ends", "does not call"])
@at_ranks
def test_low_latency_without_a_rank_from_the_start(ranks, leave):
    case = decode_case(ranks, hidden=128)
    with World(ranks, devices="cuda", timeout_s=120.0) as world:
        world.run(pools.prefer, "cuda")
        if leave is not end_process:
            world.run(cuda_jobs.low_latency_gone_at_once, case, leave)
            return
        with pytest.raises(WorldError) as caught:
            world.run(cuda_jobs.low_latency_gone_at_once, case, leave)
        assert set(caught.value.errors) == {ranks - 1}, caught.value


V1_SIZES = Sizes(tokens=32, hidden=2048, experts=16, top_k=4)


@at_ranks
@pytest.mark.parametrize("use_logfmt", [False, True])
def test_what_the_low_latency_test_of_deep_ep_does(worlds, ranks, use_logfmt):
    sizes = replace(V1_SIZES, experts=4 * ranks)
    worlds(ranks, "cuda").run(v1_jobs.low_latency, "cuda", sizes, use_logfmt)


@at_ranks
def test_what_the_normal_test_of_deep_ep_does(worlds, ranks):
    worlds(ranks, "cuda").run(v1_jobs.normal_mode, "cuda", replace(V1_SIZES, experts=4 * ranks), 24)


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs: up to three ranks may share one")
def test_what_the_shrink_test_of_deep_ep_does():
    with World(6, devices="cuda", timeout_s=240.0) as world:
        world.run(pools.prefer, "cuda")
        world.run(v1_jobs.shrinking, "cuda", replace(V1_SIZES, experts=24))


def test_profiles_have_one_kernel_for_each_direction_of_low_latency_calls(worlds):
    worlds(RANKS, "cuda").run(v1_jobs.profiled, replace(V1_SIZES, experts=8))


@pytest.fixture
def buffer(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_BACKEND", "cuda")
    return Buffer(None, low_latency_mode=True)


def routed(buffer, topk_idx):
    return jobs.layout_arguments(buffer, topk_idx, 4) | {"topk_idx": topk_idx}


@pytest.mark.parametrize("expert", [4, 1 << 20, -2])
def test_a_bad_index_is_reported_and_does_no_harm(buffer, expert):
    x = torch.ones(3, 16, dtype=torch.bfloat16, device="cuda")
    good = torch.tensor([[0, 1], [2, -1], [3, 0]], device="cuda")
    bad = good.clone()
    bad[1, 0] = expert
    for topk_idx in (bad, bad.clone()):  # one whose layout is known, and one whose layout has to be made again
        with pytest.raises(RoutingError):
            buffer.dispatch(x, **(routed(buffer, bad) | {"topk_idx": topk_idx}))
    torch.cuda.synchronize()
    assert torch.equal(buffer.dispatch(x, **routed(buffer, good))[0], x)


def test_a_routing_that_is_edited_in_inference_mode(buffer):
    """The rows go by ``is_token_in_rank``, as they do for tensors that have a version."""
    x = torch.arange(48, dtype=torch.bfloat16, device="cuda").view(3, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            topk_idx = torch.tensor([[0, 1], [2, -1], [-1, -1]], device="cuda")
            given = routed(buffer, topk_idx)
            topk_idx[2, 0] = 3
            got, ids, *_ = buffer.dispatch(x, **given)
            assert torch.equal(got, x[:2]), mode
            assert ids.tolist() == [[0, 1], [2, -1]]


def test_the_local_buffer_lies_in_the_memory_for_rows(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_BACKEND", "cuda")
    buffer = Buffer(None, 1 << 28, 1 << 33, low_latency_mode=True)
    before = torch.cuda.memory_allocated()
    view = buffer.get_local_buffer_tensor(torch.int8)
    assert torch.cuda.memory_allocated() == before, "it was allocated"
    topk_idx = torch.zeros(3, 1, dtype=torch.int64, device="cuda")
    x = torch.ones(3, 16, dtype=torch.bfloat16, device="cuda")
    got = buffer.dispatch(x, **routed(buffer, topk_idx))[0]
    assert view.zero_().numel() == 1 << 28
    assert torch.equal(got, x)


def test_too_little_room_for_the_worst_case(buffer):
    topk_idx = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    x = torch.ones(3, 16, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(CapacityError, match="num_worst_tokens=2 holds 2 tokens from each of 1 ranks, got T=3"):
        buffer.dispatch(x, num_worst_tokens=2, **routed(buffer, topk_idx))
    assert buffer.dispatch(x, num_worst_tokens=3, **routed(buffer, topk_idx))[0].shape == (3, 16)


def test_a_config_says_how_many_sms(buffer):
    from tokenferry.compat.deep_ep import Config

    topk_idx = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    x = torch.ones(3, 16, dtype=torch.bfloat16, device="cuda")
    for config in (None, Config(num_sms=2), Buffer.get_dispatch_config(1)):
        got, _, _, _, handle, _ = buffer.dispatch(x, config=config, **routed(buffer, topk_idx))
        assert torch.equal(got, x)
        assert torch.equal(buffer.combine(got, handle, config=config)[0], x)
