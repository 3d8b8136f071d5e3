"""A group of the CUDA backend whose kernels do nothing but note their params: for what the host does in a call."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenferry import ExpertGroup, MoeShape, ambient
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda import decode_forms, token_layout, workspace
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.backends.cuda.setup import assemble
from tokenferry.kernels.control_block import (
    CONTROL_BLOCK_BYTES,
    HOST_EXPERTS_WORD,
    HOST_MOST_WORD,
    HOST_SENT_WORD,
    RECORD_WORDS,
)
from tokenferry.memory.heap import Heap
from tokenferry.memory.streams import HostStreams

NUM_RANKS = 2
HEAP_BYTES = 1 << 26
SENT_TO_EACH = 3
"""Rows that each rank sends to each, as the host reads them."""
_PROPERTIES = frozenset(
    ("__get__", "data_ptr", "is_contiguous", "element_size", "numel", "stride", "dim", "size", "is_inference")
)
Launch = tuple[str, int, int, int, dict[str, Any]]
_ADDRESSES = """
windows record host x scale weights topk_idx table bases dst_counts src_counts expert_counts expert_offsets places
dst_token rows_out rows_in rows row_idx source to out bias0 bias1 weights_out workspaces scale_out received src_token
src_range row_weights choices masked_out trace y pending slots ids_here parcels_out parcels_in tokens headers mine sizes
goes comes states own parts own_weights ids came went records overflows number epoch since rows packets bodies region
network weights_here
"""
"""Params that differ from process to process."""


def values_of(params: Any) -> dict[str, Any]:
    """Return the fields of a params struct."""
    values = {name: getattr(params, name) for name, _ in params._fields_}
    return {name: list(value) if isinstance(value, ctypes.Array) else value for name, value in values.items()}


def comparable(launch: Launch) -> tuple[Any, ...]:
    """Return a launch without its addresses, of which only zeros are compared."""
    name, *sizes, values = launch
    return (
        name,
        sizes,
        {field: bool(value) if field in _ADDRESSES.split() else value for field, value in values.items()},
    )


class SilentKernel:
    """A kernel that notes its launches: name, blocks, threads, shared memory and params."""

    def __init__(self, spec: Any, launches: list[Launch], words: list[Any]) -> None:
        self._spec, self._launches, self._words = spec, launches, words

    def new_params(self) -> Any:
        return self._spec.params.struct()

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        self._launches.append((self._spec.name, grid, block, smem_bytes, values_of(params)))
        if self._spec.name in ("dispatch_notify", "dispatch_fused"):
            words, first = self._words[0], RECORD_WORDS + 1
            for rank in range(NUM_RANKS):
                words[first + rank] = words[RECORD_WORDS + HOST_SENT_WORD + rank] = SENT_TO_EACH
            num_local = params.num_experts // NUM_RANKS
            for expert in range(num_local):
                words[RECORD_WORDS + HOST_EXPERTS_WORD + expert] = NUM_RANKS * SENT_TO_EACH // num_local
            words[RECORD_WORDS + HOST_MOST_WORD] = NUM_RANKS * SENT_TO_EACH
            words[RECORD_WORDS] = params.call_number


class Window:
    """The window of a rank, whose peers are itself."""

    def __init__(self) -> None:
        self._memory = torch.zeros(CONTROL_BLOCK_BYTES + HEAP_BYTES, dtype=torch.uint8, device="cpu")
        self.device = torch.device("cpu")
        self.num_bytes = self._memory.numel()
        self.base = self._memory.data_ptr()
        self.bases = [self.base] * NUM_RANKS
        self.rank, self.num_ranks = 0, NUM_RANKS

    def heap(self, first: int) -> Heap:
        return Heap(self.base, self.num_bytes - first, self.device, first)

    def close(self) -> None:
        pass


class SilentGroup:
    """A group with such kernels.

    Attributes:
        group: The group.
        launches: What has been launched.
    """

    def __init__(self, shape: MoeShape, *, fast_path: bool = True) -> None:
        self.launches: list[Launch] = []
        words: list[Any] = []
        kernels: dict[Any, SilentKernel] = {}

        def kernel(spec: Any, **config: int) -> SilentKernel:
            return kernels.setdefault((spec, *sorted(config.items())), SilentKernel(spec, self.launches, words))

        jit = SimpleNamespace(kernel=kernel, warmup=lambda _: None)
        driver = SimpleNamespace(cuda=SimpleNamespace(cuStreamSynchronize=lambda _: (0,)), current=nullcontext)
        resolved = Resolved(shape, "cuda", "auto", 20.0, False, HEAP_BYTES, "", fast_path=fast_path)
        backend = assemble(Window(), resolved, "key", "", Runtime(jit, driver, HostStreams(), 132, 227 << 10))
        words.append(backend.context.pinned.words)
        self.group = object.__new__(ExpertGroup)
        self.group._adopt(backend, shape, 20.0)

    @staticmethod
    def workspaces_agree() -> Any:
        """Return a patch that lets ranks agree on the memory for rows under way without a kernel."""

        def share(self: workspace.Workspaces, _call: Any, _sizes: Any, offset: int) -> Any:
            return workspace._Shared(1, dict.fromkeys(range(self._context.num_ranks), offset))

        return mock.patch.object(workspace.Workspaces, "_share", share)


class CountedCalls(TorchFunctionMode):
    """Lists the torch functions that are called.

    Args:
        properties: Whether to list those, too, that only read a property of a tensor.
    """

    def __init__(self, *, properties: bool = False) -> None:
        super().__init__()
        self.names: list[str] = []
        self._left_out = () if properties else _PROPERTIES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in self._left_out:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls(group: ExpertGroup) -> Iterator[list[str]]:
    """List the calls of torch that calls of a group make, and the tensors made by functions that no mode sees."""

    def noted(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            names.append(name)
            with torch._C.DisableTorchFunction():
                return function(*args)

        return run

    context = group._backend.context
    with (
        CountedCalls() as counted,
        mock.patch.object(ambient, "_num_function_modes", return_value=0),
        mock.patch.object(context, "empty", noted("new", context.empty)),
        mock.patch.object(decode_forms, "part_of", noted("part", decode_forms.part_of)),
        mock.patch.object(token_layout, "part_of", noted("part", token_layout.part_of)),
    ):
        names = counted.names
        yield names


def num_python_calls(call: Callable[[], Any]) -> int:
    """Return how many functions of Python a call runs, after some that are like it."""
    num = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal num
        num += event == "call" and "tokenferry" in frame.f_globals.get("__name__", "")

    for _ in range(3):
        result = call()
    gc.disable()  # what other tests have left would be counted, too
    sys.setprofile(note)
    try:
        kept = call()
    finally:
        sys.setprofile(None)
        gc.enable()
    del result, kept  # not while they are counted
    return num


def rows_of(num_tokens: int, hidden: int) -> Tensor:
    return torch.ones(num_tokens, hidden, dtype=torch.bfloat16, device="cpu")
