"""The contract suite's jobs on the CUDA backend, on the emulator; see tests/support/emulated_group.py."""

import gc
from typing import Any
from unittest import mock

import pytest
import torch

from support import decode_jobs, throughput_jobs
from support.emulated_group import EmulatedPair
from support.emulator import Emulator
from support.on_device import OnDevice
from tokenferry import MoeShape
from tokenferry.backends.cuda.results import LazyDispatched
from tokenferry.errors import CapacityError, ConfigError, MismatchError, ResourceError, RoutingError
from tokenferry.testing.compare import same_bits
from tokenferry.types import DispatchOptions, Layout, Quantized, Routing

pytestmark = [
    pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing())),
    pytest.mark.usefixtures("both_paths"),
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_round_trips(run, ranks):
    run(ranks, throughput_jobs.round_trips, ranks)


@pytest.mark.parametrize("ranks", [2])
def test_the_rest_of_the_throughput_calls(run, ranks):
    run(ranks, throughput_jobs.quantized_rows, ranks)
    run(ranks, throughput_jobs.overflow, ranks)
    run(3, throughput_jobs.plans_in_other_views)
    run(3, throughput_jobs.many_plans)
    run(2, throughput_jobs.rows_that_begin_anywhere)


def test_decode_rounds(run):
    run(2, decode_jobs.rounds, 2)
    decode_jobs.check_counters(run(3, decode_jobs.counters, 3))


def test_decode_plans_in_other_views(run):
    run(3, decode_jobs.plans_in_other_views)


def test_decode_hooks(run):
    run(3, decode_jobs.hooks_in_any_order, 3)


def test_ranks_need_not_agree_on_hooks(run):
    run(3, decode_jobs.hooks_of_some_ranks, 3)


def test_decode_encodings(run):
    run(2, decode_jobs.encodings, 2)
    run(2, decode_jobs.not_finite)
    run(3, decode_jobs.masked_encodings)


SHAPE = MoeShape(4, 2, 16, 8)


def one_errs(rank: int, pg: None, pair: EmulatedPair) -> None:
    """A bad index stops the rank that has it; the others wait for its next call."""
    with pair.open(pg, SHAPE) as group:
        x, good = torch.ones(3, 16), torch.tensor([[0, 3], [1, 2], [2, -1]])
        if rank == 1:
            bad = good.clone()
            bad[2, 1] = 4
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4"):
                group.dispatch(x, Routing(bad))
            group.dispatch(x, Routing(bad), options=DispatchOptions(counts="device"))
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4"):
                group.synchronize()
        sent = group.dispatch(x, Routing(good))
        assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [2.0, 2.0, 1.0]


def test_bad_routing(run):
    run(2, one_errs)


def errors_keep_no_memory(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        heap, x, good = group._backend.context.heap, torch.ones(3, 16), torch.tensor([[0, 3], [1, 2], [2, -1]])
        for _ in range(2):
            num_live = heap.num_live
            with pytest.raises(CapacityError):
                group.dispatch(x, Routing(good), options=DispatchOptions(counts="device", capacity=1))
            assert heap.num_live == num_live
            if rank == 0:  # nothing is sent
                with pytest.raises(RoutingError):
                    group.dispatch(x, Routing(good + 4))
            assert heap.num_live == num_live
            pair.barrier()


@pytest.mark.parametrize("per_node", [2, 1])
def test_errors_keep_no_memory(run, per_node):
    """An error's traceback has the frames of its call. When the program drops the error, these go at once."""
    gc.disable()
    try:
        run(2, errors_keep_no_memory, ranks_per_node=per_node)
    finally:
        gc.enable()


def other_call(group: OnDevice, sent: Any, rank: int) -> None:
    if rank:
        group.combine(sent.x, sent.plan)
    else:
        group.redispatch(torch.ones(2, 16), sent.plan)
    group.synchronize()


def other_calls(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        sent = group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]])))
        with pytest.raises(MismatchError, match="different calls"):
            other_call(group, sent, rank)
        assert group._backend.broken


def test_other_calls(run):
    run(2, other_calls)


def odd_views(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Arguments that do not fit a view raise before a kernel runs; the group stays usable."""
    with pair.open(pg, SHAPE) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, -1]]))
        for shape, what in ((MoeShape(8192, 2, 16, 8), "num_experts=8192"), (MoeShape(4, 65, 16, 8), "top_k=65")):
            wide = Routing(torch.full((2, shape.top_k), -1))
            with pytest.raises(ConfigError, match=what):
                group.for_shape(shape).dispatch(x, wide)
        with pytest.raises(CapacityError, match="at most 268435455 are possible"):
            group.for_shape(MoeShape(4, 2, 16, 1 << 28)).dispatch(x, routing, options=DispatchOptions(Layout.MASKED))
        scale = torch.arange(12, dtype=torch.float64).reshape(3, 2, 2).to(torch.complex128)[:, :, 0].T  # strided
        sent = group.dispatch(Quantized(x, scale), routing)
        same_bits("wide scales", torch.view_as_real(sent.x.scale[:1]), torch.view_as_real(scale.contiguous()[:1]))


def test_odd_views_and_wide_scales(run):
    run(2, odd_views)


def close_after_decoding(rank: int, pg: None, pair: EmulatedPair) -> None:
    """A group that is closed has no block of the window, which can be freed although the group is still referenced."""
    with pair.open(pg, SHAPE) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2))
        got = group.decode_dispatch(x, routing, return_hook=True)
        got.hook()
        group.decode_combine(got.x, got.plan)
        assert group._backend.context.heap.num_live > 0
        del got
        pair.barrier()
    assert group._backend.context.heap.num_live == 0


def test_a_closed_group_holds_no_memory(run):
    run(2, close_after_decoding)


def use_up_memory(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Before anything is sent, the group stays usable; afterwards it is broken."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none.")
    with pair.open(pg, SHAPE) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]))
        pair.barrier()
        if rank == 1:
            with (
                mock.patch.object(group._backend.dispatcher, "_recv", side_effect=full),
                pytest.raises(
                    ResourceError, match=r"^dispatch: rank 1 \(nothing was sent\): memory of the GPU refused"
                ),
            ):
                group.dispatch(x, routing)
        sent = group.dispatch(x, routing)
        allocator = group._backend.allocator
        if rank == 1:
            copied_out = lambda call, num_bytes: (allocator.call_block(call, num_bytes), True)  # noqa: E731
            with (
                mock.patch.object(allocator, "recv_block", copied_out),
                mock.patch.object(LazyDispatched, "leave_block", side_effect=full),
                pytest.raises(ResourceError, match=r"rank 1 \(the group is broken\): memory of the GPU .*empty_cache"),
            ):
                group.redispatch(x, sent.plan)
            assert "OutOfMemoryError" in group._backend.broken
        else:
            group.redispatch(x, sent.plan)


def test_memory_that_runs_out(run):
    run(2, use_up_memory)
