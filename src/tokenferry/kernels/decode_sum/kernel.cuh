// decode_sum: across nodes, at home: adds up the encoded sums that the nodes have made for each token, as combine_nodes
// does those that are not encoded.
//
// Grid     any number of blocks; warps take chunks of 512 columns round robin. Not collective.
// Reads    slots [T, N] of decode_pack; own, parts: packets of decode_encode of this node, and of the other ones in the
//          order of the slots; nothing has come from masked ones.
// Writes   out [T, H].
// Order    The nodes in their order, in float32, rounded once.
// Cost     reads one row for each slot, writes T rows. sm_90a: <= 80 registers, 0 spills.
// Tests    tests/cuda/test_decode_rails.py, tests/emulator/test_across_decode.py, tests/compile.
#include "device/decode.cuh"
#include "device/encoding.cuh"
#include "device/nodes.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) decode_sum(const __grid_constant__ DecodeSumParams p) {
    if (is_stopped(p)) return;
    const u32 chunks = (p.columns + kChunkColumns - 1) / kChunkColumns, warps = blockDim.x / 32;
    for (u32 i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < p.num_tokens * chunks; i += gridDim.x * warps) {
        const u32 t = i / chunks, chunk = i % chunks;
        float sum[16] = {};
        for (u32 m = 0; m < p.num_nodes; m++) {
            const i32 row = p.slots[(u64)t * p.num_nodes + m];
            if (row < 0 || is_node_masked(p, m)) continue;
            EncodedChunk c;
            load_encoded((m == p.node ? p.own : p.parts) + ((u64)row * chunks + chunk) * (kPackets * 16), c);
            float n[16];
            decode(c, n);
#pragma unroll
            for (u32 j = 0; j < 16; j++) sum[j] = __fadd_rn(sum[j], n[j]);
        }
        int4 v[kUnits];
        pack_units(sum, v);
        write_units(p.out, t, p.columns, chunk, v);
    }
}
