"""`EPHandle`: the record of a dispatch of `ElasticBuffer`, with the fields of DeepEP 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenferry.ambient import members_not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.compat.deep_ep.arguments import aligned
from tokenferry.compat.deep_ep.config import round_up
from tokenferry.compat.deep_ep.elastic_arguments import Request
from tokenferry.compat.deep_ep.streams import HoldsTensors
from tokenferry.compat.deep_ep.utils.event import EventHandle
from tokenferry.types import Dispatched, Plan, Quantized

CPU_NUM_SMS = 20
"""The number of SMs that is reported where there are none: DeepEP's programs expect one."""


@members_not_compiled
class EPHandle(HoldsTensors):
    """A record of one dispatch; not consumed by the calls that use it.

    Fields that are tensors on the device, other than ``topk_idx``, are made whenever they are read, on the current
    stream. After an asynchronous dispatch, reading one makes the current stream wait for the dispatch.

    Attributes:
        plan: The native plan.
        do_expand: Whether rows lie by expert.
        num_experts: E.
        expert_alignment: A.
        num_max_tokens_per_rank: M of the dispatch.
        topk_idx: ``[T, K]``: a copy of the routing, or with ``do_handle_copy=False`` the caller's tensor.
        asked_num_sms: SMs that the dispatch was asked to occupy; 0: it was the library's choice.
        num_recv_tokens_per_expert_list: Rows of each local expert, rounded up to the alignment; without host
            synchronisation empty.
        num_recv_tokens: Rows received, a token counted once; without host synchronisation R * M.
        num_expanded_tokens: The sum of the list; without host synchronisation the worst case.
    """

    token_metadata_at_forward = channel_linked_list = cached_recv_src_metadata_before_sort = None

    def __init__(
        self, sent: Dispatched[Tensor | Quantized], request: Request, topk_idx: Tensor, view: ExpertGroup
    ) -> None:
        self.plan = plan = sent.plan
        self.do_expand = request.given.do_expand
        self.num_experts = request.num_experts
        self.expert_alignment = A = request.alignment
        self.num_max_tokens_per_rank = M = request.max_tokens
        self.topk_idx = topk_idx
        self.asked_num_sms = request.given.num_sms
        self.num_recv_tokens_per_expert_list = aligned(sent.host_counts or (), A)
        if plan.num_received is not None:
            self.num_recv_tokens = plan.num_received
            self.num_expanded_tokens = sum(self.num_recv_tokens_per_expert_list)
        else:
            L = view.num_local_experts
            self.num_recv_tokens = view.num_ranks * M
            rows = self.num_recv_tokens * min(topk_idx.shape[1], L) + (A - 1) * L
            self.num_expanded_tokens = round_up(rows, A)
        self._view = view
        # Not the result itself, which would keep the received rows alive.
        self._expert_offsets = None if A == 1 else sent.expert_offsets
        self._other_padding: Plan | None = None
        self._done: EventHandle | None = None
        self._captured = False

    @property
    def num_sms(self) -> int:
        """SMs that the dispatch occupied; on the CPU, if it was not asked for a number, 20."""
        if self.asked_num_sms:
            return self.asked_num_sms
        sms = self._view._call_sms()
        return CPU_NUM_SMS if sms is None else sms.dispatch

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """``[R]`` int32: rows received from ranks 0..i, a token counted once."""
        self._wait()
        return self.plan.src_counts.cumsum(0, dtype=torch.int32)

    @property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """``[L]`` int32: the end of each local expert's rows; not expanded: as if each were rounded up to A."""
        self._wait()
        counts, A = self.plan.expert_counts, self.expert_alignment
        if self._expert_offsets is not None:
            return self._expert_offsets[:-1] + counts
        return (counts if A == 1 else (counts + (A - 1)) // A * A).cumsum(0, dtype=torch.int32)

    @property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor:
        """``[L]`` int32: rows of each local expert, without padding."""
        self._wait()
        return self.plan.expert_counts

    @property
    def recv_src_metadata(self) -> Tensor:
        """``[N, 2 + K]`` int32, N the rows that there is space for; what lies behind the received rows is undefined.

        By row: source rank * M + source token; 0; for each slot the row in the expanded layout, or -1.
        """
        self._wait()
        plan = self.plan
        num_rows, top_k = plan.topk_idx.shape
        made = plan.src_token.new_full((num_rows, 2 + top_k), -1, dtype=torch.int32)
        rows = torch.arange(num_rows, dtype=torch.int64, device=made.device)
        # Not `Plan.src_rank`, for which the host would wait if it does not know the counts.
        src_rank = torch.searchsorted(plan.src_counts.cumsum(0), rows, right=True)
        made[:, 0] = src_rank * self.num_max_tokens_per_rank + plan.src_token
        made[:, 1] = 0
        if self.do_expand:
            made[:, 2:] = plan.row_idx
        return made

    @property
    def dst_buffer_slot_idx(self) -> Tensor:
        """``[T, K]`` int32: the rank that each slot goes to, or -1. DeepEP's own content is opaque."""
        self._wait()
        return (self.topk_idx // self._view.num_local_experts).to(torch.int32)

    def padded(self, *, zero_padding: bool) -> Plan:
        """Return the plan, with padding of zeros or without."""
        plan = self.plan
        if plan.options.zero_padding == zero_padding or not self.do_expand:
            return plan
        if self._other_padding is None:
            self._other_padding = replace(plan, options=replace(plan.options, zero_padding=zero_padding))
        return self._other_padding

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        return (self.topk_idx, *self.plan._managed_by_torch())

    def note_event(self, event: EventHandle | None) -> None:
        """Remember the event of an asynchronous dispatch, which marks its end."""
        self._done = event
        self._captured = is_capturing(self._view)

    def _wait(self) -> None:
        # An event of a capture means nothing outside of it, where the whole graph is what a program waits for.
        if self._done is not None and self._captured == is_capturing(self._view):
            self._done.current_stream_wait()


def is_capturing(group: ExpertGroup) -> bool:
    """Return whether a CUDA graph of the group's device is being captured."""
    return group.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
