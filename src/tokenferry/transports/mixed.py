"""MixedTransport: shared memory to the ranks of this node, a torch.distributed process group to all others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenferry.transports.base import CallId, Check, Deadline, Message, Transport


class MixedTransport:
    """Two transports as one; see `Transport`.

    Each call is made on both, so that both number their calls alike; one without messages costs no message.

    Args:
        near: Reaches the ranks in ``near_ranks``. It delivers this rank's messages to itself, too.
        far: Reaches all ranks.
        near_ranks: The ranks of this node, this one included.
    """

    def __init__(self, near: Transport, far: Transport, near_ranks: Sequence[int]) -> None:
        self.name = f"{near.name}+{far.name}"
        self.rank = far.rank
        self.num_ranks = far.num_ranks
        self._near = near
        self._far = far
        self._near_ranks = frozenset(near_ranks)
        self._far_ranks = frozenset(range(far.num_ranks)) - self._near_ranks
        # A rank that gives up closes its connections to all ranks of other nodes, which a wait for them shows at once.
        # Two ranks of one node that wait for each other would see nothing until the deadline.
        self.order: Sequence[int] = [*sorted(self._far_ranks), *sorted(self._near_ranks)]

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return buffers of the transport that reaches each rank. See `Transport.open`."""
        near = self._near.open(call, [size if rank in self._near_ranks else 0 for rank, size in enumerate(sizes)])
        far = self._far.open(call, [size if rank in self._far_ranks else 0 for rank, size in enumerate(sizes)])
        return [near[rank] if rank in self._near_ranks else far[rank] for rank in range(self.num_ranks)]

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Start the sends of both. See `Transport.post`."""
        self._near.post(call, headers, deadline, skip | self._far_ranks)
        self._far.post(call, headers, deadline, skip | self._near_ranks - {self.rank})

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the message of one rank. See `Transport.receive`."""
        return self._to(src).receive(call, src, deadline, check)

    def finish(self, call: CallId, deadline: Deadline | None, late: frozenset[int] = frozenset()) -> None:
        """Finish the call on both. See `Transport.finish`."""
        self._near.finish(call, deadline, late)
        self._far.finish(call, deadline, late)

    def forget(self, call: CallId) -> None:
        """Forget the call on both. See `Transport.forget`."""
        self._near.forget(call)
        self._far.forget(call)

    def drop_peer(self, src: int) -> None:
        """Expect nothing more from a rank. See `Transport.drop_peer`."""
        self._to(src).drop_peer(src)

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        """Tell the ranks of this node; no rank of another one returns. See `Transport.announce_call`."""
        self._near.announce_call(number, skip | self._far_ranks)

    def highest_announced_call(self) -> int:
        """See `Transport.highest_announced_call`."""
        return self._near.highest_announced_call()

    def skip_to(self, number: int) -> None:
        """See `Transport.skip_to`."""
        self._near.skip_to(number)
        self._far.skip_to(number)

    def leave(self, why: str, *, wait: bool) -> None:
        """Tell all ranks, those of this node first. See `Transport.leave`."""
        self._near.leave(why, wait=wait)
        self._far.leave(why, wait=wait)

    def reason(self, src: int) -> str:
        """See `Transport.reason`."""
        return self._to(src).reason(src)

    def abandon(self) -> None:
        """See `Transport.abandon`."""
        self._near.abandon()
        self._far.abandon()

    def close(self, *, linger: bool) -> None:
        """Close both. See `Transport.close`."""
        self._near.close(linger=linger)
        self._far.close(linger=linger)

    def _to(self, rank: int) -> Transport:
        return self._near if rank in self._near_ranks else self._far
