// dispatch_relay: across nodes, when the routing of a dispatch has come: checks that the rail peers made this call,
// says how many tokens this rank passes on, and lays out their routing.
//
// Grid     any number of blocks. Not collective. N nodes; this rank is on p.node.
// Reads    headers [N][kRailWords]: what the rail peer on each node said. mine [N][kRailWords]: what this rank said,
//          as dispatch_split wrote it. parcels_in (dispatch_rails/parcels.cuh) of all other nodes, of as many tokens as
//          the headers say, or of p.apart each. p.segment: tokens of a segment of the routing. p.capacity: how many
//          tokens cross if counts stay on the device, used or not; else 0.
// Writes   ids [N, p.segment, K]: what came, at the beginning of each segment; tokens: those of all parcels behind each
//          other. sizes of the plan: came [N], tokens from each node; went [N], tokens for it; of the own node all T;
//          behind the word that dispatch_notify writes, the segment. The host: came [N], then the call number, with
//          release.
// Faults   A rank that made another call, or of which nothing has come, makes this rank give up; the host gets the
//          record.
// Cost     reads and writes what came. sm_90a: <= 64 registers, 0 spills.
// Tests    tests/cuda/test_node_kernels.py, tests/emulator/test_across_nodes.py, tests/compile.
#include "device/across.cuh"
#include "device/index.cuh"
#include "dispatch_rails/parcels.cuh"

// Lays out the parcel of node m, of num tokens, which is number `other` and has `first` tokens in those before it.
DEV void lay_out(const DispatchRelayParams& p, u32 m, u32 other, u32 first, u32 num) {
    const Parcel from = parcel_at(p.parcels_in, other, first, num, p.top_k);
    const u64 at = (u64)m * p.segment * p.top_k;
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (u32 i = thread; i < num; i += step) p.tokens[first + i] = from.tokens[i];
    for (u64 i = thread; i < (u64)num * p.top_k; i += step) store_index(p.ids, kWide, at + i, from.ids[i]);
}

// Compares the headers, and says how many tokens cross; called by all threads of a block.
DEV void publish(const DispatchRelayParams& p) {
    bool good = true;
    for (u32 m = threadIdx.x; m < p.num_nodes; m += blockDim.x) {
        u32 came = p.num_tokens, went = p.num_tokens;
        if (m != p.node) {
            good = compare_signature(p, m) && good;
            came = p.capacity ? p.capacity : p.headers[m * kRailWords + kRowsWord];
            went = p.capacity ? p.capacity : p.mine[m * kRailWords + kRowsWord];
        }
        p.sizes[m] = came;
        p.sizes[p.num_nodes + m] = went;
        p.host[kHostCameWord + m] = came;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x != 0 || !good) return;
    p.sizes[2 * p.num_nodes + 1] = p.segment;
    fence_system();
    store_release(p.host, p.call_number);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_relay(const __grid_constant__ DispatchRelayParams p) {
    if (must_skip(p, p.dst_counts)) return;
    if (blockIdx.x == 0) publish(p);
    u32 other = 0, first = 0;
    for (u32 m = 0; m < p.num_nodes; m++) {
        if (m == p.node) continue;
        const u32 num = p.apart ? p.apart : p.headers[m * kRailWords + kRowsWord];
        lay_out(p, m, other++, first, num);
        first += num;
    }
}
