"""A program with calls of `ElasticBuffer` of every kind, in states of torch that must change none of its results."""

from typing import Any

import torch
from torch import Tensor

from support.ambient import STATES, same
from support.deep_ep_elastic_jobs import MODES, Deal, of_ranks
from tokenferry.compat.deep_ep import ElasticBuffer
from tokenferry.testing.cases import Case

CASE = Case((4, 3), experts=4, top_k=2, hidden=32, routing="half_dropped")
MOST = 8
FIELDS = (
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "dst_buffer_slot_idx",
)


def program(rank: int, pg: Any) -> dict[str, Tensor]:
    """Return what is defined of all results. Collective."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=MOST, hidden=CASE.hidden)
    results = {}
    for mode in MODES:
        deal = Deal(rank, of_ranks(CASE, pg.size()), mode, MOST)
        x, y, weights = deal.mine.x, deal.answers()[rank], deal.returned_weights()[rank]
        scale = CASE.rows(rank, torch.float32, 3, 2)
        (data, scales), _, _, handle, _ = buffer.dispatch(
            (x, scale), use_tma_aligned_col_major_sf=True, **deal.arguments()
        )
        got, ids, gates, _, _ = buffer.dispatch(
            x, handle=handle, topk_weights=deal.mine.topk_weights, do_expand=mode.expand
        )
        out, back, _ = buffer.combine(y, handle, topk_weights=weights, bias=(x, x))
        delivered = {"data": data, "scales": scales, "got": got, "gates": gates}
        found = {name: value[deal.places] for name, value in delivered.items()}
        found |= {"out": out, "back": back} | {name: getattr(handle, name) for name in FIELDS}
        found["source"] = handle.recv_src_metadata[: len(deal.received), 0]
        if ids is not None:
            found["ids"] = ids[: len(deal.received)]
        results |= {f"{mode} {name}": value for name, value in found.items()}
    buffer.barrier()
    return results


def compare(rank: int, pg: Any, name: str) -> int:
    """Return how many results are the same in a state of torch as without it."""
    plain = program(rank, pg)
    with STATES[name].of_the_process(), STATES[name].of_a_thread("cpu"):
        found = program(rank, pg)
    return same(found, plain)
