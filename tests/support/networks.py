"""Two networks on this host, each in a namespace of its own, joined by a link that can be cut (Linux, as root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent
_TOOLS = ("ip", "nsenter")


class NoNetworksError(Exception):
    """This machine has no network namespaces for us; the message says what is missing."""


@dataclass(frozen=True)
class Network:
    """One of the two networks: the name of its namespace, of its end of the link, and the address of that."""

    namespace: str
    link: str
    address: str

    def start(self, module: str, *args: object) -> subprocess.Popen[str]:
        """Start ``python -m module`` in this network; gloo uses its end of the link."""
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", sys.executable, "-m", module, *map(str, args)]
        environ = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": self.link,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        }
        return subprocess.Popen(
            command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )

    def cut(self) -> None:
        """Take this end of the link down: nothing arrives any more, and no connection shows it."""
        _run("ip", "-n", self.namespace, "link", "set", self.link, "down")


@contextlib.contextmanager
def two_networks() -> Iterator[tuple[Network, Network]]:
    """Make two networks, and remove them with all that is left in them.

    Raises:
        NoNetworksError: it cannot be done here.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoNetworksError(f"there is no program {' and none '.join(missing)} to make network namespaces with")
    name = f"tf{os.getpid()}"
    ends = [Network(f"{name}-{i}", f"{name}v{i}", f"10.77.0.{i + 1}") for i in (0, 1)]
    try:
        for end in ends:
            _run("ip", "netns", "add", end.namespace)
        peer = ("peer", "name", ends[1].link, "netns", ends[1].namespace)
        _run("ip", "link", "add", ends[0].link, "netns", ends[0].namespace, "type", "veth", *peer)
        for end in ends:
            _run("ip", "-n", end.namespace, "address", "add", f"{end.address}/24", "dev", end.link)
            for link in ("lo", end.link):
                _run("ip", "-n", end.namespace, "link", "set", link, "up")
        yield ends[0], ends[1]
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "delete", end.namespace], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNetworksError(
            f"network namespaces need root and the kernel's consent: {command}: {done.stderr.strip()}"
        )
