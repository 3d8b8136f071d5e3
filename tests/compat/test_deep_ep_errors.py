"""Bad calls raise, name the argument, and leave the buffer usable; nothing that cannot be honoured is ignored.

On a group of one rank, which needs no process group.
"""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.wrapped import Wrapped
from tokenferry.compat.deep_ep import Buffer, Config, EventOverlap
from tokenferry.compat.deep_ep.hybrid_ep_buffer import indices_to_map
from tokenferry.errors import (
    ArgumentError,
    CapacityError,
    ClosedError,
    ConfigError,
    PlanError,
    ResourceError,
    RoutingError,
    ShapeError,
    UnsupportedError,
)

T, K, E, H, M = 3, 2, 4, 128, 4
X = torch.arange(T * H).reshape(T, H).bfloat16()
IDX = torch.tensor([[0, 1], [2, -1], [3, 0]])
WEIGHTS = torch.rand(T, K)


@pytest.fixture
def buffer():
    return Buffer(None, 64, 128, low_latency_mode=True, explicitly_destroy=True, enable_shrink=True)


def given(buffer: Buffer, **other: object) -> dict:
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(IDX, E)
    arguments = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
        "topk_idx": IDX,
        "topk_weights": WEIGHTS,
    }
    return arguments | other


def check_usable(buffer: Buffer) -> None:
    x, _, _, _, handle, _ = buffer.dispatch(X, **given(buffer))
    assert torch.equal(x, X)
    assert torch.equal(buffer.combine(x, handle)[0], X)


