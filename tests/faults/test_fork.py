"""A forked child inherits a group: its calls raise, it keeps no descriptor, and peers see the end of its parent."""

import gc
import os
import signal
import socket
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from support.children import in_child, leave_child, open_descriptors
from support.lost_ranks import CASE, LONG_S, LOST_RANK, Report, calls, leave_note, report_of
from support.pairs import CPU_PAIRS, Pair
from support.transport_pair import connected, exchange, post, receive
from tokenferry import ClosedError, ConfigError, ExpertGroup, MoeShape, PeerTimeout, Routing
from tokenferry.api import find_group
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.compat.deep_ep import Buffer
from tokenferry.testing.world import World, WorldError
from tokenferry.transports import rendezvous

SHAPE = MoeShape(num_experts=6, top_k=1, hidden=8, max_tokens=4)


def dispatch_in_a_child(rank, pg, pair: Pair) -> list[float]:
    """Rank 1 forks a child that dispatches other rows; returns the rows that each rank received."""
    group = pair.open(pg, SHAPE)
    x, routing = torch.full((2, 8), 1.0 + rank), Routing(torch.tensor([[0], [0]]))
    if rank == 1:
        in_child(lambda: expect_closed(lambda: group.dispatch(x * 777, routing)))
    rows = group.dispatch(x, routing).x
    if rank == 1:
        in_child(group.close)
        in_child(gc.collect)
    assert group.dispatch(x, routing).x.equal(rows)
    group.close()
    return rows[:, 0].tolist()


def expect_closed(call) -> None:
    with pytest.raises(ClosedError, match=rf"belongs to process {os.getppid()}, from which .* \({os.getpid()}\)"):
        call()


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_peers_receive_nothing_from_a_child(worlds, pair):
    assert worlds(2).run(dispatch_in_a_child, pair) == [[1.0, 1.0, 2.0, 2.0], []]


def make_every_call_in_a_child(rank, pg, pair: Pair) -> None:
    group = pair.open(pg, CASE.shape)
    todo = calls(group, rank)
    view = group.for_shape(CASE.shape)
    mine = CASE.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing)
    pending = group.decode_dispatch(mine.x, routing, return_hook=True)
    todo |= {
        "a view": lambda: view.dispatch(mine.x, routing),
        "a hook": pending.hook,
        "autograd": lambda: find_group(group.key, CASE.shape).dispatch(mine.x, routing),
        "autograd with other sizes": lambda: find_group(group.key, replace(CASE.shape, hidden=8)),
        "empty_rows": lambda: group.empty_rows(sent.plan),
        "for_shape": lambda: group.for_shape(CASE.shape),
        "mask": lambda: group.mask((rank + 1) % 3),
        "synchronize": group.synchronize,
        "warmup": group.warmup,
    }

    def in_vain() -> None:
        for call in todo.values():
            expect_closed(call)
        with pytest.raises(ConfigError, match="this process group belongs to process"):
            ExpertGroup(pg, SHAPE)
        with group, view:  # closing is harmless
            pass
        with ExpertGroup(None, SHAPE, backend="cpu") as own:
            assert own.dispatch(torch.ones(1, 8), Routing(torch.tensor([[0]]))).x.shape == (1, 8)

    in_child(in_vain)
    pending.hook()
    todo["dispatch"]()
    group.close()


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_every_call_of_a_child_raises(worlds, pair):
    worlds(3).run(make_every_call_in_a_child, pair)


def drop_in_a_child(rank, pg, pair: Pair) -> None:
    """Rank 1 forks a child that drops the group, with a call under way whose rows do not fit into gloo's sockets."""
    x, routing = torch.ones(4096, 64), Routing(torch.zeros(4096, 1, dtype=torch.int64))
    group = pair.open(pg, MoeShape(num_experts=2, top_k=1, hidden=64, max_tokens=4096))
    held = {"group": group, "result": group.decode_dispatch(x, routing, return_hook=True)}
    alive = weakref.ref(group)
    del group

    def drop() -> bool:
        held.clear()
        gc.collect()
        return alive() is None

    assert rank == 0 or in_child(drop)
    held["result"].hook()
    assert held["result"].expert_counts.tolist() == [[8192], [0]][rank]
    held["group"].close()


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_a_child_drops_its_copy_and_the_parent_goes_on(worlds, pair):
    worlds(2).run(drop_in_a_child, pair)


def use_a_buffer_in_a_child(rank, pg) -> None:
    buffer = Buffer(pg, low_latency_mode=True, explicitly_destroy=True, enable_shrink=True)
    x, idx = torch.ones(2, 128, dtype=torch.bfloat16), torch.tensor([[0], [1]])
    handle = buffer.low_latency_dispatch(x, idx, 2, 2, use_fp8=False)[2]
    layout = buffer.get_dispatch_layout(idx, 2)
    todo = (
        lambda: buffer.get_dispatch_layout(idx, 2),
        lambda: buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx),
        lambda: buffer.low_latency_dispatch(x, idx, 2, 2),
        lambda: buffer.low_latency_combine(x, idx, torch.ones(2, 1), handle),
        lambda: buffer.low_latency_update_mask_buffer(1 - rank, True),
        lambda: buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32)),
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
    )
    in_child(lambda: [expect_closed(call) for call in todo])
    in_child(buffer.destroy)
    buffer.low_latency_dispatch(x, idx, 2, 2)
    buffer.destroy()


def test_every_call_of_a_buffer_in_a_child_raises(worlds):
    worlds(2).run(use_a_buffer_in_a_child)


