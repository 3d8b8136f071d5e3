"""The judge is judged by hand: small examples whose answers can be read off."""

import pytest
import torch

from tokenferry.testing.cases import ROUTINGS, Case, answers, payload
from tokenferry.testing.compare import close, close_each, same_bits
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast, ue8m0


def example(layout: str, **options) -> Oracle:
    """Two ranks, four experts (0 and 1 on rank 0), two slots."""
    return Oracle(
        [
            Sent(torch.tensor([[1.0], [2.0]]), torch.tensor([[0, 1], [3, 0]]), torch.tensor([[0.5, 0.25], [2.0, 4.0]])),
            Sent(torch.tensor([[3.0], [4.0]]), torch.tensor([[-1, 2], [1, 1]]), torch.tensor([[9.0, 8.0], [0.5, 1.5]])),
        ],
        4,
        layout,
        **options,
    )


def test_rows():
    oracle = example("rows")
    assert oracle.received(0) == [(0, 0), (0, 1), (1, 1)]
    assert oracle.received(1) == [(0, 1), (1, 0)]
    assert oracle.x(0).tolist() == [[1.0], [2.0], [4.0]]
    assert oracle.topk_idx(0).tolist() == [[0, 1], [-1, 0], [1, 1]]
    assert oracle.topk_idx(1).tolist() == [[1, -1], [-1, 0]]
    assert oracle.weights(0).tolist() == [[0.5, 0.25], [0.0, 4.0], [0.5, 1.5]]
    assert oracle.expert_counts(0) == [2, 2]
    assert oracle.expert_counts(1) == [1, 1]


def test_experts_with_alignment():
    oracle = example("experts", alignment=4)
    assert oracle.expert_offsets(0) == [0, 4, 8]
    assert [(row.place, row.src_rank, row.src_token, row.expert) for row in oracle.rows(0)] == [
        (0, 0, 0, 0),
        (1, 0, 1, 0),
        (4, 0, 0, 1),
        (5, 1, 1, 1),
    ]
    assert oracle.num_delivered(0) == 8
    assert oracle.weights(0).tolist() == [0.5, 4.0, 0.25, 2.0]
    assert oracle.row_idx(0).tolist() == [[0, 4], [-1, 1], [5, 5]]


def test_masked_and_decode_ranges():
    oracle = example("masked", capacity=3)
    assert [row.place for row in oracle.rows(0)] == [0, 1, 3, 4]
    assert oracle.decode_ranges(0) == [[(0, 2), (2, 0)], [(0, 1), (1, 1)]]


def test_combine_starts_with_the_bias_and_goes_by_rank():
    oracle = example("rows")
    ys = [torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([[1.0], [2.0]])]
    assert oracle.combine(0, ys).tolist() == [[10.0], [21.0]]
    assert oracle.combine(1, ys, [torch.tensor([[0.5], [0.25]])]).tolist() == [[2.5], [30.25]]
    # 2^24 + 1 = 2^24 in float32: the order can be seen.
    big = [torch.tensor([[0.0], [2.0**24], [0.0]]), torch.tensor([[1.0], [0.0]])]
    assert oracle.combine(0, big, [torch.tensor([[0.0], [1.0]])]).tolist() == [[0.0], [2.0**24]]
    assert oracle.combine(0, big, [torch.tensor([[0.0], [-(2.0**24)]])]).tolist() == [[0.0], [1.0]]


def test_combine_of_experts_adds_a_ranks_rows_first():
    oracle = example("experts")
    ys = [torch.tensor([[1.0], [2.0], [2.0**24], [5.0]]), torch.zeros(2, 1)]
    bias = torch.tensor([[-(2.0**24)], [0.0]])
    # bias + (1 + 2^24) is 0; (bias + 1) + 2^24 would be 1.
    assert oracle.combine(0, ys, [bias]).tolist() == [[0.0], [2.0]]


def test_weights_come_home():
    oracle = example("rows")
    ws = [torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 5.0]]), torch.tensor([[6.0, 0.0], [0.0, 7.0]])]
    assert oracle.combine_weights(0, ws).tolist() == [[1.0, 2.0], [6.0, 3.0]]
    flat = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])]
    assert example("experts").combine_weights(1, flat).tolist() == [[0.0, 5.0], [4.0, 4.0]]


def test_decode_combine_in_slot_order():
    oracle = example("masked", capacity=4)
    ys = [torch.arange(8.0)[:, None], torch.arange(10.0, 18.0)[:, None]]
    exact = oracle.decode_combine(0, ys)
    assert exact.tolist() == [[0.5 * 0 + 0.25 * 4], [2.0 * 14 + 4.0 * 1]]
    assert oracle.decode_combine(0, ys, fast=True).tolist() == exact.tolist()
    assert oracle.decode_combine(1, ys).tolist() == [[8.0 * 10], [0.5 * 5 + 1.5 * 5]]