NO_ROUTING = dict.fromkeys(
    ["num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank", "topk_idx", "topk_weights"]
)
BAD_DISPATCH = [
    ({"topk_idx": None}, ArgumentError, "topk_weights: needs topk_idx"),
    ({"num_tokens_per_rank": None}, ArgumentError, "num_tokens_per_rank: expected a tensor, got None"),
    ({"is_token_in_rank": None}, ArgumentError, "is_token_in_rank: expected a tensor, got None"),
    ({"num_tokens_per_expert": None}, ArgumentError, "num_tokens_per_expert: expected a tensor, got None"),
    ({"num_tokens_per_rank": torch.tensor([2])}, ArgumentError, r"num_tokens_per_rank\[0\]: expected 3"),
    ({"num_tokens_per_rdma_rank": torch.tensor([2])}, ArgumentError, r"num_tokens_per_rdma_rank\[0\]: expected 3"),
    ({"num_tokens_per_rdma_rank": torch.tensor([2, 1])}, ShapeError, "num_tokens_per_rdma_rank"),
    ({"num_tokens_per_expert": torch.tensor([2, 1, 1, 2])}, ArgumentError, r"num_tokens_per_expert\[3\]: expected 1"),
    ({"is_token_in_rank": torch.ones(T, 2, dtype=torch.bool)}, ShapeError, "is_token_in_rank"),
    ({"is_token_in_rank": torch.ones(T, 1, dtype=torch.int32)}, ShapeError, "is_token_in_rank"),
    ({"topk_idx": IDX.float()}, ShapeError, "topk_idx"),
    ({"num_tokens_per_rank": torch.zeros(2, dtype=torch.int32)}, ShapeError, "num_tokens_per_rank: expected .*R=1"),
    ({"topk_idx": IDX[:2]}, ShapeError, "topk_idx"),
    ({"topk_idx": IDX[0, 0]}, ShapeError, "topk_idx"),
    ({"topk_idx": IDX.tolist()}, ShapeError, "topk_idx: expected .*, got list"),
    ({"topk_idx": IDX + 1}, RoutingError, r"topk_idx\[2, 0\] is 4"),
    ({"topk_idx": torch.where(IDX == 2, -1, IDX)}, ArgumentError, r"is_token_in_rank\[1, 0\] is True, but topk_idx"),
    ({"topk_weights": WEIGHTS.double()}, ShapeError, "topk_weights"),
    ({"topk_weights": WEIGHTS.tolist()}, ShapeError, "topk_weights: expected .*, got list"),
    ({"x": X[0]}, ShapeError, "x: expected a tensor"),
    ({"x": (X, 1.0)}, ShapeError, "x: expected a tensor"),
    ({"x": (X, torch.ones(T, 1), torch.ones(T, 1))}, ShapeError, "x: expected a tensor"),
    ({"x": (X, None)}, ShapeError, "x: .*, NoneType\\); pass rows without scales as a tensor"),
    ({"x": (X.to(torch.float8_e4m3fn), None)}, ShapeError, "x: .*, NoneType\\); pass rows without scales as a tensor"),
    ({"x": X[:, :4].contiguous()}, ShapeError, "multiple of 16"),
    ({"expert_alignment": 0}, ArgumentError, "expert_alignment"),
    ({"num_worst_tokens": -1}, ArgumentError, "num_worst_tokens"),
    ({"num_worst_tokens": 2}, CapacityError, "num_worst_tokens=2: expected at least the T=3 tokens of this rank"),
    ({"expert_alignment": 2**70}, ArgumentError, "expert_alignment: expected an integer of at most 2147483647"),
    ({"num_worst_tokens": 2**70}, ArgumentError, "num_worst_tokens: expected an integer of at most 2147483647"),
    ({"x": X.to_sparse()}, ShapeError, r"x: .*torch\.sparse_coo"),
    ({"x": (X, torch.ones(T, 1).to_sparse())}, ShapeError, r"x\[1\]: expected a dense tensor, got torch\.sparse_coo"),
    (
        {"topk_idx": None, "topk_weights": None, "num_worst_tokens": 8},
        ArgumentError,
        "num_worst_tokens=8 needs topk_idx",
    ),
    ({"topk_idx": None, "topk_weights": None, "num_tokens_per_rank": torch.tensor([2])}, ArgumentError, "expected 3"),
    ({"config": 24}, ArgumentError, "config"),
    ({"previous_event": object()}, ArgumentError, "previous_event"),
    ({"allocate_on_comm_stream": True, "async_finish": True}, ArgumentError, "allocate_on_comm_stream"),
    ({"allocate_on_comm_stream": True, "previous_event": Buffer.capture()}, ArgumentError, "allocate_on_comm_stream"),
    (
        {"allocate_on_comm_stream": True, "async_finish": True, "previous_event": EventOverlap()},
        ArgumentError,
        "no event",
    ),
    ({"handle": ()}, ArgumentError, "num_tokens_per_rank: expected None, since handle"),
    ({"handle": (), **NO_ROUTING}, PlanError, "handle"),
    ({"handle": (), **NO_ROUTING, "num_worst_tokens": 8}, ArgumentError, "num_worst_tokens: expected None"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_DISPATCH, ids=lambda v: v if isinstance(v, str) else "")
def test_dispatch_refuses(buffer, change, error, message):
    arguments = given(buffer, x=X) | change
    with pytest.raises(error, match=message):
        buffer.dispatch(**arguments)
    check_usable(buffer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (X, None)}, "x: .*; pass rows without scales as a tensor"),
        *(({"expert_alignment": bad}, f"expert_alignment: .*, got {bad!r}") for bad in (0, -5, "x", None)),
    ],
)
def test_a_cached_dispatch_refuses(buffer, change, message):
    handle = buffer.dispatch(X, **given(buffer))[4]
    with pytest.raises(ArgumentError, match=f"Buffer.dispatch: {message}"):
        buffer.dispatch(**{"x": X, "handle": handle} | change)
    assert torch.equal(buffer.dispatch(X, handle=handle, expert_alignment=8)[0], X)


def test_rows_without_scales_in_a_pair_are_refused_before_anything_is_sent(worlds):
    """The error came behind the exchange, so that the next call was matched with another one of the peer."""
    assert worlds(2).run(_a_pair_too_few) == [[1.0, 1.0], [1.0, 1.0]]


def _a_pair_too_few(rank, pg):
    buffer = Buffer(pg)
    index = torch.tensor([[0], [1]])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(index, 2)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    first, second = (torch.full((2, 16), number, dtype=torch.bfloat16) for number in (1.0, 2.0))
    if rank == 0:
        with pytest.raises(ShapeError, match="pass rows without scales as a tensor"):
            buffer.dispatch((first, None), topk_idx=index, **layout)
    got = buffer.dispatch(first, topk_idx=index, **layout)[0]
    buffer.dispatch(second, topk_idx=index, **layout)
    return got[:, 0].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IDX.float(), E), ShapeError, "topk_idx"),
        ((IDX, 3), RoutingError, r"topk_idx\[2, 0\] is 3"),
        ((IDX, 0), ConfigError, "num_experts: expected a positive integer, got 0"),
        ((IDX, None), ConfigError, "num_experts: expected a positive integer, got None"),
    ],
)
def test_layout_refuses(buffer, arguments, error, message):
    with pytest.raises(error, match=message):
        buffer.get_dispatch_layout(*arguments)


