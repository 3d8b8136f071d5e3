// across_check: across nodes: whether what has come from other nodes is valid. A rank whose kernels have become no-ops, because of a
// fault or an aborted call, sends undefined data, and its state with it: its host may not know yet.
//
// Grid     one block. Not collective.
// Reads    states [N][2]: the words `stopped` and `failed` of the rank across from this one on each node, when it sent; zeros for
//          nodes from which nothing has come.
// Writes   nothing, unless one is not 0: then the record of the host and peers' control blocks, as any kernel that gives up.
// Faults   If one is not 0, this rank gives up, and its later kernels are no-ops: nothing undefined is passed on.
// Cost     a launch. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/sync.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) across_check(const __grid_constant__ AcrossCheckParams p) {
    if (must_skip(p, p.src_counts)) return;
    const u32 m = threadIdx.x;
    if (m >= p.num_nodes || !(p.states[2 * m] | p.states[2 * m + 1])) return;
    const u32 across = m * p.num_ranks + p.rank;
    give_up(p, kNodeGaveUp, p.rank, across, p.states[2 * m + 1], 0, p.rank, 0);
}
