// How the collective kernels of R ranks start and end together. All functions work on any params struct that begins
// with COMMON of kernels/control_block.py, which also declares the control block, the handshake and the record.
//
//   entry_sync  publish_handshake writes this rank's handshake to every peer; read_handshakes waits for those of all
//               peers, in every block. The handshake of a rank says that all its earlier work is done: the memory that
//               it offers may be read, and the memory where it receives rows may be written.
//   exit_sync   Every block announces to every rank that its work there is complete; block 0 of each rank waits for all
//               blocks of all ranks. So when the kernel ends, the peers' writes to this rank have arrived, and what
//               they read here may be overwritten.
//
// Why no handshake is overwritten before it is read: handshakes of epoch n lie in half n & 1. Rank a writes those of
// epoch n + 2 after entry_sync of its kernel n + 1, so after its peer b has published epoch n + 1, and b does that
// after its own kernel n has ended.
//
// Every wait has a deadline. A rank that gives up writes the record for its host, announces the fault to its peers,
// marks its own control block as failed, and returns; later kernels return at once. Kernels never trap: the CUDA
// context stays usable. A wait for a peer whose process has ended, or that has closed the group, ends after kLongWait
// instead.
#pragma once
#include "device/ptx.cuh"
#include "generated/control_block.cuh"

template <class P>
DEV ControlBlock* control_block(const P& p, u32 rank) {
    return reinterpret_cast<ControlBlock*>(p.windows[rank]);
}

// Memory in the window of a rank, at an offset that this rank put into its handshake.
template <class T, class P>
DEV T* at_offset(const P& p, u32 rank, u32 offset) {
    return reinterpret_cast<T*>(p.windows[rank] + (u64)offset * kOffsetBytes);
}

template <class P>
DEV bool is_alive(const P& p, u32 rank) {
    return rank < p.num_ranks && (p.alive >> rank & 1);
}

// ---- faults

// The host reads a record once `code` is not 0, so the code is written last.
template <class P>
DEV void record_fault(const P& p, u32 code, u32 peer, u32 word, u32 seen, u32 expected, u32 blamed, u64 waited_ns) {
    Record* record = p.record;
    record->call_number = p.call_number;
    record->peer = peer;
    record->word = word;
    record->seen = seen;
    record->expected = expected;
    record->blamed = blamed;
    record->waited_ms = (u32)(waited_ns / 1000000);
    fence_system();
    store_release(&record->code, code);
}

// Breaks the group. Only its first fault is recorded: the others follow from it.
template <class P>
static __device__ __noinline__ void give_up(const P& p, u32 code, u32 peer, u32 word, u32 seen, u32 expected,
                                            u32 blamed, u64 waited_ns) {
    if (atomicCAS(&control_block(p, p.rank)->failed, 0u, code) != 0) return;
    record_fault(p, code, peer, word, seen, expected, blamed, waited_ns);
    // A rank that gives up because a peer did passes on the original fault, so that all ranks report the same.
    const u32 culprit = code == kPeerGaveUp ? blamed : peer, cause = code == kPeerGaveUp ? word : code;
    for (u32 r = 0; r < p.num_ranks; r++)
        if (r != p.rank && is_alive(p, r))
            store_release(&control_block(p, r)->gave_up[p.rank], (u64)cause << 32 | culprit);
}

// ---- peers that are gone

// Waits that last longer, in nanoseconds, look whether the peer's process has ended. Less than any deadline that makes
// sense, and more than the blocks of a kernel start apart.
constexpr u64 kLongWait = 1u << 26;

// Returns the ranks whose processes have ended, as bits. Their host word is read about once a millisecond, and only by
// threads that have waited for long, since a read of host memory takes microseconds. What those ranks have sent is seen
// by loads that follow.
template <class P>
static __device__ __noinline__ u32 ended_ranks(const P& p, u64 now, u64 start) {
    if (now - start < kLongWait || (now >> 16) % 16) return 0;
    const u32 ended = load_relaxed(&p.record->ended);
    if (ended) fence_system();
    return ended;
}

// Returns whether `lost`, of ControlBlock::gave_up, says that rank r has closed the group. It has completed its calls
// before.
DEV bool is_closed(u64 lost, u32 r) { return lost == ((u64)kPeerClosed << 32 | r); }

