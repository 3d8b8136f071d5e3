// kernels/link_limits/kernel.cuh: what the links and the memory do, with nothing in the way: rows, flags, barriers.
//
// Grid       link_limits_store, link_limits_load, link_limits_copy: as many blocks as SMs are to be used; their shared memory
//            (kStages rows a warp, more than half of what an SM has) keeps two blocks from sharing an SM.
//            link_limits_flag, link_limits_barrier: one block of 32.
// Reads      store, copy: p.local [num_rows][row_bytes]; load: the peers' rows; flag, barrier: words of the own window.
// Writes     store: the peers' rows; load: p.local; copy: p.target; flag, barrier: words of the peers' windows.
// Window     words, one in 128 bytes: word r for the barrier with rank r, word 8 for the ping-pong;
//            from rows_offset on: rows [R sources][rows_per_rank][row_bytes].
// Rows       row t of rank m travels to rank d = (m + 1 + t % n) % R with n = max(R - 1, 1), to place t / n of source m.
//            load reads the same places, so that a load brings home what a store took out.
// Roles      lane 0 of each warp: loads row after row into its kStages buffers and stores it from there.
//
// Order      load into a buffer -> mbarrier -> store from it (both asynchronous, same proxy) -> the store has read the
//            buffer (wait_group.read) -> next load into it. At the end wait_group: the rows are where they belong.
//            Words: st.release.sys / ld.acquire.sys. Between launches that read what another rank's launch has
//            written lies a barrier launch of the same stream.
// Invariants I1 a buffer is loaded only after the store of what it held has read it.
//            I2 words only grow: round n of a barrier or ping-pong writes n, counted over the life of the window (wraps
//               after 2^32), and waits until what it sees is at least n. Nothing is cleared.
//            I3 no two rows have the same place, so no write races with another.
// Waits      link_limits_flag and link_limits_barrier, with a deadline; on expiry *p.failed = 1 + the peer, and the kernel
//            returns. Loads and stores end by themselves.
// Example    R=3 num_rows=4: rank 0 stores rows 0, 2 to rank 1 (places 0, 1) and rows 1, 3 to rank 2 (places 0, 1).
// Cost       Every row is read once and written once. sm_90a: <= 32 registers, 0 spills, 384 B of static shared memory.
// Tests      tests/cli/test_limits.py, tests/cuda/test_link_limits_cuda.py, tests/compile/.

#pragma once
#include "device/ptx.cuh"

constexpr u32 kMostRanks = 8;
constexpr u32 kWordStride = 128;  // bytes: one word a line, so that no two ranks poll or write the same one

DEV u32* word_of(const LinkLimitsParams& p, u32 rank, u32 index) {
    return reinterpret_cast<u32*>(p.windows[rank] + kWordStride * index);
}

// Waits until the word is at least `value`; false if the deadline passed first. The clock is read once in 64 looks.
DEV bool wait_until(const u32* word, u32 value, u64 end_ns) {
    for (u32 looks = 1; (i32)(load_acquire(word) - value) < 0; looks++)
        if (looks % 64 == 0 && clock_ns() > end_ns) return false;
    return true;
}

// Where row t of this rank lies in the windows.
DEV u8* place(const LinkLimitsParams& p, u32 t) {
    const u32 others = p.num_ranks > 1 ? p.num_ranks - 1 : 1;
    const u32 peer = (p.rank + 1 + t % others) % p.num_ranks;
    return p.windows[peer] + p.rows_offset + ((u64)p.rank * p.rows_per_rank + t / others) * p.row_bytes;
}

// Moves the rows that are this warp's turn through its buffers; `from` and `to` give the addresses of a row.
template <class From, class To>
DEV void move_rows(const LinkLimitsParams& p, From from, To to) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kStages];
    if (threadIdx.x % 32 != 0) return;
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u8* buffers = shared + warp * kStages * p.row_bytes;
    u64* loaded = barriers + warp * kStages;
    for (u32 i = 0; i < kStages; i++) mbarrier_init(loaded + i);
    mbarrier_init_done();
    auto load = [&](u32 t, u32 stage) {
        mbarrier_expect(loaded + stage, p.row_bytes);
        bulk_load(buffers + stage * p.row_bytes, from(t), p.row_bytes, loaded + stage);
    };

    const u32 step = gridDim.x * warps, first = blockIdx.x * warps + warp;
    u32 next = first;  // the next row to load
    for (u32 i = 0; i + 1 < kStages && next < p.num_rows; i++, next += step) load(next, i);
    u32 parity = 0, stage = 0, ahead = kStages - 1;
    for (u32 t = first; t < p.num_rows; t += step) {
        mbarrier_wait(loaded + stage, parity);
        bulk_store(to(t), buffers + stage * p.row_bytes, p.row_bytes);
        bulk_commit();
        if (next < p.num_rows) {
            bulk_wait_read<
                1>();  // `ahead` held the row before this one: all stores but the newest have read theirs (I1)
            load(next, ahead);
            next += step;
        }
        ahead = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    bulk_wait<0>();
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_store(const __grid_constant__ LinkLimitsParams p) {
    move_rows(p, [&](u32 t) { return p.local + (u64)t * p.row_bytes; }, [&](u32 t) { return place(p, t); });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_load(const __grid_constant__ LinkLimitsParams p) {
    move_rows(p, [&](u32 t) { return place(p, t); }, [&](u32 t) { return p.local + (u64)t * p.row_bytes; });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_copy(const __grid_constant__ LinkLimitsParams p) {
    auto at = [&](u8* rows) { return [&p, rows](u32 t) { return rows + (u64)t * p.row_bytes; }; };
    move_rows(p, at(p.local), at(p.target));
}

// Ping-pong between ranks 0 and 1, p.rounds times; the others have nothing to do.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_flag(const __grid_constant__ LinkLimitsParams p) {
    if (threadIdx.x != 0 || p.rank > 1 || p.num_ranks < 2) return;
    const u64 end_ns = clock_ns() + p.timeout_ns;
    const u32 peer = 1 - p.rank;
    u32* theirs = word_of(p, peer, kMostRanks);
    const u32* mine = word_of(p, p.rank, kMostRanks);
    for (u32 round = p.epoch; round != p.epoch + p.rounds; round++) {
        if (p.rank == 0) store_release(theirs, round);
        if (!wait_until(mine, round, end_ns)) {
            *p.failed = 1 + peer;
            return;
        }
        if (p.rank == 1) store_release(theirs, round);
    }
}

// p.rounds barriers of all ranks, one after another; lane r tells rank r and waits for it.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    link_limits_barrier(const __grid_constant__ LinkLimitsParams p) {
    const u32 peer = threadIdx.x;
    if (peer >= 32) return;
    const u64 end_ns = clock_ns() + p.timeout_ns;
    for (u32 round = p.epoch; round != p.epoch + p.rounds; round++) {
        bool came = true;
        if (peer < p.num_ranks) {
            store_release(word_of(p, peer, p.rank), round);
            came = wait_until(word_of(p, p.rank, peer), round, end_ns);
            if (!came) *p.failed = 1 + peer;
        }
        if (!__all_sync(kAll, came)) return;
    }
}
