"""The rival that everybody has: all_to_all_single, with the index work around it as torch users write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.clock import Step
from tokenferry.bench.core.inputs import expert, must_be_near
from tokenferry.bench.core.session import Label, Settings, Trial, nccl_group, trial
from tokenferry.bench.core.static_inputs import (
    Inputs,
    Sizes,
    check_rows,
    data_of,
    draw,
    expected_sums,
    remote_rows,
    scale_of,
    sent_to,
)
from tokenferry.bench.suites.calls import num_variants

WHO = "nccl"
WHAT = "all_to_all_single over NCCL, one row per token and rank, with gather before and index_add after"


@dataclass(frozen=True, slots=True, eq=False)
class NcclPlan:
    """Where rows go: what a plan of dispatch is here.

    Attributes:
        tokens: ``[rows sent]`` int64: the token of each row that leaves, by rank, then token.
        send: Rows to each rank.
        receive: Rows from each rank.
    """

    tokens: Tensor
    send: list[int]
    receive: list[int]


class NcclRival:
    """Dispatch and combine of one rank over a process group that carries the device's tensors."""

    def __init__(self, pg: dist.ProcessGroup, sizes: Sizes) -> None:
        self._pg, self._sizes = pg, sizes
        self.name = WHO if pg.name() == "nccl" else pg.name()

    def plan(self, topk_idx: Tensor) -> NcclPlan:
        """Exchange the counts; waits for them, as the splits have to be known on the host. Collective."""
        here = sent_to(self._sizes, topk_idx).t()
        counts = here.sum(1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self._pg)
        send, receive = torch.stack([counts, received]).tolist()
        return NcclPlan(here.nonzero()[:, 1], send, receive)

    def move(self, plan: NcclPlan, rows: Tensor) -> Tensor:
        """Send ``rows[token]`` to the ranks of each token. Collective."""
        return self._exchange(rows.view(torch.uint8)[plan.tokens], plan.send, plan.receive).view(rows.dtype)

    def dispatch(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> tuple[NcclPlan, list[Tensor]]:
        """Make the plan and send rows, ids and weights."""
        plan = self.plan(inputs.topk_idx)
        meta = torch.cat([inputs.topk_idx.int().view(torch.float32), inputs.topk_weights], 1)
        return plan, [self.move(plan, tensor) for tensor in (*tensors, meta)]

    def combine(self, plan: NcclPlan, y: Tensor) -> Tensor:
        """Send every row home and add up in float32; rounds once."""
        rows = self._exchange(y.view(torch.uint8), plan.receive, plan.send).view(y.dtype)
        total = torch.zeros(self._sizes.tokens, y.shape[1], dtype=torch.float32, device=y.device)
        return total.index_add_(0, plan.tokens, rows.float()).to(y.dtype)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, receive, send, group=self._pg)
        return arrived


def measure_nccl(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the rival for every T; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here, torch.no_grad():
        own = here.attempt("nccl: making a process group", lambda: nccl_group(here))
        if own is None:
            return
        for tokens in settings.tokens:
            here.tell({"now": f"nccl: T={tokens}"})
            _measure(here, NcclRival(own, settings.sizes(tokens)), settings.sizes(tokens))
        here.bed.synchronize()
        dist.destroy_process_group(own)


def _measure(here: Trial, rival: NcclRival, sizes: Sizes) -> None:
    variants, device = num_variants(sizes.tokens), here.bed.device
    sets = [draw(sizes, variant, here.rank, device) for variant in range(variants)]
    plans = here.attempt(f"nccl: plans, T={sizes.tokens}", lambda: [rival.plan(one.topk_idx) for one in sets])
    if plans is None:
        return
    out, home = remote_rows(sizes, variants, here.rank, device)
    fp8_bytes = sizes.hidden + 4 * (sizes.hidden // 128)
    label = Label(rival.name, "", "bf16", sizes.tokens, sizes.routing, None, "store", 2 * sizes.hidden, out)

    def rows_of(one: Inputs, *, fp8: bool) -> tuple[Tensor, ...]:
        return (one.data, one.scale) if fp8 else (one.x,)

    def check(what: str, v: int, got: list[Tensor], *, fp8: bool) -> None:
        picks: tuple[Callable[[Inputs], Tensor], ...] = (data_of, scale_of) if fp8 else (lambda i: i.x,)
        check_rows(f"nccl: {what}", sizes, v, here.rank, tuple(zip(got, picks, strict=False)))

    def kept(*, fp8: bool) -> Step:
        for v, one in enumerate(sets):
            check("plan kept", v, [rival.move(plans[v], rows) for rows in rows_of(one, fp8=fp8)], fp8=fp8)
        return lambda i: [rival.move(plans[i % variants], rows) for rows in rows_of(sets[i % variants], fp8=fp8)]

    def whole(*, fp8: bool) -> Step:
        for v, one in enumerate(sets):
            check("dispatch", v, rival.dispatch(one, rows_of(one, fp8=fp8))[1], fp8=fp8)
        return lambda i: rival.dispatch(sets[i % variants], rows_of(sets[i % variants], fp8=fp8))

    def combine() -> Step:
        ys = [expert(rival.move(plans[v], one.x), here.rank) for v, one in enumerate(sets)]
        for v, one in enumerate(sets):
            expected = expected_sums(sizes, one).float()
            # Another order of additions in float32, then one rounding: at most a unit in the last place apart.
            size = expected_sums(sizes, replace(one, x=one.x.abs())).float()
            near = size * 2.0**-20
            must_be_near(
                "nccl: combine", rival.combine(plans[v], ys[v]).float(), expected, relative=2.0**-7, absolute=near
            )
        return lambda i: rival.combine(plans[i % variants], ys[i % variants])

    here.case(replace(label, call="dispatch, plan kept", rows="fp8", row_bytes=fp8_bytes), lambda: kept(fp8=True))
    here.case(replace(label, call="dispatch, plan kept"), lambda: kept(fp8=False))
    here.case(replace(label, call="dispatch", rows="fp8", row_bytes=fp8_bytes), lambda: whole(fp8=True))
    here.case(replace(label, call="dispatch"), lambda: whole(fp8=False))
    here.case(replace(label, call="combine", link="load", rows_out=home), combine)