// Returns the fault of a peer whose message does not come: `code`, unless more is known.
template <class P>
static __device__ __noinline__ u32 fault_of(const P& p, u32 peer, u32 code) {
    if (is_closed(load_relaxed(&control_block(p, p.rank)->gave_up[peer]), peer)) return kPeerClosed;
    return load_relaxed(&p.record->ended) >> peer & 1 ? kPeerEnded : code;
}

// ---- waits

DEV u32 epoch_in(u64 word) { return (u32)(word >> 32); }
DEV u32 epoch_in(u32 word) { return word; }

// Looks at a word once more before a fault is declared: it may have arrived since, and then its writer has gone on to
// other work, so that what was seen of that writer afterwards proves nothing.
template <class W>
DEV bool has_come(const W* word, u32 epoch) {
    fence_system();
    return epoch_in(load_relaxed(word)) == epoch;
}

// Returns whether to go on polling a word: false if the group is broken, or breaks now. `start`: 0 on the first call;
// `times`: the deadline, as a multiple of the usual one.
template <class P, class W>
DEV bool may_wait(const P& p, const W* word, u32 epoch, u32 peer, u32 code, u64& start, u32 times) {
    ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return false;
    const u64 now = clock_ns();
    if (!start) start = now;
    bool late = now - start > times * p.timeout_ns || ended_ranks(p, now, start) >> peer & 1;
    for (u32 r = 0; r < p.num_ranks; r++) {
        const u64 lost = load_relaxed(&mine->gave_up[r]);
        if (!lost) continue;
        if (is_closed(lost, r)) {
            late |= r == peer;  // others need not wait for a rank that has done its part
        } else if (!has_come(word, epoch)) {
            give_up(p, kPeerGaveUp, r, (u32)(lost >> 32), epoch_in(load_relaxed(word)), epoch, (u32)lost, now - start);
            return false;
        }
    }
    if (!late || has_come(word, epoch)) return true;
    give_up(p, fault_of(p, peer, code), peer, 0, epoch_in(load_relaxed(word)), epoch, peer, now - start);
    return false;
}

// Polls until `word` carries `epoch` in its upper half (u64) or equals it (u32). Returns false if the group is broken.
// Orders nothing: a caller that reads the memory which the word announces needs a fence first.
template <class P, class W>
DEV bool wait_for(const P& p, const W* word, u32 epoch, u32 peer, u32 code, W& value, u32 times = 1) {
    u64 start = 0;
    for (u32 spins = 1;; spins++) {
        value = load_relaxed(word);
        if (epoch_in(value) == epoch) return true;
        if (spins % 128 == 0 && !may_wait(p, word, epoch, peer, code, start, times)) return false;
    }
}

// ---- whether a kernel runs at all

template <class P>
DEV u32 next_epoch(const P& p) {
    return load_relaxed(&control_block(p, p.rank)->epoch) + 1;
}

// Returns whether all kernels are no-ops: the group is broken, or a call was aborted. The host may have launched more
// calls before it noticed; they would be matched with the wrong calls of the peers.
template <class P>
DEV bool is_stopped(const P& p) {
    const ControlBlock* mine = control_block(p, p.rank);
    return load_relaxed(&mine->failed) || load_relaxed(&mine->stopped);
}

// Returns whether this kernel is a no-op: because of is_stopped, or because its plan was aborted. `counts` are counts
// of the plan: an aborted dispatch leaves -1 there, so that all later calls with its plan are no-ops, too.
template <class P>
DEV bool must_skip(const P& p, const i64* counts) {
    return is_stopped(p) || *counts < 0;
}

// Aborts this call and all that are queued behind it, until the host clears `stopped`; called by one thread.
template <class P>
DEV void stop(const P& p) {
    control_block(p, p.rank)->stopped = 1;
}

// ---- entry_sync

// Writes this rank's handshake to every peer; called by all threads of one block. `word(i, peer)` returns word i.
template <class P, class F>
DEV void publish_handshake(const P& p, u32 epoch, F word) {
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        if (is_alive(p, peer))
            store_release(&control_block(p, peer)->handshake[epoch & 1][p.rank][w], (u64)epoch << 32 | word(w, peer));
    }
}

