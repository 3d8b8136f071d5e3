// CUDA C++ for g++, as far as the kernels use it: each block of a grid is an OS thread, each of its threads a fiber.
// Names that are not CUDA begin with emu, so that none clashes with a name of a kernel.
//
// The fibers of a block take turns, and switch only where a thread waits (barriers, warp intrinsics, polls of memory
// that
// others write), so one block runs the same way every time; the system schedules blocks and ranks.
//
// Catches  wrong results, deadlocks of one block, misaligned asynchronous copies, a buffer that is used before its load
// has come or
//          after its store was issued, bulk stores or loads that are not waited for.
// Misses   missing fences (a CPU orders more than a GPU), races in shared memory between two changes of fibers, missing
//          fences of the asynchronous proxy, reads of static shared memory that was never written (it is zero here),
// timing,
//          registers.
#pragma once
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include <atomic>
#include <unordered_map>
#include <vector>

#include "emulator_stacks.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // a block is an OS thread, and each has one block only

struct EmuIndex {
    unsigned x;
};
struct int4 {
    int x, y, z, w;
};
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- blocks and fibers

struct EmuCopy {
    void* to;
    const void* from;
    unsigned bytes;
};

struct EmuFiber {
    void* place[5];  // where it goes on, once started
    EmuIndex index;
    bool started = false, done = false;
    unsigned exchanges = 0;
    const unsigned* watched = nullptr;  // need not run as long as this word is `old`
    unsigned old = 0;
    std::vector<EmuCopy> copies;               // asynchronous copies of 16 bytes that no barrier has yet
    std::vector<EmuCopy> open;                 // bulk stores of the group that is not committed yet
    std::vector<std::vector<EmuCopy>> groups;  // committed and not done: each is done when it is waited for, no earlier
};

struct EmuWarp {
    unsigned long long values[2][32];  // what lanes exchange; halves take turns
    unsigned arrived = 0, generation = 0, live = 32;
};

struct EmuBlock {
    unsigned index, grid, threads, live;
    void (*kernel)(const void*);
    const void* params;
    unsigned char* dynamic;
    unsigned char* stacks;
    std::vector<EmuFiber> fibers;
    std::vector<EmuWarp> warps;
    unsigned current = 0, arrived = 0, generation = 0, progress = 0;
    bool all[2] = {true, true};  // of __syncthreads_and; halves take turns
    std::unordered_map<void*, std::vector<EmuCopy>>
        loads;  // by barrier: each is done when it is waited for, no earlier
    void* scheduler[5];
};

static thread_local EmuBlock* emu_block;
static std::atomic<const char*> emu_fault{nullptr};  // as on a GPU, nothing runs any more after one

#define EMU_FIBER (emu_block->fibers[emu_block->current])
#define threadIdx (EMU_FIBER.index)
#define blockIdx (EmuIndex{emu_block->index})
#define blockDim (EmuIndex{emu_block->threads})
#define gridDim (EmuIndex{emu_block->grid})

// By what g++ builds in: those of the C library look for clean-up handlers, and swapcontext and setcontext make a
// system
// call each time, to keep signal masks that no test uses. A test starts millions of fibers.
static void __attribute__((noinline, noreturn)) emu_jump(void** place) { __builtin_longjmp(place, 1); }
static void __attribute__((noinline)) emu_change_fiber() {
    if (!__builtin_setjmp(EMU_FIBER.place)) emu_jump(emu_block->scheduler);
}
static void emu_run_fiber(int i);
static void __attribute__((noinline, noreturn)) emu_start_fiber(int i) {
    unsigned char* stack = emu_block->stacks + EMU_STACK_BYTES * i;
#ifdef __x86_64__
    asm volatile("mov %0, %%rsp; xor %%ebp, %%ebp; call *%1" ::"r"(stack + EMU_STACK_BYTES), "r"(emu_run_fiber),
                 "D"(i));
#else
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = EMU_STACK_BYTES;
    context.uc_link = 0;
    makecontext(&context, (void (*)())emu_run_fiber, 1, i);
    setcontext(&context);
#endif
    __builtin_unreachable();
}
static void __attribute__((noinline)) emu_resume_fiber() {
    EmuFiber& fiber = EMU_FIBER;
    if (__builtin_setjmp(emu_block->scheduler)) return;
    if (fiber.started) emu_jump(fiber.place);
    fiber.started = true;
    emu_start_fiber(fiber.index.x);
}
static void emu_await_change(const unsigned& word, unsigned old) {
    EMU_FIBER.watched = &word, EMU_FIBER.old = old;
    while (word == old) emu_change_fiber();
    EMU_FIBER.watched = nullptr;
}
static void emu_fail(const char* what) {
    emu_fault = what;
    emu_change_fiber();  // for ever: no block goes on
}

// ---- barriers and warps

