// stage: copies rows that peers will read from the user's memory into the heap; only those that peers may ask for.
//
// Grid     any number of blocks, every warp takes pieces of 2 KB round robin. Meets nobody.
// Reads    source, source + p.row_bytes, ...; src_counts [R] int64, or with p.capacity expert_counts [L] int32.
// Writes   to, in the same layout: ROWS: all rows but this rank's own, which it reads where they are; MASKED: rows below the
//          counts. With p.parts: peers' boards.
// Order    With p.parts (ROWS) the rows of each rank are copied in so many parts, one after the other, and the pull that follows
//          runs beside this kernel: peers are told when all blocks have copied a part, and wait for the part that they need.
//          The epoch is that of the pull: it stays until that ends, which waits for the end of this kernel.
// Cost     reads and writes these rows once. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_stage.py, tests/compile.
#include "device/meet.cuh"

constexpr u32 kPiece = 2048, kLoads = kPiece / 512;

// Copies one stretch of memory, a multiple of 16 bytes. `next` is this warp's next piece, counted from the stretch's start.
DEV void copy_stretch(const StageParams& p, u64 first, u64 bytes, u64& next) {
    const u64 pieces = (bytes + kPiece - 1) / kPiece;
    for (; next < pieces; next += (u64)gridDim.x * (blockDim.x / 32)) {
        const u64 at = next * kPiece + threadIdx.x % 32 * 16;
        int4 v[kLoads];
        #pragma unroll
        for (u32 i = 0; i < kLoads; i++)
            if (at + i * 512 < bytes) v[i] = *reinterpret_cast<const int4*>(p.source + first + at + i * 512);
        #pragma unroll
        for (u32 i = 0; i < kLoads; i++)
            if (at + i * 512 < bytes) *reinterpret_cast<int4*>(p.to + first + at + i * 512) = v[i];
    }
    next -= pieces;
}

// Tells all peers that a part is there, once all blocks have copied it.
DEV void tell_part(const StageParams& p, u32 epoch, u32 part) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    Board* mine = board_of(p, p.rank);
    if (add_acquire_release(&mine->copied[part], 1) != gridDim.x - 1) return;
    mine->copied[part] = 0;
    for (u32 r = 0; r < p.num_ranks; r++)
        if (r != p.rank && is_alive(p, r)) store_release(&board_of(p, r)->staged[p.rank][part], (u64)epoch << 32);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) stage(const __grid_constant__ StageParams p) {
    if (must_skip(p, p.src_counts)) return;
    u64 next = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (p.capacity) {
        const i32* counts = reinterpret_cast<const i32*>(p.expert_counts);
        for (u32 e = 0; e < p.num_local; e++) copy_stretch(p, (u64)e * p.capacity * p.row_bytes, (u64)counts[e] * p.row_bytes, next);
        return;
    }
    const i64* counts = reinterpret_cast<const i64*>(p.src_counts);
    const u32 epoch = next_epoch(p);
    if (p.parts) let_next_kernel_begin();
    for (u32 part = 0; part < max(p.parts, 1u); part++) {
        u64 start = 0;
        for (u32 r = 0; r < p.num_ranks; r++) {
            const u64 rows = (u64)counts[r];
            const u64 from = p.parts ? rows * part / p.parts : 0, to = p.parts ? rows * (part + 1) / p.parts : rows;
            if (r != p.rank) copy_stretch(p, (start + from) * p.row_bytes, (to - from) * p.row_bytes, next);
            start += rows;
        }
        if (p.parts) tell_part(p, epoch, part);
    }
}
