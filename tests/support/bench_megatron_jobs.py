"""The training step of Megatron-Core on CPU ranks, where its own dispatcher finds a stand-in for CUDA's streams."""

import itertools
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo

from tokenferry.bench.suites import megatron
from tokenferry.compat.deep_ep import Buffer


class Stream:
    """A stream of a device whose work is done at once."""

    def wait_stream(self, other):
        """Nothing is under way."""

    def record_event(self):
        """Return an event that has happened."""
        return SimpleNamespace(synchronize=lambda: None)


def moved_to_cpu(tensor, as_numpy=False, record_stream=False):
    """Megatron's function leaves alone what is on the CPU already, where all_to_all_single needs no tensors either."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def zeros_anywhere(*size, device=None, zeros=torch.zeros, **how):
    """`torch.zeros`, on the CPU where Megatron asks for a GPU by name."""
    return zeros(*size, device="cpu" if device == "cuda" else device, **how)


def measure_megatron(session):
    """`megatron.measure_megatron`; Megatron asks for the current GPU and gets the CPU."""
    warnings.simplefilter("ignore")  # Megatron names each optional package that is missing
    megatron.provide_deep_ep()
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch._dynamo.config.disable = True  # Megatron compiles small functions, for which a C++ compiler is needed
    stream = Stream()
    # 0.16 has no such name without Transformer Engine, and asks for it all the same.
    no_engine = mock.patch.object(moe_utils, "te_general_gemm", None, create=True)
    on_host = mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", moved_to_cpu)
    with (
        no_engine,
        on_host,
        mock.patch.object(torch, "zeros", zeros_anywhere),
        mock.patch.multiple(
            torch.cuda,
            current_device=lambda: torch.device("cpu"),
            current_stream=lambda *args: stream,
            Stream=Stream,
            stream=lambda stream: nullcontext(),
        ),
    ):
        megatron.measure_megatron(session)


def wrong_combine(session):
    """`measure_megatron` in which the shim's sums are off by a thousandth, on rank 1 only."""
    right = Buffer.combine

    def combine(self, *args, **kwargs):
        sums, *rest = right(self, *args, **kwargs)
        return (sums * 1.001 if session.rank == 1 else sums, *rest)

    with mock.patch.object(Buffer, "combine", combine):
        measure_megatron(session)


def changing_combine(session):
    """`measure_megatron` in which the shim's sums are off by a millionth in every other call, on rank 1 only."""
    right, calls = Buffer.combine, itertools.count()

    def combine(self, *args, **kwargs):
        sums, *rest = right(self, *args, **kwargs)
        return (sums * (1 + 1e-6) if session.rank == 1 and next(calls) // 4 % 2 else sums, *rest)

    with mock.patch.object(Buffer, "combine", combine):
        measure_megatron(session)
