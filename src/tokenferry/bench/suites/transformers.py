"""A model of transformers, unmodified: its experts reached through tokenferry, and in its own ways."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokenferry import env
from tokenferry.bench.core.checks import WrongAnswer, worst_differences
from tokenferry.bench.core.default_group import replace_default_group
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.session import Session, Settings, open_session
from tokenferry.bench.core.wall import WallTimes, seconds_of_runs, wall_times
from tokenferry.bench.suites.megatron import Precision, dtype_name
from tokenferry.bench.suites.transformers_models import VOCABULARY, Layout, Way, layouts, save_model
from tokenferry.errors import BackendUnavailable
from tokenferry.integrations import transformers as integration
from tokenferry.integrations.versions import installed
from tokenferry.testing.world import Progress

STEPS = 5
"""Training steps of a run back to back."""

TURNS = 2
"""How often the ways are measured in turns; each time as often as the settings say."""

PROMPT = 16
"""Tokens of each sequence before the first one that is generated."""

EXACT_TOKENS = 1024
"""At most so many tokens are compared in float32, whose rows take twice the memory."""

PRECISIONS = (Precision(torch.float32, 1e-5), Precision(torch.bfloat16, 3e-2))
"""Compared in this order; the last one is timed."""


def version() -> str | None:
    """Return the version of transformers that is installed, or None."""
    return installed("transformers")


def measure_transformers(rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings) -> None:
    """Compare results, then time training and generation; a job of `World` (through `run_with_progress`)."""
    on_gpus = settings.backend == "cuda"
    if not on_gpus and torch.cuda.is_available():
        raise BackendUnavailable(
            "transformers puts models on GPUs where there are any; hide them: CUDA_VISIBLE_DEVICES="
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    env.say_local_rank(torch.cuda.current_device() if on_gpus else rank)
    beside = replace_default_group(pg, "nccl" if on_gpus else "gloo")
    with open_session(beside, progress, settings) as session, _folder(session) as folder:
        found = session.attempt("transformers: making the model", lambda: _prepare(session, folder))
        for layout in found or ():
            for tokens in settings.tokens:
                what = f"transformers: batches: {layout.batches}, T={tokens}"
                session.send({"now": what})
                session.attempt(what, lambda layout=layout, tokens=tokens: _measure(session, folder, layout, tokens))  # type: ignore[misc]
            integration.close_groups()
        session.device.synchronize()


@contextmanager
def _folder(session: Session) -> Iterator[Path]:
    """Make a folder that all ranks know; rank 0 removes it. Collective."""
    with tempfile.TemporaryDirectory(prefix="tokenferry-bench-") if session.rank == 0 else nullcontext() as own:
        yield Path(session.gather(own)[0])
        dist.barrier(session.pg)


def _prepare(session: Session, folder: Path) -> tuple[Layout, ...]:
    """Write the model, and return how it can be shared. Collective."""
    found = layouts(session.settings.ranks)
    own = sorted({layout.own.name for layout in found})
    session.send({"transformers version": {"version": version(), "own": own}})
    if session.rank == 0:
        save_model(session.settings, session.device.torch_device, folder)
    dist.barrier(session.pg)
    return found


def _measure(session: Session, folder: Path, layout: Layout, tokens: int) -> bool:
    batch = Batch.draw(session, tokens, shared=layout.shared)
    models: dict[str, Model] = {}
    for precision in PRECISIONS:
        models.clear()  # before the next ones are loaded
        ways = (layout.own, *layout.others)
        models = {way.name: Model(folder, way, precision.dtype) for way in ways}
        compared = batch.first(EXACT_TOKENS) if precision.dtype == torch.float32 else batch
        expected = models[layout.own.name].results(compared)
        for way in layout.others:
            results = models[way.name].results(compared)
            _compare(session, Comparison(layout, way.name, compared, precision), results, expected)
        if precision.dtype == torch.float32:
            _compare_generation(session, layout, models, batch)
    training: dict[str, list[WallTimes]] = {name: [] for name in models}
    generation: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):  # one after the other, since the speed of a host changes within seconds
        for name, model in models.items():
            training[name].append(wall_times(session, lambda i, model=model: model.train(batch), STEPS))  # type: ignore[misc]
            with no_collections():
                seconds = seconds_of_runs(session, lambda i, model=model: model.generate(batch), 1)  # type: ignore[misc]
            generation[name] += seconds
    for name in models:
        _report(session, layout, tokens, Times(name, training[name], generation[name]))
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """The times of a model on this rank.

    Attributes:
        name: How its experts are shared.
        training: Times of training steps, a turn each.
        generation: Seconds of each generation.
    """

    name: str
    training: list[WallTimes]
    generation: list[float]


def _report(session: Session, layout: Layout, tokens: int, times: Times) -> None:
    """Report the times of a model. Collective."""
    summaries = {
        mode: asdict(session.summary([seconds for wall in times.training for seconds in getattr(wall, mode)]))
        for mode in ("isolated", "back_to_back")
    }
    sizes = session.settings.model
    assert sizes is not None
    different = 1 if layout.shared else session.settings.ranks
    item = {
        "experts": times.name,
        "own": layout.own.name,
        "batches": layout.batches,
        "tokens": tokens,
        "dtype": dtype_name(PRECISIONS[-1].dtype),
        "trained": different * tokens,
        "training": summaries,
        "generated": different * sizes.batch * sizes.new_tokens,
        "generation": asdict(session.summary(times.generation)),
    }
    session.send({"transformers": item})


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The ids of a batch on this rank.

    Attributes:
        ids: ``[1, T]``, to train with.
        prompts: ``[batch, PROMPT]``, to be continued.
        new_tokens: By so many ids.
    """

    ids: Tensor
    prompts: Tensor
    new_tokens: int

    @classmethod
    def draw(cls, session: Session, tokens: int, *, shared: bool) -> Batch:
        """Draw random ids: others on each rank, or the same on all."""
        sizes = session.settings.model
        assert sizes is not None
        device = session.device.torch_device
        seed = session.settings.seed * 4096 + (0 if shared else 1 + session.rank)
        generator = torch.Generator(device).manual_seed(seed)
        ids, prompts = (
            torch.randint(VOCABULARY, size, generator=generator, dtype=torch.int64, device=device)
            for size in ((1, tokens), (sizes.batch, PROMPT))
        )
        return cls(ids, prompts, sizes.new_tokens)

    def first(self, tokens: int) -> Batch:
        """Return a batch of the first tokens."""
        return Batch(self.ids[:, :tokens], self.prompts, self.new_tokens)


