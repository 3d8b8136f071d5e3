"""What pyproject.toml cannot name: a page that goes into the package, and links of the README that work elsewhere."""

import runpy
import shutil
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copy docs/errors.md beside `tokenferry explain-error`, which in a clone reads it there."""

    def run(self) -> None:
        """Build, and copy it into what was built."""
        super().run()
        if not self.editable_mode:
            shutil.copy("docs/errors.md", Path(self.build_lib) / "tokenferry" / "cli")


class Distribution(setuptools.Distribution):
    """Let the README that an index shows link to the documentation site, if [project.urls] has its address."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        """Read pyproject.toml, and rewrite the links."""
        super().parse_config_files(*args, **kwargs)
        site = (self.metadata.project_urls or {}).get("Documentation")
        if site:
            absolute = runpy.run_path("docs/hooks.py")["absolute"]
            self.metadata.long_description = absolute(self.metadata.long_description, "index.md", site)


setuptools.setup(cmdclass={"build_py": BuildPy}, distclass=Distribution)
