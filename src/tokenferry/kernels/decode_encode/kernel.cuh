// decode_encode: across nodes: encodes the sums of a node, which cross in a decode combine.
//
// Grid     any number of blocks; warps take chunks of 512 columns round robin. Not collective.
// Reads    rows [n, H].
// Writes   packets [n][chunks][kPackets * 16]: see device/encoding.cuh.
// Cost     a launch. sm_90a: <= 80 registers, 0 spills.
// Tests    tests/cuda/test_decode_rails.py, tests/emulator/test_across_decode.py, tests/compile.
#include "device/decode.cuh"
#include "device/encoding.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    decode_encode(const __grid_constant__ DecodeEncodeParams p) {
    if (is_stopped(p)) return;
    const u32 chunks = (p.columns + kChunkColumns - 1) / kChunkColumns, warps = blockDim.x / 32;
    for (u32 i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < p.num_rows * chunks; i += gridDim.x * warps) {
        int4 v[kUnits];
        read_units(p.rows, i / chunks, p.columns, i % chunks, v);
        send_units(p.packets + (u64)i * (kPackets * 16), v, p.columns, i % chunks);
    }
}
