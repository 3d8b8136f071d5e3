// combine_push: carries rows home to the ranks that their tokens came from, which add them up as they come: combine of the layout ROWS.
//
// Grid     num_sms blocks, the first p.pushers of them push, the others add up (a single one does both, in this order). Nothing
//          depends on how many run at once: who pushes waits for nobody but for cards.
// Reads    source [N, row_bytes]: rows that came from rank 0, then those of rank 1, ...: any memory of this GPU. table
//          [T, width]: column r is the row that a token has on rank r; -1: none. biases [T, H]. Peers' heaps: weights; and
//          rows, if a peer's card says where they are: it pushes none, all its blocks add up.
// Writes   peers' heaps, where their cards say: rows; out [T, H]; weights_out [T, K].
// Roles    A pushing warp takes units (2^shift rows for one peer) as it comes to them, peers in turn: its lane 0 loads their pieces into
//          a ring of p.stages buffers and stores them from there. The last warp of a block tells peers what has landed, so that
//          those that push do not wait for fences. Adding warps: device/add.cuh. Own rows are read where they are.
// Order    1 lane 0   bulk stores of a unit                                        async proxy, no order yet
//          2 lane 0   wait_group, a few pieces later: they are in memory; says so to the last warp, with release
//          3 teller   sees 2, with acquire; fences; landed[rank][unit] = epoch on the peer
//          4 peer     the lane that loads a row sees 3, with acquire, fences, and loads: sees 1
//          When all of this rank's sums are there it departs: until then its block of landed rows is not given away.
// Why      A card says where its rank wants the rows of each peer, for how many there is room, and that nothing reads that block any more. Words of `landed` are
//          never cleared: no two kernels have the same epoch, and no peer writes for the next before it has the card of it.
// Cost     bytes out = rows for other ranks * row_bytes, read once; bytes read = rows of own tokens * row_bytes. sm_90a: <= 128
//          registers, 0 spills, 4096 B of static shared memory, at most 228096 B of dynamic.
// Tests    tests/cuda/test_combine_push.py, tests/compile.
constexpr bool kGrouped = false;
#include "device/add.cuh"

constexpr u32 kStartWord = kFirstOffset + 2;  // of a card: rows of the sender before those for its reader
constexpr u32 kShiftWord =
    kFirstOffset + 3;  // units that the sender of the card wants to be told of have so many bits of rows
constexpr u32 kRowsAtWord =
    kFirstOffset + 4;  // of a card: where its sender's rows are for all to fetch; 0: they are brought
constexpr u32 kRoomWord = kFirstOffset + 5;  // of a card: rows that its sender has room for, of its reader
constexpr u32 kMostStages = 3;
constexpr u32 kBackoffPolls = 256;  // polls of those that add up, before they spin
constexpr u32 kBehind = 2;          // pieces after which the stores of one are waited for

