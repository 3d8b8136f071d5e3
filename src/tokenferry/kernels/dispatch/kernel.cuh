// dispatch: stores each row of this rank directly at its final place on every rank that needs it.
//
// Grid     num_sms blocks of p.warps warps; correctness does not depend on how many run at once.
// Reads    x [T, row_bytes]; places (see dispatch_assign); scale, weights, topk_idx where they are not null.
// Writes   peers' heaps, at the offsets in their handshakes: rows, scales, weights; in a first dispatch also the peer's half of
//          the plan: ids [N, K], src_token [N], row_idx [N, K].
// Roles    Every warp takes units (the row of a token, or a piece of a large row) one by one, through a ring of p.stages
//          buffers in shared memory: lane 0 loads, lane r stores to rank r. Small data is stored by all lanes, without the
//          ring.
// Order    1 lane 0   bulk load of unit n + stages - 1, once the stores from its buffer have been read (wait_group.read)
//          2 lane r   bulk store of unit n to the place on rank r                     async proxy, no order yet
//          3 lane r   wait_group 0: its stores are in memory
//          4 block    __syncthreads; adds 1 to done[rank] on every peer, with release (exit_sync)
//          5 peer     block 0 sees the sum of all blocks, fences                      sees 4, therefore 2 and all small stores
// Why nothing is overwritten
//          A handshake says where its rank receives rows, and that nothing reads that memory any more (it was taken from the
//          heap on the stream of this call). Loads need no handshake, so they start before the wait.
// Cost     bytes out = rows sent * (row + scale + small). sm_90a: <= 64 registers, 0 spills, 3072 B of static shared
//          memory, at most 228480 B of dynamic.
// Tests    tests/cuda/test_dispatch_kernel.py, tests/compile.
#include "dispatch/small.cuh"
#include "generated/codes.cuh"

struct Ring {
    u8* buffers;
    u64* barriers;
    u32 pitch;  // bytes from buffer to buffer
};

DEV u32 piece_bytes(const DispatchParams& p, u32 c) { return min(p.piece_bytes, p.row_bytes - c * p.piece_bytes); }

// Starts to load a unit; the last piece of a row brings the scales. Called by lane 0.
DEV void load_unit(const DispatchParams& p, const Ring& ring, u32 unit, u32 stage) {
    const u32 t = unit / p.pieces, c = unit % p.pieces, bytes = piece_bytes(p, c);
    const u32 scale = c == p.pieces - 1 ? p.bulk_scale_bytes : 0;
    u8* buffer = ring.buffers + stage * ring.pitch;
    mbarrier_expect(ring.barriers + stage, bytes + scale);
    bulk_load(buffer, p.x + (u64)t * p.row_bytes + (u64)c * p.piece_bytes, bytes, ring.barriers + stage);
    if (scale) bulk_load(buffer + p.piece_bytes, p.scale + (u64)t * scale, scale, ring.barriers + stage);
}

// Starts to store a unit to this lane's rank.
DEV void store_unit(const DispatchParams& p, const u8* buffer, u32 c, u32 place, u64 to, u64 to_scale) {
    bulk_store(reinterpret_cast<u8*>(to + (u64)place * p.row_bytes + (u64)c * p.piece_bytes), buffer,
               piece_bytes(p, c));
    if (c == p.pieces - 1 && p.bulk_scale_bytes)
        bulk_store(reinterpret_cast<u8*>(to_scale + (u64)place * p.bulk_scale_bytes), buffer + p.piece_bytes,
                   p.bulk_scale_bytes);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) dispatch(const __grid_constant__ DispatchParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kMaxStages];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_out)) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, stages = p.stages;
    const u32 step = gridDim.x * (blockDim.x / 32), units = p.num_tokens * p.pieces;
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            return w == kRowsWord ? (u32)p.rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
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
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)p.rows_in[peer]; })) {
        for (u32 i = 0; i < loaded; i++)
            mbarrier_wait(ring.barriers + i, 0);  // no load may arrive after the block has ended
        return;
    }
    u64 to = 0, to_scale = 0;
    if (lane < p.num_ranks) {
        to = (u64)at_offset<u8>(p, lane, handshakes[lane][kRecvRowsWord]);
        to_scale = (u64)at_offset<u8>(p, lane, handshakes[lane][kRecvScaleWord]);
    }
    const bool small = p.small_scale || p.topk_idx || p.weights;
    u32 stage = 0, parity = 0;
    for (;;) {
        const u32 unit = __shfl_sync(kAll, held, stage);
        if (unit == ~0u) break;
        const u32 t = unit / p.pieces, c = unit % p.pieces;
        const i32 place = lane < p.num_ranks ? __ldg(p.places + (u64)t * p.width + lane) : -1;
        const u32 claim = claim_unit(p, dealt);
        mbarrier_wait(ring.barriers + stage, parity);
        if (place >= 0) store_unit(p, ring.buffers + stage * ring.pitch, c, (u32)place, to, to_scale);
        bulk_commit();
        next = __shfl_sync(kAll, claim, 0);
        const u32 before = stage ? stage - 1 : stages - 1;  // its stores have had the time of one unit
        if (next < units) {
            bulk_wait_read<1>();
            __syncwarp();
            if (lane == 0) load_unit(p, ring, next, before);
        }
        if (lane == before) held = next < units ? next : ~0u;
        if (small && c == 0) store_small(p, t, __ballot_sync(kAll, place >= 0), place, to_scale, handshakes);
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    bulk_wait<0>();
    fence_async();
    exit_sync(p, epoch, handshakes);
}
