// pull: fetches the rows of each own token from the ranks that hold them and adds them up. Combine is this kernel.
//
// Grid     num_sms blocks; every warp takes units (a token, 2 KB of its columns) as it comes to them.
// Reads    peers' heaps, where their cards say: rows, weights; or with p.local rows in this rank's memory, meeting nobody.
//          table [T, width]: places of a token's rows: column r is the place on rank r (p.by_rank), else rank << 28 | place in
//          the order of adding; -1: none. biases [T, H].
// Writes   out [T, H]; weights_out [T, K].
//          With p.source this rank's own rows are read there instead: the user's memory, of which peers have a copy.
// Numbers  In float32 (float64 rows: float64), kMode
//            0 rows      biases, then each rank's row, in rank order
//            1 grouped   biases, then each rank's sum of its experts' rows
//            2 weighted  for each entry in order weight * row, the product rounded, then added (no fused multiply-add)
//          and one rounding at the end: the same bits every time.
// Roles    Each warp owns a ring of groups of up to 4 rows. While one group is on its way, the warp adds up the one before and
//          stores sums 16 bytes a lane. A group never spans two units; each of its rows is loaded by the lane of its entry.
// Order    A peer's card says that its rows are written. depart tells it that they have been read: its kernel ends after that,
//          so the block may be given away.
// Cost     bytes in = rows of own tokens * row_bytes. sm_90a: <= 128 registers, 0 spills, 3072 B of static shared
//          memory, at most 196608 B of dynamic.
// Tests    tests/cuda/test_pull.py, tests/compile.
#include "device/meet.cuh"
#include "device/number.cuh"

constexpr u32 kRankShift = 28, kPlaceMask = (1u << kRankShift) - 1;
constexpr u32 kPiece = 2048, kChunks = kPiece / 512;
constexpr u32 kGroup = 4;    // rows that one barrier waits for
constexpr u32 kStages = 2;   // groups in a warp's ring

// The entries of one unit that are still to come. Lane i holds entries i and i + 32.
struct Unit {
    u32 token, piece;
    i32 low, high;
    u64 left;  // bit per entry
};

struct Warp {
    u8* buffers;    // [kStages][kGroup][kPiece]
    u64* barriers;  // [kStages]
    u64 base;       // lane r: where rank r's rows are
    u32 units, dealt;
    u32 next;       // lane 0: the unit to open next
    u32 queue;      // lane i: the unit that was opened as i-th, modulo 32
    u32 opened;
};

DEV void open_unit(const PullParams& p, u32 index, Unit& unit) {
    const u32 lane = threadIdx.x % 32;
    unit.token = index / p.pieces;
    unit.piece = index % p.pieces;
    const i32* entries = reinterpret_cast<const i32*>(p.table) + (u64)unit.token * p.table_stride;
    unit.low = lane < p.width ? __ldg(entries + lane) : -1;
    // A rank that was masked since the plan was made gives nothing.
    const bool low = unit.low >= 0 && (p.local || p.alive >> (p.by_rank ? lane : (u32)unit.low >> kRankShift) & 1);
    unit.left = __ballot_sync(kAll, low);
    if (p.width <= 32) return;
    unit.high = lane + 32 < p.width ? __ldg(entries + lane + 32) : -1;
    const bool high = unit.high >= 0 && (p.local || p.alive >> ((u32)unit.high >> kRankShift) & 1);
    unit.left |= (u64)__ballot_sync(kAll, high) << 32;
}

DEV u32 bytes_of(const PullParams& p, const Unit& unit) { return min(kPiece, p.row_bytes - unit.piece * kPiece); }

// Takes up to kGroup entries off the unit; returns their bits.
DEV u64 take(Unit& unit) {
    u64 group = 0;
    #pragma unroll
    for (u32 i = 0; i < kGroup; i++) {
        group |= unit.left & -unit.left;
        unit.left &= unit.left - 1;
        if (!unit.left) break;
    }
    return group;
}

// Loads the row of one entry, if it is of the group; called by all lanes, each with its own entry.
DEV void load_entry(const PullParams& p, const Warp& warp, const Unit& unit, u64 group, u32 number, i32 entry, u32 stage) {
    const u32 rank = p.by_rank ? number : (u32)entry >> kRankShift;
    const u64 base = __shfl_sync(kAll, warp.base, rank & 31);
    if (!(group >> number & 1)) return;
    const u64 place = (u32)entry & (p.by_rank ? ~0u : kPlaceMask);
    const u32 slot = stage * kGroup + __popcll(group & ((1ull << number) - 1));
    bulk_load(warp.buffers + slot * kPiece, reinterpret_cast<const u8*>(base) + place * p.row_bytes + (u64)unit.piece * kPiece, bytes_of(p, unit), warp.barriers + stage);
}

