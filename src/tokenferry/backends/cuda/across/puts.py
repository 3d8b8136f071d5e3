"""Messages that ranks put into each other's memory: two kernels, and no host between them.

kernels/device/rails.cuh describes the memory, and why nothing in it is overwritten before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenferry.backends.base import Encoding
from tokenferry.backends.cuda.across.contents import CrossingRouting, Opening, Words
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.decode_forms import rail_sizes
from tokenferry.backends.cuda.across.decode_sums import encoded_bytes
from tokenferry.backends.cuda.across.messages import MessageRails, Messages
from tokenferry.backends.cuda.across.parcels import Chunks, Expected
from tokenferry.backends.cuda.across.rails import Rails, Transfer
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.control import write_field
from tokenferry.backends.cuda.faults import pinned_words, view_words
from tokenferry.backends.cuda.patience import ROWS_ACROSS
from tokenferry.errors import CapacityError, ConfigError
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.linker import DeviceLibrary
from tokenferry.kernels.control_block import MESSAGE_HEAD_BYTES, NODE_WORDS, RAIL_CHUNK_BYTES, SIGNATURE_WORDS
from tokenferry.kernels.decode_pack.spec import record_units
from tokenferry.kernels.rail_receive import spec as receive_spec
from tokenferry.kernels.rail_send import spec as send_spec
from tokenferry.memory.tensor import bytes_at
from tokenferry.topology import Topology
from tokenferry.types import MoeShape

_SEND = call_packer(send_spec.SPEC, "headers", "bodies", "body_bytes", "skips")
_RECEIVE = call_packer(receive_spec.SPEC, "headers", "states", "bodies", "body_bytes", "skips", "waits")
_ITEM_BYTES = 4
"""Of the largest numbers that decode calls send."""
_LINE = 128
_MOST_BODY = (1 << 31) - 1
"""Kernels count the bytes of a message in 32 bits."""
_NOBODY: frozenset[int] = frozenset()
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
    def flags_at(self) -> int:
        """Where flags begin: behind twice a landing and a staging."""
        return 4 * self.num_nodes * self.message_bytes

    @property
    def flag_bytes(self) -> int:
        """Bytes of flags."""
        return 16 * self.num_nodes * self.max_chunks

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return self.flags_at + self.flag_bytes


def region_sizes(
    shape: MoeShape, topology: Topology, num_bytes: int | None = None, *, item_bytes: int = _ITEM_BYTES
) -> RegionSizes:
    """Return the sizes for decode calls of a shape, whatever their options.

    Args:
        shape: The shape.
        topology: The nodes.
        num_bytes: As many bytes as there shall be, if they suffice for the shape; None: as it needs.
        item_bytes: Bytes of the largest numbers that calls send.

    Raises:
        ConfigError: they are too large for the kernels.
    """
    H, N = shape.hidden, topology.num_nodes
    record = 16 * record_units(H, item_bytes, shape.top_k, cast=False, weighted=True)
    encoded = max(encoded_bytes(H, item_bytes, encoding) for encoding in (Encoding.fp8, Encoding.logfmt10))
    body = rail_sizes(shape, topology).segment * max(record, encoded)
    if body > _MOST_BODY:
        raise ConfigError(
            f"ExpertGroup: transport='nvshmem': a message of decode calls of this shape has {body} bytes, at most "
            f"{_MOST_BODY} are possible; use a smaller max_tokens or node_slots, or a group without transport='nvshmem'"
        )
    sizes = _sizes_of(N, body)
    if num_bytes is not None and num_bytes > sizes.num_bytes:
        rest = num_bytes // N - 4 * (MESSAGE_HEAD_BYTES + _LINE) - 16  # of a node, for bodies and the flags of chunks
        most = rest * RAIL_CHUNK_BYTES // (4 * RAIL_CHUNK_BYTES + 16)
        sizes = _sizes_of(N, max(body, min(most, _MOST_BODY)))
    return sizes


def _sizes_of(num_nodes: int, body: int) -> RegionSizes:
    """Return the sizes for messages with bodies of so many bytes."""
    message = -(-(MESSAGE_HEAD_BYTES + body) // _LINE) * _LINE
    return RegionSizes(num_nodes, message, -(-body // RAIL_CHUNK_BYTES))


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """The memory of a rank that its rail peers put into, and the kernels that put.

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

    Attributes:
        network: As given.
        by_hand: Ranks of other nodes that were masked by hand.
        lost: For each node 1 if a kernel has masked the rail peer there.
    """

    def __init__(self, context: Context, topology: Topology, network: Network) -> None:
        self._context = context
        self._topology = topology
        self._num_others = topology.num_nodes - 1
        self.network = network
        self._lost = pinned_words(topology.num_nodes, pin=context.device.type == "cuda")
        self.lost = view_words(self._lost)
        self.by_hand: set[int] = set()
        self._send = context.new_template(network.send, _SEND)
        self._receive = context.new_template(network.receive, _RECEIVE)
        self._send.block, self._receive.block = send_spec.THREADS, receive_spec.THREADS
        for template in (self._send, self._receive):
            p = template.params
            p.num_nodes, p.node = topology.num_nodes, topology.node
            p.region, p.network = network.region, network.table.data_ptr()
            p.message_bytes, p.max_chunks = network.sizes.message_bytes, network.sizes.max_chunks
        p = self._receive.params
        p.mask_late, p.masked_out = int(context.mask_late), self._lost.data_ptr()
        # Ranks of this node wait for this one as long: they should learn why before they give up themselves.
        timeout_s = context.timeout_s
        p.timeout_ns = int((timeout_s - min(_AHEAD_S, timeout_s / 10)) * 1e9)

    def exchange(self, call: Call, messages: Messages, patience: float) -> PutTransfer:
        """See `MessageRails.exchange`. Kernels of the current stream use the memory, and nothing else."""
        self._send.pack(
            call.alive, call.number, call.signature.words,
            messages.mine, messages.sent, messages.body_bytes, int(call.skips_masked),
        )  # fmt: skip
        self._launch(self._send, messages.body_bytes, call.stream)
        return PutTransfer(self, call, messages, patience)

    def receive(self, call: Call, messages: Messages, patience: float) -> None:
        """Let the current stream wait for what the others have put, and copy it to its places."""
        self._receive.pack(
            call.alive, call.number, call.signature.words,
            messages.headers, messages.states, messages.came, messages.body_bytes, int(call.skips_masked), 1,
        )  # fmt: skip
        if self._context.mask_late:
            self._receive.params.timeout_ns = int(patience * self._context.timeout_s * 1e9)
        self._launch(self._receive, messages.body_bytes, self._context.current_stream())

    def complete(self) -> None:
        """Let the stream of the last call wait until what this rank has put is complete."""
        stream, _ = self._context.order_after_calls()
        self._receive.pack(0, 0, bytes(4 * SIGNATURE_WORDS), 0, 0, 0, 0, 0, 0)
        self._receive.launch(1, stream)

    def resynchronise(self) -> None:
        """Forget all exchanges; nothing may be under way, and the rail peers do the same."""
        sizes, device = self.network.sizes, self._context.device
        bytes_at(self.network.region + sizes.flags_at, sizes.flag_bytes, device, self.network).zero_()
        for field in ("crossed", "packed"):
            write_field(self._context.window, field, bytes(4))
        write_field(self._context.window, "untold_nodes", bytes(4 * NODE_WORDS))

    def unreachable(self) -> frozenset[int]:
        """See `MessageRails.unreachable`."""
        masked = self.masked_ranks()
        if not masked:
            return masked
        at = self._topology
        cut = [ranks for node, ranks in enumerate(at.nodes) if node != at.node and at.rail[node] in masked]
        return masked.union(*cut)

    def nobody_masked(self) -> bool:
        """Return whether decode calls leave nobody out."""
        return self._context.nobody_masked() and not self.by_hand and not any(self.lost)

    def masked_ranks(self) -> frozenset[int]:
        """Return the ranks of the whole group that decode calls leave out."""
        if self.nobody_masked():
            return _NOBODY
        at, first = self._topology, self._topology.nodes[self._topology.node][0]
        inside = {first + rank for rank in self._context.masked_ranks()}
        return frozenset(inside | self.by_hand | {at.rail[node] for node in range(at.num_nodes) if self.lost[node]})

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
        messages: What is sent, and where to receive.
        patience: See `MessageRails.exchange`.
    """

    puts: Puts
    call: Call
    messages: Messages
    patience: float

    def join(self) -> None:
        """See `Transfer.join`."""
        self.puts.receive(self.call, self.messages, self.patience)

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

    can_mask = True

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

    def nobody_masked(self) -> bool:
        """See `MessageRails.nobody_masked`."""
        return self._puts.nobody_masked()

    def unreachable(self) -> frozenset[int]:
        """See `MessageRails.unreachable`."""
        return self._puts.unreachable()

    def nodes_without(self, call: Call, has_room: bool) -> list[int]:
        """Return none: a rank may be masked, so nobody waits for all; the messages of a node without room are late."""
        return []

    def exchange(self, call: Call, messages: Messages, kept: object, patience: float) -> Transfer:
        """See `MessageRails.exchange`."""
        return self._puts.exchange(call, messages, patience)


