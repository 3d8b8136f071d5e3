// How decode kernels of R ranks talk. There is no meeting: a rank sends what it has, then waits for what it needs.
//
//   packet  16 bytes of data that are their own flag: where none is under way there are 16 bytes of ones, and the
//           reader puts these back. 16 bytes are read and written as one, so a packet is there as a whole or not at all.
//   word    8 bytes, epoch in the upper half: messages of known places (routing, signatures). Never cleared.
//   note    16 bytes, epoch in the last 4: the same where 12 bytes of value are wanted.
//
// A channel is one direction: 0 dispatch, 1 combine. Its epoch counts sends, on the device, so that a replayed CUDA graph
// goes on counting. Send n writes to half n & 1 of the reader's memory (words, notes and packets), once that reader has received
// n - 2: it says so (`acks`) in every kernel that sends, and the host sees to it that it does: before it launches
// send n it launches receive n - 2. Nobody waits for an ack unless he is two calls ahead.
//
// A kernel that receives n writes `received` at once: whoever reads it is a later kernel of the stream.
#pragma once
#include "device/sync.cuh"
#include "generated/decode_words.cuh"

template <class P>
DEV void mark(const P& p, u32 word) {
    if (p.trace && threadIdx.x == 0) reinterpret_cast<u64*>(p.trace)[blockIdx.x * kTraceWords + word] = clock_ns();
}
template <class P>
DEV void mark_rows(const P& p, u32 from) {
    if (p.trace && threadIdx.x % 32 == 0)
        atomicMax(reinterpret_cast<u64*>(p.trace) + blockIdx.x * kTraceWords + kTraceRows + from, clock_ns());
}

struct Turn {
    u32 epoch, half;
    u32 alive;  // a bit for each rank that takes part
};

// ---- packets

constexpr u32 kOnes = 0xffffffffu;
constexpr u64 kMaskedAck =
    ~0ull;  // instead of an ack: its writer has let this rank go. No ack is: the lower half has even epochs

DEV bool is_empty(const int4& v) {
    return (u32)v.x == kOnes && (u32)v.y == kOnes && (u32)v.z == kOnes && (u32)v.w == kOnes;
}

// Data must not look like an empty packet: NaNs with all bits set lose the lowest one.
DEV int4 guarded(int4 v) {
    if (is_empty(v)) v.x = (int)0xfffffffeu;
    return v;
}

DEV void clear_packet(u8* at) { store_packet(at, make_int4(-1, -1, -1, -1)); }

// ---- patience

struct SpinDeadline {
    u64 start = 0;
    u32 spins = 0;
};

constexpr u32 kWait = 0, kLate = 1, kBroken = 2;

DEV u64 waited_ns(const SpinDeadline& deadline) { return deadline.start ? clock_ns() - deadline.start : 0; }

template <class P>
static __device__ __noinline__ u32 check_deadline(const P& p, u64& start) {
    ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return kBroken;
    const u64 now = clock_ns();
    if (!start) start = now;
    for (u32 r = 0; r < p.num_ranks; r++) {
        const u64 lost = load_relaxed(&mine->gave_up[r]);
        if (!lost || !is_alive(p, r) || load_relaxed(&mine->masked) >> r & 1) continue;
        give_up(p, kPeerGaveUp, r, (u32)(lost >> 32), 0, 0, (u32)lost, now - start);
        return kBroken;
    }
    return now - start > p.timeout_ns ? kLate : kWait;
}

// Whether to go on polling.
template <class P>
DEV u32 poll_deadline(const P& p, SpinDeadline& deadline) {
    if (++deadline.spins % 64) return kWait;
    u64 start = deadline.start;  // a copy: what a call may write does not stay in a register
    const u32 state = check_deadline(p, start);
    deadline.start = start;
    return state;
}

// A peer whose `word` does not come is in another call than this rank: it has sent in a channel in which this rank has not, or
// met where it has not.
template <class P>
static __device__ __noinline__ bool is_in_another_call(const P& p, u32 channel, u32 epoch, u32 peer, const u64* word) {
    const ControlBlock* mine = control_block(p, p.rank);
    const u32 met = load_relaxed(&mine->epoch) + 1, sent = load_relaxed(&mine->sends[1 - channel]) + 1;
    u64 seen = load_relaxed(&mine->handshake[met & 1][peer][0]);
    bool there = epoch_in(seen) == met;
    if (!there) {
        seen = load_relaxed(&mine->signatures[1 - channel][sent & 1][peer][0]);
        there = epoch_in(seen) == sent;
    }
    // A peer that has got what it needs goes on to its next call: what is waited for may have come since it was looked for.
    if (!there || has_come(word, epoch)) return false;
    give_up(p, kMismatch, peer, 0, (u32)seen, p.handshake[0], peer, 0);
    return true;
}

