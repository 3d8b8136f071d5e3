"""The arguments of the calls of `ElasticBuffer` and `EPBuffer`, under one name each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenferry.types import Quantized


@dataclass(slots=True, eq=False)
class Arguments:
    """The arguments of a dispatch as they were given, besides the rows, the handle and those that concern streams.

    Attributes:
        call: The method that was called, for errors. The others have the names of DeepEP.
    """

    call: str
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    cumulative_local_expert_recv_stats: Tensor | None
    num_experts: int | None
    num_max_tokens_per_rank: int | None
    expert_alignment: int | None
    num_sms: int
    do_handle_copy: bool
    do_cpu_sync: bool | None
    do_expand: bool
    do_zero_padding: bool
    use_tma_aligned_col_major_sf: bool


@dataclass(slots=True, eq=False)
class Sent:
    """Rows that have been checked.

    Attributes:
        rows: The rows for a native call.
        scale_dims: The number of dimensions of their scales; 0: the caller gave none.
    """

    rows: Tensor | Quantized
    scale_dims: int


@dataclass(slots=True, eq=False)
class Request:
    """A dispatch without a handle, whose arguments have been checked.

    Attributes:
        given: The arguments; what may be left out of them is in the other attributes.
        topk_idx: ``[T, K]``: the routing.
        num_experts: E.
        max_tokens: M of this call.
        alignment: A.
        cpu_sync: Whether the host waits for the counts.
    """

    given: Arguments
    topk_idx: Tensor
    num_experts: int
    max_tokens: int
    alignment: int
    cpu_sync: bool


@dataclass(slots=True, eq=False)
class Returned:
    """The arguments of a combine, besides the handle and those that concern streams.

    Attributes:
        call: The method that was called, for errors.
        x: Rows, one for each that the dispatch has allocated.
        topk_weights: Weights to return with them, or None.
        bias: None, ``[T, H]``, or a tuple of two.
        num_sms: SMs that the call may occupy; 0: as the dispatch.
        rounds_once: Whether sums of a node may not be rounded before they cross to another one.
    """

    call: str
    x: Tensor
    topk_weights: Tensor | None
    bias: object
    num_sms: int
    rounds_once: bool
