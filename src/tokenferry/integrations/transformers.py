"""Expert parallelism of transformers by tokenferry: its models reach their experts through an `ExpertGroup`.

Call `register` once in each process, before a model is made::

    from tokenferry.integrations import transformers

    transformers.register()
    parallel = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="tokenferry")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=parallel)

transformers has a registry of such implementations since 5.23. In 5.19 to 5.22 a model chooses tokenferry by another
name, which also says how its experts run::

    parallel = DistributedConfig(fsdp_size=8, ep_size=8)
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=parallel, experts_implementation="tokenferry")

In 5.17 and 5.18 the ranks of a tensor-parallel group share the experts::

    experts = "model.layers.*.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    parallel = DistributedConfig(tp_size=8, tp_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=parallel, experts_implementation="tokenferry")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tokenferry.api import ExpertGroup
from tokenferry.autograd.local_parts import trained_part
from tokenferry.errors import ArgumentError, BackendUnavailable, ConfigError
from tokenferry.integrations.dispatched_experts import STYLE, DispatchedExperts, run_local_experts
from tokenferry.integrations.exchange import BatchExchange, Received, Sharers
from tokenferry.integrations.grouped_experts import GroupedExperts
from tokenferry.integrations.versions import installed, warn_unless_tried
from tokenferry.types import CountsLocation, DispatchOptions, Layout, MoeShape

NAME = "tokenferry"

# One group serves all layers of all models on a process group. It does not end with them: when a model is collected
# differs by rank, and ranks that make a group would wait for others that have one.
_groups: dict[dist.ProcessGroup, ExpertGroup] = {}

# Their views for the sizes of calls: to make one takes longer than a call, and it would know nothing of earlier calls.
_views: dict[tuple[dist.ProcessGroup, MoeShape], ExpertGroup] = {}

_Call = TypeVar("_Call", bound=Callable[..., Tensor])

_HEAP_BYTES = 2 << 30
_MAX_VIEWS = 256
_ANY_NUM_TOKENS = 2**31 - 1
"""M of calls that wait for counts: no memory depends on it, so T is unlimited."""

_OPTIONS: dict[CountsLocation, DispatchOptions] = {
    "host": DispatchOptions(Layout.EXPERTS),
    # Experts read all rows, and a NaN in one that holds no data must not reach a gradient.
    "device": DispatchOptions(Layout.EXPERTS, counts="device", zero_padding=True),
}


def _not_compiled(call: _Call) -> _Call:
    """Keep a method out of compiled graphs: process groups and groups are no values that they can hold."""
    outside: _Call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return outside


class _Experts(Protocol):
    num_experts: int
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]


def register() -> None:
    """Make ``"tokenferry"`` a name that transformers knows; see the top of this module. Local, and may be repeated.

    Warns if the version of transformers was not tried.

    Raises:
        BackendUnavailable: transformers is not installed, or its version has no registry that would do.
    """
    warn_unless_tried("transformers")
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError as error:
        _register_experts_function(error)
    else:
        EPImplementationInterface.register(NAME, ExpertParallel)


def _register_experts_function(error: ImportError) -> None:
    """Register the experts function of this version, and the style that belongs to it, if there is one."""
    try:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise BackendUnavailable(
            f"transformers: version {installed('transformers')} has no registry of expert-parallel implementations "
            f"({error}); install transformers 5.23 or newer"
        ) from error
    if STYLE not in ALL_PARALLEL_STYLES:
        ALL_EXPERTS_FUNCTIONS.register(NAME, shared_experts)
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, run_local_experts)
    own = ALL_PARALLEL_STYLES[STYLE]
    if not isinstance(own, DispatchedExperts):
        ALL_PARALLEL_STYLES.register(STYLE, DispatchedExperts(own, NAME, ExpertParallel))


def close_groups() -> None:
    """Close the groups of all process groups, and free their memory. Local; all ranks do so between the same calls.

    For a program that goes on without its models, or on a new process group. The next call of a model makes a group.
    """
    _views.clear()
    while _groups:
        _groups.popitem()[1].close()


class ExpertParallel:
    """How the experts of one layer get their tokens; an expert-parallel implementation of transformers 5.19 and newer.

    Contract:
        Collective: each call, and its backward. The first one on a process group also makes the `ExpertGroup`, which
            lives until `close_groups`, or as long as the process.
        Batches: all ranks of ``tp_mesh`` have the same one, of which each sends its part. Other ranks have others, of
            any size, also 0.
        Host: waits for the counts, as `ExpertGroup.dispatch`; but not in a capture, and not where gradients are off
            and all ranks have the same batch.
        CUDA graph: without gradients, after one call outside of the graph. In a capture all ranks have equally many
            tokens.
        torch.compile: a break in the graph; a call, with its experts, runs eagerly.
        Gradients: as those of `tokenferry.autograd`.

    Args:
        experts: The module of this rank's experts.
        ep_mesh: The ranks that share all experts.
        tp_mesh: The ranks with this rank's batch.
    """

    def __init__(self, experts: _Experts, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        self.experts_forward = experts.forward
        self.grouped = GroupedExperts.of(experts)
        self.process_group = ep_mesh.get_group()
        self.num_experts = experts.num_experts * self.process_group.size()
        sharers = tp_mesh.get_group()
        ranks, same = (dist.get_process_group_ranks(group) for group in (self.process_group, sharers))
        self.shares_batch = ranks == same
        self.sharers = Sharers(sharers, sharers.rank(), len(same))

    @_not_compiled
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs for each token of this rank, ``[T, H]``. Collective.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, K]``, numbers among all experts.
            top_k_weights: ``[T, K]``.

        Raises:
            ArgumentError: the first call was made while a CUDA graph is captured. And whatever `ExpertGroup` and
                `ExpertGroup.dispatch` raise.
        """
        num_tokens, hidden = hidden_states.shape
        captured = _is_captured(hidden_states)
        on_device = captured or (self.shares_batch and not torch.is_grad_enabled())
        most = max(1, self.sharers.most(num_tokens)) if on_device else _ANY_NUM_TOKENS
        shape = MoeShape(self.num_experts, top_k_index.shape[1], hidden, most)
        exchange = BatchExchange(self._view(shape, hidden_states.device, captured=captured), self.sharers, num_tokens)
        options = _OPTIONS["device" if on_device else "host"]
        received = exchange.send(hidden_states, top_k_index, top_k_weights, options)
        y = self._run_experts(received)
        return exchange.bring_back(y, received.plan)

    def _run_experts(self, received: Received) -> Tensor:
        """Run this rank's experts on the rows that it received."""
        rows, offsets, weights = received.rows, received.offsets, received.weights
        if rows.shape[0] == 0:
            # The experts run in any case: all ranks must build the same graph, and their gradients must be 0, not None.
            rows, weights = rows.sum(0, keepdim=True), weights.sum(0, keepdim=True)
            first = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
            return self.experts_forward(rows, first, weights.unsqueeze(1))[:0]
        if self.grouped is not None and self.grouped.apply_now():
            return self.grouped(rows, offsets, weights)
        numbers = torch.arange(rows.shape[0], dtype=offsets.dtype, device=rows.device)
        # Rows past the last expert, which hold no data, get the number that transformers skips: L.
        local = torch.bucketize(numbers, offsets[1:], right=True)
        return self.experts_forward(rows, local.unsqueeze(1), weights.unsqueeze(1))

    def _view(self, shape: MoeShape, device: torch.device, *, captured: bool) -> ExpertGroup:
        """Return the group of all layers, which the first call makes, for these sizes."""
        key = self.process_group, shape
        found = _views.get(key)
        if found is not None:
            return found
        group = _groups.get(self.process_group)
        if group is None:
            if captured:
                raise ArgumentError(
                    "transformers: the first call of a model's experts makes the group, which a CUDA graph cannot "
                    "capture; run the model once before the capture"
                )
            group = _groups[self.process_group] = _connect(self.process_group, shape, device)
        if len(_views) >= _MAX_VIEWS:
            _views.clear()
        found = _views[key] = group if group.shape == shape else group.for_shape(shape)
        return found


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _connect(process_group: dist.ProcessGroup, shape: MoeShape, device: torch.device) -> ExpertGroup:
    """Make the group of a process group. Collective."""
    group = ExpertGroup._with_heap(process_group, heap_bytes=_HEAP_BYTES, shape=shape)
    if group.device.type != device.type:
        group.close()
        raise ConfigError(
            f"transformers: the model is on {device}, and backend {group.backend} was chosen; set TOKENFERRY_BACKEND "
            "(cpu or cuda) on all ranks, or load the model elsewhere"
        )
    group.warmup()
    return group


