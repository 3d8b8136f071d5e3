"""Standard streams that were closed before this process began, as by ``>&-`` in a shell or by a service manager."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Open ``/dev/null`` in place of each standard stream that is closed.

    Otherwise the next file or socket that this process opens gets the number of standard output, say, and receives
    what any library prints; and ``sys.stdout`` is None, which has no methods.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, descriptor)  # inheritable, as standard streams are
            if opened != descriptor:
                os.close(opened)
            else:
                os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