// Where rows are: brought, on a peer, or this rank's own. Lane r has rank r's.
struct Rows {
    u64 base;          // where its row 0 would lie
    u32 start, count;  // its first row for this rank, and how many
    u32 shift;         // units
    u32 ready;         // a bit for each rank whose rows need not be waited for
    u32 epoch;
    __device__ u32 rank_of(u32, u32 column) const { return column; }
    __device__ u32 place_of(u32 entry) const { return entry; }
    __device__ const u8* at(const CombinePushParams&, u32 rank) const {
        return reinterpret_cast<const u8*>(__shfl_sync(kAll, base, rank & 31));
    }
    __device__ bool here(const CombinePushParams& p, u32 rank, u32 place, bool mine) const {
        if (!mine || ready >> rank & 1) return true;
        const u32 row = place - start;  // the lane of an entry is that of its rank
        if (row >= count) {             // not the plan that this rank has
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
    __device__ u32 whole(const CombinePushParams& p) const { return p.whole; }
};

// Where rows for one peer lie, and where they go.
struct Way {
    const u8* from;
    u8* to;
    u32* landed;
    u32 rows, shift;
};

// A buffer of a ring. told: the word for the unit that ends with it, or nothing.
struct Slot {
    u8* to;
    u32* told;
    u32 bytes;
};

// What one pushing warp has for the teller: words[head .. tail), modulo kQueue.
constexpr u32 kQueue = 4, kOwed = 8, kEnd = 1u << 31;  // in tail: nothing follows
struct Queue {
    u32* words[kQueue];
    u32* owed[kOwed];  // for the last pieces, whose stores may be under way
    u32 head, tail;
};

// The last warp of a block that pushes; lane i listens to warp i.
DEV void flag_peers(Queue* queues, u32 warps, u32 epoch) {
    if (threadIdx.x % 32 >= warps) return;
    Queue& queue = queues[threadIdx.x % 32];
    for (u32 head = 0;;) {
        const u32 tail = load_in_block(&queue.tail);
        if (head == (tail & ~kEnd)) {
            if (tail & kEnd) return;
            backoff();
            continue;
        }
        fence_async();
        fence_system();
        for (; head != (tail & ~kEnd); head++) store_relaxed(queue.words[head % kQueue], epoch);
        store_in_block(&queue.head, head);
    }
}

DEV u32 units_of(const Way& way) { return (way.rows + (1u << way.shift) - 1) >> way.shift; }

// One thread. `next`: its first unit; `dealt` units were dealt out.
DEV void push_rows(const CombinePushParams& p, const Way* ways, u32 next, u32 dealt, u8* buffers, u64* barriers,
                   Slot* slots, Queue& queue) {
    const u32 peers = p.num_ranks - 1, stages = p.stages;
    u32 total = 0;
    for (u32 r = 0; r < p.num_ranks; r++) total = max(total, units_of(ways[r]));
    total *= peers;
    const Way* way = ways;
    u32 unit = 0, row = 0, end = 0, piece = 0;
    const auto load = [&](u32 stage) {  // of the next piece, if there is one
        while (row == end) {
            if (next >= total) return false;
            way = ways + (p.rank + 1 + next % peers) % p.num_ranks;
            unit = next / peers;
            next = dealt + atomicAdd(&control_block(p, p.rank)->pushed, 1u);
            if (unit >= units_of(*way)) continue;
            row = unit << way->shift;
            end = min(row + (1u << way->shift), way->rows);
        }
        const u32 bytes = min(p.piece_bytes, p.row_bytes - piece * p.piece_bytes);
        const u64 at = (u64)row * p.row_bytes + (u64)piece * p.piece_bytes;
        mbarrier_expect(barriers + stage, bytes);
        bulk_load(buffers + stage * p.pitch, way->from + at, bytes, barriers + stage);
        if (++piece == p.row_pieces) piece = 0, row++;
        slots[stage] = {way->to + at, row == end ? way->landed + unit : nullptr, bytes};
        return true;
    };
    u32 issued = 0, told = 0;
    const auto tell = [&](u32 n) {  // that a unit is there, if the n-th piece ends one; it is in memory
        u32* word = queue.owed[n % kOwed];
        if (!word) return;
        while (told - load_in_block(&queue.head) == kQueue) backoff();
        queue.words[told % kQueue] = word;
        store_in_block(&queue.tail, ++told);
    };
    while (issued < stages - 1 && load(issued)) issued++;
    for (u32 n = 0; n < issued; n++) {
        const u32 stage = n % stages;
        mbarrier_wait(barriers + stage, n / stages & 1);
        const Slot slot = slots[stage];
        bulk_store(slot.to, buffers + stage * p.pitch, slot.bytes);
        bulk_commit();
        queue.owed[n % kOwed] = slot.told;
        bulk_wait_read<1>();  // the buffer of the piece before can be filled
        if (load(issued % stages)) issued++;
        if (n < kBehind) continue;
        bulk_wait<kBehind>();
        tell(n - kBehind);
    }
    bulk_wait<0>();
    for (u32 n = issued < kBehind ? 0 : issued - kBehind; n < issued; n++) tell(n);
    store_in_block(&queue.tail, told | kEnd);
}

// weights_out of one token: each slot's column of every rank's row, in rank order.
DEV void bring_weights(const CombinePushParams& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k;
    const i32* row = reinterpret_cast<const i32*>(p.places) + (u64)t * p.places_stride;
    for (u32 k = threadIdx.x % 32; k < K; k += 32) {
        float sum = 0.f;
        for (u32 r = 0; r < p.num_ranks; r++)
            if (row[r] >= 0)
                sum += reinterpret_cast<const float*>(p.windows[r] + (u64)handshakes[r][kFirstOffset + 1] *
                                                                         16)[(u64)(u32)row[r] * K + k];
        reinterpret_cast<float*>(p.weights_out)[(u64)t * K + k] = sum;
    }
}

// Rows from other ranks below this one, which land one after the other; rows of a rank lie so, too, but the own ones are among them.
DEV u64 rows_before(const i64* counts, u32 rank, u32 but) {
    u64 rows = 0;
    for (u32 r = 0; r < rank; r++) rows += r == but ? 0 : (u64)counts[r];
    return rows;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) combine_push(const __grid_constant__ CombinePushParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32][kMostStages + kStages];
    __shared__ Slot slots[kMaxThreads / 32][kMostStages];
    __shared__ Way ways[kMaxRanks];
    __shared__ Queue queues[kMaxThreads / 32];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_in)) return;
    const u32 lane = threadIdx.x % 32, index = threadIdx.x / 32, warps = blockDim.x / 32, R = p.num_ranks;
    if (lane == 0) {
        queues[index].head = queues[index].tail = 0;
        for (u32 i = 0; i < kMostStages + kStages; i++) mbarrier_init(barriers[index] + i);
        mbarrier_init_done();
    }
    __syncwarp();
    const i64* rows_out = reinterpret_cast<const i64*>(p.rows_out);
    const i64* rows_in = reinterpret_cast<const i64*>(p.rows_in);
    if (blockIdx.x == 0)
        publish_handshake(p, epoch, [&](u32 w, u32 peer) -> u32 {
            if (w == kFirstOffset)
                return p.handshake[w] + (u32)(rows_before(rows_in, peer, p.rank) * (p.row_bytes / 16));
            if (w == kStartWord) return (u32)rows_before(rows_out, peer, kMaxRanks);
            if (w == kRoomWord) return (u32)rows_in[peer];
            return w == kRowsWord ? (u32)rows_out[peer] : w == kBlocksWord ? gridDim.x : p.handshake[w];
        });
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)rows_in[peer]; })) return;
    fence_async();  // the bulk loads that follow see what the cards promise

    const bool pushes = blockIdx.x < p.pushers, adds = !pushes || gridDim.x == 1;
    const u32 mine = threadIdx.x;
    bool good = true;
    if (mine < R) {
        Way& way = ways[mine];
        way.from = p.source + rows_before(rows_out, mine, kMaxRanks) * p.row_bytes;
        way.to = p.windows[mine] + (u64)handshakes[mine][kFirstOffset] * 16;
        way.landed = control_block(p, mine)->landed[p.rank];
        way.rows = mine == p.rank || !is_alive(p, mine) ? 0 : (u32)rows_out[mine];
        way.shift = handshakes[mine][kShiftWord];
        good = !way.rows || handshakes[mine][kRoomWord] == way.rows;
        if (!good) give_up(p, kMismatch, mine, kRoomWord, handshakes[mine][kRoomWord], way.rows, mine, 0);
    }
    if (!__syncthreads_and(good)) return;
    if (pushes && index < p.warps && lane == 0)
        push_rows(p, ways, blockIdx.x * p.warps + index, p.pushers * p.warps, shared + index * p.stages * p.pitch,
                  barriers[index], slots[index], queues[index]);
    if (pushes && index == warps - 1) flag_peers(queues, p.warps, epoch);
    if (adds) {
        __syncthreads();  // a single block's buffers have been read
        const u32 first = gridDim.x == 1 ? 0 : p.pushers;
        const bool comes = lane < R && lane != p.rank && is_alive(p, lane) && !handshakes[lane][kRowsAtWord];
        Warp<Rows> warp;
        warp.buffers = shared + index * (kStages * kGroup * kPiece);
        warp.barriers = barriers[index] + kMostStages;
        warp.rows.start = lane < R ? handshakes[lane][kStartWord] : 0;
        warp.rows.count = lane < R ? (u32)rows_in[lane] : 0;
        warp.rows.shift = p.handshake[kShiftWord];
        warp.rows.ready = ~__ballot_sync(kAll, comes);
        warp.rows.epoch = epoch;
        warp.rows.base = (u64)p.source;
        if (comes)
            warp.rows.base = (u64)p.windows[p.rank] + (u64)p.handshake[kFirstOffset] * 16 +
                             (rows_before(rows_in, lane, p.rank) - warp.rows.start) * p.row_bytes;
        else if (lane < R && lane != p.rank)
            warp.rows.base = (u64)p.windows[lane] + (u64)handshakes[lane][kRowsAtWord] * 16;
        warp.units = count_units(p, warp.rows);
        warp.dealt = (gridDim.x - first) * warps;
        warp.next = (blockIdx.x - first) * warps + index;
        warp.opened = 0;
        warp.broken = false;
        good = add_up(p, warp, [&](const Unit& unit) {
            if (p.weights_out && unit.first == 0) bring_weights(p, unit.token, handshakes);
        });
    }
    if (!__syncthreads_and(good)) return;
    exit_sync(p, epoch, handshakes, 2);  // who waits for rows is first to say whose are late
}