BAD_COMBINE = [
    ({"x": X[:2]}, ShapeError, "x: expected"),
    ({"x": X.to(torch.int16)}, ShapeError, "Buffer.combine: x: expected .*, got torch.int16"),
    ({"bias": (X,)}, ArgumentError, "bias: .*, got a tuple of 1; "),
    ({"bias": (X, X, X)}, ArgumentError, "bias: .*, got a tuple of 3; "),
    ({"bias": 1.0}, ArgumentError, "bias: .*, got float; "),
    ({"bias": X[:, :64]}, ShapeError, "bias"),
    ({"topk_weights": WEIGHTS[:2]}, ShapeError, "topk_weights"),
    ({"handle": None}, PlanError, "handle"),
    ({"config": {}}, ArgumentError, "config"),
    ({"allocate_on_comm_stream": True}, ArgumentError, "allocate_on_comm_stream"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_COMBINE, ids=lambda v: v if isinstance(v, str) else "")
def test_combine_refuses(buffer, change, error, message):
    handle = buffer.dispatch(X, **given(buffer))[4]
    with pytest.raises(error, match=message):
        buffer.combine(**({"x": X, "handle": handle} | change))
    check_usable(buffer)


BAD_LL_DISPATCH = [
    ({"x": X.double()}, ShapeError, "x: expected"),
    ({"x": X[:2]}, ShapeError, "topk_idx"),
    ({"topk_idx": IDX + 1}, RoutingError, "topk_idx"),
    ({"num_max_dispatch_tokens_per_rank": 2}, CapacityError, "T=3 rows exceed num_max_dispatch_tokens_per_rank=2"),
    ({"num_max_dispatch_tokens_per_rank": 2**70}, ArgumentError, "dispatch_tokens_per_rank: .* at most 2147483647"),
    ({"num_experts": 2**70}, ArgumentError, "num_experts: expected an integer of at most 2147483647"),
    ({"cumulative_local_expert_recv_stats": torch.zeros(E)}, ShapeError, "cumulative_local_expert_recv_stats"),
    ({"dispatch_wait_recv_cost_stats": torch.zeros(1, 1)}, ShapeError, "dispatch_wait_recv_cost_stats"),
    ({"use_ue8m0": True}, ArgumentError, "use_ue8m0: needs round_scale"),
    ({"async_finish": True, "return_recv_hook": True}, ArgumentError, "at most one"),
    ({"use_nvfp4": True}, UnsupportedError, "use_nvfp4"),
    ({"x_global_scale": torch.ones(1)}, UnsupportedError, "x_global_scale"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LL_DISPATCH, ids=lambda v: v if isinstance(v, str) else "")
def test_low_latency_dispatch_refuses(buffer, change, error, message):
    good = {"x": X, "topk_idx": IDX, "num_max_dispatch_tokens_per_rank": M, "num_experts": E}
    with pytest.raises(error, match=message):
        buffer.low_latency_dispatch(**(good | change))
    check_usable(buffer)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2**32, 2**32), r"\[4294967296, 4294967296\] at offset=0 would end at byte 18446744073709551616"),
        ([2**70], r"size\[0\]: expected an integer of at most 9223372036854775807"),
        ([2**62], "would end at byte 4611686018427387904 of num_nvl_bytes=64"),
    ],
)
def test_a_view_of_a_buffer_is_no_larger_than_the_buffer(buffer, size, message):
    with pytest.raises(ArgumentError, match=rf"get_local_buffer_tensor: .*{message}"):
        buffer.get_local_buffer_tensor(torch.uint8, size)
    assert buffer.get_local_buffer_tensor(torch.uint8, [4, 16]).shape == (4, 16)


@pytest.mark.parametrize("num_bytes", [2**60, 2**63 - 1])
def test_memory_that_the_system_refuses_for_a_view(num_bytes):
    buffer = Buffer(None, num_bytes, explicitly_destroy=True)
    with pytest.raises(
        ResourceError, match=rf"get_local_buffer_tensor: num_nvl_bytes={num_bytes} bytes are not .*ENOMEM"
    ):
        buffer.get_local_buffer_tensor(torch.uint8)
    check_usable(buffer)


