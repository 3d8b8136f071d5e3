"""`integrations.transformers` without transformers: the exchange itself, and how it is registered."""

import sys
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
    [jobs.captures, jobs.breaks_a_compiled_graph, jobs.shares_its_group, jobs.needs_the_device_of_the_group],
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


@pytest.mark.parametrize("styles", [None, {"ALL_PARALLEL_STYLES": {"ep_dispatch_experts": 0}}])
def test_versions_with_neither_are_refused(fake, styles):
    """5.19 to 5.22 would add up the results of the experts function once more."""
    registry = Registry()
    fake(tensor_parallel=styles, moe={"ALL_EXPERTS_FUNCTIONS": registry})
    with pytest.raises(BackendUnavailable, match=r"install transformers 5\.23 or newer"):
        ours.register()
    assert not registry
