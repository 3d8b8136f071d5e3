"""Calls of two threads at once on CPUs: the second one is refused, and neither is wrong."""

import threading
from unittest import mock

import pytest
import torch

from tokenferry import ArgumentError, ExpertGroup, MoeShape, Routing
from tokenferry.backends.cpu.exchange import Exchange

X, WHERE = torch.ones(2, 8), Routing(torch.tensor([[0], [1]]), torch.ones(2, 1))


def refusal(function) -> str:
    """Return what a function raises in another thread."""
    said = []

    def run() -> None:
        with pytest.raises(ArgumentError) as caught:
            function()
        said.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    return said[0]


@pytest.mark.parametrize("hooked", [False, True], ids=["call", "hook"])
def test_a_second_thread_is_refused(hooked):
    with ExpertGroup(None, MoeShape(2, 1, 8, 4), backend="cpu") as group:
        sent = group.dispatch(X, WHERE)
        first = group.decode_dispatch(X, WHERE, return_hook=hooked)
        entered, said = Exchange.catch_up, []

        def catch_up(self, *args) -> None:
            entered(self, *args)
            if not said:
                said.append("")
                said.append(refusal(lambda: group.combine(sent.x, sent.plan)))
                said.append(refusal(group.decode_dispatch(X, WHERE, return_hook=True).hook) if hooked else "")

        with mock.patch.object(Exchange, "catch_up", catch_up):
            if hooked:
                first.hook()
            else:
                group.dispatch(X, WHERE)
        assert said[1].startswith("combine: another thread is in a call of this group; ")
        if hooked:
            assert said[2].startswith("decode_dispatch: another thread is in a call of this group; ")
        assert torch.equal(group.combine(sent.x, sent.plan).x, X)