def test_tensors_of_classes_that_stand_for_others(buffer):
    """Nothing that is not in memory is sent, whatever argument it is."""
    kw, y = given(buffer), torch.zeros(E, M, H, dtype=torch.bfloat16)
    rows, _, weights, _, handle, _ = buffer.dispatch(X, **kw)
    _, _, answers, _, _ = buffer.low_latency_dispatch(X, IDX, M, E, use_fp8=False)
    counts, waits = torch.zeros(E, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    decode, scales = (X, IDX, M, E), torch.ones(T, 1)
    calls = {
        "topk_idx: layout": (IDX, lambda t: buffer.get_dispatch_layout(t, E)),
        "x": (X, lambda t: buffer.dispatch(t, **kw)),
        "x: fp8": (X.to(torch.float8_e4m3fn), lambda t: buffer.dispatch((t, scales), **kw)),
        "x[1]": (scales, lambda t: buffer.dispatch((X.to(torch.float8_e4m3fn), t), **kw)),
        "x: again": (X, lambda t: buffer.dispatch(t, handle=handle)),
        **{
            f"{n}: dispatch": (v, lambda t, n=n: buffer.dispatch(X, **kw | {n: t}))
            for n, v in kw.items()
            if v is not None
        },
        "x: combine": (rows, lambda t: buffer.combine(t, handle)),
        "topk_weights: combine": (weights, lambda t: buffer.combine(rows, handle, topk_weights=t)),
        "bias": (X, lambda t: buffer.combine(rows, handle, bias=t)),
        "x: decode": (X, lambda t: buffer.low_latency_dispatch(t, IDX, M, E, use_fp8=False)),
        "topk_idx: decode": (IDX, lambda t: buffer.low_latency_dispatch(X, t, M, E)),
        "cumulative_local_expert_recv_stats": (
            counts,
            lambda t: buffer.low_latency_dispatch(*decode, cumulative_local_expert_recv_stats=t),
        ),
        "dispatch_wait_recv_cost_stats": (
            waits,
            lambda t: buffer.low_latency_dispatch(*decode, dispatch_wait_recv_cost_stats=t),
        ),
        "x: answers": (y, lambda t: buffer.low_latency_combine(t, IDX, WEIGHTS, answers)),
        "topk_idx: answers": (IDX, lambda t: buffer.low_latency_combine(y, t, WEIGHTS, answers)),
        "topk_weights: answers": (WEIGHTS, lambda t: buffer.low_latency_combine(y, IDX, t, answers)),
        "out": (X.clone(), lambda t: buffer.low_latency_combine(y, IDX, WEIGHTS, answers, out=t)),
    }
    for name, (right, call) in calls.items():
        with pytest.raises(
            ShapeError, match=rf": .*{name.partition(':')[0].split('[')[0]}.*: expected a tensor with values"
        ) as said:
            call(Wrapped(right))
        assert "got one of class Wrapped" in str(said.value)
        call(right)
    check_usable(buffer)


Y = torch.zeros(E, M, H, dtype=torch.bfloat16)
BAD_LL_COMBINE = [
    ({"x": Y[:, :3]}, ShapeError, "x: expected"),
    ({"x": Y.transpose(0, 1).contiguous().transpose(0, 1)}, ShapeError, "x: must be contiguous"),
    ({"topk_idx": IDX.flip(0)}, ArgumentError, "topk_idx: differs"),
    ({"topk_weights": WEIGHTS.double()}, ShapeError, "topk_weights"),
    ({"handle": (1, 2)}, PlanError, "handle"),
    ({"out": X[:2]}, ShapeError, "out"),
    ({"zero_copy": True}, ArgumentError, "zero_copy"),
    ({"combine_wait_recv_cost_stats": torch.zeros(1)}, ShapeError, "combine_wait_recv_cost_stats"),
    ({"async_finish": True, "return_recv_hook": True}, ArgumentError, "at most one"),
    ({"use_logfmt": True, "x": Y.float()}, ArgumentError, "use_logfmt: needs bfloat16 rows .* got torch.float32"),
    ({"overlap": True}, UnsupportedError, "overlap"),
    ({"src_signals": torch.zeros(1)}, UnsupportedError, r"src_signals: got a tensor \[1\]"),
    ({"src_signal_expect_value": 3}, UnsupportedError, "src_signal_expect_value: got 3"),
    ({"packed_recv_count": torch.zeros(1)}, UnsupportedError, "packed_recv_count"),
    ({"comp_signal": torch.zeros(1)}, UnsupportedError, "comp_signal"),
    ({"block_m": 64}, UnsupportedError, "block_m"),
    ({"threshold": 10}, UnsupportedError, "threshold"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LL_COMBINE, ids=lambda v: v if isinstance(v, str) else "")
def test_low_latency_combine_refuses(buffer, change, error, message):
    handle = buffer.low_latency_dispatch(X, IDX, M, E, use_fp8=False)[2]
    good = {"x": Y, "topk_idx": IDX, "topk_weights": WEIGHTS, "handle": handle, "num_sms": 3}
    with pytest.raises(error, match=message):
        buffer.low_latency_combine(**(good | change))
    assert torch.equal(buffer.low_latency_combine(**good)[0], torch.zeros_like(X))


def test_logfmt_wants_whole_groups(buffer):
    x = X[:, :64].contiguous()
    handle = buffer.low_latency_dispatch(x, IDX, M, E, use_fp8=False)[2]
    y = Y[:, :, :64].contiguous()
    with pytest.raises(ArgumentError, match=r"use_logfmt: .* a multiple of 128, got torch\.bfloat16 with H=64"):
        buffer.low_latency_combine(y, IDX, WEIGHTS, handle, use_logfmt=True)
    assert torch.equal(buffer.low_latency_combine(y, IDX, WEIGHTS, handle)[0], torch.zeros_like(x))


def test_the_constructor_refuses():
    with pytest.raises(UnsupportedError, match="comm"):
        Buffer(None, comm=object())
    for bad in (-1, None, 1.5, "64"):
        with pytest.raises(ArgumentError, match=f"num_rdma_bytes: expected an integer of at least 0, got {bad!r}"):
            Buffer(None, 0, bad)
        with pytest.raises(ArgumentError, match=f"num_nvl_bytes: expected an integer of at least 0, got {bad!r}"):
            Buffer(None, bad)
    with pytest.raises(ArgumentError, match="enable_shrink"):
        Buffer(None, enable_shrink=True)


def test_hints_about_hardware_are_taken():
    buffer = Buffer(None, 0, 0, True, 12, False, True, False, False, use_fabric=True)
    assert torch.equal(buffer.low_latency_dispatch(X, IDX, M, E, use_fp8=False)[0][0, :2], X[[0, 2]])


def test_modes_are_asked_for():
    plain = Buffer(None)
    with pytest.raises(ArgumentError, match="low_latency_mode=True"):
        plain.low_latency_dispatch(X, IDX, M, E)
    with pytest.raises(ArgumentError, match="enable_shrink=True"):
        plain.low_latency_query_mask_buffer(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="explicitly_destroy"):
        plain.destroy()


def test_mask_calls_refuse(buffer):
    with pytest.raises(ArgumentError, match="rank"):
        buffer.low_latency_update_mask_buffer(0, True)  # this rank
    with pytest.raises(ShapeError, match="mask_status"):
        buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32))
    for bad in (0, None, 1.5):
        with pytest.raises(ArgumentError, match="num_max_dispatch_tokens_per_rank: expected an integer"):
            buffer.clean_low_latency_buffer(bad, H, E)


