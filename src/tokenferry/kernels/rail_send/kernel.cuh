// rail_send: across nodes, in a decode call of a group that puts: sends a message to the rail peer on
// each other node.
//
// Grid     any number of blocks, which take chunks of bodies round robin. Waits for nobody.
// Reads    bodies [N - 1][body_bytes], for the other nodes in their order; headers [N][kRailWords], null: messages have
//          none; this rank's state.
// Writes   the landing of the rail peer, and its flags: see device/rails.cuh. A mapped one gets bulk stores, and a
//          release of the flag; another one a put_signal from the staging of this rank.
//          Nothing goes to masked nodes in calls that leave them out (p.skips), but once, after a kernel has masked
//          one, a head whose flag says so.
// Faults   None. A rank that is stopped sends undefined data along with its state; one that has failed sends its state
//          alone, as peers may still read what an earlier exchange brought to the half that is due.
// Cost     reads and writes N - 1 bodies, twice for nodes that are not mapped. sm_90a: <= 64 registers (elsewhere <=
//          80), 0 spills, 32784 B of static shared memory.
// Tests    tests/cuda/test_rail_messages.py, tests/emulator/test_across_puts.py, tests/compile.
#include "device/rails.cuh"
#include "device/transfer.cuh"

DEV void write_head(const RailSendParams& p, u32 m, u8* message) {
    const ControlBlock* mine = control_block(p, p.rank);
    u32* words = reinterpret_cast<u32*>(message);
    for (u32 i = threadIdx.x; i < kRailWords; i += blockDim.x) words[i] = p.headers ? p.headers[m * kRailWords + i] : 0;
    if (threadIdx.x == 0) {
        words[kRailWords] = load_relaxed(&mine->stopped);
        words[kRailWords + 1] = load_relaxed(&mine->failed);
    }
}

// Copies a chunk of a body by way of shared memory; called by the movers of a warp. `parity`: that of the copies before
// in this block.
DEV void copy_chunk(u8* to, const u8* from, u32 bytes, u8* buffer, u64* barrier, u32 parity) {
    expect_loads(barrier, bytes);
    start_load(buffer, from, bytes, barrier);
    end_loads(barrier);
    wait_loads(barrier, parity);
    start_store(to, buffer, bytes);
    commit_stores();
    wait_stores<0>();
}

// Returns whether nothing goes to node m, but the head of a message to one that is to know.
DEV bool is_left_out(const RailSendParams& p, u32 m) { return p.skips && is_node_masked(p, m); }

// Puts a chunk that lies in memory which is mapped here, or is staged; all threads. `bytes`: those of its body.
// `body_bytes`: what the flag says of the whole body.
DEV void announce(const RailSendParams& p, u32 epoch, u32 m, u32 chunk, u32 bytes, u32 body_bytes) {
    const u64 value = (u64)epoch << 32 | body_bytes;
    u8* mapped = mapped_region(p, m);
    __syncthreads();
    if (mapped) {
        if (threadIdx.x == 0) {
            fence_system();
            store_release(flag_in(p, mapped, epoch, p.node, chunk), value);
        }
    } else if (threadIdx.x < 32) {
        fence_system();
        const u32 first = chunk ? kMessageHead + chunk * kRailChunk : 0;
        put_signal(p, m, message_in(p, p.region, epoch, p.node) + first, staged(p, epoch, m) + first,
                   bytes + (chunk ? 0 : kMessageHead), flag_in(p, p.region, epoch, p.node, chunk), value);
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) rail_send(const __grid_constant__ RailSendParams p) {
    __shared__ __align__(128) u8 buffer[kRailChunk];
    __shared__ u64 barrier;
    ControlBlock* mine = control_block(p, p.rank);
    const u32 epoch = load_relaxed(&mine->crossed) + 1;
    const bool failed = load_relaxed(&mine->failed) != 0;
    const u32 body_bytes = failed ? 0 : p.body_bytes, chunks = failed ? 1 : num_chunks(p);
    if (threadIdx.x == 0) {
        init_barrier(&barrier);
        init_barriers_done();
    }
    __syncthreads();
    u32 parity = 0;
    for (u32 unit = blockIdx.x; unit < (p.num_nodes - 1) * chunks; unit += gridDim.x) {
        const u32 m = node_of_unit(p, unit), chunk = unit / (p.num_nodes - 1);
        u8* mapped = mapped_region(p, m);
        u8* message = mapped ? message_in(p, mapped, epoch, p.node) : staged(p, epoch, m);
        const bool left_out = is_left_out(p, m);
        if (left_out && (chunk || !is_node_untold(p, m))) continue;
        const u32 bytes = left_out ? 0 : min(body_bytes - chunk * kRailChunk, kRailChunk);
        if (chunk == 0) write_head(p, m, message);
        if (bytes) {
            if (is_mover(threadIdx.x) && threadIdx.x < 32)
                copy_chunk(message + kMessageHead + chunk * kRailChunk, body_of(p, m, chunk), bytes, buffer, &barrier,
                           parity);
            parity ^= 1;
        }
        announce(p, epoch, m, chunk, bytes, left_out ? kMaskedBody : body_bytes);
    }
    if (last_block(p) && threadIdx.x == 0) {  // all blocks have read `crossed`
        mine->arrived = 0;
        mine->crossed = epoch;
        for (u32 i = 0; p.skips && i < (p.num_nodes + 31) / 32; i++) mine->untold_nodes[i] = 0;
    }
}
