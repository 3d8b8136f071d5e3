"""Single calls of groups on the emulator: mismatches, kept launch params, capacities, and overlapping memory."""

import itertools

import pytest
import torch

from support.bad_calls import BAD, call_badly
from support.emulated_group import HEAP_BYTES, SynchronousKernel
from support.emulator import Emulator
from support.torch_calls import TorchCalls
from tokenferry import MoeShape
from tokenferry.backends.cpu.routing import restricted as on_the_cpu
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.compat.deep_ep import throughput
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import CapacityError, ClosedError, MismatchError
from tokenferry.types import DispatchOptions, Layout, Quantized, Routing

pytestmark = [
    pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing())),
    pytest.mark.usefixtures("both_paths"),
]

SHAPE = MoeShape(4, 2, 16, 8)


# ---------------------------------------------------------------------- what ranks have to agree on


def other_top_k(rank, threads, pair):
    top_k, dtype = ((4, torch.int64), (8, torch.int32))[rank]
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        view = group.for_shape(MoeShape(4, top_k, 16, 8))
        index = torch.arange(2 * top_k, dtype=dtype).reshape(2, top_k) % 4
        with pytest.raises(MismatchError):
            view.dispatch(torch.ones(2, 16), Routing(index))


def test_another_number_of_choices_in_as_many_bytes(run):
    """Four of int64, eight of int32: choices of one rank would be taken for another's."""
    run(2, other_top_k)


def one_weight_or_none(rank, threads, pair):
    with pair.open(None, MoeShape(4, 1, 16, 8), timeout_s=20.0) as group:
        x, index = torch.ones(2, 16), torch.tensor([[0], [2]])
        group.dispatch(x, Routing(index))  # its signature is kept
        weights = torch.full((2, 1), 7.0) if rank == 0 else None
        with pytest.raises(MismatchError):
            group.dispatch(x, Routing(index, weights))


def test_weights_of_one_slot_and_none(run):
    """A column of weights is not the same as no weights: they move with the rows."""
    run(2, one_weight_or_none)


def bad_calls_in_turns(rank, threads, pair):
    # Groups of the emulator are made otherwise, and have one key.
    names = [name for name in BAD if not name.startswith(("a group ", "a transport ")) and "stranger" not in name]
    return call_badly(rank, None, pair, names)


def test_bad_calls_of_one_rank_leave_the_group_usable(run):
    complaints = run(2, bad_calls_in_turns)
    assert complaints == [[], []], "\n".join(complaint for rank in complaints for complaint in rank)


# ---------------------------------------------------------------------- what is kept from call to call


def strided_scales(rank, threads, pair, first_tokens):
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        scale = torch.arange(80.0).reshape(4, 20)[:, :4]
        index = torch.tensor([[0, -1], [1, -1], [0, -1], [1, -1]]) + torch.tensor([2 * rank, 0])
        for tokens in (first_tokens, 4):
            x = Quantized(torch.ones(tokens, 16), scale[:tokens])
            sent = group.dispatch(x, Routing(index[:tokens].contiguous()))
        assert sent.x.scale.equal(scale)


@pytest.mark.parametrize("first_tokens", [0, 1])
def test_scales_in_a_wider_buffer_after_few(run, first_tokens):
    """So few are contiguous whatever their strides; the same strides are not, of more."""
    run(2, strided_scales, first_tokens)


# ---------------------------------------------------------------------- capacities


