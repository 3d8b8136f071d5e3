"""The bytes that a rank gives to the network in a call, counted where they leave: rails, or the process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tokenferry.api import ExpertGroup


def sent_across(group: ExpertGroup, call: Callable[[], object]) -> int:
    """Make a call, and return the bytes that this rank has sent to other nodes in it. Collective.

    All of them: rows, ids, weights, counts and headers. Not those of the network itself, nor what is put over NVSHMEM.
    """
    sizes: list[int] = []
    # The API has no method for this.
    backend: Any = group._backend
    counted = _counted_rails if group.backend == "cuda" else _counted_group
    with counted(backend, sizes):
        call()
    return sum(sizes)


@contextmanager
def _counted_rails(backend: Any, sizes: list[int]) -> Iterator[None]:  # noqa: ANN401 - private
    """Note the bytes of all parts that are given to `Rails.exchange`."""
    rails = backend._rails
    exchange = rails.exchange

    def counted(call: object, parts: Any, kept: object, compare: object = None) -> object:  # noqa: ANN401 - plain tuples
        sizes.extend(num_bytes for _, num_bytes, _, is_sent in parts if is_sent)
        return exchange(call, parts, kept, compare)

    rails.exchange = counted
    try:
        yield
    finally:
        del rails.exchange  # the method of its class again


class _CountedGroup:
    """A process group that notes the bytes that it sends."""

    def __init__(self, of: Any, sizes: list[int]) -> None:  # noqa: ANN401 - any process group
        self._of, self._sizes = of, sizes

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever it has
        return getattr(self._of, name)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> object:
        """Send, and note."""
        self._sizes.extend(tensor.nbytes for tensor in tensors)
        return self._of.send(tensors, peer, tag)


@contextmanager
def _counted_group(backend: Any, sizes: list[int]) -> Iterator[None]:  # noqa: ANN401 - private
    """Note the bytes of all messages that the process group sends: inside a node there is shared memory."""
    transport = backend._exchange.transport
    far = getattr(transport, "_far", transport)
    real = far._group
    far._group = _CountedGroup(real, sizes)
    try:
        yield
    finally:
        far._group = real
