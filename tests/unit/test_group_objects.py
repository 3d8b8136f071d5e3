"""Groups as Python objects: copied with a model, pickled, dropped without close()."""

import copy
import gc
import os
import pickle
import socket
import warnings
import weakref

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from support.children import open_descriptors
from support.transport_pair import exchange
from tokenferry import ExpertGroup, MoeShape, PickleError, Routing, TokenferryError
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.compat.deep_ep import Buffer
from tokenferry.nn import MoELayer
from tokenferry.transports.shared_memory import SharedMemoryTransport

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=16)
X = torch.arange(24.0).reshape(3, 8)
ROUTING = Routing(torch.tensor([[0, 1], [2, -1], [3, 0]]), torch.ones(3, 2))


def layer() -> MoELayer:
    made = MoELayer(ExpertGroup(None, SHAPE, backend="cpu"), ffn_hidden=16)
    made(X).sum().backward()
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: AveragedModel(model).module])
def test_a_copy_of_a_model_shares_the_group(copied):
    model = layer()
    other = copied(model)
    assert other.group is model.group
    assert other(X).equal(model(X))
    if copied is not copy.copy:
        with torch.no_grad():
            other.experts.down.zero_()
        assert model(X).any()
        assert not other(X).any()


def test_a_copy_of_a_buffer_is_the_buffer():
    buffer = Buffer(None)
    assert copy.deepcopy([buffer])[0] is copy.copy(buffer) is buffer


@pytest.mark.parametrize("saved", [lambda thing, path: pickle.dumps(thing), torch.save])
@pytest.mark.parametrize("make", [lambda: ExpertGroup(None, SHAPE), layer, lambda: Buffer(None)])
def test_a_pickle_is_refused_with_a_remedy(make, saved, tmp_path):
    with pytest.raises(PickleError, match=r"(ExpertGroup|Buffer): cannot be pickled, .* save model\.state_dict\(\)"):
        saved(make(), tmp_path / "model.pt")


@pytest.mark.parametrize("expected", [TypeError, pickle.PicklingError, TokenferryError])
def test_handlers_of_pickle_catch_it(expected):
    with pytest.raises(expected):
        pickle.dumps(ExpertGroup(None, SHAPE))


def test_what_is_to_be_saved_loads_into_another_model(tmp_path):
    model, other = layer(), layer()
    with torch.no_grad():
        other.experts.down.zero_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert other(X).equal(model(X))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_plans_are_data(again):
    """A plan that was copied or pickled is one of the same group."""
    group = ExpertGroup(None, SHAPE, backend="cpu")
    sent, decoded = group.dispatch(X, ROUTING), group.decode_dispatch(X, ROUTING)
    assert group.combine(sent.x, again(sent.plan)).x.equal(group.combine(sent.x, sent.plan).x)
    combined = group.decode_combine(decoded.x, again(decoded.plan)).x
    assert combined.equal(group.decode_combine(decoded.x, decoded.plan).x)


# ---------------------------------------------------------------------- dropped without close()


def use_and_drop(*, cycle: bool) -> weakref.ref:
    """Make two connected groups, use them, and drop them with a message and descriptors under way."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pair = SharedMemoryTransport(0, {1: ours}), SharedMemoryTransport(1, {0: theirs})
    exchange(pair, 1, 5000)
    reader, writer = os.pipe()
    pair[0]._peers[1].fds.append(reader)  # as if its notice had not come yet
    os.close(writer)
    groups = [Exchange(transport, 1.0, mask_on_timeout=False) for transport in pair]
    if cycle:
        groups.append(groups)
    return weakref.ref(pair[0])


@pytest.mark.parametrize("cycle", [False, True])
def test_a_dropped_group_takes_everything_along_without_a_warning(cycle):
    gc.collect()
    before = open_descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dropped = use_and_drop(cycle=cycle)
        gc.collect()
    assert dropped() is None
    assert not caught, [str(warning.message) for warning in caught]
    assert open_descriptors() == before


@pytest.mark.parametrize("make", [lambda: ExpertGroup(None, SHAPE, backend="cpu"), lambda: Buffer(None)])
def test_a_dropped_group_of_one_leaves_nothing(make):
    group = make()
    if isinstance(group, ExpertGroup):
        group.decode_dispatch(X, ROUTING, return_hook=True)
    before = weakref.ref(group)
    del group
    gc.collect()
    assert before() is None
