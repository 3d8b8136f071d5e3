// dispatch_restrict: copies the routing of this rank, without the slots of ranks to which a token may not go.
//
// Grid     any number of blocks; threads take slots round robin. Not collective.
// Reads    topk_idx [T, K]; in_rank [T, R]: 0 if the token may not go to the rank.
// Writes   kept [T, K], of the type of topk_idx: -1 instead of an expert on such a rank. An index outside [0, E) is
//          copied, so that the kernels of the dispatch find it.
//          Behind an aborted call nothing is written: the dispatch that reads it is a no-op, too.
// Cost     reads and writes T * K indices, reads as many bytes. sm_90a: <= 32 registers, 0 spills.
// Example  R=2 E=4, topk_idx = {{0,2},{3,-1}}, in_rank = {{1,0},{0,1}}: kept {{0,-1},{3,-1}}.
// Tests    tests/cuda/test_dispatch_layout.py (the example is one of its cases), tests/compile.
#include "device/index.cuh"
#include "device/sync.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_restrict(const __grid_constant__ DispatchRestrictParams p) {
    if (is_stopped(p)) return;
    const u32 local = p.num_experts / p.num_ranks;
    const u64 slots = (u64)p.num_tokens * p.top_k, threads = gridDim.x * blockDim.x;
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < slots; i += threads) {
        i64 e = load_index(p.topk_idx, kWide, i);
        if (e >= 0 && e < p.num_experts && !p.in_rank[i / p.top_k * p.num_ranks + (u32)e / local]) e = -1;
        store_index(p.kept, kWide, i, e);
    }
}