class Model:
    """A model that ranks share, as transformers loads it. Collective.

    Args:
        folder: Where `save_model` has written it.
        way: How its experts are shared.
        dtype: Of rows and weights.
    """

    def __init__(self, folder: Path, way: Way, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **way.arguments)

    def results(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits, the loss, and this rank's part of the gradients of all weights, by kind. Collective."""
        found = self.model.train()(input_ids=batch.ids, labels=batch.ids, use_cache=False)
        found.loss.backward()
        parts: dict[str, list[Tensor]] = {}
        for name, weight in self.model.named_parameters():
            kind = next((kind for kind in ("experts", "gate") if f"mlp.{kind}" in name), "all else")
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            parts.setdefault(f"gradients of {KINDS[kind]}", []).append(local.flatten())
        self.model.zero_grad()
        gradients = {what: torch.cat(grads) for what, grads in parts.items()}
        return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}

    def train(self, batch: Batch) -> None:
        """Compute the gradients of a batch. Collective."""
        self.model.train()(input_ids=batch.ids, labels=batch.ids, use_cache=False).loss.backward()
        self.model.zero_grad()

    def generate(self, batch: Batch) -> Tensor:
        """Return prompts and the likeliest ids after them. Collective."""
        with torch.no_grad():
            ids: Tensor = self.model.eval().generate(batch.prompts, max_new_tokens=batch.new_tokens, do_sample=False)
        return ids


KINDS = {"experts": "experts", "gate": "routers", "all else": "all else"}


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What is compared.

    Attributes:
        layout: How the ranks have their batches.
        name: The way to share experts that is compared with transformers' own.
        batch: The batch.
        precision: The numbers of both models.
    """

    layout: Layout
    name: str
    batch: Batch
    precision: Precision


def _compare(session: Session, of: Comparison, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Report how far the results of a model are from those with transformers' own way. Collective.

    Raises:
        WrongAnswer: too far; on all ranks.
    """
    worst = worst_differences(session.pg, found, expected)
    dtype, own = dtype_name(of.precision.dtype), of.layout.own.name
    item: dict[str, Any] = {"experts": of.name, "own": own, "batches": of.layout.batches, "dtype": dtype}
    session.send({"transformers results": item | {"tokens": of.batch.ids.shape[1], "differ_by": worst}})
    wrong = {what: by for what, by in worst.items() if not by <= of.precision.bound}
    if wrong:
        raise WrongAnswer(f"{of.name} differs from {own} in {dtype} by more than {of.precision.bound}: {wrong}")


def _compare_generation(session: Session, layout: Layout, models: Mapping[str, Model], batch: Batch) -> None:
    """Check that all models generate the same ids. Collective.

    Raises:
        WrongAnswer: they do not; on all ranks.
    """
    ids = {name: model.generate(batch) for name, model in models.items()}
    shape = (len(batch.prompts), PROMPT + batch.new_tokens)
    for way in layout.others:
        same = ids[way.name].shape == shape and torch.equal(ids[way.name], ids[layout.own.name])
        if not all(session.gather(same)):
            raise WrongAnswer(f"{way.name} generates other tokens than {layout.own.name} in float32")
