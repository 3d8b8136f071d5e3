"""The buffers that programs for DeepEP's V1 make for calls across nodes."""

from __future__ import annotations

from tokenferry.bench.core.inputs import Sizes
from tokenferry.compat.deep_ep import Buffer
from tokenferry.compat.deep_ep.config import nvl_buffer_size_hint, rdma_buffer_size_hint


def v1_hints(sizes: Sizes, per_node: int) -> dict[str, int]:
    """Return the bytes that V1 asks for, with its default configs, on such nodes: for NVLink, and for the network."""
    configs = [Buffer.get_dispatch_config(sizes.ranks), Buffer.get_combine_config(sizes.ranks)]
    row_bytes = 2 * sizes.hidden
    return {
        "v1_nvl_bytes": max(nvl_buffer_size_hint(config, row_bytes, sizes.ranks, per_node) for config in configs),
        "v1_rdma_bytes": max(rdma_buffer_size_hint(config, row_bytes, sizes.ranks, per_node) for config in configs),
    }
