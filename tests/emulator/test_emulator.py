"""The emulator itself: numbers as PTX rounds them, and misuse that it has to report."""

import ctypes

import pytest
import torch

from support.emulator import Emulator, build, translate

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

TYPES = "typedef unsigned char u8; typedef unsigned u32; typedef unsigned long long u64;\n"
NUMBERS = """
extern "C" unsigned bfloat16(float f) { return emu_to_bfloat16(f); }
extern "C" unsigned float16(float f) { return emu_to_float16(f); }
extern "C" float back(unsigned h) { return emu_from_float16(h); }
"""
KERNEL = """
static void kernel(const void* p) {{
    alignas(16) static thread_local u8 shared[64];
    static thread_local u64 barrier;
    u8* memory = *(u8**)p;
    {}
}}
extern "C" const char* run(u8* memory, unsigned threads) {{ return emu_run_grid(kernel, &memory, 1, threads, 0); }}
"""


def compiled(text, name, folder):
    main = f'{TYPES}#include "emulator.h"\n#include "device/ptx.cuh"\n{text}'
    return build(main, {"device/ptx.cuh": translate("device/ptx.cuh", "")}, name, folder)


def test_numbers_are_rounded_as_torch_does(tmp_path):
    library = compiled(NUMBERS, "numbers", tmp_path)
    library.bfloat16.argtypes = library.float16.argtypes = [ctypes.c_float]
    library.back.restype = ctypes.c_float
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    for half, bits in zip(halves.float().tolist(), halves.view(torch.int16).tolist(), strict=True):
        got = library.back(bits & 0xFFFF)
        assert got == half or (got != got and half != half), hex(bits)
    make = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=make).to(torch.int32)
    middles = (halves.float().view(torch.int32)[::16] + 0x1000).to(torch.int32)  # between two float16s
    floats = torch.cat([bits, middles, bits & -0x8000 | 0x8000]).view(torch.float32)
    floats = torch.cat([floats[~floats.isnan()], torch.randn(20_000, generator=make) * 2.0**-14])
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        want = floats.to(dtype).view(torch.int16).tolist()
        function = getattr(library, name)
        for one, expected in zip(floats.tolist(), want, strict=True):
            assert function(one) == expected & 0xFFFF, (name, one)
        assert function(float("nan")) == 0x7FFF


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bulk_load(shared, memory + 4, 16, &barrier);", "not of whole 16 bytes"),
        ("bulk_store(memory, shared, 24);", "not of whole 16 bytes"),
        ("bulk_store(memory, shared, 16); bulk_commit();", "bulk stores under way"),
        ("mbarrier_init(&barrier); bulk_load(shared, memory, 16, &barrier);", "bulk loads under way"),
        ("mbarrier_init(&barrier); mbarrier_expect(&barrier, 16); mbarrier_expect(&barrier, 16);", "second arrival"),
        ("__ballot_sync(1, true);", "part of a warp"),
        ("if (threadIdx.x) __syncwarp(); else __syncthreads();", "waits for another"),
    ],
)
def test_misuse_is_reported(body, message, tmp_path):
    library = compiled(KERNEL.format(body), "misuse", tmp_path)
    library.run.restype = ctypes.c_char_p
    memory = torch.zeros(256, dtype=torch.uint8)
    address = ctypes.c_void_p(-(-memory.data_ptr() // 128) * 128)
    assert message in library.run(address, 32).decode()


def test_a_buffer_is_poisoned_until_its_load_is_waited_for(tmp_path):
    """And a store is not done before it is waited for."""
    body = """
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier);
        mbarrier_expect(&barrier, 16);
        bulk_load(shared, memory, 16, &barrier);
        memory[64] = shared[0];
        mbarrier_wait(&barrier, 0);
        memory[65] = shared[0];
        bulk_store(memory + 16, shared, 16);
        bulk_commit();
        memory[66] = memory[16];
        bulk_wait<0>();
    }
    __syncthreads();
    if (threadIdx.x == 32) memory[67] = memory[16];
    """
    library = compiled(KERNEL.format(body), "late", tmp_path)
    library.run.restype = ctypes.c_char_p
    memory = torch.full((512,), 7, dtype=torch.uint8)
    at = -memory.data_ptr() % 128
    assert library.run(ctypes.c_void_p(memory.data_ptr() + at), 64) is None
    assert memory[at + 64 : at + 68].tolist() == [0xEE, 7, 7, 7]
