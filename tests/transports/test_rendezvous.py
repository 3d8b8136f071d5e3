"""How ranks agree on a transport, and the errors when they cannot."""

import contextlib
import errno
import itertools
import os
import socket
import sys
import time
from unittest import mock

import pytest
import torch

import tokenferry
from support.refusals import descriptors_left
from tokenferry.errors import BackendUnavailable, ConfigError, ResourceError
from tokenferry.transports import lifetime, rendezvous, segment

SHAPE = tokenferry.MoeShape(num_experts=4, top_k=1, hidden=8, max_tokens=4)


def make(pg, shape=SHAPE, timeout_s=5.0, **options):
    """Make a group, use it once, and return its transport, or the type and text of what was raised."""
    try:
        with tokenferry.ExpertGroup(pg, shape, timeout_s=timeout_s, **options) as group:
            sent = group.dispatch(torch.ones(1, 8), tokenferry.Routing(torch.tensor([[3]])))
            assert group.combine(sent.x, sent.plan).x.tolist() == [[1.0] * 8]
            return group.transport
    except tokenferry.TokenferryError as error:
        return type(error), str(error)


def replaced(rank, pg, changed, option="auto"):
    """Make a group while functions are replaced on rank 1."""
    with contextlib.ExitStack() as stack:
        for name, replacement in changed.items() if rank == 1 else ():
            stack.enter_context(mock.patch(name, replacement))
        return make(pg, transport=option)


def other_host():
    return "another host"


def other_user():
    return 12345


def refuse(*_, **__):
    raise ConnectionRefusedError("no way")


def forbid(*_, **__):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def use_up_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def use_up_descriptors(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")


def lose_descriptors(*_):
    return b"-", [], socket.MSG_CTRUNC, None


HERE = "tokenferry.transports.rendezvous"


def test_ranks_of_one_host_share_memory(worlds):
    assert worlds(2).run(replaced, {}) == ["shared_memory", "shared_memory"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({f"{HERE}.host_name": other_host}, "the ranks are on 2 hosts"),
        ({f"{HERE}.os.geteuid": other_user}, "the ranks belong to 2 users"),
        (
            {"socket.socket.bind": use_up_descriptors},
            "rank 1: cannot listen on a Unix socket: file descriptors refused",
        ),
        ({"socket.socket.connect": refuse}, "rank 1 cannot reach rank 0 of its host over a Unix socket (no way)"),
        ({"os.memfd_create": forbid}, "65536 bytes of shared memory: a call of the system refused (EPERM"),
        ({"os.ftruncate": use_up_disk}, "65536 bytes of shared memory: shared memory refused (ENOSPC"),
        ({"mmap.mmap": forbid}, "a call of the system refused (EPERM: Operation not permitted); containers forbid"),
        ({"socket.recv_fds": lose_descriptors}, "cannot receive the descriptor of a peer's shared memory"),
        ({"socket.socketpair": use_up_descriptors}, "file descriptors refused (EMFILE: Too many open files); RLIMIT_"),
    ],
    ids=["hosts", "users", "listen", "connect", "memfd", "full", "mmap", "receive", "descriptors"],
)
def test_one_reason_on_one_rank_moves_all_ranks_to_the_group_transport(worlds, changed, why):
    assert worlds(2).run(replaced, changed) == ["process_group", "process_group"]
    for kind, text in worlds(2).run(replaced, changed, "shared_memory"):
        assert kind is BackendUnavailable
        assert why in text
        assert "use transport='auto' or 'process_group'" in text


def with_few_descriptors(rank, pg):
    """Rank 0 and rank 1 in turn have 0, 1, 2.. descriptors left; returns what became of the groups."""
    found = []
    for poor in (0, 1):
        for spare in range(12):
            with descriptors_left(spare) if rank == poor else contextlib.nullcontext():
                found.append(make(pg))
    return found


def test_a_rank_with_too_few_descriptors_moves_all_ranks_to_the_group_transport(worlds):
    zero, one = worlds(2).run(with_few_descriptors)
    assert zero == one
    for found in (zero[:12], zero[12:]):
        # In between it depends on what else the process opens and closes meanwhile.
        assert (found[0], found[-1]) == ("process_group", "shared_memory")


