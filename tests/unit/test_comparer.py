"""What ranks of different nodes say about a call, compared while it may still be coming."""

import pytest
import torch

from tokenferry.backends.cuda.across.comparer import Comparer, HeaderAddresses
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.faults import FlightRecorder
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import MismatchError
from tokenferry.kernels.control_block import DISPATCH_WORD, RAIL_SPACE_WORD, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS
from tokenferry.topology import Topology, consecutive

TOPOLOGY = Topology(2, consecutive(6, 2))
"""Rank 2 is on node 1, and its rail is 0, 2, 4."""
SIGNATURE = Signature("decode_combine", layout=3, dtype=4)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


class Said:
    """What all ranks of the rail say about call 9 of this one, which is the same."""

    def __init__(self) -> None:
        words = torch.frombuffer(bytearray(SIGNATURE.words), dtype=torch.int32)
        self.headers = torch.zeros(3, RAIL_WORDS, dtype=torch.int32, device="cpu")
        self.headers[:, :SIGNATURE_WORDS] = words
        self.headers[:, ROWS_WORD], self.headers[:, RAIL_SPACE_WORD] = int32(5, 6, 7), int32(8, 9, 10)
        self.headers[1] = -1  # nothing is read of the own node
        self.comes, self.goes = int32(5, 0, 7), int32(8, 0, 10)
        self.counts, self.epoch = torch.zeros(6, dtype=torch.int64, device="cpu"), int32(0)

    def compare(self, *, plan: bool = True, epoch: bool = False) -> str:
        recorder = FlightRecorder(0, 2)
        recorder.note(9, SIGNATURE)
        at = HeaderAddresses(self.headers.data_ptr())
        if plan:
            goes, comes, counts = (each.data_ptr() for each in (self.goes, self.comes, self.counts))
            at = HeaderAddresses(self.headers.data_ptr(), goes, comes, counts)
        if epoch:
            at = at._replace(epoch=self.epoch.data_ptr())
        comparer = Comparer(torch.device("cpu"), TOPOLOGY, recorder)
        found = comparer.compare(Call(9, 0, False, 1, SIGNATURE, 0), at)
        assert found is None or isinstance(found, MismatchError)
        return str(found or "")


@pytest.mark.parametrize("plan", [False, True])
def test_the_same_call(plan):
    assert Said().compare(plan=plan) == ""


def test_what_has_not_come():
    said = Said()
    said.headers[0] = 0
    said.headers[0, 1] = 77
    assert said.compare() == ""


@pytest.mark.parametrize("node", [0, 2])
@pytest.mark.parametrize(("word", "field"), [(0, "rank {} called warmup"), (1, "layout"), (2, "dtype")])
def test_another_call(node, word, field):
    said = Said()
    said.headers[node, word] += 1
    text = said.compare(plan=False)
    assert f"rank 2 and rank {2 * node} made different calls: {field.format(2 * node)}" in text


@pytest.mark.parametrize("word", [ROWS_WORD, RAIL_SPACE_WORD])
def test_another_plan(word):
    said = Said()
    said.headers[2, word] += 1
    assert said.compare(plan=False) == ""
    assert "rank 4" in said.compare()
    said.counts[0] = -1  # it was aborted: its numbers are undefined
    assert said.compare() == ""


def test_another_dispatch():
    """The epoch stands in the signature of a decode combine, which the host does not know."""
    said = Said()
    said.epoch[0] = 12
    said.headers[:, DISPATCH_WORD] = 12
    assert "rank 0" in said.compare(plan=False)
    assert said.compare(plan=False, epoch=True) == ""
