"""The rival inside torch: symm_mem.all_to_all_vdev_2d on NVSHMEM: a row per token and expert, counts on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.clock import Step
from tokenferry.bench.core.session import Label, Settings, Trial, expert_group, nccl_group, trial
from tokenferry.bench.core.static_inputs import Inputs, Sizes, check_by_expert, draw, remote_rows
from tokenferry.bench.suites.calls import BY_EXPERT, groups_of, num_variants
from tokenferry.errors import BackendUnavailable
from tokenferry.types import DispatchOptions, Layout, Routing

WHO = "vdev_2d"
MAX_LOCAL_EXPERTS = 16
"""What all_to_all_vdev_2d of torch 2.11 takes on each rank."""


class VdevRival:
    """Rows sorted by expert, exchanged by all_to_all_vdev_2d. Making it is collective.

    Raises:
        BackendUnavailable: this torch, or this machine, has no NVSHMEM backend.
    """

    def __init__(self, group: dist.ProcessGroup, sizes: Sizes, device: torch.device) -> None:
        try:
            import torch.distributed._symmetric_memory as symm_mem

            symm_mem.set_backend("NVSHMEM")
        except (ImportError, AttributeError, RuntimeError) as error:
            raise BackendUnavailable(f"torch's symmetric memory has no NVSHMEM backend here: {error}") from error
        self._sizes, self._name = sizes, group.group_name
        self._experts = torch.arange(sizes.experts, device=device)
        rows = sizes.tokens * sizes.top_k
        # The worst routing sends every row to one rank; that much is not needed for uniform ones.
        room = rows * min(sizes.ranks, 2) + 1024

        def shared(*size: int, dtype: torch.dtype) -> Tensor:
            tensor: Tensor = symm_mem.empty(*size, dtype=dtype, device=device)
            symm_mem.rendezvous(tensor, group=self._name)
            return tensor

        self.rows = shared(rows, sizes.hidden, dtype=torch.bfloat16)
        self.out = shared(room, sizes.hidden, dtype=torch.bfloat16)
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
        """The rows of each local expert, after `dispatch`; waits for the counts."""
        splits, offsets = self.arrived.tolist()
        pieces = [self.out[at : at + count] for at, count in zip(offsets, splits, strict=True)]
        ranks = self._sizes.ranks
        return [torch.cat(pieces[first : first + ranks]) for first in range(0, len(pieces), ranks)]


def measure_vdev(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the rival, and dispatch of the same rows by expert; a job of `World`. Results go to the news."""
    sizes = replace(settings.sizes(settings.sweep_tokens), experts=MAX_LOCAL_EXPERTS * settings.ranks)
    with trial(rank, pg, news, settings) as here, torch.no_grad():
        _measure_ours(here, sizes)
        group = here.attempt("vdev_2d: making a process group", lambda: nccl_group(here))
        if group is None:
            return
        made = here.attempt("vdev_2d: starting NVSHMEM", lambda: VdevRival(group, sizes, here.bed.device))
        if made is not None:
            _measure_rival(here, made, sizes)


def _label(here: Trial, sizes: Sizes, who: str, call: str) -> Label:
    out, _ = remote_rows(sizes, num_variants(sizes.tokens), here.rank, here.bed.device)
    note = f"E={sizes.experts}"
    return Label(who, call, "bf16", sizes.tokens, sizes.routing, None, "store", 2 * sizes.hidden, out, note)


def _sets(here: Trial, sizes: Sizes) -> list[Inputs]:
    return [draw(sizes, variant, here.rank, here.bed.device) for variant in range(num_variants(sizes.tokens))]


def _measure_rival(here: Trial, made: VdevRival, sizes: Sizes) -> None:
    sets = _sets(here, sizes)

    def prepare() -> Step:
        for v, one in enumerate(sets):
            made.dispatch(one)
            here.bed.synchronize()
            check_by_expert("vdev_2d", sizes, v, here.rank, made.groups())
        return lambda i: made.dispatch(sets[i % len(sets)])

    here.case(_label(here, sizes, WHO, "dispatch, by expert"), prepare)


def _measure_ours(here: Trial, sizes: Sizes) -> None:
    sets = _sets(here, sizes)
    routings = [Routing(one.topk_idx, one.topk_weights) for one in sets]
    device_counts = DispatchOptions(Layout.EXPERTS, counts="device")

    def work() -> None:
        with expert_group(here, sizes.tokens, sizes.experts, room=sizes.top_k) as group:
            for call, options in (
                ("dispatch, by expert", BY_EXPERT),
                ("dispatch, by expert, counts on device", device_counts),
            ):

                def prepare(options: DispatchOptions = options) -> Step:
                    for v, (one, routing) in enumerate(zip(sets, routings, strict=True)):
                        sent = group.dispatch(one.x, routing, options=options)
                        check_by_expert("dispatch, EXPERTS", sizes, v, here.rank, groups_of(sent))
                    n = len(sets)
                    return lambda i: group.dispatch(sets[i % n].x, routings[i % n], options=options)

                here.case(_label(here, sizes, "tokenferry", call), prepare)

    here.attempt("tokenferry: group of the shape that vdev_2d takes", work)
