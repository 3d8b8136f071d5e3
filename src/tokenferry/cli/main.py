"""The entry point of the command line: parse the arguments, run the command and return its exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tokenferry.cli.output import STDOUT
from tokenferry.cli.parser import NOT_POSSIBLE, load, make_parser, parse
from tokenferry.cli.screen import OutputClosed, Screen
from tokenferry.errors import BackendUnavailable, ConfigError, TokenferryError
from tokenferry.testing.streams import open_closed_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; without any, print the help.

    Args:
        argv: The arguments without the program's name; None takes those of this process.

    Returns:
        The exit status: 0 success, 1 a check failed, 2 an option is wrong, 3 this machine cannot do it, 130
        interrupted, 141 the reader of the output has ended (as the pipe to ``head`` does).

    Raises:
        SystemExit: --help, --version, a command line that cannot be parsed (status 2), or SIGTERM (status 143).
    """
    open_closed_streams()
    with _ended_by_sigterm():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except OutputClosed:
            return 128 + signal.SIGPIPE
        finally:
            _flush()


def _run(arguments: list[str]) -> int:
    name, errors = "tokenferry", Screen(sys.stderr)
    try:
        args = parse(arguments)
        if args.command is None:
            make_parser(()).print_help()
            return 0
        name = f"tokenferry {args.command}"
        screen = Screen(sys.stderr) if getattr(args, "json", None) == STDOUT else Screen()
        status: int = load(args.command).run(args, screen)
        return status
    except ConfigError as error:
        errors.line(f"{name}: {error}")
        return 2
    except BackendUnavailable as error:
        errors.line(f"{name}: {error}")
        return NOT_POSSIBLE
    except (TokenferryError, OSError) as error:
        errors.line(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        errors.line(f"{name}: interrupted")
        return 130


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program as an exception does, so that ranks are ended and folders removed; a second at once.

    The handler is for commands only: programs that use the library decide about signals themselves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flush() -> None:
    """Write what is still buffered; if that is impossible, discard it, or the interpreter would complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
