// What the GPUs have that a kernel is compiled for. kSm: their compute capability, such as 90 for 9.0;
// kDependentLaunch: whether they have programmatic dependent launch, which the host has to know, too (jit/source.py).
#pragma once

constexpr bool kHasBulk = kSm >= 90;  // bulk copies
constexpr bool kHasFp8 = kSm >= 89;   // conversions from and to float8_e4m3fn
