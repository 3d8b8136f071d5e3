"""The checks of `tokenferry doctor` that are about `deep_ep`, and the programs that load tokenferry under this name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from tokenferry import env
from tokenferry.cli.finding import Finding, run_check
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.integrations import deep_ep, versions

CLIENTS = {"vllm": "vLLM", "sglang": "SGLang"}


def findings() -> Iterator[Finding]:
    """Say which `deep_ep` a program gets, and whether vLLM and SGLang get another one."""
    yield run_check("deep_ep", _found, "repair or uninstall that package")
    try:
        active = env.read_one("as_deep_ep")
    except ConfigError:
        return  # another line says what is wrong
    if not active:
        names = " and ".join(CLIENTS.values())
        text = f"not active: with TOKENFERRY_AS_DEEP_EP=1 `import deep_ep` finds tokenferry in {names}"
        yield Finding("plug-ins", True, text)
        return
    for client, name in CLIENTS.items():
        yield run_check(f"plug-in of {name}", lambda client=client: _plug_in(client), "")  # type: ignore[misc]


def _found() -> str:
    found = deep_ep.found()
    remedy = "with PYTHONPATH=$(tokenferry deep-ep-path) it finds tokenferry"
    if found.path is None:
        return f"`import deep_ep` finds nothing; {remedy}"
    if found.ours:
        return f"`import deep_ep` finds tokenferry, in {found.path}"
    owner = found.owner or "a package that no distribution owns"
    return f"`import deep_ep` finds {owner}, in {found.path}; {remedy}"


def _plug_in(client: str) -> str:
    name, group = CLIENTS[client], deep_ep.GROUPS[client]
    if not any(point.name == "tokenferry" for point in entry_points(group=group)):
        raise BackendUnavailable(
            f"TOKENFERRY_AS_DEEP_EP is 1, but this environment has no entry point of tokenferry in {group}; install "
            "tokenferry with pip instead of putting its source on PYTHONPATH"
        )
    allowed = env.allowed_plugins(client)
    if allowed is not None and "tokenferry" not in allowed:
        raise BackendUnavailable(
            f"TOKENFERRY_AS_DEEP_EP is 1, but {client.upper()}_PLUGINS names only {', '.join(allowed)}; add tokenferry"
        )
    doubt = versions.doubt(client)
    if doubt:
        raise BackendUnavailable(f"active, but {doubt}")
    found = versions.installed(client)
    return f"active: `import deep_ep` finds tokenferry in {name}, {found or 'which is not installed'}"
