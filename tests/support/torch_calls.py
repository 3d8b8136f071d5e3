"""What runs in a call."""

import sys

from torch.utils._python_dispatch import TorchDispatchMode


class TorchCalls(TorchDispatchMode):
    """Notes the names of the operators that torch runs, also in backward passes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def num_functions(run):
    """Return how many functions of Python a call runs, also those of torch."""
    num = 0

    def note(frame, event, _):
        nonlocal num
        num += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return num