def test_more_experts_than_ranks_can_share_evenly(worlds):
    worlds(3).run(_uneven)


def _uneven(rank, pg):
    buffer = Buffer(pg, low_latency_mode=True)
    with pytest.raises(ConfigError, match="num_experts=4"):
        buffer.get_dispatch_layout(IDX, E)
    with pytest.raises(ConfigError, match="num_experts=4"):
        buffer.low_latency_dispatch(X, IDX, M, E)


# ------------------------------------------------------------------ small methods and lifetime


def test_local_buffer_is_memory_of_the_size_that_was_given(buffer):
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_().shape == (128,)
    view = buffer.get_local_buffer_tensor(torch.float32, torch.Size([2, 3]), offset=16)
    view.fill_(7.0)
    assert buffer.get_local_buffer_tensor(torch.float32)[4:10].tolist() == [7.0] * 6
    assert buffer.get_local_buffer_tensor(torch.int64, (2,), offset=48).shape == (2,)
    with torch.inference_mode():
        assert buffer.get_local_buffer_tensor(torch.float32)[4:10].tolist() == [7.0] * 6
    assert buffer.get_local_buffer_tensor(torch.int8, torch.Size([0]), offset=64).numel() == 0
    for bad in ({"size": torch.Size([17])}, {"offset": 3}, {"offset": 68}):
        with pytest.raises(ArgumentError, match="num_nvl_bytes=64"):
            buffer.get_local_buffer_tensor(torch.float32, **bad)
    for bad, name in (
        ({"offset": -4}, "offset"),
        ({"offset": 4.0}, "offset"),
        ({"size": 3}, "size"),
        ({"size": (-2, -3)}, r"size\[0\]"),
        ({"dtype": None}, "dtype"),
    ):
        with pytest.raises(ArgumentError, match=f"get_local_buffer_tensor: {name}: expected"):
            buffer.get_local_buffer_tensor(**{"dtype": torch.float32, **bad})


