// Protocol of the decode kernels: messages between R ranks with as few round trips as possible. There is no barrier at
// entry or exit: a rank sends what it has, then waits for what it needs.
//
// Every message carries its own flag, so neither side needs a fence (as in NCCL's LL protocols):
//   packet  16 bytes of data, Lamport style: an empty slot of the receive buffer holds a sentinel (all ones), data
//           replaces it, and the reader restores it. 16 bytes are one access, so a packet arrives whole or not at all.
//   word    8 bytes, epoch in the upper half: messages at fixed addresses (routing, signatures). Never cleared.
//   note    16 bytes, epoch in the last 4: the same with 12 bytes of value (metadata of a row).
//
// A channel is one direction: 0 dispatch, 1 combine. Its epoch counts sends and lives on the device, so that a replayed
// CUDA graph keeps counting. Receive buffers are double buffered by epoch parity: send n writes to buffer n & 1 of the
// reader (words, notes and packets), once the reader has received n - 2. Readers acknowledge this (`acks`) in every
// kernel that sends, and the host guarantees that they do: before it launches send n it launches receive n - 2. A
// sender waits for an acknowledgement only if it is two calls ahead of the reader.
//
// A kernel that receives n writes `received` at its start: only later kernels of the same stream read it.
#pragma once
#include "device/sync.cuh"
#include "generated/decode_words.cuh"

template <class P>
DEV void trace_time(const P& p, u32 word) {
    if (p.trace && threadIdx.x == 0) p.trace[blockIdx.x * kTraceWords + word] = clock_ns();
}
template <class P>
DEV void trace_row(const P& p, u32 from) {
    if (p.trace && threadIdx.x % 32 == 0) atomicMax(p.trace + blockIdx.x * kTraceWords + kTraceRows + from, clock_ns());
}

// One send or receive of a channel.
struct DecodeCall {
    u32 epoch, parity;
    u32 alive;  // bit r: rank r takes part
};

// ---- packets

constexpr u32 kSentinel = 0xffffffffu;  // each word of an empty packet
constexpr u32 kUnused = 0xffffffffu;    // instead of an expert, a rank or a row: this slot has none

// Stored in place of an acknowledgement by a rank that has masked this one. It differs from every acknowledgement:
// their lower half is even.
constexpr u64 kMaskedAck = ~0ull;

DEV bool is_empty(const int4& v) {
    return (u32)v.x == kSentinel && (u32)v.y == kSentinel && (u32)v.z == kSentinel && (u32)v.w == kSentinel;
}

// Data must differ from the sentinel: 16 bytes of ones (NaNs) lose their lowest bit.
DEV int4 escape_sentinel(int4 v) {
    if (is_empty(v)) v.x = (int)0xfffffffeu;
    return v;
}

DEV void clear_packet(u8* at) { store_packet(at, make_int4(-1, -1, -1, -1)); }

// ---- waits with a deadline

struct SpinDeadline {
    u64 start = 0;
    u32 spins = 0;
};

constexpr u32 kEveryRank = (1u << kMaxRanks) - 1;
constexpr u32 kFailed = 1u << 31;  // from a poll or a wait: the group has failed
constexpr u32 kOk = 0;             // from a wait: the message has arrived
constexpr u32 kTimedOut = 1;       // from a wait: it does not come

DEV u64 waited_ns(const SpinDeadline& deadline) { return deadline.start ? clock_ns() - deadline.start : 0; }

// Returns whether a wait was so long that other blocks may have given up the peer: see agree_whether_arrived.
template <class P>
DEV bool is_long(const P& p, const SpinDeadline& deadline) {
    const u64 twice = 2 * waited_ns(deadline);
    return twice > p.timeout_ns || twice > kLongWait;
}

template <class P>
static __device__ __noinline__ u32 check_deadline(const P& p, u64& start) {
    ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return kFailed;
    const u64 now = clock_ns();
    if (!start) start = now;
    u32 late = ended_ranks(p, now, start);
    for (u32 r = 0; r < p.num_ranks; r++) {
        const u64 lost = load_relaxed(&mine->gave_up[r]);
        if (!lost || !is_alive(p, r)) continue;
        if (is_closed(lost, r)) {  // also if another block has masked it meanwhile
            late |= 1u << r;
            continue;
        }
        if (load_relaxed(&mine->masked) >> r & 1) continue;
        give_up(p, kPeerGaveUp, r, (u32)(lost >> 32), 0, 0, (u32)lost, now - start);
        return kFailed;
    }
    return now - start > p.timeout_ns ? kEveryRank : late;
}

