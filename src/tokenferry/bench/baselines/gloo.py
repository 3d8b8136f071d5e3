"""The baseline of the CPU backend: plain all_to_all_single of the same row bytes, over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.inputs import Sizes, draw_all, sent_to

CPU = torch.device("cpu")


class RowExchange:
    """all_to_all_single of ready-made rows, one set of splits per variant; buffers exist and were touched beforehand.

    Args:
        pg: The process group.
        counts: ``[variants, R, R]`` rows from each rank to each rank.
        row_bytes: Bytes of a row.

    Attributes:
        rows: Rows that this rank sends, those to itself included, mean over the sets of inputs.
    """

    def __init__(self, pg: dist.ProcessGroup, counts: Tensor, row_bytes: int) -> None:
        self._pg = pg
        rank = pg.rank()
        self._send = counts[:, rank].tolist()
        self._receive = counts[:, :, rank].tolist()
        self._source = torch.randint(0, 256, (max(map(sum, self._send)), row_bytes), dtype=torch.uint8, device="cpu")
        self._target = torch.zeros(max(map(sum, self._receive)), row_bytes, dtype=torch.uint8, device="cpu")
        self.rows = sum(map(sum, self._send)) / len(self._send)

    def __call__(self, i: int) -> None:
        """Exchange the rows of iteration ``i``. Collective; returns when they have arrived."""
        send, receive = self._send[i % len(self._send)], self._receive[i % len(self._send)]
        source, target = self._source[: sum(send)], self._target[: sum(receive)]
        dist.all_to_all_single(target, source, receive, send, group=self._pg)


def row_exchanges(pg: dist.ProcessGroup, sizes: Sizes, variants: int) -> dict[str, RowExchange]:
    """Make the exchanges that move the same rows as the calls do, by direction.

    Returns:
        dict: ``out`` and ``home``: one row per token and rank, there and back; ``answers``: one per token and expert,
        back; ``out fp8``: as ``out``, of FP8 rows with scales.
    """
    rows = torch.zeros(variants, sizes.ranks, sizes.ranks, dtype=torch.int64, device="cpu")
    answers = torch.zeros_like(rows)
    for variant in range(variants):
        for source, inputs in enumerate(draw_all(sizes, variant, CPU)):
            rows[variant, source] = sent_to(sizes, inputs.topk_idx).sum(0)
            owners = (inputs.topk_idx // sizes.local_experts).flatten()
            answers[variant, source] = torch.bincount(owners, minlength=sizes.ranks)
    bf16 = sizes.row_bytes("bf16")
    return {
        "out": RowExchange(pg, rows, bf16),
        "home": RowExchange(pg, rows.transpose(1, 2), bf16),
        "answers": RowExchange(pg, answers.transpose(1, 2), bf16),
        "out fp8": RowExchange(pg, rows, sizes.row_bytes("fp8")),
    }
