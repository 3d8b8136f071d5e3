// decode_open: across nodes, at the start of a decode combine: writes what the rail peers get to know
// of the call, and the weights of this rank's tokens, side by side for each node that is to apply them.
//
// Grid     any number of blocks. Not collective.
// Reads    epoch: that of the dispatch. If weights is not null: weights [T, K]; slots [T, N] of decode_pack.
// Writes   headers, and empties came and states: see device/across.cuh. weights_out: for each slot on another node than
//          p.node the weights of its token; weights_here [T, K]: the same as weights.
// Cost     a launch. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_decode_rails.py, tests/emulator/test_across_decode.py, tests/compile.
#include "device/across.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) decode_open(const __grid_constant__ DecodeOpenParams p) {
    if (blockIdx.x == 0) open_rails(p, 0);
    if (!p.weights || is_stopped(p)) return;
    const u32 N = p.num_nodes, K = p.top_k, step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < p.num_tokens * K; i += step) {
        const float weight = p.weights[i];
        p.weights_here[i] = weight;
        for (u32 m = 0; m < N; m++) {
            const i32 row = m == p.node ? -1 : p.slots[(u64)(i / K) * N + m];
            if (row >= 0) p.weights_out[(u64)row * K + i % K] = weight;
        }
    }
}
