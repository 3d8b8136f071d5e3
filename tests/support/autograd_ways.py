"""The two ways of `tokenferry.autograd`: functions over plain calls, and operators."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

from tokenferry import autograd
from tokenferry.autograd import eager


def plain_torch() -> AbstractContextManager[Any]:
    """Nothing traces."""
    return nullcontext()


def always_operators() -> AbstractContextManager[Any]:
    """Call operators though nothing traces."""
    return mock.patch.object(autograd, "is_traced", return_value=True)


@contextmanager
def never_operators() -> Iterator[None]:
    """Do as if nothing traced, so that a mode can count what torch runs."""
    with (
        mock.patch.object(autograd, "is_traced", return_value=False),
        mock.patch.object(eager, "is_traced", return_value=False),
    ):
        yield
