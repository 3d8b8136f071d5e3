// How warps move units, each the row of a token or a piece of a large row, through rings of buffers in shared memory;
// see kernel.cuh. All functions work on any params struct with the fields of dispatch.
#pragma once
#include "device/transfer.cuh"
#include "dispatch/small.cuh"
#include "generated/codes.cuh"

// The buffers of a warp.
struct Ring {
    u8* buffers;
    u64* barriers;
    u32 held;    // lane s: the unit in buffer s; ~0: none
    u32 loaded;  // buffers with a load that was started by fill_ring
};

template <class P>
DEV u32 piece_bytes(const P& p, u32 c) {
    return min(p.piece_bytes, p.row_bytes - c * p.piece_bytes);
}

// Starts to load a unit; the last piece of a row brings the scales. Called by movers.
template <class P>
DEV void load_unit(const P& p, const Ring& ring, u32 unit, u32 stage) {
    const u32 t = unit / p.pieces, c = unit % p.pieces, bytes = piece_bytes(p, c);
    const u32 scale = c == p.pieces - 1 ? p.bulk_scale_bytes : 0;
    u8* buffer = ring.buffers + stage * p.pitch;
    expect_loads(ring.barriers + stage, bytes + scale);
    start_load(buffer, p.x + (u64)t * p.row_bytes + (u64)c * p.piece_bytes, bytes, ring.barriers + stage);
    if (scale) start_load(buffer + p.piece_bytes, p.scale + (u64)t * scale, scale, ring.barriers + stage);
    end_loads(ring.barriers + stage);
}

// Starts to store a unit to one rank.
template <class P>
DEV void store_unit(const P& p, const u8* buffer, u32 c, u32 place, u64 to, u64 to_scale) {
    start_store(reinterpret_cast<u8*>(to + (u64)place * p.row_bytes + (u64)c * p.piece_bytes), buffer,
                piece_bytes(p, c));
    if (c == p.pieces - 1 && p.bulk_scale_bytes)
        start_store(reinterpret_cast<u8*>(to_scale + (u64)place * p.bulk_scale_bytes), buffer + p.piece_bytes,
                    p.bulk_scale_bytes);
}

// Makes the ring of a warp, and starts to load units first, first + step, ... below `end` into all its buffers but one.
template <class P>
DEV Ring fill_ring(const P& p, u8* buffers, u64* barriers, u32 first, u32 step, u32 end) {
    const u32 lane = threadIdx.x % 32;
    Ring ring = {buffers, barriers, ~0u, 0};
    if (lane == 0) {
        for (u32 i = 0; i < p.stages; i++) init_barrier(ring.barriers + i);
        init_barriers_done();
    }
    __syncwarp();
    for (u32 unit = first; ring.loaded < p.stages - 1 && unit < end; ring.loaded++, unit += step) {
        if (is_mover(lane)) load_unit(p, ring, unit, ring.loaded);
        if (lane == ring.loaded) ring.held = unit;
    }
    return ring;
}

// Waits for the loads of fill_ring, whose units are not stored: none may arrive after the block has ended.
DEV void drop_loads(const Ring& ring) {
    for (u32 i = 0; i < ring.loaded; i++) wait_loads(ring.barriers + i, 0);
}

// Stores the units of a ring, and those that `claim` returns to lane 0, one after the other, as long as they are below
// `end`.
// All stores are in memory afterwards. `wide`: indices are int64.
template <class P, class F>
DEV void move_units(const P& p, bool wide, Ring ring, const u32 (*handshakes)[kHandshakeWords], u32 end, F claim) {
    const u32 lane = threadIdx.x % 32, stages = p.stages;
    u64 to = 0, to_scale = 0;
    if (lane < p.num_ranks) {
        to = (u64)at_offset<u8>(p, lane, handshakes[lane][kRecvRowsWord]);
        to_scale = (u64)at_offset<u8>(p, lane, handshakes[lane][kRecvScaleWord]);
    }
    const bool small = p.small_scale || p.topk_idx || p.weights;
    u32 stage = 0, parity = 0;
    for (;;) {
        const u32 unit = __shfl_sync(kAll, ring.held, stage);
        if (unit == ~0u) break;
        const u32 t = unit / p.pieces, c = unit % p.pieces;
        const i32 place = lane < p.num_ranks ? p.places[(u64)t * p.width + lane] : -1;
        const u32 claimed = claim();
        wait_loads(ring.barriers + stage, parity);
        for (u32 turn = first_turn(place >= 0); turn; turn = next_turn(turn))
            store_unit(p, ring.buffers + stage * p.pitch, c, (u32)in_turn(turn, place), in_turn(turn, to),
                       in_turn(turn, to_scale));
        commit_stores();
        const u32 next = __shfl_sync(kAll, claimed, 0);
        const u32 before = stage ? stage - 1 : stages - 1;  // its stores have had the time of one unit
        if (next < end) {
            wait_stores_read<1>();
            __syncwarp();
            if (is_mover(lane)) load_unit(p, ring, next, before);
        }
        if (lane == before) ring.held = next < end ? next : ~0u;
        if (small && c == 0) store_small(p, wide, t, __ballot_sync(kAll, place >= 0), place, to_scale, handshakes);
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    wait_stores<0>();
    fence_async();
}

// Writes the handshake of a kernel that moves rows[r] rows to rank r; called by all threads of one block.
template <class P>
DEV void publish_move(const P& p, u32 epoch, const i64* rows) {
    publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
        return w == kRowsWord ? (u32)rows[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
    });
}
