// across_check: across nodes: whether what has come from other nodes belongs to this call, and is valid; see
// device/across.cuh.
//
// Grid     one block. Not collective. This rank is on p.node.
// Reads    what device/across.cuh says; null headers: they have been checked. goes [N], comes [N]: what the plan of
//          this rank says about rows for the rail peer on each node, and from it; null: there is no plan yet, and any
//          number will do. p.skips: whether masked nodes are left out.
// Writes   wait_ns, if counted; and if something is wrong, the record of the host and peers' control blocks, as
//          any kernel that gives up.
// Cost     a launch. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/across.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) across_check(const __grid_constant__ AcrossCheckParams p) {
    if (must_skip(p, p.src_counts)) return;
    if (threadIdx.x == 0) count_wait(p, p.skips);
    for (u32 m = threadIdx.x; p.headers && m < p.num_nodes; m += blockDim.x) {
        if (m == p.node || (p.skips && is_node_masked(p, m))) continue;
        if (!compare_signature(p, m) || !p.comes) continue;
        if (compare_word(p, m, kRowsWord, p.comes[m])) compare_word(p, m, kRailSpaceWord, p.goes[m]);
    }
    check_states(p, p.skips);
}
