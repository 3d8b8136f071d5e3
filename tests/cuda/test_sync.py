"""entry_sync and exit_sync: late ranks, ranks that never launch, mismatched calls. The CUDA context survives each."""

import pytest
import torch
from torch import Tensor

from support.plan_checks import check, choices_of
from support.virtual_decode import late_s
from support.virtual_dispatch import Delivery, Payload
from support.virtual_fused import Whole
from support.virtual_plan import Expected, Form, Planner
from support.virtual_pull import Pull, Sizes
from support.virtual_ranks import CONTROL_BLOCK_OFFSETS, POISON, Ranks, ranks_of
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.control_block import ENDED_WORD, HANDSHAKE_WORDS, MAX_RANKS, ROWS_WORD, Fault
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.testing.cases import Case

SHORT_S = 0.2
"""Deadline of kernels whose peer never launches."""


def notify(ranks: Ranks):
    """Return (spec, params of each rank, sizes, config) of dispatch_notify; other kernels below."""
    topk_idx = [one.topk_idx for one in Case((20,) * ranks.num_ranks, 2 * ranks.num_ranks, 3).inputs()]
    planner = Planner(ranks, topk_idx, 2 * ranks.num_ranks, Form("rows"))
    sizes = (2, notify_spec.THREADS, planner.smem_bytes)
    return notify_spec.SPEC, [planner.notify_fields(r) for r in range(ranks.num_ranks)], sizes, planner.config


def dispatch(ranks: Ranks):
    topk_idx = [one.topk_idx for one in Case((20,) * ranks.num_ranks, 2 * ranks.num_ranks, 3).inputs()]
    expected = Expected(choices_of(topk_idx), 2 * ranks.num_ranks, Form("rows"))
    delivery = Delivery(ranks, expected, Payload(256, weights=True), topk_idx)
    return dispatch_spec.SPEC, [delivery.fields(r) for r in range(ranks.num_ranks)], delivery.sizes(), {}


def dispatch_fused(ranks: Ranks):
    topk_idx = [one.topk_idx for one in Case((20,) * ranks.num_ranks, 2 * ranks.num_ranks, 3).inputs()]
    whole = Whole(ranks, topk_idx, 2 * ranks.num_ranks, Form("rows"), Payload(256, weights=True))
    fields = [{**whole.fused_fields(r), "keep_alive": whole} for r in range(ranks.num_ranks)]
    return fused_spec.SPEC, fields, whole.fused_sizes(3), whole.planner.config


def combine_pull(ranks: Ranks):
    one = Pull(ranks, Sizes((20,) * ranks.num_ranks, 528, 6), torch.bfloat16)
    fields = [one.fields(r) for r in range(ranks.num_ranks)]
    return pull_spec.SPEC, [{**f, "keep_alive": one} for f in fields], one.launch_sizes(), one.config


KERNELS = {
    "dispatch_notify": notify,
    "dispatch": dispatch,
    "dispatch_fused": dispatch_fused,
    "combine_pull": combine_pull,
}
by_kernel = pytest.mark.parametrize("kernel", KERNELS)


def template(ranks: Ranks, kernel: str, **more):
    """Return the arguments of `Ranks.launch`, with some params changed on every rank, and what has to stay alive."""
    spec, fields, sizes, config = KERNELS[kernel](ranks)
    kept = [one.pop("keep_alive", None) for one in fields]
    return (spec, [{**one, **more} for one in fields], sizes, config), kept


def run(ranks: Ranks, kernel: str) -> None:
    """Run a kernel that succeeds."""
    arguments, _kept = template(ranks, kernel)
    ranks.run(*arguments)


def launch(ranks: Ranks, kernel: str, only, change=None, timeout_s: float = SHORT_S):
    """Launch on some ranks, wait for them, and return their records; ``change``: of one rank's params."""
    (spec, fields, sizes, config), _kept = template(ranks, kernel, timeout_s=timeout_s)
    fields = [one if rank in only else None for rank, one in enumerate(fields)]
    if change:
        rank, update = change
        fields[rank] = update(fields[rank])
    ranks.call += 1
    ranks.launch(spec, fields, sizes, config)
    ranks.wait()
    return [ranks.record(rank) for rank in range(ranks.num_ranks)]


