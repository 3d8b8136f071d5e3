"""A program that spoils the library in one way after the other, and prints what a chaos soak says about each.

    python chaos_spoiled.py

It forks its ranks, which inherit what is spoiled; so it is a process of its own.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tokenferry import ExpertGroup, PeerTimeout
from tokenferry.testing import chaos, chaos_judge, chaos_leftovers
from tokenferry.testing.chaos_plan import LONG_S, Episode, Fault, Round, Step
from tokenferry.transports.shared_memory import SharedMemoryTransport

KILL = Fault("kill", 1, 0.001, 0.0, 0, child_calls=False)
EPISODE = Episode(
    number=0,
    ranks=2,
    device="cpu",
    transport="shared_memory",
    ranks_per_node=None,
    shim=False,
    on_timeout="raise",
    timeout_s=LONG_S,
    prompt=True,
    num_groups=1,
    steps=(
        Step("making", (), (), 0),
        Step("step 1", (Round("large", 4), Round("decode", 2)), (), 1),
        Step("fatal step", (Round("decode", 3),), (KILL,), 2),
        Step("aftermath", (Round("throughput", 4),), (), 3),
    ),
    after=Round("decode", 1),
    graph_seed=0,
)


@contextlib.contextmanager
def replaced(owner: type, name: str, around: Callable) -> Iterator[None]:
    """Let ``around(method, self, *args)`` take the place of a method."""
    method = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: around(method, self, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, method)


def other_signs(dispatch, group, *args, **kwargs):
    sent = dispatch(group, *args, **kwargs)
    sent.x.view(-1, sent.x.shape[-1])[..., 0] *= -1
    return sent


def after_a_loss(do: Callable[[], None]) -> Callable:
    def receive(method, transport, *args, **kwargs):
        try:
            return method(transport, *args, **kwargs)
        except PeerTimeout:
            do()
            raise

    return receive


def closing(do: Callable[[], object]) -> Callable:
    def close(method, group):
        do()
        return method(group)

    return close


def fail() -> None:
    raise OSError("a bare one")


SPOILED: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "nothing": contextlib.nullcontext,
    "a row": lambda: replaced(ExpertGroup, "dispatch", other_signs),
    "an error": lambda: replaced(SharedMemoryTransport, "receive", after_a_loss(fail)),
    "noticed late": lambda: replaced(SharedMemoryTransport, "receive", after_a_loss(lambda: time.sleep(0.5))),
    "a hang": lambda: replaced(SharedMemoryTransport, "receive", after_a_loss(lambda: time.sleep(60.0))),
    "a descriptor": lambda: replaced(ExpertGroup, "close", closing(lambda: os.memfd_create("tokenferry"))),
    "a folder": lambda: replaced(ExpertGroup, "close", closing(tempfile.mkdtemp)),
    "a process": lambda: replaced(ExpertGroup, "close", closing(lambda: subprocess.Popen(["sleep", "60"]))),
}


def verdict(name: str) -> str:
    """Return what the soak says."""
    late, hangs = name == "noticed late", name == "a hang"
    chaos_judge.PROMPT_S = 0.3 if late else 5.0
    chaos.PROMPT_S, chaos.SLACK_S = (0.4, 0.3) if hangs else (5.0, 10.0)
    chaos_leftovers.CLOSING_S = 0.1 if name == "a descriptor" else 2.0
    try:
        with SPOILED[name]():
            chaos.run_episode(EPISODE, chaos.Tally())
    except chaos.Violation as violation:
        return str(violation)
    return "all promises kept"


if __name__ == "__main__":
    chaos.adopt_orphans()
    json.dump({name: verdict(name) for name in SPOILED}, sys.stdout)
