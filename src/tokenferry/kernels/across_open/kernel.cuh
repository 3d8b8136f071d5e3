// across_open: across nodes, at the start of a redispatch, a combine or a warmup, and where a decode call makes memory:
// writes what the rail peers get to know of the call first, as dispatch_split does for a dispatch.
//
// Grid     one block. Not collective.
// Reads    goes [N], comes [N]: rows for the rail peer on each node, and from it, along the plan of
//          this rank; null: none. Where a decode call makes memory, goes says whether this node has room for it.
// Writes   headers [N][kRailWords]: the signature, then these words. Also if the group is broken: peers compare what
//          they get. What nothing has come to yet: came [N][kRailWords], the same from the rail peers, zeros; states
//          [N][chunks][2], of each chunk that will come kNothingCame, of others 0. Rows of p.cut_node come in chunks,
//          which begin at the rows p.chunk_first, those of any other node in one.
// Cost     a launch. sm_90a: <= 40 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/sync.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) across_open(const __grid_constant__ AcrossOpenParams p) {
    for (u32 i = threadIdx.x; i < p.num_nodes * kRailWords; i += blockDim.x) {
        const u32 word = i % kRailWords;
        const u32* rows = word == kRowsWord ? p.goes : p.comes;
        p.headers[i] = word < kSignatureWords ? p.handshake[word] : rows ? rows[i / kRailWords] : 0;
        p.came[i] = 0;
    }
    for (u32 i = threadIdx.x; i < p.num_nodes * p.chunks; i += blockDim.x) {
        const u32 m = i / p.chunks, c = i % p.chunks;
        const bool is_chunk = c == 0 || m == p.cut_node;
        const bool comes = m != p.node && p.comes && is_chunk && p.chunk_first[c] < p.comes[m];
        p.states[2 * i] = p.states[2 * i + 1] = comes ? kNothingCame : 0;
    }
}
