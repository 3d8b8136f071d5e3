// How the kernels of R ranks meet and part. All of it works on any params struct that begins with COMMON of
// kernels/control_block.py: windows, record, timeout_ns, rank, num_ranks, alive, call, card.
//
//   meet    every rank writes its card to every peer, and each block waits for all peers' cards. A card says that all
//           earlier work of its rank is done: what it offers may be read, where it points may be written.
//   depart  every block tells every peer that all its work on them is complete; one block of each rank waits for all blocks
//           of all peers. So when the kernel ends, what peers wrote here is here, and what they read here may be overwritten.
//
// Why no card is overwritten before it is read: cards of epoch n lie in half n & 1. Rank a writes those of n + 2 after its
// kernel n + 1 met, that is after its peer b published n + 1, which b does after its kernel n has ended.
//
// Every wait has a deadline. Who gives up writes the record for its host, tells its peers, marks its own board as failed
// and returns; kernels that come later return at once. No trap: the CUDA context stays usable.
#pragma once
#include "device/control_block.cuh"

template <class P>
DEV ControlBlock* control_block(const P& p, u32 rank) {
    return reinterpret_cast<ControlBlock*>(p.windows[rank]);
}
template <class P>
DEV bool is_alive(const P& p, u32 rank) {
    return rank < p.num_ranks && (p.alive >> rank & 1);
}

// Only the first fault of a group is recorded: the others follow from it.
template <class P>
DEV void record_fault(const P& p, u32 code, u32 peer, u32 word, u32 seen, u32 expected, u32 blamed, u64 waited_ns) {
    Record* record = reinterpret_cast<Record*>(p.record);
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

template <class P>
static __device__ __noinline__ void give_up(const P& p, u32 code, u32 peer, u32 word, u32 seen, u32 expected,
                                            u32 blamed, u64 waited_ns) {
    if (atomicCAS(&control_block(p, p.rank)->failed, 0u, code) != 0) return;
    record_fault(p, code, peer, word, seen, expected, blamed, waited_ns);
    // Who only heard of a fault passes on what it was, so that all ranks say the same.
    const u32 culprit = code == kPeerGaveUp ? blamed : peer, cause = code == kPeerGaveUp ? word : code;
    for (u32 r = 0; r < p.num_ranks; r++)
        if (r != p.rank && is_alive(p, r))
            store_release(&control_block(p, r)->gave_up[p.rank], (u64)cause << 32 | culprit);
}

DEV u32 epoch_in(u64 word) { return (u32)(word >> 32); }
DEV u32 epoch_in(u32 word) { return word; }

// What is waited for may have come since it was looked for, and its peer gone on from there.
template <class W>
DEV bool has_come(const W* word, u32 epoch) {
    fence_system();
    return epoch_in(load_relaxed(word)) == epoch;
}

// Whether to go on polling a word: false if this rank has to give up, or has. `start`: 0 at first; `times` the usual deadline.
template <class P, class W>
DEV bool may_wait(const P& p, const W* word, u32 epoch, u32 peer, u32 code, u64& start, u32 times) {
    ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return false;
    const u64 now = clock_ns();
    if (!start) start = now;
    for (u32 r = 0; r < p.num_ranks; r++) {
        const u64 lost = load_relaxed(&mine->gave_up[r]);
        if (lost && !has_come(word, epoch)) {
            give_up(p, kPeerGaveUp, r, (u32)(lost >> 32), epoch_in(load_relaxed(word)), epoch, (u32)lost, now - start);
            return false;
        }
    }
    if (now - start > times * p.timeout_ns && !has_come(word, epoch)) {
        give_up(p, code, peer, 0, epoch_in(load_relaxed(word)), epoch, peer, now - start);
        return false;
    }
    return true;
}

// Polls until `word` carries `epoch` in its upper half (u64) or is it (u32); false if this rank has to give up. Orders
// nothing: whoever goes on to read what the word announces fences first.
template <class P, class W>
DEV bool wait_for(const P& p, const W* word, u32 epoch, u32 peer, u32 code, W& value, u32 times = 1) {
    u64 start = 0;
    for (u32 spins = 1;; spins++) {
        value = load_relaxed(word);
        if (epoch_in(value) == epoch) return true;
        if (spins % 128 == 0 && !may_wait(p, word, epoch, peer, code, start, times)) return false;
    }
}

template <class P>
DEV u32 next_epoch(const P& p) {
    return load_relaxed(&control_block(p, p.rank)->epoch) + 1;
}

// Whether nothing is done here: the group is broken; or a call came to nothing, and its host, which does not know yet, has launched
// others behind it. They would meet other calls of the peers than they should.
template <class P>
DEV bool is_stopped(const P& p) {
    const ControlBlock* mine = control_block(p, p.rank);
    return load_relaxed(&mine->failed) || load_relaxed(&mine->stopped);
}

// Whether this kernel has nothing to do: see there, or the plan is void. `counts` are some of the plan's; a call that came to
// nothing leaves -1 there, so that whatever follows along its plan comes to nothing, too.
template <class P>
DEV bool must_skip(const P& p, const u8* counts) {
    return is_stopped(p) || *reinterpret_cast<const i64*>(counts) < 0;
}

// This call comes to nothing, and what is launched behind it, too, until its host clears `stopped`; one thread.
template <class P>
DEV void stop(const P& p) {
    control_block(p, p.rank)->stopped = 1;
}

// Writes this rank's card to every peer; called by one block, all threads. `word(i, peer)` is the value of word i.
template <class P, class F>
DEV void publish_handshake(const P& p, u32 epoch, F word) {
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        if (is_alive(p, peer))
            store_release(&control_block(p, peer)->handshake[epoch & 1][p.rank][w], (u64)epoch << 32 | word(w, peer));
    }
}

