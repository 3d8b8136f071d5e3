// decode_pack: across nodes, at the start of a decode dispatch: casts the rows that go to other nodes, and lays them
// side by side for the rail peer there, each with its routing.
//
// Grid     any number of blocks. Each finds the slots of all tokens for itself; the first one also reports what is
//          wrong. Not collective.
// Reads    x [T, H], topk_idx [T, K] in [-1, E), if p.weighted weights [T, K].
// Writes   records [N - 1][segment][record_units]: for each other node, in their order, a record for each slot: its
//          row, the scales, then the routing: the token and the weights [K] in 32 bits each, the experts [K] in 16,
//          counted from the first one of that node (-1: none there). Slots are in the order of tokens; those that are
//          not used have no experts. slots [T, N]: the record of a token among those for all other nodes; for the own
//          node the token itself; -1: it does not go there, as nothing goes to masked nodes. number: that of this
//          dispatch. ids_here [T, K], weights_here [T, K]: the routing for the own node. headers, came, states: see
//          device/across.cuh; overflows of the own node: see decode_unpack.
// Faults   It is too late for a call to be aborted: its exchange is enqueued already. A bad index is recorded, and
//          counts as unused; a token for too many nodes is recorded, and goes to all of them. If a rank has more than
//          p.node_slots tokens for another node, it sends nothing but how many it had.
// Cost     reads T rows, writes one for each slot; every block reads T * K indices. sm_90a: <= 64 registers, 0 spills,
//          16 B of static shared memory, at most 134152 B of dynamic.
// Tests    tests/cuda/test_decode_rails.py, tests/emulator/test_across_decode.py, tests/compile.
#include "decode_pack/slots.cuh"
#include "device/cast.cuh"

// Loads, casts and stores one chunk of a token's row: 512 columns, or if nothing is cast 64 packets; one warp.
DEV void pack_chunk(const DecodePackParams& p, const Slots& slots, u32 t, u32 chunk) {
    const u32 lane = threadIdx.x % 32;
    constexpr u32 kPacked = kCast ? 1 : 2;  // packets of a lane
    int4 v[kPacked], scales = make_int4(0, 0, 0, 0);
    if constexpr (kCast) {
        int4 loaded[kLoads];
        load_columns(p.x, t, p.columns, chunk * kChunkColumns + lane * 16, loaded);
        v[0] = cast_packet(loaded, p.scale_format, scales);
    } else {
#pragma unroll
        for (u32 i = 0; i < kPacked; i++) {
            const u32 unit = (chunk * kPacked + i) * 32 + lane;
            if (unit < p.row_units) v[i] = __ldg(p.x + (u64)t * p.row_units + unit);
        }
    }
    for (u32 m = 0; m < p.num_nodes; m++) {
        if (m == p.node || !goes(slots, t, m)) continue;
        int4* record = reinterpret_cast<int4*>(p.records) + (u64)record_of(p, slots, t, m) * p.record_units;
#pragma unroll
        for (u32 i = 0; i < kPacked; i++) {
            const u32 unit = (chunk * kPacked + i) * 32 + lane;
            if (unit < p.row_units) record[unit] = v[i];
        }
        if (kCast && lane == 31) record[p.row_units + chunk] = scales;
    }
}

// Writes the routing of one token for all other nodes; one warp.
DEV void pack_routing(const DecodePackParams& p, const Slots& slots, u32 t) {
    for (u32 m = 0; m < p.num_nodes; m++) {
        if (m == p.node || !goes(slots, t, m)) continue;
        const u32 record = record_of(p, slots, t, m);
        u32* routing = routing_of(p, record);
        if (threadIdx.x % 32 == 0) routing[0] = t;
        for (u32 k = threadIdx.x % 32; k < p.top_k; k += 32) {
            experts_of(p, record)[k] = (u16)expert_on(p, t * p.top_k + k, m);
            if (p.weighted) routing[1 + k] = __float_as_uint(p.weights[(u64)t * p.top_k + k]);
        }
    }
}

// Writes what this rank itself keeps of its routing. `sent`: whether anything is.
DEV void write_own(const DecodePackParams& p, const Slots& slots, bool sent) {
    const u32 N = p.num_nodes, K = p.top_k, first = blockIdx.x * blockDim.x + threadIdx.x,
              step = gridDim.x * blockDim.x;
    for (u32 i = first; i < p.num_tokens * K; i += step) {
        p.ids_here[i] = sent ? expert_on(p, i, p.node) : -1;
        if (p.weighted) p.weights_here[i] = p.weights[i];
    }
    for (u32 i = first; i < p.num_tokens * N; i += step) {
        const u32 t = i / N, m = i % N;
        p.slots[i] = !sent || !goes(slots, t, m) ? -1 : m == p.node ? (i32)t : (i32)record_of(p, slots, t, m);
    }
    for (u32 i = first; i < (N - 1) * p.segment * K; i += step) {  // what is not used
        const u32 record = i / K, other = record / p.segment, m = other + (other >= p.node);
        if (!sent || record % p.segment >= slots.totals[m]) experts_of(p, record)[i % K] = 0xffff;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) decode_pack(const __grid_constant__ DecodePackParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 most, bad;
    if (is_stopped(p)) {
        if (blockIdx.x == 0) open_rails(p, 0);
        return;
    }
    const Slots slots = new_slots(p, shared);
    const u32 found = find_slots(p, slots, most, bad);
    const u32 overflow = found > p.node_slots ? found : 0;
    if (blockIdx.x == 0) {
        open_rails(p, overflow);
        if (threadIdx.x == 0) {
            ControlBlock* mine = control_block(p, p.rank);
            *p.number = mine->packed = mine->packed + 1;
            p.overflows[p.node] = overflow;
            if (bad != ~0u) record_slot(p, slots, bad);
        }
    }
    write_own(p, slots, !overflow);
    if (overflow) return;
    const u32 chunk_units = kCast ? 32 : 64, chunks = (p.row_units + chunk_units - 1) / chunk_units;
    const u32 warps = blockDim.x / 32, step = gridDim.x * warps;
    for (u32 i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < p.num_tokens * chunks; i += step) {
        if (i % chunks == 0) pack_routing(p, slots, i / chunks);
        pack_chunk(p, slots, i / chunks, i % chunks);
    }
}
