"""Setup of the CUDA backend: whether these ranks can use it, how large the windows are, and the shared windows."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import tuning
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda.across import nccl, nvshmem
from tokenferry.backends.cuda.across.backend import AcrossBackend, InternodeLinks
from tokenferry.backends.cuda.across.nccl import Communicator, NcclError, new_unique_id
from tokenferry.backends.cuda.across.nccl_channel import NcclChannel, connect
from tokenferry.backends.cuda.across.nccl_rails import NcclRails
from tokenferry.backends.cuda.across.puts import region_sizes
from tokenferry.backends.cuda.backend import CudaBackend
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.peers import Peers, Process
from tokenferry.backends.cuda.plan import too_large, too_many_experts
from tokenferry.backends.cuda.runtime import Runtime, Target, cuda_runtime
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.jit.driver import Device
from tokenferry.jit.kernel import Jit, KernelSpec
from tokenferry.jit.linker import DeviceLibrary
from tokenferry.kernels.all import ACROSS_NODES, SPECS
from tokenferry.kernels.control_block import CONTROL_BLOCK_BYTES, MAX_NODES, MAX_RANKS, OFFSET_BYTES
from tokenferry.memory.reach import describe, unreachable, why_not
from tokenferry.memory.streams import CudaStreams
from tokenferry.memory.window import Window, share
from tokenferry.topology import Topology, by_place, consecutive
from tokenferry.transports.failures import FailureReports
from tokenferry.transports.handshake import Bootstrap, agree, compare_terms
from tokenferry.transports.refused import resource_error
from tokenferry.transports.rendezvous import new_group_id
from tokenferry.tuning import NCCL_SMS


def why_not_cuda(group: dist.ProcessGroup | None, resolved: Resolved) -> str:
    """Return why these ranks cannot run the CUDA backend, the same on all ranks; empty if they can. Collective.

    Raises:
        ConfigError: as `_survey`.
        PeerTimeout: a rank did not answer in time.
    """
    return _survey(group, resolved).why_not


@dataclass(frozen=True, slots=True)
class _Survey:
    """The nodes of a group, and why its ranks cannot run the backend: the same on all ranks, empty if they can."""

    topology: Topology
    why_not: str


def _survey(group: dist.ProcessGroup | None, resolved: Resolved) -> _Survey:
    """Find the nodes, and what stands in the way. Collective.

    Raises:
        ConfigError: ``ranks_per_node`` does not divide R, or an option of a rank does not fit its GPU.
        PeerTimeout: a rank did not answer in time.
    """
    rank, _ = _rank_and_size(group)
    bootstrap = _bootstrap(group, resolved, _device())
    handshake = describe(_device()) | {"terms": resolved.terms}
    handshakes = bootstrap.exchange(handshake) if bootstrap else [handshake]
    compare_terms(handshakes)
    topology = find_topology(rank, handshakes, resolved.ranks_per_node)
    reason = why_not(handshakes, rank, topology.nodes[topology.node])
    if topology.num_nodes == 1 and len({each["host"] for each in handshakes}) > 1:
        reason = f"{reason}: {topology.found}"
    reason = agree(bootstrap, reason) if bootstrap else reason
    if reason and bootstrap and all(each["device"] for each in handshakes):
        found = _apart(bootstrap, resolved, handshakes, _Survey(topology, reason))
        topology, reason = found.topology, found.why_not
    reason, wrong = reason or _unfit(resolved, topology), ""
    if not reason:
        try:
            index = torch.cuda.current_device()
            Jit(index, None, arch=resolved.arch).close()
            with closing(Device(index)) as device:
                too_many = too_many_experts(resolved.shape, topology, device.smem_bytes())
            reason = too_many and f"rank {rank}: {too_many}"
        except (RuntimeError, OSError, MemoryError) as error:
            reason = f"rank {rank}: {resource_error('loading CUDA', error) or error}"
        except ConfigError as error:
            wrong = f"rank {rank}: {error}"
    return _Survey(topology, _agree(bootstrap, reason, wrong))


def _agree(bootstrap: Bootstrap | None, reason: str, wrong: str) -> str:
    """Return the reason of the lowest rank that has one, as `agree`. Collective.

    Args:
        bootstrap: Exchanges handshakes of all ranks; None: there is one.
        reason: Why this rank cannot run the backend; empty if it can.
        wrong: What is wrong with its options; empty: nothing.

    Raises:
        ConfigError: on all ranks, if an option of any is wrong. One that left alone would let the others wait.
    """
    mine = {"why_not": reason, "wrong": wrong}
    said = bootstrap.exchange(mine) if bootstrap else [mine]
    # A rank that cannot load this module says nothing of its options; see `tokenferry.backends.choose`.
    wrong = next((each["wrong"] for each in said if each.get("wrong")), "")
    if wrong:
        raise ConfigError(f"ExpertGroup: {wrong}")
    return next((each["why_not"] for each in said if each["why_not"]), "")


def _apart(bootstrap: Bootstrap, resolved: Resolved, handshakes: Sequence[dict[str, Any]], found: _Survey) -> _Survey:
    """Make each rank a node of its own, if GPUs of a node cannot map each other's memory. Collective.

    Args:
        bootstrap: Exchanges handshakes of all ranks.
        resolved: The options; if they say how many ranks a node has, it stays so.
        handshakes: Those of all ranks.
        found: What was found before; why the backend cannot run is not empty.
    """
    old = found.topology
    mine = "" if resolved.ranks_per_node else unreachable(handshakes, old.rank, old.nodes[old.node])
    apart = agree(bootstrap, mine)
    alone = Topology(old.rank, consecutive(old.num_ranks, 1), apart)
    others = agree(bootstrap, why_not(handshakes, old.rank, (old.rank,)) or _unfit(resolved, alone))
    if apart and not others:
        return _Survey(alone, "")
    return _Survey(old, f"{found.why_not}; and with each as a node of its own: {others}") if apart else found


def find_topology(rank: int, handshakes: Sequence[dict[str, Any]], ranks_per_node: int | None) -> Topology:
    """Return the nodes: the ranks of each host form one, if hosts have equally many consecutive ranks, else all do.

    Args:
        rank: This rank.
        handshakes: Those of all ranks, as `tokenferry.memory.reach.describe` makes them.
        ranks_per_node: How many consecutive ranks form a node, whatever their hosts; None: hosts say so.

    Raises:
        ConfigError: ``ranks_per_node`` does not divide R.
    """
    num_ranks = len(handshakes)
    if ranks_per_node is not None:
        return Topology(rank, consecutive(num_ranks, ranks_per_node), f"ranks_per_node={ranks_per_node}")
    hosts = by_place([handshake["host"] for handshake in handshakes])
    if len(hosts) == 1:
        return Topology(rank, hosts, "all ranks are on one host")
    per_host = len(hosts[0])
    if num_ranks % per_host == 0 and hosts == consecutive(num_ranks, per_host):
        return Topology(rank, hosts, "each host is a node")
    everybody = (tuple(range(num_ranks)),)
    return Topology(rank, everybody, "to be nodes, hosts need equally many ranks each, with consecutive numbers")


def make_cuda_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> CudaBackend:
    """Share windows with the other ranks, and load the kernels; collective.

    Raises:
        BackendUnavailable: a rank cannot run the backend; says which and why, on all ranks.
        ConfigError: ranks have different shapes or options, or an option of a rank does not fit its GPU.
        PeerTimeout: a rank did not answer in time.
    """
    survey = _survey(group, resolved)
    if survey.why_not:
        raise _unavailable(survey.why_not)
    topology = survey.topology
    here = topology.nodes[topology.node]
    rank, num_ranks = _rank_and_size(group)
    device = _device()
    assert device is not None
    bootstrap = _bootstrap(group, resolved, device)
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    num_bytes = CONTROL_BLOCK_BYTES + heap_bytes(resolved, num_ranks, memory_bytes, topology.num_nodes)
    key = secrets.token_hex(4)
    peers, group_id = None, 0
    if bootstrap:
        terms = terms_of(resolved, topology, num_bytes)
        group_id = new_group_id(group) if group is not None and rank == 0 else 0
        process = asdict(Process.this())
        handshakes = bootstrap.exchange({"terms": terms, "key": key, "group_id": group_id, "process": process})
        compare_terms(handshakes)
        key, group_id = handshakes[0]["key"], handshakes[0]["group_id"]
        peers = Peers([Process(**handshakes[peer]["process"]) for peer in here])
    sizes = None
    if topology.num_nodes > 1 and resolved.network == "nvshmem":
        sizes = region_sizes(resolved.shape, topology, resolved.put_bytes)
    with ExitStack() as opened:  # is closed again if this fails, on this rank or on another one
        window = share(bootstrap, rank, here, device, num_bytes, CONTROL_BLOCK_BYTES)
        opened.callback(window.close)
        backend: CudaBackend | None = None
        reason = wrong = ""
        try:
            if group is not None and bootstrap is not None and topology.num_nodes > 1:
                network = None
                if sizes is not None:
                    network = nvshmem.make_network(bootstrap, topology, sizes, device, resolved.timeout_s)
                rails = nccl_rails(bootstrap, resolved, topology, FailureReports(group, group_id, topology))
                opened.callback(rails.close)
                backend = assemble_across(window, resolved, key, topology, InternodeLinks(rails, network))
            else:
                backend = assemble(window, resolved, key, _why(window, num_ranks))
            opened.pop_all()
            opened.callback(backend.close)  # which owns all of these
        except (RuntimeError, OSError, MemoryError) as error:  # such as for want of pinned memory
            reason = f"rank {rank}: {resource_error('making the group', error) or error}"
        except ConfigError as error:
            wrong = f"rank {rank}: {error}"
        reason = _agree(bootstrap, reason, wrong)
        if backend is None or reason:
            raise _unavailable(reason)
        opened.pop_all()
    if peers:
        backend.context.watch(peers)
    return backend


def terms_of(resolved: Resolved, topology: Topology, num_bytes: int) -> dict[str, object]:
    """Return what has to be the same on all ranks, by name, with nothing that the group does not use. Pure."""
    network = resolved.network if topology.num_nodes > 1 else "none"
    return {
        "shape": str(resolved.shape),
        "on_timeout": "mask" if resolved.mask_on_timeout else "raise",
        "network": network,
        "ranks_per_node": topology.ranks_per_node,
        "heap bytes": num_bytes,
        "bytes for puts": resolved.put_bytes or 0 if network == "nvshmem" else 0,
    }


def _why(window: Window, num_ranks: int) -> str:
    """Return why this backend was chosen for the ranks of one node."""
    over = "" if window.has_atomics else ", not all over NVLink"
    return f"every rank has a GPU that reaches its peers{over}" if num_ranks > 1 else "one rank with a GPU"


def _unavailable(reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"ExpertGroup: backend='cuda' cannot run: {reason}; use backend='cpu' or 'auto'")


def nccl_rails(bootstrap: Bootstrap, resolved: Resolved, topology: Topology, reports: FailureReports) -> NcclRails:
    """Return the rails of a rank, with a communicator of their own. Collective.

    Args:
        bootstrap: Exchanges handshakes of all ranks.
        resolved: The options.
        topology: The nodes.
        reports: Where a rank that gives up says for whom it waited.

    Raises:
        NcclError: the ranks of a rail could not be connected, or one of all ranks could not begin.
    """
    mine, why_not = "", ""
    if topology.node == 0:
        try:
            mine = new_unique_id().hex()
        except NcclError as error:
            why_not = f"rank {topology.rank}: {error}"
    handshakes = bootstrap.exchange({"nccl": mine, "why_not": why_not})
    for handshake in handshakes:
        if handshake["why_not"]:
            raise NcclError(handshake["why_not"])
    device, unique_id = _device(), bytes.fromhex(handshakes[topology.rail[0]]["nccl"])
    assert device is not None

    driver = Device(device.index or 0)

    def make() -> NcclChannel:
        torch.cuda.set_device(device)  # of the thread that connects
        communicator = Communicator(topology.node, topology.num_nodes, unique_id, max_ctas=NCCL_SMS)
        return NcclChannel(communicator, device, CudaStreams(driver))

    def enter() -> None:
        torch.cuda.set_device(device)  # of the thread that watches exchanges
        relaxed = driver.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        driver.cuda.cuThreadExchangeStreamCaptureMode(relaxed)  # it asks about events while another captures a graph

    channel = connect(make, resolved.timeout_s)
    return NcclRails(channel, topology, resolved.timeout_s, reports=reports, enter_thread=enter)


def assemble(window: Window, resolved: Resolved, key: str, why: str, runtime: Runtime | None = None) -> CudaBackend:
    """Return the backend of one rank over its window; local.

    Args:
        window: The memory that the ranks share.
        resolved: Shape and options.
        key: Key of the group, which its plans carry.
        why: Why this backend was chosen.
        runtime: Kernels and streams; None: those of the window's GPU.
    """
    runtime = runtime or _runtime(window, resolved, SPECS)
    context = Context(window, runtime, resolved.timeout_s, mask_late=resolved.mask_on_timeout)
    return CudaBackend(context, key, why, fast_path=resolved.fast_path)


def _runtime(
    window: Window, resolved: Resolved, specs: Sequence[KernelSpec], library: DeviceLibrary | None = None
) -> Runtime:
    """Return the runtime of a window's GPU."""
    target = Target(resolved.arch, window.has_atomics)
    return cuda_runtime(window.device, Path(resolved.cache_folder), specs, target, library)