// Waits for all peers' cards and compares their signatures; all threads of a block. `cards` is shared memory; cards of ranks
// that are not alive are zeros. `rows(peer)` is what this rank knows about kRowsWord.
// One block of a kernel has `tell`: it adds the time that it waits to p.wait_ns.
template <class P, class F>
DEV bool read_handshakes(const P& p, u32 epoch, u32 (*handshakes)[kHandshakeWords], bool tell, F rows) {
    __shared__ u32 first_wrong;
    if (threadIdx.x == 0) first_wrong = ~0u;
    bool good = true;
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        u64 value = 0;
        const u64 start = tell && p.wait_ns ? clock_ns() : 0;
        if (is_alive(p, peer) && good)
            good = wait_for(p, &control_block(p, p.rank)->handshake[epoch & 1][peer][w], epoch, peer, kLateHandshake,
                            value);
        if (start && w == 0 && peer != p.rank) atomicAdd(reinterpret_cast<u64*>(p.wait_ns) + peer, clock_ns() - start);
        handshakes[peer][w] = (u32)value;
    }
    fence_system();
    if (!__syncthreads_and(good)) return false;
    for (u32 i = threadIdx.x; i < p.num_ranks * kHandshakeWords; i += blockDim.x) {
        const u32 peer = i / kHandshakeWords, w = i % kHandshakeWords;
        if (w > kRowsWord || !is_alive(p, peer)) continue;
        if (handshakes[peer][w] != (w == kRowsWord ? rows(peer) : p.handshake[w]))
            atomicMin(&first_wrong, i);  // tell the first only
    }
    __syncthreads();
    if (first_wrong == ~0u) return true;
    if (threadIdx.x == 0) {
        const u32 peer = first_wrong / kHandshakeWords, w = first_wrong % kHandshakeWords;
        give_up(p, kMismatch, peer, w, handshakes[peer][w], w == kRowsWord ? rows(peer) : p.handshake[w], peer, 0);
    }
    return false;
}

// Tells whether this is the last block of the grid to come here; all threads of every block.
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

// Ends a kernel that met: all work of this block on peers is complete (bulk stores waited for). All threads. Every block
// tells every rank, its own included; block 0 waits for the blocks of all, so no block of this kernel still reads the board.
// `times`: see may_wait: more where who departs may have to wait for those who still wait for others.
template <class P>
DEV void exit_sync(const P& p, u32 epoch, const u32 (*handshakes)[kHandshakeWords], u32 times = 1) {
    __syncthreads();
    const u32 peer = threadIdx.x;
    if (is_alive(p, peer)) add_release(&control_block(p, peer)->done[p.rank], 1);
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

// Warps take units as they come to them: SMs do not get equal shares of the links, and the slowest of a fixed deal would
// hold up all ranks (by 6 % of a call when it was tried). `dealt` units were dealt out beforehand. Lane 0 has the answer;
// whoever broadcasts it late does not wait for it.
template <class P>
DEV u32 claim_unit(const P& p, u32 dealt) {
    return threadIdx.x % 32 ? 0 : dealt + atomicAdd(&control_block(p, p.rank)->claimed, 1u);
}
