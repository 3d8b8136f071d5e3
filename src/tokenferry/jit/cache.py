"""The cache of cubins on disk, shared by all processes of a user: one self-contained folder per entry.

An entry ``<kernel>-<key>`` holds ``kernel.cu`` and its headers (``nvcc -cubin -arch=sm_90a kernel.cu`` works in it),
``kernel.cubin`` and ``build.json`` (options, version of the compiler, checksum, resources, log).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenferry.jit import resources
from tokenferry.jit.compiler import Built
from tokenferry.jit.source import Unit

_log = logging.getLogger("tokenferry")


class Cache:
    """The cache entries in one folder. An unusable folder costs time and one warning, but never raises an error.

    Args:
        folder: Folder of the entries, created when first needed; None: nothing is cached.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._warned = False

    def find(self, unit: Unit, compiler: str) -> bytes | None:
        """Return the cubin of a unit, or None. A damaged entry is moved aside, with a warning."""
        if self.folder is None:
            return None
        entry = self._entry(self.folder, unit, compiler)
        try:
            try:
                return _read(entry)
            except FileNotFoundError:
                if not entry.exists():
                    return None
                return _read(entry)  # another process has just written it, or a file is missing
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            self._set_aside(entry, error)
        except OSError as error:
            self._warn(error)
        return None

    def keep(self, unit: Unit, compiler: str, built: Built) -> None:
        """Write an entry, atomically: of several processes that write the same entry, the first one wins."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        except OSError as error:
            self._warn(error)
            return
        try:
            for name, text in {**unit.headers, "kernel.cu": unit.text}.items():
                path = scratch / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            (scratch / "kernel.cubin").write_bytes(built.cubin)
            (scratch / "build.json").write_text(json.dumps(_report(unit, compiler, built), indent=2) + "\n")
            scratch.rename(self._entry(self.folder, unit, compiler))
        except OSError as error:
            if not self._entry(self.folder, unit, compiler).exists():  # else another process was faster
                self._warn(error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @staticmethod
    def _entry(folder: Path, unit: Unit, compiler: str) -> Path:
        return folder / f"{unit.name}-{unit.key(compiler)[:32]}"

    def _set_aside(self, entry: Path, found: Exception) -> None:
        aside = entry.with_name(f"{entry.name}.corrupt-{os.getpid()}-{os.urandom(2).hex()}")
        _log.warning("kernel cache: %s is damaged (%r): moved to %s and compiled again", entry, found, aside.name)
        try:
            entry.rename(aside)
        except FileNotFoundError:
            return  # another process detected the same and was faster
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning(
                "kernel cache: cannot use %s (%s): every process compiles its kernels anew; "
                "set TOKENFERRY_CACHE_DIR to a folder that can be written",
                self.folder,
                error,
            )
        self._warned = True


def _read(entry: Path) -> bytes:
    """Return the cubin of an intact entry; else raise one of the errors that ``find`` expects."""
    report = json.loads((entry / "build.json").read_bytes())
    cubin = (entry / "kernel.cubin").read_bytes()
    if not cubin.startswith(b"\x7fELF") or report["sha256"] != hashlib.sha256(cubin).hexdigest():
        raise ValueError("kernel.cubin does not match its checksum")
    return cubin


def _report(unit: Unit, compiler: str, built: Built) -> dict[str, Any]:
    return {
        "kernel": unit.name,
        "options": list(unit.options),
        "nvrtc": compiler,
        "sha256": hashlib.sha256(built.cubin).hexdigest(),
        "resources": {name: asdict(needs) for name, needs in resources.parse(built.log).items()},
        "log": built.log.splitlines(),
    }
