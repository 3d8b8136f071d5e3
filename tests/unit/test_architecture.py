"""The structure of the package: imports between its parts, sizes of files and functions, rules for signatures."""

import ast
import graphlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenferry

ROOT = Path(importlib.util.find_spec("tokenferry").origin).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
DEVICE_CODE = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.cuh"))

MAY_IMPORT = {
    "errors": set(),
    "forked": set(),
    "ambient": set(),
    "types": {"errors"},
    "topology": {"errors"},
    "env": {"errors"},
    "checks": {"errors"},
    "layout": {"types", "errors"},
    "formats": {"types", "errors"},
    "tuning": {"types", "errors"},
    "cost": {"types", "errors", "topology", "layout", "tuning"},
    "transports": {"errors", "forked", "topology"},
    # Independent of experts, and usable outside of this project.
    "jit": {"errors"},
    "memory": {"errors", "forked", "transports", "jit"},
    "kernels": {"errors", "jit"},
    "backends": {
        "types",
        "errors",
        "forked",
        "ambient",
        "topology",
        "layout",
        "formats",
        "tuning",
        "transports",
        "jit",
        "memory",
        "kernels",
    },
    "options": {"types", "errors", "env", "forked", "topology", "backends"},
    "resolve": {"types", "errors", "topology", "checks", "backends"},
    "api": {"types", "errors", "ambient", "topology", "options", "resolve", "backends"},
    "__init__": {"types", "errors", "topology", "api"},
    "autograd": {"types", "errors", "checks", "layout", "formats", "api"},
    "nn": {"types", "errors", "ambient", "topology", "api", "autograd"},
    "compat": {"__init__", "types", "errors", "ambient", "checks", "env", "options", "api"},
    # From compat only the folder of `tokenferry deep-ep-path`.
    "integrations": {"types", "errors", "env", "api", "autograd", "compat"},
    # From compat only the chaos soak, which uses all APIs.
    "testing": {"types", "errors", "env", "api", "compat"},
    # Links are measured below the API, by separate kernels. From compat what programs written for DeepEP feel.
    "bench": {
        "__init__",
        "types",
        "errors",
        "topology",
        "env",
        "api",
        "nn",
        "testing",
        "tuning",
        "cost",
        "transports",
        "jit",
        "memory",
        "kernels",
        "compat",
        "integrations",
    },
    "demo": {"types", "errors", "api", "autograd", "nn", "testing", "bench"},
    "__main__": {"cli"},
    # From compat only the folder of `tokenferry deep-ep-path`; from jit only the checks of `tokenferry doctor`; from
    # kernels only the limits that `tokenferry explain` and `tokenferry plan` check.
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
        "cost",
        "compat",
        "integrations",
        "jit",
        "kernels",
    },
}
LAZY = {
    "rich": {"cli"},
    "matplotlib": {"demo", "bench"},
    "cuda": {"jit", "memory", "backends"},
    "megatron": {"bench"},
    "deep_ep": {"bench", "integrations"},
    "transformers": {"bench", "integrations"},
}
"""Optional packages, and the parts that may import them, inside functions only."""

CUDA_PARTS = {"jit", "memory", "kernels"}
"""Parts that a program on CPUs never imports."""

NEVER = r"cuMulticast|multimem|MallocManaged|cuMemAllocManaged"
"""NVLink multicast must stay off, and managed memory hides which processor moves data."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_DEVICE_FUNCTION_LINES = 80

ONE_THING = {
    "shape": "the sizes of a tensor",
    "capability": "the compute capability of a GPU, as torch returns it",
    "output": "the results of an operator, as torch passes them to setup_context",
    "pair": "a source and a destination rank: the name of a link",
    "late": "likewise: a link whose rows are late",
}
"""Parameters whose fixed number of like elements is a single value, and the value that it is."""


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to: its top-level folder or module."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Return the dotted names that a tree imports; ``from a import b`` is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def dynamic_imports(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Return the arguments of ``import_module`` and ``__import__``: of an f-string its beginning, else "?"."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            yield name.value if isinstance(name, ast.Constant) else "?", node


def deferred_nodes(tree: ast.AST) -> set[int]:
    """Return the nodes that an import does not run: those inside of functions, and those for type checkers only."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    deferred = [node for node in ast.walk(tree) if isinstance(node, functions) or _is_guard(node)]
    return {id(inner) for node in deferred for inner in ast.walk(node)}


