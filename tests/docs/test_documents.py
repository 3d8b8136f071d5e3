"""Documents are true: their code runs and prints what they say, their links lead somewhere, what they name exists."""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenferry
from support import documents
from tokenferry import env
from tokenferry.cli.main import main
from tokenferry.cli.parser import COMMANDS
from tokenferry.compat.deep_ep import Buffer, ElasticBuffer, EPBuffer, HybridEPBuffer

PYTHON_LANGUAGES = ("python", "pycon")
LANGUAGES = {"python", "pycon", "text", "bash", "make"}
ON_GPUS = re.compile(r"# on (?:a GPU|GPUs: (\w+\.py))$", re.MULTILINE)
"""First line of a `python` block that needs GPUs: of the session, or a program with a name, one rank a GPU."""
PACKAGE = documents.ROOT / "src" / "tokenferry"
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
WITH_CODE = [
    path for path in documents.FILES if any(b.language in PYTHON_LANGUAGES for b in documents.blocks(path.read_text()))
]


def run_blocks(path: Path) -> None:
    """Run a document as one session, in the current folder.

    A `text` block right after a `python` block is what that block prints. A `python` block whose first line is a
    comment with a file's name, such as `# example.py`, is a program of its own; `# example.py, on 4 ranks` is started
    by torchrun. One whose first line says that it needs GPUs is compiled, and run where there are any.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    found = documents.blocks(path.read_text())
    for i, block in enumerate(found):
        where = f"{documents.name(path)}:{block.line}"
        if block.language == "python" and (on_gpus := ON_GPUS.match(block.text)):
            run_on_gpus(path, block, names, on_gpus[1])
        elif block.language == "python":
            program = re.match(r"# (\w+\.py)(?:, on (\d+) ranks)?$", block.text, flags=re.MULTILINE)
            command = torchrun(int(program[2])) if program and program[2] else ()
            printed = run_program(program[1], block.text, *command) if program else run_here(path, block, names)
            after = found[i + 1] if i + 1 < len(found) else None
            if after is not None and after.language == "text" and after.adjacent:
                assert printed == after.text, f"{where} prints something else than the text below it:\n{printed}"
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, where, str(path), block.line - 1)
            report = io.StringIO()
            runner = doctest.DocTestRunner(verbose=False)
            runner.run(test, out=report.write, clear_globs=False)
            names = test.globs
            assert runner.tries > 0, f"{where}: a pycon block without >>>"
            assert runner.failures == 0, report.getvalue()


def run_here(path: Path, block: documents.Block, names: dict[str, object]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), names)
    return printed.getvalue()


def run_on_gpus(path: Path, block: documents.Block, names: dict[str, object], file: str | None) -> None:
    compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    if NUM_GPUS and file is None:
        run_here(path, block, names)
    elif NUM_GPUS:
        run_program(file, block.text, *torchrun(min(NUM_GPUS, 4)))


def torchrun(num_ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))


def run_program(file: str, text: str, *command: str) -> str:
    Path(file).write_text(text)
    # NVLink multicast, which NCCL would use, is never ours to try.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    words = [sys.executable, *command, file]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert done.returncode == 0, f"{file} failed:\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("path", WITH_CODE, ids=documents.name)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(path)


def test_the_program_with_checkpoints_runs_on_one_rank_too(tmp_path, monkeypatch):
    """There parameters of experts are no DTensors."""
    monkeypatch.chdir(tmp_path)
    page = documents.blocks((documents.ROOT / "docs" / "training.md").read_text())
    (program,) = (block.text for block in page if block.text.startswith("# checkpoint.py"))
    run_program("checkpoint.py", program, *torchrun(1))


FORBIDDEN_BEGINNING = re.compile(
    r"(?:^|\n\n|(?<=[.!?:]\s)|(?<=[.!?]\)\s)|(?<=\n[-*] )|(?<=\n\d\. )|(?<=\| )|(?<=\()|(?<=\*\*))"
    r"(?:Who|What|Of)\b[^\n]{0,60}"
)
SENTENCES = [path for path in documents.FILES if path.name != "NOTES.md"]
"""Documents in the style of CONTRIBUTING.md; NOTES.md has reports, which stay as they were written."""


@pytest.mark.parametrize("path", SENTENCES, ids=documents.name)
def test_sentences_begin_as_contributing_asks(path):
    text = re.sub(r"^#.*$", "", documents.prose(path.read_text()), flags=re.MULTILINE)
    found = [one[0].strip() for one in FORBIDDEN_BEGINNING.finditer(text) if one[0].strip() != "What next](#what-next)"]
    assert found == [], f"{documents.name(path)}: sentences begin with Who, What or Of"


def test_forbidden_sentences_are_found():
    text = "Fine. What is not\nfine. Of these\n\n- Who is it?\n- **What fits**\n\n| a | What |\n\nWhatever. Office."
    assert [one[0].split()[0] for one in FORBIDDEN_BEGINNING.finditer(text)] == ["What", "Of", "Who", "What", "What"]


def test_the_buffers_beside_deep_eps_hint(capsys):
    """docs/coming-from-deepep.md says how many times as large the hint is as the buffers of the command."""
    page = (documents.ROOT / "docs" / "coming-from-deepep.md").read_text()
    words, times = re.search(
        r"`tokenferry (plan [^`]*)` shows the buffers.*?is (\d+) times as large", page, re.S
    ).groups()
    assert main([*words.split(), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    ratio = found["deep_ep_v1"]["buffer_bytes"] / found["decoding"]["memory"]["network_bytes"]
    assert int(ratio) == int(times)


def test_documents_that_promise_code_have_some():
    assert {"README.md", "docs/quickstart.md", "docs/concepts.md"} <= set(map(documents.name, WITH_CODE))


def test_a_wrong_document_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for wrong in (
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```pycon\n>>> 1\n2\n```\n",
        "```python\nassert False\n```\n",
        "```python\n# on a GPU\nassert import\n```\n",
        "```python\n# on GPUs: train.py\nassert import\n```\n",
    ):
        page.write_text(wrong)
        with pytest.raises((AssertionError, SyntaxError)):
            run_blocks(page)


def test_blocks_for_gpus_are_left_out_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "NUM_GPUS", 0)
    page = tmp_path / "page.md"
    page.write_text("```python\n# on a GPU\nassert False\n```\n\n```python\n# on GPUs: a.py\nassert False\n```\n")
    run_blocks(page)
    page.write_text("```python\n# on a GPU, later\nassert False\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page)


@pytest.mark.parametrize("path", documents.FILES, ids=documents.name)
def test_blocks_say_their_language(path):
    for block in documents.blocks(path.read_text()):
        assert block.language in LANGUAGES, f"{documents.name(path)}:{block.line}: one of {sorted(LANGUAGES)} is needed"


@pytest.mark.parametrize("path", documents.FILES, ids=documents.name)
def test_links_lead_somewhere(path):
    for link in documents.links(path.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{documents.name(path)}: {link}: there is no such file"
        if anchor:
            assert anchor in documents.anchors(file.read_text()), f"{documents.name(path)}: {link}: no such heading"


def test_links_in_the_code_lead_somewhere():
    found = 0
    for source in sorted((documents.ROOT / "src").rglob("*.py")):
        # A message may be split over two literals: join adjacent ones before looking.
        text = re.sub(r'"\s*\n\s*f?"', "", source.read_text())
        named = re.findall(r"(docs/[\w-]+\.md)(?:#([\w-]+))?", text)
        pages = re.findall(r"page_(?:address|place)\([\"']([\w-]+)[\"'](?:, [\"']([\w-]+)[\"'])?\)", text)
        for target, anchor in [*named, *((f"docs/{page}.md", anchor) for page, anchor in pages)]:
            found += 1
            assert (documents.ROOT / target).exists(), f"{source}: {target}: there is no such file"
            if anchor:
                headings = documents.anchors((documents.ROOT / target).read_text())
                assert anchor in headings, f"{source}: {target}#{anchor}: no such heading"
    assert found, "the doctor, at least, points at docs/across-nodes.md"


@pytest.mark.parametrize("path", documents.FILES, ids=documents.name)
def test_named_files_exist(path):
    """`folder/file.ext` in backticks is a file of this repository, seen from its root or from src/tokenferry."""
    bases = (documents.ROOT, documents.ROOT / "src" / "tokenferry", documents.ROOT / "tests")
    for word in re.findall(r"`([\w./-]+/[\w.-]*)`", documents.prose(path.read_text())):
        if word.startswith(("/", "..")):
            continue
        assert any((base / word).exists() for base in bases), f"{documents.name(path)}: `{word}`: there is no such file"


def test_named_targets_and_commands_exist():
    targets = set(re.findall(r"^(\w+):", (documents.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in documents.FILES:
        text = path.read_text()
        for target in re.findall(r"(?:`|^|\$ )make (\w+)", text, flags=re.MULTILINE):
            assert target in targets, f"{documents.name(path)}: make {target}"
        for command in re.findall(r"(?:`|^|\()tokenferry ([a-z][\w-]*)", text, flags=re.MULTILINE):
            assert command in COMMANDS, f"{documents.name(path)}: tokenferry {command}"


def test_every_exception_has_a_heading():
    page = documents.prose((documents.ROOT / "docs" / "errors.md").read_text())
    headings = set(re.findall(r"^### (\w+)$", page, flags=re.MULTILINE))
    errors = {
        n for n in tokenferry.__all__ if isinstance(x := getattr(tokenferry, n), type) and issubclass(x, Exception)
    }
    assert headings == errors


def test_every_variable_is_documented():
    page = (documents.ROOT / "docs" / "quickstart.md").read_text()
    for variable in env.VARIABLES:
        assert re.search(rf"^\| `{variable.name}` \| `{variable.default}` \|", page, flags=re.MULTILINE), variable.name


def test_every_public_name_is_in_a_document():
    text = "".join(path.read_text() for path in documents.FILES)
    missing = [name for name in tokenferry.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_readme_example_runs_on_several_ranks(tmp_path, monkeypatch):
    """The same lines, started by torchrun, as the README says."""
    monkeypatch.chdir(tmp_path)
    found = documents.blocks((documents.ROOT / "README.md").read_text())
    example = next(block for block in found if block.text.startswith("# example.py\n"))
    printed = run_program("example.py", example.text, *torchrun(2))
    assert sorted(re.findall(r"rank (\d) of 2", printed)) == ["0", "1"], printed


def imported_modules() -> dict[str, set[str]]:
    """Which modules of the package, files or folders at its top, each of them imports."""
    modules: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        text = path.read_text()
        found = set(
            re.findall(r"^\s*from tokenferry\.(\w+)[\w.]* import|^\s*import tokenferry\.(\w+)", text, re.MULTILINE)
        )
        named = re.findall(r"^\s*from tokenferry import ([\w, ]+)$", text, re.MULTILINE)
        names = {name for pair in found for name in pair if name} | {
            n.strip() for line in named for n in line.split(",")
        }
        modules.setdefault(module, set()).update(names - {module})
    del modules["__init__"]
    return {module: {name for name in names if name in modules} for module, names in modules.items()}


def test_the_table_of_modules_is_complete_and_its_imports_are_true():
    page = (documents.ROOT / "docs" / "architecture.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", page, flags=re.MULTILINE))
    modules = imported_modules()
    assert set(table) == set(modules)
    for module, imports in modules.items():
        extra = imports - set(table[module].split(", "))
        assert not extra, f"docs/architecture.md: {module} imports {sorted(extra)} too"


CHANGING = {"append", "add", "pop", "popitem", "clear", "setdefault", "update", "extend", "insert", "remove", "discard"}


def changed_names(tree: ast.AST) -> set[str]:
    """Names, dotted for attributes, that the functions of a file assign to, put items into or draw from."""
    changed: set[str] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                changed.update(node.names)
            elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                changed.add(ast.unparse(node.value if isinstance(node, ast.Subscript) else node))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
                changed.add(ast.unparse(node.func.value))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
                changed.update(ast.unparse(argument) for argument in node.args[:1])
    return changed


def global_state(text: str) -> set[str]:
    """Names at the top of a file, or of its classes, that its functions change, and functions that keep results."""
    tree = ast.parse(text)
    changed, found = changed_names(tree), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(mark) for mark in node.decorator_list):
            found.add(node.name)
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for line in inside:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            found |= {f"{prefix}{t.id}" for t in targets if isinstance(t, ast.Name) and f"{prefix}{t.id}" in changed}
    return found


def test_all_global_state_is_listed():
    page = (documents.ROOT / "docs" / "architecture.md").read_text()
    section = page.split("\n## Global state\n")[1].split("\n## ")[0]
    found = {
        ".".join((*path.relative_to(PACKAGE).with_suffix("").parts, name))
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in global_state(path.read_text())
    }
    assert set(re.findall(r"^\| `([\w.]+)` \|", section, flags=re.MULTILINE)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = {}\ndef f(): a[1] = 2", {"a"}),
        ("a = []\ndef f(): a.append(1)", {"a"}),
        ("a = count()\nclass B:\n    def f(self): self.n = next(a)", {"a"}),
        ("a = 0\ndef f():\n    global a\n    a += 1", {"a"}),
        ("class A:\n    n = 1\n    def f(): A.n = 2", {"A.n"}),
        ("@functools.cache\ndef f(): return 1", {"f"}),
        ("a = {}\ndef f(): return a[1]", set()),
        ("class A:\n    n = 1\n    def f(self): self.n = 2", set()),
    ],
)
def test_global_state_is_noticed(text, found):
    assert global_state(text) == found


def test_every_folder_of_tests_is_listed():
    page = (documents.ROOT / "docs" / "testing.md").read_text()
    listed = set(re.findall(r"^\| `tests/(\w+)/` \|", page, flags=re.MULTILINE))
    assert listed == {path.parent.name for path in documents.ROOT.glob("tests/*/test_*.py")}


METHODS_WITH_TABLES = {
    Buffer: (
        "__init__",
        "get_dispatch_layout",
        "dispatch",
        "combine",
        "low_latency_dispatch",
        "low_latency_combine",
    ),
    ElasticBuffer: ("__init__", "dispatch", "combine"),
    EPBuffer: ("__init__", "dispatch", "combine"),
    HybridEPBuffer: ("__init__", "dispatch_with_permute", "combine_with_unpermute"),
}
LIKE = {EPBuffer: ElasticBuffer}
"""Classes of whose methods the tables list what differs from those of another class."""
TABLES = [(owner, method) for owner, methods in METHODS_WITH_TABLES.items() for method in methods]


def deepep_section(heading: str) -> str:
    page = (documents.ROOT / "docs" / "coming-from-deepep.md").read_text()
    match = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##)", page, flags=re.MULTILINE | re.DOTALL)
    assert match, f"docs/coming-from-deepep.md: no heading {heading}"
    return match[1]


@pytest.mark.parametrize(("owner", "method"), TABLES)
def test_every_argument_of_the_deepep_api_is_listed(owner, method):
    section = deepep_section(owner.__name__ if method == "__init__" else f"{owner.__name__}.{method}")
    listed = re.findall(r"^\| `(\w+)` \| (?:honoured|kept|trivially true|raises) \|", section, flags=re.MULTILINE)
    found, known = parameters(owner, method), parameters(LIKE[owner], method) if owner in LIKE else {}
    assert listed == [name for name, default in found.items() if name not in known or known[name] != default]
    left_out = set(known) - set(found)
    assert not left_out or set(re.findall(r"`(\w+)`", section.partition("without")[2].partition(".")[0])) == left_out


def parameters(owner, method):
    """Return the defaults of the parameters of a method, in their order."""
    found = inspect.signature(getattr(owner, method)).parameters
    return {name: parameter.default for name, parameter in found.items() if name != "self"}


def test_the_variables_of_deepep_that_are_read_are_listed_as_such():
    page = (documents.ROOT / "docs" / "coming-from-deepep.md").read_text()
    section = page.split("\n## Environment variables\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| ([\w ]+) \| (.*) \|$", section, flags=re.MULTILINE)
    listed = {name: (state, text) for names, state, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert {name for name, (state, _) in listed.items() if state == "refused"} == set(env.DEEP_EP_NETWORK)
    for name, instead in env.DEEP_EP_NETWORK.items():
        assert f"`{instead}`" in listed[name][1]
    assert {name for name, (state, _) in listed.items() if state == "honoured"} == {
        "EP_BUFFER_DEBUG",
        "EP_JIT_CACHE_DIR",
    }


@pytest.mark.parametrize(
    ("owner", "heading"),
    [
        (Buffer, "Small methods"),
        (ElasticBuffer, "Small methods of ElasticBuffer"),
        (EPBuffer, "Small methods of EPBuffer"),
    ],
)
def test_every_method_of_the_deepep_api_is_listed(owner, heading):
    rows = re.findall(r"^\| (`.*?) \|", deepep_section(heading), flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | set(METHODS_WITH_TABLES[owner])
    methods = {name for name in dir(owner) if callable(getattr(owner, name)) and not name.startswith("_")}
    listed |= set(dir(LIKE[owner])) & methods if owner in LIKE else set()
    assert listed == methods | {"__init__"}


def test_arguments_listed_as_raising_raise():
    """Check the tables for the calls of a group of one; tests/compat shows that the rest is honoured."""
    with pytest.raises(tokenferry.UnsupportedError, match="comm"):
        Buffer(None, comm=object())
    with pytest.raises(tokenferry.UnsupportedError, match="num_cpu_bytes"):
        ElasticBuffer(None, num_max_tokens_per_rank=1, num_cpu_bytes=1)
    with pytest.raises(tokenferry.UnsupportedError, match="lb_allocation_plan_or_num_bytes"):
        EPBuffer(None, num_max_tokens_per_rank=1, lb_allocation_plan_or_num_bytes=1)
    buffer = Buffer(None, low_latency_mode=True)
    x, idx, weights = torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 2, 1, use_fp8=False)
    calls = {
        "low_latency_dispatch": lambda **wrong: buffer.low_latency_dispatch(x, idx, 2, 1, **wrong),
        "low_latency_combine": lambda **wrong: buffer.low_latency_combine(rows, idx, weights, handle, **wrong),
    }
    for method, call in calls.items():
        raising = re.findall(r"^\| `(\w+)` \| raises \|", deepep_section(f"Buffer.{method}"), flags=re.MULTILINE)
        assert raising
        call()
        for name in raising:
            with pytest.raises(tokenferry.UnsupportedError, match=name):
                call(**{name: 1})


def test_the_table_of_training_tools_names_its_tests():
    """Each row names the tests that show it; they exist. No cell leaves open what it means."""
    page = (documents.ROOT / "docs" / "training.md").read_text()
    section = page.split("\n## Tool by tool\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    files = (documents.ROOT / "tests" / "nn").glob("test_*.py")
    known = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)}
    assert rows
    for row in rows:
        assert all(cell.strip() for cell in row.strip("|").split("|")), f"docs/training.md: an empty cell: {row}"
        named = re.findall(r"`(\w+)`", row.split(" | ")[-1])
        assert named, f"docs/training.md: no test shows this row: {row}"
        assert set(named) <= known, f"docs/training.md: {sorted(set(named) - known)}: there are no such tests"
