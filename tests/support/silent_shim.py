"""A `Buffer` on kernels that do nothing, taking host memory for that of a GPU: for what the host does in a call."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from support.fake_streams import Cuda, Stream
from support.silent_kernels import SilentGroup, rows_of
from support.silent_nodes import SilentNodes
from tokenferry import ExpertGroup, MoeShape
from tokenferry.compat.deep_ep import Buffer
from tokenferry.compat.deep_ep.streams import Lane

T, K, E, H, M = 6, 2, 4, 256, 8


class SilentShim:
    """Such a `Buffer`, and arguments for its calls.

    Args:
        monkeypatch: Puts stand-ins in the place of torch.cuda until the test has ended.
        kind: The kind of its group.

    Attributes:
        buffer: The `Buffer`.
        cuda: The streams of its asynchronous calls; "mine" is the caller's, "comm" the other one.
        marks: The storages that were marked for a stream, as (address, name of the stream).
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[SilentGroup] | type[SilentNodes] = SilentGroup
    ) -> None:
        self.silent = kind(MoeShape(2, 1, 16, 1))
        with mock.patch.object(ExpertGroup, "_with_heap", return_value=self.silent.group):
            self.buffer = Buffer(None, low_latency_mode=True)
        self.buffer._views.on_gpu = True
        self.cuda = Cuda()
        self.cuda.install(monkeypatch)
        self.buffer._lane = Lane(torch.device("cuda", 0))
        self.marks: list[tuple[int, str]] = []
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self._mark(tensor, stream))
        self.x = rows_of(T, H)
        self.topk_idx = torch.arange(T * K, dtype=torch.int64, device="cpu").view(T, K) % E
        self.topk_weights = torch.ones(T, K, dtype=torch.float32, device="cpu")

    def _mark(self, tensor: Tensor, stream: Stream) -> None:
        self.marks.append((storage(tensor), stream.name))

    def layout(self, **how: Any) -> Any:
        return self.buffer.get_dispatch_layout(self.topk_idx, E, **how)

    def dispatch(self, layout: Any, **how: Any) -> Any:
        return self.buffer.dispatch(
            self.x,
            num_tokens_per_rank=layout.num_tokens_per_rank,
            num_tokens_per_rdma_rank=layout.num_tokens_per_rdma_rank,
            is_token_in_rank=layout.is_token_in_rank,
            num_tokens_per_expert=layout.num_tokens_per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            **how,
        )

    def low_latency_dispatch(self, **how: Any) -> Any:
        with SilentGroup.workspaces_agree():
            return self.buffer.low_latency_dispatch(self.x, self.topk_idx, M, E, **how)

    def low_latency_combine(self, y: Tensor, handle: Any, **how: Any) -> Any:
        with SilentGroup.workspaces_agree():
            return self.buffer.low_latency_combine(y, self.topk_idx, self.topk_weights, handle, **how)


def storage(tensor: Tensor) -> int:
    """Return the address of a tensor's storage."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()
