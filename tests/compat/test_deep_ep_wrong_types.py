"""Whatever stands in the place of an argument of DeepEP's API: it is refused by name, before anything is sent.

Every argument of every public call gets things of other kinds, also arguments that are added later. On a group of one
rank, which needs no process group.
"""

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch

from tokenferry import ArgumentError, TokenferryError
from tokenferry.compat import deep_ep
from tokenferry.compat.deep_ep import Buffer, Config, ElasticBuffer, EPBuffer, EventHandle, EventOverlap, HybridEPBuffer

T, K, E, H, M = 3, 2, 4, 128, 4
X = torch.arange(T * H, dtype=torch.int64, device="cpu").reshape(T, H).bfloat16()
IDX = torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int64, device="cpu")
WEIGHTS = torch.ones(T, K, dtype=torch.float32, device="cpu")
TENSOR = torch.zeros(2, dtype=torch.float32, device="cpu")

OTHERS = (2.5, "x", (), [1], object(), TENSOR, EventHandle(), EventOverlap(EventHandle()), Config(20), print)
NOT_DENSE = {
    "sparse": torch.Tensor.to_sparse,
    "of oneDNN": torch.Tensor.to_mkldnn,
    "nested": lambda right: torch._nested_tensor_from_tensor_list(list(right)),
}
"""Tensors of the right dtype and number of dimensions that have no strides, or no shape."""
HINTS = {"extra_tensors"}
"""Arguments for which anything may stand: it is kept."""

SCALARS = {"bool": (bool, float), "bool | None": (bool, float), "int": int, "int | None": int, "float": (int, float)}
OF_ONE_CLASS = {
    "Config | None": Config,
    "EventHandle | None": EventHandle,
    "EventOverlap | None": (EventHandle, EventOverlap),
    "Event": (EventHandle, EventOverlap),
    "dist.ProcessGroup | None": (),
    "Handle": (),
    "EPHandle": (),
    "EPHandle | None": (),
    "HybridHandle": (),
    "HybridHandle | None": (),
    "throughput.Handle": (),
    "throughput.Handle | None": (),
}
"""Annotations, and the classes of what such an argument takes."""


class Calls:
    """Buffers of all classes, and right arguments for their calls."""

    def __init__(self) -> None:
        self.buffer = buffer = Buffer(None, 64, 128, low_latency_mode=True, enable_shrink=True)
        self.elastic = elastic = ElasticBuffer(None, num_max_tokens_per_rank=M, hidden=H)
        self.ep = ep = EPBuffer(None, num_max_tokens_per_rank=M, hidden=H)
        self.hybrid = hybrid = HybridEPBuffer(None, H, M, E)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(IDX, E)
        layout = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }
        dispatch = {"x": X, **layout, "topk_idx": IDX, "topk_weights": WEIGHTS}
        low_latency = {"x": X, "topk_idx": IDX, "num_max_dispatch_tokens_per_rank": M, "num_experts": E}
        routed = {"x": X, "topk_idx": IDX, "topk_weights": WEIGHTS, "num_experts": E}
        chosen = {"hidden": X, "topk_idx": IDX, "num_of_experts": E}
        handle, sparse = buffer.dispatch(**dispatch)[4], buffer.low_latency_dispatch(**low_latency)[2]
        handle_2, handle_25 = elastic.dispatch(**routed)[3], ep.dispatch(**routed)[3]
        expanded, *_, hybrid_handle = hybrid.dispatch_with_permute(**chosen)
        y = torch.zeros(E, M, H, dtype=torch.bfloat16, device="cpu")
        combine = {"x": y, "topk_idx": IDX, "topk_weights": WEIGHTS, "handle": sparse}
        sizes = {"num_max_tokens_per_rank": M, "hidden": H}
        self.all: list[tuple[Callable, dict]] = [
            (deep_ep.get_physical_domain_size, {"group": None}),
            (deep_ep.get_logical_domain_size, {"group": None}),
            (Config, {}),
            (EventOverlap, {}),
            (EventOverlap(EventHandle()).current_stream_wait, {}),
            (EventOverlap(EventHandle()).__call__, {}),
            (EventOverlap().register_hook_after_wait, {"hook": print}),
            (Buffer, {"group": None}),
            (ElasticBuffer, {"group": None, **sizes}),
            (EPBuffer, {"group": None, **sizes}),
            (HybridEPBuffer, {"group": None, "hidden_dim": H, "max_num_of_tokens_per_rank": M, "num_local_experts": E}),
            (ElasticBuffer.get_buffer_size_hint, {"group": None, **sizes}),
            (buffer.get_dispatch_layout, {"topk_idx": IDX, "num_experts": E}),
            (buffer.dispatch, dispatch),
            (buffer.dispatch, {"x": X, "handle": handle}),
            (buffer.combine, {"x": X, "handle": handle}),
            (buffer.low_latency_dispatch, low_latency),
            (buffer.low_latency_combine, combine),
            (buffer.get_next_low_latency_combine_buffer, {"handle": sparse}),
            (buffer.low_latency_update_mask_buffer, {"rank_to_mask": 0}),
            (buffer.get_local_buffer_tensor, {"dtype": torch.uint8}),
            (buffer.set_num_sms, {"new_num_sms": 20}),
            (buffer.runtime.get_root_rdma_rank, {"global_": True}),
            (elastic.dispatch, routed),
            (elastic.dispatch, {"x": X, "handle": handle_2}),
            (elastic.combine, {"x": X, "handle": handle_2}),
            (elastic.barrier, {}),
            (elastic.get_theoretical_num_sms, {"num_experts": E, "num_topk": K}),
            (elastic.get_theoretical_num_qps, {"num_sms": 20}),
            (ep.dispatch, routed),
            (ep.dispatch, {"x": X, "handle": handle_25}),
            (ep.combine, {"x": X, "handle": handle_25}),
            (ep.get_theoretical_num_sms, {"num_experts": E, "num_topk": K}),
            (hybrid.dispatch_with_permute, chosen),
            (hybrid.dispatch_with_permute, {"hidden": X, "handle": hybrid_handle}),
            (hybrid.combine_with_unpermute, {"hidden": expanded, "handle": hybrid_handle}),
        ]

    def check_usable(self) -> None:
        for call, arguments in self.all[12:]:
            call(**arguments)