def on_hosts(rank, pg, hosts, options):
    """Make a group while each rank believes to be on a host; return its nodes and transport, or what was raised."""
    try:
        with (
            mock.patch(f"{HERE}.host_name", return_value=hosts[rank]),
            tokenferry.ExpertGroup(pg, SHAPE, timeout_s=5.0, **options) as group,
        ):
            routing = tokenferry.Routing(torch.tensor([[3]]))
            sent = group.dispatch(torch.ones(1, 8), routing)
            assert group.combine(sent.x, sent.plan).x.tolist() == [[1.0] * 8]
            decoded = group.decode_dispatch(torch.ones(1, 8), tokenferry.Routing(routing.topk_idx, torch.ones(1, 1)))
            assert group.decode_combine(decoded.x, decoded.plan).x.tolist() == [[1.0] * 8]
            return group.topology.nodes, group.transport
    except tokenferry.TokenferryError as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("hosts", "options", "nodes", "transport"),
    [
        ("aabb", {}, ((0, 1), (2, 3)), "shared_memory+process_group"),
        ("abab", {}, ((0, 2), (1, 3)), "shared_memory+process_group"),
        ("abcd", {}, ((0,), (1,), (2,), (3,)), "process_group"),
        ("aaab", {}, ((0, 1, 2, 3),), "process_group"),
        ("aabb", {"transport": "process_group"}, ((0, 1, 2, 3),), "process_group"),
        ("aabb", {"ranks_per_node": 4}, ((0, 1, 2, 3),), "process_group"),
        ("aaaa", {"ranks_per_node": 2}, ((0, 1), (2, 3)), "shared_memory+process_group"),
        ("aaaa", {"ranks_per_node": 2, "transport": "shared_memory"}, ((0, 1), (2, 3)), "shared_memory"),
        ("aaaa", {"ranks_per_node": 2, "transport": "process_group"}, ((0, 1), (2, 3)), "process_group"),
        ("abba", {"ranks_per_node": 2}, ((0, 1), (2, 3)), "process_group"),
        ("aaaa", {"ranks_per_node": 2, "on_timeout": "mask"}, ((0, 1), (2, 3)), "shared_memory"),
    ],
)
def test_nodes_are_hosts_unless_they_are_given(worlds, hosts, options, nodes, transport):
    assert worlds(4).run(on_hosts, hosts, options) == [(nodes, transport)] * 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ranks_per_node": 3}, ConfigError, "ranks_per_node=3 does not divide the group's 4 ranks"),
        ({"ranks_per_node": 0}, ConfigError, "ranks_per_node: expected a positive integer or None, got 0"),
        ({"ranks_per_node": 2.0}, ConfigError, "ranks_per_node: expected a positive integer or None, got 2.0"),
        ({"ranks_per_node": 2, "backend": "cuda"}, BackendUnavailable, "backend='cuda' cannot run"),
    ],
)
def test_nodes_that_cannot_be(worlds, options, error, text):
    for kind, message in worlds(4).run(on_hosts, "aaaa", options):
        assert kind is error
        assert text in message


def test_masks_need_one_host(worlds):
    for kind, message in worlds(4).run(on_hosts, "aabb", {"on_timeout": "mask"}):
        assert kind is BackendUnavailable
        assert "on_timeout='mask' needs the transport 'shared_memory', this group has 'process_group'" in message
        assert "because the ranks are on 2 hosts" in message


def how_found(rank, pg, hosts, options):
    """Make a group while each rank believes to be on a host; return how its nodes were found."""
    with (
        mock.patch(f"{HERE}.host_name", return_value=hosts[rank]),
        tokenferry.ExpertGroup(pg, SHAPE, timeout_s=5.0, **options) as group,
    ):
        return group.topology.found


@pytest.mark.parametrize(
    ("hosts", "options", "found"),
    [
        ("aaaa", {}, "all ranks are on one host"),
        ("abab", {}, "each host is a node"),
        ("abaa", {}, "the 2 hosts have 3, 1 ranks; with equally many each would be a node"),
        ("aabb", {"transport": "process_group"}, "transport='process_group' takes all ranks as one node"),
        ("aabb", {"ranks_per_node": 1}, "ranks_per_node=1"),
    ],
)
def test_a_topology_says_how_it_was_found(worlds, hosts, options, found):
    assert worlds(4).run(how_found, hosts, options) == [found] * 4


def different_nodes(rank, pg):
    return make(pg, ranks_per_node=1 if rank else 2)


def different_shapes(rank, pg):
    return make(pg, tokenferry.MoeShape(4, top_k=1, hidden=8 + 8 * rank, max_tokens=4))


def different_limits(rank, pg):
    return make(pg, tokenferry.MoeShape(4, top_k=1, hidden=8, max_tokens=4, max_nodes=1 if rank else None))


