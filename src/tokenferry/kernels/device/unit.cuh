// A unit: 128 tokens of a routing. For each expert and each rank it has 128 bits: which of the tokens go there.
#pragma once
#include "device/index.cuh"
#include "generated/codes.cuh"

// kWide: whether indices are int64.
DEV i64 index_at(const u8* topk_idx, u64 i) { return load_index(topk_idx, kWide, i); }

// Fills masks [E + R][4] for one unit; called by all threads of a block, with barriers inside. Returns the least
// token * K + slot with an index outside [-1, E) among those that this thread reads, or ~0. Such an index sets no bit.
DEV u32 mark_unit(const u8* topk_idx, u32 num_tokens, u32 top_k, u32 num_experts, u32 num_ranks, u32 unit, u32* masks) {
    const u32 columns = num_experts + num_ranks, local = num_experts / num_ranks;
    for (u32 i = threadIdx.x; i < columns * 4; i += blockDim.x) masks[i] = 0;
    __syncthreads();
    u32 bad = ~0u;
    const u32 first = unit * kUnit, tokens = min(kUnit, num_tokens - first);
    for (u32 i = threadIdx.x; i < tokens * top_k; i += blockDim.x) {
        const i64 e = index_at(topk_idx, (u64)first * top_k + i);
        if (e < -1 || e >= num_experts) {
            bad = min(bad, first * top_k + i);
            continue;
        }
        if (e < 0) continue;
        const u32 token = i / top_k, word = token / 32, bit = 1u << token % 32;
        atomicOr(&masks[(u32)e * 4 + word], bit);
        atomicOr(&masks[(num_experts + (u32)e / local) * 4 + word], bit);
    }
    __syncthreads();
    return bad;
}

// Returns how many tokens of the unit before `token` are marked in column c.
DEV i32 count_marked(const u32* masks, u32 c, u32 token) {
    i32 n = 0;
#pragma unroll
    for (u32 w = 0; w < 4; w++) {
        const u32 bits = token >= 32 * w + 32 ? kAll : token <= 32 * w ? 0 : (1u << (token - 32 * w)) - 1;
        n += __popc(masks[c * 4 + w] & bits);
    }
    return n;
}

DEV bool is_marked(const u32* masks, u32 c, u32 token) { return masks[c * 4 + token / 32] >> token % 32 & 1; }
