// FP8 rows: float8_e4m3fn, one scale for 128 columns; bit for bit the format of tokenferry/formats/fp8.py. A lane holds
// 16 columns, so 8 lanes share a scale.
#pragma once
#include "device/number.cuh"
#include "generated/decode_words.cuh"

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
        w[i] = pack_fp8(__fmul_rn(v[4 * i], factor), __fmul_rn(v[4 * i + 1], factor), __fmul_rn(v[4 * i + 2], factor),
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
        unpack_fp8(w[i], part);
#pragma unroll
        for (u32 j = 0; j < 4; j++) n[4 * i + j] = __fmul_rn(part[j], scale);
    }
}
