// dispatch: stores each row of this rank directly at its final place on every rank that needs it.
//
// Grid     num_sms blocks of p.warps warps; correctness does not depend on how many run at once.
// Reads    x [T, row_bytes]; places (see dispatch_assign); scale, weights, topk_idx where they are not null; tokens
//          [T], where it is not null: the token on its source rank, which this rank acts for.
// Writes   peers' heaps, at the offsets in their handshakes: rows, scales, weights; in a first dispatch also the peer's
//          half of the plan: ids [N, K], src_token [N], row_idx [N, K].
// Roles    Every warp takes units (the row of a token, or a piece of a large row) one by one, through a ring of
//          p.stages buffers in shared memory: lane 0 loads, lane r stores to rank r; or all lanes together
//          (device/transfer.cuh). Small data is stored by all lanes, without the ring.
// Order    1 lane 0   bulk load of unit n + stages - 1, once the stores from its buffer have been read
//          (wait_group.read)
//          2 lane r   bulk store of unit n to the place on rank r                     async proxy, no order yet
//          3 lane r   wait_group 0: its stores are in memory
//          4 block    __syncthreads; adds 1 to done[rank] on every peer, with release (exit_sync)
//          5 peer     block 0 sees the sum of all blocks, fences                      sees 4, therefore 2 and all small
//                     stores
// Why nothing is overwritten
//          A handshake says where its rank receives rows, and that nothing reads that memory any more (it was taken
//          from the heap on the stream of this call). Loads need no handshake, so they start before the wait.
// Cost     bytes out = rows sent * (row + scale + small). sm_90a: <= 64 registers, 0 spills, 3072 B of static shared
//          memory, at most 228480 B of dynamic.
// Tests    tests/cuda/test_dispatch_kernel.py, tests/compile.
#include "dispatch/ring.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) dispatch(const __grid_constant__ DispatchParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kMaxStages];
    const u32 epoch = next_epoch(p);
    if (must_skip(p, p.rows_out)) return;
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, step = gridDim.x * warps;
    const u32 units = p.num_tokens * p.pieces, dealt = step * (p.stages - 1);
    if (blockIdx.x == 0) publish_move(p, epoch, p.rows_out);
    const Ring ring = fill_ring(p, shared + (u64)warp * p.stages * p.pitch, barriers + warp * kMaxStages,
                                blockIdx.x * warps + warp, step, units);
    if (!read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)p.rows_in[peer]; })) {
        drop_loads(ring);
        return;
    }
    move_units(p, p.wide, ring, handshakes, units, [&] { return claim_unit(p, dealt); });
    exit_sync(p, epoch, handshakes);
}
