// Rows as numbers: 16 bytes of a row in the type in which they are added up. kType: 0 bfloat16, 1 float16, 2 float32, 3 float64.
#pragma once
#include "device/ptx.cuh"

template <bool Wide>
struct Sum {
    typedef float type;
};
template <>
struct Sum<true> {
    typedef double type;
};
typedef Sum<kType == 3>::type Number;

constexpr u32 kPerChunk = kType <= 1 ? 8 : kType == 2 ? 4 : 2;  // numbers in 16 bytes

DEV void unpack_chunk(const int4& v, Number (&n)[kPerChunk]) {
    const u32* w = reinterpret_cast<const u32*>(&v);
    if constexpr (kType == 0) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            n[2 * i] = __uint_as_float(w[i] << 16);
            n[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    } else if constexpr (kType == 1) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float low, high;
            asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
                : "=f"(low), "=f"(high)
                : "r"(w[i]));
            n[2 * i] = low;
            n[2 * i + 1] = high;
        }
    } else if constexpr (kType == 2) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) n[i] = __uint_as_float(w[i]);
    } else {
        const u64* d = reinterpret_cast<const u64*>(&v);
#pragma unroll
        for (u32 i = 0; i < 2; i++) n[i] = __longlong_as_double((i64)d[i]);
    }
}

// One rounding, to nearest even.
DEV int4 pack_chunk(const Number (&n)[kPerChunk]) {
    int4 v;
    u32* w = reinterpret_cast<u32*>(&v);
    if constexpr (kType == 0) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(w[i]) : "f"((float)n[2 * i]), "f"((float)n[2 * i + 1]));
    } else if constexpr (kType == 1) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(w[i]) : "f"((float)n[2 * i]), "f"((float)n[2 * i + 1]));
    } else if constexpr (kType == 2) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = __float_as_uint((float)n[i]);
    } else {
        u64* d = reinterpret_cast<u64*>(&v);
#pragma unroll
        for (u32 i = 0; i < 2; i++) d[i] = (u64)__double_as_longlong(n[i]);
    }
    return v;
}