def check_context() -> None:
    """Check that the GPU still works: torch computes, and new ranks run all kernels."""
    ranks = Ranks(2)
    assert int(torch.ones(1000, device=ranks.device).sum()) == 1000
    for kernel in KERNELS:
        run(ranks, kernel)
    topk_idx = [one.topk_idx for one in Case((140, 3), 4, 2).inputs()]
    planner = Planner(ranks, topk_idx, 4, Form("experts"))
    planner.run()
    check(planner, Expected(choices_of(topk_idx), 4, Form("experts")))


# ---------------------------------------------------------------------- late ranks


@by_kernel
@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for_and_the_time_counted(kernel, late):
    """The ranks that wait add the time to the late rank's entry, and little to any other."""
    ranks = ranks_of(3)
    waits = torch.zeros(3, 3, dtype=torch.int64, device=ranks.device)
    (spec, fields, sizes, config), _kept = template(ranks, kernel)
    fields = [{**one, "wait_ns": waits[rank]} for rank, one in enumerate(fields)]
    ranks.delay(late, 40)
    ranks.run(spec, fields, sizes, config)
    for rank in range(3):
        waited = waits[rank].tolist()
        assert waited[rank] == 0, "a rank waited for itself"
        if rank != late:
            assert waited[late] > 10_000_000, waited


def test_the_time_is_added_up():
    ranks = ranks_of(2)
    waits = torch.full((2, 2), 1_000_000_000_000, dtype=torch.int64, device=ranks.device)
    for _ in range(2):
        (spec, fields, sizes, config), _kept = template(ranks, "dispatch")
        ranks.delay(1, 40)
        ranks.run(spec, [{**one, "wait_ns": waits[rank]} for rank, one in enumerate(fields)], sizes, config)
    assert int(waits[0, 1]) > 1_000_000_000_000 + 20_000_000


# ---------------------------------------------------------------------- ranks that never launch


@by_kernel
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_rank_that_never_launches(kernel, rounds):
    """The other rank records which one, and which epochs: handshakes of every second epoch lie in the same place."""
    ranks = Ranks(2)
    for _ in range(rounds):
        run(ranks, kernel)
    record, none = launch(ranks, kernel, only=(0,))
    assert none is None
    assert record is not None
    assert (record.code, record.call, record.peer, record.blamed) == (Fault.late_handshake, ranks.call, 1, 1)
    assert (record.seen, record.expected) == (max(rounds - 1, 0), rounds + 1)
    assert SHORT_S * 1000 <= record.waited_ms < SHORT_S * 1000 + 20_000
    assert ranks.failed() == [Fault.late_handshake, 0]
    assert ranks.epochs() == [rounds, rounds]
    announced = ranks.words(1, "gave_up", MAX_RANKS, torch.int64).tolist()
    assert announced == [Fault.late_handshake << 32 | 1, *(0,) * 7], "the fault was not announced to the late rank"
    check_context()


@by_kernel
def test_all_waiting_ranks_name_the_same_rank(kernel):
    ranks = Ranks(4)
    records = launch(ranks, kernel, only=(0, 1, 3), timeout_s=late_s(4))
    assert records.pop(2) is None
    seen = set()
    for record in records:
        assert record is not None
        seen.add(record.code)
        if record.code == Fault.peer_gave_up:
            assert (record.word, record.blamed) == (Fault.late_handshake, 2), record
            assert record.peer in (0, 1, 3)
        else:
            assert (record.code, record.peer, record.blamed, record.expected) == (Fault.late_handshake, 2, 2, 1), record
    assert Fault.late_handshake in seen
    check_context()


