"""The chart of the README is drawn from the measurements that are kept, and the sentences beside it agree with them."""

import importlib
import re
import sys
import xml.etree.ElementTree as ET

import pytest

from support import documents

FOLDER = documents.ROOT / "benchmarks"
matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def chart():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("chart")
    del sys.modules["chart"]


def texts(file):
    return [element.text for element in ET.parse(file).iter() if element.tag.endswith("}text")]


def test_the_chart_shows_what_was_measured(chart, tmp_path):
    chart.draw(tmp_path / "chart.svg")
    assert texts(tmp_path / "chart.svg") == texts(chart.CHART), "make chart"
    if f"Matplotlib v{matplotlib.__version__}," in chart.CHART.read_text():  # another one may place things elsewhere
        assert (tmp_path / "chart.svg").read_bytes() == chart.CHART.read_bytes(), "make chart"


def test_the_chart_writes_every_time_on_its_bar(chart):
    labels = texts(chart.CHART)
    for panel in chart.panels():
        for times in panel.groups.values():
            assert {chart.shown(time) for time in times.values()} <= set(labels)


def test_the_sentences_beside_the_chart_are_in_it(chart):
    page = (documents.ROOT / "README.md").read_text()
    section = page.partition("](benchmarks/chart.svg)")[2].partition("\n## ")[0]
    times = {chart.shown(time) for panel in chart.panels() for one in panel.groups.values() for time in one.values()}
    sentences = re.findall(r"^- .*?(?=^- |\n\n)", section, flags=re.MULTILINE | re.DOTALL)
    assert len(sentences) == 3
    for sentence in sentences:
        assert "](benchmarks/" in sentence
        named = re.findall(r"\*\*([\d.]+) [um]s\*\*|\b([\d.]+) [um]s\b", sentence)
        assert len(named) >= 2
        assert {one or other for one, other in named} <= times, sentence
