"""The control block, the handshake, and the reports of kernels to the host, declared once for Python and C++.

A window begins with its control block: words that the kernels of the peers write and those of the owner read. Every
word that is waited for carries an epoch, so nothing is ever cleared. The epoch counts the collective kernels; it lives
on the device, so that a CUDA graph that is replayed goes on counting.

At the start of a collective kernel each rank writes its *handshake* to every peer: first the signature, which has to be
the same on all ranks, then what the peer needs to know, such as where it may write. Class ``Signature`` of
backends/cuda/signature.py names the words of the signature.

Kernels get these declarations as ``generated/control_block.cuh``.
"""

from __future__ import annotations

import enum

from tokenferry.kernels.header import Field, Header

HEADER = Header("generated/control_block.cuh", "kernels/control_block.py")

# ---- sizes

MAX_RANKS = HEADER.constant("kMaxRanks", 8, "ranks of a node")
MAX_EXPERTS = 4096
"""Experts of a group."""
MAX_NODES = 256
"""Nodes of a group."""
NODE_WORDS = MAX_NODES // 32
"""Words with a bit for each node."""
MAX_COUNTS = MAX_EXPERTS + MAX_NODES * MAX_RANKS
"""Counts that a rank sends to each other one in a dispatch: those of all experts and ranks of the group."""
MAX_TOP_K = 64
"""Experts of a token."""
MAX_LANDED = 4096
"""Units of rows that one rank can push to another in a combine."""
CONTROL_BLOCK_BYTES = 1 << 20
"""The heap begins behind these bytes of a window."""
OFFSET_BYTES = HEADER.constant("kOffsetBytes", 16, "offsets in handshakes are in units of this many bytes")

# ---- places of rows on any rank, in 32 bits

RANK_SHIFT = HEADER.constant("kRankShift", 28, "a row on any rank is rank << kRankShift | its place there; -1: none")
PLACE_MASK = HEADER.constant("kPlaceMask", (1 << RANK_SHIFT) - 1, "the bits of the place in it")

# ---- words of a handshake

HANDSHAKE_WORDS = HEADER.constant("kHandshakeWords", 32, "words of a handshake")
SIGNATURE_WORDS = HEADER.constant(
    "kSignatureWords", 15, "the first words of a handshake, which are the same on all ranks"
)
DISPATCH_WORD = HEADER.constant(
    "kDispatchWord", 14, "decode combine: the epoch of the dispatch that it belongs to; the kernel fills it in"
)
ROWS_WORD = HEADER.constant("kRowsWord", 15, "rows that the sender moves to (or has from) the reader; compared, too")
FIRST_OFFSET = 16
"""The first word that is not compared; each kernel uses the words from here on in its own way."""
BLOCKS_WORD = HEADER.constant("kBlocksWord", 31, "blocks of the sender's kernel, each of which adds 1 to `done`")

RECV_ROWS_WORD = HEADER.constant("kRecvRowsWord", FIRST_OFFSET, "dispatch: offset of the sender's rows")
RECV_SCALE_WORD = HEADER.constant("kRecvScaleWord", FIRST_OFFSET + 1, "dispatch: offset of its scales")
RECV_WEIGHTS_WORD = HEADER.constant("kRecvWeightsWord", FIRST_OFFSET + 2, "dispatch: offset of its weights")
RECV_IDS_WORD = HEADER.constant("kRecvIdsWord", FIRST_OFFSET + 3, "first dispatch: offset of its expert ids")
RECV_SRC_TOKEN_WORD = HEADER.constant("kRecvSrcTokenWord", FIRST_OFFSET + 4, "first dispatch: offset of its src_token")
RECV_ROW_IDX_WORD = HEADER.constant("kRecvRowIdxWord", FIRST_OFFSET + 5, "first dispatch: offset of its row_idx")

