"""Dispatches without M on the host: what is launched before it waits, and how many rows it guesses."""

from unittest import mock

import pytest
import torch

from support.silent_kernels import NUM_RANKS, SENT_TO_EACH, CountedCalls, SilentGroup, rows_of
from tokenferry import ambient
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.guess import RowGuess
from tokenferry.backends.cuda.signature import Signature
from tokenferry.compat.deep_ep.throughput import ANY_NUM_TOKENS
from tokenferry.errors import CapacityError
from tokenferry.kernels.control_block import Fault
from tokenferry.types import DispatchOptions, Layout, MoeShape, Routing

SHAPE = MoeShape(4, 2, 256, ANY_NUM_TOKENS)
CAPACITY_FIELD = 7
"""Of the signature of a dispatch."""
THREE = ["dispatch_notify", "dispatch_assign", "dispatch"]


class Silent(SilentGroup):
    """A group whose waits for counts are noted between the launches."""

    def __init__(self, *, fast_path: bool = True) -> None:
        super().__init__(MoeShape(4, 2, 256, 8), fast_path=fast_path)
        self.view = self.group.for_shape(SHAPE)
        pinned = self.group._backend.context.pinned
        wait = pinned.wait_for_call_number

        def waiting(*args: object) -> bool:
            self.launches.append(("wait", 0, 0, 0, {}))
            return wait(*args)

        pinned.wait_for_call_number = waiting

    def dispatch(self, num_tokens: int = 6) -> list[str]:
        """Dispatch, and return what was launched, with "wait" where the host waits first."""
        self.launches.clear()
        self.sent = self.view.dispatch(rows_of(num_tokens, 256), routing(num_tokens))
        names = [launch[0] for launch in self.launches]
        return names[: len(names) - names[::-1].index("wait")]


def routing(num_tokens: int) -> Routing:
    return Routing(torch.zeros(num_tokens, 2, dtype=torch.int64))


@pytest.mark.parametrize("fast_path", [True, False])
def test_rows_move_before_the_host_waits(fast_path):
    """But for the first time; the device has all that it needs when the host begins to wait."""
    silent = Silent(fast_path=fast_path)
    first = silent.dispatch()
    assert first[:2] == ["dispatch_notify", "dispatch_assign"]
    assert first.index("wait") == 2
    for num_tokens, launched in ((6, ["dispatch_fused"]), (600, THREE), (0, ["dispatch_fused"])):
        again = silent.dispatch(num_tokens)
        assert again[: again.index("wait")] == launched
        assert silent.sent.x.shape == (NUM_RANKS * SENT_TO_EACH, 256)


def test_the_guess_is_the_limit_of_the_kernels_and_in_the_signature():
    silent = Silent()
    silent.dispatch()
    for num_tokens, name in ((6, "dispatch_fused"), (600, "dispatch_notify")):
        silent.dispatch(num_tokens)
        ((*_, params),) = [launch for launch in silent.launches if launch[0] == name]
        assert params["row_limit"] == 64
        assert params["handshake"][CAPACITY_FIELD] == 64


@pytest.mark.parametrize("options", [DispatchOptions(), DispatchOptions(Layout.EXPERTS)])
def test_results_leave_the_room_that_earlier_ones_took(options):
    """Where no M says how many rows may come; room for the worst case would be most of the heap."""
    silent = Silent()
    allocator, context = silent.group._backend.allocator, silent.group._backend.context
    call, heap = context.begin(Signature("dispatch")), context.heap
    for _ in range(2):
        sent = silent.view.dispatch(rows_of(6, 256), routing(6), options=options)
        few, leaves = allocator.recv_block(call, heap.num_bytes * 3 // 10)
        assert not leaves
        del few, sent


def test_calls_of_torch():
    silent = Silent()
    for _ in range(2):
        silent.dispatch()
    x, where = rows_of(6, 256), routing(6)
    with CountedCalls() as counted, mock.patch.object(ambient, "_num_function_modes", return_value=0):
        silent.view.dispatch(x, where)
    assert counted.names == []


@pytest.mark.parametrize("options", [DispatchOptions(counts="device", capacity=9), DispatchOptions(Layout.EXPERTS)])
def test_other_calls_do_not_guess(options):
    """They have a limit of their own, or need more than the rows of a rank."""
    assert not cuda_plan.geometry(SHAPE, options, 2).guesses
    assert cuda_plan.geometry(SHAPE, DispatchOptions(), 2).guesses
    assert cuda_plan.geometry(SHAPE, DispatchOptions(), 1).guesses
    assert not cuda_plan.geometry(MoeShape(4, 2, 256, 1 << 20), DispatchOptions(), 2).guesses


# ---------------------------------------------------------------------- numbers


def test_a_guess_leaves_a_quarter_and_few_sizes():
    sizes = set()
    for need in range(100_000):
        guess = RowGuess()
        guess.note(need)
        assert guess.num_rows > need * 5 // 4
        assert guess.num_rows <= max(64, need * 5 // 4 * 9 / 8 + 1) + 64
        sizes.add(guess.num_rows)
    assert len(sizes) < 100


def test_a_guess_forgets():
    guess = RowGuess()
    guess.note(10_000)
    large = guess.num_rows
    for _ in range(15):
        guess.note(100)
    assert guess.num_rows == large
    guess.note(100)
    assert guess.num_rows == 128


def test_no_guess_beyond_what_places_can_number():
    geometry = cuda_plan.geometry(SHAPE, DispatchOptions(), 2)
    assert cuda_plan.limited(geometry, 1 << 31).sizes.row_limit == (1 << 31) - 1
    assert cuda_plan.limited(geometry, 100).sizes.row_limit == 100


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("number", [4, 5])
def test_only_rows_of_the_same_call_can_be_sent_again(number):
    """Those of an earlier one, of a CUDA graph with a capacity that a program gave, are an error."""
    context = SilentGroup(MoeShape(4, 2, 256, 8)).group._backend.context
    call = Call(5, 0, False, 3, Signature("dispatch"), 0)
    context.pinned.words[1], context.pinned.words[0] = number, Fault.overflow
    if number == call.number:
        assert not context.wait_for_counts(call, may_overflow=True)
    else:
        with pytest.raises(CapacityError):
            context.wait_for_counts(call, may_overflow=True)
    assert not context.pinned.faulty
    assert not context.broken