def test_local_buffers_are_freed_with_their_last_view(buffer):
    """Programs zero them, which is no reason to keep gigabytes."""
    view = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)[8:16]
    memory = weakref.ref(view.untyped_storage())
    again = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    assert again.untyped_storage() is memory()
    del view, again
    assert memory() is None
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_().tolist() == [0] * 128


def test_what_programs_ask_of_it(buffer):
    assert Buffer.is_sm90_compiled() is True
    assert (buffer.rank, buffer.group_size, buffer.group, buffer.enable_shrink) == (0, 1, None, True)
    assert buffer.runtime.is_available()
    assert (buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()) == (1, 0)
    assert buffer.runtime.get_root_rdma_rank(True) == buffer.runtime.get_root_rdma_rank(False) == 0
    assert hasattr(buffer.get_comm_stream(), "wait_stream")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_local_device_id", ()),
        ("get_local_ipc_handle", ()),
        ("get_local_nvshmem_unique_id", ()),
        ("sync", ([0], [b""], None)),
    ],
)
def test_methods_that_connect_ranks_are_refused_by_name(buffer, method, arguments):
    with pytest.raises(UnsupportedError, match=rf"Buffer\.runtime\.{method}: .*; leave it out"):
        getattr(buffer.runtime, method)(*arguments)
    check_usable(buffer)


def test_init_can_be_replaced(monkeypatch):
    """Programs wrap the constructor to exclude its memory from their own accounting."""
    original, calls = Buffer.__init__, []

    def wrapped(self, *args, **kwargs):
        calls.append(args)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Buffer, "__init__", wrapped)
    check_usable(Buffer(None, 5))
    assert calls == [(None, 5)]


def test_calls_inside_of_a_mode_whose_tensors_have_no_values(buffer):
    """Also those that compare values before they call the group."""
    arguments = given(buffer)
    rows, *_, handle, _ = buffer.dispatch(X, **arguments)
    decoded, _, decode_handle, _, _ = buffer.low_latency_dispatch(X, IDX, M, E, use_fp8=False)
    for call in (
        lambda: buffer.get_dispatch_layout(IDX, E),
        lambda: buffer.dispatch(X, **arguments),
        lambda: buffer.dispatch(X, handle=handle),
        lambda: buffer.combine(rows, handle),
        lambda: buffer.low_latency_dispatch(X, IDX, M, E),
        lambda: buffer.low_latency_combine(decoded, IDX, WEIGHTS, decode_handle),
        lambda: indices_to_map(IDX, WEIGHTS, T, E),
    ):
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(ShapeError, match=r"FakeTensorMode.* make the call outside of it"),
        ):
            call()
        call()


def test_a_destroyed_buffer_says_so(buffer):
    handle = buffer.dispatch(X, **given(buffer))[4]
    buffer.destroy()
    for call in (
        lambda: buffer.get_dispatch_layout(IDX, E),
        lambda: buffer.dispatch(X, handle=handle),
        lambda: buffer.combine(X, handle),
        lambda: buffer.low_latency_dispatch(X, IDX, M, E),
        lambda: buffer.get_local_buffer_tensor(torch.int8),
        lambda: buffer.low_latency_clean_mask_buffer(),
    ):
        with pytest.raises(ClosedError, match="destroyed"):
            call()


def test_a_forgotten_buffer_closes_its_group():
    buffer = Buffer(None)
    group = buffer._experts
    gone = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None
    with pytest.raises(ClosedError):
        group.for_shape(group.shape)


def test_a_config_is_taken_and_changes_nothing(buffer):
    x, *_, handle, _ = buffer.dispatch(X, **given(buffer), config=Config(2, 1, 2))
    assert torch.equal(buffer.combine(x, handle, config=Config())[0], X)
