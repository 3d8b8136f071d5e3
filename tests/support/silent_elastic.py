"""A buffer of DeepEP 2 or 2.5 on kernels that do nothing, as `SilentShim` is a `Buffer`: for what the host does."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from support.fake_streams import Cuda, Stream
from support.silent_kernels import SilentGroup, rows_of
from support.silent_shim import storage
from tokenferry import ExpertGroup, MoeShape
from tokenferry.compat.deep_ep import ElasticBuffer
from tokenferry.compat.deep_ep.streams import Lane

T, K, E, H, M = 6, 2, 4, 256, 8


class SilentElastic:
    """Such a buffer, and arguments for its calls.

    Args:
        monkeypatch: Puts stand-ins in the place of torch.cuda until the test has ended.
        kind: The class of the buffer.

    Attributes:
        buffer: The buffer.
        cuda: The streams of its asynchronous calls; "mine" is the caller's, "comm" the other one.
        marks: The storages that were marked for a stream, as (address, name of the stream).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any] = ElasticBuffer) -> None:
        self.silent = SilentGroup(MoeShape(2, 1, 16, 1))
        with mock.patch.object(ExpertGroup, "_with_heap", return_value=self.silent.group):
            self.buffer = kind(None, num_max_tokens_per_rank=M, hidden=H)
        self.cuda = Cuda()
        self.cuda.install(monkeypatch)
        self.buffer._lane = Lane(torch.device("cuda", 0))
        self.marks: list[tuple[int, str]] = []
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self._mark(tensor, stream))
        self.x = rows_of(T, H)
        self.pair = (
            torch.zeros(T, H, dtype=torch.float8_e4m3fn, device="cpu"),
            torch.ones(T, 2, dtype=torch.float32, device="cpu"),
        )
        self.topk_idx = torch.arange(T * K, dtype=torch.int64, device="cpu").view(T, K) % E
        self.topk_weights = torch.ones(T, K, dtype=torch.float32, device="cpu")

    def _mark(self, tensor: Tensor, stream: Stream) -> None:
        self.marks.append((storage(tensor), stream.name))

    def dispatch(self, x: Any = None, **how: Any) -> Any:
        rows = self.x if x is None else x
        return self.buffer.dispatch(rows, self.topk_idx, self.topk_weights, num_experts=E, **how)

    def num_sms(self) -> list[int]:
        """Return the blocks of each launch since the last time."""
        found = [launch[1] for launch in self.silent.launches]
        self.silent.launches.clear()
        return found
