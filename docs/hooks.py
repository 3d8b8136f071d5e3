"""What mkdocs.yml cannot say about the documentation site; `make docs` builds it into site/.

Files outside of docs/ that pages link to are taken in, links between files of the repository become links between
pages, and every public name gets its place in the reference.
"""

from __future__ import annotations

import ast
import posixpath
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tokenferry"

TAKEN_IN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measurements.md",
    "benchmarks/NOTES.md": "measurements-notes.md",
    "examples": "examples.md",
    "packages/deep_ep/README.md": "deep-ep-package.md",
}
"""Pages of the site that lie outside of docs/; what else pages link to is copied, below `files`."""


def reference() -> dict[str, tuple[str, list[str]]]:
    """Return the pages of the reference: the title, and the public names, of each."""
    errors = [node.name for node in _body("errors.py") if isinstance(node, ast.ClassDef)]
    package = [name for name in _exported("__init__.py") if name not in errors]
    aliases = [
        node.targets[0].id
        for node in _body("types.py")
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and ast.unparse(node.value).startswith("Literal[")
    ]
    types = [name for name in package if name != "ExpertGroup"]
    return {
        "group": ("The group and its calls", ["tokenferry.ExpertGroup"]),
        "types": ("Arguments and results", _in("tokenferry", types) + _in("tokenferry.types", aliases)),
        "errors": ("Exceptions", _in("tokenferry", errors)),
        "autograd": ("Gradients", _in("tokenferry.autograd", _exported("autograd/__init__.py"))),
        "nn": ("Layers and routers", _in("tokenferry.nn", _exported("nn/__init__.py"))),
        "balance": ("Placement of experts", _in("tokenferry.nn.balance", _exported("nn/balance/__init__.py"))),
        "formats": ("Formats of rows", ["tokenferry.formats.fp8", "tokenferry.formats.logfmt"]),
        "deep-ep": ("The API of DeepEP", _deep_ep()),
        "transformers": ("Models of transformers", ["tokenferry.integrations.transformers.register"]),
        "testing": (
            "Testing and diagnosing",
            ["tokenferry.testing.world.World", "tokenferry.testing.oracle", "tokenferry.bench.profile.diagnose.judge"],
        ),
    }


def _in(module: str, names: list[str]) -> list[str]:
    return [f"{module}.{name}" for name in names]


def _deep_ep() -> list[str]:
    names = [name for name in _exported("compat/deep_ep/__init__.py") if not name.startswith("_")]
    return _in("tokenferry.compat.deep_ep", names)


def _body(file: str) -> list[ast.stmt]:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8")).body


def _exported(file: str) -> list[str]:
    assigned = (node for node in _body(file) if isinstance(node, ast.Assign))
    (names,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__")
    return list(ast.literal_eval(names))


def generated() -> Iterator[tuple[str, str]]:
    """Return the pages that no file holds: their names and texts."""
    for name, (title, names) in reference().items():
        yield f"reference/{name}.md", "\n\n".join([f"# {title}", *(f"::: {one}" for one in names)]) + "\n"
    programs = ["# Programs to copy\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        programs.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    yield TAKEN_IN["examples"], "\n".join(programs)


def page_of(file: str) -> str:
    """Return the page or file of the site that shows a file of the repository."""
    if file in TAKEN_IN:
        return TAKEN_IN[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else f"files/{file}"


def file_of(page: str) -> str:
    """Return the file of the repository that a page of the site shows."""
    return next((file for file, taken in TAKEN_IN.items() if taken == page), f"docs/{page}")


LINK = re.compile(r"(`[^`\n]*`)|(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def rewritten(markdown: str, page: str) -> tuple[str, list[str]]:
    """Return the text of a page with its links as the site needs them, and the files of the repository they lead to."""
    folder, found = posixpath.dirname(file_of(page)), []

    def replaced(match: re.Match[str]) -> str:
        if match[1]:
            return match[1]
        target = posixpath.normpath(posixpath.join(folder, match[3]))
        found.append(target)
        link = posixpath.relpath(page_of(target), posixpath.dirname(page) or ".")
        return f"{match[2]}{link}{match[4] or ''}{match[5]}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else LINK.sub(replaced, part) for i, part in enumerate(parts)), found


def slug(heading: str, separator: str) -> str:
    """Return the anchor of a heading, as those who read the files at home on the web have it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def missing(inventory: bytes) -> list[str]:
    """Return the public names that the inventory of a site lacks."""
    lines = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    held = {line.split(" ", 1)[0] for line in lines}
    return [name for _, names in reference().values() for name in names if name not in held]


def absolute(markdown: str, page: str, site: str) -> str:
    """Return the text of a page with its links as a reader elsewhere needs them: to a site that has its pages."""

    def address(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[3]))
        target = "" if target == "index.md" else re.sub(r"\.md$", "/", target)
        return f"{match[2]}{site.rstrip('/')}/{target}{match[4] or ''}{match[5]}"

    parts = re.split(r"(^```.*?^```$)", rewritten(markdown, page)[0], flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if i % 2 else LINK.sub(lambda match: match[1] or address(match), part) for i, part in enumerate(parts)
    )


def on_config(config: Any) -> Any:  # noqa: ANN401 - mkdocs
    """Use the anchors that links in the files use, and the address of the site that the package names."""
    import tomllib  # the site is built with Python 3.11 or newer

    config.mdx_configs["toc"]["slugify"] = slug
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.site_url = project.get("urls", {}).get("Documentation")
    return config


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - mkdocs
    """Take in the pages outside of docs/, those that no file holds, and what all of them link to."""
    from mkdocs.structure.files import File

    for page, text in generated():
        files.append(File.generated(config, page, content=text))
    for file, page in TAKEN_IN.items():
        if (ROOT / file).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    pages = list(files.documentation_pages())
    linked = {target for page in pages for target in rewritten(page.content_string, page.src_uri)[1]}
    for target in sorted(linked):
        if page_of(target).startswith("files/") and (ROOT / target).is_file():
            files.append(File.generated(config, page_of(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401 - mkdocs
    """Rewrite the links of a page."""
    return rewritten(markdown, page.file.src_uri)[0]


def on_post_build(config: Any) -> None:  # noqa: ANN401 - mkdocs
    """Refuse a site whose reference lacks a public name."""
    from mkdocs.exceptions import PluginError

    lacking = missing((Path(config.site_dir) / "objects.inv").read_bytes())
    if lacking:
        raise PluginError(f"the reference lacks {', '.join(lacking)}")