def test_a_rank_that_is_gone_ends_no_wait_for_another():
    """Rank 2 has sent all that dispatch_notify needs of it before the others start, and rank 1 is late."""
    ranks = Ranks(3)
    for rank in (0, 1):
        ranks.words(rank, "gave_up", MAX_RANKS, torch.int64)[2] = Fault.peer_closed << 32 | 2
        ranks.records[rank, ENDED_WORD] = 1 << 2
    arguments, _kept = template(ranks, "dispatch_notify")
    ranks.delay(0, 100)
    ranks.delay(1, 400)
    ranks.run(*arguments)


@by_kernel
@pytest.mark.parametrize("gone", [Fault.peer_closed, Fault.peer_ended])
def test_a_rank_that_is_gone_is_not_waited_for(kernel, gone):
    ranks = Ranks(2)
    if gone == Fault.peer_closed:
        ranks.words(0, "gave_up", MAX_RANKS, torch.int64)[1] = Fault.peer_closed << 32 | 1
    else:
        ranks.records[0, ENDED_WORD] = 1 << 1
    record, none = launch(ranks, kernel, only=(0,), timeout_s=60)
    assert none is None
    assert (record.code, record.peer, record.blamed, record.seen, record.expected) == (gone, 1, 1, 0, 1)
    assert record.waited_ms < 10_000


@by_kernel
def test_a_rank_that_is_too_late_sees_that_it_was_given_up(kernel):
    """dispatch_notify finds all counts, published before the other rank gave up; the next kernel sees the fault."""
    ranks = Ranks(2)
    launch(ranks, kernel, only=(0,))
    none, record = launch(ranks, kernel, only=(1,), timeout_s=5)
    if kernel == "dispatch_notify":
        assert record is None
        assert ranks.epochs() == [0, 1]
        none, record = launch(ranks, "dispatch", only=(1,), timeout_s=5)
    assert none is None
    assert record is not None
    assert (record.code, record.peer, record.word, record.blamed) == (Fault.peer_gave_up, 0, Fault.late_handshake, 1)


@by_kernel
def test_a_broken_group_does_nothing_more(kernel):
    """Later kernels return at once, record nothing, and write nothing."""
    ranks = Ranks(2)
    launch(ranks, kernel, only=(0,))
    before = ranks.words(1, "handshake", CONTROL_BLOCK_OFFSETS["epoch"], torch.uint8).cpu()
    for other in KERNELS:
        assert launch(ranks, other, only=(0,), timeout_s=60) == [None, None]
    assert ranks.words(1, "handshake", CONTROL_BLOCK_OFFSETS["epoch"], torch.uint8).cpu().equal(before)
    topk_idx = [one.topk_idx for one in Case((20, 20), 4, 3).inputs()]
    planner = Planner(ranks, topk_idx, 4, Form("rows"))
    planner.notify(only=(0,))
    ranks.wait()
    assert planner.tables[0].dst_counts.tolist() == [-1, -1], "the plan of a broken group is not aborted"
    expected = Expected(choices_of(topk_idx), 4, Form("rows"))
    delivery = Delivery(ranks, expected, Payload(256), topk_idx)
    ranks.launch(dispatch_spec.SPEC, [delivery.fields(0), None], delivery.sizes())
    ranks.wait()
    for landed in delivery.landed:
        assert (landed.rows.cpu() == POISON).all()


def write_handshake(ranks: Ranks, fields, epoch: int, *, sender: int, reader: int, **words: int) -> None:
    """Write the handshake of a rank that does not launch into a peer's control block."""
    first = ((epoch & 1) * MAX_RANKS + sender) * HANDSHAKE_WORDS
    handshake = torch.zeros(HANDSHAKE_WORDS, dtype=torch.int64)
    for word, value in fields[sender]["handshake"].items():
        handshake[word] = value
    for word, value in words.items():
        handshake[int(word.removeprefix("word"))] = value
    ranks.words(reader, "handshake", HANDSHAKE_WORDS, torch.int64, first).copy_(handshake + (epoch << 32))


