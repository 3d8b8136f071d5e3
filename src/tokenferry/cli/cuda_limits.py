"""The sizes that backend cuda takes at most, for commands that estimate its calls without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from tokenferry.kernels.control_block import MAX_EXPERTS, MAX_NODES, MAX_RANKS, MAX_TOP_K
from tokenferry.types import MoeShape

MAX_DECODE_TOKENS = 1 << 16
"""The largest M of decode calls."""

MAX_DECODE_TOKENS_ACROSS = 1 << 19
"""The largest R * M of decode calls across nodes."""

_ROW_ELEMENTS = 8
"""Of bfloat16; a row is a multiple of so many."""


def refused_shape(shape: MoeShape) -> Iterator[str]:
    """Yield why backend cuda takes no group of this shape, by the names of options; nothing if it does."""
    for option, value, most in (
        ("--experts", shape.num_experts, MAX_EXPERTS),
        ("--top-k", shape.top_k, MAX_TOP_K),
    ):
        if value > most:
            yield f"{option} {value}: backend cuda takes at most {most}; choose fewer"
    if shape.hidden % _ROW_ELEMENTS:
        yield (
            f"--hidden {shape.hidden}: a BF16 row has to be a multiple of 16 bytes; use a multiple of {_ROW_ELEMENTS}"
        )


def refused_ranks(option: str, ranks: int, remedy: str) -> Iterator[str]:
    """Yield why backend cuda takes no node of so many ranks; nothing if it does.

    Args:
        option: The option that says how many.
        ranks: Ranks of a node.
        remedy: What to do about it.
    """
    if ranks > MAX_RANKS:
        yield f"{option} {ranks}: backend cuda takes at most {MAX_RANKS}; {remedy}"


def refused_nodes(nodes: int) -> Iterator[str]:
    """Yield why backend cuda takes no group of so many nodes; nothing if it does."""
    if nodes > MAX_NODES:
        yield f"--nodes {nodes}: backend cuda takes at most {MAX_NODES}; use fewer"


def refused_decoding(tokens: int, ranks: int, nodes: int) -> Iterator[str]:
    """Yield why backend cuda takes no decode calls of so many tokens; nothing if it does.

    Args:
        tokens: M.
        ranks: R.
        nodes: N.
    """
    if tokens > MAX_DECODE_TOKENS:
        yield f"--decode-tokens {tokens}: decode calls of backend cuda take at most {MAX_DECODE_TOKENS}; use fewer"
    if nodes > 1 and ranks * tokens > MAX_DECODE_TOKENS_ACROSS:
        yield (
            f"--decode-tokens {tokens}: {ranks} ranks have {ranks * tokens} tokens in all, and decode calls of backend "
            f"cuda across nodes take at most {MAX_DECODE_TOKENS_ACROSS}; use fewer"
        )