def test_fp8_scales():
    row = torch.cat([torch.full((128,), 448.0), torch.zeros(128), torch.tensor([-896.0, 1.0])])
    data, scale = fp8_cast(row, power_of_two=False)
    assert scale.tolist() == [1.0, torch.tensor(1e-4).div(448).item(), 2.0]
    assert data[0].float() == 448.0
    assert data[256:].float().tolist() == [-448.0, 0.5]
    _, power = fp8_cast(torch.tensor([449.0, 300.0]), power_of_two=True)
    assert power.tolist() == [2.0]
    assert ue8m0(torch.tensor([1.0, 2.0, 0.5, 4.0, 0.25])).tolist() == [
        127 | 128 << 8 | 126 << 16 | (129 << 24) - (1 << 32),
        125,
    ]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_cases_are_the_same_everywhere_and_of_their_kind(routing):
    case = Case((5, 0, 7), 6, 4, routing=routing)
    inputs, again = case.inputs(), case.inputs()
    for one, other in zip(inputs, again, strict=True):
        same_bits("x", one.x, other.x)
        same_bits("topk_idx", one.topk_idx, other.topk_idx)
        same_bits("topk_weights", one.topk_weights, other.topk_weights)
        assert one.topk_idx.dtype == torch.int64
    chosen = torch.cat([one.topk_idx for one in inputs])
    assert -1 <= int(chosen.min()) <= int(chosen.max()) < 6
    repeats = [len(set(row) - {-1}) < len([e for e in row if e >= 0]) for row in chosen.tolist()]
    kind = {
        "even": bool((chosen >= 0).all()) and not any(repeats),
        "repeated": any(repeats),
        "half_dropped": bool((chosen < 0).any() and (chosen >= 0).any()),
        "one_rank_idle": int(chosen.max()) < 4,
        "all_to_expert_0": bool((chosen == 0).all()),
        "nothing": bool((chosen == -1).all()),
        "own_rank": int(inputs[0].topk_idx.max()) < 2 and set(inputs[2].topk_idx.flatten().tolist()) == {-1, 4, 5},
        "one_token_all": int((chosen >= 0).any(dim=1).sum()) == 2,
    }
    assert kind[routing]


def test_no_two_tokens_look_alike():
    values = payload(torch.arange(300), 16, torch.float64)
    assert len(torch.unique(values)) == values.numel()
    assert not bool((payload(torch.arange(300), 16, torch.bfloat16) == 0).any())


def test_answers_are_nan_where_there_is_no_row():
    case = Case((2, 3), 4, 2)
    oracle = Oracle(case.inputs(), 4, "experts", alignment=8)
    y = answers(case, oracle, 1, oracle.num_delivered(1), torch.float32)
    empty = ~torch.isnan(y).any(dim=1)
    assert int(empty.sum()) == len(oracle.rows(1))


def test_comparisons_see_one_bit():
    a = torch.tensor([[1.0, float("nan")], [0.0, 3.0]])
    same_bits("a", a, a.clone())
    b = a.clone()
    b[1, 0] = -0.0
    with pytest.raises(AssertionError, match=r"a: 1 of 4 values differ, the first at \[1, 0\]: got 0\.0, want -0\.0"):
        same_bits("a", a, b)
    with pytest.raises(AssertionError, match="float64"):
        same_bits("a", a, a.double())
    with pytest.raises(AssertionError, match="shape"):
        same_bits("a", a, a[:1])


def test_comparisons_with_a_tolerance():
    close("a", torch.tensor([1.0]), torch.tensor([1.01]), rtol=0.1, atol=0.0)
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        close("a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), rtol=0.0, atol=0.1)
    with pytest.raises(AssertionError, match="differ"):
        close("a", torch.tensor([float("nan")]), torch.tensor([1.0]), rtol=9.0, atol=9.0)


def test_comparisons_with_a_bound_for_each():
    want = torch.tensor([1.0, float("inf"), float("nan"), 2.0])
    bound = torch.tensor([0.1, float("nan"), float("nan"), 0.0])
    close_each("a", torch.tensor([1.05, float("inf"), float("nan"), 2.0]), want, bound)
    for place, value in enumerate((float("nan"), -float("inf"), 3.0, float("nan"))):
        got = want.clone()
        got[place] = value
        with pytest.raises(AssertionError, match=rf"1 of 4 values differ, the first at \[{place}\]"):
            close_each("a", got, want, bound)
