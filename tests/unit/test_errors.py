"""The exception tree: its branches, and exceptions that are pickled."""

import gc
import inspect
import pickle
import weakref
from unittest import mock

import pytest
import torch

import tokenferry
from tokenferry import ExpertGroup, MoeShape, Routing, errors
from tokenferry.backends.cpu.exchange import CallKind
from tokenferry.backends.cuda.signature import KINDS
from tokenferry.transports import handshake

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


def make(kind: type[Exception]) -> Exception:
    if kind is errors.PeerTimeout:
        return kind("dispatch #7: rank 1 waited", phase="dispatch", call=7, rank=1, peers=(2, 5), waited_s=30.5)
    if kind is errors.ResourceError:
        return kind("dispatch #7: rank 1: file descriptors refused", resource="file descriptors", errno=24)
    return kind("x: expected 1, got 2")


@pytest.mark.parametrize("kind", CLASSES)
def test_pickle_keeps_everything(kind):
    error = make(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_a_refused_call_keeps_no_memory():
    """A program that frees some and tries again with less must not wait for Python's collector."""
    gc.disable()
    try:
        with ExpertGroup(None, MoeShape(2, 1, 16, 4), backend="cpu") as group:
            sent = group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0], [1]])))

            def call() -> weakref.ref[torch.Tensor]:
                activations = torch.zeros(3)
                with (
                    mock.patch.object(group._backend, "empty_rows", side_effect=MemoryError),
                    pytest.raises(errors.ResourceError),
                ):
                    group.empty_rows(sent.plan)
                return weakref.ref(activations)

            assert call()() is None
    finally:
        gc.enable()


def test_all_phases_of_a_timeout_are_documented():
    """Those of both backends, and of groups that are being made."""
    names = {*(kind.name for kind in CallKind), *KINDS[1:], handshake._CALL.phase}
    assert {name for name in names if f'``"{name}"``' not in errors.PeerTimeout.__doc__} == set()


def test_a_timeout_has_the_ranks_that_waited_and_were_missed():
    error = make(errors.PeerTimeout)
    assert (error.phase, error.call, error.rank, error.peers, error.waited_s) == ("dispatch", 7, 1, (2, 5), 30.5)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_root_catches_all(kind):
    assert issubclass(kind, errors.TokenferryError)
    assert getattr(tokenferry, kind.__name__) is kind
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ShapeError, errors.ArgumentError),
        (errors.RoutingError, errors.ArgumentError),
        (errors.CapacityError, errors.ArgumentError),
        (errors.PlanError, errors.ArgumentError),
        (errors.ConfigError, ValueError),
        (errors.BackendUnavailable, RuntimeError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.MismatchError, RuntimeError),
        (errors.PeerTimeout, TimeoutError),
        (errors.ResourceError, OSError),
        (errors.ClosedError, RuntimeError),
        (errors.PickleError, TypeError),
        (errors.PickleError, pickle.PicklingError),
    ],
)
def test_handlers_of_builtin_exceptions_catch_them_too(kind, parent):
    assert issubclass(kind, parent)


def test_the_drawing_names_every_class():
    for kind in CLASSES:
        assert f" {kind.__name__} " in errors.__doc__ or kind is errors.TokenferryError
