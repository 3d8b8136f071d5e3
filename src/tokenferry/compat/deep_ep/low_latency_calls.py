"""`LowLatencyCalls`: the low-latency methods of `Buffer`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, without_grad
from tokenferry.api import ExpertGroup
from tokenferry.checks import Checks, check_flags
from tokenferry.compat.deep_ep import config as configs
from tokenferry.compat.deep_ep import low_latency
from tokenferry.compat.deep_ep.arguments import Rows, check_integer, check_optional, check_sizes, refuse
from tokenferry.compat.deep_ep.dialects import V1
from tokenferry.compat.deep_ep.low_latency import Handle, Hook
from tokenferry.compat.deep_ep.streams import Lane, When
from tokenferry.compat.deep_ep.utils.event import EventOverlap
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ArgumentError, ClosedError, TokenferryError

_OVERLAP_REMEDY = "combine after the experts are done, without the arguments that overlap the two"


@methods_not_compiled
class LowLatencyCalls:
    """The low-latency methods of `Buffer`, which need ``low_latency_mode=True``.

    M is ``num_max_dispatch_tokens_per_rank``; L, the experts of this rank, is E / R. Any number of results may be alive
    at once.
    """

    rank: int
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    runtime: object | None
    _experts: ExpertGroup
    _views: Views
    _lane: Lane

    def _open(self, call: str) -> None:
        """Raise ClosedError after `Buffer.destroy`, after an error that broke the group, and in a forked child."""
        if self.runtime is None:
            raise ClosedError(f"{call}: the Buffer was destroyed; make a new one")
        try:
            self._experts._ready(call)
        except ClosedError as error:
            V1.put(error, call, self._views)
            raise

    def _decoding(self, call: str) -> None:
        self._open(call)
        if not self.low_latency_mode:
            raise ArgumentError(f"{call}: needs a Buffer made with low_latency_mode=True, this one has False")

    def _shrinking(self, call: str) -> None:
        self._open(call)
        if not self.enable_shrink:
            raise ArgumentError(f"{call}: needs a Buffer made with enable_shrink=True, this one has False")

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes of buffers for low latency, to be passed as ``num_rdma_bytes``. Local.

        On one node by DeepEP's formula; on several those of two levels, which are far fewer.

        Raises:
            ArgumentError: a size is not a positive integer.
        """
        call = "Buffer.get_low_latency_rdma_size_hint"
        check_sizes(
            call,
            num_max_dispatch_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            hidden=hidden,
            num_ranks=num_ranks,
            num_experts=num_experts,
        )
        return configs.low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @without_grad
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Clean nothing: no call needs a buffer that an earlier one left clean. Local without ``enable_shrink``.

        With ``enable_shrink`` it is collective, like a low-latency call: DeepEP's has barriers, so programs expect that
        a rank that does not come is masked afterwards.

        Raises:
            ArgumentError: a size is not a positive integer.
            MismatchError, PeerTimeout, ClosedError: with ``enable_shrink``, as `low_latency_dispatch`.
        """
        call = "Buffer.clean_low_latency_buffer"
        self._decoding(call)
        check_sizes(
            call,
            num_max_dispatch_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            hidden=hidden,
            num_experts=num_experts,
        )
        if self.enable_shrink:
            low_latency.meet(self._views)

    # ------------------------------------------------------------------ shrink mode

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Skip a rank in low-latency calls (True), or stop skipping it (False). Local.

        A rank that was lost comes back as described in `tokenferry.ExpertGroup.mask`: between two barriers all ranks
        pass False, for the rank that comes back and for themselves. CUDA: a rank that was masked during the first
        low-latency call of a size comes back in the same way.

        Raises:
            ArgumentError: ``enable_shrink`` is False, ``rank_to_mask`` is outside [0, R) or this rank with
                ``mask=True``, or ``mask`` is not a bool.
        """
        call = "Buffer.low_latency_update_mask_buffer"
        self._shrinking(call)
        check_integer(call, "rank_to_mask", rank_to_mask, 0)
        check_flags(call, mask=mask)
        try:
            self._experts.mask(rank_to_mask, masked=bool(mask))
        except TokenferryError as error:
            V1.put(error, call, self._views, renamed={"rank": "rank_to_mask"})
            raise

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fill ``mask_status`` ``[R]`` int32 with 1 for each rank that is skipped and 0 for the others. Local.

        CUDA: written in the order of the current stream, behind all calls so far; the host does not wait.

        Raises:
            ArgumentError: ``enable_shrink`` is False.
            ShapeError: ``mask_status`` is not such a tensor.
        """
        call = "Buffer.low_latency_query_mask_buffer"
        self._shrinking(call)
        check = Checks(call, self._experts.device).given("the group", R=self.group_size)
        check.tensor("mask_status", mask_status, "R", (torch.int32,))
        with torch.inference_mode():  # the caller's tensor may come from it
            self._experts._backend.write_masks(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Stop skipping all ranks: call `low_latency_update_mask_buffer` with False for each skipped rank. Local.

        If one of them was lost, all ranks do so between two barriers; a rank that skips none, but was skipped, passes
        its own rank to `low_latency_update_mask_buffer` with False instead.

        Raises:
            ArgumentError: ``enable_shrink`` is False.
        """
        call = "Buffer.low_latency_clean_mask_buffer"
        self._shrinking(call)
        try:
            for rank in self._experts.masked_ranks:
                self._experts.mask(rank, masked=False)
        except TokenferryError as error:
            V1.put(error, call, self._views)
            raise

    # ------------------------------------------------------------------ dispatch and combine

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """Return the tensor that `low_latency_combine` of this handle reads with ``zero_copy=True``.

        ``[L, R*M, H]`` bfloat16. Local; the same tensor at every call with the handle; contiguous.

        Raises:
            PlanError: ``handle`` does not come from `low_latency_dispatch`.
        """
        self._decoding("Buffer.get_next_low_latency_combine_buffer")
        return low_latency.combine_buffer(self._experts, handle)

    @without_grad
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        use_nvfp4: bool = False,
        x_global_scale: Tensor | None = None,
    ) -> tuple[Rows, Tensor, Handle, EventOverlap, Hook | None]:
        """Send every token to its experts, into a layout whose shape does not depend on the routing. Collective.

        Args:
            x: ``[T, H]`` bfloat16, float16 or float32, contiguous, T <= M.
            topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``; -1: slot unused.
            num_max_dispatch_tokens_per_rank: The most tokens of any rank, M; the same on all ranks.
            num_experts: Number of experts, E, a multiple of R.
            cumulative_local_expert_recv_stats: ``[L]`` int32, to which the rows received are added.
            dispatch_wait_recv_cost_stats: ``[R]`` int64, to which the nanoseconds waited for each rank are added.
            use_fp8: Cast rows to float8_e4m3fn, one scale per row and 128 columns: ``max(amax, 1e-4) / 448``. A NaN or
                an infinity arrives as NaN; the other columns arrive as if it were 0.
            round_scale: Round scales up to powers of two.
            use_ue8m0: Return scales as exponent bytes, four to an int32; needs ``round_scale``.
            async_finish: Return an event that can be waited for.
            return_recv_hook: Return before rows are received; ``hook()`` receives them. Not together with
                ``async_finish``.
            use_nvfp4: Not supported; must be False.
            x_global_scale: Not supported; must be None.

        Returns:
            (rows ``[L, R*M, H]``, with ``use_fp8`` a tuple of them and their scales ``[L, R*M, H/128]`` float32 or
            ``H/512`` int32 with unit stride along the rows; ``[L]`` int32 rows of each expert; handle ``(source token
            [L, R*M] int32, [L, R] int64 of start << 32 | count, M, H, E, ...)``; event; hook or None). The rows of an
            expert lie by source rank, then token.

        Raises:
            UnsupportedError: ``use_nvfp4`` or ``x_global_scale`` was given.
            ArgumentError: options exclude each other.
            ShapeError, RoutingError, CapacityError, ConfigError, MismatchError, PeerTimeout, ClosedError: as
                `ExpertGroup.decode_dispatch`.
        """
        call = "Buffer.low_latency_dispatch"
        self._decoding(call)
        refuse(call, "use use_fp8=True or send bfloat16 rows", use_nvfp4=use_nvfp4, x_global_scale=x_global_scale)
        if not (type(use_fp8) is type(round_scale) is type(use_ue8m0) is bool):
            check_flags(call, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
        _exclusive(call, async_finish, return_recv_hook)
        given = low_latency.DispatchArguments(
            num_max_dispatch_tokens_per_rank,
            num_experts,
            low_latency.scale_format(use_fp8, round_scale, use_ue8m0),
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            return_recv_hook,
        )
        work = partial(low_latency.dispatch, self._views, x, topk_idx, given)
        if async_finish:
            inputs = (x, topk_idx, given.received, given.wait_ns)
            (rows, counts, handle, hook), event = self._lane.run(call, When(async_finish=True), inputs, work)
        else:
            (rows, counts, handle, hook), event = work(), EventOverlap()
        return rows, counts, handle, event, hook

    @without_grad
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
        *,
        overlap: bool = False,
        src_signals: Tensor | None = None,
        src_signal_expect_value: int = 0,
        packed_recv_count: Tensor | None = None,
        comp_signal: Tensor | None = None,
        block_m: int | None = None,
        threshold: int | None = None,
        num_sms: int | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Return the experts' rows and add them up with the gate weights, slot by slot in float32. Collective.

        Args:
            x: ``[L, R*M, H]`` in the layout of `low_latency_dispatch`, contiguous; rows past the counts are not read.
            topk_idx: ``[T, K]``, the same as in `low_latency_dispatch`; checked on the CPU only.
            topk_weights: ``[T, K]`` float32.
            handle: Handle of a `low_latency_dispatch`; may be used again.
            use_logfmt: Send rows with 10 bits per number (`tokenferry.formats.logfmt`); needs bfloat16 rows and H a
                multiple of 128. A NaN or an infinity arrives as NaN; the other columns arrive as if it were 0.
            zero_copy: Read the tensor of `get_next_low_latency_combine_buffer` instead of ``x``.
            async_finish: Return an event that can be waited for.
            return_recv_hook: Return before the sums are complete; ``hook()`` completes them. Not together with
                ``async_finish``.
            out: The tensor to write to: ``[T, H]`` of the dtype of ``x``; None: a new tensor.
            combine_wait_recv_cost_stats: ``[R]`` int64, to which the nanoseconds waited for each rank are added.
            overlap: Not supported; must be False.
            src_signals: Not supported; must be None.
            src_signal_expect_value: Not supported; must be 0.
            packed_recv_count: Not supported; must be None.
            comp_signal: Not supported; must be None.
            block_m: Not supported; must be None.
            threshold: Not supported; must be None.
            num_sms: A hint without effect; checked.

        Returns:
            (``[T, H]``, event, hook or None).

        Raises:
            UnsupportedError: an argument above that has to be neutral is not; names it.
            ArgumentError: options exclude each other, ``topk_idx`` is not that of the handle, or ``zero_copy`` or
                ``use_logfmt`` is not possible for these rows.
            PlanError, ShapeError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.decode_combine`.
        """
        call = "Buffer.low_latency_combine"
        self._decoding(call)
        if not (
            overlap is False
            and src_signals is None
            and type(src_signal_expect_value) is int
            and src_signal_expect_value == 0
            and packed_recv_count is None
            and comp_signal is None
            and block_m is None
            and threshold is None
        ):
            refuse(
                call,
                _OVERLAP_REMEDY,
                overlap=overlap,
                src_signals=src_signals,
                src_signal_expect_value=src_signal_expect_value,
                packed_recv_count=packed_recv_count,
                comp_signal=comp_signal,
                block_m=block_m,
                threshold=threshold,
            )
        if num_sms is not None:
            check_optional(call, num_sms=num_sms)
        _exclusive(call, async_finish, return_recv_hook)
        if not (type(use_logfmt) is type(zero_copy) is bool):
            check_flags(call, use_logfmt=use_logfmt, zero_copy=zero_copy)
        given = low_latency.CombineArguments(
            bool(use_logfmt), zero_copy, out, combine_wait_recv_cost_stats, return_recv_hook
        )
        work = partial(low_latency.combine, self._views, x, topk_idx, topk_weights, handle, given)
        if async_finish:
            inputs = (x, topk_idx, topk_weights, handle, out, given.wait_ns)
            (combined_x, hook), event = self._lane.run(call, When(async_finish=True), inputs, work)
        else:
            (combined_x, hook), event = work(), EventOverlap()
        return combined_x, event, hook


def _exclusive(call: str, async_finish: bool, return_recv_hook: bool) -> None:
    if not (type(async_finish) is type(return_recv_hook) is bool):
        check_flags(call, async_finish=async_finish, return_recv_hook=return_recv_hook)
    if async_finish and return_recv_hook:
        raise ArgumentError(
            f"{call}: async_finish and return_recv_hook: expected at most one of them; wait or call the hook"
        )
