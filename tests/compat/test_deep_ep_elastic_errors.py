"""Bad calls of `ElasticBuffer` raise, name the argument, and leave it usable; what programs read of it is there.

On a group of one rank, which needs no process group.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from tokenferry import api
from tokenferry.compat import deep_ep
from tokenferry.compat.deep_ep import ElasticBuffer, EPBuffer, EPHandle
from tokenferry.errors import (
    ArgumentError,
    CapacityError,
    ClosedError,
    ConfigError,
    PickleError,
    PlanError,
    RoutingError,
    ShapeError,
    UnsupportedError,
)

T, K, E, H, M = 3, 2, 4, 128, 4
X = torch.arange(T * H).reshape(T, H).bfloat16()
IDX = torch.tensor([[0, 1], [2, -1], [3, 0]])
WEIGHTS = torch.rand(T, K)
FP8 = X.to(torch.float8_e4m3fn)
STATS = torch.zeros(E, dtype=torch.int32)


@pytest.fixture
def buffer():
    return ElasticBuffer(None, num_max_tokens_per_rank=M, hidden=H, explicitly_destroy=True)


def dispatch(buffer, **other):
    return buffer.dispatch(**({"x": X, "topk_idx": IDX, "topk_weights": WEIGHTS, "num_experts": E} | other))


def check_usable(buffer):
    x, _, weights, handle, _ = dispatch(buffer)
    assert torch.equal(x, X)
    out, back, _ = buffer.combine(x, handle, topk_weights=weights)
    assert torch.equal(out, X)
    assert torch.equal(back, torch.where(IDX >= 0, WEIGHTS, 0))


MOST = 1 + (2**31 - 1 - M * K) // E
"""The largest alignment: M * K rows for E experts, each rounded up, are counted in int32."""
TOO_FAR = MOST + 1

BAD_DISPATCH = [
    ({"topk_idx": None}, ArgumentError, "topk_idx: expected a value, got None; it may be left out only"),
    ({"num_experts": None}, ArgumentError, "num_experts: expected a value, got None; it may be left out only"),
    ({"num_experts": 0}, ArgumentError, "num_experts: expected an integer of at least 1, got 0"),
    ({"num_experts": 4.0}, ArgumentError, "num_experts: expected an integer"),
    ({"topk_idx": IDX.float()}, ShapeError, "topk_idx"),
    ({"topk_idx": IDX[0]}, ShapeError, "topk_idx: expected torch.int64 or torch.int32 \\[T, K\\]"),
    ({"topk_idx": IDX.tolist()}, ShapeError, "topk_idx: .* got list"),
    ({"topk_idx": IDX[:2]}, ShapeError, "topk_idx"),
    ({"topk_idx": IDX + 1}, RoutingError, r"topk_idx\[2, 0\] is 4"),
    ({"topk_weights": WEIGHTS.double()}, ShapeError, "topk_weights"),
    ({"topk_weights": WEIGHTS.tolist()}, ShapeError, "topk_weights: expected .*, got list"),
    ({"topk_weights": WEIGHTS[:, :1]}, ShapeError, "topk_weights"),
    ({"x": X[0]}, ShapeError, "x: expected a tensor"),
    ({"x": (X, 1.0)}, ShapeError, "x: expected a tensor"),
    ({"x": (X, torch.ones(T, 1), torch.ones(T, 1))}, ShapeError, "x: expected a tensor"),
    ({"x": (FP8, None)}, ShapeError, "x: .*, NoneType\\); pass rows without scales as a tensor"),
    (
        {"x": (FP8, None), "use_tma_aligned_col_major_sf": True},
        ShapeError,
        "x: .*, NoneType\\); pass rows without scales as a tensor",
    ),
    ({"x": X[:, :4].contiguous()}, ShapeError, "multiple of 16"),
    ({"x": X.T.contiguous().T}, ShapeError, "contiguous"),
    ({"x": (FP8, torch.ones(1, 1))}, ShapeError, r"x\[1\]: .* T=3 was set by x\[0\]"),
    ({"x": (FP8, torch.ones(T))}, ShapeError, r"x: expected scales \[T, P\] of 4 bytes each"),
    ({"x": (FP8, torch.ones(T, 1, dtype=torch.bfloat16))}, ShapeError, "of 4 bytes each, .* got torch.bfloat16"),
    ({"num_max_tokens_per_rank": 2}, CapacityError, "T=3 rows exceed num_max_tokens_per_rank=2"),
    ({"num_max_tokens_per_rank": 0}, ArgumentError, "num_max_tokens_per_rank: expected an integer of at least 1"),
    ({"expert_alignment": 0}, ArgumentError, "expert_alignment: expected an integer of at least 1"),
    *(
        (
            {"expert_alignment": TOO_FAR, "do_expand": expand},
            ArgumentError,
            f"expert_alignment: .* {MOST}, .* {TOO_FAR}",
        )
        for expand in (False, True)
    ),
    ({"num_sms": -1}, ArgumentError, "num_sms: expected an integer of at least 0"),
    ({"num_qps": -1}, ArgumentError, "num_qps: expected an integer of at least 0"),
    ({"do_zero_padding": True}, ArgumentError, "do_zero_padding: only rows by expert have padding"),
    ({"cumulative_local_expert_recv_stats": STATS[:2]}, ShapeError, "cumulative_local_expert_recv_stats"),
    ({"cumulative_local_expert_recv_stats": STATS.long()}, ShapeError, "cumulative_local_expert_recv_stats"),
    (
        {"cumulative_local_expert_recv_stats": STATS[:1].expand(E)},
        ShapeError,
        "cumulative_local_expert_recv_stats: expected a counter for each of 4 experts, got one that is expanded",
    ),
    ({"num_max_tokens_per_rank": 2**70}, ArgumentError, "num_max_tokens_per_rank: .* at most 2147483647"),
    ({"num_experts": 2**70}, ArgumentError, "num_experts: expected an integer of at most 2147483647"),
    ({"expert_alignment": 2**70, "do_expand": True}, ArgumentError, "expert_alignment: .* at most 2147483647"),
    ({"x": (FP8, torch.ones(T, 1).to_sparse())}, ShapeError, r"x\[1\]: expected a dense tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_DISPATCH, ids=lambda v: v if isinstance(v, str) else "")
def test_dispatch_refuses(buffer, change, error, message):
    with pytest.raises(error, match=message):
        dispatch(buffer, **change)
    check_usable(buffer)


def test_counts_of_the_largest_alignment_fit_into_int32(buffer):
    handle = dispatch(buffer, expert_alignment=MOST)[3]
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [MOST, 2 * MOST, 3 * MOST, 4 * MOST]
    assert handle.num_expanded_tokens == 4 * MOST


BAD_CACHED = [
    ({"topk_idx": IDX}, ArgumentError, "topk_idx: expected None, since handle has the routing"),
    ({"cumulative_local_expert_recv_stats": STATS}, ArgumentError, "cumulative_local_expert_recv_stats: expected None"),
    ({"num_experts": 8}, ArgumentError, "num_experts: expected None or 4, as in handle, got 8"),
    ({"num_max_tokens_per_rank": 8}, ArgumentError, "num_max_tokens_per_rank: expected None or 4, as in handle, got 8"),
    ({"expert_alignment": 2}, ArgumentError, "expert_alignment: expected None or 1, as in handle, got 2"),
    ({"do_expand": True}, ArgumentError, "do_expand: expected False, as in the dispatch that made handle, got True"),
    ({"do_cpu_sync": True}, ArgumentError, "do_cpu_sync: a dispatch with a handle never waits"),
    ({"do_zero_padding": True}, ArgumentError, "do_zero_padding"),
    ({"num_sms": 1.5}, ArgumentError, "num_sms"),
    ({"x": X[:2]}, ShapeError, "T=3 was set by the handle"),
    ({"x": (FP8, None)}, ShapeError, "x: .*, NoneType\\); pass rows without scales as a tensor"),
    ({"topk_weights": WEIGHTS[:2]}, ShapeError, "topk_weights"),
    ({"topk_weights": WEIGHTS.tolist()}, ShapeError, "topk_weights: expected .*, got list"),
    (
        {"handle": object()},
        PlanError,
        "handle: expected the EPHandle that tokenferry's ElasticBuffer.dispatch returned",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CACHED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_cached_dispatch_refuses(buffer, change, error, message):
    *_, handle, _ = dispatch(buffer)
    with pytest.raises(error, match=message):
        buffer.dispatch(**({"x": X, "handle": handle} | change))
    check_usable(buffer)


BAD_COMBINE = [
    ({"x": X[:2]}, ShapeError, "x: .* rows=3 was set by the handle"),
    ({"x": FP8}, ShapeError, "x: expected torch.bfloat16"),
    ({"x": X.T.contiguous().T}, ShapeError, "x: must be contiguous"),
    ({"x": [X]}, ShapeError, "x: .* got list"),
    ({"handle": None}, PlanError, "handle: expected the EPHandle"),
    ({"topk_weights": WEIGHTS[:2]}, ShapeError, "topk_weights"),
    ({"topk_weights": WEIGHTS[:, 0]}, ShapeError, "topk_weights"),
    ({"topk_weights": WEIGHTS.double()}, ShapeError, "topk_weights"),
    ({"bias": (X,)}, ArgumentError, "bias: expected a tensor or a tuple of two, got 1"),
    ({"bias": (X, X, X)}, ArgumentError, "bias: expected a tensor or a tuple of two, got 3"),
    ({"bias": (X, X.float())}, ShapeError, r"bias\[1\]"),
    ({"bias": X[:2]}, ShapeError, "bias"),
    ({"bias": 1.0}, ShapeError, "bias"),
    ({"num_sms": -2}, ArgumentError, "num_sms"),
    ({"num_qps": -2}, ArgumentError, "num_qps"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_COMBINE, ids=lambda v: v if isinstance(v, str) else "")
def test_combine_refuses(buffer, change, error, message):
    *_, handle, _ = dispatch(buffer)
    with pytest.raises(error, match=message):
        buffer.combine(**({"x": X, "handle": handle} | change))
    check_usable(buffer)


def test_combine_along_the_handle_of_another_buffer(buffer):
    *_, handle, _ = dispatch(ElasticBuffer(None, num_max_tokens_per_rank=M))
    with pytest.raises(PlanError, match="made by group"):
        buffer.combine(X, handle)


BAD_BUFFERS = [
    ({}, ArgumentError, "expected num_bytes or num_max_tokens_per_rank, got neither"),
    ({"hidden": H}, ArgumentError, "expected num_bytes or num_max_tokens_per_rank, got neither"),
    ({"num_bytes": 1000}, ArgumentError, r"num_bytes: expected a multiple of 2097152 \(2 MiB\), got 1000"),
    ({"num_bytes": 0}, ArgumentError, "num_bytes"),
    ({"num_max_tokens_per_rank": -1}, ArgumentError, "num_max_tokens_per_rank"),
    ({"num_max_tokens_per_rank": M, "hidden": 1.0}, ArgumentError, "hidden"),
    ({"num_max_tokens_per_rank": M, "num_topk": -1}, ArgumentError, "num_topk"),
    ({"num_max_tokens_per_rank": M, "num_allocated_qps": -1}, ArgumentError, "num_allocated_qps"),
    ({"num_max_tokens_per_rank": M, "num_cpu_timeout_secs": 0}, ArgumentError, "num_cpu_timeout_secs"),
    ({"num_max_tokens_per_rank": M, "num_gpu_timeout_secs": -1}, ArgumentError, "num_gpu_timeout_secs"),
    ({"num_max_tokens_per_rank": M, "num_cpu_bytes": 1 << 21}, UnsupportedError, "num_cpu_bytes: got 2097152"),
    ({"num_max_tokens_per_rank": M, "deterministic": "no"}, ArgumentError, "deterministic: expected True or False"),
    ({"num_max_tokens_per_rank": M, "allow_hybrid_mode": []}, ArgumentError, "allow_hybrid_mode: expected True or"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_BUFFERS)
def test_the_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ElasticBuffer(None, **arguments)


@pytest.mark.parametrize("kind", [ElasticBuffer, EPBuffer])
@pytest.mark.parametrize("how", [{}, {"async_with_compute_stream": True}], ids=["synchronous", "asynchronous"])
def test_counters_may_come_from_inference_mode(kind, how):
    """And have gaps between them. Both were refused, or raised by torch, after the rows had been sent."""
    buffer = kind(None, num_max_tokens_per_rank=M, hidden=H)
    with torch.inference_mode():
        counters = [torch.zeros(E, dtype=torch.int32), torch.zeros(E, 2, dtype=torch.int32)[:, 0]]
    for stats in (*counters, STATS.clone(), STATS.repeat(2)[::2]):
        for times in (1, 2):
            dispatch(buffer, cumulative_local_expert_recv_stats=stats, **how)
            assert stats.tolist() == [2 * times, times, times, times]
    with torch.inference_mode():
        dispatch(buffer, cumulative_local_expert_recv_stats=stats, **how)
    assert stats.tolist() == [6, 3, 3, 3]


def test_a_dispatch_needs_m_if_the_constructor_got_none():
    buffer = ElasticBuffer(None, 2 << 20)
    with pytest.raises(ArgumentError, match="num_max_tokens_per_rank: expected an integer of at least 1, got 0"):
        dispatch(buffer)
    assert torch.equal(dispatch(buffer, num_max_tokens_per_rank=T)[0], X)


def test_more_experts_than_ranks_can_share_evenly(worlds):
    worlds(2).run(_uneven)


def _uneven(rank, pg):
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=M)
    with pytest.raises(ConfigError, match="num_experts=5"):
        dispatch(buffer, num_experts=5)
    dispatch(buffer)


# ---------------------------------------------------------------------- what programs read of it


def test_attributes(buffer):
    names = ("rank_idx", "num_ranks", "scaleout_rank_idx", "scaleup_rank_idx")
    assert [getattr(buffer, name) for name in names] == [0, 1, 0, 0]
    names = ("num_scaleout_ranks", "num_scaleup_ranks", "num_rdma_ranks", "num_nvlink_ranks")
    assert [getattr(buffer, name) for name in names] == [1, 1, 1, 1]
    assert (buffer.group, buffer.num_max_tokens_per_rank, buffer.nccl_comm_handle) == (None, M, None)
    assert buffer.runtime is not None
    chosen = {
        "deterministic": True,
        "allow_hybrid_mode": False,
        "allow_multiple_reduction": False,
        "prefer_overlap_with_compute": False,
        "num_allocated_qps": 9,
        "explicitly_destroy": True,
    }
    other = ElasticBuffer(None, num_max_tokens_per_rank=M, use_fp8_dispatch=True, sl_idx=0, **chosen)
    assert {name: getattr(other, name) for name in chosen} == chosen
    check_usable(other)


def test_domains(buffer):
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 1)
    assert deep_ep.get_physical_domain_size(None) == (1, 1)
    assert deep_ep.get_logical_domain_size(None, allow_hybrid_mode=False) == (1, 1)
    assert buffer.get_comm_stream() is not None


def test_what_is_advised_on_the_cpu(buffer):
    assert buffer.get_theoretical_num_sms(num_experts=E, num_topk=K) == 20
    assert buffer.get_theoretical_num_sms(7, 3) == 20
    assert buffer.get_theoretical_num_qps(20) == 1


def test_the_size_hint_is_what_a_buffer_reports():
    hint = ElasticBuffer.get_buffer_size_hint(None, 4096, 7168, num_topk=8, use_fp8_dispatch=True)
    assert hint % (2 << 20) == 0
    assert hint >= 5 * 4096 * 7168 * 2
    assert ElasticBuffer(None, num_bytes=hint, num_max_tokens_per_rank=4096, hidden=7168).num_bytes == hint
    sizes = {"num_max_tokens_per_rank": 4096, "hidden": 7168, "num_topk": 8}
    assert ElasticBuffer(None, **sizes).num_bytes == hint
    for sizes in ((0, 16), (16, 0), (16, 16, -1)):
        with pytest.raises(ArgumentError):
            ElasticBuffer.get_buffer_size_hint(None, *sizes)


@pytest.fixture
def resolved(monkeypatch):
    """Return the options of the groups that are made."""
    seen = []
    make = api.make_backend
    monkeypatch.setattr(api, "make_backend", lambda group, options: seen.append(options) or make(group, options))
    return seen


def test_groups_have_the_memory_that_was_asked_for(resolved, monkeypatch):
    for arguments in ({"num_max_tokens_per_rank": 1}, {"num_bytes": 2 << 20}, {"num_bytes": 3 << 30}):
        ElasticBuffer(None, **arguments)
    assert [options.heap_bytes >> 30 for options in resolved] == [2, 2, 3]
    monkeypatch.setenv("TOKENFERRY_HEAP_MB", "64")
    ElasticBuffer(None, 3 << 30)
    assert resolved[-1].heap_bytes == 64 << 20


def test_the_smaller_timeout_counts(resolved, monkeypatch):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "7")
    for cpu_s, gpu_s in ((300, 100), (300, 30), (20, 100)):
        timeouts = {"num_cpu_timeout_secs": cpu_s, "num_gpu_timeout_secs": gpu_s}
        ElasticBuffer(None, num_max_tokens_per_rank=1, **timeouts)
    assert [options.timeout_s for options in resolved] == [7, 30, 20]


def test_a_destroyed_buffer_says_so(buffer):
    x, *_, handle, _ = dispatch(buffer)
    buffer.destroy()
    buffer.destroy()
    for call in (lambda: dispatch(buffer), lambda: buffer.combine(x, handle), buffer.barrier):
        with pytest.raises(ClosedError, match="ElasticBuffer was destroyed"):
            call()
    assert torch.equal(x, X)
    other = ElasticBuffer(None, num_max_tokens_per_rank=M)
    with pytest.raises(ArgumentError, match="explicitly_destroy=False frees by itself"):
        other.destroy()


def test_a_forgotten_buffer_closes_its_group():
    """Its handles may live on: they hold no buffer."""
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=M)
    *_, handle, _ = dispatch(buffer)
    group, gone = buffer._experts, weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None
    with pytest.raises(ClosedError):
        group.combine(X, handle.plan)
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [T]


def test_it_is_one_object_in_one_process(buffer):
    assert copy.deepcopy(buffer) is copy.copy(buffer) is buffer
    with pytest.raises(PickleError, match="ElasticBuffer: cannot be pickled"):
        pickle.dumps(buffer)


def test_a_handle_keeps_no_rows_alive(buffer):
    x, *_, handle, _ = dispatch(buffer, do_expand=True, expert_alignment=2)
    rows = weakref.ref(x)
    del x
    gc.collect()
    assert type(handle) is EPHandle
    assert rows() is None
