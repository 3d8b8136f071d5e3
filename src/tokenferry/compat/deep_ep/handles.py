"""The base of handles, which programs pass on and rarely read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, overload

from tokenferry.ambient import methods_not_compiled
from tokenferry.compat.deep_ep.streams import HoldsTensors


@methods_not_compiled
class HandleBase(Sequence[Any], HoldsTensors):
    """A sequence that reads like DeepEP's tuple, and whose elements are made when they are read.

    Two handles are equal if they are the same, since DeepEP's, which hold tensors, cannot be compared.
    """

    __slots__ = ()
    _NUM_ELEMENTS: ClassVar[int]

    def __len__(self) -> int:
        """Return the number of elements."""
        return self._NUM_ELEMENTS

    @overload
    def __getitem__(self, i: int) -> Any: ...  # noqa: ANN401 - tensors, numbers, None, and a plan

    @overload
    def __getitem__(self, i: slice) -> tuple[Any, ...]: ...

    def __getitem__(self, i: int | slice) -> Any:
        """Return an element, or a tuple of some."""
        places = range(self._NUM_ELEMENTS)[i]
        return self._element(places) if isinstance(places, int) else tuple(self._element(place) for place in places)

    def _element(self, place: int) -> Any:  # noqa: ANN401 - see __getitem__
        """Return the element at ``place``, which is in ``range(len(self))``."""
        raise NotImplementedError
