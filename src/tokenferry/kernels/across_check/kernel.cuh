// across_check: across nodes: whether what has come from other nodes belongs to this call, and is valid. A rank whose kernels have
// become no-ops, because of a fault or an aborted call, sends undefined data, and its state with it: its host may not know yet.
//
// Grid     one block. Not collective. This rank is on p.node.
// Reads    headers [N][kRailWords]: signature and rows of the rank across from this one on each node, when it began the call; the
//          signature has to be that of this rank. goes [N], comes [N]: what the plan of this rank says about rows for that rank,
//          and from it; null: there is no plan yet, and any number will do.
//          states [num_states][2]: the words `stopped` and `failed` of that rank when it sent a chunk of rows; number 0 is number
//          p.first_state of [N][p.chunks]. Where nothing has come that should have, each word of a state is kNothingCame, and a
//          header is 0: an exchange that was given up ends as one that was not.
// Writes   nothing, unless something is wrong: then the record of the host and peers' control blocks, as any kernel that gives up.
// Faults   If a header differs, or a state is not 0, this rank gives up, and its later kernels are no-ops: nothing undefined is
//          passed on.
// Cost     a launch. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/sync.cuh"

DEV void give_up_across(const AcrossCheckParams& p, u32 node, u32 seen) {
    give_up(p, kNodeGaveUp, p.rank, node * p.num_ranks + p.rank, seen, 0, p.rank, 0);
}

// Compares what the rank across on node m said; called by one thread.
DEV void compare_header(const AcrossCheckParams& p, u32 m) {
    const u32* header = p.headers + m * kRailWords;
    if (!header[0]) {  // no call has such a kind
        give_up_across(p, m, kNothingCame);
        return;
    }
    for (u32 word = 0; word < (p.comes ? kRailWords : kSignatureWords); word++) {
        const u32 expected = word == kRowsWord ? p.comes[m] : word == kRailSpaceWord ? p.goes[m] : p.handshake[word];
        if (header[word] == expected) continue;
        give_up(p, kNodeMismatch, p.rank, word, header[word], expected, m * p.num_ranks + p.rank, 0);
        return;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) across_check(const __grid_constant__ AcrossCheckParams p) {
    if (must_skip(p, p.src_counts)) return;
    for (u32 m = threadIdx.x; m < p.num_nodes; m += blockDim.x)
        if (m != p.node) compare_header(p, m);
    for (u32 i = threadIdx.x; i < p.num_states; i += blockDim.x)
        if (p.states[2 * i] | p.states[2 * i + 1])
            give_up_across(p, (p.first_state + i) / p.chunks, p.states[2 * i + 1]);
}
