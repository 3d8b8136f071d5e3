// stage_input: copies the rows of a MASKED layout that peers will read from the user's memory into the heap: of each
// expert the first expert_counts.
//
// Grid     any number of blocks; warps take rows round robin. Not collective.
// Reads    source [L, capacity, row_bytes]; expert_counts [L] int32.
// Writes   to, in the same layout.
// Cost     reads and writes these rows once. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_combine_pull.py, tests/compile.
#include "device/copy.cuh"
#include "device/sync.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) stage_input(const __grid_constant__ StageInputParams p) {
    if (must_skip(p, p.src_counts)) return;
    const u32 warps = blockDim.x / 32, first = blockIdx.x * warps + threadIdx.x / 32;
    for (u32 e = 0; e < p.num_local; e++) {
        const u32 rows = (u32)p.expert_counts[e];
        for (u32 i = first; i < rows; i += gridDim.x * warps) {
            const u64 at = ((u64)e * p.capacity + i) * p.row_bytes;
            warp_copy(p.to + at, p.source + at, p.row_bytes);
        }
    }
}
