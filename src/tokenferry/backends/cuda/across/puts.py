"""Messages that ranks put into each other's memory: two kernels, and no host between them.

kernels/device/rails.cuh describes the memory, and why nothing in it is overwritten before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenferry.backends.base import Encoding
from tokenferry.backends.cuda.across.contents import Routing, Words
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.decode_forms import rail_sizes
from tokenferry.backends.cuda.across.decode_sums import encoded_bytes
from tokenferry.backends.cuda.across.messages import MessageRails, Messages
from tokenferry.backends.cuda.across.rails import Rails, Rows, Transfer
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate, call_packer
from tokenferry.errors import CapacityError
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.linker import DeviceLibrary
from tokenferry.kernels.control_block import MESSAGE_HEAD_BYTES, RAIL_CHUNK_BYTES
from tokenferry.kernels.decode_pack.spec import record_units
from tokenferry.kernels.rail_receive import spec as receive_spec
from tokenferry.kernels.rail_send import spec as send_spec
from tokenferry.topology import Topology
from tokenferry.types import MoeShape

_SEND = call_packer(send_spec.SPEC, "headers", "bodies", "body_bytes")
_RECEIVE = call_packer(receive_spec.SPEC, "headers", "states", "bodies", "body_bytes")
_ITEM_BYTES = 4
"""Of the largest numbers that decode calls send."""
_LINE = 128
_AHEAD_S = 1.0
"""How long before the deadline a wait for another node ends, unless a tenth of the deadline is less."""


@dataclass(frozen=True, slots=True)
class RegionSizes:
    """The sizes of the memory that ranks put into.

    Attributes:
        num_nodes: N.
        message_bytes: Bytes of the longest message, and what rounds them up.
        max_chunks: Most chunks of a message.
    """

    num_nodes: int
    message_bytes: int
    max_chunks: int

    @property
    def max_body(self) -> int:
        """Bytes of the longest body."""
        return self.message_bytes - MESSAGE_HEAD_BYTES

    @property
    def num_bytes(self) -> int:
        """Bytes of all: twice a landing, a staging and flags."""
        return 2 * self.num_nodes * (2 * self.message_bytes + 8 * self.max_chunks)


def region_sizes(shape: MoeShape, topology: Topology) -> RegionSizes:
    """Return the sizes for decode calls of a shape, whatever their options.

    Raises:
        ConfigError: they are too large for the kernels.
    """
    H = shape.hidden
    record = 16 * record_units(H, _ITEM_BYTES, shape.top_k, cast=False, weighted=True)
    encoded = max(encoded_bytes(H, _ITEM_BYTES, encoding) for encoding in (Encoding.fp8, Encoding.logfmt10))
    body = rail_sizes(shape, topology).segment * max(record, encoded)
    message = -(-(MESSAGE_HEAD_BYTES + body) // _LINE) * _LINE
    return RegionSizes(topology.num_nodes, message, -(-body // RAIL_CHUNK_BYTES))


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Memory of a rank that the ranks across from it put into, and what puts.

    Attributes:
        name: What it is.
        send: The kernel `rail_send`, with the functions of this network.
        receive: The kernel `rail_receive`, likewise.
        sizes: The sizes of the memory.
        region: Its address.
        table: ``network`` of device/rails.cuh, int64.
        kept: Keeps the memory; None: it is never given back.
        library: What the kernels are linked with; None: they have the functions of the network.
    """

    name: str
    send: KernelSpec
    receive: KernelSpec
    sizes: RegionSizes
    region: int
    table: Tensor
    kept: object = None
    library: DeviceLibrary | None = None


