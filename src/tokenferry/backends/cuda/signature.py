"""Signatures: the fields of a call that have to be the same on all ranks, which kernels compare in their handshakes."""

from __future__ import annotations

import struct

from tokenferry.kernels.control_block import SIGNATURE_WORDS

KINDS = ("", "dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine", "warmup")
"""Names of calls; word 0 of a signature is an index into this."""

_ARGUMENT_NAMES = ("num_experts", "max_tokens", "topk_idx", "top_k")
"""Arguments of the user, which keep their underscores in messages."""


class Signature:
    """The kind of a call, then the fields that have to be the same on all ranks.

    Attributes:
        phase: Name of the call.
        fields: Names and values; the first is ``("kind", n)``, n an index into `KINDS`.
        words: Their values, packed as the words of a handshake.
    """

    __slots__ = ("fields", "phase", "words")

    def __init__(self, phase: str, **fields: int) -> None:
        self.phase = phase
        self.fields = (("kind", KINDS.index(phase)), *fields.items())
        values = [value & 0xFFFFFFFF for _, value in self.fields]
        self.words = struct.pack(f"<{SIGNATURE_WORDS}I", *values, *(0,) * (SIGNATURE_WORDS - len(values)))


def field_label(name: str) -> str:
    """Return a field's name as messages print it: "bytes_of_topk_idx" is "bytes of topk_idx"."""
    label = name.replace("_", " ")
    for argument in _ARGUMENT_NAMES:
        label = label.replace(argument.replace("_", " "), argument)
    return label
