"""The one step of the build that pyproject.toml cannot name: a page of docs/ that the package shows goes into it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copy docs/errors.md beside `tokenferry explain-error`, which in a clone reads it there."""

    def run(self) -> None:
        """Build, and copy it into what was built."""
        super().run()
        if not self.editable_mode:
            shutil.copy("docs/errors.md", Path(self.build_lib) / "tokenferry" / "cli")


setup(cmdclass={"build_py": BuildPy})