// This rank has waited in vain. True: from now on the peer is masked, and the call goes on without it.
template <class P>
static __device__ __noinline__ bool mask_peer(const P& p, u32 peer, u32 code, u32 seen, u32 expected, u64 waited) {
    if (!p.mask_late) {
        give_up(p, code, peer, 0, seen, expected, peer, waited);
        return false;
    }
    atomicOr(&control_block(p, p.rank)->masked, 1u << peer);
    store_release(reinterpret_cast<u32*>(p.masked_out) + peer, 1);
    // If it comes after all it must not send: rows of a combine go where those of other ranks go by then.
    for (u32 c = 0; c < 2; c++) store_relaxed(&control_block(p, peer)->acks[c][p.rank], kMaskedAck);
    return true;
}

// Whether the blocks have agreed that a peer's message did not come in time.
template <class P>
DEV bool given_up(const P& p, u32 channel, u32 epoch, u32 peer) {
    return load_relaxed(&control_block(p, p.rank)->verdict[channel][peer]) == ((u64)epoch << 32 | 2);
}

// All blocks have to agree whether a peer's message came in time. Who has waited for long asks; the first says.
template <class P>
static __device__ __noinline__ bool agree(const P& p, u32 channel, u32 epoch, u32 peer, bool came) {
    u64* verdict = &control_block(p, p.rank)->verdict[channel][peer];
    u64 old = load_relaxed(verdict);
    for (;;) {
        if (epoch_in(old) == epoch) return (u32)old == 1;
        const u64 seen = atomicCAS(verdict, old, (u64)epoch << 32 | (came ? 1 : 2));
        if (seen == old) return came;
        old = seen;
    }
}

// Waits for a word of a peer's message: kWait: it is here; else the peer is lost, or the group.
template <class P>
DEV u32 read_word(const P& p, u32 channel, u32 epoch, u32 peer, const u64* word, u32& value) {
    u64 seen = load_relaxed(word);
    SpinDeadline deadline;
    while (epoch_in(seen) != epoch) {
        const u32 state = poll_deadline(p, deadline);
        seen = load_relaxed(word);  // it may have come while this looked at the clock
        if (epoch_in(seen) == epoch) break;
        if (state == kBroken) return kBroken;
        if (p.mask_late && deadline.start && deadline.spins % 64 == 0 && given_up(p, channel, epoch, peer))
            return kLate;
        if (state == kLate) {
            if (p.mask_late && agree(p, channel, epoch, peer, false)) deadline.start = 0;  // another block has seen it
            else return mask_peer(p, peer, kLateHandshake, epoch_in(seen), epoch, p.timeout_ns) ? kLate : kBroken;
        }
        if (deadline.start && deadline.spins % 4096 == 0 && is_in_another_call(p, channel, epoch, peer, word))
            return kBroken;
    }
    value = (u32)seen;
    if (p.mask_late && deadline.start && 2 * waited_ns(deadline) > p.timeout_ns &&
        !agree(p, channel, epoch, peer, true))
        return kLate;
    return kWait;
}

// ---- sending

// What a block has to know before it does anything. One warp of each block reads it, a lane a word, all at once: each trip to
// memory takes most of a microsecond, and a word that all warps of the GPU read takes several.
struct Opening {
    u32 word;  // see Known
    u64 acks;  // lane r: of rank r
};

struct Known {
    u32 sends, masked, failed, stopped, unused[4];
    u32 table[kPlacesWord];  // the head of the plan's table
    u32 pending[2];          // of a combine that was sent: epoch, ranks that take part
};
static_assert(sizeof(Known) <= 32 * 4, "a warp reads it");

template <class P>
DEV Opening read_opening(const P& p, u32 channel, const u8* table, const u8* pending) {
    const ControlBlock* mine = control_block(p, p.rank);
    const u32 lane = threadIdx.x;
    Opening o = {0, 0};
    if (lane >= 32) return o;
    if (lane < 4)
        o.word = load_relaxed(lane == 0   ? &mine->sends[channel]
                              : lane == 1 ? &mine->masked
                              : lane == 2 ? &mine->failed
                                          : &mine->stopped);
    else if (lane >= 8 && lane < 8 + kPlacesWord && table) o.word = reinterpret_cast<const u32*>(table)[lane - 8];
    else if (lane >= 8 + kPlacesWord && lane < 10 + kPlacesWord && pending)
        o.word = reinterpret_cast<const u32*>(pending)[lane - 8 - kPlacesWord];
    if (lane < p.num_ranks) o.acks = load_acquire(&mine->acks[channel][lane]);
    return o;
}

// Whether all peers have received what the next send will overwrite, as far as the first warp knows.
template <class P>
DEV bool has_room(const P& p, const Opening& o) {
    if (threadIdx.x >= 32) return true;
    const u32 sends = __shfl_sync(kAll, o.word, 0), masked = __shfl_sync(kAll, o.word, 1);
    const u32 seen = (u32)(o.acks >> (sends & 1 ? 0 : 32));  // the next epoch's half
    return threadIdx.x >= p.num_ranks || !(p.alive & ~masked & 1u << threadIdx.x) ||
           (o.acks != kMaskedAck && (i32)(seen - (sends - 1)) >= 0);
}

