// Which tokens go to which node, and to which slot there; see kernel.cuh.
#pragma once
#include "device/across.cuh"
#include "device/index.cuh"
#include "generated/decode_words.cuh"

DEV i64 index_at(const DecodePackParams& p, u32 i) {
    return p.wide ? static_cast<const i64*>(p.topk_idx)[i] : (i64) static_cast<const i32*>(p.topk_idx)[i];
}
DEV bool is_good(const DecodePackParams& p, i64 e) { return e >= -1 && e < p.num_experts; }
DEV u32 node_of(const DecodePackParams& p, i64 e) { return (u32)e / (p.num_experts / p.num_nodes); }

// Returns the expert of a slot of the routing, counted from the first one of node m; -1: it has none there.
DEV i32 expert_on(const DecodePackParams& p, u32 i, u32 m) {
    const i64 e = index_at(p, i);
    return e >= 0 && e < p.num_experts && node_of(p, e) == m ? (i32)(e - (i64)m * (p.num_experts / p.num_nodes)) : -1;
}

// The routing of a record: a word for the token, then the weights; then the experts, in 16 bits each.
DEV u32* routing_of(const DecodePackParams& p, u32 record) {
    return reinterpret_cast<u32*>(p.records + (u64)record * p.record_units * 16 + p.routing_at);
}
DEV u16* experts_of(const DecodePackParams& p, u32 record) {
    return reinterpret_cast<u16*>(routing_of(p, record) + 1 + (p.weighted ? p.top_k : 0));
}

// The tokens for each node, in shared memory.
struct Slots {
    u32 words;    // of a mask
    u32* masks;   // [N][words]: bit t: token t goes there
    u32* before;  // [N][words]: tokens of earlier words
    u32* totals;  // [N]
};

DEV Slots new_slots(const DecodePackParams& p, u8* shared) {
    const u32 words = (p.num_tokens + 31) / 32, all = p.num_nodes * words;
    u32* masks = reinterpret_cast<u32*>(shared);
    return {words, masks, masks + all, masks + 2 * all};
}

DEV bool goes(const Slots& slots, u32 t, u32 m) { return slots.masks[m * slots.words + t / 32] >> t % 32 & 1; }

// Returns the record of a token that goes to node m, among those for all other nodes.
DEV u32 record_of(const DecodePackParams& p, const Slots& slots, u32 t, u32 m) {
    const u32 at = m * slots.words + t / 32, earlier = slots.masks[at] & ((1u << t % 32) - 1);
    return (m - (m > p.node)) * p.segment + slots.before[at] + __popc(earlier);
}

DEV u32 count_nodes(const DecodePackParams& p, const Slots& slots, u32 t) {
    u32 nodes = 0;
    for (u32 m = 0; m < p.num_nodes; m++) nodes += goes(slots, t, m);
    return nodes;
}

// Finds the slots; all threads of a block. Returns the most tokens for one other node. `bad` becomes the first slot of
// the routing with an index outside [-1, E), or the last one of the first token for too many nodes; ~0: there is none.
DEV u32 find_slots(const DecodePackParams& p, const Slots& slots, u32& most, u32& bad) {
    for (u32 i = threadIdx.x; i < p.num_nodes * slots.words; i += blockDim.x) slots.masks[i] = 0;
    if (threadIdx.x == 0) {
        most = 0;
        bad = ~0u;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.num_tokens * p.top_k; i += blockDim.x) {
        const i64 e = index_at(p, i);
        const u32 t = i / p.top_k;
        if (!is_good(p, e)) atomicMin(&bad, i);
        else if (e >= 0 && !is_node_masked(p, node_of(p, e)))
            atomicOr(&slots.masks[node_of(p, e) * slots.words + t / 32], 1u << t % 32);
    }
    __syncthreads();
    for (u32 m = threadIdx.x; m < p.num_nodes; m += blockDim.x) {
        u32 total = 0;
        for (u32 w = 0; w < slots.words; w++) {
            slots.before[m * slots.words + w] = total;
            total += __popc(slots.masks[m * slots.words + w]);
        }
        slots.totals[m] = total;
        if (m != p.node) atomicMax(&most, total);
    }
    for (u32 t = threadIdx.x; p.max_nodes && t < p.num_tokens; t += blockDim.x)
        if (count_nodes(p, slots, t) > p.max_nodes) atomicMin(&bad, t * p.top_k + p.top_k - 1);
    __syncthreads();
    return most;
}

// Records what is wrong with slot `bad` of the routing: its index, or if that is good, its token; one thread.
DEV void record_slot(const DecodePackParams& p, const Slots& slots, u32 bad) {
    const i64 index = index_at(p, bad);
    const u32 t = bad / p.top_k;
    if (is_good(p, index)) {
        record_fault(p, kTooManyNodes, 0, t, count_nodes(p, slots, t), p.max_nodes, 0, 0);
        return;
    }
    record_fault(p, kBadRouting, bad % p.top_k, t, recorded_index(index), p.num_experts, 0, 0);
}