def foreign(part: str, tree: ast.AST) -> list[str]:
    """Return the packages that a file of this part may not import, or only inside functions."""
    own = {"tokenferry", "torch", *sys.stdlib_module_names}
    lazily = deferred_nodes(tree)
    wrong = []
    for name, node in (*imports(tree), *dynamic_imports(tree)):
        package = name.split(".")[0]
        if package not in own and not (part in LAZY.get(package, ()) and id(node) in lazily):
            wrong.append(name)
    return wrong


def public_parts() -> dict[str, str]:
    """Return the part that defines each name that tokenferry/__init__.py exports."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    return {n.split(".")[2]: n.split(".")[1] for n, _ in imports(tree) if n.startswith("tokenferry.")}


def target_part(name: str, public: dict[str, str]) -> str:
    _, _, rest = name.partition(".")
    part = rest.split(".")[0]
    if part in public:
        return public[part]
    return part if part in MAY_IMPORT and part != "__init__" else "__init__"


def test_parts_import_downwards_only():
    public = public_parts()
    wrong = []
    for path, tree in trees():
        allowed = MAY_IMPORT.get(part_of(path))
        assert allowed is not None, f"{path}: a new part needs a line in MAY_IMPORT and in docs/architecture.md"
        for name, _ in imports(tree):
            if name.split(".")[0] == "tokenferry" and target_part(name, public) not in allowed | {part_of(path)}:
                wrong.append(f"{path.relative_to(ROOT)} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_allowed_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert order[0] == "errors"


def test_the_deep_ep_shim_is_not_imported():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees()
        for name, _ in imports(tree)
        if part_of(path) != "compat"
        and name.startswith("tokenferry.compat")
        and not (
            part_of(path) in ("cli", "bench", "integrations") and name.startswith("tokenferry.compat.deep_ep_path")
        )
        and path.name not in ("chaos_shim.py", "eager_shim.py", "nodes_shim.py")
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
    """The only exception: the folder for PYTHONPATH imports tokenferry's shim as deep_ep."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in trees()
        for name in foreign(part_of(path), tree)
        if not (name.split(".")[0] == "deep_ep" and "deep_ep_path" in path.parts)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "text", "good"),
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
def test_foreign_imports_are_noticed(part, text, good):
    assert (foreign(part, ast.parse(text)) == []) is good


def test_cpu_programs_import_no_part_of_cuda():
    """The modules imported with tokenferry include neither kernels nor the code that launches them."""
    files = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
    files |= {name.removesuffix(".__init__"): path for name, path in files.items()}
    seen, waiting = set(), ["tokenferry", *(f"tokenferry.{name}" for name in tokenferry._MODULES)]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tree = ast.parse(files[module].read_text())
        lazily = deferred_nodes(tree)
        for name, node in imports(tree):
            parts = name.split(".")
            names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & files.keys()
            if id(node) not in lazily:
                waiting += names - seen
    assert "tokenferry.backends.cpu.backend" in seen
    closed = CUDA_PARTS | {"backends.cuda"}
    wrong = [module for module in seen if module.removeprefix("tokenferry.").startswith(tuple(closed))]
    assert not wrong, f"imported with tokenferry: {sorted(wrong)}"


def test_every_kernel_has_a_spec_and_device_code():
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
        if part_of(path) == "env":
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
    # torch requires that custom operators are registered on import.
    return part_of(path) == "autograd" and "register" in ast.unparse(node)


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
    """Docstrings do not count, so that a complete contract costs nothing."""
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


def aliases_of(tree: ast.Module) -> dict[str, ast.expr]:
    """Return the module-level names that may stand for a type, with their values."""
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    annotated = {
        node.target.id: node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    named = {**assigned, **annotated}
    return {name: value for name, value in named.items() if isinstance(value, ast.Subscript | ast.BinOp | ast.Name)}


def known_aliases(tree: ast.Module, by_module: dict[str, dict[str, ast.expr]]) -> dict[str, ast.expr]:
    """Return the aliases of a module, and those that it imports from the modules in ``by_module``."""
    known = aliases_of(tree)
    for name, _ in imports(tree):
        module, _, last = name.rpartition(".")
        if last in by_module.get(module, {}):
            known[last] = by_module[module][last]
    return known


def is_bundle(name: str, annotation: ast.expr, aliases: dict[str, ast.expr]) -> bool:
    """Return whether a parameter of this name and type is a tuple of unlike things, or may be one."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Name) and annotation.id in aliases:
        others = {alias: value for alias, value in aliases.items() if alias != annotation.id}
        return is_bundle(name, aliases[annotation.id], others)
    if isinstance(annotation, ast.BinOp):
        return any(is_bundle(name, side, aliases) for side in (annotation.left, annotation.right))
    if not isinstance(annotation, ast.Subscript):
        return False
    generic = ast.unparse(annotation.value).rpartition(".")[2]
    elements = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if generic in ("Optional", "Union"):
        return any(is_bundle(name, element, aliases) for element in elements)
    if generic not in ("tuple", "Tuple") or len(elements) < 2 or ast.unparse(elements[-1]) == "...":
        return False
    return len({ast.unparse(element) for element in elements}) > 1 or name not in ONE_THING


def bundles(tree: ast.Module, aliases: dict[str, ast.expr]) -> Iterator[tuple[ast.arg, str]]:
    """Return the parameters of all functions that are tuples of unlike things, with the functions' names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            extra = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
            for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra):
                if each.annotation is not None and is_bundle(each.arg, each.annotation, aliases):
                    yield each, node.name


