// dispatch: carries each row of this rank straight to its final place on every rank that needs it.
//
// Grid     num_sms blocks of p.warps warps; nothing depends on how many run at once.
// Reads    x [T, row_bytes]; places (see place); scale, weights, topk_idx as far as given.
// Writes   peers' heaps, where their cards say: rows, scales, weights; in a first dispatch also the peer's half of the plan:
//          ids [N, K], src_token [N], row_idx [N, K].
// Roles    every warp takes units (a token's row, or a piece of a large one) as it comes to them, through a ring of p.stages buffers in
//          shared memory: lane 0 loads, lane r stores to rank r. What is small goes by plain stores of the whole warp.
// Order    1 lane 0   bulk load of unit n + stages - 1, after the stores from its buffer have been read (wait_group.read)
//          2 lane r   bulk store of unit n to the place on rank r                     async proxy, no order yet
//          3 lane r   wait_group 0: its stores are in memory
//          4 block    __syncthreads; adds 1 to done[rank] on every peer, with release (depart)
//          5 peer     block 0 sees the sum of all blocks, fences                      sees 4, therefore 2 and all small stores
// Why      A card says where its rank wants rows, and that nothing reads that block any more (it was taken from the heap on
//          the stream of this call). Loads need no card, so they start before the wait.
// Cost     bytes out = rows sent * (row + scale + small). sm_90a: <= 64 registers, 0 spills, 3072 B of static shared
//          memory, at most 228480 B of dynamic.
// Tests    tests/cuda/test_dispatch_kernel.py, tests/compile.
#include "device/sync.cuh"

constexpr u32 kRankShift = 28, kPlaceMask = (1u << kRankShift) - 1;
constexpr u32 kMaxStages = 8;

struct Ring {
    u8* buffers;
    u64* barriers;
    u32 pitch;  // bytes of a buffer
};

DEV u32 piece_of(const DispatchParams& p, u32 c) { return min(p.piece_bytes, p.row_bytes - c * p.piece_bytes); }

// Lane 0: starts the load of a unit; its last piece brings the scales.
DEV void load_unit(const DispatchParams& p, const Ring& ring, u32 unit, u32 stage) {
    const u32 t = unit / p.pieces, c = unit % p.pieces, bytes = piece_of(p, c);
    const u32 scale = c == p.pieces - 1 ? p.bulk_scale_bytes : 0;
    u8* buffer = ring.buffers + stage * ring.pitch;
    mbarrier_expect(ring.barriers + stage, bytes + scale);
    bulk_load(buffer, p.x + (u64)t * p.row_bytes + (u64)c * p.piece_bytes, bytes, ring.barriers + stage);
    if (scale) bulk_load(buffer + p.piece_bytes, p.scale + (u64)t * scale, scale, ring.barriers + stage);
}

template <class T>
DEV void copy_scale(const DispatchParams& p, u64 t, u32 hits, u64 to, i32 place) {
    const T* from = reinterpret_cast<const T*>(p.scale) + (i64)t * p.scale_row_stride;
    for (u32 j = threadIdx.x % 32; j < ((p.num_scales + 31) & ~31u); j += 32) {
        const T value = j < p.num_scales ? from[(i64)j * p.scale_stride] : T();
        for (u32 m = hits; m; m &= m - 1) {
            const u32 r = __ffs(m) - 1;
            T* out =
                reinterpret_cast<T*>(__shfl_sync(kAll, to, r)) + (u64)(u32)__shfl_sync(kAll, place, r) * p.num_scales;
            if (j < p.num_scales) out[j] = value;
        }
    }
}

// What peers learn about one token: ids, row_idx and source token (a first dispatch) and weights (ROWS). A lane a rank and
// slot; lane r of `row` has the token's row on rank r, -1: none.
DEV void send_indices(const DispatchParams& p, u32 t, i32 row, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k, pairs = p.num_ranks * K;
    const i32* slots = reinterpret_cast<const i32*>(p.places) + (u64)t * p.width + p.num_ranks;
    for (u32 i = threadIdx.x % 32; i < ((pairs + 31) & ~31u); i += 32) {
        const u32 r = i / K, k = i % K;
        const i32 to = __shfl_sync(kAll, row, r & 31);
        if (i >= pairs || to < 0) continue;
        const i32 slot = slots[k];
        const bool here = slot >= 0 && (u32)slot >> kRankShift == r;
        const u64 at = (u64)(u32)to * K + k, from = (u64)t * K + k;
        u8* window = p.windows[r];
        const u32* handshake = handshakes[r] + kFirstOffset;
        if (p.topk_idx) {
            const i64 e = p.wide ? reinterpret_cast<const i64*>(p.topk_idx)[from]
                                 : (i64) reinterpret_cast<const i32*>(p.topk_idx)[from];
            const i64 id = here ? e - (i64)r * p.num_local : -1;
            u8* ids = window + (u64)handshake[3] * 16;
            if (p.wide) reinterpret_cast<i64*>(ids)[at] = id;
            else reinterpret_cast<i32*>(ids)[at] = (i32)id;
            if (p.by_expert)
                reinterpret_cast<i64*>(window + (u64)handshake[5] * 16)[at] = here ? (i64)((u32)slot & kPlaceMask) : -1;
            if (k == 0) reinterpret_cast<i64*>(window + (u64)handshake[4] * 16)[to] = t;
        }
        if (p.weights && !p.by_expert)
            reinterpret_cast<float*>(window + (u64)handshake[2] * 16)[at] =
                here ? reinterpret_cast<const float*>(p.weights)[from] : 0.f;
    }
}

