// dispatch_pack: across nodes: copies what goes to other nodes to where it is sent from: a parcel for each chunk of
// rows.
//
// Grid     any number of blocks; warps take tokens round robin. Not collective. N nodes; this rank is on p.node.
// Reads    x [T, row_bytes]; scale and weights where they are not null: scale [T, num_scales] of scale_size bytes each,
//          with strides; weights [T, K]; slots [T, N] of dispatch_rails. went [N], p.went_stride words apart: how many
//          rows go to each node; with a p.capacity it is that many, used or not.
// Writes   out: for each slot on another node than p.node the data of its token, in parcels as in device/parcel.cuh.
// Cost     reads T rows, writes one for each slot. sm_90a: <= 80 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/compile.
#include "device/copy.cuh"
#include "device/parcel.cuh"
#include "device/sync.cuh"

// Copies scales that do not lie side by side, with one warp.
template <class T>
DEV void gather_scale(const DispatchPackParams& p, u64 t, u8* out) {
    const T* from = reinterpret_cast<const T*>(p.scale) + (i64)t * p.scale_row_stride;
    T* to = reinterpret_cast<T*>(out);
    for (u32 j = threadIdx.x % 32; j < p.num_scales; j += 32) to[j] = from[(i64)j * p.scale_stride];
}

DEV void pack_scale(const DispatchPackParams& p, u64 t, u8* out) {
    if (p.bulk_scale_bytes) warp_copy(out, p.scale + t * p.bulk_scale_bytes, p.bulk_scale_bytes);
    else if (p.scale_size == 4) gather_scale<u32>(p, t, out);
    else if (p.scale_size == 2) gather_scale<u16>(p, t, out);
    else if (p.scale_size == 1) gather_scale<u8>(p, t, out);
    else gather_scale<u64>(p, t, out);
}

DEV void pack_row(const DispatchPackParams& p, u64 t, const Spot& spot) {
    u8* rows = p.out + spot.start;
    const u64 row = spot.row, num = spot.rows, scale_bytes = p.num_scales * p.scale_size;
    warp_copy(rows + row * p.row_bytes, p.x + t * p.row_bytes, p.row_bytes);
    if (scale_bytes) pack_scale(p, t, rows + num * p.row_bytes + row * scale_bytes);
    if (!p.weights) return;
    float* weights = reinterpret_cast<float*>(rows + (num * (p.row_bytes + scale_bytes) + 3) / 4 * 4);
    for (u32 k = threadIdx.x % 32; k < p.top_k; k += 32) weights[row * p.top_k + k] = p.weights[t * p.top_k + k];
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_pack(const __grid_constant__ DispatchPackParams p) {
    if (must_skip(p, p.dst_counts)) return;
    const u32 warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32;
    for (u64 t = warp; t < p.num_tokens; t += gridDim.x * warps) {
        u64 first = 0;
        for (u32 m = 0; m < p.num_nodes; m++) {
            if (m == p.node) continue;
            const i32 row = p.slots[t * p.num_nodes + m];
            const u32 num = p.capacity ? p.capacity : p.went[m * p.went_stride];
            if (row >= 0) pack_row(p, t, spot_of(p, m, (u32)(row - first), first, num));
            first += num;
        }
    }
}