// Waits for the handshakes of all peers and compares their signatures; called by all threads of a block. Returns false
// if the group is broken. `handshakes` is shared memory; those of ranks that do not take part become zeros.
// `rows(peer)` returns what this rank expects in kRowsWord. One block of a kernel is `timed`: it adds the time that it
// waits to p.wait_ns.
template <class P, class F>
DEV bool read_handshakes(const P& p, u32 epoch, u32 (*handshakes)[kHandshakeWords], bool timed, F rows) {
    __shared__ u32 first_wrong;
    if (threadIdx.x == 0) first_wrong = ~0u;
    bool good = true;
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        u64 value = 0;
        const u64 start = timed && p.wait_ns ? clock_ns() : 0;
        if (is_alive(p, peer) && good)
            good = wait_for(p, &control_block(p, p.rank)->handshake[epoch & 1][peer][w], epoch, peer, kLateHandshake,
                            value);
        if (start && w == 0 && peer != p.rank) atomicAdd(p.wait_ns + peer, clock_ns() - start);
        handshakes[peer][w] = (u32)value;
    }
    fence_system();
    if (!__syncthreads_and(good)) return false;
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        if (w > kRowsWord || !is_alive(p, peer)) continue;
        if (handshakes[peer][w] != (w == kRowsWord ? rows(peer) : p.handshake[w]))
            atomicMin(&first_wrong, i);  // only the first is reported
    }
    __syncthreads();
    if (first_wrong == ~0u) return true;
    if (threadIdx.x == 0) {
        const u32 peer = first_wrong / kHandshakeWords, w = first_wrong % kHandshakeWords;
        give_up(p, kMismatch, peer, w, handshakes[peer][w], w == kRowsWord ? rows(peer) : p.handshake[w], peer, 0);
    }
    return false;
}

// ---- exit_sync

// Returns whether this is the last block of the grid to get here; called by all threads of every block.
template <class P>
DEV bool last_block(const P& p) {
    __shared__ u32 last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&control_block(p, p.rank)->arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Counts this block among those that have ended, and announces the last one of the grid to every peer, by stores alone:
// links without atomics, such as PCIe, may lose additions of blocks that end at once. Called by all threads. `done` of
// a rank counts the same blocks on every rank, so its own is the number to store.
template <class P>
DEV void announce_end(const P& p) {
    __shared__ u32 ended;  // if this block is the last one
    ControlBlock* mine = control_block(p, p.rank);
    if (threadIdx.x == 0) {
        const u32 all =
            mine->expected[p.rank] + gridDim.x;  // read first: block 0 changes it once all have been counted
        const u32 now = add_acquire_release(&mine->done[p.rank], 1) + 1;
        ended = now == all ? now : 0;
    }
    __syncthreads();
    const u32 peer = threadIdx.x;
    if (ended && peer != p.rank && is_alive(p, peer)) store_release(&control_block(p, peer)->done[p.rank], ended);
}

// Ends a collective kernel, once all work of this block on peers is complete (bulk stores waited for); called by all
// threads.
// Every block announces its end to every rank, its own included; block 0 waits for the blocks of all ranks, so that no
// block of this kernel still reads the control block afterwards. `times`: see may_wait; more than 1 where a rank may
// have to wait for peers that themselves wait for others. kPeerAtomics: whether the links to all peers have atomics.
template <class P>
DEV void exit_sync(const P& p, u32 epoch, const u32 (*handshakes)[kHandshakeWords], u32 times = 1) {
    __syncthreads();
    const u32 peer = threadIdx.x;
    if constexpr (kPeerAtomics == 0) announce_end(p);
    else if (is_alive(p, peer)) add_release(&control_block(p, peer)->done[p.rank], 1);
    if (blockIdx.x != 0) return;
    ControlBlock* mine = control_block(p, p.rank);
    bool good = true;
    if (is_alive(p, peer)) {
        const u32 expected = mine->expected[peer] + handshakes[peer][kBlocksWord];
        u32 seen;
        good = wait_for(p, &mine->done[peer], expected, peer, kLateRows, seen, times);
        fence_system();
        mine->expected[peer] = expected;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x == 0 && good) {
        mine->claimed = mine->pushed = 0;
        mine->epoch = epoch;
    }
}

// ---- work sharing

// Warps take units of work one by one: SMs do not get equal shares of the links, and with a fixed distribution the
// slowest SM delayed all ranks (by 6 % of a call, measured). The first `dealt` units were distributed beforehand. Only
// lane 0 gets the unit: the caller broadcasts it later, so that the warp does not wait for the atomic.
template <class P>
DEV u32 claim_unit(const P& p, u32 dealt) {
    return threadIdx.x % 32 ? 0 : dealt + atomicAdd(&control_block(p, p.rank)->claimed, 1u);
}
