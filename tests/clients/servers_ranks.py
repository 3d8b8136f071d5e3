"""Ranks, batches and expected results of the checks of `servers.py`.

Expert e multiplies its rows by ``e + 1``, so that the result of a layer follows from the routing.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

R, E, K, H, M = 2, 8, 3, 2048, 8
L = E // R
TOKENS = 5


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights and choices of a rank, and the sums that its tokens get."""
    seeded = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, H, generator=seeded).bfloat16()
    weights, ids = torch.rand(TOKENS, E, generator=seeded).topk(K)
    return x, weights, ids, x.float() * (weights * (ids + 1)).sum(1, keepdim=True)


def close(got: Tensor, want: Tensor, *, fp8: bool = False) -> None:
    """Rows in FP8 have been rounded to 3 bits after the leading one."""
    torch.testing.assert_close(got.float(), want.float(), rtol=0.08 if fp8 else 0.03, atol=0.05)


def in_fp8(x: Tensor, block: int, *, exponents: bool = False) -> tuple[Tensor, Tensor]:
    """What stands for kernels that quantize: rows in FP8, and for each block a float32 scale or a UE8M0 exponent."""
    blocks = x.float().unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1).clamp(min=1e-10) / torch.finfo(torch.float8_e4m3fn).max
    if exponents:
        scales = scales.log2().ceil().exp2()
    rows = (blocks / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return rows, (scales.log2() + 127).to(torch.uint8) if exponents else scales


def unscaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """Rows as float32; int32 holds the exponents of four blocks."""
    if scales is None or x.dtype == torch.bfloat16:
        return x.float()
    assert x.dtype == torch.float8_e4m3fn
    if scales.dtype != torch.float32:
        scales = torch.exp2(scales.contiguous().view(torch.uint8).float() - 127)
    return (x.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def weighted(x: Tensor, ids: Tensor, weights: Tensor, rank: int) -> Tensor:
    """What the experts of a rank add up to for each row, ids being those of all experts."""
    here = torch.div(ids, L, rounding_mode="floor") == rank
    return (x.float() * (weights * (ids + 1)).masked_fill(~here, 0).sum(1, keepdim=True)).bfloat16()


def on_ranks(job: Callable[[int], None]) -> None:
    """Run a job on R gloo ranks, which are forked after the client has been imported."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(job, rank, folder)) for rank in range(R)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("a rank failed")


def _rank(job: Callable[[int], None], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    made = torch.tensor  # vLLM makes lists of counts in pinned memory, which there is only with a GPU
    torch.tensor = lambda *args, pin_memory=False, **kwargs: made(*args, **kwargs)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=R)
    job(rank)
    dist.barrier()
    dist.destroy_process_group()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
