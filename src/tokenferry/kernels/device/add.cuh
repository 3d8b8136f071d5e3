// Sums the rows of each token of this rank: the common part of combine_pull, which fetches the rows from peers, and
// combine_push, to which peers push them.
//
// Work     A unit is one token and one piece (2 KB) of its columns, or all of its pieces, one after another. Warps take
//          units one by one (claim_unit).
// Rings    Each warp has a ring of kStages groups of up to kGroup rows in shared memory. While one group is loaded, the
//          warp sums the group before it and stores sums, 16 bytes a lane. A group never spans two pieces. Each of its
//          rows is loaded by the lane that holds its entry of the table, or by all (device/transfer.cuh).
// Order    kGrouped is a constant of the kernel. false: biases, then the row of each rank in rank order. true: biases,
//          then for each rank the sum of its rows. Sums are in float32 (float64 for float64 rows) and are rounded once,
//          at the end: the same bits every time.
// Params   table, table_stride, width, num_tokens, pieces, row_bytes, bias0, bias1, out.
// Rows     A class that the kernel defines:
//            rank_of(entry, column)           the rank that an entry of the table refers to
//            place_of(entry)                  the row on that rank
//            at(p, rank)                      where the rank's rows begin; called by all lanes
//            wait(p, rank, place, mine)       waits until a row may be read, if it is `mine`; called by all lanes.
//                                             Returns false if the group is broken
//            num_whole(p)                     this many first tokens have one unit for all pieces, the others one per
//                                             piece
#pragma once
#include "device/number.cuh"
#include "device/sync.cuh"
#include "device/transfer.cuh"
#include "generated/codes.cuh"

constexpr u32 kChunks = kPiece / 512;  // of 16 bytes a lane

// A unit, and its current piece. Lane i holds entries i and i + 32 of the token.
struct Unit {
    u32 token, piece, first, last;  // pieces
    i32 low, high;
    u64 all, left;  // a bit for each entry that has a row; those of the current piece that are not summed yet
};

template <class Rows>
struct Warp {
    Rows rows;
    u8* buffers;       // [kStages][kGroup][kPiece]
    u64* barriers;     // [kStages]
    u32 units, dealt;  // units of the kernel; see claim_unit
    u32 next;          // lane 0: the unit to open next
    u32 queue;         // lane i: the unit that was opened as i-th, modulo 32
    u32 opened;        // number of units opened
    bool broken;       // the group is broken
};

template <class P, class Rows>
DEV void open_unit(const P& p, const Rows& rows, u32 index, Unit& unit) {
    const u32 lane = threadIdx.x % 32;
    const u32 whole = rows.num_whole(p);
    if (index < whole) {
        unit.token = index;
        unit.first = 0;
        unit.last = p.pieces - 1;
    } else {
        unit.token = whole + (index - whole) / p.pieces;
        unit.first = unit.last = (index - whole) % p.pieces;
    }
    unit.piece = unit.first;
    const i32* entries = p.table + (u64)unit.token * p.table_stride;
    unit.low = lane < p.width ? __ldg(entries + lane) : -1;
    unit.all = __ballot_sync(kAll, unit.low >= 0 && is_alive(p, rows.rank_of((u32)unit.low, lane)));
    if (p.width > 32) {
        unit.high = lane + 32 < p.width ? __ldg(entries + lane + 32) : -1;
        unit.all |= (u64)__ballot_sync(kAll, unit.high >= 0 && is_alive(p, rows.rank_of((u32)unit.high, lane + 32)))
                    << 32;
    }
    unit.left = unit.all;
}

// Goes on to the next piece; returns false after the last one.
DEV bool next_piece(Unit& unit) {
    if (unit.piece == unit.last) return false;
    unit.piece++;
    unit.left = unit.all;
    return true;
}

// Returns the number of units of all tokens.
template <class P, class Rows>
DEV u32 count_units(const P& p, const Rows& rows) {
    const u32 whole = rows.num_whole(p);
    return whole + ((u32)p.num_tokens - whole) * p.pieces;
}

