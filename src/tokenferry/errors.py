"""The exceptions of tokenferry, and how an application should handle each.

TokenferryError
├── ArgumentError          the call was wrong; fix it, the group stays usable (but see CapacityError)
│   ├── ShapeError         shape, dtype, device or strides
│   ├── RoutingError       an expert index outside [-1, E), or a token on more nodes than max_nodes
│   ├── CapacityError      more tokens or rows than were agreed
│   └── PlanError          a plan of another group or kind of call, or without weights
├── ConfigError            a constructor option, shape or TOKENFERRY_* variable is wrong
├── BackendUnavailable     this machine or process group cannot run the requested backend
├── UnsupportedError       a call, or an argument or variable of the DeepEP API, that this backend cannot honour
├── MismatchError          ranks made different calls; the group is broken
├── PeerTimeout            a rank did not answer in time, or died; the group is broken
├── ResourceError          the system refused memory, file descriptors or the like; the group is broken (see the class)
├── ClosedError            the group was closed, broken by an earlier error, or is that of a parent process
└── PickleError            a group cannot be pickled; nothing has changed

A *broken* group raises ClosedError on every later call and can only be closed; make a new group to continue.
"""

from __future__ import annotations

import functools
import pickle


def page_address(page: str, anchor: str = "") -> str | None:
    """Return the address of a page of the documentation site, or None if the package does not name one.

    The address of the site is that of ``Documentation`` in the ``[project.urls]`` of pyproject.toml, which an installed
    package holds in its metadata.

    Args:
        page: The name of a file in docs/, such as ``"errors"``.
        anchor: A heading, as a link has it.
    """
    site = _site()
    return site and f"{site.rstrip('/')}/{page}/{anchor and '#'}{anchor}"


@functools.lru_cache(maxsize=1)
def _site() -> str | None:
    try:
        from importlib import metadata  # errors are rare, and this takes milliseconds

        urls = metadata.metadata("tokenferry").get_all("Project-URL") or []
    except (ImportError, OSError):  # a clone that is not installed; or files are refused, or Python ends
        return None
    return next((url for label, _, url in (one.partition(", ") for one in urls) if label == "Documentation"), None)


def page_place(page: str) -> str:
    """Return where a page of the documentation is: its address, or without one its file in a clone."""
    return page_address(page) or f"docs/{page}.md"


def several(number: int, what: str) -> str:
    """Return a number of things in words: ``"1 rank"``, ``"2 ranks"``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class TokenferryError(Exception):
    """Base class of all exceptions of tokenferry.

    Where the package names a site of its documentation, a traceback ends with the address of the exception's section
    (Python 3.11 and newer).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if type(self).__module__ == __name__ and hasattr(self, "add_note"):
            address = page_address("errors", type(self).__name__.lower())
            if address and address not in str(args[:1]):
                self.add_note(f"What to do: {address}")


class ArgumentError(TokenferryError, ValueError):
    """An argument is wrong. Nothing was sent; correct the call and make it again on the same group."""


class ShapeError(ArgumentError):
    """An argument has the wrong shape, dtype, device or strides. The message says what was expected and found."""


class RoutingError(ArgumentError):
    """``topk_idx`` holds an expert outside ``[-1, E)``, or a token has experts on more nodes than ``max_nodes``.

    The message names the first such position or token.

    If the device detected the error, the rows of that call are lost, and a later call raises; see
    `ExpertGroup.synchronize`.
    """


class CapacityError(ArgumentError):
    """More tokens or rows than the group, the call, or the heap of a GPU can hold. The message gives both numbers.

    Raised before anything is sent, except where the number is known only after the counts have arrived
    (``DispatchOptions.capacity`` below the worst case): then every rank raises together and the group stays usable.
    CUDA: a dispatch that finds the heap full only after the counts have arrived leaves the group broken; in
    ``Layout.MASKED`` space for the rows is checked before.
    """


class PlanError(ArgumentError):
    """A plan of another group or kind of call, or a plan without the weights that the call needs."""


