"""Whole dispatches on virtual ranks: by dispatch_fused, or by dispatch_notify, dispatch_assign and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.plan_checks import check, choices_of
from support.virtual_dispatch import Delivery, Payload
from support.virtual_plan import LAYOUTS, Expected, Form, Planner
from support.virtual_ranks import POISON, Ranks, dynamic_bytes
from tokenferry.kernels.control_block import SIGNATURE_WORDS
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec

FEW_SMS = 4
"""Blocks of a rank, so that those of all ranks run together."""
TABLES = (
    "table",
    "bases",
    "dst_counts",
    "src_counts",
    "expert_counts",
    "expert_offsets",
    "places",
    "dst_token",
    "host",
)


class Whole:
    """One dispatch on all ranks.

    Args:
        ranks: The ranks.
        topk_idx: ``[T, K]`` of each rank, on the CPU.
        num_experts: E.
        form: The layout of rows.
        payload: The data of a row.
        seed: Seed of the data.
        room_for: The choices that blocks have space for; None: those of ``topk_idx``.
    """

    def __init__(
        self,
        ranks: Ranks,
        topk_idx: Sequence[Tensor],
        num_experts: int,
        form: Form,
        payload: Payload,
        seed: int = 0,
        room_for: Sequence[Tensor] | None = None,
    ) -> None:
        self.ranks, self.num_experts, self.form, self.payload = ranks, num_experts, form, payload
        self.planner = Planner(ranks, topk_idx, num_experts, form)
        self.expected = Expected(choices_of(topk_idx if room_for is None else room_for), num_experts, form)
        self.delivery = Delivery(ranks, self.expected, payload, list(topk_idx), seed)
        self._keep = [self.delivery.fields(rank) for rank in range(ranks.num_ranks)]

    @property
    def signature(self) -> dict[int, int]:
        """The words of the handshakes that all ranks share."""
        handshake = self._keep[0]["handshake"]
        assert isinstance(handshake, dict)
        return {word: value for word, value in handshake.items() if word < SIGNATURE_WORDS}

    # ------------------------------------------------------------------ one kernel

    def fused_fields(self, rank: int, **more: object) -> dict[str, object]:
        """Return the params of dispatch_fused: those of the three kernels, and where the rings of a block are."""
        move, form, t, R = self._keep[rank], self.form, self.planner.tables[rank], self.ranks.num_ranks
        rings = self.rings
        return {
            **{name: move[name] for name in MOVED if name in move},
            **{name: getattr(t, name) for name in TABLES},
            "expert_offsets": t.expert_offsets if form.layout == "experts" else 0,
            "topk_idx": self.planner.topk_idx[rank],
            "num_experts": self.num_experts,
            "layout": LAYOUTS.index(form.layout),
            "alignment": form.alignment,
            "capacity": form.capacity,
            "row_limit": form.row_limit,
            "segments": 1,
            "segment_units": notify_spec.ONE_SEGMENT,
            "piece_bytes": rings.piece_bytes,
            "pitch": rings.pitch,
            "pieces": rings.pieces,
            "stages": rings.stages,
            "warps": rings.warps,
            "rings_at": fused_spec.rings_at(self.num_experts, R),
            **more,
        }

    @property
    def rings(self) -> dispatch_spec.Rings:
        bulk = self._keep[0]["bulk_scale_bytes"]
        assert isinstance(bulk, int)
        left = dynamic_bytes(fused_spec.SPEC) - fused_spec.rings_at(self.num_experts, self.ranks.num_ranks)
        return fused_spec.cut_rings(self.payload.row_bytes, bulk, left)

    def fused_sizes(self, num_blocks: int) -> tuple[int, int, int]:
        smem = fused_spec.rings_at(self.num_experts, self.ranks.num_ranks) + self.rings.smem_bytes
        return num_blocks, fused_spec.THREADS, smem

    def fused(self, only: Sequence[int] | None = None, num_sms: int = FEW_SMS, **more: object) -> None:
        """Launch dispatch_fused on some ranks, or all; does not wait."""
        for rank in range(self.ranks.num_ranks) if only is None else only:
            num_blocks = fused_spec.num_blocks(self.planner.topk_idx[rank].shape[0], num_sms)
            assert num_blocks, "too many tokens for dispatch_fused"
            fields = self._only(rank, self.fused_fields(rank, **more))
            self.ranks.launch(fused_spec.SPEC, fields, self.fused_sizes(num_blocks), self.planner.config)

    # ------------------------------------------------------------------ three kernels

    def three(self, only: Sequence[int] | None = None, **more: object) -> None:
        """Launch the three kernels on some ranks, or all, one behind the other; does not wait."""
        here = range(self.ranks.num_ranks) if only is None else only
        sizes = (2, notify_spec.THREADS, self.planner.smem_bytes)
        for rank in here:
            t = self.planner.tables[rank]
            launch = self.ranks.launch
            notify = self.planner.notify_fields(rank, **{"handshake": self.signature, **more})
            launch(notify_spec.SPEC, self._only(rank, notify), sizes, self.planner.config)
            assign = self.planner.assign_fields(rank)
            if assign is not None:
                launch(assign_spec.SPEC, self._only(rank, {**assign, **more}), sizes, self.planner.config)
            move = {
                **self._keep[rank],
                "places": t.places,
                "rows_out": t.dst_counts,
                "rows_in": t.src_counts,
                **more,
            }
            launch(dispatch_spec.SPEC, self._only(rank, move), self.delivery.sizes())

    def _only(self, rank: int, fields: dict[str, object]) -> list[dict[str, object] | None]:
        return [fields if one == rank else None for one in range(self.ranks.num_ranks)]

    # ------------------------------------------------------------------ checks

    def check(self, what: str = "") -> None:
        """Check every byte of the plans, and of all that was received."""
        check(self.planner, self.expected, what)
        self.delivery.check()

    def check_moved_nothing(self) -> None:
        """Check that no byte was received."""
        for landed in self.delivery.landed:
            for block in landed.blocks():
                assert block is None or bool((block.cpu() == POISON).all()), "rows of an aborted call have arrived"

    def words(self, rank: int) -> dict[str, Tensor]:
        """Return all that the kernels have written on a rank, as bytes."""
        t, landed = self.planner.tables[rank], self.delivery.landed[rank]
        made = {name: getattr(t, name).cpu().flatten().view(torch.uint8) for name in TABLES}
        blocks = {str(i): block.cpu() for i, block in enumerate(landed.blocks()) if block is not None}
        return {**made, **blocks}


MOVED = (
    *("x", "scale", "weights", "scale_row_stride", "scale_stride", "num_tokens", "row_bytes", "bulk_scale_bytes"),
    *("small_scale", "scale_size", "num_scales", "top_k", "width", "num_local", "by_expert", "handshake"),
)
"""Params that dispatch_fused and dispatch share, and that do not depend on how shared memory is cut."""
