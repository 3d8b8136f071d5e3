"""The TOKENFERRY_* environment variables, those of others that mean something here, and one of torchrun.

No other module of the package reads os.environ. Only rank processes write it, with `play_node` and `say_local_rank`.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenferry.errors import ConfigError

_log = logging.getLogger("tokenferry")
_warned: set[str] = set()
"""The unknown names that a program has been warned of."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: its name, default, meaning and parser."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], Any]


MAX_TIMEOUT_S = 1_000_000
"""The longest timeout: functions of the operating system take no more than about two of them."""


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= MAX_TIMEOUT_S:
            return float(text)
    raise ValueError(f"expected a number of seconds above 0, at most {MAX_TIMEOUT_S}, such as 100")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            near = difflib.get_close_matches(text.lower(), choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"expected one of {', '.join(choices)}{hint}")
        return text

    return parse


def _switch(text: str) -> bool:
    return _one_of("on", "off")(text) == "on"


def _whole(what: str, example: str) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if text in ("", "auto"):
            return None
        with contextlib.suppress(ValueError):
            if int(text) >= 1:
                return int(text)
        raise ValueError(f"expected auto, or a whole number of {what} above 0, such as {example}")

    return parse


def _arch(text: str) -> str | None:
    if text in ("", "auto"):
        return None
    if not re.fullmatch(r"(sm|compute)_\d{2,3}a?", text):
        raise ValueError("expected auto, sm_XY for machine code or compute_XY for PTX, such as sm_90a or compute_80")
    return text


def _folder(text: str) -> str:
    if not text:
        raise ValueError("expected a folder")
    return os.path.abspath(os.path.expanduser(text))


VARIABLES = (
    Variable(
        "TOKENFERRY_ARCH",
        "auto",
        "architecture for which kernels are compiled, such as sm_90a, or compute_80 to try the code for older GPUs on "
        "a newer one; auto: that of the GPU",
        _arch,
    ),
    Variable(
        "TOKENFERRY_AS_DEEP_EP",
        "0",
        "1, so that `import deep_ep` finds tokenferry in vLLM and SGLang, by a plug-in that they load; or 0",
        lambda text: _one_of("0", "1")(text) == "1",
    ),
    Variable(
        "TOKENFERRY_BACKEND",
        "auto",
        "backend of groups made with backend='auto': auto, cpu or cuda",
        _one_of("auto", "cpu", "cuda"),
    ),
    Variable("TOKENFERRY_CACHE_DIR", "~/.cache/tokenferry", "folder of compiled kernels", _folder),
    Variable(
        "TOKENFERRY_FAST_PATH",
        "on",
        "on; or off, so that every call on CUDA goes through all checks: slower for the host, with the same results",
        _switch,
    ),
    Variable(
        "TOKENFERRY_HEAP_MB",
        "auto",
        "MiB of GPU memory per group for rows that peers write or read; auto: from the shape",
        _whole("MiB", "2048"),
    ),
    Variable(
        "TOKENFERRY_LOG",
        "auto",
        "least level of messages that are shown: debug, info, warning, error or off; auto: as the program sets the "
        "logger 'tokenferry', by default warning",
        _one_of("auto", "debug", "info", "warning", "error", "off"),
    ),
    Variable(
        "TOKENFERRY_NETWORK",
        "nccl",
        "what carries decode calls between nodes in groups on GPUs made with transport='auto': nccl or nvshmem",
        _one_of("nccl", "nvshmem"),
    ),
    Variable(
        "TOKENFERRY_RANKS_PER_NODE",
        "auto",
        "number of consecutive ranks that form a node; auto: the ranks of a host do",
        _whole("ranks", "8"),
    ),
    Variable(
        "TOKENFERRY_TIMEOUT_S",
        "100",
        "seconds that any wait for a peer may take, unless a group has its own timeout_s",
        _seconds,
    ),
    Variable(
        "TOKENFERRY_TRANSPORT",
        "auto",
        "transport of CPU groups made with transport='auto': auto, shared_memory (one host), or process_group "
        "(torch.distributed)",
        _one_of("auto", "shared_memory", "process_group"),
    ),
)