def larger_than_the_heap(rank, threads, pair):
    """One rank asks for it, then both: the rows of MASKED, or those and the plan, which is made before them."""
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 2], [1, 3]]))
        for num_bytes, ranks in itertools.product((2 * HEAP_BYTES, HEAP_BYTES - 128), ((1,), (0, 1))):
            options = DispatchOptions(Layout.MASKED, capacity=num_bytes // (2 * 16 * 4))
            if rank in ranks:
                with pytest.raises(CapacityError, match="dispatch: the heap is full"):
                    group.dispatch(x, routing, options=options)
            assert group.dispatch(x, routing, options=DispatchOptions(Layout.MASKED)).host_counts == (2, 2)


def test_a_capacity_larger_than_the_heap(run):
    run(2, larger_than_the_heap)


# ---------------------------------------------------------------------- layouts


def count_tokens(rank, threads, pair):
    index = torch.tensor([[0, 2], [3, -1], [1, 1]], dtype=torch.int64)
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        with TorchCalls() as calls:
            layout = group._backend.token_layout(index, 4)
        assert calls.names == []
        assert layout.per_rank.tolist() == [2, 2]
        assert layout.per_expert.tolist() == [1, 1, 1, 1]
        assert layout.in_rank.tolist() == [[True, True], [False, True], [True, False]]
        left_out = torch.tensor([[True, False], [False, True], [False, True]])
        for dtype in (torch.int64, torch.int32):
            given = index.to(dtype)
            with TorchCalls() as calls:
                kept = group._backend.restricted(given, left_out, 4)
            assert calls.names == []
            assert kept.equal(torch.tensor([[0, -1], [3, -1], [-1, -1]], dtype=dtype))
            assert kept.equal(on_the_cpu(given, left_out, 4))


def test_a_layout_takes_one_kernel_and_few_allocations(run, monkeypatch):
    launched = []
    launch = SynchronousKernel.launch

    def counting(kernel, *args):
        launched.append(kernel.spec.name)
        return launch(kernel, *args)

    monkeypatch.setattr(SynchronousKernel, "launch", counting)
    run(2, count_tokens)
    assert sorted(launched) == ["dispatch_layout"] * 2 + ["dispatch_restrict"] * 4


def edited_layout(rank, threads, pair):
    index, weights = torch.tensor([[0, 2], [3, 1]]), torch.tensor([[0.5, 2.0], [4.0, 8.0]])
    x = torch.tensor([[1.0], [2.0]]).repeat(1, 16) + 10 * rank
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        views = Views(group)
        views.on_gpu = True
        layout = throughput.layout_of(views, index, 4, "layout")
        layout.in_rank[0, 1] = layout.in_rank[1, 0] = False
        sent = throughput.dispatch(views, x, Routing(index, weights), layout, throughput.Options())
        got, ids, got_weights, counts, handle = sent
        assert got[:, 0].tolist() == [1 + rank, 11 + rank], "token 0 goes to rank 0 alone, and token 1 to rank 1"
        assert ids.tolist() == ([[0, -1]] * 2, [[1, -1]] * 2)[rank]
        assert got_weights.tolist() == ([[0.5, 0.0]] * 2, [[4.0, 0.0]] * 2)[rank]
        assert counts == ([2, 0], [0, 2])[rank]
        assert throughput.combine(views, got, handle, None, None, None)[0].equal(x)


def test_slots_that_an_edited_layout_leaves_out_are_dropped(run):
    run(2, edited_layout)


# ---------------------------------------------------------------------- aborted calls


def offsets_of_an_aborted_call(rank, threads, pair, fill):
    bad = torch.tensor([[0, 3], [1, 9], [2, 0]])
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        fill(0x3FFFFFFF)
        sent = group.dispatch(torch.ones(3, 16), Routing(bad), options=DispatchOptions(Layout.EXPERTS, counts="device"))
        assert sent.expert_counts.tolist() == [0] * 4
        assert sent.expert_offsets.tolist() == [0] * 5


def test_offsets_of_an_aborted_call(run, monkeypatch):
    """They must be 0: grouped GEMMs that are queued behind it read them."""
    empty, dirt = torch.empty, []

    def dirty(*size, **options):
        made = empty(*size, **options)
        return made.fill_(dirt[0]) if dirt and made.dtype is torch.int32 else made

    monkeypatch.setattr(torch, "empty", dirty)
    run(1, offsets_of_an_aborted_call, dirt.append)


def interrupted(rank, threads, pair, monkeypatch):
    delivery = DispatchOptions(counts="device", capacity=6)  # the host asks whether it was enough before rows move

    def interrupt(*_):
        raise KeyboardInterrupt

    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 1], [2, 3]]))
        with monkeypatch.context() as patch:
            patch.setattr(cuda_plan, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                group.dispatch(x, routing, options=delivery)
        with pytest.raises(ClosedError, match="broken by an earlier KeyboardInterrupt"):
            group.dispatch(x, routing)


def test_an_interrupt_between_counts_and_rows(run, monkeypatch):
    """Peers wait for rows that do not come: this rank's next call is not taken for the one that brings them."""
    run(1, interrupted, monkeypatch)


# ---------------------------------------------------------------------- capacities and memory


def tiny_rows(rank, threads, pair):
    """Rows of 16 bytes: the table of their places is larger than they are."""
    with pair.open(None, MoeShape(64, 32, 4, 130_000)) as group:
        index = torch.full((4, 32), -1)
        index[:, 0] = 0
        sent = group.dispatch(torch.ones(4, 4), Routing(index))
        assert sent.x.shape[0] == (8, 0)[rank]


def test_a_heap_that_holds_the_rows_but_not_the_worst_case(run):
    """The host waits for the counts and allocates what they need instead of raising."""
    run(2, tiny_rows)


def result_in_what_is_given(rank, threads, pair):
    with pair.open(None, MoeShape(4, 1, 64, 64)) as group:
        for n in range(4):
            index = torch.randint(0, 4, (64, 1), generator=torch.Generator().manual_seed(2 * n + rank))
            sent = group.decode_dispatch(torch.randn(64, 64), Routing(index, torch.ones(64, 1)))
            want = group.decode_combine(sent.x.clone(), sent.plan).x
            y = sent.x.clone()
            found = group.decode_combine(y, sent.plan, out=y.view(-1, 64)[:64]).x
            wrong = (found != want).any(dim=1).nonzero().flatten().tolist()
            assert not wrong, f"call {n}: tokens {wrong}"
            assert found.data_ptr() == y.data_ptr()


def test_a_result_that_lies_in_what_is_given(run):
    """Otherwise blocks that receive would overwrite rows that others have yet to send."""
    run(2, result_in_what_is_given)