def shared_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts that a tensor-parallel group shares in one layer, as an experts function of transformers.

    For versions 5.17 and 5.18.

    Contract: as `ExpertParallel`; the mesh is the one over which the parameters are sharded.

    Raises:
        ConfigError: the parameters are not sharded by expert. And whatever `ExpertParallel` raises.
    """
    parallel = experts.__dict__.get("_tokenferry")
    if parallel is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        sharded = [p for p in experts.parameters(recurse=False) if isinstance(p, DTensor)]
        if not sharded or any(p.placements != (Shard(0),) for p in sharded):
            raise ConfigError(
                'transformers: experts_implementation="tokenferry" needs experts that are sharded by their number; '
                'give DistributedConfig a tp_plan with "grouped_gemm" for their parameters, and nothing else for them'
            )
        mesh = sharded[0].device_mesh
        parallel = ExpertParallel(cast(_Experts, experts), mesh, mesh)
        experts.__dict__["_tokenferry"] = parallel  # no submodule
        parallel.experts_forward = partial(ALL_EXPERTS_FUNCTIONS["grouped_mm"], experts)
    with _local_parameters(experts):
        return parallel(hidden_states, top_k_index, top_k_weights)


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """Replace the sharded parameters of a module by their local parts, which pass gradients on to them."""
    parameters: dict[str, Any] = module._parameters
    whole = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    parameters.update({name: trained_part(p) for name, p in whole.items()})
    try:
        yield
    finally:
        parameters.update(whole)
