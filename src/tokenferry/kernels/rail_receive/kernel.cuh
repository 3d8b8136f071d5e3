// rail_receive: across nodes, in a decode call of a group that puts: waits for the messages of the exchange that
// rail_send has begun, and copies them to where the call wants them.
//
// Grid     any number of blocks, which take chunks of bodies round robin. Waits for the rail peers, but
//          for masked ones in calls that leave them out (p.skips). p.waits = 0: waits only until all that this rank has
//          put is complete.
// Reads    the landing and the flags of this rank: see device/rails.cuh.
// Writes   bodies [N - 1][body_bytes]; headers [N][kRailWords] and states [N][2], where they are not null. Of a message
//          whose body has another size only the head: the other rank has made another call, or has failed. What masked
//          ranks have sent is undefined.
// Faults   If nothing comes within the deadline, which all waits of a block share, this rank gives up; what has not
//          come is left as it is. With p.mask_late and p.skips it masks the rank that is late instead, as it does one
//          that has masked this rank. Later kernels see that, so it matters little that other blocks may have read a
//          part of the message.
// Cost     reads and writes N - 1 bodies. sm_90a: <= 64 registers, 0 spills, 16 B of static shared memory.
// Tests    tests/cuda/test_rail_messages.py, tests/emulator/test_across_puts.py, tests/emulator/test_across_masks.py,
//          tests/compile.
#include "device/copy.cuh"
#include "device/rails.cuh"

constexpr u32 kFailed = 0;  // this rank has given up
constexpr u32 kCame = 1;
constexpr u32 kOther = 2;    // the body of this message has another size
constexpr u32 kSkipped = 3;  // the rail peer is masked
constexpr u32 kNotYet = 4;

// Handles a rail peer that is late, or has masked this one. Returns kSkipped or kFailed.
DEV u32 lose(const RailReceiveParams& p, u32 m, u32 seen, u32 epoch, u64 waited) {
    if (!p.mask_late || !p.skips) {
        give_up(p, kLateNode, p.rank, m * p.num_ranks + p.rank, seen, epoch, p.rank, waited);
        return kFailed;
    }
    ControlBlock* mine = control_block(p, p.rank);
    atomicOr(&mine->untold_nodes[m / 32], 1u << m % 32);
    atomicOr(&mine->masked_nodes[m / 32], 1u << m % 32);
    store_release(p.masked_out + m, 1);
    return kSkipped;
}

// Returns whether a flag says that its sender has masked this rank: see device/rails.cuh.
DEV bool has_masked_this(u64 flag, u32 epoch) {
    return (i32)(epoch_in(flag) - epoch) > 0 || (epoch_in(flag) == epoch && (u32)flag == kMaskedBody);
}

// Returns kNotYet if a flag is still to be polled. `head`: that of the first chunk.
DEV u32 check_wait(const RailReceiveParams& p, const u64* flag, u64 head, u32 epoch, u32 m, u64& start) {
    const ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return kFailed;
    if (p.skips && load_relaxed(&mine->masked_nodes[m / 32]) >> m % 32 & 1) return kSkipped;  // by another block
    const u64 now = clock_ns();
    if (!start) start = now;
    if (p.mask_late && has_masked_this(head, epoch)) return lose(p, m, epoch_in(head), epoch, now - start);
    const u32 masked = p.skips ? load_relaxed(&mine->masked) : 0;
    for (u32 r = 0; r < p.num_ranks; r++) {
        const u64 lost = load_relaxed(&mine->gave_up[r]);
        if (!lost || is_closed(lost, r) || masked >> r & 1 || has_come(flag, epoch)) continue;
        give_up(p, kPeerGaveUp, r, (u32)(lost >> 32), epoch_in(load_relaxed(flag)), epoch, (u32)lost, now - start);
        return kFailed;
    }
    if (now - start <= p.timeout_ns || has_come(flag, epoch)) return kNotYet;
    return lose(p, m, epoch_in(load_relaxed(flag)), epoch, now - start);
}

// Waits for a chunk from node m; one thread. `start`: when this block began to wait, or 0.
DEV u32 wait_for_chunk(const RailReceiveParams& p, u32 epoch, u32 m, u32 chunk, u64& start) {
    const u64* first = flag_in(p, p.region, epoch, m, 0);
    for (u32 spins = 1;; spins++) {
        const u64 seen = load_relaxed(first + chunk);
        if (epoch_in(seen) == epoch && (u32)seen != kMaskedBody) return (u32)seen == p.body_bytes ? kCame : kOther;
        if (spins % 128) continue;
        const u64 head = load_relaxed(first);  // a smaller body may have no such chunk
        if (epoch_in(head) == epoch && (u32)head != p.body_bytes && (u32)head != kMaskedBody) return kOther;
        const u32 found = check_wait(p, first + chunk, head, epoch, m, start);
        if (found != kNotYet) return found;
    }
}

// Returns whether there is a node that is not mapped.
DEV bool puts_any(const RailReceiveParams& p) {
    for (u32 m = 0; m < p.num_nodes; m++)
        if (m != p.node && !mapped_region(p, m)) return true;
    return false;
}

DEV void read_head(const RailReceiveParams& p, u32 m, const u8* message) {
    const u32* words = reinterpret_cast<const u32*>(message);
    const u32 i = threadIdx.x;
    if (p.headers && i < kRailWords) p.headers[m * kRailWords + i] = words[i];
    if (p.states && i < 2) p.states[m * 2 + i] = words[kRailWords + i];
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) rail_receive(const __grid_constant__ RailReceiveParams p) {
    __shared__ u32 found;
    const ControlBlock* mine = control_block(p, p.rank);
    if (load_relaxed(&mine->failed)) return;
    const u32 epoch = load_relaxed(&mine->crossed), chunks = num_chunks(p), warp = threadIdx.x / 32;
    const u32 units = p.waits ? (p.num_nodes - 1) * chunks : 0;
    u64 start = 0;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 m = node_of_unit(p, unit), chunk = unit / (p.num_nodes - 1);
        if (threadIdx.x == 0)
            found = p.skips && is_node_masked(p, m) ? kSkipped : wait_for_chunk(p, epoch, m, chunk, start);
        __syncthreads();
        const u32 what = found;
        fence_system();
        __syncthreads();
        if (what == kFailed) return;
        if (what == kSkipped) continue;
        const u8* message = message_in(p, p.region, epoch, m);
        if (chunk == 0) read_head(p, m, message);
        if (what != kCame) continue;
        const u32 bytes = min(p.body_bytes - chunk * kRailChunk, kRailChunk),
                  piece = bytes / 16 / (blockDim.x / 32) * 16;
        const u32 begin = warp * piece, end = warp == blockDim.x / 32 - 1 ? bytes : begin + piece;
        const u8* from = message + kMessageHead + chunk * kRailChunk;
        warp_copy(body_of(p, m, chunk) + begin, from + begin, end - begin);
    }
    // When an exchange is over, what this rank has put is complete: peers need do nothing for it.
    if (blockIdx.x == 0 && threadIdx.x == 0 && puts_any(p)) quiet(p);
}
