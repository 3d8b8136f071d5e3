"""Symbolic checks of tensors, with messages for wrong shapes, dtypes, devices and strides.

A `Checks` belongs to one call. It takes the value of each letter (T, K, H ...) from the group and from the arguments
checked so far, so that an error can name the source of the size that an argument contradicts.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from tokenferry.errors import ArgumentError, CapacityError, RoutingError, ShapeError

ROW_BYTES_MULTIPLE = 16
"""Every backend requires rows to be a multiple of this many bytes, so that code that runs on one runs on all."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_JVP = torch._C._functorch.TransformType.Jvp
_functorch: Any = torch._C._functorch
_unpack_dual: Any = forward_ad.unpack_dual
_IS_PLAIN = torch._C._disabled_torch_dispatch_impl
"""``__torch_dispatch__`` of tensors with memory of their own, subclasses such as Parameter among them."""
_INSTEAD_OF_WRAPPERS = {
    "DTensor": "call .to_local() or .full_tensor()",
    "MaskedTensor": "call .to_tensor(0)",
    "AsyncCollectiveTensor": "call .wait()",
}
_KNOW_OPERATORS = {"FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor"}


@dataclass(frozen=True, slots=True)
class NodeLimit:
    """The most nodes that the experts of a token may lie on.

    Attributes:
        max_nodes: The limit.
        node_of_rank: ``[R]``: the node of each rank.
        num_local: Experts on each rank, L.
    """

    max_nodes: int
    node_of_rank: tuple[int, ...]
    num_local: int


@dataclass(frozen=True, slots=True)
class _Size:
    """The value of a letter and its source: the name of an argument, ``"the group"`` or the like."""

    value: int
    source: str


