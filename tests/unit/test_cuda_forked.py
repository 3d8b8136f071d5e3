"""A forked child of a process with a group on GPUs: calls say why they cannot work, and nothing there calls CUDA."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from support.children import in_child, open_descriptors
from tokenferry import ClosedError, ExpertGroup, MoeShape, Routing
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda.peers import Peers, Process
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.backends.cuda.setup import assemble
from tokenferry.jit.driver import Device
from tokenferry.kernels.control_block import CONTROL_BLOCK_BYTES
from tokenferry.memory.streams import CudaStreams
from tokenferry.memory.window import Memory, Window

CPU = torch.device("cpu")
SHAPE = MoeShape(4, 2, 16, 8)
HEAP_BYTES = 16 << 20


class Cuda:
    """A driver that notes what is called, with which window, events and contexts can be made."""

    CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self) -> None:
        self.called: list[str] = []
        self._memory = torch.zeros(CONTROL_BLOCK_BYTES + HEAP_BYTES, dtype=torch.uint8)
        self._values = {"cuMemAlloc": (self._memory.data_ptr(),), "cuStreamGetCaptureInfo": (0, 0)}

    def __getattr__(self, name):
        def call(*_):
            self.called.append(name)
            return 0, *self._values.get(name, (1,))

        return call


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr("tokenferry.jit.driver.bindings", lambda: made)
    for name, value in (("_cuda_getCurrentRawStream", lambda _: 7), ("_cuda_getDevice", lambda: 0)):
        monkeypatch.setattr(torch._C, name, value, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    return made


def make_group(device: Device, others: list[Process]) -> ExpertGroup:
    """Return rank 0 of two, whose window is on the CPU, with a peer's window that has to be unmapped."""
    own = Memory(device, CONTROL_BLOCK_BYTES + HEAP_BYTES, 4096)
    window = Window(0, CPU, CONTROL_BLOCK_BYTES + HEAP_BYTES, (own,), (own.address, own.address))
    window._mapped = [own.address]
    runtime = Runtime(SimpleNamespace(), device, CudaStreams(device), 4, 227 << 10)
    resolved = Resolved(SHAPE, "cuda", "auto", 5.0, True, HEAP_BYTES, "")
    backend = assemble(window, resolved, "forked", "a test", runtime)
    backend.context.watch(Peers([Process.this(), *others]))
    group = object.__new__(ExpertGroup)
    group._adopt(backend, SHAPE, 5.0)
    return group


def test_every_call_in_a_child_says_why(cuda):
    group = make_group(Device(0), [])
    group._backend.context._last[0] = 7  # as if a call had been made
    routing = Routing(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    x = torch.ones(2, 16, dtype=torch.bfloat16)

    def call_everything() -> tuple[list[str], list[str]]:
        cuda.called.clear()
        texts = []
        for call in (
            lambda: group.dispatch(x, routing),
            lambda: group.decode_dispatch(x, routing),
            lambda: group.mask(1),
            lambda: group.mask(1, masked=False),
            group.synchronize,
            group.warmup,
            lambda: group.for_shape(SHAPE),
        ):
            with pytest.raises(ClosedError) as caught:
                call()
            texts.append(str(caught.value))
        assert group.masked_ranks == frozenset()
        group.close()
        group.close()
        texts.append(repr(group))
        return texts, cuda.called

    texts, called = in_child(call_everything)
    assert all(f"belongs to process {os.getpid()}, from which this process" in text for text in texts), texts
    assert called == []
    cuda.called.clear()
    group.close()
    assert "cuIpcCloseMemHandle" in cuda.called, "the child closed the group of its parent"


def test_nothing_that_dies_in_a_child_calls_cuda(cuda):
    """Memory, events, and blocks, on their own stream and on another one."""
    device = Device(0)
    group = make_group(device, [])
    heap = group._backend.context.heap
    left = [heap.block(4096, 7), heap.block(4096, 8), CudaStreams(device).record(7), Memory(device, 4096, 4096)]
    kept = [group]

    def drop_everything() -> list[str]:
        nonlocal group, heap
        cuda.called.clear()
        left.clear()
        kept.clear()
        del group, heap
        gc.collect()
        return cuda.called

    assert in_child(drop_everything) == []
    cuda.called.clear()
    left.clear()
    assert {"cuEventRecord", "cuEventDestroy", "cuMemFree"} <= set(cuda.called), "what died in the child lives here"
    group.close()


def test_a_child_closes_what_it_inherited(cuda):
    parent = Process(os.getppid(), Process.this().namespace)
    before = open_descriptors()
    group = make_group(Device(0), [parent])
    ours = open_descriptors().items() - before.items()
    assert len(ours) == 2
    assert in_child(lambda: sorted(ours & open_descriptors().items())) == []
    group.close()
