// dispatch_split: across nodes, before anything is sent: counts the tokens of this rank that go to each rank of the
// whole group, and to each node.
//
// Grid     any number of blocks; each takes units of 128 tokens. The last block to finish does the work that needs all
//          of them. Not collective.
// Reads    topk_idx [T, K] in [-1, E). R ranks on N nodes; this one is on p.node. p.max_nodes: most nodes of a token;
//          0: any.
// Writes   table [units, R + N]: tokens of earlier units, per rank, then per node. bases [R + N]: tokens for lower
//          ranks; then where the rows for each node begin among those for all other nodes: behind each other, or with a
//          p.capacity each that many apart, if counts stay on the device. dst_counts [R]. headers [N][kRailWords]: what
//          the rail peer gets to know: the signature, and how many tokens come. The host: rows for all
//          ranks, then tokens for each node.
//          What nothing has come to yet: came [N][kRailWords], headers from the rail peers, zeros; states
//          [num_states][2], kNothingCame.
// Order    1 all blocks  a unit's tokens per column (a token counts once per rank, once per node)
//          2 last block  columns over all units, bases; counts for the host, then the call number, with release
// Faults   A bad index, or a token for too many nodes, aborts the call on this rank before anything is sent: peers
//          wait, and the call can be repeated. If counts stay on the device, the host has sent already: it is recorded;
//          a bad index counts as unused, and the token goes to all its nodes.
// Cost     reads T * K indices. sm_90a: <= 40 registers, 0 spills, 64 B of static shared memory, at most 36864 B of
//          dynamic.
// Example  R=4 N=2 E=4, node 0, topk_idx = {{0,1},{1,3}}: dst_counts 1 2 0 1; nodes 2 1; bases 0 1 3 3, 0 0.
// Tests    tests/cuda/test_node_kernels.py (the example is its first case), tests/compile.
#include "dispatch_split/nodes.cuh"

// Leaves counts that all later kernels skip, and headers of this call: if counts stay on the device, the host sends
// them.
DEV void abort_split(const DispatchSplitParams& p) {
    for (u32 r = threadIdx.x; r < p.all_ranks; r += blockDim.x) p.dst_counts[r] = -1;
    for (u32 i = threadIdx.x; i < p.num_nodes * kRailWords; i += blockDim.x) {
        const u32 word = i % kRailWords;
        p.headers[i] = word < kSignatureWords ? p.handshake[word] : 0;
    }
}

// Returns the last slot of the first token for more than p.max_nodes nodes among those that this thread looks at, or
// ~0. The last one, so that a bad index of the same token comes first.
DEV u32 find_far(const DispatchSplitParams& p, u32 unit, const u32* masks) {
    const u32 first = unit * kUnit, tokens = min(kUnit, p.num_tokens - first);
    u32 far = ~0u;
    for (u32 token = threadIdx.x; token < tokens; token += blockDim.x) {
        u32 nodes = 0;
        for (u32 m = 0; m < p.num_nodes; m++) nodes += is_marked(masks, p.all_ranks + m, token);
        if (nodes > p.max_nodes) far = min(far, (first + token) * p.top_k + p.top_k - 1);
    }
    return far;
}

// Returns the number of nodes that the choices of a token lie on; called by one thread.
DEV u32 count_nodes(const DispatchSplitParams& p, u32 token) {
    const u32 of_node = p.num_experts / p.num_nodes;
    u32 nodes = 0;
    for (u32 k = 0; k < p.top_k; k++) {
        const i64 e = index_at(p.topk_idx, (u64)token * p.top_k + k);
        bool is_first = e >= 0;
        for (u32 j = 0; j < k && is_first; j++) {
            const i64 before = index_at(p.topk_idx, (u64)token * p.top_k + j);
            is_first = before < 0 || (u32)before / of_node != (u32)e / of_node;
        }
        nodes += is_first;
    }
    return nodes;
}

// Records what is wrong with slot `bad`: its index, or if that is good, its token; called by one thread.
DEV void record_slot(const DispatchSplitParams& p, u32 bad) {
    const i64 index = index_at(p.topk_idx, bad);
    if (index >= -1 && index < p.num_experts) {
        record_fault(p, kTooManyNodes, 0, bad / p.top_k, count_nodes(p, bad / p.top_k), p.max_nodes, 0, 0);
        return;
    }
    record_fault(p, kBadRouting, bad % p.top_k, bad / p.top_k, recorded_index(index), p.num_experts, 0, 0);
}

