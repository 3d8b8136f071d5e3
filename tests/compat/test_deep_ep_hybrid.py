"""`HybridEPBuffer` on CPU ranks, against the oracle; what it refuses, on a group of one rank."""

import pytest
import torch

from support import deep_ep_hybrid_jobs as jobs
from tokenferry.compat.deep_ep import HybridEPBuffer
from tokenferry.compat.deep_ep.hybrid_ep_buffer import indices_to_map
from tokenferry.errors import ArgumentError, PlanError, RoutingError, ShapeError


@pytest.mark.parametrize("case", jobs.CASES, ids=str)
def test_round_trips(worlds, case):
    worlds(4).run(jobs.round_trips, case)


@pytest.mark.parametrize("case", jobs.CASES[:2], ids=str)
def test_what_does_not_fit_is_dropped(worlds, case):
    worlds(4).run(jobs.overflows, case)


def test_ranks_tell_each_other_numbers(worlds):
    expected = [[10 * rank, 10 * rank + 1, 7, 2**31 - 1 - rank, 0] for rank in range(4)]
    assert worlds(4).run(jobs.numbers_of_more_ranks, jobs.CASES[0]) == [expected] * 4


def test_rows_with_scales(worlds):
    worlds(4).run(jobs.scales, jobs.CASES[0])


T, H, E = 3, 16, 4
X = torch.arange(T * H).reshape(T, H).bfloat16()
MAP = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
PROBS = torch.rand(T, E)
WEIGHTS = torch.rand(T, 2)
INDEX = torch.tensor([[0, 1], [2, -1], [-1, -1]])


@pytest.fixture
def buffer():
    return HybridEPBuffer(None, hidden_dim=H, max_num_of_tokens_per_rank=T, num_local_experts=E)


def dispatch(buffer, **other):
    return buffer.dispatch_with_permute(**({"hidden": X, "routing_map": MAP, "probs": PROBS} | other))


def check_usable(buffer):
    *_, handle = dispatch(buffer)
    out, probs = buffer.combine_with_unpermute(hidden=torch.ones(3, H), probs=torch.ones(3), handle=handle)
    assert out[:, 0].tolist() == [2.0, 1.0, 0.0]
    assert torch.equal(probs, MAP.float())


