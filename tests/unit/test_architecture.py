"""The rooms of the package, the arrows between them, and the sizes of their files."""

import ast
import graphlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("tokenferry").origin).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
DEVICE_CODE = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.cuh"))

MAY_IMPORT = {
    "errors": set(),
    "types": {"errors"},
    "env": {"errors"},
    "checks": {"errors"},
    "layout": {"types", "errors"},
    "formats": {"types", "errors"},
    "tuning": {"types", "errors"},
    "transports": {"errors"},
    # Knows nothing of experts: could be lifted out as it is.
    "jit": {"errors"},
    "memory": {"errors", "transports", "jit"},
    "kernels": {"errors", "jit"},
    "backends": {"types", "errors", "layout", "formats", "tuning", "transports", "jit", "memory", "kernels"},
    "options": {"types", "errors", "env", "backends"},
    "resolve": {"types", "errors", "checks", "backends"},
    "api": {"types", "errors", "options", "resolve", "backends"},
    "__init__": {"types", "errors", "api"},
    "autograd": {"types", "errors", "layout", "api"},
    "nn": {"types", "errors", "api", "autograd"},
    "compat": {"__init__", "types", "errors", "checks", "api"},
    "testing": {"types", "errors", "api"},
    # What the links do is measured below the API, by kernels of its own.
    "bench": {
        "__init__",
        "types",
        "errors",
        "env",
        "api",
        "testing",
        "tuning",
        "transports",
        "jit",
        "memory",
        "kernels",
    },
    "demo": {"types", "errors", "api", "autograd", "nn", "testing", "bench"},
    # Of compat only the folder that `tokenferry deep-ep-path` prints; of jit what `tokenferry doctor` asks it.
    "cli": {
        "demo",
        "__init__",
        "types",
        "errors",
        "env",
        "api",
        "autograd",
        "nn",
        "testing",
        "bench",
        "tuning",
        "compat",
        "jit",
    },
}
LAZY = {"rich": {"cli"}, "matplotlib": {"demo", "bench"}, "cuda": {"jit", "memory", "backends"}}
"""Packages that may be missing, and who may import them: inside functions only."""

CUDA_ROOMS = {"jit", "memory", "kernels"}
"""Rooms that a program on CPUs never opens."""

NEVER = r"cuMulticast|multimem|MallocManaged|cuMemAllocManaged"
"""NVLink multicast and managed memory: the first is to stay off, the second hides who moves what."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_DEVICE_FUNCTION_LINES = 80


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


def dynamic_imports(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """What a tree hands to ``import_module`` or ``__import__``: of an f-string its beginning, else "?"."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            yield name.value if isinstance(name, ast.Constant) else "?", node