// The sums of one unit: 16 bytes in each of kChunks places a lane.
struct Sums {
    Number total[kChunks][kPerChunk];
    Number part[kMode == 1 ? kChunks : 1][kPerChunk];  // of the rank at hand
};

DEV void start_sums(const PullParams& p, const Unit& unit, u32 bytes, Sums& s) {
    #pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        #pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) {
            s.total[c][i] = 0;
            if constexpr (kMode == 1) s.part[c][i] = 0;
        }
        if (!p.bias0) continue;
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        for (u32 b = 0; b < 2; b++) {
            const u8* bias = b ? p.bias1 : p.bias0;
            if (!bias || at >= bytes) continue;
            Number n[kPerChunk];
            unpack_chunk(*reinterpret_cast<const int4*>(bias + (u64)unit.token * p.row_bytes + unit.piece * kPiece + at), n);
            #pragma unroll
            for (u32 i = 0; i < kPerChunk; i++) s.total[c][i] += n[i];
        }
    }
}

DEV void add_row(const u8* buffer, u32 bytes, float weight, bool new_rank, Sums& s) {
    #pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        if (at >= bytes) continue;
        Number n[kPerChunk];
        unpack_chunk(*reinterpret_cast<const int4*>(buffer + at), n);
        #pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) {
            if constexpr (kMode == 0) s.total[c][i] += n[i];
            else if constexpr (kMode == 2) s.total[c][i] = __fadd_rn((float)s.total[c][i], __fmul_rn(weight, (float)n[i]));
            else {
                if (new_rank) { s.total[c][i] += s.part[c][i]; s.part[c][i] = 0; }
                s.part[c][i] += n[i];
            }
        }
    }
}

DEV void store_sums(const PullParams& p, const Unit& unit, u32 bytes, Sums& s) {
    #pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        const u32 at = c * 512 + threadIdx.x % 32 * 16;
        if (at >= bytes) continue;
        if constexpr (kMode == 1) {
            #pragma unroll
            for (u32 i = 0; i < kPerChunk; i++) s.total[c][i] += s.part[c][i];
        }
        *reinterpret_cast<int4*>(p.out + (u64)unit.token * p.row_bytes + unit.piece * kPiece + at) = pack_chunk(s.total[c]);
    }
}

// weights_out of one token: ROWS: each slot's column of every rank's row, in rank order; else the weight of the slot's place.
DEV void bring_weights(const PullParams& p, u32 t, const u32 (*cards)[kCardWords]) {
    const u32 K = p.top_k;
    const i32* row = reinterpret_cast<const i32*>(p.places) + (u64)t * p.places_stride;
    for (u32 k = threadIdx.x % 32; k < K; k += 32) {
        float sum = 0.f;
        const auto weight = [&](u32 r, u64 at) { return reinterpret_cast<const float*>(p.windows[r] + (u64)cards[r][kFirstOffset + 1] * 16)[at]; };
        if (p.by_rank) {
            for (u32 r = 0; r < p.num_ranks; r++)
                if (row[r] >= 0) sum += weight(r, (u64)(u32)row[r] * K + k);
        } else {
            const i32 slot = row[p.num_ranks + k];
            if (slot >= 0) sum += weight((u32)slot >> kRankShift, (u32)slot & kPlaceMask);
        }
        reinterpret_cast<float*>(p.weights_out)[(u64)t * K + k] = sum;
    }
}

// Starts the loads of the next group; `ahead` is the unit that loads have come to, `done` the number of units summed up.
// False: no unit is left, or too many without rows lie between.
DEV bool load_group(const PullParams& p, Warp& warp, Unit& ahead, u32 stage, u32 done) {
    const u32 lane = threadIdx.x % 32;
    while (!ahead.left) {
        const u32 index = __shfl_sync(kAll, warp.next, 0);
        if (index >= warp.units || warp.opened - done == 32) return false;
        warp.next = claim_unit(p, warp.dealt);
        open_unit(p, index, ahead);
        if (lane == warp.opened % 32) warp.queue = index;
        warp.opened++;
    }
    const u64 group = take(ahead);
    if (lane == 0) mbarrier_expect(warp.barriers + stage, __popcll(group) * bytes_of(p, ahead));
    __syncwarp();
    load_entry(p, warp, ahead, group, lane, ahead.low, stage);
    if (p.width > 32) load_entry(p, warp, ahead, group, lane + 32, ahead.high, stage);
    return true;
}

