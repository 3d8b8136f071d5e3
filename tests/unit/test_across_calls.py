"""What the host does in calls across nodes, over kernels and a network that take no time: counts, not times."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from support.silent_kernels import SilentGroup, comparable, counted_calls, num_python_calls, rows_of
from support.silent_nodes import SilentNodes
from tokenferry import tuning
from tokenferry.api import ExpertGroup
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across.backend import AcrossBackend
from tokenferry.backends.cuda.across.contents import HEADER_BYTES
from tokenferry.backends.cuda.across.nccl_rails import NcclTransfer
from tokenferry.backends.cuda.context import Context, LaunchTemplate
from tokenferry.compat.deep_ep.throughput import layout_of
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import PeerTimeout
from tokenferry.types import DecodeStats, DispatchOptions, Layout, MoeShape, Quantized, Routing, Scale

T, K, E, H = 6, 2, 4, 256
DISPATCH_STATS = DecodeStats(
    torch.zeros(E // 2, dtype=torch.int32, device="cpu"), torch.zeros(2, dtype=torch.int64, device="cpu")
)
COMBINE_STATS = DecodeStats(None, DISPATCH_STATS.wait_ns)


@pytest.fixture
def silent() -> SilentNodes:
    return SilentNodes(MoeShape(E, K, H, 8))


def routing(num_tokens: int = T) -> Routing:
    index = torch.arange(num_tokens * K, dtype=torch.int64, device="cpu").view(num_tokens, K) % E
    return Routing(index, torch.ones(num_tokens, K, dtype=torch.float32, device="cpu"))


def calls_of(silent: SilentNodes) -> dict:
    group, x, where = silent.group, rows_of(T, H), routing()
    sent = group.dispatch(x, where)
    y = group.empty_rows(sent.plan)
    on_device = DispatchOptions(counts="device")
    return {
        "dispatch": lambda: group.dispatch(x, where),
        "dispatch, counts on the device": lambda: group.dispatch(x, where, options=on_device),
        "redispatch": lambda: group.redispatch(x, sent.plan),
        "combine": lambda: group.combine(y, sent.plan),
        "combine, weights": lambda: group.combine(y, sent.plan, topk_weights=sent.topk_weights),
        "combine, bias": lambda: group.combine(y, sent.plan, bias=x),
        "combine, out": lambda: group.combine(y, sent.plan, out=x),
    }


def decode_calls_of(silent: SilentNodes) -> dict:
    group, x, where = silent.group, rows_of(T, H), routing()
    sent = group.decode_dispatch(x, where)
    y = torch.ones(sent.x.shape, dtype=torch.bfloat16, device="cpu")
    return {
        "decode_dispatch": lambda: group.decode_dispatch(x, where),
        "decode_combine, exact": lambda: group.decode_combine(y, sent.plan),
        "decode_combine, fast": lambda: group.decode_combine(y, sent.plan, numerics="fast"),
        "decode_dispatch, stats": lambda: group.decode_dispatch(x, where, stats=DISPATCH_STATS),
        "decode_combine, stats": lambda: group.decode_combine(y, sent.plan, stats=COMBINE_STATS),
    }


NEW_TENSORS = {
    "dispatch": 4,
    "dispatch, counts on the device": 4,
    "redispatch": 1,
    "combine": 2,
    "combine, weights": 3,
    "combine, bias": 2,
    "combine, out": 1,
    "decode_dispatch": 3,
    "decode_dispatch, stats": 3,
    "decode_combine, exact": 2,
    "decode_combine, fast": 2,
    "decode_combine, stats": 2,
}
UNSEEN = {"_set_grad_enabled", "__len__", "untyped_storage", "contiguous", "part"}
"""Of the guards around a call, and of the way in which tensors are made."""


@pytest.mark.parametrize("calls", [calls_of, decode_calls_of])
def test_torch_calls(silent, calls):
    """Calls of torch make memory, and do nothing else."""
    with SilentGroup.workspaces_agree():
        for name, call in calls(silent).items():
            call()
            with counted_calls(silent.group) as names:
                call()
            assert [each for each in names if each not in UNSEEN] == ["new"] * NEW_TENSORS[name], name


PYTHON_CALLS = {
    "dispatch": 101,
    "dispatch, counts on the device": 77,
    "redispatch": 43,
    "combine": 41,
    "combine, weights": 46,
    "combine, bias": 45,
    "combine, out": 45,
    "decode_dispatch": 37,
    "decode_dispatch, stats": 42,
    "decode_combine, exact": 51,
    "decode_combine, fast": 40,
    "decode_combine, stats": 56,
}


@pytest.mark.parametrize("calls", [calls_of, decode_calls_of])
def test_functions_of_python(silent, calls):
    """How many run in a call, which is where its time goes: a dispatch of one node takes 50, a decode dispatch 21."""
    with SilentGroup.workspaces_agree():
        found = {name: num_python_calls(call) for name, call in calls(silent).items()}
    assert {name: num for name, num in found.items() if num > PYTHON_CALLS[name]} == {}


def test_a_layout_is_one_kernel(silent):
    """Of the DeepEP API, with the tokens of nodes."""
    views = Views(silent.group)
    views.on_gpu = True
    index = routing().topk_idx
    layout_of(views, index, E, "layout")
    silent.launches.clear()
    with counted_calls(silent.group) as names:
        layout = layout_of(views, index, E, "layout")
    assert [launch[0] for launch in silent.launches] == ["dispatch_layout"]
    assert silent.launches[0][-1]["num_nodes"] == 2
    assert names == ["new", "new", "part", "part", "part"]
    parts = (layout.per_rank, layout.per_expert, layout.per_node)
    start = layout.per_rank.data_ptr()
    assert [(part.shape, (part.data_ptr() - start) // 4) for part in parts] == [((2,), 0), ((E,), 2), ((2,), 2 + E)]


SHORT = {
    "dispatch": (["split", "rails", "pack", "relay", "notify", "assign", "", "check", ""], 2, 3),
    "redispatch": (["open", "pack", "", "check", ""], 1, 0),
    "combine": (["open", "push", "push", "check", "nodes"], 1, 0),
}
"""Launches, exchanges, and waits of the host."""
NAMES = {
    "": "dispatch",
    "check": "across_check",
    "open": "across_open",
    "push": "combine_push",
    "nodes": "combine_nodes",
}


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """List the waits of the host for the device."""
    waits = ((Context, "wait_for_words"), (Context, "wait_for_counts"), (NcclTransfer, "wait"))
    names: list[str] = []

    def noted(of: type, name: str):
        wait = getattr(of, name)

        def run(*args: object, **kwargs: object) -> object:
            names.append(name)
            return wait(*args, **kwargs)

        return mock.patch.object(of, name, run)

    with noted(*waits[0]), noted(*waits[1]), noted(*waits[2]):
        yield names


@pytest.mark.parametrize("most", [8, 1 << 18])
def test_launches_exchanges_and_waits(most):
    """Few tokens cross at once, whatever M is. The routing of very many could not cross with the headers."""
    group = SilentNodes(MoeShape(E, K, H, most))
    assert (group.group._backend._crossing.chunks(2 * H).num > 1) == (most > 8)
    for name, call in calls_of(group).items():
        if name in SHORT:
            launches, num_exchanges, num_waits = SHORT[name]
            later = most > 8 and name == "dispatch"
            group.launches.clear()
            group.channel.exchanges.clear()
            with counted_waits() as waits:
                call()
            expected = [NAMES.get(short, f"dispatch_{short}") for short in launches]
            assert [launch[0] for launch in group.launches] == expected, name
            assert len(group.channel.exchanges) == num_exchanges + later, name
            assert len(waits) == num_waits, name


def test_sums_are_added_up_chunk_by_chunk(monkeypatch):
    """And calls are compared first: where they are different calls, the later exchanges may never end."""
    monkeypatch.setattr(tuning, "rail_chunks", lambda num, *_: tuple(range(num)))  # each of one token
    silent = SilentNodes(MoeShape(E, K, H, 8))
    combine, joins = calls_of(silent)["combine"], []
    combine()

    def join(transfer: NcclTransfer) -> None:
        launched = [launch[0] for launch in silent.launches]
        joins.append((launched.count("across_check"), launched.count("combine_nodes")))

    silent.launches.clear()
    with mock.patch.object(NcclTransfer, "join", join):
        combine()
    assert [launch[0] for launch in silent.launches][-3:] == ["combine_nodes", "across_check", "combine_nodes"]
    assert joins == [(0, 0)] + [(1, number) for number in range(1, T)]
    sums = [launch[-1] for launch in silent.launches if launch[0] == "combine_nodes"]
    start = sums[0]["slots"], sums[0]["out"]
    assert [(each["num_tokens"], each["slots"] - start[0], each["out"] - start[1]) for each in sums] == [
        (1, 4 * 2 * token, 2 * H * token) for token in range(T)
    ]


PARCELS = {
    "rows": (rows_of(T, H), T * 2 * H),
    "rows and scales": (Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(T, 4)), T * (H + 4 * 4)),
    "scales of odd sizes": (
        Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(T, 3, dtype=torch.uint8)),
        T * (H + 3) + -T * 3 % 4,
    ),
}
STATE = 8


@pytest.mark.parametrize("x", PARCELS)
def test_a_chunk_is_one_operation_each_way(silent, x):
    """Rows, scales and weights, and a routing; the state of the sender is another one, as is what a call says first."""
    group, (rows, row_bytes), weight_bytes = silent.group, PARCELS[x], T * 4 * K
    exchanges, most = silent.channel.exchanges, 8
    sent = group.dispatch(rows, routing())
    assert exchanges[-2] == ({1: [HEADER_BYTES, most * (2 * K + 4)]},) * 2
    assert exchanges[-1] == ({1: [row_bytes + weight_bytes, STATE]},) * 2
    weights = torch.ones(T, K, dtype=torch.float32)
    group.redispatch(rows, sent.plan, topk_weights=weights)
    assert exchanges[-1] == ({1: [HEADER_BYTES, row_bytes + weight_bytes, STATE]},) * 2
    y = group.empty_rows(sent.plan, torch.bfloat16)
    group.combine(y, sent.plan, topk_weights=sent.topk_weights)
    assert exchanges[-1] == ({1: [HEADER_BYTES, T * 2 * H + weight_bytes, STATE]},) * 2


# ---------------------------------------------------------------------- the fast path


OPTIONS = {
    "rows": DispatchOptions(),
    "rows, device": DispatchOptions(counts="device"),
    "experts": DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True),
    "experts, device": DispatchOptions(Layout.EXPERTS, counts="device"),
    "masked": DispatchOptions(Layout.MASKED, capacity=40),
    "masked, device": DispatchOptions(Layout.MASKED, counts="device"),
}
PAYLOADS = {
    "bfloat16": rows_of(T, H),
    "scales by row": Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(T, 4, dtype=torch.float32)),
    "scales by column": Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(3, T, dtype=torch.float32).T),
}


def rounds(group: ExpertGroup, x: Tensor | Quantized, options: DispatchOptions, *, weighted: bool) -> None:
    """Calls of each form."""
    for num_sms in (None, 5):
        weights = torch.ones(T, K, dtype=torch.float32) if weighted else None
        sent = group.dispatch(x, Routing(routing().topk_idx, weights), options=options, num_sms=num_sms)
        again = group.redispatch(x, sent.plan, topk_weights=weights, num_sms=num_sms)
        assert again.plan is sent.plan
        y = group.empty_rows(sent.plan, torch.bfloat16)
        group.combine(y, sent.plan, topk_weights=sent.topk_weights, num_sms=num_sms)
        group.combine(y.clone(), sent.plan, num_sms=num_sms)
        bias, out = rows_of(T, H), rows_of(T, H)
        for biases, target in ((bias, None), ((bias, out), None), (None, out), ((bias,), out)):
            done = group.combine(y, sent.plan, bias=biases, out=target, num_sms=num_sms)
            assert target is None or done.x is target


@pytest.mark.parametrize(("options", "most"), [*((name, 8) for name in OPTIONS), ("rows", 1 << 15)])
@pytest.mark.parametrize("x", PAYLOADS)
def test_both_paths_launch_and_exchange_the_same(x, options, most):
    """Of both paths the second time, when the fast one knows each form."""
    found = []
    for fast_path in (False, True):
        silent = SilentNodes(MoeShape(E, K, H, most), fast_path=fast_path)
        for weighted in (True, False):
            rounds(silent.group, PAYLOADS[x], OPTIONS[options], weighted=weighted)
        silent.launches.clear()
        silent.channel.exchanges.clear()
        with mock.patch.object(AcrossBackend, "_explained", wraps=silent.group._backend._explained) as general:
            for weighted in (True, False):
                rounds(silent.group, PAYLOADS[x], OPTIONS[options], weighted=weighted)
        assert general.call_count == (0 if fast_path else 2 * 2 * 8)
        found.append(([comparable(launch) for launch in silent.launches], silent.channel.exchanges))
    assert found[0] == found[1]
    assert len(found[0][0]) > 0


def decode_rounds(group: ExpertGroup, kind: tuple, *, hooked: bool) -> None:
    """Decode calls of each form."""
    x, (quantize, numerics, encoding) = rows_of(T, H), kind
    y, out = torch.ones(E // 2, 16, H, dtype=torch.bfloat16), torch.empty(T, H, dtype=torch.bfloat16)
    for dtype in (torch.int64, torch.int32):
        index = routing().topk_idx.to(dtype)
        group.decode_dispatch(x, Routing(index), return_hook=hooked).hook()
        sent = group.decode_dispatch(x, Routing(index, torch.ones(T, K)), quantize=quantize, return_hook=hooked)
        sent.hook()
        assert sent.expert_counts.shape == (E // 2,)
        group.decode_dispatch(x, Routing(index), stats=DISPATCH_STATS, return_hook=hooked).hook()
        for target, stats in ((None, None), (out, None), (None, COMBINE_STATS)):
            done = group.decode_combine(
                y, sent.plan, numerics=numerics, encoding=encoding, out=target, stats=stats, return_hook=hooked
            )
            done.hook()
            assert target is None or done.x is target


@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "kind", [(None, "exact", "same"), (Scale.FLOAT32, "fast", "same"), (Scale.UE8M0, "exact", "fp8")]
)
def test_both_paths_launch_and_exchange_the_same_in_decode_calls(kind, hooked, puts):
    """Of both paths the second time; where messages are put, kernels are told that ranks may be masked meanwhile."""
    found = []
    for fast_path in (False, True):
        silent = SilentNodes(MoeShape(E, K, H, 8), fast_path=fast_path, puts=puts)
        with SilentGroup.workspaces_agree():
            decode_rounds(silent.group, kind, hooked=hooked)
            silent.launches.clear()
            silent.channel.exchanges.clear()
            with mock.patch.object(AcrossBackend, "_explained", wraps=silent.group._backend._explained) as general:
                decode_rounds(silent.group, kind, hooked=hooked)
        assert general.call_count == (0 if fast_path else 12)
        found.append(([comparable(launch) for launch in silent.launches], silent.channel.exchanges))
    assert found[0] == found[1]
    assert len(found[0][0]) > 0
    assert ("rail_send" in {launch[0] for launch in found[0][0]}) == puts == (not found[0][1])


@pytest.mark.parametrize("name", ["dispatch", "decode_dispatch", "decode_combine, exact"])
def test_the_fast_path_leaves_alone_what_has_to_be_done_first(silent, name):
    """The error of an exchange that did not end is raised, and an open hook is called, by the general path."""
    backend = silent.group._backend
    with SilentGroup.workspaces_agree():
        call = (calls_of(silent) | decode_calls_of(silent))[name]
        call()
        with mock.patch.object(backend, "_explained", wraps=backend._explained) as general:
            call()
            assert general.call_count == 0
            silent.launches.clear()
            silent.group.decode_dispatch(rows_of(T, H), routing(), return_hook=True)
            assert "decode_dispatch_across" not in [launch[0] for launch in silent.launches]
            call()
            assert "decode_dispatch_across" in [launch[0] for launch in silent.launches]
            assert general.call_count == 1
            call()
            assert general.call_count == 1
            backend._rails.lost = PeerTimeout("late", phase="dispatch", call=1, rank=0, peers=(1,), waited_s=1.0)
            with pytest.raises(PeerTimeout) as caught:
                call()
            assert str(caught.value) == str(backend._rails.lost)


MASKS = {
    "by hand": lambda silent: silent.group.mask(1),
    "late": lambda silent: silent.group._backend._puts.lost.__setitem__(1, 1),
}


@pytest.mark.parametrize("mask", MASKS)
def test_both_paths_launch_the_same_without_masked_ranks(mask):
    """By hand, or by a kernel whose wait for the rail peer took too long."""
    found = []
    for fast_path in (False, True):
        silent = SilentNodes(MoeShape(E, K, H, 8), fast_path=fast_path, puts=True)
        kind = (None, "exact", "same")
        with SilentGroup.workspaces_agree():
            decode_rounds(silent.group, kind, hooked=False)
            MASKS[mask](silent)
            silent.launches.clear()
            sent = silent.group.decode_dispatch(rows_of(T, H), routing())
            with mock.patch.object(AcrossBackend, "_explained", wraps=silent.group._backend._explained) as general:
                decode_rounds(silent.group, kind, hooked=False)
        assert general.call_count == (0 if fast_path else 12)
        assert sent.plan.topk_idx.tolist() == [[0, 1], [-1, -1]] * 3
        found.append([comparable(launch) for launch in silent.launches])
    assert found[0] == found[1]


def test_errors_of_the_fast_path_name_the_ranks_at_fault(silent):
    """As those of the general path do."""
    backend, error = silent.group._backend, RuntimeError("of a launch")
    with SilentGroup.workspaces_agree():
        for call in (calls_of(silent) | decode_calls_of(silent)).values():
            call()
            with (
                mock.patch.object(LaunchTemplate, "launch", side_effect=error),
                mock.patch.object(silent.group._fast_path, "_explain", side_effect=KeyError) as explain,
                pytest.raises(KeyError),
            ):
                call()
            explain.assert_called_once_with(error)
            backend.context.broken = None


def test_plans_are_no_inference_tensors(silent):
    """Whatever the mode of the call that made them."""
    calls_of(silent)["dispatch"]()
    with torch.inference_mode():
        plan = silent.group.dispatch(rows_of(T, H), routing()).plan
        assert not plan.dst_counts.is_inference()
        assert not plan.src_counts.is_inference()


def test_an_interrupt_of_the_wait_for_counts_breaks_the_group(silent, monkeypatch):
    """Headers and routing have crossed by then, and peers wait for the rows of this rank."""

    def interrupted(*_):
        raise KeyboardInterrupt

    group = silent.group
    monkeypatch.setattr(cuda_plan, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        group.dispatch(rows_of(T, H), routing())
    assert "KeyboardInterrupt" in group._backend.broken
