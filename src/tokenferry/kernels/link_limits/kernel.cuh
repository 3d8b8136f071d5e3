// link_limits: the bare rates of links and memory: rows, flags and barriers, without the work of a dispatch around
// them.
//
// Grid       link_limits_store, link_limits_load, link_limits_copy: one block for each SM that is to be used; their
//            shared memory (kStages rows a warp, more than half of what an SM has) keeps two blocks from sharing an SM.
//            link_limits_flag, link_limits_barrier: one block of 32 threads.
// Reads      store, copy: p.local [num_rows][row_bytes]; load: the peers' rows; flag, barrier: words of this rank's
//            window.
// Writes     store: the peers' rows; load: p.local; copy: p.target; flag, barrier: words of the peers' windows.
// Window     words, kWordStride bytes apart: word r for the barrier with rank r, word kMaxRanks for the ping-pong;
//            from rows_offset on: rows [R sources][rows_per_rank][row_bytes].
// Rows       Row t of rank m is stored on rank d = (m + 1 + t % n) % R with n = max(R - 1, 1), as row t / n of source
//            m. load reads the same memory, so that a load returns what a store has written.
// Roles      Each warp (its lane 0 alone where there are bulk copies) loads row after row into its kStages buffers and
//            stores it from there.
//
// Order      load into a buffer -> mbarrier -> store from it -> the store has read the buffer (wait_stores_read) ->
//            next load into it. At the end wait_stores: the rows are in memory (device/transfer.cuh).
//            Words: st.release.sys / ld.acquire.sys. A launch that reads what another rank's launch has written has a
//            barrier launch before it on the same stream.
// Invariants I1 a buffer is loaded only after the store of its last content has read it.
//            I2 words only grow: iteration n of a barrier or ping-pong writes n, counted over the life of the window
//               (wraps after 2^32), and waits until the word that it polls is at least n. Nothing is cleared.
//            I3 no two rows are stored to the same memory, so no write races with another.
// Waits      link_limits_flag and link_limits_barrier, with a deadline; when it expires *p.failed = 1 + the peer, and
//            the kernel returns. Loads and stores end by themselves.
// Example    R=3 num_rows=4: rank 0 stores rows 0, 2 on rank 1 (as rows 0, 1) and rows 1, 3 on rank 2 (as rows 0, 1).
// Cost       Every row is read once and written once. sm_90a: <= 32 registers (elsewhere <= 48), 0 spills, 384 B of
//            static shared memory.
// Tests      tests/cli/test_limits.py, tests/cuda/test_link_limits_cuda.py, tests/compile/.

#pragma once
#include "device/transfer.cuh"
#include "generated/control_block.cuh"
#include "generated/link_limits.cuh"

DEV u32* word_of(const LinkLimitsParams& p, u32 rank, u32 index) {
    return reinterpret_cast<u32*>(p.windows[rank] + kWordStride * index);
}

// Waits until the word is at least `value`; returns false if the deadline passes first. Reads the clock every 64 polls.
DEV bool wait_until(const u32* word, u32 value, u64 end_ns) {
    for (u32 polls = 1; (i32)(load_acquire(word) - value) < 0; polls++)
        if (polls % 64 == 0 && clock_ns() > end_ns) return false;
    return true;
}

// Returns where row t of this rank is stored.
DEV u8* row_in_window(const LinkLimitsParams& p, u32 t) {
    const u32 others = p.num_ranks > 1 ? p.num_ranks - 1 : 1;
    const u32 peer = (p.rank + 1 + t % others) % p.num_ranks;
    return p.windows[peer] + p.rows_offset + ((u64)p.rank * p.rows_per_rank + t / others) * p.row_bytes;
}

// Moves this warp's share of the rows through its buffers; `from` and `to` return the addresses of a row.
template <class From, class To>
DEV void move_rows(const LinkLimitsParams& p, From from, To to) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kStages];
    if (!is_mover(threadIdx.x % 32)) return;
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u8* buffers = shared + warp * kStages * p.row_bytes;
    u64* loaded = barriers + warp * kStages;
    if (is_leader()) {
        for (u32 i = 0; i < kStages; i++) init_barrier(loaded + i);
        init_barriers_done();
    }
    sync_movers();
    auto load = [&](u32 t, u32 stage) {
        expect_loads(loaded + stage, p.row_bytes);
        start_load(buffers + stage * p.row_bytes, from(t), p.row_bytes, loaded + stage);
        end_loads(loaded + stage);
    };

    const u32 step = gridDim.x * warps, first = blockIdx.x * warps + warp;
    u32 next = first;  // the next row to load
    for (u32 i = 0; i + 1 < kStages && next < p.num_rows; i++, next += step) load(next, i);
    u32 parity = 0, stage = 0, ahead = kStages - 1;
    for (u32 t = first; t < p.num_rows; t += step) {
        wait_loads(loaded + stage, parity);
        start_store(to(t), buffers + stage * p.row_bytes, p.row_bytes);
        commit_stores();
        if (next < p.num_rows) {
            // `ahead` held the row before this one: all stores but the newest have read their buffers (I1).
            wait_stores_read<1>();
            load(next, ahead);
            next += step;
        }
        ahead = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_stores<0>();
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_store(const __grid_constant__ LinkLimitsParams p) {
    move_rows(p, [&](u32 t) { return p.local + (u64)t * p.row_bytes; }, [&](u32 t) { return row_in_window(p, t); });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_load(const __grid_constant__ LinkLimitsParams p) {
    move_rows(p, [&](u32 t) { return row_in_window(p, t); }, [&](u32 t) { return p.local + (u64)t * p.row_bytes; });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_copy(const __grid_constant__ LinkLimitsParams p) {
    auto at = [&](u8* rows) { return [&p, rows](u32 t) { return rows + (u64)t * p.row_bytes; }; };
    move_rows(p, at(p.local), at(p.target));
}

// Runs a ping-pong between ranks 0 and 1, p.iterations times; other ranks return at once.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_flag(const __grid_constant__ LinkLimitsParams p) {
    if (threadIdx.x != 0 || p.rank > 1 || p.num_ranks < 2) return;
    const u64 end_ns = clock_ns() + p.timeout_ns;
    const u32 peer = 1 - p.rank;
    u32* theirs = word_of(p, peer, kMaxRanks);
    const u32* mine = word_of(p, p.rank, kMaxRanks);
    for (u32 epoch = p.epoch; epoch != p.epoch + p.iterations; epoch++) {
        if (p.rank == 0) store_release(theirs, epoch);
        if (!wait_until(mine, epoch, end_ns)) {
            *p.failed = 1 + peer;
            return;
        }
        if (p.rank == 1) store_release(theirs, epoch);
    }
}

// Runs p.iterations barriers of all ranks, one after another; lane r signals rank r and waits for its signal.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_barrier(const __grid_constant__ LinkLimitsParams p) {
    const u32 peer = threadIdx.x;
    if (peer >= 32) return;
    const u64 end_ns = clock_ns() + p.timeout_ns;
    for (u32 epoch = p.epoch; epoch != p.epoch + p.iterations; epoch++) {
        bool in_time = true;
        if (peer < p.num_ranks) {
            store_release(word_of(p, peer, p.rank), epoch);
            in_time = wait_until(word_of(p, p.rank, peer), epoch, end_ns);
            if (!in_time) *p.failed = 1 + peer;
        }
        if (!__all_sync(kAll, in_time)) return;
    }
}
