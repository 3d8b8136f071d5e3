// combine_push: combine of the layout ROWS: pushes each row to the rank that its token came from, which sums rows as
// they arrive.
//
// Grid     num_sms blocks: the first p.pushers of them push, the others sum (a single block does both, in this order).
//          Correctness does not depend on how many run at once: blocks that push wait for nothing but handshakes.
// Reads    source [N, row_bytes]: rows that came from rank 0, then those of rank 1, ...; any memory of this GPU. table
//          [T, width]: column r is the row that a token has on rank r; -1: none. biases [T, H]. Peers' heaps: weights;
//          and the rows of a peer whose handshake gives their offset: it pushes none, all its blocks sum.
// Writes   peers' heaps, at the offsets in their handshakes: rows; out [T, H]; weights_out [T, K].
// Roles    A pushing warp takes units (2^shift rows for one peer) one by one, the peers in turn: its lane 0 loads their
//          pieces into a ring of p.stages buffers and stores them from there. The last warp of the block sets the flags
//          of units that have arrived, so that pushing warps do not wait for fences. Summing warps: device/add.cuh. A
//          rank's own rows are read where they are.
// Order    1 lane 0    bulk stores of a unit                                  async proxy, no order yet
//          2 lane 0    wait_group, a few pieces later: the rows are in memory; queues the unit's flag, with an atomic
//          3 last warp takes it, with an atomic; fences; landed[rank][unit] = epoch on the peer
//          4 peer      the lane that loads a row sees 3, with acquire, fences, and loads: sees 1
//          When all sums of this rank are stored, exit_sync: until then the memory that peers push to is not reused.
// Why nothing is overwritten
//          A handshake says where its rank receives the rows of the reader, how many it has space for, and that nothing
//          reads that memory any more. Words of `landed` are never cleared: no two kernels have the same epoch, and no
//          peer writes for the next kernel before it has read this rank's handshake for it.
// Cost     bytes out = rows for other ranks * row_bytes, read once; bytes read = rows of own tokens * row_bytes.
//          sm_90a: <= 128 registers, 0 spills, 4096 B of static shared memory, at most 228096 B of dynamic.
// Tests    tests/cuda/test_combine_push.py, tests/compile.
#include "combine_push/push.cuh"

constexpr u32 kBackoffPolls = 256;  // a summing warp sleeps between its first polls of a flag

// Where rows lie: pushed to this rank, on a peer, or in this rank's own source. Lane r holds the values of rank r.
struct Rows {
    u64 base;          // where row 0 would lie
    u32 start, count;  // the first row for this rank, and how many there are
    u32 shift;         // log2 of the rows of a unit
    u32 ready;         // a bit for each rank whose rows need not be waited for
    u32 epoch;
    __device__ u32 rank_of(u32, u32 column) const { return column; }
    __device__ u32 place_of(u32 entry) const { return entry; }
    __device__ const u8* at(const CombinePushParams&, u32 rank) const {
        return reinterpret_cast<const u8*>(__shfl_sync(kAll, base, rank & 31));
    }
    __device__ bool wait(const CombinePushParams& p, u32 rank, u32 place, bool mine) const {
        if (!mine || ready >> rank & 1) return true;
        const u32 row = place - start;  // the lane that holds an entry also holds the start of its rank
        if (row >= count) {             // the peer uses another plan
            give_up(p, kMismatch, rank, kStartWord, start, place, rank, 0);
            return false;
        }
        const u32* word = &control_block(p, p.rank)->landed[rank][row >> shift];
        if (load_acquire(word) != epoch) {
            u32 seen;
            for (u32 i = 0; i < kBackoffPolls && load_relaxed(word) != epoch; i++) backoff();
            if (!wait_for(p, word, epoch, rank, kLateRows, seen)) return false;
            fence_system();
        }
        fence_async();
        return true;
    }
    __device__ u32 num_whole(const CombinePushParams& p) const { return p.whole; }
};

// Fills weights_out for one token: for each slot the sum over the rows of all ranks, in rank order.
DEV void gather_weights(const CombinePushParams& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k;
    const i32* row = p.places + (u64)t * p.places_stride;
    for (u32 k = threadIdx.x % 32; k < K; k += 32) {
        float sum = 0.f;
        for (u32 r = 0; r < p.num_ranks; r++)
            if (row[r] >= 0)
                sum += at_offset<const float>(p, r, handshakes[r][kCombineWeightsWord])[(u64)(u32)row[r] * K + k];
        p.weights_out[(u64)t * K + k] = sum;
    }
}

// Returns how many rows come from the ranks below this one, without those of rank `except`: rows are stored one rank
// after the other, and a rank's own rows are not pushed.
DEV u64 rows_before(const i64* counts, u32 rank, u32 except) {
    u64 rows = 0;
    for (u32 r = 0; r < rank; r++) rows += r == except ? 0 : (u64)counts[r];
    return rows;
}