COMBINE_ROWS_WORD = HEADER.constant(
    "kCombineRowsWord",
    FIRST_OFFSET,
    "combine: offset of the sender's rows (combine_pull), or of memory for pushed ones",
)
COMBINE_WEIGHTS_WORD = HEADER.constant("kCombineWeightsWord", FIRST_OFFSET + 1, "combine: offset of its weights")
START_WORD = HEADER.constant("kStartWord", FIRST_OFFSET + 2, "combine_push: rows of the sender before the reader's")
SHIFT_WORD = HEADER.constant("kShiftWord", FIRST_OFFSET + 3, "combine_push: log2 of the rows of a unit that it expects")
ROWS_AT_WORD = HEADER.constant(
    "kRowsAtWord", FIRST_OFFSET + 4, "combine_push: offset of its rows if peers fetch them; 0: it pushes them"
)
CAPACITY_WORD = HEADER.constant(
    "kCapacityWord", FIRST_OFFSET + 5, "combine_push: rows from the reader that it has space for"
)

# ---- words of an offer: what ranks tell each other about their workspaces (see share_workspace)

OFFER_SIZES_WORD = SIGNATURE_WORDS
"""After the signature: the sizes of the workspace, in lines of 128 bytes."""
OFFER_OFFSET_WORD = HEADER.constant(
    "kOfferOffsetWord", OFFER_SIZES_WORD + 4, "where it lies, as an offset; 0: the sender has no room for it"
)
OFFER_WORDS = HEADER.constant("kOfferWords", OFFER_OFFSET_WORD + 1, "words of an offer")
SIZES_WORD = HEADER.constant("kSizesWord", 30, "in place of a word in the record of a mismatch: the sizes differ")

# ---- the control block


def _fields() -> list[Field]:
    halves, R = 2, MAX_RANKS  # the parity of an epoch chooses the half
    fields = [
        Field("handshake", "u64", (halves, R, HANDSHAKE_WORDS), "[parity][from][word]: epoch << 32 | value"),
        Field(
            "counts",
            "u64",
            (halves, R, MAX_COUNTS),
            "[parity][from][segment, then expert or rank]: epoch << 32 | rows for it",
        ),
        Field(
            "gave_up",
            "u64",
            (R,),
            "[from]: 0, or fault << 32 | the rank that it blames (itself: it closed the group); never cleared",
        ),
        # Decode calls, see device/decode.cuh. [channel]: 0 dispatch, 1 combine.
        Field(
            "signatures",
            "u64",
            (2, halves, R, SIGNATURE_WORDS + 1),
            "[channel][parity][from][word]: epoch << 32 | value",
        ),
        Field("acks", "u64", (2, R), "[channel][from]: the last odd epoch that it received << 32 | the last even one"),
        Field("offers", "u64", (halves, R, OFFER_WORDS), "[parity][from][word]: exchange << 32 | value"),
        Field("workspace", "u64", (), "exchange in which this rank's workspace was made << 32 | its members; 0: none"),
        Field("verdict", "u64", (3, R), "[channel or kExchange][from]: epoch << 32 | 1 if it came in time, 2 if not"),
        Field(
            "planned",
            "u64",
            (),
            "dispatch_fused: epoch of the last plan << 32 | whether its rows fit; for the other blocks of the kernel",
        ),
        Field("received", "u32", (2, halves), "[channel][parity]: the epoch that this rank received last"),
        Field("sends", "u32", (2,), "[channel]: epoch of this rank's last send"),
        Field("opened", "u32", (2,), "[channel]: blocks of a running send that have read its epoch"),
        Field("masked", "u32", (), "a bit for each rank that decode calls leave out"),
        Field("done", "u32", (R,), "[from]: blocks of all its kernels whose work on this rank is complete"),
        Field("landed", "u32", (R, MAX_LANDED), "[from][unit]: epoch of the last combine_push that wrote the unit"),
        # From here on used by the owner's kernels only.
        Field("expected", "u32", (R,), "[from]: the value of `done` when the last kernel ended"),
        Field("epoch", "u32", (), "epoch of the last collective kernel that ended"),
        Field("arrived", "u32", (), "blocks of a running dispatch_notify or dispatch_layout that have ended"),
        # Across nodes these two are sent along with rows.
        Field("stopped", "u32", (), "1: a call was aborted; later kernels return at once until the host clears this"),
        Field("failed", "u32", (), "0, or the fault that broke the group: kernels return at once"),
        Field("shares", "u32", (), "number of the last exchange of workspaces that ended"),
        Field("members", "u32", (), "a bit for each rank whose offer came in it"),
        Field("bad_slot", "u32", (), "complement of the least token * K + slot with a bad expert; 0: none"),
        Field("claimed", "u32", (), "units that warps of the running kernel have taken beyond their first ones"),
        Field("pushed", "u32", (), "combine_push: units that pushing warps have taken beyond their first ones"),
        Field("layout_counts", "u32", (MAX_COUNTS + MAX_NODES,), "dispatch_layout: tokens of experts, ranks, nodes"),
        Field("crossed", "u32", (), "rail_send: number of the last exchange with other nodes"),
        Field("packed", "u32", (), "decode_pack: number of the last decode dispatch"),
        Field("masked_nodes", "u32", (NODE_WORDS,), "a bit for each node whose rail peer decode calls leave out"),
        Field("untold_nodes", "u32", (NODE_WORDS,), "those of them that a kernel has masked, and not notified yet"),
    ]
    rest = CONTROL_BLOCK_BYTES - sum(field.num_bytes for field in fields)
    return [*fields, Field("rest", "u8", (rest,), "the rest, up to the heap")]


