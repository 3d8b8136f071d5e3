// combine_pull: fetches the rows of each own token from the ranks that hold them and adds them up: combine of rows that lie by expert.
//
// Grid     num_sms blocks; every warp takes units (a token, 2 KB of its columns) as it comes to them.
// Reads    peers' heaps, where their cards say: rows, weights. table [T, width]: a token's rows as rank << 28 | place, by rank;
//          -1: none. biases [T, H].
// Writes   out [T, H]; weights_out [T, K].
// Roles    device/add.cuh: each warp loads and adds up for itself.
// Order    A peer's card says that its rows are written. depart tells it that they have been read: its kernel ends after that,
//          so the block may be given away.
// Cost     bytes in = rows of own tokens * row_bytes. sm_90a: <= 128 registers, 0 spills, 3072 B of static shared
//          memory, at most 196608 B of dynamic.
// Tests    tests/cuda/test_combine_pull.py, tests/compile.
constexpr bool kGrouped = true;
#include "device/add.cuh"

constexpr u32 kRankShift = 28, kPlaceMask = (1u << kRankShift) - 1;

struct Rows {
    u64 base;  // lane r: where rank r's rows are
    __device__ u32 rank_of(u32 entry, u32) const { return entry >> kRankShift; }
    __device__ u32 place_of(u32 entry) const { return entry & kPlaceMask; }
    __device__ const u8* at(const CombinePullParams&, u32 rank) const {
        return reinterpret_cast<const u8*>(__shfl_sync(kAll, base, rank & 31));
    }
    __device__ bool here(const CombinePullParams&, u32, u32, bool) const { return true; }
    __device__ u32 whole(const CombinePullParams&) const { return 0; }
};

// weights_out of one token: the weight of each slot's place.
DEV void bring_weights(const CombinePullParams& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k;
    const i32* slots = reinterpret_cast<const i32*>(p.places) + (u64)t * p.places_stride + p.num_ranks;
    for (u32 k = threadIdx.x % 32; k < K; k += 32) {
        const u32 slot = (u32)slots[k], r = slot >> kRankShift;
        float weight = 0.f;
        if ((i32)slot >= 0)
            weight = reinterpret_cast<const float*>(p.windows[r] +
                                                    (u64)handshakes[r][kFirstOffset + 1] * 16)[slot & kPlaceMask];
        reinterpret_cast<float*>(p.weights_out)[(u64)t * K + k] = weight;
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
        for (u32 i = 0; i < kStages; i++) mbarrier_init(warp.barriers + i);
        mbarrier_init_done();
    }
    __syncwarp();
    const i64* rows_out = reinterpret_cast<const i64*>(p.rows_out);
    const i64* rows_in = reinterpret_cast<const i64*>(p.rows_in);
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            return w == kRowsWord ? (u32)rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
        });
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)rows_in[peer]; })) return;
    fence_async();  // the bulk loads that follow see what the cards promise
    warp.rows.base = lane < p.num_ranks ? (u64)p.windows[lane] + (u64)handshakes[lane][kFirstOffset] * 16 : 0;
    warp.units = count_units(p, warp.rows);
    warp.dealt = gridDim.x * (blockDim.x / 32);
    warp.next = blockIdx.x * (blockDim.x / 32) + index;
    warp.opened = 0;
    warp.broken = false;
    add_up(p, warp, [&](const Unit& unit) {
        if (p.weights_out && unit.piece == 0) bring_weights(p, unit.token, handshakes);
    });
    exit_sync(p, epoch, handshakes);
}