def different_backends(rank, pg, backends):
    with mock.patch.dict(os.environ):
        os.environ.pop("TOKENFERRY_BACKEND", None)  # of the pool, which takes the place of "auto"
        return make(pg, backend=backends[rank])


@pytest.mark.parametrize("backends", list(itertools.permutations(("auto", "cpu", "cuda"), 2)), ids=" and ".join)
def test_each_backend_begins_otherwise_but_all_ranks_say_what_was_asked_for(worlds, backends):
    for kind, message in worlds(2).run(different_backends, backends):
        assert kind is ConfigError
        assert f"backend differs between ranks (rank 0: {backends[0]}, rank 1: {backends[1]})" in message


def different_transports(rank, pg):
    return make(pg, transport="shared_memory" if rank else "auto")


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (different_shapes, "shape differs between ranks (rank 0: MoeShape"),
        (
            different_limits,
            "max_nodes=None, node_slots=None), rank 1: MoeShape(num_experts=4, top_k=1, hidden=8, max_tokens=4, "
            "max_nodes=1, node_slots=None)",
        ),
        (different_transports, "rank 0: auto, rank 1: shared_memory"),
        (different_nodes, "ranks_per_node differs between ranks (rank 0: 2, rank 1: 1)"),
    ],
)
def test_different_options_are_an_error_on_every_rank(worlds, job, text):
    for kind, message in worlds(2).run(job):
        assert kind is ConfigError
        assert text in message


def strangers(rank, pg):
    """Strangers connect to rank 0's socket before rank 1 does, and stay; one of them says nothing."""
    connect, guests = rendezvous._connect_to_lower_ranks, []

    def intrude(rank, near, handshakes, secret, sockets):
        for preamble in (b"", b"who", rendezvous._PREAMBLE.pack(b"0" * 16, 1), rendezvous._PREAMBLE.pack(secret, 0)):
            guests.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            guests[-1].connect(handshakes[0]["address"])
            guests[-1].sendall(preamble)
        return connect(rank, near, handshakes, secret, sockets)

    with mock.patch(f"{HERE}._connect_to_lower_ranks", intrude if rank == 1 else connect):
        start = time.monotonic()
        made = make(pg, transport="shared_memory", timeout_s=40.0)
    took_s = time.monotonic() - start
    for guest in guests:
        guest.settimeout(5.0)
        assert guest.recv(1) == b"", "a stranger is still connected"
        guest.close()
    return made, took_s < 30.0


def test_strangers_are_turned_away_and_delay_nobody(worlds):
    assert worlds(2).run(strangers) == [("shared_memory", True)] * 2


def strangers_of_another_user(rank, pg, stranger):
    """One rank sees another user at the other end of its connection, which knows the secret."""
    users = lifetime._CREDENTIALS.pack(os.getpid(), os.geteuid() + 1, os.getgid())
    other = mock.patch("socket.socket.getsockopt", return_value=users)
    with other if rank == stranger else contextlib.nullcontext():
        return make(pg)


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="needs Linux")
@pytest.mark.parametrize("rank", [0, 1])
def test_another_user_is_turned_away_whatever_it_says(worlds, rank):
    assert worlds(2).run(strangers_of_another_user, rank) == ["process_group"] * 2


def test_a_rank_that_does_not_connect_is_named():
    with rendezvous._Listener() as listener:
        why_not = rendezvous._accept_higher_ranks(0, range(3), listener, b"0" * 16, {})
    assert why_not == "rank 0 has no connection from rank 1"


def test_sockets_that_are_files_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with rendezvous._Listener() as listener:
        assert [str(tmp_path / path.name) for path in tmp_path.iterdir()] == [listener.address]
    assert not list(tmp_path.iterdir())


def test_a_host_without_a_boot_id_is_identified_by_its_name(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert rendezvous.host_name() == socket.gethostname()


def test_segments_without_memfd_are_unlinked_files(monkeypatch):
    monkeypatch.delattr("os.memfd_create")
    made = segment.create(1, 1000)
    made.memory.fill_(7)
    assert segment.attach(made.fd, made.memory.numel()).to(torch.int64).sum().item() == 7 * made.memory.numel()


def test_a_full_disk_is_an_exception(monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        ResourceError,
        match=r"cannot allocate 65536 bytes of shared memory: shared memory refused \(ENOSPC: No space left",
    ):
        segment.create(1, 1000)


def test_memory_can_be_tried_without_memfd(monkeypatch):
    assert segment.why_not() == ""
    monkeypatch.delattr("os.memfd_create")
    assert segment.why_not() == ""
    monkeypatch.delattr("socket.send_fds")
    assert "no Unix sockets" in segment.why_not()
