"""`integrations.transformers` without transformers: the exchange itself, and how it is registered."""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from support import expert_parallel_jobs as jobs
from tokenferry import BackendUnavailable, ConfigError
from tokenferry.integrations import transformers as ours


@pytest.mark.parametrize(
    ("tensor", "tokens", "experts"),
    [(1, (5, 0, 3, 6), 8), (1, (1, 0, 0, 1), 4), (4, (6,), 8), (4, (2,), 8), (2, (3, 5), 8)],
    ids=["data", "two ranks without rows", "one batch", "one small batch", "two batches"],
)
def test_training_gives_the_gradients_of_one_process(worlds, tensor, tokens, experts):
    worlds(4).run(jobs.trains, tensor, tokens, experts)


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("job", [jobs.differentiates_twice, jobs.gives_what_may_be_overwritten])
def test_gradients_of_results_that_are_used_otherwise(worlds, job, tensor):
    worlds(4).run(job, tensor)


@pytest.mark.parametrize(("tensor", "where"), [(1, "host"), (2, "host"), (4, "device")])
def test_inference_waits_for_no_counts_where_ranks_share_a_batch(worlds, tensor, where):
    worlds(4).run(jobs.infers, tensor, where)


@pytest.mark.parametrize(
    "job",
    [
        jobs.captures,
        jobs.breaks_a_compiled_graph,
        jobs.differentiates_shards_twice,
        jobs.shares_its_group,
        jobs.needs_the_device_of_the_group,
    ],
    ids=lambda job: job.__name__,
)
def test_a_layer(worlds, job):
    worlds(4).run(job)


class Registry(dict):
    """What transformers has."""

    def register(self, name, value):
        self[name] = value


@pytest.fixture
def fake(monkeypatch):
    """Put modules in the place of transformers', each with its names, or none."""

    def put(**modules: dict | None):
        for name in ("distributed.expert_parallel", "distributed.tensor_parallel", "integrations.moe"):
            found = modules.get(name.rpartition(".")[2])
            module = None if found is None else ModuleType(name)
            if module is not None:
                module.__dict__.update(found)
            monkeypatch.setitem(sys.modules, f"transformers.{name}", module)
        for name in ("transformers", "transformers.distributed", "transformers.integrations"):
            package = ModuleType(name)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, name, package)

    return put


def test_the_registry_of_implementations_is_used(fake):
    registry = Registry()
    fake(expert_parallel={"EPImplementationInterface": registry})
    ours.register()
    ours.register()
    assert registry == {"tokenferry": ours.ExpertParallel}


def test_without_it_that_of_experts_functions_is_used(fake):
    registry = Registry(grouped_mm=None)
    fake(tensor_parallel={"ALL_PARALLEL_STYLES": {"grouped_gemm": 0}}, moe={"ALL_EXPERTS_FUNCTIONS": registry})
    ours.register()
    assert registry["tokenferry"] is ours.shared_experts
    whole = SimpleNamespace(parameters=lambda recurse: [torch.zeros(2, 2, dtype=torch.float32, device="cpu")])
    with pytest.raises(ConfigError, match='a tp_plan with "grouped_gemm" for their parameters'):
        ours.shared_experts(whole, None, None, None)


def test_versions_with_neither_are_refused(fake):
    registry = Registry()
    fake(moe={"ALL_EXPERTS_FUNCTIONS": registry})
    with pytest.raises(BackendUnavailable, match=r"install transformers 5\.23 or newer"):
        ours.register()
    assert not registry


class Style:
    """The style of 5.19 to 5.22, which does nothing here."""

    def install_forward(self, module, ep_mesh, *, tp_mesh):
        module.forward = "transformers' own"
        return module

    def context_around_forward(self, module, mesh):
        return nullcontext()


def mesh(size):
    return SimpleNamespace(size=lambda: size)


@pytest.fixture
def styles(fake):
    """What 5.19 to 5.22 have, with tokenferry registered twice."""
    functions = Registry(grouped_mm=lambda experts, rows, index, weights: rows + index + weights)
    found = Registry(ep_dispatch_experts=Style())
    fake(tensor_parallel={"ALL_PARALLEL_STYLES": found}, moe={"ALL_EXPERTS_FUNCTIONS": functions})
    ours.register()
    ours.register()
    return SimpleNamespace(style=found["ep_dispatch_experts"], run=functions["tokenferry"])


def experts_of(implementation):
    return SimpleNamespace(config=SimpleNamespace(_experts_implementation=implementation))


def test_a_style_serves_models_that_chose_tokenferry_alone(styles, monkeypatch):
    made = []
    exchange = SimpleNamespace(run=lambda x, index, weights: (x + index + weights).double())
    monkeypatch.setattr(styles.style, "make", lambda *given: made.append(given) or exchange.run)
    other, chosen, few, all_ranks = experts_of("grouped_mm"), experts_of("tokenferry"), mesh(2), mesh(4)
    assert styles.style.install_forward(other, all_ranks, tp_mesh=all_ranks) is other
    assert other.forward == "transformers' own"
    assert not made
    with pytest.raises(ConfigError, match=r"needs from_pretrained with distributed_config=.*ep_size"):
        styles.run(chosen, 1, 2, 3)  # nothing brings rows yet
    assert styles.style.install_forward(chosen, all_ranks, tp_mesh=all_ranks) is chosen
    assert made == [(chosen, all_ranks, all_ranks)]
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    assert chosen.forward(one, one, one).dtype == torch.float32
    assert styles.run(chosen, 1, 2, 3) == 6
    styles.style.install_forward(chosen, all_ranks, tp_mesh=few)
    with pytest.raises(ConfigError, match=r"install 5\.23 or newer"):
        chosen.forward(one, one, one)
    with torch.no_grad():
        assert float(chosen.forward(one, one, one)) == 3.0


def test_a_style_is_wrapped_once(styles):
    assert type(styles.style.own) is Style
    assert styles.style.make is ours.ExpertParallel