template <class P>
DEV u32 piece_bytes(const P& p, const Unit& unit) {
    return min(kPiece, p.row_bytes - unit.piece * kPiece);
}

// Takes up to kGroup entries of the unit; returns their bits.
DEV u64 take_group(Unit& unit) {
    u64 group = 0;
#pragma unroll
    for (u32 i = 0; i < kGroup; i++) {
        group |= unit.left & -unit.left;
        unit.left &= unit.left - 1;
        if (!unit.left) break;
    }
    return group;
}

// Waits for the row of one entry, if the entry is in the group; called by all lanes, each with its own entry.
template <class P, class Rows>
DEV bool wait_entry(const P& p, const Rows& rows, u64 group, u32 number, i32 entry) {
    return rows.wait(p, rows.rank_of((u32)entry, number), rows.place_of((u32)entry), group >> number & 1);
}

// Loads the row of one entry, if the entry is in the group; called by all lanes.
template <class P, class Rows>
DEV void load_entry(const P& p, const Warp<Rows>& warp, const Unit& unit, u64 group, u32 number, i32 entry, u32 stage) {
    const u64 base = (u64)warp.rows.at(p, warp.rows.rank_of((u32)entry, number));
    for (u32 turn = first_turn(group >> number & 1); turn; turn = next_turn(turn)) {
        const u32 slot = stage * kGroup + __popcll(group & ((1ull << in_turn(turn, number)) - 1));
        const u32 place = warp.rows.place_of((u32)in_turn(turn, entry));
        const u8* from = reinterpret_cast<const u8*>(in_turn(turn, base)) + (u64)place * p.row_bytes;
        start_load(warp.buffers + slot * kPiece, from + (u64)unit.piece * kPiece, piece_bytes(p, unit),
                   warp.barriers + stage);
    }
}

// The sums of one piece: each lane has 16 bytes in each of kChunks chunks.
struct Sums {
    Number total[kChunks][kPerChunk];
    Number part[kGrouped ? kChunks : 1][kPerChunk];  // of the current rank
};

template <class P>
DEV void start_sums(const P& p, const Unit& unit, u32 bytes, Sums& s) {
#pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
#pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) {
            s.total[c][i] = 0;
            if constexpr (kGrouped) s.part[c][i] = 0;
        }
        if (!p.bias0) continue;
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        for (u32 b = 0; b < 2; b++) {
            const u8* bias = b ? p.bias1 : p.bias0;
            if (!bias || at >= bytes) continue;
            Number n[kPerChunk];
            unpack_chunk(
                *reinterpret_cast<const int4*>(bias + (u64)unit.token * p.row_bytes + unit.piece * kPiece + at), n);
#pragma unroll
            for (u32 i = 0; i < kPerChunk; i++) s.total[c][i] += n[i];
        }
    }
}

DEV void add_row(const u8* buffer, u32 bytes, bool new_rank, Sums& s) {
#pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        if (at >= bytes) continue;
        Number n[kPerChunk];
        unpack_chunk(*reinterpret_cast<const int4*>(buffer + at), n);
#pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) {
            if constexpr (kGrouped) {
                if (new_rank) {
                    s.total[c][i] += s.part[c][i];
                    s.part[c][i] = 0;
                }
                s.part[c][i] += n[i];
            } else s.total[c][i] += n[i];
        }
    }
}

template <class P>
DEV void store_sums(const P& p, const Unit& unit, u32 bytes, Sums& s) {
#pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        if (at >= bytes) continue;
        if constexpr (kGrouped) {
#pragma unroll
            for (u32 i = 0; i < kPerChunk; i++) s.total[c][i] += s.part[c][i];
        }
        *reinterpret_cast<int4*>(p.out + (u64)unit.token * p.row_bytes + unit.piece * kPiece + at) =
            pack_chunk(s.total[c]);
    }
}