static bool __syncthreads_and(bool value) {
    const unsigned generation = emu_block->generation;
    bool& all = emu_block->all[generation & 1];
    all = all && value;
    if (++emu_block->arrived >= emu_block->live) {
        emu_block->arrived = 0;
        emu_block->all[~generation & 1] = true;
        emu_block->generation++, emu_block->progress++;
    }
    emu_await_change(emu_block->generation, generation);
    return all;
}
static void __syncthreads() { __syncthreads_and(true); }

// Returns the values of all lanes, once each lane has one.
template <class T>
static const unsigned long long* emu_exchange(unsigned mask, T value) {
    if (mask != ~0u) emu_fail("a warp intrinsic of a part of a warp: the emulator has none");
    EmuWarp& warp = emu_block->warps[threadIdx.x / 32];
    unsigned long long* values = warp.values[EMU_FIBER.exchanges++ & 1];
    values[threadIdx.x % 32] = 0;
    memcpy(&values[threadIdx.x % 32], &value, sizeof value);
    const unsigned generation = warp.generation;
    if (++warp.arrived >= warp.live) warp.arrived = 0, warp.generation++, emu_block->progress++;
    emu_await_change(warp.generation, generation);
    return values;
}
template <class T>
static T emu_value_of(unsigned long long word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}
template <class T>
static T __shfl_sync(unsigned mask, T value, int lane) {
    return emu_value_of<T>(emu_exchange(mask, value)[lane & 31]);
}
template <class T>
static T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    const unsigned long long* values = emu_exchange(mask, value);
    const unsigned lane = threadIdx.x % 32;
    return lane >= delta ? emu_value_of<T>(values[lane - delta]) : value;
}
static unsigned __ballot_sync(unsigned mask, bool value) {
    const unsigned long long* values = emu_exchange(mask, (int)value);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)(values[i] & 1) << i;
    return bits;
}
static unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const unsigned long long* values = emu_exchange(mask, value);
    for (int i = 0; i < 32; i++) value = (unsigned)values[i] < value ? (unsigned)values[i] : value;
    return value;
}
static unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    const unsigned long long* values = emu_exchange(mask, value);
    for (int i = 0; i < 32; i++) value |= (unsigned)values[i];
    return value;
}
template <class T>
static unsigned __match_any_sync(unsigned mask, T value) {
    const unsigned long long* values = emu_exchange(mask, value);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)(values[i] == values[threadIdx.x % 32]) << i;
    return bits;
}
static bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
static bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int bits) {
    const unsigned long long* values = emu_exchange(mask, value);
    return emu_value_of<T>(values[(threadIdx.x % 32 ^ (unsigned)bits) & 31]);
}
static int __reduce_max_sync(unsigned mask, int value) {
    const unsigned long long* values = emu_exchange(mask, value);
    for (int i = 0; i < 32; i++) value = (int)values[i] > value ? (int)values[i] : value;
    return value;
}
static void __syncwarp() { emu_exchange(~0u, 0); }

// ---- memory