def assemble_across(
    window: Window,
    resolved: Resolved,
    key: str,
    topology: Topology,
    links: InternodeLinks,
    runtime: Runtime | None = None,
) -> AcrossBackend:
    """Return the backend of one rank of several nodes over the window of its node; local.

    Args:
        window: The memory that the ranks of this node share.
        resolved: Shape and options.
        key: Key of the group, which its plans carry.
        topology: The nodes.
        links: What carries exchanges between nodes.
        runtime: Kernels and streams; None: those of the window's GPU.
    """
    if runtime is None:
        network = links.network
        specs = (*SPECS, *ACROSS_NODES, *(() if network is None else (network.send, network.receive)))
        library = None if network is None else network.library
        runtime = _runtime(window, resolved, specs, library)
    first = topology.nodes[topology.node][0]
    context = Context(window, runtime, resolved.timeout_s, mask_late=resolved.mask_on_timeout, first_rank=first)
    why = f"every rank has a GPU that reaches its peers, on {topology}"
    if topology.ranks_per_node == 1:
        why = f"every rank has a GPU, {topology} connected by NCCL: {topology.found}"
    return AcrossBackend(context, key, why, topology, links, resolved)


def heap_bytes(resolved: Resolved, num_ranks: int, memory_bytes: int, num_nodes: int = 1) -> int:
    """Return the bytes for rows that peers write or read: those of the options, or those for the shape. Pure."""
    if resolved.heap_bytes is not None:
        return resolved.heap_bytes
    return min(tuning.heap_bytes(resolved.shape, num_ranks, num_nodes), memory_bytes // 4)


def _unfit(resolved: Resolved, topology: Topology) -> str:
    """Return why this backend cannot support a shape or honour an option; empty if it can."""
    if resolved.cpu_only:
        return resolved.cpu_only
    if topology.ranks_per_node > MAX_RANKS:
        return f"{topology.ranks_per_node} ranks on a node, and at most {MAX_RANKS} are possible"
    if topology.num_nodes > MAX_NODES:
        return f"{topology}, and at most {MAX_NODES} nodes are possible"
    reason = nccl.why_not() if topology.num_nodes > 1 else ""
    if reason:
        return f"{topology}, and there is no NCCL to connect them: {reason}"
    if topology.num_nodes == 1:
        if resolved.cuda_only:
            return "transport='nvshmem': all ranks are on one node, whose decode calls use NVLink"
    elif resolved.network == "nvshmem":
        reason = nvshmem.why_not()
        if reason:
            return f"{'transport=' if resolved.cuda_only else 'TOKENFERRY_NETWORK='}'nvshmem': {reason}"
    elif resolved.mask_on_timeout:
        return (
            f"on_timeout='mask' needs all ranks on one node, or transport='nvshmem', and these are {topology} over "
            "NCCL, whose exchanges do not end while a rank is silent"
        )
    heap_bytes = resolved.heap_bytes or 0
    most = (OFFSET_BYTES << 32) - CONTROL_BLOCK_BYTES  # handshakes have offsets of 32 bits
    if heap_bytes > most:
        return f"TOKENFERRY_HEAP_MB={heap_bytes >> 20}, and at most {most >> 20} are possible"
    return too_large(resolved.shape)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _device() -> torch.device | None:
    """Return the device of this rank; None if there is none, or none that works."""
    try:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    except RuntimeError:  # CUDA cannot be initialised; the ranks agree on what to do
        return None


def _bootstrap(group: dist.ProcessGroup | None, resolved: Resolved, device: torch.device | None) -> Bootstrap | None:
    return None if group is None or group.size() == 1 else Bootstrap(group, resolved.timeout_s, device)
