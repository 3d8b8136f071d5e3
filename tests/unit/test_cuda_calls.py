"""State that the CUDA backend keeps from call to call, and shares between results."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.dispatch import Dispatcher
from tokenferry.backends.cuda.launch import Payload, RecvBuffers, Route
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import PeerTimeout
from tokenferry.kernels.control_block import FIRST_OFFSET, HANDSHAKE_WORDS, OFFSET_BYTES, SIGNATURE_WORDS
from tokenferry.kernels.dispatch import spec
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.types import DispatchOptions, Layout, MoeShape

CPU = torch.device("cpu")


def test_params_belong_to_the_last_call():
    """They are kept; so whatever differs from the call before has to be written again."""
    template = LaunchTemplate(SimpleNamespace(new_params=spec.SPEC.params.struct))
    one, other = Signature("dispatch", hidden=1), Signature("dispatch", hidden=2)
    calls = [(1, one, 0), (2, one, 64), (3, other, 64), (4, one, 0), (5, Signature("dispatch", hidden=2), 0)]
    for number, signature, wait_ns in calls:
        template.set_call(Call(number, 0, False, 3, signature, wait_ns))
        p = template.params
        assert (p.call_number, p.alive, p.wait_ns) == (number, 3, wait_ns)
        handshake = memoryview(p.handshake).cast("B").cast("I")
        assert handshake[:SIGNATURE_WORDS].tobytes() == signature.words
        assert len(handshake) == HANDSHAKE_WORDS


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
def test_tables_do_not_overlap(layout, num_tokens):
    shape = MoeShape(num_experts=18, top_k=2, hidden=8, max_tokens=512)
    geometry = cuda_plan.geometry(shape, DispatchOptions(layout), 3)
    context = SimpleNamespace(num_ranks=3, device=CPU)
    tables = cuda_plan.new_tables(context, geometry, torch.zeros(num_tokens, 2, dtype=torch.int64))
    route = tables.route
    shown = [route.dst_counts, route.src_counts, tables.dst_token, tables.expert_counts, route.places]
    assert [tuple(one.shape) for one in shown] == [
        (3,),
        (3,),
        (num_tokens * 2,),
        (6,),
        (num_tokens, num_columns(layout)),
    ]
    assert (tables.expert_offsets is None) == (layout is not Layout.EXPERTS)
    if tables.expert_offsets is not None:
        assert tables.expert_offsets.shape == (7,)
        shown.append(tables.expert_offsets)
    spans = [(one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in shown]
    words = max(num_units(num_tokens), 1) * (18 + 3)
    spans += [(tables.table, tables.table + 4 * words), (tables.bases, tables.bases + 4 * (2 * 3 + 18))]
    assert all(one.is_contiguous() for one in shown)
    assert all(start % one.element_size() == 0 for (start, _), one in zip(spans, shown, strict=False))
    spans = sorted(span for span in spans if span[0] != span[1])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    storage = route.places.untyped_storage()
    assert storage.data_ptr() <= tables.table
    assert tables.bases + 4 * (2 * 3 + 18) <= storage.data_ptr() + storage.nbytes(), (
        "they live as long as the plan's tensors"
    )


@pytest.mark.parametrize(("layout", "most"), [(Layout.ROWS, (1 << 31) - 1), (Layout.EXPERTS, (1 << 28) - 1)])
def test_no_more_rows_than_places_can_number(layout, most):
    """A place is an int32, of EXPERTS with a rank in its upper bits; `dispatch_notify` refuses more rows."""
    geometry = cuda_plan.geometry(MoeShape(8, 8, 8, 1 << 28), DispatchOptions(layout), 1)
    assert geometry.sizes.row_limit == most


def num_columns(layout):
    return (3 + 2) * (1 if layout is Layout.ROWS else 2)


def test_a_plan_made_in_inference_mode_can_be_saved_for_a_backward():
    """This is about the tensor that all plans share."""
    dispatcher = Dispatcher(SimpleNamespace(device=CPU), None, "key")
    with torch.inference_mode():
        shared = dispatcher._empty_row_idx(4)
    assert not shared.is_inference()
    assert shared.shape == (0, 4)
    assert dispatcher._no_row_idx[4] is shared


def test_the_host_waits_longer_than_a_kernel_ahead_of_its_call():
    """The kernel's record names the peer; the host only sees a stuck stream. A combine may take two deadlines."""
    waited: list[float] = []
    pinned = SimpleNamespace(wait_for_call_number=lambda _, timeout_s: waited.append(timeout_s))
    context = SimpleNamespace(timeout_s=5.0, rank=1, pinned=pinned, break_off=lambda _: None)
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


def test_a_template_that_is_not_complete_is_not_kept(monkeypatch):
    """It would be found by the next call, and launched with fields that were never filled in."""

    def interrupt(*_):
        raise KeyboardInterrupt

    context = one_rank()
    monkeypatch.setattr(spec, "cut", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch_dispatch(context)
    assert context.templates == {}
    monkeypatch.undo()
    launch_dispatch(context)
    (template,) = context.templates.values()
    assert context.launched == [template.kernel]


def test_a_launch_fills_its_fields_by_name():
    context = one_rank()
    payload, route, buffers = launch_dispatch(context)
    (template,) = context.templates.values()
    p = template.params
    assert (p.x, p.scale, p.weights, p.topk_idx) == (payload.rows.data_ptr(), 0, payload.weights.data_ptr(), 0)
    assert (p.places, p.rows_out) == (route.places.data_ptr(), route.dst_counts.data_ptr())
    assert (p.rows_in, p.num_tokens, p.top_k, p.num_local, p.by_expert) == (route.src_counts.data_ptr(), 3, 2, 4, 0)
    offsets = list(p.handshake)[FIRST_OFFSET : FIRST_OFFSET + 6]
    assert [OFFSET_BYTES * offset for offset in offsets] == [buffers.rows, buffers.scale, buffers.weights, 4096, 0, 0]


def one_rank():
    """A context whose kernels only note that they were launched."""
    launched = []

    def new_template(spec):
        kernel = SimpleNamespace(new_params=spec.params.struct, launch=lambda *_: launched.append(kernel))
        return LaunchTemplate(kernel)

    return SimpleNamespace(num_ranks=2, templates=BoundedDict(8), new_template=new_template, launched=launched)


def launch_dispatch(context):
    payload = Payload(torch.ones(3, 16), None, torch.ones(3, 2), None, 64, 0)
    route = Route(torch.zeros(3, 4), torch.zeros(2), torch.zeros(2), 2, 4, by_expert=False)
    buffers = RecvBuffers(None, False, 512, 1024, 2048, None, 4096)
    launch.dispatch(context, Call(1, 0, False, 3, Signature("dispatch"), 0), payload, route, buffers, 4)
    return payload, route, buffers