def arguments_of(call: Callable) -> Iterator[inspect.Parameter]:
    for argument in inspect.signature(call).parameters.values():
        if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            yield argument


def refusal(call: Callable, arguments: dict) -> str | None:
    """Return the message with which a call is refused; None: it was made."""
    try:
        call(**arguments)
    except TokenferryError as error:
        return str(error)
    return None


def test_what_is_of_another_kind_is_refused_by_name():
    calls = Calls()
    for call, right in calls.all:
        for argument in arguments_of(call):
            takes = SCALARS.get(argument.annotation, OF_ONE_CLASS.get(argument.annotation))
            anything = takes is None or {argument.name, f"{call.__qualname__}.{argument.name}"} & HINTS
            for other in OTHERS:
                said = refusal(call, right | {argument.name: other})
                is_fine = argument.name in said if said else anything or isinstance(other, takes)
                assert is_fine, f"{call.__qualname__}({argument.name}={other!r}): {said}"
        calls.check_usable()


@pytest.mark.filterwarnings("ignore")  # torch says that nested tensors are new
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_tensor_that_is_not_dense_is_refused_by_name(kind):
    calls = Calls()
    for call, right in calls.all:
        for name, value in right.items():
            if not isinstance(value, torch.Tensor) or value.ndim != 2:
                continue
            try:
                other = NOT_DENSE[kind](value)
            except RuntimeError:  # oneDNN has none of this dtype
                continue
            said = refusal(call, right | {name: other})
            assert name in (said or ""), f"{call.__qualname__}({name}): {said}"
        calls.check_usable()


@pytest.mark.parametrize("flag", ["async_finish", "return_recv_hook"])
def test_a_tensor_for_a_flag_breaks_no_group(flag):
    """In DeepEP, too, it has no truth value; here it was asked for after the rows had been sent."""
    buffer = Buffer(None, low_latency_mode=True)
    with pytest.raises(
        ArgumentError, match=rf"low_latency_dispatch: {flag}: expected True or False, got a tensor \[2\]"
    ):
        buffer.low_latency_dispatch(X, IDX, M, E, **{flag: TENSOR})
    buffer.low_latency_dispatch(X, IDX, M, E)


@pytest.mark.parametrize("what", [3, torch.zeros(1, dtype=torch.float32, device="cpu"), EventOverlap(), object])
def test_a_wrong_event_is_noticed_when_the_object_is_made(what):
    with pytest.raises(ArgumentError, match=r"EventOverlap: event: expected an EventHandle or None, got \w+; pass"):
        EventOverlap(what)
