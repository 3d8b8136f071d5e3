"""Parsing of the assembler's report. The logs are NVRTC's own."""

from tokenferry.jit.resources import Resources, parse

LOG = """\
toy.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
ptxas         .     112 bytes stack frame, 164 bytes spill stores, 160 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 112 bytes cumulative stack size
ptxas info    : Compile time = 9.664 ms
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
ptxas         .     256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers, used 1 barriers, 256 bytes cumulative stack size, 400 bytes smem
ptxas info    : Compile time = 4.379 ms
"""
FUNCTION = """\
ptxas info    : Function properties for _Z4deepPii
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
"""


def test_each_kernel_has_its_own():
    assert parse(LOG) == {"a": Resources(23, 0, 256, 400), "b": Resources(32, 324, 112, 0)}


def test_functions_that_were_not_inlined_count_for_all():
    assert parse(LOG + FUNCTION) == {"a": Resources(23, 16, 264, 400), "b": Resources(32, 340, 120, 0)}


def test_shared_memory_of_one_kernel_is_not_that_of_the_one_before():
    log = LOG.replace(", 112 bytes cumulative stack size", "")
    assert parse(log)["b"].static_smem_bytes == 0


def test_constant_memory_is_not_shared_memory():
    log = LOG.replace("400 bytes smem", "400 bytes smem, 560 bytes cmem[0]").replace(
        "112 bytes cum", "9 bytes cmem[0], 1"
    )
    assert {name: needs.static_smem_bytes for name, needs in parse(log).items()} == {"a": 400, "b": 0}


def test_a_kernel_without_numbers_is_left_out():
    assert parse("ptxas info    : Compiling entry function 'c' for 'sm_90a'\n" + LOG).keys() == {"a", "b"}
    assert parse("") == {}