// Hands out what the first warp has read; all threads of a block. `good` becomes whether it is so in all of them.
DEV const Known& share_opening(const Opening& o, bool& good) {
    __shared__ Known known;
    if (threadIdx.x < sizeof(Known) / 4) reinterpret_cast<u32*>(&known)[threadIdx.x] = o.word;
    good = __syncthreads_and(good);
    return known;
}

// The next send.
template <class P>
DEV Turn next_turn(const P& p, const Known& known) {
    return {known.sends + 1, (known.sends + 1) & 1, p.alive & ~known.masked};
}

// Moves the epoch on once every block has read it; one thread of every block.
template <class P>
DEV void close_send(const P& p, u32 channel, const Turn& turn) {
    ControlBlock* mine = control_block(p, p.rank);
    if (add_acquire_release(&mine->opened[channel], 1) != gridDim.x - 1) return;
    mine->opened[channel] = 0;
    mine->sends[channel] = turn.epoch;
}

// Tells all peers what this rank has received: packets that earlier kernels of this stream have cleared; all threads of one block,
// when it has done what others wait for, since a release takes its time.
template <class P>
DEV void send_acks(const P& p, const Turn& turn) {
    ControlBlock* mine = control_block(p, p.rank);
    for (u32 i = threadIdx.x; i < 2 * p.num_ranks; i += blockDim.x) {
        const u32 peer = i / 2, c = i % 2;
        if (turn.alive >> peer & 1)
            store_release(&control_block(p, peer)->acks[c][p.rank], *reinterpret_cast<const u64*>(mine->received[c]));
    }
}

// A word of this call's signature; `dispatch`: see kDispatchWord.
template <class P>
DEV u32 signature_word(const P& p, u32 w, u32 dispatch) {
    return w == kDispatchWord ? dispatch : p.handshake[w];
}

// Tells all peers the signature of this call; all threads of one block, once there is room.
template <class P>
DEV void send_signature(const P& p, u32 channel, const Turn& turn, u32 dispatch) {
    for (u32 i = threadIdx.x; i < p.num_ranks * kSignatureWords; i += blockDim.x) {
        const u32 peer = i / kSignatureWords, w = i % kSignatureWords;
        if (turn.alive >> peer & 1)
            store_relaxed(&control_block(p, peer)->signatures[channel][turn.half][p.rank][w],
                          (u64)turn.epoch << 32 | signature_word(p, w, dispatch));
    }
}

// Waits until every peer has received what this send will overwrite; all threads of every block. The last one counts the time.
// False: broken.
template <class P>
static __device__ __noinline__ bool wait_for_room(const P& p, u32 channel, Turn& turn) {
    bool good = true;
    const u32 peer = threadIdx.x;
    u32 lost = 0;
    const u64 start = clock_ns();
    if (peer < p.num_ranks && (turn.alive >> peer & 1)) {
        const u64* acks = &control_block(p, p.rank)->acks[channel][peer];
        SpinDeadline deadline;
        for (;;) {
            const u64 ack = load_acquire(acks);
            const u32 seen = (u32)(ack >> (turn.half ? 32 : 0));
            if (ack != kMaskedAck && (i32)(seen - (turn.epoch - 2)) >= 0) break;
            const u32 state = ack == kMaskedAck && p.mask_late ? kLate : poll_deadline(p, deadline);
            if (state == kWait) continue;
            if (state == kBroken || !mask_peer(p, peer, kLateHandshake, seen, turn.epoch - 2, p.timeout_ns))
                good = false;
            else lost = 1u << peer;
            break;
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
        turn.alive &= ~all_lost;
    }
    return true;
}

// ---- receiving

// Waits for the signatures of all peers and compares them; one block. Counts the time. False: broken.
template <class P>
DEV bool check_signatures(const P& p, u32 channel, const Turn& turn, u32 dispatch) {
    // A warp a peer: threads of a warp wait together, and each peer's time is to be its own.
    for (u32 peer = threadIdx.x / 32; peer < p.num_ranks; peer += blockDim.x / 32) {
        const u32 w = threadIdx.x % 32;
        if (w >= kSignatureWords || !(turn.alive >> peer & 1)) continue;
        u32 value;
        const u64 start = clock_ns();
        const u32 state = read_word(p, channel, turn.epoch, peer,
                                    &control_block(p, p.rank)->signatures[channel][turn.half][peer][w], value);
        if (w == 0 && peer != p.rank) {
            const u64 now = clock_ns();
            if (p.wait_ns) atomicAdd(p.wait_ns + peer, now - start);
            if (p.trace) reinterpret_cast<u64*>(p.trace)[blockIdx.x * kTraceWords + kTraceSignature + peer] = now;
        }
        if (state == kWait && value != signature_word(p, w, dispatch)) {
            give_up(p, kMismatch, peer, w, value, signature_word(p, w, dispatch), peer, 0);
            return false;
        }
        if (state == kBroken) return false;
    }
    return true;
}

template <class P>
DEV void mark_received(const P& p, u32 channel, const Turn& turn) {
    control_block(p, p.rank)->received[channel][turn.half] = turn.epoch;
}