class PutCrossing(Crossing):
    """A crossing whose calls begin as decode calls do, with messages that are put, so that different calls meet.

    Args:
        context: Context of this rank.
        topology: The nodes.
        rails: What carries the other exchanges.
        expected: The expected traffic, by which rows are cut into chunks.
        puts: What exchanges messages.
    """

    def __init__(self, context: Context, topology: Topology, rails: Rails, expected: Expected, puts: Puts) -> None:
        super().__init__(context, topology, rails, expected)
        self._puts = puts

    def open(self, call: Call, words: Words) -> Transfer:
        """See `Crossing.open`."""
        return self._puts.exchange(call, Messages(words.mine, words.headers, 0, 0, 0, 0, 0), ROWS_ACROSS)

    def routing(self, call: Call, routing: CrossingRouting, words: Words, *, opens: bool) -> Transfer | None:
        """See `Crossing.routing`. Headers are put, and the routing follows them."""
        if opens:
            self.open(call, words).join()
        return super().routing(call, routing, words, opens=False)

    def announce(self, call: Call, words: Words, chunks: Chunks, goes: int, comes: int, src_counts: int) -> Opening:
        """See `Crossing.announce`. What is said is on its way by itself then."""
        said = super().announce(call, words, chunks, goes, comes, src_counts)
        return said._replace(transfer=self.open(call, words))