// Returns kFailed, or the ranks for which there is no more waiting, as bits: all once the deadline has passed; before,
// those that are gone. The caller looks once more whether their message has come. Looks at clock and peers in every
// 64th poll.
template <class P>
DEV u32 late_ranks(const P& p, SpinDeadline& deadline) {
    if (++deadline.spins % 64) return 0;
    u64 start = deadline.start;  // a copy: a variable whose address a call takes would not stay in a register
    const u32 late = check_deadline(p, start);
    deadline.start = start;
    return late;
}

// Returns whether a peer whose `word` does not arrive has made another call than this rank: it has sent in another
// channel, or entered a collective kernel, and this rank has not.
template <class P>
static __device__ __noinline__ bool is_in_another_call(const P& p, u32 channel, u32 epoch, u32 peer, const u64* word) {
    const ControlBlock* mine = control_block(p, p.rank);
    const u32 entered = load_relaxed(&mine->epoch) + 1;
    u64 seen = load_relaxed(&mine->handshake[entered & 1][peer][0]);
    bool there = epoch_in(seen) == entered;
    for (u32 other = 0; other < 2 && !there; other++) {
        if (other == channel) continue;
        const u32 sent = load_relaxed(&mine->sends[other]) + 1;
        seen = load_relaxed(&mine->signatures[other][sent & 1][peer][0]);
        there = epoch_in(seen) == sent;
    }
    // A peer that has received all it needs proceeds to its next call: `word` may have arrived since it was last read.
    if (!there || has_come(word, epoch)) return false;
    give_up(p, kMismatch, peer, 0, (u32)seen, p.handshake[0], peer, 0);
    return true;
}

// Handles a peer whose message does not come. Returns true if it is masked from now on, and the call continues without
// it; false if the group has failed.
template <class P>
static __device__ __noinline__ bool mask_peer(const P& p, u32 peer, u32 code, u32 seen, u32 expected, u64 waited) {
    if (!p.mask_late) {
        give_up(p, fault_of(p, peer, code), peer, 0, seen, expected, peer, waited);
        return false;
    }
    atomicOr(&control_block(p, p.rank)->masked, 1u << peer);
    store_release(p.masked_out + peer, 1);
    // If the peer resumes, it must not send: its rows of a combine would land where those of other ranks are by then.
    for (u32 c = 0; c < 2; c++) store_relaxed(&control_block(p, peer)->acks[c][p.rank], kMaskedAck);
    return true;
}

// Returns whether the blocks have agreed that a peer's message missed the deadline.
template <class P>
DEV bool agreed_late(const P& p, u32 channel, u32 epoch, u32 peer) {
    return load_relaxed(&control_block(p, p.rank)->verdict[channel][peer]) == ((u64)epoch << 32 | 2);
}

// Makes all blocks agree whether a peer's message arrived in time: the first block to call this decides with `arrived`.
// Only blocks that have waited for long (is_long) call it: those that have not start too late to differ. Returns the
// decision.
template <class P>
static __device__ __noinline__ bool agree_whether_arrived(const P& p, u32 channel, u32 epoch, u32 peer, bool arrived) {
    u64* verdict = &control_block(p, p.rank)->verdict[channel][peer];
    u64 old = load_relaxed(verdict);
    for (;;) {
        if (epoch_in(old) == epoch) return (u32)old == 1;
        const u64 seen = atomicCAS(verdict, old, (u64)epoch << 32 | (arrived ? 1 : 2));
        if (seen == old) return arrived;
        old = seen;
    }
}

// Waits for a word of a peer's message. Returns kOk (`value` holds it), kTimedOut (the peer is masked) or kFailed.
template <class P>
DEV u32 wait_for_word(const P& p, u32 channel, u32 epoch, u32 peer, const u64* word, u32& value) {
    u64 seen = load_relaxed(word);
    SpinDeadline deadline;
    bool arrived = false;  // in another block
    while (epoch_in(seen) != epoch) {
        const u32 late = late_ranks(p, deadline);
        seen = load_relaxed(word);  // it may have arrived while this thread read the clock
        if (epoch_in(seen) == epoch) break;
        if (late == kFailed) return kFailed;
        if (p.mask_late && deadline.start && deadline.spins % 64 == 0 && agreed_late(p, channel, epoch, peer))
            return kTimedOut;
        if (late >> peer & 1) {
            // The verdict is about the first word of a message; a rank can end before it sends the rest, which then no
            // block receives.
            if (p.mask_late && !arrived && agree_whether_arrived(p, channel, epoch, peer, false)) {
                arrived = true;
                deadline.start = 0;
                continue;
            }
            const u64 waited = waited_ns(deadline);
            return mask_peer(p, peer, kLateHandshake, epoch_in(seen), epoch, waited) ? kTimedOut : kFailed;
        }
        if (deadline.start && deadline.spins % 4096 == 0 && is_in_another_call(p, channel, epoch, peer, word))
            return kFailed;
    }
    value = (u32)seen;
    if (p.mask_late && is_long(p, deadline) && !agree_whether_arrived(p, channel, epoch, peer, true)) return kTimedOut;
    return kOk;
}

