"""The modules inside of torch's wrappers: a router or experts that were compiled, checkpointed or given to a tool."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Under which torch's wrappers keep a module: torch.compile, checkpoint_wrapper and offload_wrapper, and FSDP1."""

_NOT_IN_KEYS = _NAMES[1:]
"""Those that wrappers leave out of the keys of their state dicts."""


def unwrapped(module: Any) -> Any:  # noqa: ANN401 - a module, or a function
    """Return the module inside of torch's wrappers; what is in none, as it is. Local.

    A wrapper computes what the module inside of it does, so that the class of that one says what both are. Call the
    wrapper all the same, so that it has its effect.
    """
    while (name := _name_inside(module)) is not None:
        module = module._modules[name]
    return module


def place_inside(module: Any) -> str:  # noqa: ANN401 - as above
    """Return what is before the name of a parameter of the module inside of torch's wrappers: empty, or with a dot."""
    return "".join(f"{name}." for name in _names_inside(module))


def key_inside(module: Any) -> str:  # noqa: ANN401 - as above
    """Return the same of keys of a state dict."""
    return "".join(f"{name}." for name in _names_inside(module) if name not in _NOT_IN_KEYS)


def _names_inside(module: Any) -> list[str]:  # noqa: ANN401 - as above
    names = []
    while (name := _name_inside(module)) is not None:
        names.append(name)
        module = module._modules[name]
    return names


def _name_inside(module: Any) -> str | None:  # noqa: ANN401 - as above
    """Return the name under which a wrapper keeps the module that it is around; None if this is no wrapper."""
    if not isinstance(module, nn.Module):
        return None
    modules = module._modules
    for name in _NAMES:
        if name in modules:
            return name
    return "module" if isinstance(module, DistributedDataParallel) else None