class Puts:
    """Exchanges of messages that ranks put into each other's memory.

    Args:
        context: Context of this rank, in its node.
        topology: The nodes.
        network: What puts them.
    """

    def __init__(self, context: Context, topology: Topology, network: Network) -> None:
        self._context = context
        self._num_others = topology.num_nodes - 1
        self.network = network
        self._send = context.new_template(network.send, _SEND)
        self._receive = context.new_template(network.receive, _RECEIVE)
        self._send.block, self._receive.block = send_spec.THREADS, receive_spec.THREADS
        for template in (self._send, self._receive):
            p = template.params
            p.num_nodes, p.node = topology.num_nodes, topology.node
            p.region, p.network = network.region, network.table.data_ptr()
            p.message_bytes, p.max_chunks = network.sizes.message_bytes, network.sizes.max_chunks
        # Ranks of this node wait for this one as long: they should learn why before they give up themselves.
        timeout_s = context.timeout_s
        self._receive.params.timeout_ns = int((timeout_s - min(_AHEAD_S, timeout_s / 10)) * 1e9)

    def exchange(self, call: Call, send: Messages, recv: Messages) -> PutTransfer:
        """See `MessageRails.exchange`. Kernels of the current stream use the memory, and nothing else."""
        headers = 0 if send.headers is None else send.headers.address
        self._send.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            headers, send.bodies.address, send.bodies.row_bytes,
        )  # fmt: skip
        self._launch(self._send, send.bodies.row_bytes, call.stream)
        return PutTransfer(self, call, recv)

    def receive(self, call: Call, recv: Messages) -> None:
        """Let the current stream wait for what the others have put, and copy it to its places."""
        headers, states = (0 if rows is None else rows.address for rows in (recv.headers, recv.states))
        self._receive.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            headers, states, recv.bodies.address, recv.bodies.row_bytes,
        )  # fmt: skip
        self._launch(self._receive, recv.bodies.row_bytes, self._context.current_stream())

    def synchronize(self) -> None:
        """See `Context.synchronize`."""
        self._context.synchronize()

    def _launch(self, template: LaunchTemplate, body_bytes: int, stream: int) -> None:
        units = self._num_others * max(1, -(-body_bytes // RAIL_CHUNK_BYTES))
        template.launch(min(units, self._context.num_sms), stream)


@dataclass(frozen=True, slots=True, eq=False)
class PutTransfer:
    """Messages under way; see `tokenferry.backends.cuda.across.rails.Transfer`.

    Attributes:
        puts: What exchanges them.
        call: Their call.
        recv: Where to receive.
    """

    puts: Puts
    call: Call
    recv: Messages

    def join(self) -> None:
        """See `Transfer.join`."""
        self.puts.receive(self.call, self.recv)

    def wait(self) -> None:
        """See `Transfer.wait`."""
        self.join()
        self.puts.synchronize()


class PutMessages(MessageRails):
    """The messages of decode calls, put; see `MessageRails`.

    Args:
        crossing: The exchanges of the other calls.
        puts: What exchanges messages.
    """

    def __init__(self, crossing: Crossing, puts: Puts) -> None:
        super().__init__(crossing, puts.network.name)
        self._puts = puts

    def check(self, phase: str, body_bytes: int) -> None:
        """See `MessageRails.check`."""
        most = self._puts.network.sizes.max_body
        if body_bytes > most:
            raise CapacityError(
                f"{phase}: what goes to another node takes {body_bytes} bytes, and the memory for it, made for the "
                f"shape of the group, has {most}; make the group with the largest shape of its views"
            )

    def exchange(self, call: Call, send: Messages, recv: Messages, *kept: object) -> Transfer:
        """See `MessageRails.exchange`."""
        return self._puts.exchange(call, send, recv)


class PutCrossing(Crossing):
    """A crossing whose calls begin as decode calls do, with messages that are put, so that different calls meet.

    Args:
        context: Context of this rank.
        topology: The nodes.
        rails: What carries the other exchanges.
        max_tokens: M of the group.
        puts: What exchanges messages.
    """

    def __init__(self, context: Context, topology: Topology, rails: Rails, max_tokens: int, puts: Puts) -> None:
        super().__init__(context, topology, rails, max_tokens)
        self._puts = puts

    def open(self, call: Call, words: Words) -> Transfer:
        """See `Crossing.open`."""
        return self._puts.exchange(call, Messages(words.mine, _NO_BODIES), Messages(words.headers, _NO_BODIES))

    def routing(self, call: Call, routing: Routing, words: Words, *, opens: bool) -> Transfer:
        """See `Crossing.routing`. Headers are put, and the routing follows them."""
        if opens:
            self.open(call, words).join()
        return super().routing(call, routing, words, opens=False)


_NO_BODIES = Rows(0, 0)