@pytest.mark.parametrize("kernel", ["dispatch", "combine_pull"])
def test_a_rank_that_dies_between_its_handshake_and_its_rows(kernel):
    """The handshake announces five blocks, of which two finish."""
    ranks = Ranks(2)
    (spec, fields, sizes, config), _kept = template(ranks, kernel, timeout_s=SHORT_S)
    sent: Tensor = fields[1]["rows_out"]
    write_handshake(ranks, fields, 1, sender=1, reader=0, word15=int(sent[0]), word31=5)
    ranks.words(0, "done", first=1).fill_(2)
    ranks.call += 1
    ranks.launch(spec, [fields[0], None], sizes, config)
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.call, record.peer, record.blamed) == (Fault.late_rows, ranks.call, 1, 1)
    assert (record.seen, record.expected) == (2, 5)
    assert ranks.epochs()[0] == 0
    check_context()


# ---------------------------------------------------------------------- mismatched calls


@by_kernel
@pytest.mark.parametrize("word", [0, 6, 14])
def test_other_signatures(kernel, word):
    """Each rank sees the other's word, or that the other saw the mismatch first."""
    ranks = Ranks(2)
    change = lambda fields: {**fields, "handshake": {**fields.get("handshake", {}), word: 99}}  # noqa: E731
    own = template(ranks, kernel)[0][1][0].get("handshake", {}).get(word, 0)
    records = launch(ranks, kernel, only=(0, 1), change=(1, change), timeout_s=5)
    codes = []
    for rank, record in enumerate(records):
        assert record is not None, f"rank {rank} saw nothing"
        codes.append(record.code)
        if record.code == Fault.peer_gave_up:
            assert (record.peer, record.word, record.blamed) == (1 - rank, Fault.mismatch, rank), record
            continue
        words = (99, own) if rank == 0 else (own, 99)
        assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, word), record
        assert (record.seen, record.expected) == words, record
    assert Fault.mismatch in codes
    assert ranks.epochs() == [0, 0]
    check_context()


def test_all_ranks_record_a_mismatch():
    """The ranks that disagree, and those that learn it from any other: none takes it for a lost rank."""
    for _ in range(5):
        ranks = Ranks(5)
        change = lambda fields: {**fields, "handshake": {**fields["handshake"], 3: 99}}  # noqa: E731
        for record in launch(ranks, "dispatch", only=range(5), change=(2, change), timeout_s=5):
            assert record is not None
            cause = record.word if record.code == Fault.peer_gave_up else record.code
            assert cause == Fault.mismatch, record


def test_the_first_word_that_differs_is_recorded():
    ranks = Ranks(2)
    change = lambda fields: {**fields, "handshake": {**fields["handshake"], 4: 7, 2: 8, 9: 9}}  # noqa: E731
    records = launch(ranks, "dispatch", only=(0, 1), change=(0, change), timeout_s=5)
    words = [record.word for record in records if record is not None and record.code == Fault.mismatch]
    assert set(words) == {2}


@pytest.mark.parametrize("kernel", ["dispatch", "combine_pull"])
def test_plans_of_different_dispatches(kernel):
    """Rank 1 has another number of rows for rank 0 than the plan of rank 0 says."""
    ranks = Ranks(2)

    def change(fields):
        more = fields["rows_out"].clone()
        more[0] += 1
        return {**fields, "rows_out": more}

    expected = int(template(ranks, kernel)[0][1][0]["rows_in"][1])
    records = launch(ranks, kernel, only=(0, 1), change=(1, change), timeout_s=5)
    assert records[0] is not None
    assert (records[0].code, records[0].peer, records[0].word) == (Fault.mismatch, 1, ROWS_WORD)
    assert (records[0].seen, records[0].expected) == (expected + 1, expected)
    assert records[1] is not None
    assert (records[1].code, records[1].peer, records[1].word) == (Fault.peer_gave_up, 0, Fault.mismatch)
    check_context()


def test_other_words_than_those_of_the_signature_may_differ():
    """Each rank has offsets and a number of blocks of its own: words from 16 on are not compared."""
    ranks = ranks_of(2)
    (spec, fields, sizes, config), _kept = template(ranks, "dispatch_notify")
    fields[0] = {**fields[0], "handshake": {16: 5, 31: 7}}
    ranks.run(spec, fields, sizes, config)
