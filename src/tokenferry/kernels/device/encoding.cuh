// Encoding of rows in decode combine, in chunks of 512 columns. kType: the type of rows; kEncoding: one of
//
//   kSame     packet i * 32 + lane is the unit (16 bytes) i * 32 + lane of the chunk
//   kFp8      a lane holds 16 columns: packet `lane`; packet 32: four scales; tokenferry/formats/fp8.py
//   kLogfmt10 a lane holds 16 columns in 20 bytes: packet `lane` holds the first 16, packet 32 + lane / 4 the last
//                 4 of four lanes; packets 40 and 41: (lo, step) of two groups each; tokenferry/formats/logfmt.py
#pragma once
#include "device/fp8.cuh"
#include "device/logfmt.cuh"
#include "device/number.cuh"

constexpr u32 kUnits = kType == kFp32 ? 4 : 2;  // units of 16 bytes in 16 columns
constexpr u32 kUnitColumns = 16 / kUnits;
constexpr u32 kPackets = kEncoding == kSame ? 32 * kUnits : kEncoding == kFp8 ? kFp8Packets : kLogfmt10Packets;

// A lane's part of an encoded chunk. extra: the scales (kFp8), or fifth words and then (lo, step) (kLogfmt10).
struct EncodedChunk {
    int4 v[kUnits];
    int4 extra[kEncoding == kLogfmt10 ? 2 : 1];
};

DEV u32 unit_of(u32 i) { return kEncoding == kSame ? i * 32 + threadIdx.x % 32 : threadIdx.x % 32 * kUnits + i; }
DEV bool has_unit(u32 columns, u32 chunk, u32 i) { return chunk * kChunkColumns + unit_of(i) * kUnitColumns < columns; }
DEV u64 unit_index(u64 row, u32 columns, u32 chunk, u32 i) {
    return row * (columns / kUnitColumns) + chunk * (kChunkColumns / kUnitColumns) + unit_of(i);
}

DEV void read_units(const int4* rows, u64 row, u32 columns, u32 chunk, int4 (&v)[kUnits]) {
#pragma unroll
    for (u32 i = 0; i < kUnits; i++)
        v[i] = has_unit(columns, chunk, i) ? __ldg(rows + unit_index(row, columns, chunk, i)) : make_int4(0, 0, 0, 0);
}

DEV void write_units(int4* rows, u64 row, u32 columns, u32 chunk, const int4 (&v)[kUnits]) {
#pragma unroll
    for (u32 i = 0; i < kUnits; i++)
        if (has_unit(columns, chunk, i)) rows[unit_index(row, columns, chunk, i)] = v[i];
}

DEV void unpack_units(const int4 (&v)[kUnits], float (&n)[16]) {
#pragma unroll
    for (u32 i = 0; i < kUnits; i++) {
        Number part[kPerChunk];
        unpack_chunk(v[i], part);
#pragma unroll
        for (u32 j = 0; j < kPerChunk; j++) n[i * kPerChunk + j] = part[j];
    }
}

DEV void pack_units(const float (&n)[16], int4 (&v)[kUnits]) {
#pragma unroll
    for (u32 i = 0; i < kUnits; i++) {
        Number part[kPerChunk];
#pragma unroll
        for (u32 j = 0; j < kPerChunk; j++) part[j] = n[i * kPerChunk + j];
        v[i] = pack_chunk(part);
    }
}

DEV void add_weighted(const int4 (&v)[kUnits], float weight, float (&sum)[16]) {
    float n[16];
    unpack_units(v, n);
#pragma unroll
    for (u32 i = 0; i < 16; i++) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, n[i]));
}

// Word i of v as a float.
DEV float word_float(const int4& v, u32 i) {
    return __uint_as_float((u32)(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w));
}

// ---- numbers to packets and back; all lanes

