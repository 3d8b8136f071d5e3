"""Codes and words of decode calls that kernels and host share: `generated/decode_words.cuh`."""

from __future__ import annotations

from tokenferry.kernels.header import Header

HEADER = Header("generated/decode_words.cuh", "kernels/decode_words.py")

# ---- channels: first index of the decode words in the control block

DISPATCH = HEADER.constant("kDispatch", 0, "channel of dispatches")
COMBINE = HEADER.constant("kCombine", 1, "channel of combines")
EXCHANGE = HEADER.constant("kExchange", 2, "in place of a channel: exchanges of workspaces")

# ---- params.phases: bits

SEND = HEADER.constant("kSend", 1, "phases: this launch sends")
RECEIVE = HEADER.constant("kReceive", 2, "phases: this launch receives")

# ---- a plan's table: int32 words

EPOCH_WORD = HEADER.constant("kEpochWord", 0, "table: epoch of the dispatch")
ALIVE_WORD = HEADER.constant(
    "kAliveWord", 1, "table: a bit for each rank that rows were sent to; 0: the call was aborted"
)
TOKENS_WORD = HEADER.constant("kTokensWord", 8, "table: [from]: tokens of a rank; 0 if it was left out")
PLACES_WORD = HEADER.constant(
    "kPlacesWord",
    16,
    "table: [from * M + token][K]: the row of a slot on this rank; -1: none, or that of an earlier slot",
)

# ---- choices: a routing as 16-bit words, an expert or one of these

REPEATED = HEADER.constant("kRepeated", 0x8000, "bit of a choice: an earlier slot of the token names the same expert")
NONE = HEADER.constant("kNone", 0x7FFF, "choice: the slot is not used")
BAD = HEADER.constant("kBad", 0x7FFE, "choice: the index is outside [-1, E)")

# ---- counts that ranks send each other

OVERFLOWED = HEADER.constant(
    "kOverflowed", 0x80000000, "bit of a count: instead of rows, so many tokens were too many for one other node"
)

# ---- params.scale_format: how the scales of an FP8 dispatch are stored; 0: nothing is cast

SCALE_FLOAT32 = HEADER.constant("kFloat32", 1, "scale_format: float32")
SCALE_POWER_OF_TWO = HEADER.constant("kPowerOfTwo", 2, "scale_format: float32, rounded up to a power of two")
SCALE_UE8M0 = HEADER.constant("kUe8m0", 3, "scale_format: the exponents of powers of two, four in an int32")

# ---- kEncoding: how rows of a combine travel

ENCODING_SAME = HEADER.constant("kSame", 0, "kEncoding: rows as they are")
ENCODING_FP8 = HEADER.constant("kFp8", 1, "kEncoding: float8_e4m3fn and a float32 scale for 128 columns")
ENCODING_LOGFMT10 = HEADER.constant("kLogfmt10", 2, "kEncoding: ten bits a number, logarithmic")

CHUNK_COLUMNS = HEADER.constant("kChunkColumns", 512, "columns that a warp handles at a time")
FP8_PACKETS = HEADER.constant("kFp8Packets", 33, "packets of 16 bytes of a chunk in FP8")
LOGFMT10_PACKETS = HEADER.constant("kLogfmt10Packets", 42, "packets of 16 bytes of a chunk in logfmt10")
