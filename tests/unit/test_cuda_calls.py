"""State that the CUDA backend keeps from call to call, and shares between results."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.dispatch import Dispatcher
from tokenferry.backends.cuda.faults import FlightRecorder
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import PeerTimeout
from tokenferry.kernels.control_block import FIRST_OFFSET, HANDSHAKE_WORDS, RECV_ROW_IDX_WORD, SIGNATURE_WORDS
from tokenferry.kernels.dispatch import spec
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.types import DispatchOptions, Layout, MoeShape

CPU = torch.device("cpu")


def test_params_belong_to_the_last_call():
    """They are kept; so whatever differs from the call before has to be written again."""
    packer = call_packer(spec.SPEC, "x", "scale", waits=True, last_offset=RECV_ROW_IDX_WORD)
    template = LaunchTemplate(SimpleNamespace(new_params=spec.SPEC.params.struct), packer)
    one, other = Signature("dispatch", hidden=1), Signature("dispatch", hidden=2)
    calls = [(1, one, 0), (2, one, 64), (3, other, 64), (4, one, 0), (5, Signature("dispatch", hidden=2), 0)]
    p = template.params
    p.rank, p.row_bytes = 3, 64
    for number, signature, wait_ns in calls:
        template.pack(wait_ns, 5, number, signature.words, *range(number, number + 6), 10 * number, 20 * number)
        assert (p.call_number, p.alive, p.wait_ns, p.x, p.scale) == (number, 5, wait_ns, 10 * number, 20 * number)
        handshake = memoryview(p.handshake).cast("B").cast("I")
        assert handshake[:SIGNATURE_WORDS].tobytes() == signature.words
        offsets = [0] * (HANDSHAKE_WORDS - SIGNATURE_WORDS)
        first = FIRST_OFFSET - SIGNATURE_WORDS
        offsets[first : first + 6] = range(number, number + 6)
        assert handshake[SIGNATURE_WORDS:].tolist() == offsets
    assert (p.rank, p.row_bytes) == (3, 64)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
def test_parts_of_a_plan_do_not_overlap(layout, num_tokens):
    shape = MoeShape(num_experts=18, top_k=2, hidden=8, max_tokens=512)
    geometry = cuda_plan.geometry(shape, DispatchOptions(layout), 3)
    made = cuda_plan.plan_layout(geometry, 3, num_tokens, 2)
    units = max(num_units(num_tokens), 1)
    sizes = {
        "dst_token": 8 * 2 * num_tokens,
        "dst_counts": 8 * 3,
        "src_counts": 8 * 3,
        "expert_counts": 4 * 6,
        "expert_offsets": 4 * 7 if layout is Layout.EXPERTS else 0,
        "places": 4 * num_tokens * num_columns(layout),
        "table": 4 * units * (18 + 3),
        "bases": 4 * (2 * 3 + 18),
    }
    check_parts(made, sizes, made.num_bytes)
    came = cuda_plan.arrivals(geometry, 77, 2, torch.int32)
    row_idx = 0 if layout is Layout.ROWS else 8 * 77 * 2
    check_parts(came, {"src_token": 8 * 77, "topk_idx": 4 * 77 * 2, "row_idx": row_idx}, came.num_bytes)


@pytest.mark.parametrize("layout", list(Layout))
def test_parts_of_received_rows_do_not_overlap(layout):
    kind = RowKind(torch.float8_e4m3fn, 48, torch.float32, 3, False, True, torch.int64, 2)
    made = cuda_plan.row_layout(layout, kind, 77)
    weights = 4 * 77 * (2 if layout is Layout.ROWS else 1)
    check_parts(made, {"weights": weights, "scale": 12 * 77, "rows": 48 * 77}, made.num_bytes)


def check_parts(layout, sizes, num_bytes):
    spans = sorted((getattr(layout, name), getattr(layout, name) + size) for name, size in sizes.items() if size)
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= num_bytes


@pytest.mark.parametrize(("layout", "most"), [(Layout.ROWS, (1 << 31) - 1), (Layout.EXPERTS, (1 << 28) - 1)])
def test_no_more_rows_than_places_can_number(layout, most):
    """A place is an int32, of EXPERTS with a rank in its upper bits; `dispatch_notify` refuses more rows."""
    geometry = cuda_plan.geometry(MoeShape(8, 8, 8, 1 << 28), DispatchOptions(layout), 1)
    assert geometry.sizes.row_limit == most


def num_columns(layout):
    return (3 + 2) * (1 if layout is Layout.ROWS else 2)


def test_the_host_waits_longer_than_a_kernel_ahead_of_its_call():
    """The kernel's record names the peer; the host only sees a stuck stream. A combine may take two deadlines."""
    waited: list[float] = []
    pinned = SimpleNamespace(wait_for_call_number=lambda _, timeout_s: waited.append(timeout_s))
    recorder = FlightRecorder(1)
    context = SimpleNamespace(timeout_s=5.0, pinned=pinned, flight_recorder=recorder, break_off=lambda _: None)
    call = SimpleNamespace(number=3, signature=SimpleNamespace(phase="dispatch"))
    with pytest.raises(PeerTimeout, match=r"dispatch #3: rank 1 waited 15\.0 s for its own stream"):
        Context.wait_for_counts(context, call)
    assert waited[0] > 2 * context.timeout_s


def test_what_can_be_made_again_is_bounded():
    kept = BoundedDict(2)
    kept["a"], kept["b"] = 1, 2
    kept["b"] = 3
    assert kept == {"a": 1, "b": 3}
    kept["c"] = 4
    assert kept == {"c": 4}


def test_a_form_that_is_not_complete_is_not_kept(monkeypatch):
    """It would be found by the next call, and launched with fields that were never filled in."""

    def interrupt(*_):
        raise KeyboardInterrupt

    context = two_ranks()
    context.heap = SimpleNamespace(num_bytes=1 << 20)
    dispatcher = Dispatcher(context, SimpleNamespace(expect=lambda _: None), "key")
    arguments = (MoeShape(8, 2, 16, 4), DispatchOptions(), KIND, None)
    monkeypatch.setattr(spec, "cut", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dispatcher.form(*arguments)
    monkeypatch.undo()
    form = dispatcher.form(*arguments)
    assert form.move.params.piece_bytes == 64
    assert dispatcher.form(*arguments) is form


def test_a_template_fills_its_fields_by_name():
    template = launch.dispatch_template(two_ranks(), KIND, 4, by_expert=False)
    p = template.params
    assert (p.top_k, p.num_local, p.by_expert, p.row_bytes, p.wide, p.width) == (2, 4, 0, 64, 1, 4)
    template.pack(3, 9, Signature("dispatch").words, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 19)
    assert (p.x, p.scale, p.weights, p.topk_idx, p.places, p.rows_out, p.rows_in) == (10, 11, 12, 13, 14, 15, 16)
    assert (p.scale_row_stride, p.scale_stride, p.tokens, p.num_tokens) == (17, 18, 20, 19)
    assert list(p.handshake)[FIRST_OFFSET : FIRST_OFFSET + 6] == [1, 2, 3, 4, 5, 6]


KIND = RowKind(torch.float32, 16, None, 0, False, True, torch.int64, 2)


def two_ranks():
    """A context whose kernels do nothing."""
    return SimpleNamespace(
        num_ranks=2,
        num_sms=132,
        dynamic_bytes=lambda spec: (227 << 10) - spec.static_smem,
        device=CPU,
        pinned=SimpleNamespace(host_address=0),
        new_template=lambda spec, packer, **_: LaunchTemplate(SimpleNamespace(new_params=spec.params.struct), packer),
    )
