// Where decode combine puts rows in the workspaces; see kernel.cuh.
#pragma once
#include "device/decode.cuh"
#include "device/encoding.cuh"
#include "device/number.cuh"

// Rows whose chunks are in flight together; limited by registers.
constexpr u32 kBatch = kType == kFp32 || kEncoding == kLogfmt10 ? 2 : 4;

// The packets that rank `at` receives in a call.
DEV u8* packets_of(const DecodeCombineParams& p, const DecodeCall& call, u32 at) {
    return p.workspaces[at] + p.packets_at + call.parity * p.packets_stride;
}
DEV u32 chunks_of(const DecodeCombineParams& p) { return (p.columns + kChunkColumns - 1) / kChunkColumns; }
DEV u8* chunk_at(const DecodeCombineParams& p, u8* packets, u32 row, u32 chunk) {
    return packets + ((u64)row * chunks_of(p) + chunk) * (kPackets * 16);
}
