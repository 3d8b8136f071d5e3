// across_clock: across nodes: notes the time at which a stream begins to wait for an exchange. The kernel behind it
// adds what has passed since then to the counters: see device/across.cuh.
//
// Grid     one block. Not collective.
// Reads    the GPU's clock.
// Writes   since, in nanoseconds.
// Cost     a launch. sm_90a: <= 32 registers, 0 spills.
// Tests    tests/emulator/test_across_decode.py, tests/compile.
#include "device/sync.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) across_clock(const __grid_constant__ AcrossClockParams p) {
    if (threadIdx.x == 0) *p.since = clock_ns();
}
