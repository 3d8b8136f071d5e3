"""A group for tests whose tensors are on the CPU: it copies arguments to the device, and ``out`` back."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenferry import Combined, DecodeCombined, DecodeDispatched, DecodeStats, Dispatched, ExpertGroup

_T = TypeVar("_T")


class OnDevice(ExpertGroup):
    """An ExpertGroup that takes CPU tensors, whatever its device; results stay on the device.

    The rows that it copied to the device are overwritten as soon as the call has returned, which every call allows.
    Results in ``out`` and in counters are copied back to the caller's own tensors.
    """

    def dispatch(self, x, routing, **options) -> Dispatched:
        x, fresh = self._rows(x)
        return _spoil(fresh, super().dispatch(x, self._moved(routing), **options))

    def redispatch(self, x, plan, *, topk_weights=None, **options) -> Dispatched:
        x, fresh = self._rows(x)
        weights = self._moved(topk_weights)
        return _spoil(fresh, super().redispatch(x, self._moved(plan), topk_weights=weights, **options))

    def combine(self, y, plan, *, topk_weights=None, bias=None, out=None, **options) -> Combined:
        y, fresh = self._rows(y)
        there = self._moved(out)
        more = {"topk_weights": self._moved(topk_weights), "bias": self._moved(bias), "out": there}
        got = _spoil(fresh, super().combine(y, self._moved(plan), **more, **options))
        if out is there:
            return got
        return replace(got, x=_brought_back(out, there, got.x))

    def decode_dispatch(self, x, routing, *, stats=None, **options) -> DecodeDispatched:
        x, fresh = self._rows(x)
        counters = self._moved(stats)
        got = _spoil(fresh, super().decode_dispatch(x, self._moved(routing), stats=counters, **options))
        return _after(got, lambda: _count(stats, counters), hooked=options.get("return_hook", False))

    def decode_combine(self, y, plan, *, out=None, stats=None, **options) -> DecodeCombined:
        y, fresh = self._rows(y)
        there, counters = self._moved(out), self._moved(stats)
        got = _spoil(fresh, super().decode_combine(y, self._moved(plan), out=there, stats=counters, **options))

        def bring_back() -> None:
            _count(stats, counters)
            if out is not there:
                _brought_back(out, there, got.x)

        done = _after(got, bring_back, hooked=options.get("return_hook", False))
        return done if out is there else replace(done, x=out)

    def _rows(self, x: _T) -> tuple[_T, list[Tensor]]:
        """Return the rows on the device, and those of their tensors that are copies."""
        moved = self._moved(x)
        return moved, [there for here, there in zip(_tensors(x), _tensors(moved), strict=True) if here is not there]

    def _moved(self, value: _T) -> _T:
        """Return the value with its CPU tensors copied to the device, with the same strides."""
        if isinstance(value, Tensor):
            here = value.device.type == "cpu" and self.device.type != "cpu"
            return _carried(value, self.device) if here else value
        if isinstance(value, tuple):
            return tuple(self._moved(one) for one in value)
        if is_dataclass(value) and not isinstance(value, type):
            old = {field.name: getattr(value, field.name) for field in fields(value)}
            new = {name: self._moved(one) for name, one in old.items()}
            return replace(value, **new) if any(new[name] is not old[name] for name in old) else value
        return value


def _carried(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor.to(device)
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)  # a tensor that requires grad gives one that does


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []


def _spoil(fresh: list[Tensor], result: _T) -> _T:
    """Overwrite the copies of rows; the device does so in stream order."""
    for tensor in fresh:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor.detach().fill_(torch.nan)
        else:
            tensor.view(torch.uint8).fill_(0x7F) if tensor.is_contiguous() else tensor.zero_()
    return result


def _brought_back(out: Tensor, there: Tensor, result: Tensor) -> Tensor:
    assert result.data_ptr() == there.data_ptr(), "the sum is not in out"
    return out.copy_(there)


def _count(stats: DecodeStats | None, there: DecodeStats | None) -> None:
    if stats is there or stats is None or there is None:
        return
    for name in ("received", "wait_ns"):
        if getattr(stats, name) is not None:
            getattr(stats, name).copy_(getattr(there, name))


def _after(result: _T, do: Callable[[], None], *, hooked: bool) -> _T:
    """Call ``do`` when the result is complete: now, or in its hook."""
    if not hooked:
        do()
        return result

    def hook() -> None:
        result.hook()
        do()

    return replace(result, hook=hook)