// ---- sending

// The state that a block needs before it starts. One warp of each block reads it, one word per lane, all at once: a
// round trip to memory takes most of a microsecond, and a word that all warps of the GPU read takes several.
struct Snapshot {
    u32 sends, masked, failed, stopped, unused[4];
    u32 table[kPlacesWord];  // the head of the plan's table
    u32 pending[2];          // of a combine that was sent: epoch, ranks that take part
};
static_assert(sizeof(Snapshot) <= 32 * 4, "one warp reads it");

// A lane's part of the snapshot, while it is being loaded.
struct SnapshotLane {
    u32 word;  // this lane's word of Snapshot
    u64 ack;   // lane r: the acknowledgement of rank r
};

template <class P>
DEV SnapshotLane load_snapshot(const P& p, u32 channel, const i32* table, const u32* pending) {
    const ControlBlock* mine = control_block(p, p.rank);
    const u32 lane = threadIdx.x;
    SnapshotLane s = {0, 0};
    if (lane >= 32) return s;
    if (lane < 4)
        s.word = load_relaxed(lane == 0   ? &mine->sends[channel]
                              : lane == 1 ? &mine->masked
                              : lane == 2 ? &mine->failed
                                          : &mine->stopped);
    else if (lane >= 8 && lane < 8 + kPlacesWord && table) s.word = (u32)table[lane - 8];
    else if (lane >= 8 + kPlacesWord && lane < 10 + kPlacesWord && pending) s.word = pending[lane - 8 - kPlacesWord];
    if (lane < p.num_ranks) s.ack = load_acquire(&mine->acks[channel][lane]);
    return s;
}

// Returns whether the peer of this lane has received what the next send will overwrite; true in all warps but the
// first.
template <class P>
DEV bool is_buffer_free(const P& p, const SnapshotLane& s) {
    if (threadIdx.x >= 32) return true;
    const u32 sends = __shfl_sync(kAll, s.word, 0), masked = __shfl_sync(kAll, s.word, 1);
    const u32 seen = (u32)(s.ack >> (sends & 1 ? 0 : 32));  // of the next epoch's parity
    return threadIdx.x >= p.num_ranks || !(p.alive & ~masked & 1u << threadIdx.x) ||
           (s.ack != kMaskedAck && (i32)(seen - (sends - 1)) >= 0);
}

// Shares the first warp's snapshot with the block, and sets `good` to whether it holds in all threads; all threads.
DEV const Snapshot& share_snapshot(const SnapshotLane& s, bool& good) {
    __shared__ Snapshot snapshot;
    if (threadIdx.x < sizeof(Snapshot) / 4) reinterpret_cast<u32*>(&snapshot)[threadIdx.x] = s.word;
    good = __syncthreads_and(good);
    return snapshot;
}

// Returns the next send.
template <class P>
DEV DecodeCall next_call(const P& p, const Snapshot& snapshot) {
    return {snapshot.sends + 1, (snapshot.sends + 1) & 1, p.alive & ~snapshot.masked};
}

// Advances the channel's epoch once every block has read it; one thread of every block.
template <class P>
DEV void advance_epoch(const P& p, u32 channel, const DecodeCall& call) {
    ControlBlock* mine = control_block(p, p.rank);
    if (add_acquire_release(&mine->opened[channel], 1) != gridDim.x - 1) return;
    mine->opened[channel] = 0;
    mine->sends[channel] = call.epoch;
}

// Acknowledges to all peers the packets that earlier kernels of this stream have received and cleared; all threads of
// one block, after the stores that peers wait for, since a release takes time.
template <class P>
DEV void send_acks(const P& p, const DecodeCall& call) {
    ControlBlock* mine = control_block(p, p.rank);
    for (u32 i = threadIdx.x; i < 2 * p.num_ranks; i += blockDim.x) {
        const u32 peer = i / 2, c = i % 2;
        if (call.alive >> peer & 1)
            store_release(&control_block(p, peer)->acks[c][p.rank], *reinterpret_cast<const u64*>(mine->received[c]));
    }
}

