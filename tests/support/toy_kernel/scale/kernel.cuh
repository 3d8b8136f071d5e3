// scale: y[i] = 2 * x[i] + kOffset, reversed within each block. The smallest kernel that uses all that jit offers.
//
// Grid       any number of blocks of at most kMaxThreads threads.
// Cost       8 B a thread. sm_90a: <= 32 registers, 0 spills, 1024 B of static shared memory.
// Tests      tests/compile, tests/unit/test_jit_*.

#include "device/twice.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads) scale(const __grid_constant__ ScaleParams p) {
    __shared__ int held[kMaxThreads];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    held[threadIdx.x] = i < p.num ? p.x[i] : 0;
    __syncthreads();
    if (i < p.num) p.y[i] = twice(held[blockDim.x - 1 - threadIdx.x]) + kOffset;
}