class ConfigError(TokenferryError, ValueError):
    """A constructor option, a ``MoeShape`` or a ``TOKENFERRY_*`` variable is wrong; correct it and start again."""


class BackendUnavailable(TokenferryError, RuntimeError):  # noqa: N818 - names a condition, like PeerTimeout
    """The requested backend or transport cannot run here. The message gives the reason; see `tokenferry doctor`."""


class UnsupportedError(TokenferryError, NotImplementedError):
    """This backend lacks the call, or cannot honour part of DeepEP's API; the message says what to do."""


class MismatchError(TokenferryError, RuntimeError):
    """Ranks made different calls (method, dtype, width, layout): a bug in the application. The group is broken."""


class PeerTimeout(TokenferryError, TimeoutError):  # noqa: N818 - names a condition, like TimeoutExpired
    """A rank did not answer within ``timeout_s``, its process ended, or it left. The group is broken; make a new one.

    On the transport ``"process_group"`` the process group is unusable too: gloo closes all its connections after one
    timeout.

    Attributes:
        phase: Name of the call that waited: ``"dispatch"``, ``"redispatch"``, ``"combine"``, ``"decode_dispatch"``,
            ``"decode_combine"``, ``"warmup"``, or ``"capacity_check"``, an exchange of a dispatch with a ``capacity``;
            ``"making the group"`` in the constructor. With several nodes it may be followed by the part of the call,
            such as ``"dispatch (between nodes)"``.
        call: Number of that call on its group, counted from 1; 0 while the group was being made. What a call exchanges
            before or after its rows is counted, too, so that it is not the number of calls that the program has made;
            with several nodes it may differ between ranks.
        rank: The rank that waited (this one).
        peers: The ranks that did not answer, in ascending order. With several nodes those at fault, even if this rank
            waited for others, which waited for them.
        waited_s: Seconds waited.
        nodes: With several nodes, those of ``peers``.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        call: int,
        rank: int,
        peers: tuple[int, ...],
        waited_s: float,
        nodes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.call = call
        self.rank = rank
        self.peers = peers
        self.waited_s = waited_s
        self.nodes = nodes

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the attributes when the exception is pickled."""
        values = (self.phase, self.call, self.rank, self.peers, self.waited_s, self.nodes)
        return (_rebuild_peer_timeout, (self.args[0], *values))


def _rebuild_peer_timeout(
    message: str,
    phase: str,
    call: int,
    rank: int,
    peers: tuple[int, ...],
    waited_s: float,
    nodes: tuple[int, ...],
) -> PeerTimeout:
    return PeerTimeout(message, phase=phase, call=call, rank=rank, peers=peers, waited_s=waited_s, nodes=nodes)


class ResourceError(TokenferryError, OSError):
    """The system refused memory, file descriptors or another resource. The message names it, the limit and the remedy.

    On the CPU the group is broken, unless the call was local: its peers would wait for this rank, so they are notified
    at once, and raise `PeerTimeout` with the same reason. On a GPU nothing was sent, and the group stays usable, unless
    the message says otherwise.

    Attributes:
        resource: What was refused, such as ``"file descriptors"``, ``"memory"`` or ``"shared memory"``.
        errno: The code of the system, such as ``errno.EMFILE``.
    """

    def __init__(self, message: str, *, resource: str, errno: int) -> None:
        super().__init__(message)
        self.resource = resource
        self.errno = errno

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the attributes when the exception is pickled."""
        return (_rebuild_resource_error, (self.args[0], self.resource, self.errno))


def _rebuild_resource_error(message: str, resource: str, errno: int) -> ResourceError:
    return ResourceError(message, resource=resource, errno=errno)


class ClosedError(TokenferryError, RuntimeError):
    """The group was closed, an earlier error broke it, or this process is a forked child; the message says which.

    Make a new group. In a forked child: use the group in the process that made it, or start children with "spawn".
    """


class PickleError(TokenferryError, pickle.PicklingError, TypeError):
    """A group, or an object that holds one, cannot be pickled. Save a model's ``state_dict`` instead."""