// Adds the rows of one group to the sums, in order. Returns the rank of the last.
DEV u32 add_group(const PullParams& p, const Warp& warp, const Unit& here, u64 group, u32 stage, u32 last_rank, Sums& sums) {
    const u32 bytes = bytes_of(p, here);
    const u8* buffer = warp.buffers + stage * kGroup * kPiece;
    for (u64 left = group; left; left &= left - 1, buffer += kPiece) {
        float weight = 1.f;
        bool new_rank = false;
        if constexpr (kMode != 0) {
            const u32 j = __ffsll(left) - 1;
            const u32 entry = (u32)__shfl_sync(kAll, j < 32 ? here.low : here.high, j % 32);
            const u32 rank = p.by_rank ? j : entry >> kRankShift;
            new_rank = rank != last_rank && last_rank != ~0u;
            last_rank = rank;
            if constexpr (kMode == 2)
                weight = __ldg(reinterpret_cast<const float*>(p.weights) + (p.weight_by_place ? (u64)(entry & kPlaceMask) : (u64)here.token * p.width + j));
        }
        add_row(buffer, bytes, weight, new_rank, sums);
    }
    return last_rank;
}

DEV void add_up(const PullParams& p, Warp& warp, const u32 (*cards)[kCardWords]) {
    Unit here, ahead;
    ahead.left = 0;
    u32 issued = 0, consumed = 0;  // groups
    const auto fill = [&](u32 most, u32 done) {
        while (issued - consumed < most && load_group(p, warp, ahead, issued % kStages, done)) issued++;
    };
    fill(kStages - 1, 0);
    for (u32 done = 0; done != warp.opened; done++) {
        open_unit(p, __shfl_sync(kAll, warp.queue, done % 32), here);
        const u32 bytes = bytes_of(p, here);
        Sums sums;
        start_sums(p, here, bytes, sums);
        if (p.weights_out && here.piece == 0) bring_weights(p, here.token, cards);
        u32 last_rank = ~0u;
        while (here.left) {
            fill(kStages, done);
            const u32 stage = consumed % kStages;
            mbarrier_wait(warp.barriers + stage, consumed / kStages & 1);
            last_rank = add_group(p, warp, here, take(here), stage, last_rank, sums);
            __syncwarp();  // all lanes have read the buffers
            consumed++;
        }
        store_sums(p, here, bytes, sums);
        if (done + 1 == warp.opened) fill(kStages - 1, done + 1);  // behind units without rows
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) pull(const __grid_constant__ PullParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 cards[kMaxRanks][kCardWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kStages];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_in)) return;
    const u32 lane = threadIdx.x % 32, index = threadIdx.x / 32;
    Warp warp;
    warp.buffers = shared + index * (kStages * kGroup * kPiece);
    warp.barriers = barriers + index * kStages;
    if (lane == 0) {
        for (u32 i = 0; i < kStages; i++) mbarrier_init(warp.barriers + i);
        mbarrier_init_done();
    }
    __syncwarp();
    const i64* rows_out = reinterpret_cast<const i64*>(p.rows_out);
    const i64* rows_in = reinterpret_cast<const i64*>(p.rows_in);
    if (!p.local) {
        if (blockIdx.x == 0)
            publish_card(p, epoch, [&](u32 w, u32 peer) -> u32 { return w == kRowsWord ? (u32)rows_out[peer] : w == kBlocksWord ? gridDim.x : p.card[w]; });
        if (!read_cards(p, epoch, cards, blockIdx.x == 0, [&](u32 peer) { return (u32)rows_in[peer]; })) return;
        fence_async();  // the bulk loads that follow see what the cards promise
    }
    u32 tokens = p.num_tokens;
    if (p.local) {  // as many rows as this rank received
        tokens = 0;
        for (u32 r = 0; r < p.num_ranks; r++) tokens += (u32)rows_in[r];
    }
    warp.base = p.local ? (u64)p.local : lane < p.num_ranks ? (u64)p.windows[lane] + (u64)cards[lane][kFirstOffset] * 16 : 0;
    if (p.source && lane == p.rank) warp.base = (u64)p.source;
    warp.units = tokens * p.pieces;
    warp.dealt = gridDim.x * (blockDim.x / 32);
    warp.next = blockIdx.x * (blockDim.x / 32) + index;
    warp.opened = 0;
    add_up(p, warp, cards);
    if (!p.local) depart(p, epoch, cards);
    else if (last_block(p) && threadIdx.x == 0) board_of(p, p.rank)->arrived = board_of(p, p.rank)->claimed = 0;
}
