"""Windows: one allocation of GPU memory per rank, which every rank of the node can address by plain pointers.

Memory comes from `cuMemAlloc` and is shared by CUDA IPC. NVLink multicast is never used.

A window may be closed while peers still have it mapped, and while tensors still use it: its memory is freed once it is
closed and the last block of its heap is freed. The mapping of a peer stays until that peer closes its own window.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tokenferry.errors import BackendUnavailable
from tokenferry.jit.driver import Device, check
from tokenferry.memory.heap import Heap
from tokenferry.memory.reach import describe, has_atomics, why_not
from tokenferry.memory.streams import CudaStreams
from tokenferry.transports.handshake import HandshakeExchange, agree

_PAGE = 2 << 20
"""Allocations are multiples of this: smaller ones share a page with others, which IPC would then share too."""
_HANDLE_BYTES = 64


class Memory:
    """One allocation on a device, of which the first bytes are zeroed; freed with the last reference to this object.

    Raises:
        BackendUnavailable: there is not enough memory; gives the numbers and the setting.
    """

    def __init__(self, device: Device, num_bytes: int, zero_bytes: int) -> None:
        self._device = device
        self._cuda = cuda = device.cuda
        self._relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self.address = 0
        with device.current():
            code, address = cuda.cuMemAlloc(-(-num_bytes // _PAGE) * _PAGE)
            if code == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                free, total = check(cuda.cuMemGetInfo(), "asking for free memory")
                raise BackendUnavailable(
                    f"cuda:{device.index}: {num_bytes >> 20} MiB for the window are not available, {free >> 20} of "
                    f"{total >> 20} MiB are free; set TOKENFERRY_HEAP_MB lower, or free memory first "
                    "(torch.cuda.empty_cache() releases the memory that torch caches)"
                )
            check((code,), "allocating the window")
            self.address = int(address)
            check(cuda.cuMemsetD8(self.address, 0, zero_bytes), "clearing the window")
            # Peers write as soon as they have the address: the zeros have to be there first.
            check(cuda.cuStreamSynchronize(0), "clearing the window")

    def handle(self) -> str:
        """Return the IPC handle, in hexadecimal."""
        with self._device.current():
            handle = check(self._cuda.cuIpcGetMemHandle(self.address), "making an IPC handle of the window")
        return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex()

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:  # noqa: ANN401 - bound: `sys` may be gone
        if finalizing() or not getattr(self, "address", 0) or self._device.inherited:
            return
        # The last tensor may be freed during a capture, which freeing memory would break. A failure can be
        # ignored: it means that the context, and the memory with it, is gone or broken.
        _, mode = self._cuda.cuThreadExchangeStreamCaptureMode(self._relaxed)
        try:
            with self._device.current():
                self._cuda.cuMemFree(self.address)
        except RuntimeError:
            pass
        finally:
            self._cuda.cuThreadExchangeStreamCaptureMode(mode)


class Window:
    """One rank's view of all windows; made by `share`.

    Attributes:
        rank: The rank whose view this is.
        num_ranks: R.
        num_bytes: Bytes of each window.
        device: Device of this rank's window.
        bases: Address of every rank's window in this process, including this rank's own.
        base: ``bases[rank]``.
        has_atomics: Whether atomics on the windows of peers are atomic.
    """

    has_atomics = True

    def __init__(
        self, rank: int, device: torch.device, num_bytes: int, memories: tuple[Memory, ...], bases: tuple[int, ...]
    ) -> None:
        self.rank = rank
        self.num_ranks = len(bases)
        self.num_bytes = num_bytes
        self.device = device
        self.bases = bases
        self.base = bases[rank]
        self._memories = memories
        self._mapped: list[int] = []
        self._heaps: list[Heap] = []
        self._driver = memories[0]._device

    def heap(self, first: int) -> Heap:
        """Return a heap over the bytes from ``first`` to the end; it is closed with the window."""
        own = next(memory for memory in self._memories if memory.address == self.base)
        heap = Heap(self.base, self.num_bytes - first, self.device, first, own, CudaStreams(self._driver))
        self._heaps.append(heap)
        return heap

    def _reach(self, handshakes: list[dict[str, Any]], names: Sequence[int]) -> str:
        """Map every peer's window; return the reason of a failure, or an empty string.

        Args:
            handshakes: Those of the ranks that share windows.
            names: Their numbers in the whole group.
        """
        bases = list(self.bases)
        for peer, handshake in enumerate(handshakes):
            if peer == self.rank:
                continue
            try:
                # The driver refuses handles of its own process.
                if handshake["process"] == handshakes[self.rank]["process"]:
                    bases[peer] = _neighbour(self._driver, handshake["device"]["index"], handshake["address"])
                else:
                    bases[peer] = _map(self._driver, bytes.fromhex(handshake["handle"]))
                    self._mapped.append(bases[peer])
            except BackendUnavailable as error:
                hint = "containers need a common PID and IPC namespace"
                return f"rank {names[self.rank]} cannot map the memory of rank {names[peer]} ({error}; {hint})"
        self.bases = tuple(bases)
        return ""

    def forget(self) -> None:
        """Leave all memory alone, in a forked child: blocks that die there, and `close`, call nothing of CUDA."""
        self._mapped = []
        for heap in self._heaps:
            heap.close()

    def close(self) -> None:
        """Unmap the windows of peers, and free this rank's own once no tensor uses it. Local, idempotent.

        Waits for the work queued on the device, which may still use the mappings.
        """
        heaps, self._heaps = self._heaps, []
        mapped, self._mapped = self._mapped, []
        self._memories = ()
        for heap in heaps:
            heap.close()
        if mapped and not sys.is_finalizing():
            _unmap(self._driver, mapped)


def share(
    bootstrap: HandshakeExchange | None,
    rank: int,
    node: Sequence[int],
    device: torch.device,
    num_bytes: int,
    zero_bytes: int | None = None,
) -> Window:
    """Allocate this rank's window, and map the windows of all others of its node. Collective, in the whole group.

    When it returns, every rank has mapped these windows, and the first ``zero_bytes`` of each (all, if None) are zero.

    Args:
        bootstrap: The exchange of handshakes; may be None for a group of one rank.
        rank: This rank.
        node: The ranks that share windows, this one included; they are numbered from 0 in the window.
        device: GPU of this rank; ranks may share one.
        num_bytes: Bytes of each window, the same on all ranks.
        zero_bytes: Bytes to zero at the start of each window; None: all.

    Raises:
        BackendUnavailable: on all ranks, if any rank cannot: it has no GPU or an old one, its GPU cannot reach another,
            the ranks are on several hosts or more than 8, or there is not enough memory. Names the rank.
        PeerTimeout: a rank did not answer.
    """
    handshakes = _exchange(bootstrap, describe(device))
    reason = why_not(handshakes, rank, node)
    memory: Memory | None = None
    offer = {"address": 0, "handle": ""}
    if not reason:
        try:
            memory = Memory(Device(device.index or 0), num_bytes, num_bytes if zero_bytes is None else zero_bytes)
            offer = {"address": memory.address, "handle": memory.handle() if bootstrap else ""}
        except BackendUnavailable as error:
            reason = f"rank {rank}: {error}"
    offers = _exchange(bootstrap, {"why_not": reason, **offer})
    reason = next((handshake["why_not"] for handshake in offers if handshake["why_not"]), "")
    if reason or memory is None:
        raise BackendUnavailable(f"ranks cannot share GPU memory: {reason}")
    window = Window(node.index(rank), device, num_bytes, (memory,), (memory.address,) * len(node))
    window.has_atomics = has_atomics(handshakes, rank, node)
    reason = window._reach([{**handshakes[peer], **offers[peer]} for peer in node], node)
    reason = agree(bootstrap, reason) if bootstrap else reason
    if reason:
        window.close()
        raise BackendUnavailable(f"ranks cannot share GPU memory: {reason}")
    return window


def share_in_process(num_ranks: int, device: torch.device, num_bytes: int) -> list[Window]:
    """Return R windows on one device in this process: *virtual ranks*. Each keeps the memory of all alive.

    Raises:
        BackendUnavailable: there is not enough memory.
    """
    driver = Device(device.index or 0)
    memories = tuple(Memory(driver, num_bytes, num_bytes) for _ in range(num_ranks))
    bases = tuple(memory.address for memory in memories)
    return [Window(rank, device, num_bytes, memories, bases) for rank in range(num_ranks)]


def _exchange(bootstrap: HandshakeExchange | None, handshake: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's handshake; a group of one has only its own."""
    return bootstrap.exchange(handshake) if bootstrap else [handshake]


def _map(device: Device, handle: bytes) -> int:
    """Map the window of another process, and return its address."""
    cuda = device.cuda
    wanted = cuda.CUipcMemHandle()
    ctypes.memmove(wanted.getPtr(), handle, _HANDLE_BYTES)
    lazily = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    with device.current():
        return int(check(cuda.cuIpcOpenMemHandle(wanted, int(lazily)), "opening an IPC handle"))


def _neighbour(device: Device, index: int, address: int) -> int:
    """Return the address of the window of a rank in this process, after enabling access to its device."""
    if index != device.index:
        cuda = device.cuda
        peer = Device(index)
        with device.current():
            result = cuda.cuCtxEnablePeerAccess(peer._context, 0)
        if result[0] != cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            check(result, f"enabling access to CUDA device {index}")
    return address


def _unmap(device: Device, addresses: list[int]) -> None:
    """Unmap the windows of peers, after all work that may use them."""
    # A failure means that the context is gone or broken, and every mapping with it, or that a stream is being captured:
    # then they stay mapped until the process ends.
    try:
        with device.current():
            check(device.cuda.cuCtxSynchronize(), "waiting for the work of this process")
            for address in addresses:
                device.cuda.cuIpcCloseMemHandle(address)
    except RuntimeError:
        pass
