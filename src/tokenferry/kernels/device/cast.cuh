// The FP8 cast of decode dispatch, and the layout of its scales. kType: the type of x, or kRaw: rows are not cast.
#pragma once
#include "device/fp8.cuh"
#include "device/number.cuh"

constexpr bool kCast = kType != kRaw;
constexpr u32 kLoads = kType == kFp32 ? 4 : 2;  // loads of 16 bytes for 16 columns

// Loads this lane's 16 columns; zeros beyond the end of the row.
DEV void load_columns(const int4* x, u64 row, u32 columns, u32 column, int4 (&v)[kLoads]) {
    constexpr u32 per = 16 / kLoads;
#pragma unroll
    for (u32 c = 0; c < kLoads; c++)
        v[c] = column + c * per < columns ? __ldg(x + (row * columns + column) / per + c) : make_int4(0, 0, 0, 0);
}

// Casts this lane's 16 columns to one packet; `scales` gets the four scales of the warp's 512 columns.
DEV int4 cast_packet(const int4 (&v)[kLoads], u32 format, int4& scales) {
    float n[16];
#pragma unroll
    for (u32 c = 0; c < kLoads; c++) {
        Number part[kPerChunk];
        unpack_chunk(v[c], part);
#pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) n[c * kPerChunk + i] = part[i];
    }
    float scale;
    const int4 packet = encode_fp8(n, format, scale);
    scales = gather_groups(scale);
    return packet;
}

// Stores a row's scales to out [L, S, capacity] (float32) or [L, ceil(S / 4), capacity] (int32 of four exponents):
// column-major, as grouped FP8 GEMMs read them. `scales`: N packets of 512 columns each, the same in all lanes, the
// first of which is packet `first` of the row. `place`: expert * capacity + row. `groups`: S.
template <u32 N>
DEV void store_scales(u32* out, const int4 (&scales)[N], u32 place, u32 capacity, u32 first, u32 groups, u32 format) {
    const u32 lane = threadIdx.x % 32, e = place / capacity, at = place % capacity;
    u32 mine = 0;    // lane g: the g-th of these scales
    u32 packed = 0;  // lane c: the exponents of packet c
#pragma unroll
    for (u32 c = 0; c < N; c++) {
        const u32 w[4] = {(u32)scales[c].x, (u32)scales[c].y, (u32)scales[c].z, (u32)scales[c].w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (lane == c * 4 + i) mine = w[i];
            if (lane == c && first * 4 + c * 4 + i < groups) packed |= (w[i] >> 23) << 8 * i;
        }
    }
    if (format == kUe8m0) {
        if (lane < N && (first + lane) * 4 < groups)
            out[((u64)e * ((groups + 3) / 4) + first + lane) * capacity + at] = packed;
        return;
    }
    const u32 g = first * 4 + lane;
    if (lane < 4 * N && g < groups) out[((u64)e * groups + g) * capacity + at] = mine;
}
