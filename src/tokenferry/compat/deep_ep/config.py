"""`Config`: the tuning numbers of DeepEP's V1 kernels, their defaults, and the buffer sizes that follow from them.

They do not change what tokenferry sends: it has no channels and no ring buffers. The class keeps DeepEP's rules so that
programs can compute the sizes that they pass to `Buffer`: inside nodes by DeepEP's formula, between nodes what is used
here. A hint is asked for without a group, so it takes nodes of TOKENFERRY_RANKS_PER_NODE ranks, or if that is not set
of eight, as DeepEP does.
"""

from __future__ import annotations

from tokenferry import env
from tokenferry.errors import ConfigError

_RANKS_PER_NODE = 8
"""Number of ranks of a node in DeepEP V1."""

_SOURCE_BYTES = 8
"""Source rank and source token of a row, int32 each."""

_ROW_EXTRA_BYTES = _SOURCE_BYTES + 128 * 8 + 128 * 4 + 128 * 4
"""Bytes sent with a row: its source, and up to 128 expert ids (int64), gate weights and scales (float32)."""

MAX_CHOICES = 64
"""The most choices of a token, K, on GPUs: a hint is asked for without it."""

# R: (nvl_send, nvl_recv, rdma_send, rdma_recv), as DeepEP publishes them.
_DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


class Config:
    """Tuning numbers of DeepEP's V1 kernels; `Buffer.dispatch` and `Buffer.combine` accept them. Local.

    Args:
        num_sms: SMs of a kernel, an even number; there are half as many channels.
        num_max_nvl_chunked_send_tokens: Tokens sent at once over NVLink; fewer than a channel can hold.
        num_max_nvl_chunked_recv_tokens: Tokens that an NVLink channel can hold.
        num_max_rdma_chunked_send_tokens: Tokens sent at once over RDMA; at most half of what a channel can hold.
        num_max_rdma_chunked_recv_tokens: Tokens that an RDMA channel can hold; rounded up to a multiple of
            those sent at once.

    Raises:
        ConfigError: a number breaks one of these rules; names it.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        check_num_sms("Config", num_sms)
        for name, value in (
            ("num_max_nvl_chunked_send_tokens", nvl_send),
            ("num_max_nvl_chunked_recv_tokens", nvl_recv),
            ("num_max_rdma_chunked_send_tokens", rdma_send),
            ("num_max_rdma_chunked_recv_tokens", rdma_recv),
        ):
            if type(value) is not int:
                raise ConfigError(f"Config: {name}: expected an integer, got {value!r}")
        if not 0 < nvl_send < nvl_recv:
            raise ConfigError(
                f"Config: num_max_nvl_chunked_send_tokens: expected 1 .. {nvl_recv - 1}, fewer than "
                f"num_max_nvl_chunked_recv_tokens={nvl_recv}, got {nvl_send}"
            )
        if rdma_send < 1 or rdma_recv < 1:
            raise ConfigError(
                "Config: num_max_rdma_chunked_send_tokens and num_max_rdma_chunked_recv_tokens: expected positive "
                f"integers, got {rdma_send} and {rdma_recv}"
            )
        rdma_recv = round_up(rdma_recv, rdma_send)
        if rdma_send > rdma_recv // 2:
            raise ConfigError(
                f"Config: num_max_rdma_chunked_send_tokens: expected at most {rdma_recv // 2}, half of "
                f"num_max_rdma_chunked_recv_tokens={rdma_recv}, got {rdma_send}"
            )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = nvl_send
        self.num_max_nvl_chunked_recv_tokens = nvl_recv
        self.num_max_rdma_chunked_send_tokens = rdma_send
        self.num_max_rdma_chunked_recv_tokens = rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes that DeepEP needs as ``num_nvl_bytes``, for traffic within nodes. Local.

        Args:
            hidden_bytes: Bytes of a row, ``H * max(element_size, 2)``.
            num_ranks: Number of ranks, R; any.

        Raises:
            ConfigError: a number is not an integer, or negative.
        """
        _check_sizes("Config.get_nvl_buffer_size_hint", hidden_bytes, num_ranks)
        return nvl_buffer_size_hint(self, hidden_bytes, num_ranks, _ranks_per_node())

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return 0, the bytes that `Buffer.dispatch` and `Buffer.combine` use of ``num_rdma_bytes``. Local.

        There are no channels between nodes for which memory would be reserved: on any number of nodes a call takes
        memory for the rows that cross, and gives it back. For low-latency calls there is another hint,
        `Buffer.get_low_latency_rdma_size_hint`.

        Args:
            hidden_bytes: Bytes of a row, ``H * max(element_size, 2)``; any.
            num_ranks: Number of ranks, R; any.

        Raises:
            ConfigError: a number is not an integer, or negative.
        """
        _check_sizes("Config.get_rdma_buffer_size_hint", hidden_bytes, num_ranks)
        return 0

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """Return DeepEP's defaults for `Buffer.dispatch`; for an R that it does not list, those of the next larger one."""
    return Config(num_sms, *_nearest(_DISPATCH, num_ranks))


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """Return DeepEP's defaults for `Buffer.combine`; for an R that it does not list, as `dispatch_config`."""
    return Config(num_sms, *_nearest(_COMBINE, num_ranks))