// kFp8: extra[0] gets the scales, the same in every lane. kLogfmt10: extra[0] of lanes 0 to 7 gets a packet of
// fifth words, extra[1] of lanes 0 and 1 gets (lo, step) of two groups.
DEV void encode(const float (&n)[16], int4& packet, int4* extra) {
    if constexpr (kEncoding == kFp8) {
        float scale;
        packet = encode_fp8(n, kFloat32, scale);
        extra[0] = gather_groups(scale);
    } else if constexpr (kEncoding == kLogfmt10) {
        u32 fifth;
        float lo, step;
        packet = encode_log(n, fifth, lo, step);
        const u32 lane = threadIdx.x % 32;
        u32 w[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = __shfl_sync(kAll, fifth, (int)(lane * 4 + i) & 31);
        extra[0] = make_int4((int)w[0], (int)w[1], (int)w[2], (int)w[3]);
        const u32 a = __float_as_uint(lo), b = __float_as_uint(step);
        const u32 g = lane * 16 & 31;  // lane 0: groups 0 and 1; lane 1: groups 2 and 3
        const u32 lo0 = __shfl_sync(kAll, a, (int)g), step0 = __shfl_sync(kAll, b, (int)g),
                  lo1 = __shfl_sync(kAll, a, (int)g + 8), step1 = __shfl_sync(kAll, b, (int)g + 8);
        extra[1] = make_int4((int)lo0, (int)step0, (int)lo1, (int)step1);
    }
}

DEV void decode_packet(const int4& packet, const int4* extra, float (&n)[16]) {
    const u32 lane = threadIdx.x % 32;
    if constexpr (kEncoding == kFp8) decode_fp8(packet, word_float(extra[0], lane / 8), n);
    else if constexpr (kEncoding == kLogfmt10)
        decode_log(packet, __float_as_uint(word_float(extra[0], lane % 4)), word_float(extra[1], lane / 8 % 2 * 2),
                   word_float(extra[1], lane / 8 % 2 * 2 + 1), n);
}

// ---- chunks as packets

DEV void send_units(u8* to, const int4 (&v)[kUnits], u32 columns, u32 chunk) {
    const u32 lane = threadIdx.x % 32;
    if constexpr (kEncoding == kSame) {
#pragma unroll
        for (u32 i = 0; i < kUnits; i++)
            if (has_unit(columns, chunk, i)) store_packet(to + unit_of(i) * 16, escape_sentinel(v[i]));
    } else {
        float n[16];
        unpack_units(v, n);
        int4 packet, extra[kEncoding == kLogfmt10 ? 2 : 1];
        encode(n, packet, extra);
        if (has_unit(columns, chunk, 0)) store_packet(to + lane * 16, escape_sentinel(packet));
        if (kEncoding == kFp8 && lane == 0) store_packet(to + 32 * 16, escape_sentinel(extra[0]));
        if constexpr (kEncoding == kLogfmt10) {
            if (lane < 8) store_packet(to + (32 + lane) * 16, escape_sentinel(extra[0]));
            if (lane < 2) store_packet(to + (40 + lane) * 16, escape_sentinel(extra[1]));
        }
    }
}

// Loads all packets of a chunk, those beyond the end of the row, too.
DEV void load_encoded(const u8* from, EncodedChunk& c) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < (kEncoding == kSame ? kUnits : 1); i++)
        c.v[i] = load_packet(from + (kEncoding == kSame ? unit_of(i) : lane) * 16);
    if constexpr (kEncoding == kFp8) c.extra[0] = load_packet(from + 32 * 16);
    if constexpr (kEncoding == kLogfmt10) {
        c.extra[0] = load_packet(from + (32 + lane / 4) * 16);
        c.extra[1] = load_packet(from + (40 + lane / 16) * 16);
    }
}

// Returns whether all packets of this lane's part have arrived.
DEV bool is_complete(const EncodedChunk& c, u32 columns, u32 chunk) {
    bool complete = true;
#pragma unroll
    for (u32 i = 0; i < (kEncoding == kSame ? kUnits : 1); i++)
        complete &= !has_unit(columns, chunk, i) || !is_empty(c.v[i]);
    if constexpr (kEncoding != kSame) complete &= !is_empty(c.extra[0]);
    if constexpr (kEncoding == kLogfmt10) complete &= !is_empty(c.extra[1]);
    return complete;
}

// Restores the sentinel; once all lanes have what they need of the chunk.
DEV void clear_encoded(u8* at, u32 columns, u32 chunk) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < (kEncoding == kSame ? kUnits : 1); i++)
        if (has_unit(columns, chunk, i)) clear_packet(at + (kEncoding == kSame ? unit_of(i) : lane) * 16);
    if (kEncoding == kFp8 && lane == 0) clear_packet(at + 32 * 16);
    if (kEncoding == kLogfmt10 && lane < 10) clear_packet(at + (32 + lane) * 16);
}

DEV void decode(const EncodedChunk& c, float (&n)[16]) {
    if constexpr (kEncoding == kSame) unpack_units(c.v, n);
    else decode_packet(c.v[0], c.extra, n);
}
