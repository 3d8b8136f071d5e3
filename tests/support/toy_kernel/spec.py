"""The spec of the toy kernel."""

from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params

ROOT = Path(__file__).parent

SCALE = KernelSpec(
    name="scale",
    source=ROOT / "scale" / "kernel.cuh",
    include=ROOT,
    params=Params("ScaleParams", [("x", "ptr:const int"), ("y", "ptr:int"), ("num", "i32")]),
    max_registers=32,
    max_threads=256,
    static_smem=1024,
    configs=({"offset": 0}, {"offset": 7}),
)