CONTROL_BLOCK_OFFSETS = HEADER.struct("ControlBlock", _fields()).offsets
"""Offset of each field in the control block, in bytes."""

# ---- the record of a fault


class Fault(enum.IntEnum):
    """Codes of faults that kernels find."""

    late_handshake = HEADER.constant("kLateHandshake", 1, "peer's handshake did not come: seen, expected are epochs")
    late_rows = HEADER.constant("kLateRows", 2, "peer did not announce that its rows are complete")
    mismatch = HEADER.constant("kMismatch", 3, "this word of peer's handshake differs")
    peer_gave_up = HEADER.constant("kPeerGaveUp", 4, "peer gave up, because of rank `blamed`; word: its fault")
    bad_routing = HEADER.constant("kBadRouting", 5, "word: the token, peer: the slot, seen: the index")
    overflow = HEADER.constant("kOverflow", 6, "peer: the rank with the most rows, seen: how many, expected: its limit")
    peer_ended = HEADER.constant("kPeerEnded", 7, "the process of peer has ended: seen, expected are epochs")
    peer_closed = HEADER.constant("kPeerClosed", 8, "peer has closed the group: seen, expected are epochs")
    node_gave_up = HEADER.constant(
        "kNodeGaveUp", 9, "rank `word` of the whole group sent undefined data; seen: its fault"
    )
    node_mismatch = HEADER.constant(
        "kNodeMismatch",
        11,
        "this word of what rank `blamed` of the whole group said about its call differs; peer: itself",
    )
    node_overflow = HEADER.constant(
        "kNodeOverflow",
        12,
        "peer: a rank of the whole group, seen: how many tokens it had for one other node, expected: its limit",
    )
    too_many_nodes = HEADER.constant(
        "kTooManyNodes", 10, "word: the token, seen: how many nodes its experts lie on, expected: its limit"
    )
    late_node = HEADER.constant(
        "kLateNode", 13, "rank `word` of the whole group has put nothing: seen, expected are numbers of exchanges"
    )


RECORD = HEADER.struct(
    "Record",
    [
        Field("code", "u32", (), "a fault; written last. 0: none"),
        Field("call_number", "u32", (), "number of the call that found it"),
        *(Field(name, "u32", (), "depends on the code") for name in ("peer", "word", "seen", "expected", "blamed")),
        Field("waited_ms", "u32", (), "how long the kernel waited"),
        Field("ended", "u32", (), "a bit for each rank whose process has ended; written by the host"),
    ],
)
"""The first fault of a group, and what the host knows about the processes of its peers; in pinned memory."""
RECORD_WORDS = RECORD.num_bytes // 4
ENDED_WORD = RECORD.offsets["ended"] // 4
"""The word ``ended``; those before it are the fault."""

# ---- what dispatch_notify reports to the host, behind the record

