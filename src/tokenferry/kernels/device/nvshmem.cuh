// The network library NVSHMEM; see device/rails.cuh. These are the functions that its inline wrappers call for ranks
// which are not mapped, as version 3.4 declares them; their names in the library contain the types, so that `unsigned
// long` may not be u64. The functions come from libnvshmem_device.a, with which the host links these kernels:
// backends/cuda/across/nvshmem.py.
#pragma once

enum threadgroup_t { NVSHMEMI_THREADGROUP_THREAD, NVSHMEMI_THREADGROUP_WARP };
enum nvshmemi_amo_t : int {};

template <threadgroup_t scope>
__device__ void nvshmemi_transfer_put_signal(void* to, void* from, unsigned long bytes, void* signal,
                                             unsigned long value, nvshmemi_amo_t operation, int pe, bool is_nbi);
template <threadgroup_t scope>
__device__ void nvshmemi_transfer_quiet(bool use_membar);

constexpr int kSignalSet = 9;

template <class P>
DEV void put_signal(const P& p, u32 m, u8* to, u8* from, u32 bytes, u64* signal, u64 value) {
    nvshmemi_transfer_put_signal<NVSHMEMI_THREADGROUP_WARP>(to, from, bytes, signal, value, (nvshmemi_amo_t)kSignalSet,
                                                            (int)p.network[p.num_nodes + m], true);
}

template <class P>
DEV void quiet(const P&) {
    nvshmemi_transfer_quiet<NVSHMEMI_THREADGROUP_THREAD>(true);
}