def test_no_parameter_is_a_tuple_of_unlike_things():
    """Values that belong together have names: they are fields of a dataclass.

    A tuple of any length (``tuple[int, ...]``) is a sequence. A tuple of fixed length is refused even if its elements
    have one type, since two integers are rarely one thing; the exceptions are in `ONE_THING`, by the parameter's name.
    Tuples inside of a collection (``Sequence[tuple[str, float]]``) are its items, like those of a dict, and results are
    not parameters. compat has the signatures of DeepEP.
    """
    modules = dict(trees())
    by_module = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): aliases_of(tree)
        for path, tree in modules.items()
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{each.lineno} {function}: {ast.unparse(each)}"
        for path, tree in modules.items()
        if part_of(path) != "compat"
        for each, function in bundles(tree, known_aliases(tree, by_module))
    ]
    assert not wrong, "use a dataclass:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(a: tuple[int, str]): ...", ["a"]),
        ("def f(a: tuple[int, int]): ...", ["a"]),
        ("def f(shape: tuple[int, int]): ...", []),
        ("def f(shape: tuple[int, bool]): ...", ["shape"]),
        ("def f(a: tuple[int, ...]): ...", []),
        ("def f(a, b: int, c: list[int]): ...", []),
        ("async def f(a: int, /, b: tuple[int, str], *, c: tuple[str, int]): ...", ["b", "c"]),
        ("def f(*args: tuple[int, str], **more: tuple[int, str]): ...", ["args", "more"]),
        ("def f(a: tuple[int, str] | None, b: Optional[Tuple[int, str]]): ...", ["a", "b"]),
        ('def f(a: "tuple[int, str]"): ...', ["a"]),
        ("class A:\n    def f(self, a: typing.Tuple[int, bool]): ...", ["a"]),
        ("def f():\n    def g(a: tuple[int, str]): ...", ["a"]),
        ("Sms = tuple[int, int]\ndef f(sms: Sms): ...", ["sms"]),
        ("Sms: TypeAlias = tuple[int, bool]\ndef f(sms: Sms | None): ...", ["sms"]),
        ("A = tuple[int, str]\nB = A | None\nC = B\ndef f(a: C): ...", ["a"]),
        ("A = tuple[int, ...]\ndef f(a: A): ...", []),
        ("from tokenferry.other import Sms\ndef f(sms: Sms): ...", ["sms"]),
        ("def f(rows: Sequence[tuple[str, float]]): ...", []),
        ("def f() -> tuple[int, str]: ...", []),
    ],
)
def test_tuples_of_unlike_things_are_noticed(text, found):
    tree = ast.parse(text)
    other = {"tokenferry.other": aliases_of(ast.parse("Sms = tuple[int, int]"))}
    assert [each.arg for each, _ in bundles(tree, known_aliases(tree, other))] == found


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


TESTS = sorted(Path(__file__).parents[1].rglob("*.py"))


def lines_of_tests(pattern: str) -> list[str]:
    """Return the lines under tests/ that match, programs in strings included."""
    return [
        f"{path.name}: {line.strip()}"
        for path in TESTS
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]


def test_no_test_module_imports_another():
    """Shared helpers are in tests/support, so that each can be moved, renamed or run alone."""
    assert len(TESTS) > 100
    assert not lines_of_tests(r"^\s*(from\s+([\w.]+\.)?test_\w*\s+import|import\s.*\btest_|from\s.*\simport\s+test_)")


def test_only_the_test_runner_puts_folders_on_the_import_path():
    assert not lines_of_tests(r"sys\.path(\.(insert|append|extend)\(|\[.*\] *=[^=]| *\+?=[^=])")


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
