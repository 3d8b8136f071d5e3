"""The baseline inside torch: symm_mem.all_to_all_vdev_2d on NVSHMEM, a row per token and expert.

Counts stay on the device.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.inputs import Inputs, Sizes, remote_rows
from tokenferry.bench.core.session import Label, Session, baseline_group, expert_group
from tokenferry.bench.core.sets import Sets, num_variants
from tokenferry.bench.suites.calls import BY_EXPERT, groups_of
from tokenferry.errors import BackendUnavailable
from tokenferry.types import Dispatched, DispatchOptions, Layout

NAME = "vdev_2d"
MAX_LOCAL_EXPERTS = 16
"""The most experts of a rank that all_to_all_vdev_2d of torch 2.11 takes."""


class VdevBaseline:
    """Rows sorted by expert, exchanged by all_to_all_vdev_2d. Making it is collective.

    Raises:
        BackendUnavailable: this torch, or this machine, has no NVSHMEM backend.
    """

    def __init__(self, group: dist.ProcessGroup, sizes: Sizes, device: torch.device) -> None:
        try:
            import torch.distributed._symmetric_memory as symm_mem

            symm_mem.set_backend("NVSHMEM")
        except (ImportError, AttributeError, RuntimeError) as error:
            raise BackendUnavailable(f"torch's symmetric memory has no NVSHMEM backend session: {error}") from error
        self._sizes, self._name = sizes, group.group_name
        self._experts = torch.arange(sizes.experts, device=device, dtype=torch.int64)
        rows = sizes.tokens * sizes.top_k
        # The worst routing sends every row to one rank; that much is not needed for uniform ones.
        most_received = rows * min(sizes.ranks, 2) + 1024

        def shared(*size: int, dtype: torch.dtype) -> Tensor:
            tensor: Tensor = symm_mem.empty(*size, dtype=dtype, device=device)
            symm_mem.rendezvous(tensor, group=self._name)
            return tensor

        self.rows = shared(rows, sizes.hidden, dtype=torch.bfloat16)
        self.out = shared(most_received, sizes.hidden, dtype=torch.bfloat16)
        self.splits = shared(sizes.experts, dtype=torch.int64)
        self.arrived = shared(2, sizes.experts, dtype=torch.int64)

    def dispatch(self, inputs: Inputs) -> None:
        """Sort the rows by expert into shared memory, and exchange them; waits for nothing."""
        chosen, order = inputs.topk_idx.flatten().sort(stable=True)
        torch.index_select(inputs.x, 0, order // self._sizes.top_k, out=self.rows)
        ends = torch.searchsorted(chosen, self._experts, right=True)
        self.splits.copy_(ends.diff(prepend=ends.new_zeros(1)))
        torch.ops.symm_mem.all_to_all_vdev_2d(self.rows, self.out, self.splits, self.arrived, self._name)

    def groups(self) -> list[Tensor]:
        """Return the rows of each local expert, after `dispatch`; waits for the counts."""
        splits, offsets = self.arrived.tolist()
        pieces = [self.out[at : at + count] for at, count in zip(offsets, splits, strict=True)]
        ranks = self._sizes.ranks
        return [torch.cat(pieces[first : first + ranks]) for first in range(0, len(pieces), ranks)]


@torch.no_grad()
def measure_vdev(session: Session) -> None:
    """Measure the baseline, and dispatch of the same rows by expert."""
    settings = session.settings
    sizes = replace(settings.sizes(settings.sweep_tokens), experts=MAX_LOCAL_EXPERTS * settings.ranks)
    _measure_ours(session, sizes)
    group = session.attempt("vdev_2d: making a process group", baseline_group, session)
    if group is None:
        return
    made = session.attempt("vdev_2d: starting NVSHMEM", VdevBaseline, group, sizes, session.device.torch_device)
    if made is not None:
        _measure_baseline(session, made, sizes)


def _label(session: Session, sizes: Sizes, library: str, call: str) -> Label:
    out, _ = remote_rows(sizes, num_variants(sizes.tokens), session.rank, session.device.torch_device)
    note = f"E={sizes.experts}"
    return Label(library, call, "bf16", sizes.tokens, sizes.routing, None, "store", 2 * sizes.hidden, out, note)


def _measure_baseline(session: Session, made: VdevBaseline, sizes: Sizes) -> None:
    sets = Sets(session, sizes)

    def groups(_: None) -> list[Tensor]:
        session.device.synchronize()
        return made.groups()

    prepare = partial(sets.expert_step, "vdev_2d", lambda v: made.dispatch(sets.inputs[v]), groups)
    session.case(_label(session, sizes, NAME, "dispatch, by expert"), prepare)


def _measure_ours(session: Session, sizes: Sizes) -> None:
    sets = Sets(session, sizes)
    routings = [one.routing for one in sets.inputs]
    device_counts = DispatchOptions(Layout.EXPERTS, counts="device")
    with ExitStack() as stack:
        opened = expert_group(session, sizes.tokens, sizes.experts, heap_for=sizes.top_k)
        what = "tokenferry: group of the shape that vdev_2d takes"
        group = session.attempt(what, stack.enter_context, opened)
        if group is None:
            return
        names = {"dispatch, by expert": BY_EXPERT, "dispatch, by expert, counts on device": device_counts}
        for name, options in names.items():

            def call(v: int, options: DispatchOptions = options) -> Dispatched[Tensor]:
                return group.dispatch(sets.inputs[v].x, routings[v], options=options)

            prepare = partial(sets.expert_step, "dispatch, EXPERTS", call, groups_of)
            session.case(_label(session, sizes, "tokenferry", name), prepare)