static void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static void __threadfence_block() { __threadfence(); }
template <class T>
static T __ldg(const T* p) {
    return *p;
}
template <class T, class U>
static T atomicAdd(T* p, U v) {
    return __atomic_fetch_add(p, (T)v, __ATOMIC_SEQ_CST);
}
template <class T, class U>
static T atomicOr(T* p, U v) {
    return __atomic_fetch_or(p, (T)v, __ATOMIC_SEQ_CST);
}
template <class T>
static T atomicCAS(T* p, T old, T v) {
    __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return old;
}
template <class T, class U>
static T atomicMin(T* p, U v) {
    T old = *p;
    while ((T)v < old && !__atomic_compare_exchange_n(p, &old, (T)v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <class T, class U>
static T atomicMax(T* p, U v) {
    T old = *p;
    while ((T)v > old && !__atomic_compare_exchange_n(p, &old, (T)v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}

template <class T>
static T atomicExch(T* p, T v) {
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}

// ---- numbers

static int __popc(unsigned v) { return __builtin_popcount(v); }
static int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static int __ffs(unsigned v) { return __builtin_ffs(v); }
static int __ffsll(unsigned long long v) { return __builtin_ffsll(v); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __uint_as_float(unsigned v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
static unsigned __float_as_uint(float f) {
    unsigned v;
    memcpy(&v, &f, 4);
    return v;
}
static double __longlong_as_double(long long v) {
    double f;
    memcpy(&f, &v, 8);
    return f;
}
static long long __double_as_longlong(double f) {
    long long v;
    memcpy(&v, &f, 8);
    return v;
}
static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

// To nearest even; every NaN becomes 0x7fff, as PTX says. By hand: not every g++ has these types.
static unsigned emu_to_bfloat16(float f) {
    const unsigned bits = __float_as_uint(f);
    return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned emu_to_float16(float f) {
    const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const float a = __uint_as_float(size);
    if (f != f) return 0x7fff;
    if (a >= 65520.0f) return sign | 0x7c00;
    if (a < 0x1p-14f) return sign | (unsigned)nearbyintf(a * 0x1p24f);
    return sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10));
}
static float emu_from_float16(unsigned h) {
    const unsigned sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) return sign ? -(fraction * 0x1p-24f) : fraction * 0x1p-24f;
    return __uint_as_float(sign | (exponent == 31 ? 0xff : exponent + 112) << 23 | fraction << 13);
}
// float8_e4m3fn: 4 bits of exponent (bias 7), 3 of fraction, no infinities; beyond 448 it is 448, NaN is 0x7f.
static unsigned emu_to_float8(float f) {
    const unsigned sign = __float_as_uint(f) >> 24 & 0x80;
    const float a = fabsf(f);
    if (f != f) return 0x7f;
    if (a >= 448.0f) return sign | 0x7e;
    if (a < 0x1p-6f) return sign | (unsigned)nearbyintf(a * 0x1p9f);
    const unsigned bits = __float_as_uint(a);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}
static float emu_from_float8(unsigned v) {
    const unsigned exponent = v >> 3 & 15, fraction = v & 7;
    float a = exponent ? __uint_as_float((exponent + 120) << 23 | fraction << 20) : fraction * 0x1p-9f;
    if ((v & 0x7f) == 0x7f) a = __uint_as_float(0x7fc00000u);
    return v & 0x80 ? -a : a;
}
static unsigned emu_pair(unsigned low, unsigned high) { return low | high << 16; }

// ---- bulk copies

static void emu_check_aligned(const void* to, const void* from, unsigned bytes) {
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 || !bytes)
        emu_fail("an asynchronous copy that is empty or not of whole 16 bytes");
}
static void emu_copy(const EmuCopy& one) { memcpy(one.to, one.from, one.bytes); }

// ---- launches

static void emu_run_fiber(int i) {
    emu_block->kernel(emu_block->params);
    if (!EMU_FIBER.open.empty() || !EMU_FIBER.groups.empty()) emu_fail("a thread ends with bulk stores under way");
    if (!EMU_FIBER.copies.empty()) emu_fail("a thread ends with copies that no barrier waits for");
    EMU_FIBER.done = true;
    emu_block->live--;
    EmuWarp& warp = emu_block->warps[i / 32];
    if (--warp.live && warp.arrived >= warp.live) warp.arrived = 0, warp.generation++;
    if (emu_block->live && emu_block->arrived >= emu_block->live) {
        emu_block->arrived = 0;
        emu_block->all[~emu_block->generation & 1] = true;
        emu_block->generation++;
    }
    emu_change_fiber();
}

static void* emu_run_block(void* given) {
    emu_block = (EmuBlock*)given;
    emu_block->stacks = emu_take_stacks();
    if (!emu_block->stacks) {
        emu_fault = "no memory for the stacks of a block";
        return 0;
    }
    for (unsigned i = 0; i < emu_block->threads; i++) emu_block->fibers[i].index = {i};
    unsigned idle = 0;  // times in a row that all threads waited for other blocks
    while (emu_block->live && !emu_fault) {
        const unsigned progress = emu_block->progress, live = emu_block->live;
        unsigned ran = 0;
        for (unsigned i = 0; i < emu_block->threads && !emu_fault; i++) {
            const EmuFiber& fiber = emu_block->fibers[i];
            if (fiber.done || (fiber.watched && *fiber.watched == fiber.old)) continue;
            emu_block->current = i;
            ran++;
            emu_resume_fiber();
        }
        if (!ran && !emu_fault) emu_fault = "every thread of a block waits for another one of it";
        idle = emu_block->progress == progress && emu_block->live == live ? idle + 1 : 0;
        if (idle > 4) {  // or blocks that wait would take the processors of those that they wait for
            const timespec pause = {0, 20000l * (idle < 30 ? idle : 30)};
            nanosleep(&pause, 0);
        } else if (idle) sched_yield();
    }
    for (auto& one : emu_block->loads)
        if (!one.second.empty() && !emu_fault) emu_fault = "a block ends with bulk loads under way";
    emu_give_stacks(emu_block->stacks);
    return 0;
}

// Runs a grid to its end. Null, or what went wrong in this kernel, now or before.
static const char* emu_run_grid(void (*kernel)(const void*), const void* params, unsigned grid, unsigned threads,
                                unsigned smem) {
    std::vector<EmuBlock> blocks(grid);
    std::vector<pthread_t> running;
    const size_t bytes = (smem + 255) / 128 * 128;
    for (unsigned i = 0; i < grid; i++) {
        EmuBlock& one = blocks[i];
        one.index = i, one.grid = grid, one.threads = one.live = threads;
        one.kernel = kernel, one.params = params;
        one.fibers.resize(threads);
        one.warps.resize(threads / 32);
        one.dynamic = (unsigned char*)aligned_alloc(128, bytes);
        memset(one.dynamic, 0xCD, bytes);
        pthread_t thread;
        if (pthread_create(&thread, 0, emu_run_block, &one)) {
            emu_fault = "the system has no thread for a block";
            break;
        }
        running.push_back(thread);
    }
    for (pthread_t thread : running) pthread_join(thread, 0);
    for (EmuBlock& one : blocks) free(one.dynamic);
    return emu_fault;
}
