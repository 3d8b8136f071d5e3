"""The cache of kernels on disk, shared by all processes of a user: one self-contained folder per entry.

An entry ``<kernel>-<key>`` holds ``kernel.cu`` and its headers (``nvcc -cubin -arch=sm_90a kernel.cu`` works in it),
``kernel.cubin`` (or ``kernel.ptx``) and ``build.json`` (options, version of the compiler, checksum, resources, log).

A kernel runs with all rights of its process, so what another user may have written is not loaded. The folder, an entry
and its files have to belong to this user or to root, and nobody else may have write access, the group included. This is
checked on what is open, not on paths, which may change in between. The folders above do not matter: whoever can rename
the folder cannot put another one there that passes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenferry.jit import resources
from tokenferry.jit.compiler import Built
from tokenferry.jit.source import Unit

_log = logging.getLogger("tokenferry")

WAIT_S = 10.0
"""The longest wait for another process that makes an entry, which takes a tenth of a second."""
_NAP_S = 0.005


class _UntrustedError(Exception):
    """A file or folder that another user may have written."""


@dataclass(frozen=True)
class _Lock:
    """An open lock file."""

    path: Path
    descriptor: int


class Cache:
    """The cache entries in one folder. An unusable folder costs time and one warning, but never raises an error.

    A folder that another user may write to is not used: kernels are compiled anew, and kept in memory.

    Args:
        folder: Folder of the entries, created when first needed; None: nothing is cached.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._warned = False

    def find(self, unit: Unit, compiler: str) -> bytes | None:
        """Return the cubin or PTX of a unit, or None. A damaged entry is moved aside, with a warning."""
        if self.folder is None:
            return None
        entry = self._entry(self.folder, unit, compiler)
        try:
            folder = _open_folder(self.folder)
        except FileNotFoundError:
            return None  # nothing was ever kept
        except (OSError, _UntrustedError) as error:
            self._warn(error)
            return None
        try:
            try:
                return _read(entry.name, folder, unit)
            except FileNotFoundError:
                if not entry.exists():
                    return None
                return _read(entry.name, folder, unit)  # another process has just written it, or a file is missing
        except (FileNotFoundError, ValueError, KeyError, TypeError, _UntrustedError) as error:
            self._set_aside(entry, error)
        except OSError as error:
            self._warn(error)
        finally:
            os.close(folder)
        return None

    def keep(self, unit: Unit, compiler: str, built: Built) -> None:
        """Write an entry, atomically: of several processes that write the same entry, the first one wins."""
        if self.folder is None:
            return
        try:
            with _scratch(self.folder) as scratch:
                for name, text in {**unit.headers, "kernel.cu": unit.text}.items():
                    _write(scratch / name, text.encode())
                _write(scratch / _image_name(unit), built.image)
                _write(scratch / "build.json", json.dumps(_report(unit, compiler, built), indent=2).encode() + b"\n")
                scratch.rename(self._entry(self.folder, unit, compiler))
        except (OSError, _UntrustedError) as error:
            if not self._entry(self.folder, unit, compiler).exists():  # else another process was faster
                self._warn(error)

    @contextlib.contextmanager
    def one_at_a_time(self, unit: Unit, compiler: str) -> Iterator[None]:
        """Let one process at a time make an entry; the others wait, and should then look for it again.

        A wait ends after `WAIT_S`, and there is none in a folder without locks: making an entry twice costs time only.
        """
        lock = self._open_lock(unit, compiler)
        if lock is None:
            yield
            return
        try:
            _wait_for(lock.descriptor)
            yield
        finally:
            # Waiting processes have the file open, and later ones find the entry, so the file may go.
            with contextlib.suppress(OSError):
                lock.path.unlink()
            with contextlib.suppress(OSError):
                fcntl.flock(lock.descriptor, fcntl.LOCK_UN)  # a forked child may have inherited it
            os.close(lock.descriptor)

    def _open_lock(self, unit: Unit, compiler: str) -> _Lock | None:
        if self.folder is None:
            return None
        entry = self._entry(self.folder, unit, compiler)
        path = entry.with_name(f".lock-{entry.name}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(_open_folder(self.folder))
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            return _Lock(path, os.open(path, flags, 0o600))
        except (OSError, _UntrustedError):
            return None  # `keep` says why

    @staticmethod
    def _entry(folder: Path, unit: Unit, compiler: str) -> Path:
        return folder / f"{unit.name}-{unit.key(compiler)[:32]}"

    def _set_aside(self, entry: Path, found: Exception) -> None:
        aside = entry.with_name(f"{entry.name}.corrupt-{os.getpid()}-{os.urandom(2).hex()}")
        _log.warning(
            "kernel cache: %s is damaged (%r): moved to %s, which may be deleted, and compiled again",
            *(entry, found, aside.name),
        )
        try:
            entry.rename(aside)
        except FileNotFoundError:
            return  # another process detected the same and was faster
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError | _UntrustedError) -> None:
        if not self._warned:
            remedy = "set TOKENFERRY_CACHE_DIR to a folder that can be written"
            if isinstance(error, _UntrustedError):
                remedy = (
                    "kernels from there could be anybody's code; make the folder yours alone (chown, chmod go-w), "
                    "or set TOKENFERRY_CACHE_DIR to another one"
                )
            _log.warning(
                "kernel cache: cannot use %s (%s): every process compiles its kernels anew; %s",
                self.folder,
                error,
                remedy,
            )
        self._warned = True


