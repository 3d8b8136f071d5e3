"""Modes of torch that a program may have switched on around a call, and that would make the call slower or differ.

A torch function mode, such as the default device, runs Python code for every use of a tensor, even of its shape. Our
calls name the device and the dtype of every tensor that they make, so none of that code changes what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_num_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_WithoutFunctionModes = torch._C.DisableTorchFunction


def without_function_modes(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a call outside of torch function modes."""

    @wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not _num_function_modes():
            return call(*args, **kwargs)
        with _WithoutFunctionModes():
            return call(*args, **kwargs)

    return run


def without_grad(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a call outside of torch function modes, and as `torch.no_grad` does, which takes longer to enter."""
    in_function_modes = without_function_modes(torch.no_grad()(call))

    @wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if _num_function_modes():
            return in_function_modes(*args, **kwargs)
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return call(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return run