// Fills in the route to one peer. Returns false if the peer expects another number of rows: it uses another plan.
DEV bool open_route(const CombinePushParams& p, u32 peer, const u32* handshake, Route& route) {
    route.from = p.source + rows_before(p.rows_out, peer, kMaxRanks) * p.row_bytes;
    route.to = at_offset<u8>(p, peer, handshake[kCombineRowsWord]);
    route.landed = control_block(p, peer)->landed[p.rank];
    route.rows = peer == p.rank || !is_alive(p, peer) ? 0 : (u32)p.rows_out[peer];
    route.shift = handshake[kShiftWord];
    const bool good = !route.rows || handshake[kCapacityWord] == route.rows;
    if (!good) give_up(p, kMismatch, peer, kCapacityWord, handshake[kCapacityWord], route.rows, peer, 0);
    return good;
}

// Sums this rank's tokens with all warps of this block, which is `block` of `blocks` that do. Returns false if the
// group is broken.
DEV bool sum_tokens(const CombinePushParams& p, u32 epoch, const u32 (*handshakes)[kHandshakeWords], u8* shared,
                    u64* barriers, u32 block, u32 blocks) {
    const u32 lane = threadIdx.x % 32, index = threadIdx.x / 32, warps = blockDim.x / 32, R = p.num_ranks;
    const bool comes = lane < R && lane != p.rank && is_alive(p, lane) && !handshakes[lane][kRowsAtWord];
    Warp<Rows> warp;
    warp.buffers = shared + index * (kStages * kGroup * kPiece);
    warp.barriers = barriers;
    warp.rows.start = lane < R ? handshakes[lane][kStartWord] : 0;
    warp.rows.count = lane < R ? (u32)p.rows_in[lane] : 0;
    warp.rows.shift = p.handshake[kShiftWord];
    warp.rows.ready = ~__ballot_sync(kAll, comes);
    warp.rows.epoch = epoch;
    warp.rows.base = (u64)p.source;
    if (comes)
        warp.rows.base = (u64)at_offset<u8>(p, p.rank, p.handshake[kCombineRowsWord]) +
                         (rows_before(p.rows_in, lane, p.rank) - warp.rows.start) * p.row_bytes;
    else if (lane < R && lane != p.rank) warp.rows.base = (u64)at_offset<u8>(p, lane, handshakes[lane][kRowsAtWord]);
    warp.units = count_units(p, warp.rows);
    warp.dealt = blocks * warps;
    warp.next = block * warps + index;
    warp.opened = 0;
    warp.broken = false;
    return sum_units(p, warp, [&](const Unit& unit) {
        if (p.weights_out && unit.first == 0) gather_weights(p, unit.token, handshakes);
    });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) combine_push(const __grid_constant__ CombinePushParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32][kMaxPushStages + kStages];
    __shared__ Slot slots[kMaxThreads / 32][kMaxPushStages];
    __shared__ Route routes[kMaxRanks];
    __shared__ Queue queues[kMaxThreads / 32];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_in)) return;
    const u32 lane = threadIdx.x % 32, index = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) {
        for (u32 i = 0; i < kQueue; i++) queues[index].words[i] = kFree;
        for (u32 i = 0; i < kMaxPushStages + kStages; i++) init_barrier(barriers[index] + i);
        init_barriers_done();
    }
    __syncwarp();
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            if (w == kCombineRowsWord)
                return p.handshake[w] + (u32)(rows_before(p.rows_in, peer, p.rank) * (p.row_bytes / kOffsetBytes));
            if (w == kStartWord) return (u32)rows_before(p.rows_out, peer, kMaxRanks);
            if (w == kCapacityWord) return (u32)p.rows_in[peer];
            return w == kRowsWord ? (u32)p.rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
        });
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)p.rows_in[peer]; })) return;
    fence_async();  // so that the bulk loads that follow see the rows that the handshakes announce

    const bool pushes = blockIdx.x < p.pushers, sums = !pushes || gridDim.x == 1;
    const u32 peer = threadIdx.x;
    bool good = peer >= p.num_ranks || open_route(p, peer, handshakes[peer], routes[peer]);
    if (!__syncthreads_and(good)) return;
    if (pushes && index < p.warps && is_mover(lane))
        push_rows(p, routes, blockIdx.x * p.warps + index, p.pushers * p.warps, shared + index * p.stages * p.pitch,
                  barriers[index], slots[index], queues[index]);
    if (pushes && index == warps - 1) set_flags(queues, p.warps, epoch);
    if (sums) {
        __syncthreads();  // a single block no longer reads the buffers of its pushing warps
        const u32 first = gridDim.x == 1 ? 0 : p.pushers;
        good = sum_tokens(p, epoch, handshakes, shared, barriers[index] + kMaxPushStages, blockIdx.x - first,
                          gridDim.x - first);
    }
    if (!__syncthreads_and(good)) return;
    exit_sync(p, epoch, handshakes, 2);  // a rank that waits for rows times out first, and reports whose are late
}
