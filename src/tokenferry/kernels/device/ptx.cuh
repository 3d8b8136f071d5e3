// PTX instructions that CUDA C++ has no function for: asynchronous copies, mbarriers, fences, loads and stores with a
// scope and an order, conversions. All inline assembly of the package lies here; tests/support/ptx.cuh replaces this
// file on a CPU.
#pragma once
#include "device/target.cuh"

#define DEV static __device__ __forceinline__

constexpr u32 kAll = 0xffffffffu;

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers of loads; how many arrivals a phase has, and from whom, device/transfer.cuh says

template <u32 Arrivals>
DEV void mbarrier_init(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "n"(Arrivals) : "memory");
}
DEV void mbarrier_init_done() {
    if constexpr (kHasBulk) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and adds to the bytes that the loads of this phase bring.
DEV void mbarrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Arrives once all copy_async of this thread have come.
DEV void mbarrier_arrive_after_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for loads. They need no deadline: they come from memory of this GPU or of a peer, which responds whatever the
// process of the peer does.
DEV void mbarrier_wait(u64* barrier, u32 parity) {
    u32 done = 0;
    while (!done) {
        if constexpr (kHasBulk)
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(shared_address(barrier)), "r"(parity)
                : "memory");
        else
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(shared_address(barrier)), "r"(parity)
                : "memory");
    }
}

// ---- bulk copies: addresses and sizes are multiples of 16 bytes

DEV void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
DEV void bulk_store(void* global, const void* shared, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}
DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the sources of all but the last N groups may be overwritten.
template <int N>
DEV void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Waits until all groups of this thread but the last N are in memory.
template <int N>
DEV void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- asynchronous copies of 16 bytes, through L2 alone: L1 may hold what peers have overwritten

DEV void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// ---- order between threads, GPUs and the asynchronous proxy, which executes bulk copies

DEV void fence_async() {
    if constexpr (kHasBulk) asm volatile("fence.proxy.async;" ::: "memory");
}
DEV void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEV void store_release(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void store_release(u64* p, u64 v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV void store_relaxed(u64* p, u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV void add_release(u32* p, u32 v) {
    asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV u64 load_acquire(const u64* p) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV u32 load_relaxed(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void store_relaxed(u32* p, u32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV u64 load_relaxed(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// Words in shared memory that the warps of a block hand each other. Atomics, and no loads and stores with an order, so
// that compute-sanitizer can see that they synchronise. Both return what was there before.
DEV u64 exchange_in_block(u64* p, u64 v) {
    u64 old;
    asm volatile("atom.acq_rel.cta.shared::cta.exch.b64 %0, [%1], %2;"
                 : "=l"(old)
                 : "r"(shared_address(p)), "l"(v)
                 : "memory");
    return old;
}
// Stores v if the word is `expected`.
DEV u64 replace_in_block(u64* p, u64 expected, u64 v) {
    u64 old;
    asm volatile("atom.acq_rel.cta.shared::cta.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "r"(shared_address(p)), "l"(expected), "l"(v)
                 : "memory");
    return old;
}

// One instruction each, accurate to about the last two bits; the functions of CUDA C++ take twenty.
DEV float log2_near(float v) {
    float l;
    asm("lg2.approx.f32 %0, %1;" : "=f"(l) : "f"(v));
    return l;
}
DEV float exp2_near(float v) {
    float e;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(v));
    return e;
}

// Programmatic dependent launch: the first waits for the kernel before this one in the stream; the second lets the next
// kernel start on SMs that are free, if it begins with such a wait. Without it, kernels start one after the other.
DEV void wait_for_kernel_before() {
    if constexpr (kDependentLaunch != 0) asm volatile("griddepcontrol.wait;" ::: "memory");
}
DEV void let_next_kernel_begin() {
    if constexpr (kDependentLaunch != 0) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// 16 bytes at once: no reader sees a part of a write.
DEV int4 load_packet(const void* p) {
    u64 low, high;
    asm volatile("{\n.reg .b128 v;\nld.relaxed.sys.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(p)
                 : "memory");
    return make_int4((int)low, (int)(low >> 32), (int)high, (int)(high >> 32));
}
DEV void store_packet(void* p, const int4& v) {
    const u64 low = (u32)v.x | (u64)(u32)v.y << 32, high = (u32)v.z | (u64)(u32)v.w << 32;
    asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.sys.global.b128 [%0], v;\n}" ::"l"(p), "l"(low),
                 "l"(high)
                 : "memory");
}
DEV u32 add_acquire_release(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

// ---- conversions: to nearest even

// Two numbers in 32 bits, `low` in the lower half.
DEV u32 pack_bf16(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(v) : "f"(low), "f"(high));
    return v;
}
DEV u32 pack_fp16(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(v) : "f"(low), "f"(high));
    return v;
}
DEV void unpack_fp16(u32 v, float& low, float& high) {
    asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
        : "=f"(low), "=f"(high)
        : "r"(v));
}

// Four numbers as float8_e4m3fn, lowest byte first; numbers beyond 448 become 448.
DEV u32 pack_fp8(float a, float b, float c, float d) {
    u32 v;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, "
        "%3;\nmov.b32 %0, {low, high};\n}"
        : "=r"(v)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return v;
}

DEV void unpack_fp8(u32 v, float (&n)[4]) {
    asm("{\n.reg .b16 low, high, a, b, c, d;\n.reg .b32 x, y;\nmov.b32 {low, high}, %4;\n"
        "cvt.rn.f16x2.e4m3x2 x, low;\ncvt.rn.f16x2.e4m3x2 y, high;\nmov.b32 {a, b}, x;\nmov.b32 {c, d}, y;\n"
        "cvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\ncvt.f32.f16 %2, c;\ncvt.f32.f16 %3, d;\n}"
        : "=f"(n[0]), "=f"(n[1]), "=f"(n[2]), "=f"(n[3])
        : "r"(v));
}

// ---- time

// Sleeps for about a tenth of a microsecond: polls of many warps delay the very stores that they wait for.
DEV void backoff() { asm volatile("nanosleep.u32 100;"); }

DEV u64 clock_ns() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
