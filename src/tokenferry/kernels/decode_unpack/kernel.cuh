// decode_unpack: across nodes, when the rows of a decode dispatch have come from other nodes: checks them, and writes
// the routing of their tokens where decode_dispatch reads that of all tokens which this rank passes on.
//
// Grid     any number of blocks; the first one checks. Not collective.
// Reads    what device/across.cuh says; records [N - 1][segment][record_units]: see decode_pack.
// Writes   ids [(N - 1) * segment][K]: experts of this node, -1: none; weights, if it is not null, likewise. overflows
//          [N]: how many tokens for one other node the rail peer had, if these were too many for it, so that it has
//          sent none; else 0. wait_ns, if counted. From masked nodes nothing has come.
// Faults   If anything is wrong with what has come, this rank gives up: later kernels are no-ops.
// Cost     reads and writes the routing of (N - 1) * segment tokens. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_decode_rails.py, tests/emulator/test_across_decode.py, tests/compile.
#include "device/across.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    decode_unpack(const __grid_constant__ DecodeUnpackParams p) {
    if (is_stopped(p)) return;
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) count_wait(p, true);
        for (u32 m = threadIdx.x; m < p.num_nodes; m += blockDim.x) {
            if (m == p.node) continue;
            const bool masked = is_node_masked(p, m);
            if (!masked && !compare_signature(p, m)) continue;
            p.overflows[m] = masked ? 0 : p.headers[m * kRailWords + kRowsWord];
        }
        check_states(p, true);
    }
    const u32 K = p.top_k, n = (p.num_nodes - 1) * p.segment * K, step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const u32 other = i / K / p.segment;
        if (is_node_masked(p, other + (other >= p.node))) {  // what has come of it is incomplete
            p.ids[i] = -1;
            if (p.weights) p.weights[i] = 0.f;
            continue;
        }
        const u8* record = p.records + (u64)(i / K) * p.record_units * 16 + p.routing_at;
        const u32* routing = reinterpret_cast<const u32*>(record);
        const u16 expert = reinterpret_cast<const u16*>(routing + 1 + (p.weights ? K : 0))[i % K];
        p.ids[i] = expert == 0xffff ? -1 : expert;
        if (p.weights) p.weights[i] = __uint_as_float(routing[1 + i % K]);
    }
}
