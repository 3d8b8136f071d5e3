// FP8 rows: float8_e4m3fn, 128 columns share a scale; the format of tokenferry/fp8.py, bit for bit. A lane has 16 columns.
#pragma once
#include "device/ptx.cuh"
#include "generated/decode_words.cuh"

// The least power of two that is not below v, which is positive and normal.
DEV float power_of_two_above(float v) {
    const u32 bits = __float_as_uint(v);
    return __uint_as_float((bits & 0x7f800000u) + (bits & 0x7fffffu ? 0x800000u : 0));
}

// All lanes of 8 get the scale of their 128 columns.
DEV int4 encode_fp8(const float (&n)[16], u32 format, float& scale) {
    float most = 0.f;
#pragma unroll
    for (u32 i = 0; i < 16; i++) most = fmaxf(most, fabsf(n[i]));
#pragma unroll
    for (u32 d = 4; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, (int)d));
    most = fmaxf(most, 1e-4f);
    scale = __fdiv_rn(most, 448.f);
    if (format != kFloat32) scale = power_of_two_above(scale);
    // 448 / most as torch divides a number by a tensor: by way of the inverse, rounded twice.
    const float factor = format == kFloat32 ? __fmul_rn(__fdiv_rn(1.f, most), 448.f) : __fdiv_rn(1.f, scale);
    u32 w[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        w[i] = pack_fp8(__fmul_rn(n[4 * i], factor), __fmul_rn(n[4 * i + 1], factor), __fmul_rn(n[4 * i + 2], factor),
                        __fmul_rn(n[4 * i + 3], factor));
    return make_int4((int)w[0], (int)w[1], (int)w[2], (int)w[3]);
}

// One number of each group of the warp's 512 columns, in every lane.
DEV int4 of_four_groups(float mine) {
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
