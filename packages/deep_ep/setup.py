"""Refuse to build where another distribution already provides `deep_ep`; all else is in pyproject.toml."""

import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterable

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))


def other_deep_ep(folders: Iterable[str]) -> str | None:
    """Return a line about a `deep_ep` in one of these folders that is not tokenferry's, or None."""
    for folder in folders:
        package = os.path.join(folder, "deep_ep")
        if not os.path.isdir(package) or os.path.abspath(folder) == HERE or _is_ours(package):
            continue
        for distribution in importlib.metadata.distributions(path=[folder]):
            if any(file.parts[0] == "deep_ep" for file in distribution.files or ()):
                return f"{package} belongs to {distribution.metadata['Name']} {distribution.version}"
        return f"{package} belongs to another distribution"
    return None


def _is_ours(package: str) -> bool:
    try:
        with open(os.path.join(package, "__init__.py"), encoding="utf-8", errors="replace") as file:
            return "tokenferry.compat" in file.read()
    except OSError:
        return False


class Build(build_py):
    """Build the package, unless its files would be installed among those of another distribution."""

    def run(self) -> None:
        """Check, then build."""
        # An isolated build has another sys.path, but sysconfig still names the folders of the environment.
        found = other_deep_ep([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        if found:
            raise SystemExit(
                f"tokenferry-deep-ep: {found}, and installing would overwrite it. Uninstall that one first, or leave "
                "it and run your program with PYTHONPATH=$(tokenferry deep-ep-path)"
            )
        super().run()


setup(cmdclass={"build_py": Build})
