// stage: copies rows that peers will read from the user's memory into the heap; only those that peers may ask for.
//
// Grid     any number of blocks, every warp takes rows round robin. Meets nobody.
// Reads    source, source + p.row_bytes, ...; src_counts [R] int64, or with p.capacity expert_counts [L] int32.
// Writes   to, in the same layout: ROWS: all rows but this rank's own, which it reads where they are; MASKED: rows below the
//          counts.
// Cost     reads and writes these rows once. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_pull.py, tests/compile.
#include "device/meet.cuh"
#include "device/copy.cuh"

DEV void copy_rows(const StageParams& p, u64 first, u64 rows) {
    const u32 warps = blockDim.x / 32;
    for (u64 i = blockIdx.x * warps + threadIdx.x / 32; i < rows; i += (u64)gridDim.x * warps) {
        const u64 at = (first + i) * p.row_bytes;
        warp_copy(p.to + at, p.source + at, p.row_bytes);
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) stage(const __grid_constant__ StageParams p) {
    if (must_skip(p, p.src_counts)) return;
    if (p.capacity) {
        const i32* counts = reinterpret_cast<const i32*>(p.expert_counts);
        for (u32 e = 0; e < p.num_local; e++) copy_rows(p, (u64)e * p.capacity, (u32)counts[e]);
        return;
    }
    const i64* counts = reinterpret_cast<const i64*>(p.src_counts);
    u64 before = 0, behind = 0;
    for (u32 r = 0; r < p.num_ranks; r++) (r < p.rank ? before : behind) += r == p.rank ? 0 : (u64)counts[r];
    copy_rows(p, 0, before);
    copy_rows(p, before + (u64)counts[p.rank], behind);
}
