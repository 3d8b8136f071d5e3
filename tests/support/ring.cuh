// The network library of the tests, in place of device/nvshmem.cuh: kernels write what they put into a ring in memory
// of the host, and a thread there copies it; see fake_network.py.
#pragma once

constexpr u32 kRingEntries = 32;

struct RingEntry {
    u64 to, from, signal, value;
    u32 bytes, rank, ready, unused;
};
struct Ring {
    u32 head, taken, complete, unused;
    RingEntry entries[kRingEntries];
};

template <class P>
DEV Ring* ring_of(const P& p) {
    return reinterpret_cast<Ring*>(p.network[2 * p.num_nodes]);
}

template <class P>
DEV void put_signal(const P& p, u32 m, u8* to, u8* from, u32 bytes, u64* signal, u64 value) {
    if (threadIdx.x % 32) return;
    Ring* ring = ring_of(p);
    const u32 at = atomicAdd(&ring->head, 1u);
    while (at - load_relaxed(&ring->taken) >= kRingEntries) {}
    RingEntry* entry = &ring->entries[at % kRingEntries];
    entry->to = (u64)to;
    entry->from = (u64)from;
    entry->signal = (u64)signal;
    entry->value = value;
    entry->bytes = bytes;
    entry->rank = (u32)p.network[p.num_nodes + m];
    fence_system();
    store_release(&entry->ready, at + 1);
}

template <class P>
DEV void quiet(const P& p) {
    Ring* ring = ring_of(p);
    const u32 head = load_relaxed(&ring->head);
    while ((i32)(load_relaxed(&ring->complete) - head) < 0) {}
}
