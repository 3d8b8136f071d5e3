// FP8 rows: float8_e4m3fn, one scale for 128 columns; bit for bit the format of tokenferry/formats/fp8.py. A lane holds
// 16 columns, so 8 lanes share a scale.
#pragma once
#include "device/number.cuh"
#include "generated/decode_words.cuh"

// One number as float8_e4m3fn, and back: in integers, for GPUs without such conversions; the bits are the same.
DEV u32 fp8_bits(float v) {
    const u32 bits = __float_as_uint(v), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (v != v) return 0x7f;
    if (size < 0x3c800000u)  // below 2^-6 steps are 2^-9, as those of floats from 2^14 on
        return sign | (__float_as_uint(__fadd_rn(__uint_as_float(size), 0x1p14f)) - 0x46800000u);
    return sign | min(((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);
}
DEV float fp8_number(u32 v) {
    const float size = __fmul_rn(__uint_as_float((v & 0x7f) << 20), 0x1p120f);  // its exponent counts from -7, not -127
    return __uint_as_float((v & 0x7f) == 0x7f ? 0x7fffffffu : __float_as_uint(size) | (v & 0x80) << 24);
}

// Four numbers, lowest byte first; numbers beyond 448 become 448.
DEV u32 to_fp8(float a, float b, float c, float d) {
    if constexpr (kHasFp8) return pack_fp8(a, b, c, d);
    return fp8_bits(a) | fp8_bits(b) << 8 | fp8_bits(c) << 16 | fp8_bits(d) << 24;
}
DEV void from_fp8(u32 v, float (&n)[4]) {
    if constexpr (kHasFp8) {
        unpack_fp8(v, n);
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) n[i] = fp8_number(v >> 8 * i & 0xff);
    }
}

// Rounds v, positive and normal, up to a power of two.
DEV float power_of_two_above(float v) {
    const u32 bits = __float_as_uint(v);
    return __uint_as_float((bits & 0x7f800000u) + (bits & 0x7fffffu ? 0x800000u : 0));
}

// Encodes this lane's columns; all 8 lanes of a group get its scale.
DEV int4 encode_fp8(const float (&n)[16], u32 format, float& scale) {
    float v[16], amax = 0.f;
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        v[i] = nan_if_infinite(n[i]);
        amax = fmaxf(amax, fabsf(v[i]));  // of a number and a NaN the number
    }
#pragma unroll
    for (u32 d = 4; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, (int)d));
    amax = fmaxf(amax, 1e-4f);
    scale = __fdiv_rn(amax, 448.f);
    if (format != kFloat32) scale = power_of_two_above(scale);
    // 448 / amax the way torch divides a number by a tensor: by the reciprocal, rounded twice.
    const float factor = format == kFloat32 ? __fmul_rn(__fdiv_rn(1.f, amax), 448.f) : __fdiv_rn(1.f, scale);
    u32 w[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        w[i] = to_fp8(__fmul_rn(v[4 * i], factor), __fmul_rn(v[4 * i + 1], factor), __fmul_rn(v[4 * i + 2], factor),
                      __fmul_rn(v[4 * i + 3], factor));
    return make_int4((int)w[0], (int)w[1], (int)w[2], (int)w[3]);
}

// Gathers the numbers of the warp's four groups of 128 columns; the same in every lane.
DEV int4 gather_groups(float mine) {
    const u32 bits = __float_as_uint(mine);
    return make_int4((int)__shfl_sync(kAll, bits, 0), (int)__shfl_sync(kAll, bits, 8), (int)__shfl_sync(kAll, bits, 16),
                     (int)__shfl_sync(kAll, bits, 24));
}

DEV void decode_fp8(const int4& v, float scale, float (&n)[16]) {
    const u32 w[4] = {(u32)v.x, (u32)v.y, (u32)v.z, (u32)v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float part[4];
        from_fp8(w[i], part);
#pragma unroll
        for (u32 j = 0; j < 4; j++) n[4 * i + j] = __fmul_rn(part[j], scale);
    }
}
