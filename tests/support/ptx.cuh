// Replaces the package's device/ptx.cuh on a CPU: the same functions, on top of emulator.h.
#pragma once
#include "device/target.cuh"

#define DEV static inline __attribute__((unused))

constexpr u32 kAll = 0xffffffffu;

// ---- mbarriers: bit 0 is the phase, byte 1 the arrivals of a phase, byte 2 those that are missing, the upper half the
// bytes still to come

DEV void emu_turn_phase(u64* barrier) {
    const u64 arrivals = *barrier >> 8 & 0xff;
    if ((*barrier >> 16 & 0xff) == 0 && *barrier >> 32 == 0) {
        *barrier = ((*barrier & 1) ^ 1) | arrivals << 8 | arrivals << 16;
        emu_block->progress++;
    }
}
template <u32 Arrivals>
DEV void mbarrier_init(u64* barrier) {
    *barrier = Arrivals << 8 | Arrivals << 16;
}
DEV void mbarrier_init_done() {}
DEV void mbarrier_expect(u64* barrier, u32 bytes) {
    if ((*barrier >> 16 & 0xff) == 0) emu_fail("more arrivals in one phase of an mbarrier than it was made for");
    *barrier += ((u64)bytes << 32) - (1 << 16);
    emu_turn_phase(barrier);
}
DEV void mbarrier_arrive_after_copies(u64* barrier) {
    std::vector<EmuCopy>& copies = EMU_FIBER.copies;
    std::vector<EmuCopy>& loads = emu_block->loads[barrier];
    loads.insert(loads.end(), copies.begin(), copies.end());
    mbarrier_expect(barrier, 16 * copies.size());
    copies.clear();
}
DEV void mbarrier_wait(u64* barrier, u32 parity) {
    emu_change_fiber();  // a load takes time: other threads run before it arrives
    while ((*barrier & 1) == parity) {
        std::vector<EmuCopy>& loads = emu_block->loads[barrier];
        for (const EmuCopy& one : loads) {
            emu_copy(one);
            *barrier -= (u64)one.bytes << 32;
        }
        loads.clear();
        emu_turn_phase(barrier);
        if ((*barrier & 1) == parity) emu_change_fiber();
    }
}

// ---- asynchronous copies: done as late as possible, so that a kernel that does not wait finds other data

DEV void copy_async(void* shared, const void* global) {
    emu_check_aligned(shared, global, 16);
    memset(shared, 0xEE, 16);
    EMU_FIBER.copies.push_back({shared, global, 16});
}

DEV void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
    emu_check_aligned(shared, global, bytes);
    memset(shared, 0xEE, bytes);
    emu_block->loads[barrier].push_back({shared, global, bytes});
}
DEV void bulk_store(void* global, const void* shared, u32 bytes) {
    emu_check_aligned(global, shared, bytes);
    EMU_FIBER.open.push_back({global, shared, bytes});
}
DEV void bulk_commit() {
    EMU_FIBER.groups.push_back(EMU_FIBER.open);
    EMU_FIBER.open.clear();
}
DEV void emu_finish_groups(size_t left) {
    std::vector<std::vector<EmuCopy>>& groups = EMU_FIBER.groups;
    for (; groups.size() > left; groups.erase(groups.begin()))
        for (const EmuCopy& one : groups[0]) emu_copy(one);
}
template <int N>
DEV void bulk_wait_read() {
    emu_finish_groups(N);
}
template <int N>
DEV void bulk_wait() {
    emu_finish_groups(N);
}

// ---- order between threads and ranks; a poll lets other threads run

DEV void fence_async() {}
DEV void fence_system() { __threadfence(); }
DEV void store_release(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
DEV void store_release(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
DEV void store_relaxed(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
DEV void add_release(u32* p, u32 v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
DEV u32 load_acquire(const u32* p) {
    emu_change_fiber();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
DEV u64 load_acquire(const u64* p) {
    emu_change_fiber();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
DEV u32 load_relaxed(const u32* p) {
    emu_change_fiber();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
DEV u64 load_relaxed(const u64* p) {
    emu_change_fiber();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

DEV void store_relaxed(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
DEV u64 exchange_in_block(u64* p, u64 v) {
    emu_change_fiber();
    const u64 old = *p;
    *p = v;
    return old;
}
DEV u64 replace_in_block(u64* p, u64 expected, u64 v) {
    emu_change_fiber();
    const u64 old = *p;
    if (old == expected) *p = v;
    return old;
}

DEV float log2_near(float v) { return log2f(v); }
DEV float exp2_near(float v) { return exp2f(v); }

DEV void wait_for_kernel_before() {}
DEV void let_next_kernel_begin() {}

// Processors with AVX read and write 16 aligned bytes at once.
typedef long long EmuPair __attribute__((vector_size(16)));
DEV int4 load_packet(const void* p) {
    emu_change_fiber();
    const EmuPair v = *(volatile const EmuPair*)p;
    int4 packet;
    memcpy(&packet, &v, 16);
    return packet;
}
DEV void store_packet(void* p, const int4& packet) {
    EmuPair v;
    memcpy(&v, &packet, 16);
    *(volatile EmuPair*)p = v;
}
DEV u32 add_acquire_release(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }

DEV u32 pack_bf16(float low, float high) { return emu_pair(emu_to_bfloat16(low), emu_to_bfloat16(high)); }
DEV u32 pack_fp16(float low, float high) { return emu_pair(emu_to_float16(low), emu_to_float16(high)); }
DEV void unpack_fp16(u32 v, float& low, float& high) {
    low = emu_from_float16(v & 0xffff);
    high = emu_from_float16(v >> 16);
}
DEV u32 pack_fp8(float a, float b, float c, float d) {
    return emu_to_float8(a) | emu_to_float8(b) << 8 | emu_to_float8(c) << 16 | emu_to_float8(d) << 24;
}
DEV void unpack_fp8(u32 v, float (&n)[4]) {
    for (int i = 0; i < 4; i++) n[i] = emu_from_float8(v >> 8 * i & 0xff);
}

DEV void backoff() { emu_change_fiber(); }

DEV u64 clock_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + t.tv_nsec;
}
