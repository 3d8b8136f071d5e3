// Copies in the background, by a warp, between global memory (of this GPU or a peer) and buffers in shared memory.
// Kernels that move rows do it with these functions. Addresses and sizes are multiples of 16 bytes.
//
//   kHasBulk   A lane starts a copy of any size, which the asynchronous proxy executes. Loads are started by lane 0, or
//              by the lanes that know where the rows lie; stores by lane 0, or by the lane of each destination.
//   else       All lanes of the warp share each copy: a load is asynchronous copies of 16 bytes; a store is ordinary
//              loads and stores, which are behind the lane once they are issued.
//
// The code around them is the same, as if a warp had one thread that moves, or 32 that move together:
//
//   movers     the lanes that call: lane 0, or all. Only the leader, one of them, has effects beyond copies.
//   buffer     is loaded again once wait_stores_read says that its last stores have read it.
//   barrier    of a buffer: a phase has one arrival, with the bytes to come, or one of each lane, behind its copies.
//              Either way wait_loads acquires what the loads of all lanes have brought.
//   stores     are in memory after wait_stores: a release by the leader, or by a thread that synchronises with it,
//              covers them.
#pragma once
#include "device/ptx.cuh"

// Whether this lane moves.
DEV bool is_mover(u32 lane) { return !kHasBulk || lane == 0; }
// Whether this mover is the leader.
DEV bool is_leader() { return kHasBulk || threadIdx.x % 32 == 0; }
DEV void sync_movers() {
    if constexpr (!kHasBulk) __syncwarp();
}
// Returns to all movers what the leader computes.
template <class F>
DEV u32 by_leader(F compute) {
    if constexpr (kHasBulk) return compute();
    u32 value = 0;
    if (is_leader()) value = compute();
    return __shfl_sync(kAll, value, 0);
}

// Loops over the lanes that have a copy to make; all lanes take part: for (u32 turn = first_turn(mine); turn; turn =
// next_turn(turn)). In each turn a lane makes its own copy, or all lanes make that of one lane, whose values are
// in_turn(v).
DEV u32 first_turn(bool mine) {
    if constexpr (kHasBulk) return mine;
    return __ballot_sync(kAll, mine);
}
DEV u32 next_turn(u32 turn) { return kHasBulk ? 0 : turn & (turn - 1); }
template <class T>
DEV T in_turn(u32 turn, T value) {
    if constexpr (kHasBulk) return value;
    return __shfl_sync(kAll, value, __ffs(turn) - 1);
}

// ---- loads

// Makes a barrier; called by one lane, then init_barriers_done. The others see it after a __syncwarp or sync_movers.
DEV void init_barrier(u64* barrier) { mbarrier_init<kHasBulk ? 1 : 32>(barrier); }
DEV void init_barriers_done() { mbarrier_init_done(); }

// Announces the bytes of the loads that follow; called once for a phase of the barrier.
DEV void expect_loads(u64* barrier, u32 bytes) {
    if constexpr (kHasBulk) mbarrier_expect(barrier, bytes);
}
DEV void start_load(u8* shared, const u8* global, u32 bytes, u64* barrier) {
    if constexpr (kHasBulk) bulk_load(shared, global, bytes, barrier);
    else
        for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512) copy_async(shared + i, global + i);
}
// Ends the loads of a phase; called by the movers, or by all lanes.
DEV void end_loads(u64* barrier) {
    if constexpr (!kHasBulk) mbarrier_arrive_after_copies(barrier);
}
DEV void wait_loads(u64* barrier, u32 parity) { mbarrier_wait(barrier, parity); }

// ---- stores

DEV void start_store(u8* global, const u8* shared, u32 bytes) {
    if constexpr (kHasBulk) bulk_store(global, shared, bytes);
    else
        for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512)
            *reinterpret_cast<int4*>(global + i) = *reinterpret_cast<const int4*>(shared + i);
}
// Makes a group of the stores before it.
DEV void commit_stores() {
    if constexpr (kHasBulk) bulk_commit();
}
// Waits until the buffers of all but the last N groups may be loaded again.
template <int N>
DEV void wait_stores_read() {
    if constexpr (kHasBulk) bulk_wait_read<N>();
    else __syncwarp();
}
// Waits until all groups but the last N are in memory.
template <int N>
DEV void wait_stores() {
    if constexpr (kHasBulk) bulk_wait<N>();
    else __syncwarp();
}