HOST_RECEIVED_WORD = HEADER.constant("kHostReceivedWord", 1, "R words: rows from each rank; word 0 is the call number")
HOST_SENT_WORD = HEADER.constant("kHostSentWord", HOST_RECEIVED_WORD + MAX_RANKS, "R words: rows to each rank")
HOST_MOST_WORD = HEADER.constant(
    "kHostMostWord", HOST_SENT_WORD + MAX_RANKS, "rows that the fullest rank needs space for; compare row_limit"
)
HOST_UNITS_WORD = HEADER.constant(
    "kHostUnitsWord", HOST_MOST_WORD + 1, "across nodes: units of the longest segment of any rank of the node; else 0"
)
HOST_EXPERTS_WORD = HEADER.constant("kHostExpertsWord", HOST_UNITS_WORD + 1, "L words: rows of each local expert")

# ---- across nodes: what dispatch_split reports to the host, in memory of its own, and to its rail peers

RAIL_SPACE_WORD = HEADER.constant(
    "kRailSpaceWord", ROWS_WORD + 1, "rows from the reader that the sender expects along its plan"
)
RAIL_WORDS = HEADER.constant(
    "kRailWords", RAIL_SPACE_WORD + 1, "words for a rail peer: the signature; in kRowsWord the rows for it; the above"
)
NOTHING_CAME = HEADER.constant("kNothingCame", 0xFFFFFFFF, "in place of the state of a rail peer")
HOST_ROWS_WORD = HEADER.constant("kHostRowsWord", 1, "rows to all ranks; word 0 is the call number")
HOST_NODES_WORD = HEADER.constant("kHostNodesWord", 2, "N words: tokens for each node")
HOST_CAME_WORD = HEADER.constant("kHostCameWord", 1, "N words: tokens from each node; word 0 is the call number")

# ---- across nodes, where ranks put into each other's memory: see device/rails.cuh

MESSAGE_HEAD_BYTES = HEADER.constant("kMessageHead", 128, "bytes of a message before its body: kRailWords and a state")
RAIL_CHUNK_BYTES = HEADER.constant(
    "kRailChunk", 1 << 15, "bytes of a body that are put together, with a flag of theirs"
)
MASKED_BODY = HEADER.constant(
    "kMaskedBody", 0xFFFFFFFF, "in place of the bytes of a body: the sender leaves the reader out"
)

# ---- the timeline of a decode kernel: [blocks][kTraceWords], nanoseconds of the GPU's clock

TRACE_WORDS = HEADER.constant("kTraceWords", 32, "words of a block in a timeline, in nanoseconds")
TRACE = {
    "start": HEADER.constant("kTraceStart", 0, "the block has begun"),
    "ready": HEADER.constant("kTraceReady", 1, "the peers' buffers are free"),
    "sent": HEADER.constant("kTraceSent", 2, "warp 0 has sent its rows"),
    "counts": HEADER.constant("kTraceCounts", 3, "dispatch: the counts of all ranks have arrived"),
    "end": HEADER.constant("kTraceEnd", 4, "warp 0 is done"),
}
TRACE_SIGNATURE = HEADER.constant("kTraceSignature", 8, "[from]: its signature arrived; last block only")
TRACE_ROWS = HEADER.constant("kTraceRows", 16, "[from]: its last row arrived")

# ---- params

COMMON = (
    ("windows", f"ptr:u8[{MAX_RANKS}]"),
    ("record", "ptr:struct Record"),
    ("timeout_ns", "u64"),
    ("rank", "u32"),
    ("num_ranks", "u32"),
    ("wait_ns", "ptr:u64"),
    ("alive", "u32"),
    ("call_number", "u32"),
    ("handshake", f"u32[{HANDSHAKE_WORDS}]"),
)
"""The fields that every params struct begins with.

Windows of all ranks; the host's record; the deadline of a wait; this rank; R. Then what differs from call to call:
``[R]`` sums of nanoseconds waited for each rank, or null; a bit for each rank that takes part; the number of the call;
this rank's handshake. A kernel's own fields follow, first those that differ from call to call: one write sets them all.
"""
