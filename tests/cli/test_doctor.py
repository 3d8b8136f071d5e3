"""The doctor: every line, well and ill."""

import pytest
import torch
from cli_jobs import broken

from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.cli import doctor
from tokenferry.cli.main import main
from tokenferry.errors import BackendUnavailable


def by_name(**options):
    return {finding.name: finding for finding in doctor.findings(**options)}


def test_a_machine_that_works(any_terminal):
    assert main(["doctor", "--no-compile"]) == 0
    out = any_terminal.getvalue()
    for name in ("versions", "group of one", "gloo", "wire local", "wire group", "backend cuda", "rich", "matplotlib"):
        assert name in out
    for variable in env.VARIABLES:
        assert variable.name in out
    assert "over 2 rank(s), wire local" in out
    assert "over 2 rank(s), wire group" in out
    assert "tokenferry works on this machine" in out


def test_compile_is_tried_for_real(monkeypatch):
    monkeypatch.setattr(doctor, "_ranks", lambda: iter(()))
    tried = []
    monkeypatch.setattr(doctor, "_compiles", lambda backend: tried.append(backend) or "fine")
    assert by_name(compiler=True)["torch.compile, code"].good
    assert tried == ["aot_eager", "inductor"]


def test_a_graph_compiles():
    assert "one graph, by aot_eager" in doctor._compiles("aot_eager")


def test_the_cuda_line_says_why_not():
    finding = doctor._cuda()
    assert not finding.good
    assert not finding.needed
    assert "backend='cuda' is not in this version" in finding.text


def test_the_cuda_line_of_a_version_that_has_it(monkeypatch):
    make = ExpertGroup.__init__
    monkeypatch.setattr(
        ExpertGroup, "__init__", lambda self, group, shape, backend="auto": make(self, group, shape, backend="cpu")
    )
    assert doctor._cuda().good


def test_ill_ranks(monkeypatch, capsys):
    def no_world(*args, **kwargs):
        raise OSError("no memory")

    monkeypatch.setattr(doctor, "World", no_world)
    assert main(["doctor", "--no-compile"]) == 1
    out = capsys.readouterr().out
    assert "no    OSError: no memory; several ranks need gloo" in out
    assert "does not work: gloo, wire group" in out


def test_what_a_rank_raises_is_the_reason():
    with pytest.raises(RuntimeError, match="no reason at all"):
        doctor._on_ranks(broken, "news")


def test_wrong_rows_are_found(monkeypatch):
    combine = ExpertGroup.combine

    def wrong(self, y, plan):
        result = combine(self, y, plan)
        result.x[3, 5] += 1
        return result

    monkeypatch.setattr(ExpertGroup, "combine", wrong)
    finding = doctor._group_of_one()
    assert not finding.good
    assert "ArithmeticError: the rows that came back are not the rows that were sent" in finding.text


def test_wrong_sums_over_gloo_are_found(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    with pytest.raises(ArithmeticError, match="all_reduce gave 1"):
        doctor.over_gloo(0, PairOfRanks())


class PairOfRanks:
    def size(self):
        return 2


def test_variables_in_force(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_WIRE", "group")
    texts = {finding.name: finding.text for finding in doctor._variables()}
    assert texts["TOKENFERRY_WIRE"].startswith("group (default: auto)")
    assert texts["TOKENFERRY_BACKEND"].startswith("auto (default)")


def test_a_variable_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "soon")
    [finding] = doctor._variables()
    assert not finding.good
    assert finding.needed
    assert "TOKENFERRY_TIMEOUT_S='soon'" in finding.text


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    finding = doctor._versions()
    assert not finding.good
    assert "install torch 2.11 or newer" in finding.text


def test_a_missing_package():
    finding = doctor._package("no-such-package", "wings", "wings")
    assert not finding.good
    assert finding.text == "not installed, so no wings; pip install 'tokenferry[wings]'"


def test_reasons_of_any_kind_fit_into_a_line():
    def fail():
        raise BackendUnavailable("first line\nsecond line")

    finding = doctor._tried("x", fail, "buy another")
    assert finding.text == "BackendUnavailable: first line; buy another"
