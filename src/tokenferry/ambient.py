"""Modes of torch that a program may have switched on around a call, and that would make the call slower or differ.

A torch function mode, such as the default device, runs Python code for every use of a tensor, even of its shape. Our
calls name the device and the dtype of every tensor that they make, so none of that code changes what they do.

`torch.compile` traces what a program calls. Our calls send messages, keep count of them and follow addresses of memory,
which no graph can hold: it breaks its graph there, and the call runs as it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_num_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_WithoutFunctionModes = torch._C.DisableTorchFunction

_frames: Any = torch._C._dynamo.eval_frame
_WHY = "it runs outside of graphs; a graph can hold the calls of tokenferry.autograd"


def not_compiled(call: _Function) -> _Function:
    """Make `torch.compile` break its graph at a function, and run it eagerly with all that it calls.

    As `torch.compiler.disable` does, but that imports the compiler, which takes a second, and wraps the function. These
    are marks, which cost a call nothing: one of the function, for traces of its callers, and one of its code, for
    the interpreter, where a graph has been broken.
    """
    function: Any = call
    # A wrapper of torch shares its code object with the program's wrappers, which would not be compiled either.
    assert function.__globals__["__name__"].startswith("tokenferry."), f"mark what {function} wraps"
    function._torchdynamo_disable, function._torchdynamo_disable_msg = True, _WHY
    if hasattr(_frames, "set_code_exec_strategy"):  # private, and may go: then only traces of callers see a mark
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, skip))
    return call


def methods_not_compiled(cls: type[_T]) -> type[_T]:
    """Mark all methods of a class, but neither properties nor what it inherits, as `not_compiled`."""
    for member in vars(cls).values():
        function = getattr(member, "__func__", member)
        if isinstance(function, FunctionType):
            not_compiled(function)
    return cls


def members_not_compiled(cls: type[_T]) -> type[_T]:
    """Mark all methods and properties of a class, but not what it inherits, as `not_compiled`."""
    for member in vars(cls).values():
        if isinstance(member, property) and member.fget is not None:
            not_compiled(member.fget)
    return methods_not_compiled(cls)


def without_function_modes(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a call outside of torch function modes and of compiled graphs."""

    @not_compiled
    @wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not _num_function_modes():
            return call(*args, **kwargs)
        with _WithoutFunctionModes():
            return call(*args, **kwargs)

    return run


def reports_interrupts(call: _Function) -> _Function:
    """Run a method of a group as `without_function_modes` does, and report to the group what is raised in it.

    That includes an interrupt after the work of the call is done, in any function on the way back to the caller. The
    group has two members for this: ``_interruptible``, which has `latest_call`, and ``_cut_off``.
    """
    name = call.__name__

    @not_compiled
    @wraps(call)
    def run(group: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of the call
        before = group._interruptible.latest_call
        try:
            if not _num_function_modes():
                return call(group, *args, **kwargs)
            with _WithoutFunctionModes():
                return call(group, *args, **kwargs)
        except BaseException as error:
            group._cut_off(name, before, error)
            raise

    return cast("_Function", run)


def without_grad(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a call as `without_function_modes` does, and without gradients. `torch.no_grad` takes longer to enter."""
    in_function_modes = without_function_modes(torch.no_grad()(call))

    @not_compiled
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