BAD_DISPATCH = [
    ({"routing_map": None}, ArgumentError, "expected routing_map, or topk_idx and num_of_experts"),
    ({"routing_map": None, "topk_idx": INDEX}, ArgumentError, "expected routing_map, or topk_idx and num_of_experts"),
    ({"routing_map": MAP.long()}, ShapeError, "routing_map: expected torch.bool"),
    ({"routing_map": MAP[:2]}, ShapeError, "routing_map"),
    ({"probs": PROBS.double()}, ShapeError, "probs: expected torch.float32"),
    ({"probs": PROBS[:, :2].contiguous()}, ShapeError, "probs"),
    ({"num_of_experts_per_rank": 2}, ArgumentError, "num_of_experts_per_rank: expected 4, since 4 experts were given"),
    ({"num_of_experts": 5}, ArgumentError, "num_of_experts: expected 4, since 4 experts were given"),
    ({"topk_weights": WEIGHTS, "probs": None}, ArgumentError, "topk_weights: belong to topk_idx"),
    ({"pad_multiple": -4}, ArgumentError, "pad_multiple: expected an integer of at least 0"),
    ({"non_blocking": True}, ArgumentError, "non_blocking: needs num_permuted_tokens"),
    ({"num_permuted_tokens": 0}, ArgumentError, "num_permuted_tokens: expected an integer of at least 1"),
    ({"hidden": X[0]}, ShapeError, "expected a tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_DISPATCH, ids=lambda v: v if isinstance(v, str) else "")
def test_dispatch_refuses(buffer, change, error, message):
    with pytest.raises(error, match=message):
        dispatch(buffer, **change)
    check_usable(buffer)


BAD_CACHED = [
    ({"routing_map": MAP}, ArgumentError, "routing_map: expected None, since handle has the routing"),
    ({"topk_idx": INDEX}, ArgumentError, "topk_idx: expected None, since handle has the routing"),
    ({"hidden": X[:2]}, ArgumentError, "hidden: expected 3 rows, as in the dispatch that made handle, got 2"),
    ({"num_of_experts": 5}, ArgumentError, "num_of_experts: expected 4"),
    ({"num_of_experts_per_rank": 5}, ArgumentError, "num_of_experts_per_rank: expected 4"),
    ({"pad_multiple": 2}, ArgumentError, "pad_multiple: expected 1, as in the dispatch that made handle, got 2"),
    ({"num_permuted_tokens": 4}, ArgumentError, "num_permuted_tokens: expected None or 3, as in handle, got 4"),
    ({"handle": object()}, PlanError, "handle: expected the one that tokenferry's HybridEPBuffer"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CACHED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_cached_dispatch_refuses(buffer, change, error, message):
    *_, handle = dispatch(buffer)
    with pytest.raises(error, match=message):
        buffer.dispatch_with_permute(**({"hidden": X, "handle": handle} | change))
    check_usable(buffer)


def test_combine_refuses(buffer):
    *_, handle = dispatch(buffer)
    for change, error, message in (
        ({"hidden": X[:2]}, ShapeError, "hidden: .* rows=3 was set by the handle"),
        ({"probs": PROBS}, ShapeError, "probs"),
        ({"pad_multiple": 2}, ArgumentError, "pad_multiple"),
        ({"handle": None}, PlanError, "handle: expected the one"),
    ):
        with pytest.raises(error, match=message):
            buffer.combine_with_unpermute(**({"hidden": X, "handle": handle} | change))
    check_usable(buffer)


def test_a_handle_knows_its_padding(buffer):
    """torchtitan pads in dispatch and names no multiple in combine."""
    rows, _, _, counts, handle = dispatch(buffer, pad_multiple=4)
    assert (rows.shape[0], counts.tolist()) == (12, [4, 4, 4, 0])
    out, _ = buffer.combine_with_unpermute(hidden=torch.ones(12, H), handle=handle)
    assert out[:, 0].tolist() == [2.0, 1.0, 0.0]
    assert torch.equal(buffer.dispatch_with_permute(hidden=X, handle=handle)[0], rows)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_choices_become_a_map(dtype):
    weights = WEIGHTS.clone().requires_grad_()
    chosen, probs = indices_to_map(INDEX.to(dtype), weights, T, E)
    assert torch.equal(chosen, MAP)
    want = torch.zeros(T, E)
    want[0, 0], want[0, 1], want[1, 2] = WEIGHTS[0, 0], WEIGHTS[0, 1], WEIGHTS[1, 0]
    assert torch.equal(probs, want)
    probs.sum().backward()
    assert torch.equal(weights.grad, (INDEX >= 0).float())
    assert indices_to_map(INDEX, None, T, E)[1] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_idx": [[0]]}, ShapeError, "topk_idx: expected torch.int64"),
        ({"topk_idx": INDEX.float()}, ShapeError, "topk_idx: expected torch.int64"),
        ({"topk_idx": INDEX + 2}, RoutingError, "topk_idx"),
        ({"topk_weights": WEIGHTS.double()}, ShapeError, "topk_weights: expected torch.float32"),
        ({"num_of_tokens": 4}, ShapeError, "topk_idx"),
        ({"num_of_experts": 0}, ArgumentError, "num_of_experts: expected an integer of at least 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_map_refuses(change, error, message):
    given = {"topk_idx": INDEX, "topk_weights": WEIGHTS, "num_of_tokens": T, "num_of_experts": E}
    with pytest.raises(error, match=f"indices_to_map: {message}"):
        indices_to_map(**(given | change))


def test_the_constructor():
    with pytest.raises(ArgumentError, match="HybridEPBuffer: hidden_dim: expected an integer of at least 1, got 0"):
        HybridEPBuffer(None, 0, T, E)
    with pytest.raises(ArgumentError, match="HybridEPBuffer: num_sms_dispatch_api"):
        HybridEPBuffer(None, H, T, E, num_sms_dispatch_api=0)
    made = HybridEPBuffer(None, H, T, E)
    sizes = (made.config.hidden_dim, made.config.max_num_of_tokens_per_rank, made.config.num_of_experts_per_rank)
    assert (made.group, made.rank, made.group_size, sizes) == (None, 0, 1, (H, T, E))
    assert made.configurer.buffer_config is made.config