class Checks:
    """The checks of the arguments of one call; every method raises before anything is sent.

    Args:
        call: Name of the public call, for messages.
        device: Device on which every tensor has to be.
    """

    def __init__(self, call: str, device: torch.device) -> None:
        self.call = call
        self.device = device
        self._sizes: dict[str, _Size] = {}

    def given(self, source: str, **sizes: int) -> Checks:
        """Set letters before the arguments are checked, e.g. ``given("the group", H=7168)``, and return this object.

        Args:
            source: The origin of the sizes, for messages.
            **sizes: The value of each letter.
        """
        self._sizes.update((letter, _Size(size, source)) for letter, size in sizes.items())
        return self

    def tensor(
        self,
        name: str,
        value: object,
        dims: str,
        dtypes: Sequence[torch.dtype] | None,
        *,
        contiguous: bool = True,
        or_else: str = "",
    ) -> Tensor:
        """Check that ``value`` is a tensor of shape ``dims``, e.g. ``"T H"``; record letters not seen before.

        Args:
            name: Name of the argument.
            value: What was passed for it.
            dims: A letter for each dimension.
            dtypes: Those that it may have; None: any.
            contiguous: Whether it has to be contiguous.
            or_else: What else can be done about another dtype than to cast, for messages.

        Raises:
            ShapeError: names the argument, what was expected and found, what set a size, and the remedy.
        """
        letters = dims.split()
        if isinstance(value, Tensor):
            check_dense(self.call, name, value)
        if (
            not isinstance(value, Tensor)
            or not _same_device(value.device, self.device)
            or (dtypes is not None and value.dtype not in dtypes)
            or value.ndim != len(letters)
        ):
            raise self._wrong_kind(name, value, letters, dtypes, or_else)
        for letter, size in zip(letters, value.shape, strict=True):
            known = self._sizes.get(letter)
            if known is None:
                self._sizes[letter] = _Size(size, name)
            elif known.value != size:
                raise self._wrong_size(name, value, letters, dtypes, letter)
        if contiguous and not value.is_contiguous():
            raise ShapeError(
                f"{self.call}: {name}: must be contiguous, got strides {value.stride()}; call .contiguous()"
            )
        return value

    # Most calls are right: these find the words only for one that is not.

    def _wrong_kind(
        self, name: str, value: object, letters: list[str], dtypes: Sequence[torch.dtype] | None, or_else: str
    ) -> ShapeError:
        if not isinstance(value, Tensor):
            wanted, got = _kind(letters, dtypes), type(value).__name__
            return ShapeError(f"{self.call}: {name}: expected {wanted}, got {got}; pass {_instead_of(value)}")
        head = self._head(name, value, letters, dtypes)
        if not _same_device(value.device, self.device):
            return ShapeError(f"{head}; the group is on {self.device}: call .to('{self.device}')")
        if dtypes is not None and value.dtype not in dtypes:
            return ShapeError(f"{head}; call .to({dtypes[0]}){or_else}")
        return ShapeError(f"{head}; pass {len(letters)} dimensions instead of {value.ndim}")

    def _wrong_size(
        self, name: str, value: Tensor, letters: list[str], dtypes: Sequence[torch.dtype] | None, letter: str
    ) -> ShapeError:
        known, shape = self._sizes[letter], list(zip(letters, value.shape, strict=True))
        want = [self._sizes[other].value if other in self._sizes else size for other, size in shape]
        found = next(size for other, size in shape if other == letter and size != known.value)
        return ShapeError(
            f"{self._head(name, value, letters, dtypes)}; {letter}={known.value} was set by {known.source}, here it is "
            f"{found}: pass shape {want}"
        )

    def _head(self, name: str, value: Tensor, letters: list[str], dtypes: Sequence[torch.dtype] | None) -> str:
        got = f"got {value.dtype} {list(value.shape)} on {value.device}"
        return f"{self.call}: {name}: expected {_kind(letters, dtypes)}, {got}"

    def routing(self, routing: Any, kind: type[Any]) -> None:  # noqa: ANN401 - whatever was passed
        """Check that a routing is of its kind, and that its tensors are not what the other one has to be.

        torch.topk returns values first, and casting these to integers would route every token to expert 0.
        """
        if not isinstance(routing, kind):
            raise wrong_routing(self.call, routing)
        idx, weights = routing.topk_idx, routing.topk_weights
        tensors = isinstance(idx, Tensor) and isinstance(weights, Tensor)
        if tensors and idx.is_floating_point() and not weights.is_floating_point():
            raise ShapeError(
                f"{self.call}: topk_idx is floating point and topk_weights is an integer tensor: were they swapped? "
                "pass Routing(topk_idx, topk_weights); torch.topk returns them the other way round"
            )

    def row_bytes(self, name: str, rows: Tensor) -> None:
        """Check that a row of ``rows`` is a multiple of 16 bytes."""
        row_bytes = rows.shape[-1] * rows.element_size()
        if row_bytes % ROW_BYTES_MULTIPLE:
            raise ShapeError(
                f"{self.call}: {name}: a row of {rows.shape[-1]} x {rows.dtype} is {row_bytes} bytes, expected a "
                f"multiple of {ROW_BYTES_MULTIPLE}; pad the hidden size to {_pad(rows)} elements"
            )

    def max_tokens(self, name: str, num_tokens: int, max_tokens: int) -> None:
        """Check T against M."""
        if num_tokens > max_tokens:
            raise CapacityError(
                f"{self.call}: {name}: T={num_tokens} rows exceed max_tokens={max_tokens}; "
                f"send at most {max_tokens} at once or make the group with MoeShape(max_tokens={num_tokens})"
            )

    def experts(self, name: str, topk_idx: Tensor, num_experts: int) -> None:
        """Check that every index is in [-1, E); the error names the first that is not."""
        check_plain(self.call, name, topk_idx)
        if topk_idx.numel() == 0:
            return
        low, high = torch.aminmax(topk_idx)
        if int(low) >= -1 and int(high) < num_experts:
            return
        token, slot = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()[0].tolist()
        raise RoutingError(
            f"{self.call}: {name}[{token}, {slot}] is {int(topk_idx[token, slot])}, expected an expert in "
            f"[0, {num_experts}), or -1 for an unused slot; the group has num_experts={num_experts}"
        )

    def nodes(self, name: str, topk_idx: Tensor, limit: NodeLimit) -> None:
        """Check that no token goes to too many nodes; the error names the first that does. Indices are in [-1, E)."""
        num_nodes = max(limit.node_of_rank) + 1
        node_of_rank = torch.tensor(limit.node_of_rank, dtype=torch.int64, device=topk_idx.device)
        # An unused slot goes to a column of its own, which does not count.
        node = torch.where(topk_idx >= 0, node_of_rank[topk_idx // limit.num_local], num_nodes)
        goes_to = torch.zeros(topk_idx.shape[0], num_nodes + 1, dtype=torch.bool, device=topk_idx.device)
        goes_to = goes_to.scatter_(1, node, True)[:, :num_nodes]
        too_far = (goes_to.sum(1) > limit.max_nodes).nonzero()
        if too_far.numel() == 0:
            return
        token = int(too_far[0])
        nodes = goes_to[token].nonzero()[:, 0].tolist()
        raise RoutingError(
            f"{self.call}: {name}[{token}] has experts on {len(nodes)} nodes ({', '.join(map(str, nodes))}), expected "
            f"at most {limit.max_nodes}; the group has max_nodes={limit.max_nodes}: limit the groups of the router, or "
            f"make the group with MoeShape(max_nodes={len(nodes)})"
        )

    def no_grad(self, **arguments: object) -> None:
        """Reject arguments whose gradient would be lost silently."""
        if not torch.is_grad_enabled():
            return
        for name, value in arguments.items():
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
                raise ArgumentError(
                    f"{self.call}: {name}: requires grad, and this call is not differentiable; use "
                    f"tokenferry.autograd, torch.no_grad() or {name}.detach()"
                )


def wrong_routing(call: str, value: object) -> ArgumentError:
    """Return the error about an argument ``routing`` that is no `Routing`."""
    remedy = "pass Routing(topk_idx, topk_weights)"
    return ArgumentError(f"{call}: routing: expected a tokenferry.Routing, got {type(value).__name__}; {remedy}")


def wrong_operand(call: str, name: str, value: object) -> ShapeError:
    """Return the error about an argument that is no tensor, where any would do."""
    got = type(value).__name__
    return ShapeError(f"{call}: {name}: expected a torch.Tensor, got {got}; pass {_instead_of(value)}")


def check_flags(call: str, **flags: object) -> None:
    """Raise ArgumentError unless each flag is True or False, or a number or None, which count as one of them.

    A tensor may be neither, and what has no truth value of its own, such as a string or an event, is always true.
    """
    for name, value in flags.items():
        if isinstance(value, Tensor) or not hasattr(type(value), "__bool__"):
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(f"{call}: {name}: expected True or False, got {got}")


def check_dense(call: str, name: str, tensor: Tensor) -> None:
    """Raise ShapeError unless a tensor has a shape, and numbers that lie at its strides."""
    if tensor.is_nested:
        found, remedy = "a nested one", "pass rows of one length, such as those of .to_padded_tensor(0.0)"
    elif tensor.layout is not torch.strided:
        found, remedy = str(tensor.layout), "call .to_dense()"
    elif tensor.is_quantized:
        found, remedy = str(tensor.dtype), "call .int_repr(), or .dequantize()"
    elif type(tensor).__torch_dispatch__ is not _IS_PLAIN:
        raise _wrapper_error(call, name, tensor)
    else:
        return
    raise ShapeError(f"{call}: {name}: expected a dense tensor, got {found}; {remedy}")


def check_operand(call: str, name: str, value: object) -> None:
    """Raise for a tensor for which the operators of `tokenferry.autograd` cannot do what they are asked for.

    Tensors that torch itself wraps, to trace or to wait for them, reach an operator as they are meant to.

    Raises:
        ShapeError: a wrapper has its values.
        ArgumentError: it stands for many, has a tangent, or is to be differentiated by torch.func.
    """
    if not isinstance(value, Tensor):
        return
    if stands_for_others(value) and type(value).__name__ not in _KNOW_OPERATORS:
        check_dense(call, name, value)
    check_not_transformed(call, name, value)
    if _functorch.is_gradtrackingtensor(value) and value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{call}: {name}: is to be differentiated by torch.func, which cannot follow calls; use "
            "torch.autograd.grad or .backward()"
        )


def check_not_transformed(call: str, name: str, tensor: Tensor) -> None:
    """Raise ArgumentError for a tensor that stands for many, as in torch.vmap, or has a tangent.

    Operators are called once for all, and would lose a tangent.
    """
    levels: set[int] = set()
    inner, is_batched = tensor, _functorch.is_legacy_batchedtensor(tensor)
    while _functorch.is_functorch_wrapped_tensor(inner):
        is_batched |= _functorch.is_batchedtensor(inner)
        levels.add(_functorch.maybe_get_level(inner))
        inner = _functorch.get_unwrapped(inner)
    if is_batched:
        raise ArgumentError(
            f"{call}: {name}: stands for several tensors, as of torch.vmap, but a call sends one; make the calls one "
            "after another"
        )
    if forward_ad._current_level < 0:
        return
    if _unpack_dual(tensor).tangent is not None:
        raise _tangent_error(call, name)
    # Inside of a transform that is inside of jvp, a tangent is seen at the level of jvp only.
    is_jvp = (one.level() for one in _functorch.get_interpreter_stack() or () if one.key() == _JVP)
    if len(levels) > 1 and not levels.isdisjoint(is_jvp):
        raise _tangent_error(call, name)


def stands_for_others(tensor: Tensor) -> bool:
    """Return whether the class of a tensor decides what is done in its place: it need not know even ``detach``."""
    return type(tensor).__torch_dispatch__ is not _IS_PLAIN


def _wrapper_error(call: str, name: str, tensor: Tensor) -> ShapeError:
    kind = type(tensor).__name__
    remedy = _INSTEAD_OF_WRAPPERS.get(kind, "pass a plain torch.Tensor with its values")
    return ShapeError(
        f"{call}: {name}: expected a tensor with values in memory, got one of class {kind}, which stands for others; "
        f"{remedy}"
    )


def _tangent_error(call: str, name: str) -> ArgumentError:
    return ArgumentError(
        f"{call}: {name}: has a tangent of forward-mode differentiation, which would be lost: there are gradients "
        "of backward only, in tokenferry.autograd; pass forward_ad.unpack_dual(...).primal"
    )


def check_plain(call: str, name: str, value: object) -> None:
    """Raise for a tensor whose memory does not hold its values, or not all of it: its bytes cannot stand for it.

    Raises:
        ShapeError: its values lie elsewhere.
        ArgumentError: it has a tangent.
    """
    if not isinstance(value, Tensor):
        return
    # Under FakeTensorMode what is made of tensors with values has none.
    is_fake = isinstance(value, FakeTensor) or torch._C._get_dispatch_mode(_FAKE) is not None
    if is_fake or torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise ShapeError(
            f"{call}: {name}: expected a tensor with values in memory, got one of torch.vmap, torch.func or "
            "FakeTensorMode, which stands for others; make the call outside of it"
        )
    check_dense(call, name, value)
    if forward_ad._current_level >= 0 and _unpack_dual(value).tangent is not None:
        raise _tangent_error(call, name)
    if value.is_neg() or value.is_conj():
        raise ShapeError(
            f"{call}: {name}: expected a tensor whose memory holds its values, got one that is negated or "
            "conjugated when it is read; call .resolve_neg() or .resolve_conj()"
        )


def fits(value: object, shape: tuple[int, ...], dtypes: Container[torch.dtype], device: torch.device) -> bool:
    """Return whether `Checks` would certainly accept a contiguous tensor; takes a quarter of a microsecond.

    False only means that `Checks` has to decide: it also accepts the rarer valid cases, and has the messages.
    """
    try:
        return (
            type(value) is Tensor
            and value.shape == shape
            and value.dtype in dtypes
            and value.device == device
            and value.layout is torch.strided
            and value.is_contiguous()
            and not (value.requires_grad and torch.is_grad_enabled())
        )
    except RuntimeError:  # a nested tensor has no shape
        return False


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; ``cuda`` without an index matches any index."""
    return one == other or (one.type == other.type and None in (one.index, other.index))


def _instead_of(value: object) -> str:
    """Return what to pass instead of a value that is no tensor: of the results of calls, the rows that they hold."""
    holds_rows = isinstance(getattr(value, "x", None), Tensor)
    return "the tensor in it, as sent.x of a result sent" if holds_rows else "a torch.Tensor"


def _kind(letters: list[str], dtypes: Sequence[torch.dtype] | None) -> str:
    kinds = " or ".join(str(d) for d in dtypes) if dtypes else "a tensor"
    return f"{kinds} [{', '.join(letters)}]"


def _pad(rows: Tensor) -> int:
    unit = max(ROW_BYTES_MULTIPLE // rows.element_size(), 1)
    return -(-rows.shape[-1] // unit) * unit
