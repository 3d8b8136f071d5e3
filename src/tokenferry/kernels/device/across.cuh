// Across nodes: whether what has come from other nodes belongs to this call, and is valid. A rank whose kernels have
// become no-ops, because of a fault or an aborted call, sends undefined data, and its state with it: its host may not
// know yet. An exchange that was given up ends as one that was not. All functions work on any params struct with the
// fields
//
//   headers [N][kRailWords]    what the rail peer on each node said when it began the call; zeros where
//                              nothing has come
//   epoch                      the epoch of the dispatch whose rows a decode combine sends; null: it is another call
//   states [num_states][2]     the words `stopped` and `failed` of that rank when it sent something; number 0 is number
//                              first_state of [N][chunks]. Where nothing has come that should have, each word is
//                              kNothingCame
//   since                      when the stream began to wait for them, which is added to wait_ns; null: nobody counts
//   num_nodes, node
//
// If anything is wrong, this rank gives up, and its later kernels are no-ops: nothing undefined is passed on. Nothing
// is expected of masked nodes in calls that leave them out (`skips`).
#pragma once
#include "device/nodes.cuh"

template <class P>
DEV void give_up_across(const P& p, u32 node, u32 seen) {
    give_up(p, kNodeGaveUp, p.rank, node * p.num_ranks + p.rank, seen, 0, p.rank, 0);
}

template <class P>
DEV u32 rail_word(const P& p, u32 word) {
    return word == kDispatchWord && p.epoch ? (u32)*p.epoch : p.handshake[word];
}

// Writes what the rail peers get to know of a decode call, and empties `came` and `states`, where they
// say the same; called by all threads of a block. `overflow`: what goes into kRowsWord.
template <class P>
DEV void open_rails(const P& p, u32 overflow) {
    for (u32 i = threadIdx.x; i < p.num_nodes * kRailWords; i += blockDim.x) {
        const u32 word = i % kRailWords;
        p.headers[i] = word < kSignatureWords ? rail_word(p, word) : word == kRowsWord ? overflow : 0;
        p.came[i] = 0;
    }
    for (u32 i = threadIdx.x; i < p.num_nodes * 2; i += blockDim.x) p.states[i] = i / 2 == p.node ? 0 : kNothingCame;
}

// Compares one word that the rail peer on node m sent; called by one thread. Returns whether it is `expected`.
template <class P>
DEV bool compare_word(const P& p, u32 m, u32 word, u32 expected) {
    const u32 seen = p.headers[m * kRailWords + word];
    if (seen != expected) give_up(p, kNodeMismatch, p.rank, word, seen, expected, m * p.num_ranks + p.rank, 0);
    return seen == expected;
}

// Compares the signature that the rail peer on node m sent; called by one thread. Returns whether it made this call.
template <class P>
DEV bool compare_signature(const P& p, u32 m) {
    if (!p.headers[m * kRailWords]) {  // no call has such a kind
        give_up_across(p, m, kNothingCame);
        return false;
    }
    for (u32 word = 0; word < kSignatureWords; word++)
        if (!compare_word(p, m, word, rail_word(p, word))) return false;
    return true;
}

// Returns whether this rank has waited for that on node m: one that the wait has masked is counted, too.
template <class P>
DEV bool has_waited_for(const P& p, u32 m, bool skips) {
    return m != p.node && !(skips && is_node_masked(p, m) && !is_node_untold(p, m));
}

// Adds the time of the wait for an exchange to the counters of the rail peers; called by one thread.
template <class P>
DEV void count_wait(const P& p, bool skips) {
    if (!p.since || !p.wait_ns) return;
    const u64 waited = clock_ns() - *p.since;
    // Counters are those of all ranks; p.wait_ns is where those of this node begin.
    for (u32 m = 0; m < p.num_nodes; m++)
        if (has_waited_for(p, m, skips)) atomicAdd(p.wait_ns + ((i64)m - p.node) * (i64)p.num_ranks + p.rank, waited);
}

// Looks at all states; called by all threads of a block.
template <class P>
DEV void check_states(const P& p, bool skips) {
    for (u32 i = threadIdx.x; i < p.num_states; i += blockDim.x) {
        const u32 m = (p.first_state + i) / p.chunks;
        if (skips && is_node_masked(p, m)) continue;
        if (p.states[2 * i] | p.states[2 * i + 1]) give_up_across(p, m, p.states[2 * i + 1]);
    }
}