def list_descriptors_of_a_child(rank, pg) -> None:
    before = set(open_descriptors().values())
    with CPU_PAIRS[0].open(pg, CASE.shape) as group:
        calls(group, rank)
        here = set(open_descriptors().values()) - before
        assert len([name for name in here if name.startswith("socket:")]) == 2, "the sockets of two peers"
        there = in_child(lambda: set(open_descriptors().values()))
        assert not there & here
        pg.barrier().wait()
    assert not here & set(open_descriptors().values()), "close() left a descriptor"


def test_a_child_has_no_descriptor_of_a_group(worlds):
    worlds(3).run(list_descriptors_of_a_child)


def fork_while_the_group_is_made(rank, pg) -> list[int]:
    """Return how many sockets this rank had in each exchange of handshakes, in which a child had none of them."""
    before, counts = set(open_descriptors().values()), []
    original = rendezvous.Bootstrap.exchange

    def exchange(bootstrap, handshake):
        here = {name for name in open_descriptors().values() if name.startswith("socket:")} - before
        assert not here & in_child(lambda: set(open_descriptors().values()))
        counts.append(len(here))
        return original(bootstrap, handshake)

    rendezvous.Bootstrap.exchange = exchange
    try:
        with CPU_PAIRS[0].open(pg, SHAPE):
            return counts
    finally:
        rendezvous.Bootstrap.exchange = original


def test_a_child_has_no_descriptor_of_a_group_that_is_being_made(worlds):
    counts = worlds(2).run(fork_while_the_group_is_made)
    assert counts[0][0] == counts[1][0] == 1, "each rank listens"
    assert counts[1][-1] >= 2, "rank 1 has connected"


def test_a_fork_while_another_thread_is_in_a_call():
    with connected() as (zero, one):
        exchange((zero, one), 1, 5000)
        group = Exchange(zero, 10.0, mask_on_timeout=False)
        post(zero, 2, 5000)
        sizes: list[int] = []
        thread = threading.Thread(target=lambda: sizes.append(receive(zero, 2, 1)))
        thread.start()

        def in_vain() -> None:
            with pytest.raises(ClosedError, match="belongs to process"), group.guard("test"):
                raise AssertionError("the call began")
            group.close("was closed", linger=True)

        in_child(in_vain)
        assert group.broken is None
        post(one, 2, 5000)
        thread.join()
        assert sizes == [5000]


class Descriptors(torch.utils.data.Dataset):
    """What the process that loads an item has open."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[str]:
        return sorted(open_descriptors().values())


def test_a_worker_of_a_data_loader_has_no_descriptor_of_a_group():
    before = set(open_descriptors().values())
    with connected() as pair:
        exchange(pair, 1, 5000)
        here = set(open_descriptors().values()) - before
        loader = DataLoader(Descriptors(), num_workers=1, multiprocessing_context="fork", collate_fn=list)
        for names in loader:
            assert not here & set(names[0])
        exchange(pair, 2, 5000)


# ---------------------------------------------------------------------- the parent ends, its child lives


def end_beside_a_child(rank, pg, pair: Pair, how: str, end: str, folder: str):
    """Rank 2 leaves a child, then it ends; returns what the others report."""
    pipes = frozenset(fd for fd, name in open_descriptors().items() if name.startswith("socket:") and is_local(fd))
    with pair.open(pg, SHAPE, timeout_s=100.0) as group:
        x, routing = torch.ones(1, 8), Routing(torch.tensor([[0]]))
        group.dispatch(x, routing)
        if rank == LOST_RANK:
            # Without the pipe to this world, to which a rank is alive as long as its pipe is open.
            leave_note(folder, leave_child(how, pipes), "is a child")
            if end == "close":
                return None
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(PeerTimeout) as caught:
            group.dispatch(x, routing)
        return report_of(caught.value, time.monotonic() - start)


def is_local(fd: int) -> bool:
    """Return whether a socket is one of this host, as those of a world are, and those of gloo are not."""
    with socket.socket(fileno=os.dup(fd)) as copy:
        return copy.family == socket.AF_UNIX


def reports_of_ends(pair: Pair, how: str, end: str, folder: str) -> list[Report]:
    if end == "close":
        with World(3) as world:
            return world.run(end_beside_a_child, pair, how, end, folder)
    with World(3) as world, pytest.raises(WorldError) as caught:
        world.run(end_beside_a_child, pair, how, end, folder)
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    return [caught.value.results[rank] for rank in (0, 1)]


ENDS = [
    *((CPU_PAIRS[0], how, end) for how, end in (("fork", "kill"), ("fork in C", "kill"), ("fork in C", "close"))),
    (CPU_PAIRS[1], "fork", "kill"),
]


@pytest.mark.parametrize(("pair", "how", "end"), ENDS, ids=str)
def test_peers_see_the_end_of_a_parent_whose_child_lives(pair, how, end, tmp_path):
    reports = reports_of_ends(pair, how, end, str(tmp_path))
    (note,) = tmp_path.glob("* is a child")
    os.kill(int(note.name.split()[0]), signal.SIGKILL)  # fails if it did not live
    for rank in (0, 1):
        assert reports[rank].took_s < LONG_S / 2, "not at once"
        assert LOST_RANK in reports[rank].peers or "closed" in reports[rank].text
    assert any(reports[rank].peers == (LOST_RANK,) for rank in (0, 1))
    assert any("its process ended" in reports[rank].text for rank in (0, 1))
