// The pushing half of combine_push: rows are loaded into shared memory and stored to peers; see kernel.cuh.
#pragma once
constexpr bool kGrouped = false;
#include "device/add.cuh"

constexpr u32 kBehind = 2;  // the stores of a piece are waited for after this many more pieces

// Where the rows for one peer are, and where they go.
struct Route {
    const u8* from;
    u8* to;
    u32* landed;  // the flags of its units, on the peer
    u32 rows, shift;
};

// A buffer of a ring. flag: that of the unit that ends with this piece, or null.
struct Slot {
    u8* to;
    u32* flag;
    u32 bytes;
};

// The flags that one pushing warp has queued to be set, in turn. A word is the address of a flag, or one of the two
// below; both warps reach it by atomics alone, each of which hands it over.
constexpr u32 kQueue = 4, kOwed = 8;
constexpr u64 kFree = 0, kEnd = 1;  // kEnd: nothing follows
struct Queue {
    u64 words[kQueue];
    u32* owed[kOwed];  // flags of the last pieces, whose stores may be under way
};

// Sets the flags of units that are in the memory of their peers; called by the last warp of a block that pushes. Lane i
// serves warp i; the lanes share the fences.
DEV void set_flags(Queue* queues, u32 warps, u32 epoch) {
    const u32 lane = threadIdx.x % 32;
    bool open = lane < warps;
    for (u32 taken = 0; __any_sync(kAll, open);) {
        const u64 word = open ? exchange_in_block(&queues[lane].words[taken % kQueue], kFree) : kFree;
        open = open && word != kEnd;
        const bool ready = word != kFree && word != kEnd;
        if (!__any_sync(kAll, ready)) {
            backoff();
            continue;
        }
        fence_async();
        fence_system();
        if (!ready) continue;
        store_relaxed((u32*)word, epoch);
        taken++;
    }
}

// Queues a word for `set_flags` as the n-th; waits while the queue is full.
DEV void queue_word(Queue& queue, u32 n, u64 word) {
    while (replace_in_block(&queue.words[n % kQueue], kFree, word) != kFree) backoff();
}

DEV u32 units_of(const Route& route) { return (route.rows + (1u << route.shift) - 1) >> route.shift; }

// Pushes the units that this warp takes; called by movers. `next`: its first unit; `dealt`: see claim_unit.
DEV void push_rows(const CombinePushParams& p, const Route* routes, u32 next, u32 dealt, u8* buffers, u64* barriers,
                   Slot* slots, Queue& queue) {
    const u32 peers = p.num_ranks - 1, stages = p.stages;
    u32 total = 0;
    for (u32 r = 0; r < p.num_ranks; r++) total = max(total, units_of(routes[r]));
    total *= peers;
    const Route* route = routes;
    u32 unit = 0, row = 0, end = 0, piece = 0;
    const auto load = [&](u32 stage) {  // starts to load the next piece; returns false if there is none
        while (row == end) {
            if (next >= total) return false;
            route = routes + (p.rank + 1 + next % peers) % p.num_ranks;
            unit = next / peers;
            next = dealt + by_leader([&] { return atomicAdd(&control_block(p, p.rank)->pushed, 1u); });
            if (unit >= units_of(*route)) continue;
            row = unit << route->shift;
            end = min(row + (1u << route->shift), route->rows);
        }
        const u32 bytes = min(p.piece_bytes, p.row_bytes - piece * p.piece_bytes);
        const u64 at = (u64)row * p.row_bytes + (u64)piece * p.piece_bytes;
        expect_loads(barriers + stage, bytes);
        start_load(buffers + stage * p.pitch, route->from + at, bytes, barriers + stage);
        end_loads(barriers + stage);
        if (++piece == p.row_pieces) piece = 0, row++;
        if (is_leader()) slots[stage] = {route->to + at, row == end ? route->landed + unit : nullptr, bytes};
        return true;
    };
    u32 issued = 0, queued = 0;
    const auto announce = [&](u32 n) {  // the n-th piece is in memory: queues the flag of a unit that ends with it
        if (!is_leader()) return;
        if (u32* flag = queue.owed[n % kOwed]) queue_word(queue, queued++, (u64)flag);
    };
    while (issued < stages - 1 && load(issued)) issued++;
    for (u32 n = 0; n < issued; n++) {
        const u32 stage = n % stages;
        wait_loads(barriers + stage, n / stages & 1);
        sync_movers();  // slots are written by the leader
        const Slot slot = slots[stage];
        start_store(slot.to, buffers + stage * p.pitch, slot.bytes);
        commit_stores();
        if (is_leader()) queue.owed[n % kOwed] = slot.flag;
        wait_stores_read<1>();  // the buffer of the piece before this one may be filled again
        if (load(issued % stages)) issued++;
        if (n < kBehind) continue;
        wait_stores<kBehind>();
        announce(n - kBehind);
    }
    wait_stores<0>();
    for (u32 n = issued < kBehind ? 0 : issued - kBehind; n < issued; n++) announce(n);
    if (is_leader()) queue_word(queue, queued, kEnd);
}