// Starts the loads of the next group. `ahead`: the unit that is being loaded; `done`: the number of units that are
// summed.
// Returns false if no unit is left, if 32 units are open, or if the group is broken.
// Rows are waited for with the first piece of a unit only: each wait is a trip to memory.
template <class P, class Rows>
DEV bool load_group(const P& p, Warp<Rows>& warp, Unit& ahead, u32 stage, u32 done) {
    const u32 lane = threadIdx.x % 32;
    while (!ahead.left) {
        if (ahead.all && next_piece(ahead)) continue;
        const u32 index = __shfl_sync(kAll, warp.next, 0);
        if (index >= warp.units || warp.opened - done == 32) return false;
        warp.next = claim_unit(p, warp.dealt);
        open_unit(p, warp.rows, index, ahead);
        if (lane == warp.opened % 32) warp.queue = index;
        warp.opened++;
    }
    const u64 group = take_group(ahead);
    if (ahead.piece == ahead.first) {
        bool good = wait_entry(p, warp.rows, group, lane, ahead.low);
        if (p.width > 32) good &= wait_entry(p, warp.rows, group, lane + 32, ahead.high);
        warp.broken = !__all_sync(kAll, good);
        if (warp.broken) return false;
    }
    if (lane == 0) expect_loads(warp.barriers + stage, __popcll(group) * piece_bytes(p, ahead));
    __syncwarp();
    load_entry(p, warp, ahead, group, lane, ahead.low, stage);
    if (p.width > 32) load_entry(p, warp, ahead, group, lane + 32, ahead.high, stage);
    end_loads(warp.barriers + stage);
    return true;
}

// Adds the rows of one group to the sums, in order. Returns the rank of the last row.
template <class P, class Rows>
DEV u32 add_group(const P& p, const Warp<Rows>& warp, const Unit& here, u64 group, u32 stage, u32 last_rank,
                  Sums& sums) {
    const u32 bytes = piece_bytes(p, here);
    const u8* buffer = warp.buffers + stage * kGroup * kPiece;
    for (u64 left = group; left; left &= left - 1, buffer += kPiece) {
        bool new_rank = false;
        if constexpr (kGrouped) {
            const u32 j = __ffsll(left) - 1;
            const u32 rank = warp.rows.rank_of((u32)__shfl_sync(kAll, j < 32 ? here.low : here.high, j % 32), j);
            new_rank = rank != last_rank && last_rank != ~0u;
            last_rank = rank;
        }
        add_row(buffer, bytes, new_rank, sums);
    }
    return last_rank;
}

// Sums all units that this warp takes; calls `first(unit)` before each. Returns false if the group is broken.
template <class P, class Rows, class F>
DEV bool sum_units(const P& p, Warp<Rows>& warp, F first) {
    Unit here, ahead;
    ahead.left = ahead.all = 0;
    u32 issued = 0, consumed = 0;  // groups that are loaded, or on the way; groups that are summed
    const auto fill = [&](u32 most, u32 done) {
        while (!warp.broken && issued - consumed < most && load_group(p, warp, ahead, issued % kStages, done)) issued++;
    };
    fill(kStages - 1, 0);
    for (u32 done = 0; done != warp.opened; done++) {
        open_unit(p, warp.rows, __shfl_sync(kAll, warp.queue, done % 32), here);
        first(here);
        do {
            const u32 bytes = piece_bytes(p, here);
            Sums sums;
            start_sums(p, here, bytes, sums);
            u32 last_rank = ~0u;
            while (here.left) {
                fill(kStages, done);
                if (warp.broken) {  // no load may arrive after the block has ended
                    for (; consumed != issued; consumed++)
                        wait_loads(warp.barriers + consumed % kStages, consumed / kStages & 1);
                    return false;
                }
                const u32 stage = consumed % kStages;
                wait_loads(warp.barriers + stage, consumed / kStages & 1);
                last_rank = add_group(p, warp, here, take_group(here), stage, last_rank, sums);
                __syncwarp();  // all lanes have read the buffers
                consumed++;
            }
            store_sums(p, here, bytes, sums);
        } while (next_piece(here));
        if (done + 1 == warp.opened) fill(kStages - 1, done + 1);  // past units without rows
    }
    return !warp.broken;
}
