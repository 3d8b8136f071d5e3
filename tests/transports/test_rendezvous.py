"""How ranks agree on a transport, and the errors when they cannot."""

import socket
import sys

import pytest
import torch

import tokenferry
from tokenferry.errors import BackendUnavailable, ConfigError, PeerTimeout
from tokenferry.transports import rendezvous, segment

SHAPE = tokenferry.MoeShape(num_experts=4, top_k=1, hidden=8, max_tokens=4)


def make(pg, shape=SHAPE, **options):
    """Make a group, use it once, and return its transport, or the type and text of what was raised."""
    try:
        with tokenferry.ExpertGroup(pg, shape, timeout_s=5.0, **options) as group:
            sent = group.dispatch(torch.ones(1, 8), tokenferry.Routing(torch.tensor([[3]])))
            assert group.combine(sent.x, sent.plan).x.tolist() == [[1.0] * 8]
            return group.transport
    except tokenferry.TokenferryError as error:
        return type(error), str(error)


def with_handshakes(rank, pg, changed, option="auto"):
    """Make a group after rank 1 has replaced a function of the rendezvous."""
    original = {name: getattr(rendezvous, name) for name in changed}
    if rank == 1:
        for name, replacement in changed.items():
            setattr(rendezvous, name, replacement)
    try:
        return make(pg, transport=option)
    finally:
        for name, value in original.items():
            setattr(rendezvous, name, value)


def other_host():
    return "another host"


def no_socket():
    return None, ""


def refuse(rank, handshakes):
    raise ConnectionRefusedError("no way")


def test_ranks_of_one_host_share_memory(worlds):
    assert worlds(2).run(with_handshakes, {}) == ["shared_memory", "shared_memory"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"host_name": other_host}, "the ranks are on 2 hosts"),
        ({"_listen": no_socket}, "rank 1 has no Unix sockets"),
        ({"_connect_to_lower_ranks": refuse}, "rank 1 cannot reach a rank of its host over a Unix socket (no way)"),
    ],
    ids=["hosts", "sockets", "refused"],
)
def test_one_reason_on_one_rank_moves_all_ranks_to_the_group_transport(worlds, changed, why):
    assert worlds(2).run(with_handshakes, changed) == ["process_group", "process_group"]
    for kind, text in worlds(2).run(with_handshakes, changed, "shared_memory"):
        assert kind is BackendUnavailable
        assert why in text
        assert "use transport='auto' or 'process_group'" in text


def different_shapes(rank, pg):
    return make(pg, tokenferry.MoeShape(4, top_k=1, hidden=8 + 8 * rank, max_tokens=4))


def different_transports(rank, pg):
    return make(pg, transport="shared_memory" if rank else "auto")


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (different_shapes, "shape differs between ranks (rank 0: MoeShape"),
        (different_transports, "rank 0: auto, rank 1: shared_memory"),
    ],
)
def test_different_options_are_an_error_on_every_rank(worlds, job, text):
    for kind, message in worlds(2).run(job):
        assert kind is ConfigError
        assert text in message


def strangers(rank, pg):
    """Two strangers connect to rank 0's socket before rank 1 does."""
    original = rendezvous._connect_to_lower_ranks

    def intrude(rank, handshakes):
        for preamble in (b"who", rendezvous._PREAMBLE.pack(b"0" * 16, 1)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(handshakes[0]["address"])
                stranger.sendall(preamble)
        return original(rank, handshakes)

    rendezvous._connect_to_lower_ranks = intrude if rank == 1 else original
    try:
        return make(pg, transport="shared_memory")
    finally:
        rendezvous._connect_to_lower_ranks = original


def test_a_connection_without_the_secret_is_rejected(worlds):
    assert worlds(2).run(strangers) == ["shared_memory", "shared_memory"]


def test_a_rank_that_does_not_connect_is_named():
    listener, _ = rendezvous._listen()
    handshakes = [{"secret": "00" * 16}] * 3
    with (
        listener,
        pytest.raises(PeerTimeout, match=r"making the group: rank 0 waited .* ranks 1, 2: it did not connect"),
    ):
        rendezvous._accept_higher_ranks(listener, 0, handshakes, timeout_s=0.05)


def test_sockets_that_are_files_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    listener, address = rendezvous._listen()
    with listener:
        assert [str(tmp_path / path.name) for path in tmp_path.iterdir()] == [address]


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
    with pytest.raises(MemoryError, match=r"cannot allocate 65536 bytes of shared memory .*No space left"):
        segment.create(1, 1000)