// Returns a word of this call's signature; `dispatch`: see kDispatchWord.
template <class P>
DEV u32 signature_word(const P& p, u32 w, u32 dispatch) {
    return w == kDispatchWord ? dispatch : p.handshake[w];
}

// Sends the signature of this call to all peers; all threads of one block, once the buffers are free.
template <class P>
DEV void send_signature(const P& p, u32 channel, const DecodeCall& call, u32 dispatch) {
    for (u32 i = threadIdx.x; i < p.num_ranks * kSignatureWords; i += blockDim.x) {
        const u32 peer = i / kSignatureWords, w = i % kSignatureWords;
        if (call.alive >> peer & 1)
            store_relaxed(&control_block(p, peer)->signatures[channel][call.parity][p.rank][w],
                          (u64)call.epoch << 32 | signature_word(p, w, dispatch));
    }
}

// Waits until every peer has received what this send will overwrite; all threads of every block. The last block adds
// the time to p.wait_ns. Returns false if the group has failed.
template <class P>
static __device__ __noinline__ bool wait_for_acks(const P& p, u32 channel, DecodeCall& call) {
    bool good = true;
    const u32 peer = threadIdx.x;
    u32 lost = 0;
    const u64 start = clock_ns();
    if (peer < p.num_ranks && (call.alive >> peer & 1)) {
        const u64* acks = &control_block(p, p.rank)->acks[channel][peer];
        SpinDeadline deadline;
        for (u32 late = 0;;) {
            const u64 ack = load_acquire(acks);
            const u32 seen = (u32)(ack >> (call.parity ? 32 : 0));
            if (ack != kMaskedAck && (i32)(seen - (call.epoch - 2)) >= 0) break;
            if (late == kFailed) {
                good = false;
                break;
            }
            if (late >> peer & 1 || (ack == kMaskedAck && p.mask_late)) {
                good = mask_peer(p, peer, kLateHandshake, seen, call.epoch - 2, waited_ns(deadline));
                lost = 1u << peer;
                break;
            }
            late = late_ranks(p, deadline);
        }
        if (p.wait_ns && peer != p.rank && blockIdx.x == gridDim.x - 1) atomicAdd(p.wait_ns + peer, clock_ns() - start);
    }
    if (!__syncthreads_and(good)) return false;
    if (p.mask_late) {
        __shared__ u32 all_lost;
        if (threadIdx.x == 0) all_lost = 0;
        __syncthreads();
        if (lost) atomicOr(&all_lost, lost);
        __syncthreads();
        call.alive &= ~all_lost;
    }
    return true;
}

// ---- receiving

// Waits for the signatures of all peers and compares them; all threads of one block. Adds the time to p.wait_ns.
// Returns false if the group has failed.
template <class P>
DEV bool check_signatures(const P& p, u32 channel, const DecodeCall& call, u32 dispatch) {
    // One warp per peer: threads of a warp wait together, and the time of each peer is counted apart.
    for (u32 peer = threadIdx.x / 32; peer < p.num_ranks; peer += blockDim.x / 32) {
        const u32 w = threadIdx.x % 32;
        if (w >= kSignatureWords || !(call.alive >> peer & 1)) continue;
        u32 value;
        const u64 start = clock_ns();
        const u32 state = wait_for_word(p, channel, call.epoch, peer,
                                        &control_block(p, p.rank)->signatures[channel][call.parity][peer][w], value);
        if (w == 0 && peer != p.rank) {
            const u64 now = clock_ns();
            if (p.wait_ns) atomicAdd(p.wait_ns + peer, now - start);
            if (p.trace) p.trace[blockIdx.x * kTraceWords + kTraceSignature + peer] = now;
        }
        if (state == kOk && value != signature_word(p, w, dispatch)) {
            give_up(p, kMismatch, peer, w, value, signature_word(p, w, dispatch), peer, 0);
            return false;
        }
        if (state == kFailed) return false;
    }
    return true;
}

// Records that this call is received, for the acknowledgements of later kernels; one thread.
template <class P>
DEV void mark_received(const P& p, u32 channel, const DecodeCall& call) {
    control_block(p, p.rank)->received[channel][call.parity] = call.epoch;
}
