"""What a call of `integrations.transformers.ExpertParallel` costs the host, on a group whose kernels do nothing."""

from types import SimpleNamespace

import pytest
import torch

from support.silent_kernels import NUM_RANKS, SENT_TO_EACH, SilentGroup
from support.torch_calls import TorchCalls, num_functions
from tokenferry.api import ExpertGroup
from tokenferry.integrations import exchange
from tokenferry.integrations import transformers as ours

T, K, E, H = 8, 2, 2 * NUM_RANKS, 1024


class Scaled:
    """Experts that do next to nothing."""

    num_experts = E // NUM_RANKS

    def forward(self, x, index, weights):
        return x * weights


class Members:
    """Stands for a process group."""

    def rank(self):
        return 0

    def size(self):
        return NUM_RANKS


@pytest.fixture
def parallel(monkeypatch):
    """A layer of rank 0, whose ranks share batches."""
    silent, members = [], Members()

    def with_heap(member, *, heap_bytes, shape):
        silent.append(SilentGroup(shape))
        return silent[0].group

    def gather(whole, part, group):
        torch.zeros(0, dtype=torch.int32, device="cpu")  # to be counted

    monkeypatch.setattr(ExpertGroup, "_with_heap", with_heap)
    monkeypatch.setattr(ExpertGroup, "warmup", lambda group: None)
    monkeypatch.setattr(ours.dist, "get_process_group_ranks", lambda group: list(range(NUM_RANKS)))
    monkeypatch.setattr(exchange, "_all_gather", gather)
    monkeypatch.setattr(ours, "_groups", {})
    monkeypatch.setattr(ours, "_views", {})
    mesh = SimpleNamespace(get_group=lambda: members)
    return ours.ExpertParallel(Scaled(), mesh, mesh)


def given(*, requires_grad):
    """Rows, choices and weights."""
    x = torch.ones(T, H, dtype=torch.bfloat16, requires_grad=requires_grad)
    weights = torch.ones(T, K, dtype=torch.bfloat16, requires_grad=requires_grad)
    return x, torch.arange(T * K).view(T, K) % E, weights


def infers(parallel):
    arguments = given(requires_grad=False)

    def run():
        with torch.no_grad():
            parallel(*arguments)

    return run


def trains(parallel):
    arguments, gradient = given(requires_grad=True), torch.ones(T, H, dtype=torch.bfloat16)

    def run():
        parallel(*arguments).backward(gradient)

    return run


MOST_OPERATORS = {infers: 14, trains: 31}
"""Of torch, in a call, and in its backward; each takes microseconds. These experts make 6 of them, and 10."""

MOST_FUNCTIONS = {infers: 160, trains: 380}
"""Of Python, half of them in dispatch and combine. One redistribution of a DTensor takes a hundred."""


@pytest.mark.parametrize("job", [infers, trains])
def test_costs(parallel, job):
    run = job(parallel)
    for _ in range(3):
        run()
    with TorchCalls() as calls:
        run()
    assert len(calls.names) <= MOST_OPERATORS[job], calls.names
    assert num_functions(run) <= MOST_FUNCTIONS[job]


def test_rows_without_gradients_do_not_bring_them_back(parallel):
    """As in the first layer of a model whose embedding is fixed."""
    x, index, weights = given(requires_grad=True)
    parallel(x.detach(), index, weights).backward(torch.ones(T, H, dtype=torch.bfloat16))
    assert (x.grad, weights.grad.shape, weights.grad.dtype) == (None, (T, K), torch.bfloat16)


def test_layers_keep_no_rows_in_the_heap(parallel):
    """Experts keep theirs until backward. The heap is for rows under way, of a layer at a time."""
    x, index, weights = given(requires_grad=True)
    parallel(x, index, weights)
    heap = next(iter(ours._groups.values()))._backend.context.heap
    free = heap.free_bytes
    kept = parallel(x, index, weights)
    rows = NUM_RANKS * SENT_TO_EACH * H * x.itemsize
    assert free - heap.free_bytes < rows
    kept.backward(torch.ones_like(kept))


def test_views_are_kept(parallel, monkeypatch):
    """A new one would know nothing of earlier calls. They are dropped before they become too many."""
    monkeypatch.setattr(ours, "_MAX_VIEWS", 4)
    with torch.no_grad():
        for tokens in range(1, 12 * NUM_RANKS):
            x, index, weights = (each.repeat(tokens // T + 1, 1)[:tokens] for each in given(requires_grad=False))
            parallel(x, index, weights)
            assert len(ours._views) <= ours._MAX_VIEWS
        kept = dict(ours._views)
        parallel(x, index, weights)
    assert kept
    assert ours._views == kept
    ours.close_groups()
    assert not ours._views
