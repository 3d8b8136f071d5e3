// dispatch_relay: across nodes, when the headers of a dispatch have come: checks that the ranks across made this call,
// and says how many tokens this rank passes on.
//
// Grid     one block. Not collective. N nodes; this rank is on p.node.
// Reads    headers [N][kRailWords]: what the rank across on each node said. mine [N][kRailWords]: what this rank said,
//          as dispatch_split wrote it. p.segment: tokens of a segment of the routing. p.capacity: how many tokens cross
//          if counts stay on the device, used or not; else 0.
// Writes   sizes of the plan: came [N], tokens from each node; went [N], tokens for it; of the own node all T; behind
//          the word that dispatch_notify writes, the segment. The host: came [N], then the call number, with release.
// Faults   A rank that made another call, or of which nothing has come, makes this rank give up; the host gets the
//          record.
// Cost     a launch. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/across.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_relay(const __grid_constant__ DispatchRelayParams p) {
    if (must_skip(p, p.dst_counts)) return;
    bool good = true;
    for (u32 m = threadIdx.x; m < p.num_nodes; m += blockDim.x) {
        u32 came = p.num_tokens, went = p.num_tokens;
        if (m != p.node) {
            good = compare_signature(p, m) && good;
            came = p.capacity ? p.capacity : p.headers[m * kRailWords + kRowsWord];
            went = p.capacity ? p.capacity : p.mine[m * kRailWords + kRowsWord];
        }
        p.sizes[m] = came;
        p.sizes[p.num_nodes + m] = went;
        p.host[kHostCameWord + m] = came;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x != 0 || !good) return;
    p.sizes[2 * p.num_nodes + 1] = p.segment;
    fence_system();
    store_release(p.host, p.call_number);
}
