// What decode dispatch casts, and where scales go. kType: what x is made of, or kRaw: nothing is cast.
#pragma once
#include "device/fp8.cuh"
#include "device/number.cuh"

constexpr bool kCast = kType != kRaw;
constexpr u32 kReads = kType == kFp32 ? 4 : 2;  // of 16 bytes, for 16 columns

// This lane's 16 columns; zeros behind the end.
DEV void load_columns(const u8* x, u64 row, u32 columns, u32 column, int4 (&v)[kReads]) {
    constexpr u32 per = 16 / kReads;
#pragma unroll
    for (u32 c = 0; c < kReads; c++)
        v[c] = column + c * per < columns ? __ldg(reinterpret_cast<const int4*>(x) + (row * columns + column) / per + c)
                                          : make_int4(0, 0, 0, 0);
}

// The same as a packet, and the four scales of the warp's 512 columns.
DEV int4 cast_packet(const int4 (&v)[kReads], u32 format, int4& scales) {
    float n[16];
#pragma unroll
    for (u32 c = 0; c < kReads; c++) {
        Number part[kPerChunk];
        unpack_chunk(v[c], part);
#pragma unroll
        for (u32 i = 0; i < kPerChunk; i++) n[c * kPerChunk + i] = part[i];
    }
    float scale;
    const int4 packet = encode_fp8(n, format, scale);
    scales = of_four_groups(scale);
    return packet;
}

// Scales to [L, S, room] (float32) or [L, ceil(S / 4), room] (int32 of four exponents): column-major, as grouped FP8 GEMMs read
// them. `scales`: packets from the `first` on, each of 512 columns, the same in all lanes; `place` counts all experts' rooms.
template <u32 N>
DEV void store_scales(u8* out, const int4 (&scales)[N], u32 place, u32 room, u32 first, u32 groups, u32 format) {
    const u32 lane = threadIdx.x % 32, e = place / room, at = place % room;
    u32 mine = 0;    // lane g: scale g of these
    u32 packed = 0;  // lane c: exponents of packet c
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
            reinterpret_cast<u32*>(out)[((u64)e * ((groups + 3) / 4) + first + lane) * room + at] = packed;
        return;
    }
    const u32 g = first * 4 + lane;
    if (lane < 4 * N && g < groups) reinterpret_cast<u32*>(out)[((u64)e * groups + g) * room + at] = mine;
}
