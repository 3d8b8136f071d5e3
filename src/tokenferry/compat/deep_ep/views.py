"""Views of a group for the sizes that each call of `Buffer` brings."""

from __future__ import annotations

from tokenferry.api import ExpertGroup
from tokenferry.types import MoeShape

_MAX_VIEWS = 256


class Views:
    """The views of a group that have been used. To make one takes as long as a call.

    Attributes:
        group: The group.
        device: Device of all tensors.
        rank: This rank.
        on_gpu: Whether the host would have to wait for the values of tensors.
        nodes: The ranks of each node.
    """

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self.device, self.rank = group.device, group.rank
        self.on_gpu = self.device.type != "cpu"
        self.nodes = group.topology.nodes
        self._known: dict[tuple[int, int, int, int], ExpertGroup] = {}

    def of(self, num_experts: int, top_k: int, hidden: int, max_tokens: int) -> ExpertGroup:
        """Return the view for these sizes. Local.

        Raises:
            ConfigError: a size is not positive, or E is not a multiple of R.
            ClosedError: the group was closed or is broken, and has no such view yet.
        """
        key = (num_experts, top_k, hidden, max_tokens)
        # 4.0 would be found under 4, and a list under nothing: `MoeShape` says what is wrong with them.
        of_integers = type(num_experts) is type(top_k) is type(hidden) is type(max_tokens) is int
        found = self._known.get(key) if of_integers else None
        if found is None:
            found = self.group.for_shape(MoeShape(*key))
            if len(self._known) >= _MAX_VIEWS:
                self._known.clear()
            self._known[key] = found
        return found
