// logfmt10: ten bits a number, the sign and a step of a logarithmic scale shared by 128 columns; the format of
// tokenferry/formats/logfmt.py. A lane holds 16 columns: 160 bits. Code 0 is zero, code c is 2^(lo + (c - 1) * step).
// If the sign bit of step is set, the group holds numbers that are not finite, and a negative zero stands for NaN.
#pragma once
#include "device/number.cuh"

constexpr float kSteps = 510.f, kRange = 32.f;
constexpr u32 kSignBit = 1u << 9;  // of a number; alone a negative zero

// The scale of a group, and values derived from it.
struct LogScale {
    float lo, step;
    float least, ratio;  // 2^lo, 2^step
    float per_step;      // 1 / step, or 0
};

// The code of magnitude a, rounded to the nearest in linear space. An error in the last bit of the logarithm may choose
// the neighbouring step at the edge of two steps; both lead to the same code.
DEV u32 log_code(float a, const LogScale& s) {
    float below = floorf((log2_near(a) - s.lo) * s.per_step);
    below = fminf(fmaxf(below, 0.f), kSteps - 1.f);
    const float low = exp2_near(s.lo + below * s.step), high = low * s.ratio;
    const u32 code = (u32)below + 1 + (s.per_step > 0.f && a - low >= high - a);
    const u32 small = 2.f * a >= s.least && a > 0.f;  // below 2^lo: 2^lo or zero
    return a < s.least ? small : code;
}

// Encodes this lane's columns: returns the first 128 bits, `fifth` gets the last 32. All 8 lanes of a group get lo and
// step.
DEV int4 encode_log(const float (&n)[16], u32& fifth, float& lo, float& step) {
    float size[16];  // NaN where n is not finite
    float most = 0.f, least = __uint_as_float(0x7f800000u);
    bool finite = true;
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        const float a = size[i] = fabsf(nan_if_infinite(n[i]));
        most = fmaxf(most, a);  // of a number and a NaN the number
        if (a > 0.f) least = fminf(least, a);
        finite &= a == a;
    }
#pragma unroll
    for (u32 d = 4; d; d /= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAll, most, (int)d));
        least = fminf(least, __shfl_xor_sync(kAll, least, (int)d));
        finite &= (bool)__shfl_xor_sync(kAll, (u32)finite, (int)d);
    }
    const float hi = fminf(log2_near(most), 127.9999f);  // infinity has no code
    lo = most > 0.f ? fminf(fmaxf(log2_near(least), hi - kRange), hi) : 0.f;
    step = most > 0.f ? (hi - lo) * (1.f / kSteps) : 0.f;
    const LogScale scale = {lo, step, exp2_near(lo), exp2_near(step),
                            hi > lo && most > 0.f ? __fdiv_rn(kSteps, hi - lo) : 0.f};
    if (!finite) step = -step;
    u32 w[5] = {};
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        u32 code = log_code(size[i], scale);
        if (finite || code) code |= (__float_as_uint(n[i]) >> 31) * kSignBit;
        if (size[i] != size[i]) code = kSignBit;
        const u32 at = 10 * i;
        w[at / 32] |= code << at % 32;
        if (at % 32 > 22) w[at / 32 + 1] |= code >> (32 - at % 32);
    }
    fifth = w[4];
    return make_int4((int)w[0], (int)w[1], (int)w[2], (int)w[3]);
}

DEV void decode_log(const int4& v, u32 fifth, float lo, float step, float (&n)[16]) {
    const u32 w[5] = {(u32)v.x, (u32)v.y, (u32)v.z, (u32)v.w, fifth};
    const float negative_zero = __uint_as_float(__float_as_uint(step) >> 31 ? 0x7fc00000u : 0x80000000u);
    step = fabsf(step);
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        const u32 at = 10 * i;
        u32 code = w[at / 32] >> at % 32;
        if (at % 32 > 22) code |= w[at / 32 + 1] << (32 - at % 32);
        const float magnitude = exp2_near(lo + (float)((code & 511) - 1) * step);
        if (code & kSignBit) n[i] = code & 511 ? -magnitude : negative_zero;
        else n[i] = code & 511 ? magnitude : 0.f;
    }
}
