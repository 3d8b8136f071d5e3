// Copies and zeroes local memory with one warp, in the widest words that addresses and size allow.
#pragma once
#include "device/ptx.cuh"

template <class T>
DEV void copy_words(u8* to, const u8* from, u32 bytes) {
    T* out = reinterpret_cast<T*>(to);
    const T* in = reinterpret_cast<const T*>(from);
    const u32 n = bytes / sizeof(T);
    u32 i = threadIdx.x % 32;
    for (; i + 96 < n; i += 128) {  // four loads in flight
        const T a = in[i], b = in[i + 32], c = in[i + 64], d = in[i + 96];
        out[i] = a;
        out[i + 32] = b;
        out[i + 64] = c;
        out[i + 96] = d;
    }
    for (; i < n; i += 32) out[i] = in[i];
}

DEV void warp_copy(u8* to, const u8* from, u32 bytes) {
    const u64 all = (u64)to | (u64)from | bytes;
    if (all % 16 == 0) copy_words<int4>(to, from, bytes);
    else if (all % 4 == 0) copy_words<u32>(to, from, bytes);
    else copy_words<u8>(to, from, bytes);
}

DEV void warp_zero(u8* to, u32 bytes) {
    const u32 lane = threadIdx.x % 32;
    if (((u64)to | bytes) % 16 == 0)
        for (u32 i = lane * 16; i < bytes; i += 512) *reinterpret_cast<int4*>(to + i) = make_int4(0, 0, 0, 0);
    else if (((u64)to | bytes) % 4 == 0)
        for (u32 i = lane * 4; i < bytes; i += 128) *reinterpret_cast<u32*>(to + i) = 0;
    else
        for (u32 i = lane; i < bytes; i += 32) to[i] = 0;
}
