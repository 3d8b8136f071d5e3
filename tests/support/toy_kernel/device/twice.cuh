#pragma once
#include "device/more/once.cuh"

static __device__ __forceinline__ int twice(int x) { return 2 * once(x); }