// Replaces each column of the table by its exclusive prefix sums over the units, and stores the totals.
DEV void sum_columns(const DispatchSplitParams& p, i32* totals) {
    const u32 columns = num_columns(p), units = (p.num_tokens + kUnit - 1) / kUnit;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) {
        i32 before = 0;
        for (u32 unit = 0; unit < units; unit++) {
            i32& rows = p.table[(u64)unit * columns + c];
            const i32 here = rows;
            rows = before;
            before += here;
        }
        totals[c] = before;
    }
}

// Writes the exclusive prefix sums of counts[0..num) to sums, leaving out number `except`; returns their sum. Called by
// a warp.
DEV i32 write_bases(const i32* counts, u32 num, u32 except, i32* sums) {
    const u32 lane = threadIdx.x % 32;
    i32 before = 0;
    for (u32 first = 0; first < num; first += 32) {
        const u32 i = first + lane;
        const i32 here = i < num && i != except ? counts[i] : 0;
        i32 sum = here;
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            const i32 left = __shfl_up_sync(kAll, sum, d);
            if (lane >= d) sum += left;
        }
        if (i < num) sums[i] = before + sum - here;
        before += __shfl_sync(kAll, sum, 31);
    }
    return before;
}

// Empties what the rail peers say; called by one block.
DEV void empty_words(const DispatchSplitParams& p) {
    for (u32 i = threadIdx.x; i < p.num_nodes * kRailWords; i += blockDim.x) p.came[i] = 0;
    for (u32 i = threadIdx.x; i < 2 * p.num_states; i += blockDim.x) p.states[i] = kNothingCame;
}

DEV void publish(const DispatchSplitParams& p, const i32* totals) {
    const u32 R = p.all_ranks, N = p.num_nodes;
    for (u32 r = threadIdx.x; r < R; r += blockDim.x) p.dst_counts[r] = totals[r];
    for (u32 i = threadIdx.x; i < N * kRailWords; i += blockDim.x) {
        const u32 word = i % kRailWords;
        const u32 rows = word == kRowsWord ? (u32)totals[R + i / kRailWords] : 0;
        p.headers[i] = word < kSignatureWords ? p.handshake[word] : rows;
    }
    for (u32 m = threadIdx.x; m < N; m += blockDim.x) p.host[kHostNodesWord + m] = (u32)totals[R + m];
    if (threadIdx.x < 32) {
        const i32 sent = write_bases(totals, R, ~0u, p.bases);
        if (!p.capacity) write_bases(totals + R, N, p.node, p.bases + R);
        if (threadIdx.x == 0) p.host[kHostRowsWord] = (u32)sent;
    }
    for (u32 m = threadIdx.x; p.capacity && m < N; m += blockDim.x) p.bases[R + m] = (m - (m > p.node)) * p.capacity;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
        store_release(p.host, p.call_number);
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_split(const __grid_constant__ DispatchSplitParams p) {
    extern __shared__ __align__(16) u8 shared[];
    if (blockIdx.x == 0) empty_words(p);
    if (is_stopped(p)) {
        abort_split(p);
        return;
    }
    u32* masks = reinterpret_cast<u32*>(shared);
    ControlBlock* mine = control_block(p, p.rank);
    const u32 columns = num_columns(p), units = (p.num_tokens + kUnit - 1) / kUnit;
    u32 seen = ~0u;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        seen = min(seen, mark_nodes(p, unit, masks));
        if (p.max_nodes) seen = min(seen, find_far(p, unit, masks));
        for (u32 c = threadIdx.x; c < columns; c += blockDim.x)
            p.table[(u64)unit * columns + c] = count_marked(masks, c, kUnit);
        __syncthreads();
    }
    if (seen != ~0u) atomicMax(&mine->bad_slot, ~seen);
    if (!last_block(p)) return;

    const u32 bad = ~load_relaxed(&mine->bad_slot);
    __syncthreads();  // all threads have read it before it is cleared
    if (threadIdx.x == 0) mine->bad_slot = mine->arrived = 0;
    if (bad != ~0u && threadIdx.x == 0) record_slot(p, bad);
    if (bad != ~0u && !p.capacity) {
        abort_split(p);
        if (threadIdx.x == 0) stop(p);
        return;
    }
    i32* totals = reinterpret_cast<i32*>(shared);  // in place of the masks
    sum_columns(p, totals);
    __syncthreads();
    publish(p, totals);
}
