"""`HybridEPBuffer`: DeepEP's hybrid branch, as far as Megatron-Core, Automodel and torchtitan call it.

Rows arrive sorted by expert, and experts are given as a map ``[T, E]``. Every method takes DeepEP's keywords; these
concern hardware, or do more than their names say:

================================================== ==============================================================
argument                                           effect in tokenferry
================================================== ==============================================================
hidden_dim, max_num_of_tokens_per_rank             CUDA: the memory for rows follows from both, if it is more than
                                                   2 GiB. A call may have other sizes; if it does not wait and has
                                                   more tokens, all ranks have as many
num_local_experts                                  checked; the experts of a call follow from its map
num_sms_dispatch_api, num_sms_combine_api          CUDA: SMs that a call may occupy; None: the library's choice
use_fp8, num_sms_preprocessing_api,                any value is correct: rows of any type travel, there is no
num_blocks_permute, num_blocks_unpermute,          preprocessing, rows are stored where they belong, and kernels are
load_cached_kernels, use_shared_buffer,            always cached
enable_custom_allgather, use_mnnvl,
num_of_hybrid_ep_ranks_per_nvlink_domain
fuse_permute_dispatch, fuse_unpermute_combine      any value is correct: both are fused
num_permuted_tokens                                without a handle: the rows of the result; what exceeds them is
                                                   dropped, and sets the flag. With a handle: compared with its rows,
                                                   unless it is a tensor on a GPU, which the host would wait for
non_blocking                                       True needs num_permuted_tokens or a handle, with which the host does
                                                   not wait in any case
================================================== ==============================================================

On CUDA a token has at most 64 experts; where the host does not wait, more are dropped, and set the flag of their rank.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, without_grad
from tokenferry.api import Connected
from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep import hybrid_calls as calls
from tokenferry.compat.deep_ep.arguments import check_integer, check_optional, detached, height
from tokenferry.compat.deep_ep.connect import LEAST_HEAP_BYTES, closing, connect
from tokenferry.compat.deep_ep.dialects import HYBRID
from tokenferry.compat.deep_ep.elastic import ElasticBuffer
from tokenferry.compat.deep_ep.expert_buffer import num_ranks_of
from tokenferry.compat.deep_ep.hybrid_calls import COMBINE, DISPATCH, HybridHandle
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ClosedError
from tokenferry.types import Quantized


@methods_not_compiled
class HybridEPBuffer(Connected):
    """R ranks that send tokens to experts, with the interface of DeepEP's `HybridEPBuffer`.

    Contract:
        Collective: the constructor and both calls.
        Host: CPU: every call returns with its work done. CUDA: every call returns when its work is on torch's current
            stream; a dispatch without ``num_permuted_tokens`` waits for the counts, without holding the GIL.
        CUDA graph: `dispatch_with_permute` with ``num_permuted_tokens`` or a handle, and `combine_with_unpermute`.
        Gradient: none; results carry no graph. Each direction is the backward of the other, with its handle.

    Args:
        group: Any process group (on the CPU backend: one that supports CPU tensors), or None for a group of one rank.
        hidden_dim: H, from which the memory follows; calls may have another.
        max_num_of_tokens_per_rank: M, likewise.
        num_local_experts: L; calls may have another.
        use_fp8: A hint without effect.
        num_sms_dispatch_api: SMs that a dispatch may occupy; None: the library's choice.
        num_sms_combine_api: SMs that a combine may occupy; None: the library's choice.
        num_sms_preprocessing_api: A hint without effect.
        num_blocks_permute: A hint without effect.
        num_blocks_unpermute: A hint without effect.
        load_cached_kernels: A hint without effect.
        use_shared_buffer: A hint without effect.
        enable_custom_allgather: A hint without effect.
        num_of_hybrid_ep_ranks_per_nvlink_domain: A hint without effect.
        use_mnnvl: A hint without effect.

    Attributes:
        group: The process group.
        rank: This rank.
        group_size: R.
        config: ``hidden_dim``, ``max_num_of_tokens_per_rank`` and ``num_of_experts_per_rank``, as given.
        configurer: ``configurer.buffer_config`` is ``config``, where torchtitan looks for it.
        runtime: The native group.

    Raises:
        ArgumentError: a size is not a positive integer.
        ConfigError, UnsupportedError: a variable of the environment is wrong, or cannot be honoured across nodes.
        BackendUnavailable: no backend runs on this group; gives the reason.
        PeerTimeout: a rank did not answer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = True,
        num_of_hybrid_ep_ranks_per_nvlink_domain: int | None = None,
        use_mnnvl: bool | None = None,
    ) -> None:
        call = "HybridEPBuffer"
        check_integer(call, "hidden_dim", hidden_dim, 1)
        check_integer(call, "max_num_of_tokens_per_rank", max_num_of_tokens_per_rank, 0)
        check_integer(call, "num_local_experts", num_local_experts, 1)
        for name, value in (
            ("num_sms_dispatch_api", num_sms_dispatch_api),
            ("num_sms_combine_api", num_sms_combine_api),
        ):
            if value is not None:
                check_integer(call, name, value, 1)
        check_flags(
            call,
            use_fp8=use_fp8,
            load_cached_kernels=load_cached_kernels,
            use_shared_buffer=use_shared_buffer,
            enable_custom_allgather=enable_custom_allgather,
            use_mnnvl=use_mnnvl,
        )
        check_optional(
            call,
            num_sms_preprocessing_api=num_sms_preprocessing_api,
            num_blocks_permute=num_blocks_permute,
            num_blocks_unpermute=num_blocks_unpermute,
            num_of_hybrid_ep_ranks_per_nvlink_domain=num_of_hybrid_ep_ranks_per_nvlink_domain,
        )
        num_ranks_of(call, group)
        num_bytes = ElasticBuffer.get_buffer_size_hint(group, max(1, max_num_of_tokens_per_rank), hidden_dim)
        self._experts = connect(call, group, heap_bytes=max(num_bytes, LEAST_HEAP_BYTES))
        self.group = group
        self.rank, self.group_size = self._experts.rank, self._experts.num_ranks
        self.config = SimpleNamespace(
            hidden_dim=hidden_dim,
            max_num_of_tokens_per_rank=max_num_of_tokens_per_rank,
            num_of_experts_per_rank=num_local_experts,
        )
        self.configurer = SimpleNamespace(buffer_config=self.config)
        self.runtime = self._experts
        self._views = Views(self._experts)
        on_gpu = self._experts.backend == "cuda"
        self._dispatch_sms = num_sms_dispatch_api if on_gpu else None
        self._combine_sms = num_sms_combine_api if on_gpu else None
        self._closing = closing(self, self._experts)

    @without_grad
    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_permuted_tokens: int | Tensor | None = None,
        pad_multiple: int | None = None,
        handle: HybridHandle | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, HybridHandle]:
        """Send every token to its experts, and deliver a row for each (token, local expert), by expert. Collective.

        Args:
            hidden: ``[T, H]``: rows without their scales.
            topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``, instead of ``routing_map``, which counts if both are
                given.
            topk_weights: ``[T, K]`` float32 with ``topk_idx``, instead of ``probs``, which count if both are given.
            num_of_experts_per_rank: L; compared with the map.
            num_of_experts: E; needed with ``topk_idx``, otherwise compared with the map.
            use_fp8: A hint without effect.
            routing_map: ``[T, E]`` bool: the experts of each token.
            probs: ``[T, E]`` float32 to send with the rows, or None.
            scaling_factor: ``[T, S]`` scales of ``hidden``, or None.
            num_permuted_tokens: Rows of the results, so that the host does not wait; None: as many as arrive.
            pad_multiple: A: each expert's rows begin at a multiple of it; None or 0: 1.
            handle: Handle of an earlier call, to send the rows to the same places.
            non_blocking: Do not wait; needs ``num_permuted_tokens`` or a handle.
            fuse_permute_dispatch: A hint without effect.

        Returns:
            (rows ``[rows, H]``, by expert, then source rank, then token, with zeros between the experts; their
            probabilities ``[rows]`` or None; their scales or None; ``[L]`` int64 rows of each expert, with padding, on
            the CPU unless ``num_permuted_tokens`` was given; handle, whose last element is not 0 if anything was
            dropped). With ``num_permuted_tokens``, rows behind those of the last expert are undefined.

        Raises:
            ArgumentError: arguments are missing or contradict each other; names them.
            ShapeError, RoutingError, CapacityError, PlanError, ConfigError, MismatchError, PeerTimeout, ClosedError: as
                `ExpertGroup.dispatch`.
        """
        self._open(DISPATCH)
        check_flags(DISPATCH, use_fp8=use_fp8, fuse_permute_dispatch=fuse_permute_dispatch, non_blocking=non_blocking)
        rows = calls.checked_rows(self._experts, hidden, scaling_factor)
        given = calls.Arguments(
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_of_experts_per_rank=num_of_experts_per_rank,
            num_of_experts=num_of_experts,
            routing_map=routing_map,
            probs=probs,
            num_permuted_tokens=num_permuted_tokens,
            pad_multiple=pad_multiple,
            non_blocking=non_blocking,
        )
        views, num_sms = self._views, self._dispatch_sms
        if handle is not None:
            made = calls.checked_handle(DISPATCH, handle, pad_multiple)
            calls.check_again(self._experts, height(rows), given, made)
            sent = calls.dispatch_again(views, rows, probs, made, num_sms)
        else:
            chosen = calls.resolved(self._experts, height(rows), given)
            if chosen.budget is None:
                sent, made = calls.dispatch(views, rows, chosen, num_sms)
            else:
                most = max(1, self.config.max_num_of_tokens_per_rank, height(rows))
                sent, made = calls.dispatch_into(views, rows, chosen, most, num_sms)
        x = sent.x
        data, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
        return data, sent.topk_weights, None if scaling_factor is None else scale, made.tokens_per_expert, made

    @without_grad
    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: HybridHandle,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Add up the rows of each token, rank by rank, in float32, rounded once. Collective.

        Args:
            hidden: ``[rows, H]``: one row for each that `dispatch_with_permute` has delivered; those that hold nothing
                are not read. Probabilities are not applied.
            probs: ``[rows]`` float32 to return to the tokens, or None.
            handle: Handle of a `dispatch_with_permute`; may be used again.
            pad_multiple: As there, or None.
            fuse_unpermute_combine: A hint without effect.

        Returns:
            (``[T, H]``; ``[T, E]`` float32, 0 where no row was sent, or None).

        Raises:
            ArgumentError, ShapeError, PlanError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
        """
        self._open(COMBINE)
        check_flags(COMBINE, fuse_unpermute_combine=fuse_unpermute_combine)
        known = calls.checked_handle(COMBINE, handle, pad_multiple)
        calls.check_returned(self._experts, hidden, probs, known)
        weights = None if probs is None else detached(probs)
        return calls.combine(self._views, detached(hidden), weights, known, self._combine_sms)

    def _open(self, call: str) -> None:
        """Raise ClosedError after an error that broke the group, and in a forked child."""
        try:
            self._experts._ready(call)
        except ClosedError as error:
            HYBRID.put(error, call, self._views)
            raise
