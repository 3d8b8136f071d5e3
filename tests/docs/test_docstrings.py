"""Docstrings are true: their examples run, every public name has one, and its arguments are the signature's."""

from __future__ import annotations

import dataclasses
import doctest
import enum
import importlib
import inspect
import io
import pkgutil
import re

import pytest

import tokenferry

# Modules that users import by name, besides the names of `tokenferry` itself.
PUBLIC_MODULES = (
    "tokenferry.autograd",
    "tokenferry.nn",
    "tokenferry.nn.balance",
    "tokenferry.formats.fp8",
    "tokenferry.formats.logfmt",
    "tokenferry.compat.deep_ep",
)


def all_modules() -> list[str]:
    found = pkgutil.walk_packages(tokenferry.__path__, "tokenferry.")
    return [
        "tokenferry",
        *(m.name for m in found if not m.name.endswith("__main__") and "deep_ep_path.deep_ep" not in m.name),
    ]


def examples(module: str) -> list[doctest.DocTest]:
    return [t for t in doctest.DocTestFinder().find(importlib.import_module(module)) if t.examples]


def public_objects() -> list[tuple[str, object]]:
    """Yield (dotted name, object) of everything exported, and of the public members of exported classes."""
    found: list[tuple[str, object]] = []
    for name in ("tokenferry", *PUBLIC_MODULES):
        module = importlib.import_module(name)
        public = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == name and n[0] != "_"]
        for exported in getattr(module, "__all__", public):
            thing = getattr(module, exported)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            found.append((f"{name}.{exported}", thing))
            if inspect.isclass(thing) and thing.__module__.startswith("tokenferry"):
                for member, value in vars(thing).items():
                    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                    if not member.startswith("_") and isinstance(function, property) | inspect.isfunction(function):
                        found.append((f"{name}.{exported}.{member}", function))
    return found


WITH_EXAMPLES = [module for module in all_modules() if examples(module)]
PUBLIC = public_objects()


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for test in examples(module):
        report = io.StringIO()
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, out=report.write)
        assert runner.failures == 0, report.getvalue()


def test_the_calls_that_matter_have_examples():
    names = {test.name for module in WITH_EXAMPLES for test in examples(module)}
    assert {"tokenferry.api.ExpertGroup", "tokenferry.api.ExpertGroup.dispatch"} <= names
    assert {"tokenferry.autograd", "tokenferry.nn.layer"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", [name for name, _ in PUBLIC])
def test_public_names_are_documented(name):
    thing = dict(PUBLIC)[name]
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    assert text, f"{name} has no docstring"
    # A dataclass or an enum without a docstring gets one made of its signature, or its base's.
    assert not text.startswith(f"{name.rsplit('.', 1)[-1]}("), f"{name} has no docstring of its own"
    assert not (isinstance(thing, type) and issubclass(thing, enum.Enum) and text == enum.Enum.__doc__)


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC if not isinstance(thing, property)])
def test_documented_arguments_are_those_of_the_signature(name):
    """Where a docstring has a section Args (or Attributes, of a dataclass), it names every parameter, in order."""
    thing = dict(PUBLIC)[name]
    section = documented(inspect.getdoc(thing) or "", "Args") or (
        documented(inspect.getdoc(thing) or "", "Attributes") if dataclasses.is_dataclass(thing) else []
    )
    if not section:
        return
    function = thing.__init__ if inspect.isclass(thing) else thing
    expected = [p for p in inspect.signature(function).parameters if p not in ("self", "cls") and p[0] != "_"]
    assert section == expected


def documented(text: str, section: str) -> list[str]:
    """The names that one section of a Google docstring documents; ``a, b: ...`` counts as two."""
    match = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", text, flags=re.MULTILINE)
    if match is None:
        return []
    heads = re.findall(r"^    (?! )\**([\w, *]+?)(?: \([^)]*\))?:", match[1], flags=re.MULTILINE)
    return [name.strip(" *") for head in heads for name in head.split(",")]
