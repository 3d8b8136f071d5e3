// The board: the control words at the start of every window. Peers write what is theirs, the owner reads.
//
// Every word that peers wait for carries the epoch: nothing is ever cleared. The epoch counts kernels that meet; it lives
// on the device, so that a replayed CUDA graph goes on counting.
#pragma once
#include "device/ptx.cuh"

constexpr u32 kMaxRanks = 8;
constexpr u32 kMaxExperts = 4096;
constexpr u32 kHandshakeWords = 32;
constexpr u32 kMaxLanded = 4096;

// A card is what one rank tells another at the start of a kernel: the signature, which has to be the same on both sides,
// then what the other has to know. Word n of the signature has its name in kernels/control_block.py.
constexpr u32 kSignatureWords = 15;
constexpr u32 kDispatchWord =
    14;  // collect: the epoch of the dispatch that it belongs to; ranks may not mix up two of them
constexpr u32 kRowsWord = 15;     // rows that the sender of the card will move to (or has of) its reader
constexpr u32 kFirstOffset = 16;  // from here on: offsets in the sender's window, in units of 16 bytes; or counts
constexpr u32 kBlocksWord = 31;   // blocks of the sender's kernel: so many will say that they are done

struct ControlBlock {
    u64 handshake[2][kMaxRanks][kHandshakeWords];  // [epoch parity][from][word]: epoch << 32 | value
    u64 counts[2][kMaxRanks][kMaxExperts];         // [epoch parity][from][expert]: epoch << 32 | rows for that expert
    u64 gave_up[kMaxRanks];                        // [from]: 0, or code << 32 | the rank that it blames; never cleared
    // Decode calls; see device/decode.cuh. [channel]: 0 dispatch, 1 combine.
    u64 signatures[2][2][kMaxRanks][kSignatureWords + 1];  // [channel][epoch parity][from][word]: epoch << 32 | value
    u64 acks[2][kMaxRanks];     // [channel][from]: the last odd epoch that it has received << 32 | the last even one
    u64 verdict[2][kMaxRanks];  // [channel][from]: epoch << 32 | 1 if its message came in time, 2 if not
    u32 received[2][2];         // [channel][epoch parity]: what this rank has received
    u32 sends[2];               // [channel]: epoch of this rank's last send
    u32 opened[2];              // [channel]: blocks of a running send that know its epoch
    u32 masked;                 // a bit for each rank that decode calls leave out
    u32 stopped;                // not 0: a call came to nothing; so do those behind it, until its host has raised that
    u32 done[kMaxRanks];        // [from]: blocks of all its kernels whose work on this rank is complete
    u32 landed[kMaxRanks][kMaxLanded];  // [from][unit]: epoch of the last `push` that brought all rows of the unit
    // From here on for this rank's own kernels.
    u32 expected[kMaxRanks];  // [from]: what `done` was when the last kernel ended
    u32 epoch;                // of the last kernel that met and ended
    u32 arrived;              // blocks of a running `count` that have ended
    u32 failed;               // not 0: the group is broken, kernels return at once
    u32 bad_slot;             // complement of the least token * K + slot that holds a bad expert; 0: none
    u32 claimed;              // units that warps of the running kernel have taken beyond their first ones
    u32 pushed;               // `push`: the same of warps that push
    u32 unused[2];
    u8 rest[(1 << 20) - (2 * kMaxRanks * (kHandshakeWords + kMaxExperts) + kMaxRanks) * 8 - (2 * kMaxRanks + 8) * 4 -
            (4 * kMaxRanks * (kSignatureWords + 1) + 4 * kMaxRanks) * 8 - 10 * 4 - kMaxRanks * kMaxLanded * 4];
};
static_assert(sizeof(ControlBlock) == 1 << 20, "kernels/control_block.py says how large a board is");

// What a kernel found wrong, in pinned host memory; `code` is written last.
struct Record {
    u32 code, call_number, peer, word, seen, expected, blamed, waited_ms;
};

// codes; kernels/control_block.py has their twins
constexpr u32 kLateHandshake = 1;  // peer's card did not come: seen and expected are epochs
constexpr u32 kLateRows = 2;       // peer did not say that its rows are complete
constexpr u32 kMismatch = 3;       // word of the card differs
constexpr u32 kPeerGaveUp = 4;     // peer gave up, because of rank `blamed`
constexpr u32 kBadRouting = 5;     // word: token, peer: slot, seen: the index
constexpr u32 kOverflow = 6;       // peer: the rank with most rows, seen: how many, expected: the room