def later(tree: ast.AST) -> set[int]:
    """The nodes that importing a file does not run: inside of functions, and what is for type checkers only."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    homes = [node for node in ast.walk(tree) if isinstance(node, functions) or _is_guard(node)]
    return {id(inner) for home in homes for inner in ast.walk(home)}


def foreign(home: str, tree: ast.AST) -> list[str]:
    """Packages that a file of this room may not import, or not at once."""
    own = {"tokenferry", "torch", *sys.stdlib_module_names}
    lazily = later(tree)
    wrong = []
    for name, node in (*imports(tree), *dynamic_imports(tree)):
        package = name.split(".")[0]
        if package not in own and not (home in LAZY.get(package, ()) and id(node) in lazily):
            wrong.append(name)
    return wrong


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
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in trees()
        for name in foreign(room(path), tree)
        if not (name.split(".")[0] == "deep_ep" and "deep_ep_path" in path.parts)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("home", "text", "good"),
    [
        ("jit", "def f(): from cuda.bindings import driver", True),
        ("jit", 'def f(name): importlib.import_module(f"cuda.bindings.{name}")', True),
        ("jit", "import cuda.bindings.driver", False),
        ("jit", "try:\n    import cuda\nexcept ImportError:\n    cuda = None", False),
        ("jit", 'importlib.import_module("cuda.bindings")', False),
        ("memory", "class A:\n    def f(self): import cuda", True),
        ("kernels", "def f(): import cuda", False),
        ("bench", "def f(): from cuda.bindings import driver", False),
        ("bench", "def f(name): importlib.import_module(name)", False),
        ("bench", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure", True),
        ("api", "def f(): import numpy", False),
        ("api", "import torch, os", True),
    ],
)
def test_foreign_imports_are_noticed(home, text, good):
    assert (foreign(home, ast.parse(text)) == []) is good


def test_cpu_programs_open_no_room_of_cuda():
    """What is imported with tokenferry, statement by statement, reaches neither kernels nor what launches them."""
    files = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
    files |= {name.removesuffix(".__init__"): path for name, path in files.items()}
    seen, waiting = set(), ["tokenferry"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tree = ast.parse(files[module].read_text())
        lazily = later(tree)
        for name, node in imports(tree):
            parts = name.split(".")
            names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & files.keys()
            if id(node) not in lazily:
                waiting += names - seen
    assert "tokenferry.backends.cpu.backend" in seen
    closed = CUDA_ROOMS | {"backends.cuda"}
    wrong = [module for module in seen if module.removeprefix("tokenferry.").startswith(tuple(closed))]
    assert not wrong, f"imported with tokenferry: {sorted(wrong)}"


def test_every_kernel_has_both_its_halves():
    folders = sorted(path for path in (ROOT / "kernels").iterdir() if (path / "__init__.py").exists())
    assert folders
    for folder in folders:
        assert {"spec.py", "kernel.cuh"} <= {path.name for path in folder.iterdir()}, folder.name
        head = (folder / "kernel.cuh").read_text().split("#include")[0]
        for part in ("Grid", "Reads", "Writes", "Cost", "Tests"):
            assert re.search(rf"^// {part} ", head, flags=re.MULTILINE), f"{folder.name}/kernel.cuh: no line {part!r}"


@pytest.mark.parametrize("name", DEVICE_CODE)
def test_sizes_of_device_code(name):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{name} has {lines} lines: split it"


def test_neither_multicast_nor_managed_memory():
    files = [*FILES, *(ROOT / name for name in DEVICE_CODE)]
    wrong = [str(path.relative_to(ROOT)) for path in files if re.search(NEVER, path.read_text())]
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


def test_the_backends_share_nothing_but_what_lies_above_them():
    folders = ROOT / "backends"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in trees()
        for name, _ in imports(tree)
        for own, other in (("cpu", "cuda"), ("cuda", "cpu"))
        if folders / own in path.parents and name.startswith(f"tokenferry.backends.{other}")
    ]
    assert not wrong, "\n".join(wrong)


def device_functions(text: str) -> Iterator[tuple[str, int]]:
    """First line and number of lines of each function at the top level of device code, as clang-format writes it."""
    first, start, opened = "", 0, False
    for number, line in enumerate(text.splitlines()):
        if not first and re.match(r"(?!template|struct|constexpr|typedef)[A-Za-z]", line):
            first, start, opened = line, number, False
        opened = opened or line.endswith("{")
        if first and line == "}":
            yield first, number - start + 1
        if line == "}" or (not opened and line.endswith((";", "}"))):
            first = ""


@pytest.mark.parametrize("name", DEVICE_CODE)
def test_sizes_of_device_functions(name):
    sizes = device_functions((ROOT / name).read_text())
    wrong = [f"{first} has {size} lines" for first, size in sizes if size > MAX_DEVICE_FUNCTION_LINES]
    assert not wrong, f"{name}: " + "\n".join(wrong)


def test_device_functions_are_found():
    text = "DEV void f() { return; }\nDEV void g(int a,\n           int b) {\n    if (a) {\n    }\n}\nstruct S {\n};\n"
    assert list(device_functions(text)) == [("DEV void g(int a,", 5)]
    names = [name for name in DEVICE_CODE if list(device_functions((ROOT / name).read_text()))]
    assert len(names) > len(DEVICE_CODE) // 2


def test_inline_assembly_lies_in_one_file():
    """The emulator replaces that file, and translates no instruction elsewhere."""
    found = [name for name in DEVICE_CODE if re.search(r"\basm\b", (ROOT / name).read_text())]
    assert found == ["kernels/device/ptx.cuh"]
