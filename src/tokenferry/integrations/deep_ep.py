"""The plug-in that makes `import deep_ep` find tokenferry in the processes of vLLM and SGLang.

Both call the plug-ins of their entry points, `for_vllm` and `for_sglang`, at the start of each of their processes. They
do nothing unless TOKENFERRY_AS_DEEP_EP is 1. Then ``deep_ep`` is imported from the folder of ``tokenferry
deep-ep-path``, which comes first on ``sys.path`` from then on: processes that are forked inherit the module, and those
that `multiprocessing` spawns inherit the path.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version

from tokenferry import env
from tokenferry.compat.deep_ep_path import folder
from tokenferry.errors import ConfigError
from tokenferry.integrations.versions import warn_unless_tried

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
"""The entry points of each client."""


def for_vllm() -> None:
    """Activate the plug-in in a process of vLLM, if TOKENFERRY_AS_DEEP_EP is 1. Local.

    Raises:
        ConfigError: TOKENFERRY_AS_DEEP_EP is neither 0 nor 1, or another ``deep_ep`` is already in use.
    """
    _activate("vllm")


def for_sglang() -> None:
    """Activate the plug-in in a process of SGLang, if TOKENFERRY_AS_DEEP_EP is 1. Local.

    Raises:
        SystemExit: as the ConfigError of `for_vllm`. SGLang would log an exception and go on with the other one.
    """
    try:
        _activate("sglang")
    except ConfigError as error:
        raise SystemExit(str(error)) from error


@dataclass(frozen=True, slots=True)
class Found:
    """The ``deep_ep`` that a program gets.

    Attributes:
        path: The file of the package; None if there is none.
        ours: Whether it is tokenferry.
        owner: Name and version of the distribution that installed it; empty if unknown.
    """

    path: str | None
    ours: bool
    owner: str


def found() -> Found:
    """Return the ``deep_ep`` that ``import deep_ep`` finds on ``sys.path``, without importing it. Local."""
    spec = importlib.util.find_spec("deep_ep")
    if spec is None:
        return Found(None, ours=False, owner="")
    path = spec.origin or ", ".join(spec.submodule_search_locations or ())
    if path.startswith(folder() + os.sep):
        return Found(path, ours=True, owner="tokenferry")
    names = packages_distributions().get("deep_ep", [])
    return Found(path, ours="tokenferry-deep-ep" in names, owner=", ".join(f"{name} {version(name)}" for name in names))


def _activate(client: str) -> None:
    if not env.read_one("as_deep_ep"):
        return
    warn_unless_tried(client)
    first = folder()
    if sys.path[:1] != [first]:
        sys.path[:] = [first, *(path for path in sys.path if path != first)]
    import deep_ep

    # By its content, since the distribution of packages/deep_ep is tokenferry in another place.
    if not getattr(getattr(deep_ep, "Buffer", None), "__module__", "").startswith("tokenferry."):
        raise ConfigError(
            f"TOKENFERRY_AS_DEEP_EP=1: {client} imported {deep_ep.__file__} before it called the plug-in of "
            "tokenferry; start it with PYTHONPATH=$(tokenferry deep-ep-path), or uninstall that deep_ep"
        )
