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
