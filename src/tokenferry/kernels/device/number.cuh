// 16 bytes of a row as numbers, in the type in which they are summed. kType: the type of the row (generated/codes.cuh).
#pragma once
#include "device/ptx.cuh"
#include "generated/codes.cuh"

template <bool Wide>
struct Sum {
    typedef float type;
};
template <>
struct Sum<true> {
    typedef double type;
};
typedef Sum<kType == kFp64>::type Number;

constexpr u32 kPerChunk = kType == kBf16 || kType == kFp16 ? 8 : kType == kFp32 ? 4 : 2;  // numbers in 16 bytes

DEV void unpack_chunk(const int4& v, Number (&n)[kPerChunk]) {
    const u32* w = reinterpret_cast<const u32*>(&v);
    if constexpr (kType == kBf16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            n[2 * i] = __uint_as_float(w[i] << 16);
            n[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    } else if constexpr (kType == kFp16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float low, high;
            unpack_fp16(w[i], low, high);
            n[2 * i] = low;
            n[2 * i + 1] = high;
        }
    } else if constexpr (kType == kFp32) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) n[i] = __uint_as_float(w[i]);
    } else {
        const u64* d = reinterpret_cast<const u64*>(&v);
#pragma unroll
        for (u32 i = 0; i < 2; i++) n[i] = __longlong_as_double((i64)d[i]);
    }
}

// v; NaN if it is infinite. Multiplied by 0, a finite number changes nothing: one instruction.
DEV float nan_if_infinite(float v) { return v * 0.f + v; }

// Rounds once, to nearest even.
DEV int4 pack_chunk(const Number (&n)[kPerChunk]) {
    int4 v;
    u32* w = reinterpret_cast<u32*>(&v);
    if constexpr (kType == kBf16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = pack_bf16((float)n[2 * i], (float)n[2 * i + 1]);
    } else if constexpr (kType == kFp16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = pack_fp16((float)n[2 * i], (float)n[2 * i + 1]);
    } else if constexpr (kType == kFp32) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = __float_as_uint((float)n[i]);
    } else {
        u64* d = reinterpret_cast<u64*>(&v);
#pragma unroll
        for (u32 i = 0; i < 2; i++) d[i] = (u64)__double_as_longlong(n[i]);
    }
    return v;
}
