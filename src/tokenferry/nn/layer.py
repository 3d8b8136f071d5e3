"""A complete expert-parallel Mixture-of-Experts layer for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenferry import autograd
from tokenferry.ambient import not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.autograd.local_parts import trained_part
from tokenferry.errors import ConfigError, ShapeError
from tokenferry.nn.balance.loading import refuse_half_state
from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.balance.replicas import share_gradients
from tokenferry.nn.balance.routing import PlacedRouter
from tokenferry.nn.balance.sharers import remember
from tokenferry.nn.expert_checks import (
    check_experts,
    check_graph,
    check_transforms,
    check_wrappers,
    refuse_late,
    refuse_replaced,
    refuse_unequal,
    refuse_width,
)
from tokenferry.nn.experts import SeededExperts, SwiGLUExperts
from tokenferry.nn.options import LayerOptions
from tokenferry.nn.precision import NARROW, autocast_dtype
from tokenferry.nn.recomputing import recomputing
from tokenferry.nn.router import GroupLimit, Router
from tokenferry.nn.sharding import SameExperts, averaged_gradient, expert_mesh, not_sharded, shard_parameters
from tokenferry.nn.wrappers import place_inside, unwrapped
from tokenferry.topology import most_nodes
from tokenferry.types import Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoELayer(nn.Module):
    """Experts spread over the ranks of a group: for each token the sum of ``w_k * expert_k(x)`` over its choices.

    And of ``shared(x)``, if `LayerOptions` has shared experts.

    Contract:
        Collective: forward (a dispatch and a combine) and backward (a combine and a redispatch). All ranks call both
            the same number of times, with the same grad mode; T and N may differ and may be 0.
        Host: waits for the counts, as `ExpertGroup.dispatch`, unless `LayerOptions` says otherwise. torch.compile: with
            ``fullgraph=True``, if the experts use grouped products; see `by_expert`. Otherwise the counts break the
            graph, unless ``torch._dynamo.config.capture_scalar_outputs`` is set.
        Gradients: those of the *mean over ranks* of the ranks' losses. The gradients of an expert are complete on the
            rank that holds it, or in a `tokenferry.nn.balance.PlacedRouter` on all ranks that hold it: do not reduce
            them. Those of the router, and of every replicated parameter, have to be
            averaged over the ranks, as DistributedDataParallel and FSDP2 do; see `expert_parameters`,
            `replicated_parameters` and `parallelize`.
        Parameters: our experts are initialised separately for each of the E experts, so that a seed gives the same
            layer for every R. The router's are float32. With several ranks those of all experts are DTensors
            ``[E, ...]``, of which each rank holds its part: state_dict, checkpoints, optimizers and norms are those of
            all experts.
        Device: the group's, whatever torch's default device; only under ``torch.device("meta")``, meta: then
            ``to_empty(device=group.device)`` and `reset_parameters` give the same layer.
        torch.autocast: as in `torch.nn.Linear`, rows and experts are cast to its dtype (float64 ones are not), rows
            travel in it, and the result has it. The router computes in float32, from the rows as they come.
        Narrow rows: for bfloat16 and float16 rows, float32 experts are cast to their dtype, as FSDP2 casts the rest of
            a model with a MixedPrecisionPolicy.

    Args:
        group: The group of the experts; its shape determines E, K and H. The layer does not close it.
        ffn_hidden: F, the intermediate size of `SwiGLUExperts`, which the layer then makes; or ``experts``.
        experts: A module, called as ``experts(rows, offsets)``: ``[n, H]`` rows grouped by expert, and ``[L + 1]``
            int32, the first row of each expert, then the end. It returns ``[n, H]``, a row for each row. All of its
            parameters have the L experts of this rank as their first dimension; when it is called, they are tensors of
            that size, in the dtype of the rows, whatever they are in the layer. It has no buffers in its state_dict;
            others have the L experts first, too, or 1 if they are the same for all.
        router: A module that maps ``[T, H]`` to a `Routing` with weights; None: `Router` with softmax, on the group's
            device. A `Router` has the group's H, E and K, and must not be able to choose more nodes than
            ``MoeShape.max_nodes``, which takes a `GroupLimit` if that is few; other routers are checked in each call.
            A `tokenferry.nn.balance.PlacedRouter` says which expert each slot holds, so that the layer can initialise
            it.
        options: Shared experts, and how rows travel; None: `LayerOptions` as they are by default.
        seed: Seed of the parameters that the layer initialises, in 0 .. 2^40 - 1; the same on every rank.
        dtype: dtype of the experts that the layer makes; None: torch's default dtype, as for the modules of `torch.nn`.

    Attributes:
        experts: The module of the experts; its parameters are those of `expert_parameters`.
        shared: The module for all tokens, or None.
        expert_counts: ``[L]`` int32: rows that this rank's experts received in the last forward, from all ranks; None
            before the first.

    Raises:
        ConfigError: ``ffn_hidden`` or ``seed`` is out of range; not exactly one of ``ffn_hidden`` and ``experts`` is
            given, or ``dtype`` with ``experts``; they, or a part of them, are in torch's checkpoint_wrapper; a
            parameter of the experts has another first dimension, is on another device than the group, has two names, or
            has hooks; or a `Router` has other sizes than the group, or may choose experts on more nodes than its
            ``max_nodes``.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn import GELUExperts, MoELayer
        >>> shape = tokenferry.MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=64)
        >>> group = tokenferry.ExpertGroup(None, shape, backend="cpu")
        >>> layer = MoELayer(group, ffn_hidden=16)
        >>> out = layer(torch.randn(2, 5, 8))
        >>> out.shape, int(layer.expert_counts.sum())
        (torch.Size([2, 5, 8]), 20)
        >>> MoELayer(group, experts=GELUExperts(group, 16)).state_dict().keys()
        odict_keys(['experts.up', 'experts.down', 'router.weight'])
    """

    def __init__(
        self,
        group: ExpertGroup,
        ffn_hidden: int | None = None,
        *,
        experts: nn.Module | None = None,
        router: Callable[[Tensor], Routing] | None = None,
        options: LayerOptions | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if options is not None and not isinstance(options, LayerOptions):
            raise ConfigError(f"MoELayer: options: expected a LayerOptions or None, got {type(options).__name__}")
        if not isinstance(group, ExpertGroup):
            raise ConfigError(f"MoELayer: group: expected a tokenferry.ExpertGroup, got {type(group).__name__}")
        shape = group.shape
        self.group = group
        self.options = LayerOptions() if options is None else options
        self.experts = _experts(group, ffn_hidden, experts, seed, dtype)
        if router is None:
            device = torch.get_default_device()
            with device if device.type == "meta" else group.device:
                router = Router(shape.hidden, shape.num_experts, shape.top_k, seed=seed)
        _check_router(group, router)
        self.router = router
        if experts is None and self._placed is not None:
            self._initialise_experts()
        self.shared = self.options.shared
        self._sharded = False
        # The ranks that hold the same experts, given to `parallelize`: backward averages over them.
        self._same_experts: SameExperts | None = None
        self._replicate_given = False  # also if there are none
        # Names of parameters that had no values to make equal where experts are the same: training raises.
        self._unequal = ""
        self._checked = (0, False, "")  # the experts whose graph was looked at, and how they were
        mesh = expert_mesh(group)
        if mesh is not None:
            self._place_experts(mesh)
        self.expert_counts: Tensor | None = None
        self._load: Tensor | None = None
        self._load_by: Placement | None = None
        self._earlier: list[tuple[list[int], Tensor]] = []
        self.register_load_state_dict_pre_hook(refuse_half_state)  # type: ignore[no-untyped-call]
        remember(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, which may share experts as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        remember(self)

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of ``x`` ``[..., H]``, at most M tokens, through its experts; return ``[..., H]``.

        Raises:
            ShapeError: the last dimension is not H; without autocast, the dtype is neither that of the experts nor a
                narrow one for float32 experts; the shared module or the experts return other than a row for each row;
                or the router returns no weights. And whatever `ExpertGroup.dispatch` raises.
            ConfigError: parameters came after the layer was made, and `parallelize` has not seen them; they had no
                values when it did; a tool has replaced them; or backward would repeat a part of the experts.
            ArgumentError: experts are spread over ranks, and torch.func or torch.vmap would transform the layer.
        """
        if x.ndim == 0 or x.shape[-1] != self.group.shape.hidden:
            refuse_width(x, self.group.shape.hidden)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        cast, parameters = self._cast(rows)
        shared = None if self.shared is None else self.shared(rows)
        if shared is not None and shared.shape != rows.shape:
            raise ShapeError(
                f"MoELayer: shared: expected [T, H] = {list(rows.shape)} from it, got {list(shared.shape)}; a row for "
                "each row"
            )
        options, routing = self.options, _routing(self.router(rows))
        sent = autograd.dispatch(self.group, cast, routing, options=options.dispatch, quantize=options.quantize)
        self._count(sent.expert_counts)
        assert sent.expert_offsets is not None
        y = self._computed(sent.x, sent.expert_offsets, parameters)
        # A compiler knows no number of rows to compare.
        if not torch.compiler.is_compiling() and y.shape != sent.x.shape:
            raise ShapeError(
                f"MoELayer: experts: expected [n, H] = {list(sent.x.shape)} from them, got {list(y.shape)}; a row for "
                "each row"
            )
        assert sent.topk_weights is not None
        y = (y * sent.topk_weights.unsqueeze(1).to(y.dtype)).contiguous()
        bias = None if shared is None else shared.to(y.dtype).contiguous()
        out = autograd.combine(self.group, y, sent.plan, bias=bias).x
        # No view if it can be helped: schedules of pipelines detach the results of a stage in place.
        return out if x.ndim == 2 else out.reshape(x.shape)

    def _computed(self, rows: Tensor, offsets: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return what the experts make of their rows."""
        place = place_inside(self.experts)
        names = [place + name for name in parameters]

        def compute(rows: Tensor, offsets: Tensor, *values: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(
                self.experts, dict(zip(names, values, strict=True)), (rows, offsets)
            )
            if not torch.compiler.is_compiling() and found.grad_fn is not None:
                self._check_graph(found, rows, values)
            return found

        if not self.options.checkpoint_experts:
            return compute(rows, offsets, *parameters.values())
        again: Tensor = checkpoint(compute, rows, offsets, *parameters.values(), use_reentrant=False)
        return again

    def _check_graph(self, found: Tensor, rows: Tensor, values: tuple[Tensor, ...]) -> None:
        """Raise ConfigError if backward would repeat a part of the experts.

        It takes time, so it is done only when what the experts repeat may have changed, and in each forward where
        experts have replicas, since nothing else would notice there.
        """
        assert found.grad_fn is not None
        state = id(self.experts), self.experts.training, found.grad_fn.name()
        placed = self._placed
        if (placed is not None and placed.is_redundant) or self._checked != state:
            check_graph(found, rows, values)
            self._checked = state

    def _cast(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rows, and this rank's part of the experts' parameters, as they compute: under autocast, cast."""
        num_ranks = self.group.num_ranks
        parts, placed = self._local_experts(), self._placed
        # A placement that nobody asks for can change without compiling again.
        if torch.is_grad_enabled() and placed is not None and placed.is_redundant:
            parts = share_gradients(self.group, placed._current(), parts)
        parts = {name: averaged_gradient(part, num_ranks, self._same_experts) for name, part in parts.items()}
        dtypes = {part.dtype for part in parts.values()} & {*NARROW, torch.float32, torch.float64}
        narrow = autocast_dtype(rows.device.type)
        if narrow is None and rows.dtype in NARROW and torch.float32 in dtypes:
            narrow = rows.dtype
        if narrow is not None:
            wide = {*NARROW, torch.float32} - {narrow}
            rows = rows.to(narrow) if rows.dtype in wide else rows
            parts = {name: part.to(narrow) if part.dtype in wide else part for name, part in parts.items()}
            dtypes = {narrow if dtype in wide else dtype for dtype in dtypes}
        if dtypes and rows.dtype not in dtypes:
            expected = " or ".join(sorted(map(str, dtypes)))
            remedy = f"call .to({expected.split()[0]})"
            raise ShapeError(f"MoELayer: x: expected {expected} like the experts, got {rows.dtype}; {remedy}")
        return rows, parts

    def _count(self, expert_counts: Tensor) -> None:
        self.expert_counts = expert_counts
        # No buffer: DistributedDataParallel would give every rank that of rank 0.
        if self.training and self._has_bias and not recomputing():
            placed = self._placed
            if placed is not None:
                self._count_by(placed._current())
            elif self._load_by is not None:
                self._count_by(None)
            self._load = expert_counts.long() if self._load is None else self._load + expert_counts

    @not_compiled  # compiled code does not see that one placement is another
    def _count_by(self, placement: Placement | None) -> None:
        """Let what is counted from now on be the load of this placement; None: of experts in their order."""
        if placement is not self._load_by:
            self._put_load_aside()
            self._load_by = placement

    def _put_load_aside(self) -> None:
        """Keep the load that was counted by another placement than that of now, with the experts that had it."""
        if self._load is not None:
            self._earlier.append((self._held(self._load_by), self._load))
            self._load = None

    @property
    def _placed(self) -> PlacedRouter | None:
        """The router, if it is a `PlacedRouter`."""
        router = unwrapped(self.router)
        return router if isinstance(router, PlacedRouter) else None

    @property
    def _choice(self) -> Callable[[Tensor], Routing]:
        """The router that chooses logical experts: `router`, or what a `PlacedRouter` wraps."""
        placed = self._placed
        choice: Callable[[Tensor], Routing] = unwrapped(self.router if placed is None else placed.router)
        return choice

    @property
    def _has_bias(self) -> bool:
        """Whether `_choice` is a `Router` with a bias, for `update_biases`."""
        choice = self._choice
        return isinstance(choice, Router) and choice.bias is not None

    def _held(self, placement: Placement | None) -> list[int]:
        first = self.group.rank * self.group.num_local_experts
        slots = list(range(first, first + self.group.num_local_experts))
        return slots if placement is None else placement.physical_to_logical[slots].tolist()

    def _take_loads(self) -> list[tuple[list[int], Tensor]]:
        """Return and forget, for `update_biases`: logical experts of this rank, and ``[L]`` int64, their rows.

        One pair for each placement since the last call.
        """
        self._put_load_aside()
        loads, self._earlier = self._earlier, []
        return loads

    def reset_parameters(self) -> None:
        """Initialise the parameters again from the seeds, in place: the layer as it was made.

        Contract: local. Parameters on the meta device stay without values. Experts and routers of other classes than
        those of `tokenferry.nn` are left alone.
        """
        self._initialise_experts()
        router = unwrapped(self.router)
        if isinstance(router, Router | PlacedRouter):
            router.reset_parameters()

    def _initialise_experts(self) -> None:
        experts, placed = unwrapped(self.experts), self._placed
        if not isinstance(experts, SeededExperts):
            return
        experts.numbers = self._held(None if placed is None else placed._current())  # so that replicas are equal
        experts.reset_parameters()

    def _place_experts(self, mesh: DeviceMesh, known: dict[nn.Parameter, nn.Parameter] | None = None) -> None:
        """Replace the parameters of the experts by DTensors over this mesh, whose ranks are those of the group. Local.

        For `parallelize`, which checks the ranks; ``known``: as `shard_parameters` takes it.
        """
        shard_parameters(self.experts, mesh, known)
        for part in self.experts.modules():  # of which each can be loaded by itself
            hooks = part._load_state_dict_pre_hooks.values()  # a copy of a module has them as well
            if all(getattr(hook, "hook", hook) is not _refuse_other_experts for hook in hooks):
                part.register_load_state_dict_pre_hook(_refuse_other_experts)  # type: ignore[no-untyped-call]
        self._sharded = True

    def _local_experts(self) -> dict[str, Tensor]:
        """Return what this rank holds of the parameters of the experts."""
        check_wrappers(self.experts)
        if self._unequal and torch.is_grad_enabled():
            refuse_unequal(self._unequal)
        weights: dict[str, Any] = dict(unwrapped(self.experts).named_parameters())  # some wrappers change the names
        if not self._sharded:
            return weights
        if not torch.compiler.is_compiling():
            check_transforms(weights.values())
            if not weights:
                refuse_replaced(self.experts)
        late = not_sharded(weights)
        if late:
            refuse_late(late[0], weights[late[0]])
        return {name: trained_part(weight) for name, weight in weights.items()}

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which each rank of the group holds its own part: do not reduce their gradients.

        Of a group of one rank that holds if no other rank trains; else they are parameters like others.
        """
        return list(self.experts.parameters())

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which every rank has a copy: average their gradients over the ranks.

        Experts of which each rank of the group holds its own part are left out, also of a `MoELayer` inside of this
        one, such as a shared module. Those of a group of one rank are copies like others if other ranks train.
        """
        layers = [module for module in self.modules() if isinstance(module, MoELayer) and module.group.num_ranks > 1]
        spread = {parameter for layer in layers for parameter in layer.expert_parameters()}
        return [parameter for parameter in self.parameters() if parameter not in spread]


def _refuse_other_experts(experts: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Raise ConfigError for experts that are not those of this rank.

    Of plain tensors a sharded layer cannot take its part. And `torch.save` on one rank saves the part of that rank,
    which `torch.load` on another returns as a DTensor of the same mesh, at the place of the first.
    """
    weights: Iterable[tuple[str, Any]] = experts.named_parameters()
    for name, weight in weights:
        given, what = state.get(f"{prefix}{name}"), f"MoELayer: load_state_dict: {prefix}{name}"
        if not isinstance(given, Tensor) or not hasattr(weight, "to_local"):
            continue
        if not hasattr(given, "to_local"):
            raise ConfigError(
                f"{what} is a plain tensor, and this layer holds a part of it, as a DTensor; "
                "use torch.distributed.checkpoint.state_dict.set_model_state_dict with "
                "StateDictOptions(full_state_dict=True)"
            )
        (there, theirs), (here, ours) = _place(given), _place(weight)
        if (there, theirs) != (here, ours):
            raise ConfigError(
                f"{what} holds the experts of the rank at {there} of the ranks {theirs}, and this one is at {here} of "
                f"{ours}: torch.save keeps what one rank has; save and load with torch.distributed.checkpoint, which "
                "keeps all experts"
            )


def _place(weight: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401 - a DTensor
    """Return where in a mesh this part of a tensor belongs, and the ranks of the mesh, whose name does not matter."""
    mesh = weight.device_mesh
    return list(mesh.get_coordinate() or ()), mesh.mesh.flatten().tolist()


def _routing(found: object) -> Routing:
    """Return what a router has returned, checked, its tensors contiguous."""
    if not isinstance(found, Routing) or found.topk_weights is None:
        what = "one without topk_weights" if isinstance(found, Routing) else type(found).__name__
        raise ShapeError(f"MoELayer: router: expected a tokenferry.Routing with topk_weights from it, got {what}")
    if found.topk_idx.is_contiguous() and found.topk_weights.is_contiguous():
        return found
    return Routing(found.topk_idx.contiguous(), found.topk_weights.contiguous())


def _experts(
    group: ExpertGroup, ffn_hidden: int | None, experts: nn.Module | None, seed: int, dtype: torch.dtype | None
) -> nn.Module:
    """Return the experts of a layer, checked."""
    if (ffn_hidden is None) == (experts is None):
        raise ConfigError("MoELayer: experts: expected either ffn_hidden or a module of experts; pass one of the two")
    if experts is None:
        assert ffn_hidden is not None
        return SwiGLUExperts(group, ffn_hidden, seed=seed, dtype=dtype)
    if dtype is not None:
        raise ConfigError(
            f"MoELayer: dtype={dtype} is that of experts that the layer makes; cast yours: experts.to({dtype})"
        )
    check_experts(group, experts)
    return experts


def _check_router(group: ExpertGroup, router: Callable[[Tensor], Routing]) -> None:
    """Raise ConfigError if a `Router` has other sizes, or may choose experts on more nodes, than the group allows."""
    shape, outer = group.shape, unwrapped(router)
    chooser = unwrapped(outer.router) if isinstance(outer, PlacedRouter) else outer
    if not isinstance(chooser, Router):
        return
    wanted, whose = shape.num_experts, "the group"
    if isinstance(outer, PlacedRouter):
        wanted, whose = outer._current().num_experts, "the placement"
    num_experts, hidden = chooser.weight.shape
    if (num_experts, hidden, chooser.top_k) != (wanted, shape.hidden, shape.top_k):
        raise ConfigError(
            f"MoELayer: router: it has num_experts={num_experts}, hidden={hidden} and top_k={chooser.top_k}; expected "
            f"{wanted}, as {whose} has, {shape.hidden} and {shape.top_k}"
        )
    if shape.max_nodes is None or chooser is not outer:
        return
    limit = GroupLimit(1, 1) if chooser.group_limit is None else chooser.group_limit
    nodes = group.topology.nodes
    chosen = most_nodes(nodes, shape.num_experts, chooser.top_k, limit.num_groups, limit.top_groups)
    if chosen > shape.max_nodes:
        raise ConfigError(
            f"MoELayer: router: with group_limit={chooser.group_limit} it may choose experts on {chosen} of "
            f"{len(nodes)} nodes, and the group has max_nodes={shape.max_nodes}; let it use fewer groups, or make the "
            f"group with MoeShape(max_nodes={chosen})"
        )