// EXPERTS, MASKED: one weight a delivered row: the sum over the slots that share it, in slot order.
DEV void send_weights(const DispatchParams& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k, lane = threadIdx.x % 32;
    const i32* slots = reinterpret_cast<const i32*>(p.places) + (u64)t * p.width + p.num_ranks;
    const float* weights = reinterpret_cast<const float*>(p.weights) + (u64)t * K;
    for (u32 k = lane; k < K; k += 32) {
        const i32 slot = slots[k];
        if (slot < 0) continue;
        float sum = 0.f;
        bool first = true;
        for (u32 j = 0; j < K; j++)
            if (slots[j] == slot) {
                first &= j >= k;
                sum += weights[j];
            }
        const u32 r = (u32)slot >> kRankShift;
        if (first)
            reinterpret_cast<float*>(p.windows[r] + (u64)handshakes[r][kFirstOffset + 2] * 16)[(u32)slot & kPlaceMask] =
                sum;
    }
}

// Everything about a token that is not a bulk copy. `place`, `to_scale`: lane r has rank r's.
DEV void send_small(const DispatchParams& p, u32 t, u32 hits, i32 place, u64 to_scale,
                    const u32 (*handshakes)[kHandshakeWords]) {
    if (p.small_scale) {
        if (p.scale_size == 4) copy_scale<u32>(p, t, hits, to_scale, place);
        else if (p.scale_size == 2) copy_scale<u16>(p, t, hits, to_scale, place);
        else if (p.scale_size == 1) copy_scale<u8>(p, t, hits, to_scale, place);
        else copy_scale<u64>(p, t, hits, to_scale, place);
    }
    if (p.topk_idx || (p.weights && !p.by_expert)) {
        i32 row = place;
        if (p.by_expert && threadIdx.x % 32 < p.num_ranks)
            row = reinterpret_cast<const i32*>(p.places)[(u64)t * p.width + p.num_ranks + p.top_k + threadIdx.x % 32];
        if (place < 0) row = -1;
        send_indices(p, t, row, handshakes);
    }
    if (p.weights && p.by_expert) send_weights(p, t, handshakes);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) dispatch(const __grid_constant__ DispatchParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kMaxStages];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_out)) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, stages = p.stages;
    const u32 step = gridDim.x * (blockDim.x / 32), units = p.num_tokens * p.pieces;
    const i64* rows_out = reinterpret_cast<const i64*>(p.rows_out);
    const i64* rows_in = reinterpret_cast<const i64*>(p.rows_in);
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            return w == kRowsWord ? (u32)rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
        });

    Ring ring;
    ring.pitch = p.pitch;
    ring.buffers = shared + (u64)warp * stages * ring.pitch;
    ring.barriers = barriers + warp * kMaxStages;
    u32 next = blockIdx.x * (blockDim.x / 32) + warp;  // the unit to load next
    const u32 dealt = step * (stages - 1);
    if (lane == 0) {
        for (u32 i = 0; i < stages; i++) mbarrier_init(ring.barriers + i);
        mbarrier_init_done();
    }
    __syncwarp();
    u32 loaded = 0, held = ~0u;  // lane s: the unit in buffer s
    for (; loaded < stages - 1 && next < units; loaded++, next += step) {
        if (lane == 0) load_unit(p, ring, next, loaded);
        if (lane == loaded) held = next;
    }
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)rows_in[peer]; })) {
        for (u32 i = 0; i < loaded; i++)
            mbarrier_wait(ring.barriers + i, 0);  // memory of a block that ends must not be written
        return;
    }
    u64 to = 0, to_scale = 0;
    if (lane < p.num_ranks) {
        to = (u64)p.windows[lane] + (u64)handshakes[lane][kFirstOffset] * 16;
        to_scale = (u64)p.windows[lane] + (u64)handshakes[lane][kFirstOffset + 1] * 16;
    }
    const bool small = p.small_scale || p.topk_idx || p.weights;
    u32 stage = 0, parity = 0;
    for (;;) {
        const u32 unit = __shfl_sync(kAll, held, stage);
        if (unit == ~0u) break;
        const u32 t = unit / p.pieces, c = unit % p.pieces, bytes = piece_of(p, c);
        const i32 place =
            lane < p.num_ranks ? __ldg(reinterpret_cast<const i32*>(p.places) + (u64)t * p.width + lane) : -1;
        const u8* buffer = ring.buffers + stage * ring.pitch;
        const u32 claim = claim_unit(p, dealt);
        mbarrier_wait(ring.barriers + stage, parity);
        if (place >= 0) {
            bulk_store(reinterpret_cast<u8*>(to + (u64)(u32)place * p.row_bytes + (u64)c * p.piece_bytes), buffer,
                       bytes);
            if (c == p.pieces - 1 && p.bulk_scale_bytes)
                bulk_store(reinterpret_cast<u8*>(to_scale + (u64)(u32)place * p.bulk_scale_bytes),
                           buffer + p.piece_bytes, p.bulk_scale_bytes);
        }
        bulk_commit();
        next = __shfl_sync(kAll, claim, 0);
        const u32 before = stage ? stage - 1 : stages - 1;  // whose stores have had a unit's time to be read
        if (next < units) {
            bulk_wait_read<1>();
            __syncwarp();
            if (lane == 0) load_unit(p, ring, next, before);
        }
        if (lane == before) held = next < units ? next : ~0u;
        if (small && c == 0) send_small(p, t, __ballot_sync(kAll, place >= 0), place, to_scale, handshakes);
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    bulk_wait<0>();
    fence_async();
    exit_sync(p, epoch, handshakes);
}
