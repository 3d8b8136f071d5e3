"""A group of two nodes of the CUDA backend whose kernels do nothing, and whose other node is its own reflection.

For what the host does in a call across nodes.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from support.emulated_rails import by_node
from support.silent_kernels import HEAP_BYTES, Launch, SilentKernel, Window, values_of
from tokenferry import ExpertGroup, MoeShape
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda.across.backend import InternodeLinks
from tokenferry.backends.cuda.across.nccl_channel import Marks
from tokenferry.backends.cuda.across.nccl_rails import NcclRails
from tokenferry.backends.cuda.across.puts import Network, region_sizes
from tokenferry.backends.cuda.across.rails import Parts
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.backends.cuda.setup import assemble_across
from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.kernels.control_block import (
    HOST_CAME_WORD,
    HOST_MOST_WORD,
    HOST_NODES_WORD,
    HOST_ROWS_WORD,
    HOST_UNITS_WORD,
    RAIL_WORDS,
    RECORD_WORDS,
    ROWS_WORD,
    SIGNATURE_WORDS,
)
from tokenferry.kernels.rail_receive import spec as receive_spec
from tokenferry.kernels.rail_send import spec as send_spec
from tokenferry.memory.streams import HostStreams
from tokenferry.topology import Topology


class NodeKernel(SilentKernel):
    """A kernel that also tells the host, and the other node, that all tokens go to both nodes."""

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        name = self._spec.name
        if name == "dispatch_notify":
            words, num = self._words[0], self._words[1]
            words[RECORD_WORDS + 1] = words[RECORD_WORDS + 1 + 32] = 2 * num[0]
            words[RECORD_WORDS + HOST_MOST_WORD] = 2 * num[0]
            words[RECORD_WORDS + HOST_UNITS_WORD] = -(-num[0] // UNIT_TOKENS)
            words[RECORD_WORDS] = params.call_number
        self._launches.append((name, grid, block, smem_bytes, values_of(params)))
        if name == "dispatch_split":
            num = self._words[1]
            num[0] = params.num_tokens
            host = (ctypes.c_int32 * (HOST_NODES_WORD + 2)).from_address(params.host)
            host[HOST_ROWS_WORD], host[HOST_NODES_WORD], host[HOST_NODES_WORD + 1] = 2 * num[0], num[0], num[0]
            host[0] = params.call_number
        if name == "dispatch_relay":
            host, num = (ctypes.c_int32 * (HOST_CAME_WORD + 2)).from_address(params.host), self._words[1]
            host[:] = [params.call_number, num[0], num[0]]
        if name in ("dispatch_split", "across_open"):
            headers = (ctypes.c_int32 * (2 * RAIL_WORDS)).from_address(params.headers)
            row = [*list(params.handshake)[:SIGNATURE_WORDS], *[0] * (RAIL_WORDS - SIGNATURE_WORDS)]
            row[ROWS_WORD] = self._words[1][0]
            if name == "across_open" and params.goes:
                row[ROWS_WORD] = ctypes.c_int32.from_address(params.goes).value
            headers[:] = [ctypes.c_int32(w & 0xFFFFFFFF).value for w in row] * 2


class Mirror:
    """A channel that brings what was sent, at once.

    Attributes:
        exchanges: The bytes of each part sent and received, by node.
    """

    def __init__(self) -> None:
        self.exchanges: list[tuple[dict[int, list[int]], ...]] = []

    def start(self, parts: Parts, stream: int, *, captured: bool) -> Marks:
        send, recv = by_node(parts, sent=True), by_node(parts, sent=False)
        self.exchanges.append(
            tuple({node: [num_bytes for _, num_bytes in each] for node, each in all_.items()} for all_ in (send, recv))
        )
        for node, places in recv.items():
            for (address, num_bytes), (source, _) in zip(places, send.get(node, ()), strict=False):
                if num_bytes <= 4 * RAIL_WORDS:  # the host reads nothing else
                    ctypes.memmove(address, source, num_bytes)
        return Marks(lambda: True, lambda: True, lambda: None)

    def error(self) -> str:
        return ""

    abort = close = lambda self: None
    aside = nullcontext


class SilentNodes:
    """This group.

    Args:
        shape: Its shape.
        fast_path: Whether it has a fast path.
        puts: Whether messages of decode calls are put.

    Attributes:
        group: The group, rank 0 of two.
        launches: What has been launched.
        channel: What carries exchanges.
    """

    def __init__(self, shape: MoeShape, *, fast_path: bool = True, puts: bool = False) -> None:
        self.launches: list[Launch] = []
        words: list[Any] = []
        kernels: dict[Any, NodeKernel] = {}

        def kernel(spec: Any, **config: int) -> NodeKernel:
            return kernels.setdefault((spec, *sorted(config.items())), NodeKernel(spec, self.launches, words))

        jit = SimpleNamespace(kernel=kernel, warmup=lambda _: None)
        driver = SimpleNamespace(cuda=SimpleNamespace(cuStreamSynchronize=lambda _: (0,)), current=nullcontext)
        resolved = Resolved(shape, "cuda", "auto", 20.0, False, HEAP_BYTES, "", fast_path=fast_path)
        topology = Topology(0, ((0,), (1,)))
        window = Window()
        window.bases, window.num_ranks = [window.base], 1
        self.channel = Mirror()
        rails = NcclRails(self.channel, topology, 20.0)
        runtime = Runtime(jit, driver, HostStreams(), 132, 227 << 10)
        network = None
        if puts:
            sizes = region_sizes(shape, topology)
            memory = torch.zeros(sizes.num_bytes, dtype=torch.uint8, device="cpu")
            table = torch.zeros(1, dtype=torch.int64, device="cpu")
            specs = send_spec.SPEC, receive_spec.SPEC
            network = Network("silent", *specs, sizes, memory.data_ptr(), table, memory)
        backend = assemble_across(window, resolved, "key", topology, InternodeLinks(rails, network), runtime)
        words += [backend.context.pinned.words, [0]]
        self.group = object.__new__(ExpertGroup)
        self.group._adopt(backend, shape, 20.0)