_BY_FIELD = {variable.name.removeprefix("TOKENFERRY_").lower(): variable for variable in VARIABLES}


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed values, one field for each variable."""

    arch: str | None
    as_deep_ep: bool
    backend: str
    cache_dir: str
    fast_path: bool
    heap_mb: int | None
    log: str
    network: str
    ranks_per_node: int | None
    timeout_s: float
    transport: str


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Parse the TOKENFERRY_* variables; local. Side effects: TOKENFERRY_LOG, and one warning of each unknown name.

    Raises:
        ConfigError: a value cannot be parsed; names the variable, the value and the expectation.
    """
    environ = os.environ if environ is None else environ
    known = {v.name: v for v in VARIABLES}
    _set_log_level(_parsed(known["TOKENFERRY_LOG"], environ.get("TOKENFERRY_LOG", "auto")))
    for name, near in unknown(environ).items():
        if name not in _warned:
            _warned.add(name)
            _log.warning("environment: %s is not a variable of tokenferry; did you mean %s?", name, near)
    values = {
        name: _parsed(variable, environ.get(variable.name, variable.default)) for name, variable in _BY_FIELD.items()
    }
    assert set(values) == {f.name for f in fields(Settings)}
    return Settings(**values)


def unknown(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the names that begin like variables of tokenferry and are none, each with the nearest that is one. Local.

    Args:
        environ: The environment; None: that of this process.
    """
    known = [variable.name for variable in VARIABLES]
    names = [
        name
        for name in (os.environ if environ is None else environ)
        if name.startswith("TOKENFERRY_") and name not in known
    ]
    return {name: difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0] for name in names}


def _set_log_level(level: str) -> None:
    """Set the level of the logger; if nothing would show its messages, show them on standard error."""
    if level == "auto":
        return
    _log.setLevel(logging.CRITICAL + 1 if level == "off" else level.upper())
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _log.addHandler(handler)


def read_one(name: str) -> Any:  # noqa: ANN401 - the value of any variable
    """Parse one variable, by its name in `Settings`, where calls ask for it; local. See `read`.

    Raises:
        ConfigError: the value cannot be parsed.
    """
    variable = _BY_FIELD[name]
    return _parsed(variable, os.environ.get(variable.name, variable.default))


def _parsed(variable: Variable, text: str) -> Any:  # noqa: ANN401 - the value of any variable
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"{variable.name}={text!r}: {error}. What it means: {variable.meaning}") from None


def allowed_plugins(client: str, environ: Mapping[str, str] | None = None) -> tuple[str, ...] | None:
    """Return the names in VLLM_PLUGINS or SGLANG_PLUGINS, the only plug-ins that a client loads; None: all. Local."""
    text = (os.environ if environ is None else environ).get(f"{client.upper()}_PLUGINS")
    if text is None or (client == "sglang" and not text):  # an empty list means none to vLLM, and all to SGLang
        return None
    return tuple(name.strip() for name in text.split(","))


DEEP_EP_NETWORK = {
    "DEEP_EP_DEVICE_TO_HCA_MAPPING": "NCCL_IB_HCA",
    "EP_OVERRIDE_RDMA_SL": "NCCL_IB_SL",
    "NVSHMEM_HCA_LIST": "NCCL_IB_HCA",
    "NVSHMEM_HCA_PE_MAPPING": "NCCL_IB_HCA",
    "NVSHMEM_HCA_PREFIX": "NCCL_IB_HCA",
    "NVSHMEM_IB_GID_INDEX": "NCCL_IB_GID_INDEX",
    "NVSHMEM_IB_SL": "NCCL_IB_SL",
    "NVSHMEM_IB_TRAFFIC_CLASS": "NCCL_IB_TC",
}
"""Variables that choose what of a network the traffic of DeepEP uses, and NCCL's variable for the same."""

QUEUE_PAIRS = "NVSHMEM_IBGDA_NUM_RC_PER_PE"
"""NVSHMEM's variable for queue pairs between two GPUs; DeepEP sets it to ``num_qps_per_rank``."""

NO_P2P = "NVSHMEM_DISABLE_P2P"
"""NVSHMEM's variable for not mapping memory of other GPUs; DeepEP sets it if low-latency calls may not use NVLink."""


@dataclass(frozen=True, slots=True)
class DeepEpSettings:
    """What DeepEP's variables ask of a buffer.

    Attributes:
        buffer_debug: EP_BUFFER_DEBUG: say what each of them uses.
        cache_dir: EP_JIT_CACHE_DIR, unless TOKENFERRY_CACHE_DIR is set; None: the default.
        network: Those of `DEEP_EP_NETWORK` that are set.
        set_for_nccl: Those of `DEEP_EP_NETWORK` whose variable for NCCL is set.
        nccl_service_level: NCCL_IB_SL, as it is written; None: not set.
        queue_pairs: `QUEUE_PAIRS`, as it is; empty: it is not set.
        no_p2p: Whether `NO_P2P` is set to something else than 0, no or false.
    """

    buffer_debug: bool
    cache_dir: str | None
    network: tuple[str, ...]
    set_for_nccl: frozenset[str]
    nccl_service_level: str | None
    queue_pairs: str
    no_p2p: bool


def read_deep_ep(environ: Mapping[str, str] | None = None) -> DeepEpSettings:
    """Parse DeepEP's variables; local.

    Raises:
        ConfigError: a value cannot be parsed; names the variable, the value and the expectation.
    """
    environ = os.environ if environ is None else environ
    debug = environ.get("EP_BUFFER_DEBUG", "0")
    if debug not in ("0", "1"):
        raise ConfigError(f"EP_BUFFER_DEBUG={debug!r}: expected 0 or 1; with 1 each buffer says what it uses")
    folder = None if "TOKENFERRY_CACHE_DIR" in environ else environ.get("EP_JIT_CACHE_DIR") or None
    return DeepEpSettings(
        debug == "1",
        None if folder is None else _folder(folder),
        tuple(filter(environ.get, DEEP_EP_NETWORK)),
        frozenset(name for name, of_nccl in DEEP_EP_NETWORK.items() if environ.get(of_nccl)),
        environ.get("NCCL_IB_SL") or None,
        environ.get(QUEUE_PAIRS, ""),
        environ.get(NO_P2P, "0")[:1].lower() not in ("", "0", "n", "f"),
    )


def world_size(environ: Mapping[str, str] | None = None) -> int:
    """Return WORLD_SIZE, the number of processes that torchrun started together; 1 if it is no number. Local."""
    text = (os.environ if environ is None else environ).get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def play_node(node: int, ranks_per_node: int) -> None:
    """Let this process, one of many on this host, pass for a rank of a host of its own; before it first uses NCCL.

    Groups made here have these nodes. NCCL joins nodes by TCP on the loopback, whatever network cards there are, and
    lets ranks of different nodes share a GPU, which ranks of one host may not.

    Args:
        node: The node of this rank.
        ranks_per_node: Number of consecutive ranks that form a node.
    """
    os.environ["TOKENFERRY_RANKS_PER_NODE"] = str(ranks_per_node)
    os.environ["NCCL_HOSTID"] = f"node{node}"
    os.environ["NCCL_NET"] = "Socket"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_NVLS_ENABLE"] = "0"


def say_local_rank(local_rank: int) -> None:
    """Set LOCAL_RANK, as torchrun does, for programs that choose their GPU by it. For rank processes only.

    Args:
        local_rank: The index of this rank's GPU; on CPUs the rank on this host.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)
