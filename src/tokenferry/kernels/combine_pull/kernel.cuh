// combine_pull: combine of the layouts EXPERTS and MASKED: fetches the rows of each token from the ranks that hold
// them, and sums them.
//
// Grid     num_sms blocks; every warp takes units (a token, 2 KB of its columns) one by one.
// Reads    peers' heaps, at the offsets in their handshakes: rows, weights. table [T, width]: the rows of a token as
//          rank << 28 | place, by rank; -1: none. biases [T, H].
// Writes   out [T, H]; weights_out [T, K].
// Roles    Each warp loads and sums for itself, see device/add.cuh.
// Order    The handshake of a peer says that its rows are written. exit_sync announces to the peer that they have been
//          read: its kernel ends after that, and only then may the memory of the rows be reused.
// Cost     bytes in = rows of this rank's tokens * row_bytes. sm_90a: <= 128 registers (elsewhere <= 152), 0 spills,
//          3072 B of static shared memory, at most 196608 B of dynamic.
// Tests    tests/cuda/test_combine_pull.py, tests/compile.
constexpr bool kGrouped = true;
#include "device/add.cuh"

struct Rows {
    u64 base;  // lane r: where rank r's rows begin
    __device__ u32 rank_of(u32 entry, u32) const { return entry >> kRankShift; }
    __device__ u32 place_of(u32 entry) const { return entry & kPlaceMask; }
    __device__ const u8* at(const CombinePullParams&, u32 rank) const {
        return reinterpret_cast<const u8*>(__shfl_sync(kAll, base, rank & 31));
    }
    __device__ bool wait(const CombinePullParams&, u32, u32, bool) const { return true; }
    __device__ u32 num_whole(const CombinePullParams&) const { return 0; }
};

// Fills weights_out for one token: the weight of each slot's row.
DEV void gather_weights(const CombinePullParams& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k;
    const i32* slots = p.places + (u64)t * p.places_stride + p.num_ranks;
    for (u32 k = threadIdx.x % 32; k < K; k += 32) {
        const u32 slot = (u32)slots[k], r = slot >> kRankShift;
        float weight = 0.f;
        if ((i32)slot >= 0)
            weight = at_offset<const float>(p, r, handshakes[r][kCombineWeightsWord])[slot & kPlaceMask];
        p.weights_out[(u64)t * K + k] = weight;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) combine_pull(const __grid_constant__ CombinePullParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kStages];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_in)) return;
    const u32 lane = threadIdx.x % 32, index = threadIdx.x / 32;
    Warp<Rows> warp;
    warp.buffers = shared + index * (kStages * kGroup * kPiece);
    warp.barriers = barriers + index * kStages;
    if (lane == 0) {
        for (u32 i = 0; i < kStages; i++) init_barrier(warp.barriers + i);
        init_barriers_done();
    }
    __syncwarp();
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            return w == kRowsWord ? (u32)p.rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
        });
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)p.rows_in[peer]; })) return;
    fence_async();  // so that the bulk loads that follow see the rows that the handshakes announce
    warp.rows.base = lane < p.num_ranks ? (u64)at_offset<u8>(p, lane, handshakes[lane][kCombineRowsWord]) : 0;
    warp.units = count_units(p, warp.rows);
    warp.dealt = gridDim.x * (blockDim.x / 32);
    warp.next = blockIdx.x * (blockDim.x / 32) + index;
    warp.opened = 0;
    warp.broken = false;
    sum_units(p, warp, [&](const Unit& unit) {
        if (p.weights_out && unit.piece == 0) gather_weights(p, unit.token, handshakes);
    });
    exit_sync(p, epoch, handshakes);
}