def _wait_for(descriptor: int) -> None:
    """Lock an open file, or give up after `WAIT_S`, or where there are no locks."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_NAP_S)
        except OSError:
            return
        else:
            return


def refusal(folder: Path) -> str | None:
    """Return why kernels would not be kept in a folder, or not used from it; None if they would.

    Tries what `Cache.keep` does, and leaves nothing behind.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _scratch(folder) as scratch:
            _write(scratch / "kernel.cubin", b"")
    except (OSError, _UntrustedError) as error:
        return str(error)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it was not made, or another process uses it by now
                path.rmdir()
    return None


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Return a new folder inside of one, which is made if need be, and checked; afterwards remove it, if still there.

    Raises:
        OSError: it cannot be made.
        _UntrustedError: somebody else can write to the folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(_open_folder(folder))
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_folder(path: Path) -> int:
    """Open the folder of all entries, and return its descriptor: nobody else can change the entries in there.

    Raises:
        _UntrustedError: somebody else can.
    """
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode):  # a link may be moved elsewhere by its owner only
        _check_owner(link, str(path))
    return _open_checked(str(path), os.O_DIRECTORY, None)


def _open_checked(name: str, flags: int, folder: int | None) -> int:
    """Open a file or folder for reading, after which it is checked: what is open cannot be exchanged."""
    opened = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        found = os.fstat(opened)
        _check_owner(found, name)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _UntrustedError(
                f"{name} has mode {stat.S_IMODE(found.st_mode):04o}: others than its owner may write to it"
            )
    except BaseException:
        os.close(opened)
        raise
    return opened


def _check_owner(found: os.stat_result, name: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise _UntrustedError(f"{name} belongs to user {found.st_uid}, this process to user {os.geteuid()}")


def _image_name(unit: Unit) -> str:
    return "kernel.ptx" if unit.is_ptx else "kernel.cubin"


def _read(name: str, folder: int, unit: Unit) -> bytes:
    """Return the image of an intact entry of an open folder; else raise one of the errors that ``find`` expects."""
    try:
        entry = _open_checked(name, os.O_DIRECTORY | os.O_NOFOLLOW, folder)
    except NotADirectoryError:
        raise _UntrustedError(f"{name} is not a folder") from None
    try:
        report = json.loads(_read_file("build.json", entry))
        image = _read_file(_image_name(unit), entry)
    finally:
        os.close(entry)
    begins = b"//" if unit.is_ptx else b"\x7fELF"
    if not image.startswith(begins) or report["sha256"] != hashlib.sha256(image).hexdigest():
        raise ValueError(f"{_image_name(unit)} does not match its checksum")
    return image


def _read_file(name: str, entry: int) -> bytes:
    try:
        opened = _open_checked(name, os.O_NOFOLLOW | os.O_NONBLOCK, entry)  # a pipe would block
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _UntrustedError(f"{name} is a link") from None
        raise
    with open(opened, "rb") as file:
        return file.read()


def _write(path: Path, data: bytes) -> None:
    """Write a new file that nobody else can write or read, whatever the umask; with the folders that it lies in."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
        file.write(data)


def _report(unit: Unit, compiler: str, built: Built) -> dict[str, Any]:
    return {
        "kernel": unit.name,
        "options": list(unit.options),
        "nvrtc": compiler,
        "sha256": hashlib.sha256(built.image).hexdigest(),
        "resources": {name: asdict(needs) for name, needs in resources.parse(built.log).items()},
        "log": built.log.splitlines(),
    }
