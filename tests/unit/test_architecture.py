"""The rooms of the package, the arrows between them, and the sizes of their files."""

import ast
import graphlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("tokenferry").origin).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

MAY_IMPORT = {
    "errors": set(),
    "words": {"errors"},
    "env": {"errors"},
    "checks": {"words", "errors"},
    "layout": {"words", "errors"},
    "fp8": {"words", "errors"},
    "wires": {"errors", "layout"},
    "backends": {"words", "errors", "layout", "fp8", "wires"},
    "resolve": {"words", "errors", "env", "checks", "backends"},
    "api": {"words", "errors", "resolve", "backends"},
    "__init__": {"words", "errors", "api"},
    "autograd": {"words", "errors", "checks", "layout", "api"},
    "nn": {"words", "errors", "checks", "api", "autograd"},
    "compat": {"__init__", "words", "errors", "checks", "fp8", "api", "autograd"},
    "testing": {"words", "errors", "api", "nn"},
    "bench": {"__init__", "words", "errors", "env", "fp8", "api", "testing"},
    # Of compat only the folder that `tokenferry deep-ep-path` prints.
    "cli": {"__init__", "words", "errors", "env", "api", "autograd", "nn", "testing", "bench", "compat"},
}
LAZY = {"rich", "matplotlib"}
"""Packages that may be missing; imported inside functions only."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted names that a tree imports; ``from a import b`` is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def public_homes() -> dict[str, str]:
    """Room of each name that tokenferry/__init__.py passes on."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    return {n.split(".")[2]: n.split(".")[1] for n, _ in imports(tree) if n.startswith("tokenferry.")}


def target_room(name: str, homes: dict[str, str]) -> str:
    _, _, rest = name.partition(".")
    part = rest.split(".")[0]
    if part in homes:
        return homes[part]
    return part if part in MAY_IMPORT and part != "__init__" else "__init__"


def test_rooms_import_downwards_only():
    homes = public_homes()
    wrong = []
    for path, tree in trees():
        allowed = MAY_IMPORT.get(room(path))
        assert allowed is not None, f"{path}: a new room needs a line in MAY_IMPORT and in docs/architecture.md"
        for name, _ in imports(tree):
            if name.split(".")[0] == "tokenferry" and target_room(name, homes) not in allowed | {room(path)}:
                wrong.append(f"{path.relative_to(ROOT)} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_arrows_have_no_cycle():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert order[0] == "errors"


def test_nobody_imports_the_deep_ep_shim():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees()
        for name, _ in imports(tree)
        if room(path) != "compat"
        and name.startswith("tokenferry.compat")
        and not (room(path) == "cli" and name.startswith("tokenferry.compat.deep_ep_path"))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_oracle_shares_no_code_with_what_it_judges():
    tree = ast.parse((ROOT / "testing" / "oracle.py").read_text())
    assert {name.split(".")[0] for name, _ in imports(tree)} == {
        "__future__",
        "collections",
        "dataclasses",
        "math",
        "torch",
    }


def test_nothing_but_torch_and_the_standard_library():
    """The folder that holds the name deep_ep imports tokenferry's shim under that name."""
    own = {"tokenferry", "torch", *sys.stdlib_module_names}
    wrong = []
    for path, tree in trees():
        top = {id(node) for node in tree.body}
        for name, node in imports(tree):
            package = name.split(".")[0]
            lazy = package in LAZY and id(node) not in top and room(path) in ("cli", "bench")
            inside = package == "deep_ep" and "deep_ep_path" in path.parts
            if package not in own and not lazy and not inside:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_env_reads_the_environment():
    wrong = []
    for path, tree in trees():
        if room(path) == "env":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
        wrong += [f"{path.relative_to(ROOT)}: {n}" for n, _ in imports(tree) if n in ("os.environ", "os.getenv")]
    assert not wrong, "\n".join(wrong)


def _is_guard(node: ast.stmt) -> bool:
    """``if TYPE_CHECKING`` or ``if __name__ == "__main__"``."""
    if not isinstance(node, ast.If):
        return False
    names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
    return bool(names & {"TYPE_CHECKING", "__name__"})


def _is_harmless(node: ast.stmt, path: Path) -> bool:
    definition = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    if isinstance(node, definition) or _is_guard(node):
        return True
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    # Custom operators are registered with torch when their room is imported; there is no other way.
    return room(path) == "autograd" and "register" in ast.unparse(node)


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_file_only_defines(name):
    path = ROOT / name
    if "deep_ep_path" in path.parts:
        return
    tree = ast.parse(path.read_text())
    wrong = [f"{name}:{node.lineno}" for node in tree.body if not _is_harmless(node, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    """Docstrings do not count: a contract that is written out in full shall cost nothing."""
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    lines = len(text.splitlines()) - sum(_doc_lines(node) for node in (tree, *nodes))
    assert lines <= MAX_FILE_LINES, f"{name} has {lines} lines: split it"
    sizes = {f"{name}:{n.lineno} {n.name}": n.end_lineno - n.lineno + 1 - _doc_lines(n) for n in nodes}
    functions = {f"{name}:{n.lineno} {n.name}" for n in nodes if not isinstance(n, ast.ClassDef)}
    wrong = [
        f"{what} has {size} lines" for what, size in sizes.items() if what in functions and size > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def _doc_lines(node: ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.end_lineno - first.lineno + 1
    return 0
