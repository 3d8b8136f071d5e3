// dispatch_pack: across nodes: copies the rows that go to other nodes, side by side, to where they are sent from.
//
// Grid     any number of blocks; warps take tokens round robin. Not collective.
// Reads    x [T, row_bytes]; scale and weights where they are not null: scale [T, num_scales] of scale_size bytes each, with
//          strides; weights [T, K]; slots [T, N] of dispatch_rails.
// Writes   rows_out, scale_out, weights_out: for each slot on another node than p.node the data of its token.
// Cost     reads T rows, writes one for each slot. sm_90a: <= 80 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/compile.
#include "device/copy.cuh"
#include "device/sync.cuh"

// Copies scales that do not lie side by side, with one warp.
template <class T>
DEV void gather_scale(const DispatchPackParams& p, u64 t, u64 row) {
    const T* from = reinterpret_cast<const T*>(p.scale) + (i64)t * p.scale_row_stride;
    T* to = reinterpret_cast<T*>(p.scale_out) + row * p.num_scales;
    for (u32 j = threadIdx.x % 32; j < p.num_scales; j += 32) to[j] = from[(i64)j * p.scale_stride];
}

DEV void pack_scale(const DispatchPackParams& p, u64 t, u64 row) {
    if (p.bulk_scale_bytes)
        warp_copy(p.scale_out + row * p.bulk_scale_bytes, p.scale + t * p.bulk_scale_bytes, p.bulk_scale_bytes);
    else if (p.scale_size == 4) gather_scale<u32>(p, t, row);
    else if (p.scale_size == 2) gather_scale<u16>(p, t, row);
    else if (p.scale_size == 1) gather_scale<u8>(p, t, row);
    else gather_scale<u64>(p, t, row);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_pack(const __grid_constant__ DispatchPackParams p) {
    if (must_skip(p, p.dst_counts)) return;
    const u32 warps = blockDim.x / 32, first = blockIdx.x * warps + threadIdx.x / 32;
    for (u64 t = first; t < p.num_tokens; t += gridDim.x * warps)
        for (u32 m = 0; m < p.num_nodes; m++) {
            const i32 row = p.slots[t * p.num_nodes + m];
            if (m == p.node || row < 0) continue;
            warp_copy(p.rows_out + (u64)row * p.row_bytes, p.x + t * p.row_bytes, p.row_bytes);
            if (p.num_scales) pack_scale(p, t, (u32)row);
            if (p.weights)
                for (u32 k = threadIdx.x % 32; k < p.top_k; k += 32)
                    p.weights_out[(u64)row * p.top_k + k] = p.weights[t * p.top_k + k];
        }
}