def nvl_buffer_size_hint(config: Config, hidden_bytes: int, num_ranks: int, per_node: int) -> int:
    """Return what DeepEP V1's ``get_nvl_buffer_size_hint`` gives for channels inside nodes of so many ranks."""
    nvl_ranks, nodes = min(num_ranks, per_node), -(-num_ranks // per_node)
    channel = (2 * nodes + 3) * 4 + config.num_max_nvl_chunked_recv_tokens * (hidden_bytes + _ROW_EXTRA_BYTES)
    return round_up(config.num_sms // 2 * nvl_ranks * channel, 128)


def rdma_buffer_size_hint(config: Config, hidden_bytes: int, num_ranks: int, per_node: int) -> int:
    """Return what its ``get_rdma_buffer_size_hint`` gives for channels between such nodes, in bytes; 0 for one node."""
    nodes = -(-num_ranks // per_node)
    if nodes <= 1:
        return 0
    channel = (2 * per_node + 2) * 4 + config.num_max_rdma_chunked_recv_tokens * (hidden_bytes + _ROW_EXTRA_BYTES)
    return round_up(config.num_sms // 2 * nodes * 2 * channel, 128)


def low_latency_rdma_size_hint(max_tokens: int, hidden: int, num_experts: int) -> int:
    """Return the exact result of DeepEP V1's ``get_low_latency_rdma_size_hint``, in bytes."""
    scale_bytes = hidden // 128 * 4
    dispatch_row = 16 + max(2 * hidden, hidden + scale_bytes)
    combine_row = scale_bytes + 2 * hidden
    send = max(max_tokens * dispatch_row, num_experts * max_tokens * combine_row)
    receive = num_experts * max_tokens * max(dispatch_row, combine_row)
    total = 2 * send + 2 * receive + 2 * round_up(4 * num_experts, 128)
    return (total + 128) // 128 * 128


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Return the bytes for low-latency calls: one node as DeepEP V1, several what two levels take.

    Two levels have a slot for each other node and each of M tokens, rounded up to a multiple of eight, to send and to
    receive, twice: for a row with a header in a dispatch, and for a row in a combine, with the weights. With
    TOKENFERRY_NETWORK=nvshmem messages of one call are put where those of another one were, and there is memory for
    the own node, too.
    """
    others = -(-num_ranks // _ranks_per_node()) - 1
    if others < 1:
        return low_latency_rdma_size_hint(max_tokens, hidden, num_experts)
    choices = min(num_experts, MAX_CHOICES)
    id_bytes = 2 if num_experts < 1 << 15 else 4
    record = 2 * hidden + round_up(4 + choices * (id_bytes + 4), 16)
    if env.read_one("network") == "nvshmem":
        row = max(record, 672 * -(-hidden // 512))  # what sums are encoded in has no part of 512 columns
        message = round_up(max_tokens, 8) * row
        return round_up(2 * 2 * (others + 1) * (message + message // 1024 + 1024), 128)  # heads and flags are less
    return round_up(2 * 2 * others * round_up(max_tokens, 8) * (record + 2 * hidden + 4 * choices), 128)


def check_num_sms(call: str, num_sms: int, name: str = "num_sms") -> None:
    """Raise ConfigError unless ``num_sms``, which the caller calls ``name``, is an even number of SMs."""
    if not isinstance(num_sms, int) or num_sms < 0 or num_sms % 2:
        raise ConfigError(f"{call}: {name}: expected an even number of SMs, 0 or more, got {num_sms!r}")


def _check_sizes(call: str, hidden_bytes: int, num_ranks: int) -> None:
    for name, value in (("hidden_bytes", hidden_bytes), ("num_ranks", num_ranks)):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{call}: {name}: expected an integer of at least 0, got {value!r}")


def round_up(value: int, multiple: int) -> int:
    """Round ``value`` up to a multiple of ``multiple``."""
    return -(-value // multiple) * multiple


def _nearest(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, int, int, int]:
    return table[min((r for r in table if r >= num_ranks), default=max(table))]


def _ranks_per_node() -> int:
    # Megatron-Core asks in every call how large a Buffer has to be.
    return env.read_one("ranks_per_node") or _RANKS_PER_NODE
