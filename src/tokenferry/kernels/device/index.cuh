// Expert indices, which are int64 (`wide`) or int32, as the caller's topk_idx is.
#pragma once
#include "device/ptx.cuh"

DEV i64 load_index(const u8* indices, bool wide, u64 i) {
    return wide ? reinterpret_cast<const i64*>(indices)[i] : (i64) reinterpret_cast<const i32*>(indices)[i];
}
DEV void store_index(u8* indices, bool wide, u64 i, i64 index) {
    if (wide) reinterpret_cast<i64*>(indices)[i] = index;
    else reinterpret_cast<i32*>(indices)[i] = (i32)index;
}

// An index as a record has it, in 32 bits: one beyond int32 becomes its bound, which the host reports as such, and not
// some other index.
DEV u32 recorded_index(i64 index) {
    return index < -0x7fffffff ? 0x80000000u : index > 0x7fffffff ? 0x7fffffffu : (u32)index;
}
