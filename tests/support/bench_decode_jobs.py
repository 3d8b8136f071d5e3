"""Jobs of ranks for the tests of the decode phases."""

from contextlib import ExitStack
from unittest import mock

import torch

from support.bench_jobs import FEW_CALLS
from tokenferry.api import ExpertGroup
from tokenferry.bench.suites import decode, host_time, two_batch_overlap
from tokenferry.types import Quantized


def measure_decode(session):
    """`decode.measure_decode` with few calls where the time of the host is measured."""
    with mock.patch.object(host_time, "CALLS", FEW_CALLS):
        decode.measure_decode(session)


def spoil(result):
    """Change one number of every row that may hold data."""
    with torch.no_grad():
        if isinstance(result.x, Quantized):
            result.x.scale.mul_(1.01)
        else:
            result.x[..., 0].mul_(1.01)
    return result


def wrong_after_timing(session):
    """`measure_decode`; once a case has been timed, combines over the FP8 encoding are wrong, on rank 1 only."""
    right, checked, timed = ExpertGroup.decode_combine, decode._Tokens._checked, []

    def begin(self, case):
        timed.clear()
        return checked(self, case)

    def no_host_time(*args):
        timed.append(args)
        return {"median_us": 1.0}

    def combine(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        return spoil(result) if timed and session.rank == 1 and kwargs["encoding"] == "fp8" else result

    patches = (
        (decode, "host_time", no_host_time),
        (ExpertGroup, "decode_combine", combine),
        (decode._Tokens, "_checked", begin),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        measure_decode(session)


def always_the_same(session):
    """`measure_decode` in which a dispatch alone keeps returning its first results."""
    first, right = {}, decode.StaticInputs.act

    def act(self, case, *, hook):
        if case.call != "dispatch":
            return right(self, case, hook=hook)
        now = right(self, case, hook=hook)
        return first.setdefault((id(self), case, hook), now)

    with mock.patch.object(decode.StaticInputs, "act", act):
        measure_decode(session)


def wrong_dispatch(session):
    """`measure_two_batch` in which rows that a hook receives are wrong, on rank 0 only."""
    right = ExpertGroup.decode_dispatch

    def dispatch(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if not kwargs.get("return_hook") or session.rank != 0:
            return result
        hook = result.hook

        def receive():
            hook()
            spoil(result)

        object.__setattr__(result, "hook", receive)
        return result

    with mock.patch.object(ExpertGroup, "decode_dispatch", dispatch):
        two_batch_overlap.measure_two_batch(session)
