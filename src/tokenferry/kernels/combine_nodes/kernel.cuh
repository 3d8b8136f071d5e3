// combine_nodes: across nodes, at home: adds up the sums that the nodes have made for each token.
//
// Grid     any number of blocks; threads take 16 bytes of a row round robin. Not collective.
// Reads    slots [T, N] of dispatch_rails; own [T, row_bytes]: the sums of this node; parts: those of the other nodes,
//          in the order of the slots: rows of row_bytes, or if weights_out is not null, rows and weights in parcels as
//          in device/parcel.cuh; nothing comes from masked nodes in calls that leave them out (p.skips), which have no
//          weights. biases [T, H]. own_weights [T, K] and went [N], how many rows each node has, if weights_out is not
//          null.
// Writes   out [T, H]; weights_out [T, K].
// Order    Biases first, then the nodes in their order. Sums are in float32 (float64 for float64 rows), rounded once:
//          the same bits every time.
// Cost     reads one row for each slot, writes T rows. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/compile.
#include "device/nodes.cuh"
#include "device/number.cuh"
#include "device/parcel.cuh"

DEV void add_chunk(const u8* from, Number (&sums)[kPerChunk]) {
    Number n[kPerChunk];
    unpack_chunk(*reinterpret_cast<const int4*>(from), n);
#pragma unroll
    for (u32 i = 0; i < kPerChunk; i++) sums[i] += n[i];
}

// Returns the sums of node m for a token: row_bytes, or with `of_weights` its K weights. `row`: its slot there;
// `first`: rows of lower nodes.
DEV const u8* part_of(const CombineNodesParams& p, u32 m, u32 row, u64 first, bool of_weights) {
    if (!p.weights_out) return p.parts + (u64)row * p.row_bytes;
    const Spot spot = spot_of(p, m, (u32)(row - first), first, p.went[m]);
    const u8* rows = p.parts + spot.start;
    return of_weights ? rows + (u64)spot.rows * p.row_bytes + (u64)spot.row * p.top_k * 4
                      : rows + (u64)spot.row * p.row_bytes;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    combine_nodes(const __grid_constant__ CombineNodesParams p) {
    if (must_skip(p, p.dst_counts)) return;
    const u32 chunks = p.row_bytes / 16, N = p.num_nodes, K = p.top_k;
    const u64 first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (u64 i = first; i < (u64)p.num_tokens * chunks; i += step) {
        const u64 t = i / chunks, at = i % chunks * 16;
        Number sums[kPerChunk];
#pragma unroll
        for (u32 j = 0; j < kPerChunk; j++) sums[j] = 0;
        if (p.bias0) add_chunk(p.bias0 + t * p.row_bytes + at, sums);
        if (p.bias1) add_chunk(p.bias1 + t * p.row_bytes + at, sums);
        u64 before = 0;
        for (u32 m = 0; m < N; m++) {
            const i32 row = p.slots[t * N + m];
            if (row >= 0 && m == p.node) add_chunk(p.own + (u64)row * p.row_bytes + at, sums);
            else if (row >= 0 && !(p.skips && is_node_masked(p, m)))
                add_chunk(part_of(p, m, (u32)row, before, false) + at, sums);
            if (p.weights_out && m != p.node) before += p.went[m];
        }
        *reinterpret_cast<int4*>(p.out + t * p.row_bytes + at) = pack_chunk(sums);
    }
    if (!p.weights_out) return;
    for (u64 i = first; i < (u64)p.num_tokens * K; i += step) {
        float sum = 0.f;
        u64 before = 0;
        for (u32 m = 0; m < N; m++) {
            const i32 row = p.slots[i / K * N + m];
            if (row >= 0 && m == p.node) sum += p.own_weights[(u64)row * K + i % K];
            else if (row >= 0) sum += reinterpret_cast<const float*>(part_of(p, m, (u32)row, before, true))[i % K];
            if (m != p.node) before += p.went[m];
        }
        p.weights_out[i] = sum;
    }
}
