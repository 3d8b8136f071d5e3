"""The documentation site has every page and every public name; `make docs` builds it, and checks the rest."""

import importlib.util
import zlib
from types import SimpleNamespace

import pytest

import tokenferry
from support import documents
from tokenferry import autograd, nn, types
from tokenferry.compat import deep_ep
from tokenferry.nn import balance

DOCS = documents.ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def places(nav):
    """All pages that a part of the navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in places(one)]


def test_the_navigation_has_every_page_once(hooks):
    yaml = pytest.importorskip("yaml")
    nav = places(yaml.safe_load((documents.ROOT / "mkdocs.yml").read_text())["nav"])
    own = {path.name for path in DOCS.glob("*.md")}
    assert sorted(nav) == sorted(own | set(hooks.TAKEN_IN.values()) | {page for page, _ in hooks.generated()})


def test_the_reference_has_every_public_name(hooks):
    held = {name for _, names in hooks.reference().values() for name in names}
    for module in (tokenferry, autograd, nn, balance, deep_ep):
        public = {f"{module.__name__}.{name}" for name in module.__all__ if not name.startswith("_")}
        assert public <= held, module.__name__
    options = {name for name, value in vars(types).items() if str(value).startswith("typing.Literal[")}
    assert {f"tokenferry.types.{name}" for name in options} <= held
    assert len(options) >= 5


def test_names_of_the_reference_exist(hooks):
    for _, names in hooks.reference().values():
        for name in names:
            module, _, last = name.rpartition(".")
            found = importlib.import_module(module)
            assert hasattr(found, last) or importlib.import_module(name), name


def test_a_name_that_the_site_lacks_is_found(hooks):
    names = [name for _, names in hooks.reference().values() for name in names]
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: 0\n# zlib\n"
    for held, lacking in ((names, []), (names[1:], names[:1])):
        lines = "".join(f"{name} py:class 1 page/#{name} -\n" for name in held)
        assert hooks.missing(head + zlib.compress(lines.encode())) == lacking


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](docs/errors.md#peertimeout)", "[a](errors.md#peertimeout)"),
        ("index.md", "[a](examples) `[b](docs/errors.md)`", "[a](examples.md) `[b](docs/errors.md)`"),
        ("quickstart.md", "[a](../benchmarks/README.md#x)", "[a](measurements.md#x)"),
        ("quickstart.md", "[a](https://a.b/c.md) [b](#here)", "[a](https://a.b/c.md) [b](#here)"),
        (
            "measurements.md",
            "![a](chart.svg) [b](NOTES.md)",
            "![a](files/benchmarks/chart.svg) [b](measurements-notes.md)",
        ),
        ("deep-ep-package.md", "[a](../../README.md)", "[a](index.md)"),
        ("errors.md", "```text\n[a](../README.md)\n```\n", "```text\n[a](../README.md)\n```\n"),
    ],
)
def test_links_between_files_become_links_between_pages(hooks, page, text, expected):
    assert hooks.rewritten(text, page)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/errors.md#peertimeout)", "[a](https://x.y/z/errors/#peertimeout)"),
        ("![a](benchmarks/chart.svg)", "![a](https://x.y/z/files/benchmarks/chart.svg)"),
        ("[a](benchmarks/README.md#gpus) `[b](docs/p.md)`", "[a](https://x.y/z/measurements/#gpus) `[b](docs/p.md)`"),
        ("[a](https://a.b/c.md) [b](#here)", "[a](https://a.b/c.md) [b](#here)"),
        ("[a](README.md#here)", "[a](https://x.y/z/#here)"),
        ("```text\n[a](README.md)\n```\n", "```text\n[a](README.md)\n```\n"),
    ],
)
def test_links_of_the_readme_lead_to_the_site(hooks, text, expected):
    for site in ("https://x.y/z", "https://x.y/z/"):
        assert hooks.absolute(text, "index.md", site) == expected


@pytest.mark.parametrize("site", ["https://docs.example/tokenferry/", None])
def test_the_site_has_the_address_that_the_package_names(hooks, site, tmp_path, monkeypatch):
    pytest.importorskip("tomllib")
    urls = f'Documentation = "{site}"' if site else ""
    (tmp_path / "pyproject.toml").write_text(f"[project]\nname = 'x'\n[project.urls]\n{urls}\n")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    config = hooks.on_config(SimpleNamespace(mdx_configs={"toc": {}}, site_url="of another"))
    assert config.site_url == site


def test_anchors_are_those_that_links_use(hooks):
    for path in documents.FILES:
        for line in documents.prose(path.read_text()).splitlines():
            if line.startswith("#"):
                heading = line.lstrip("#").strip()
                assert hooks.slug(heading, "-") in documents.anchors(line), heading
