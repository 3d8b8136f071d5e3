"""Tensors that are made without the dispatcher of torch: the same as those of `torch.empty_strided`."""

from types import SimpleNamespace

import pytest
import torch

from tokenferry.memory import empty
from tokenferry.memory.empty import Blank, contiguous, empty_on, part_of

CPU = torch.device("cpu")
BLANKS = [
    contiguous(torch.int32, 7),
    contiguous(torch.bfloat16, 2, 3, 16),
    contiguous(torch.float32, 0, 4),
    contiguous(torch.bool, 3, 0, 2),
    Blank((2, 6, 3), (18, 1, 6), torch.float8_e4m3fn),
]


@pytest.fixture(params=["known", "another"])
def version(request, monkeypatch):
    """A version of torch whose private functions are known, and one where they may not exist."""
    if request.param == "another":
        monkeypatch.setattr(empty, "_guards", None)
    else:
        assert empty._guards is not None, "tests run on known versions of torch"
    return request.param


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("blank", BLANKS)
def test_tensors_are_those_of_torch(version, blank, inference):
    with torch.inference_mode(inference):
        made = empty_on(CPU)(*blank)
        want = torch.empty_strided(blank.size, blank.strides, dtype=blank.dtype, device=CPU)
    for name in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(made, name) == getattr(want, name), name
    assert made.stride() == want.stride()
    assert made.is_inference() == want.is_inference() == inference
    assert made.untyped_storage().nbytes() == want.untyped_storage().nbytes()


@pytest.mark.parametrize("size", [(), (5,), (2, 3), (0, 3), (2, 0, 4)])
def test_strides_are_those_of_torch(size):
    assert contiguous(torch.int8, *size).strides == torch.empty(size, device=CPU).stride()


@pytest.mark.parametrize("current", [0, 1])
def test_another_current_device(monkeypatch, current):
    """The private function makes its tensors on the current device, whichever that is."""
    monkeypatch.setattr(empty, "_guards", SimpleNamespace(_empty_strided_cuda=lambda *what: ("current", what)))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(torch, "empty_strided", lambda *what, dtype, device: (device, (*what, dtype)))
    made = empty_on(torch.device("cuda", 1))((2,), (1,), torch.int8)
    assert made == ("current" if current else torch.device("cuda", 1), ((2,), (1,), torch.int8))


@pytest.mark.parametrize(("made", "read"), [(True, True), (True, False), (False, True), (False, False)])
def test_parts(version, made, read):
    """Whoever reads a part first decides nothing: it is an inference tensor only if the whole is one."""
    with torch.inference_mode(made):
        whole = torch.arange(6, dtype=torch.int32, device=CPU)
    with torch.inference_mode(read):
        part = part_of(whole, 2, (2, 2), (2, 1))
    assert part.tolist() == [[2, 3], [4, 5]]
    assert part.data_ptr() == whole.data_ptr() + 8
    assert part.is_inference() == whole.is_inference() == made
