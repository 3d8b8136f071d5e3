"""The emulator itself: numbers as PTX rounds them, and misuse that it has to report."""

import ctypes
from pathlib import Path

import pytest
import torch

import tokenferry.kernels
from support.emulator import Emulator, build, translate
from tokenferry.jit.source import headers
from tokenferry.kernels.describe import GENERATED

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

KERNELS = Path(tokenferry.kernels.__file__).parent
TYPES = "typedef unsigned char u8; typedef unsigned u32; typedef unsigned long long u64; typedef long long i64;\n"
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


def compiled(text, name, folder, *, capability=90):
    source = folder / "source.cuh"
    source.write_text(f'#include "device/ptx.cuh"\n{text}')
    found = headers(source.name, source, KERNELS, GENERATED)
    main = f'{TYPES}constexpr int kSm = {capability};\n#include "emulator.h"\n#include "source.cuh"\n'
    return build(main, {header: translate(header, text) for header, text in found.items()}, name, folder)


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


FP8 = """
constexpr int kType = 0;
#include "device/fp8.cuh"
extern "C" unsigned bits(float f) { return to_fp8(f, -f, 0.f, 1.f); }
extern "C" float number(unsigned v) { float n[4]; from_fp8(v << 8, n); return n[1]; }
"""


def test_fp8_in_integers_is_what_torch_does(tmp_path):
    """As GPUs before SM89 convert: all codes, random floats, and those in the middle of two codes."""
    library = compiled(FP8, "fp8", tmp_path, capability=86)
    library.bits.argtypes, library.number.restype = [ctypes.c_float], ctypes.c_float
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    for code, number in zip(codes.tolist(), numbers.tolist(), strict=True):
        got = library.number(code)
        assert got == number or (got != got and number != number), hex(code)
    make = torch.Generator().manual_seed(0)
    positive = numbers[:127]
    middles = (positive[1:] + positive[:-1]) / 2
    near = torch.cat([middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20), positive])
    many = torch.randn(20_000, generator=make) * 2.0 ** torch.randint(-12, 9, (20_000,), generator=make)
    floats = torch.cat([near, -near, many]).clamp(-448, 448)
    for one, code in zip(floats.tolist(), floats.to(torch.float8_e4m3fn).view(torch.uint8).tolist(), strict=True):
        assert library.bits(one) == code | (code ^ 0x80) << 8 | 0x38 << 24, one
    inf = float("inf")
    assert [library.bits(one) & 0xFFFF for one in (465.0, inf, -inf, float("nan"))] == [0xFE7E, 0xFE7E, 0x7EFE, 0x7F7F]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bulk_load(shared, memory + 4, 16, &barrier);", "not of whole 16 bytes"),
        ("bulk_store(memory, shared, 24);", "not of whole 16 bytes"),
        ("bulk_store(memory, shared, 16); bulk_commit();", "bulk stores under way"),
        ("mbarrier_init<1>(&barrier); bulk_load(shared, memory, 16, &barrier);", "bulk loads under way"),
        ("mbarrier_init<1>(&barrier); mbarrier_expect(&barrier, 16); mbarrier_expect(&barrier, 16);", "more arrivals"),
        ("copy_async(shared + 8, memory);", "not of whole 16 bytes"),
        ("copy_async(shared, memory);", "no barrier waits for"),
        (
            "mbarrier_init<1>(&barrier); copy_async(shared, memory); mbarrier_arrive_after_copies(&barrier);",
            "under way",
        ),
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
        mbarrier_init<1>(&barrier);
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
