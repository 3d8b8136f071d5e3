"""A model of transformers, unmodified: its experts reached through tokenferry, and in its own ways."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry import env
from tokenferry.bench.core.checks import WrongAnswer, worst_differences
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.models import STEPS, Precision, in_turns, take_gradients
from tokenferry.bench.core.session import Session
from tokenferry.bench.core.wall import Seconds, seconds_of_runs, wall_times
from tokenferry.bench.suites.transformers_models import VOCABULARY, ParallelLayout, Way, layouts, save_model
from tokenferry.errors import BackendUnavailable
from tokenferry.integrations import transformers as integration
from tokenferry.integrations.versions import installed

NOT_INSTALLED = "transformers is not installed, so no model of it is measured; pip install 'tokenferry[transformers]'"

PROMPT = 16
"""Tokens of each sequence before the first one that is generated."""

EXACT_TOKENS = 1024
"""At most so many tokens are compared in float32, whose rows take twice the memory."""

PRECISIONS = (Precision(torch.float32, 1e-5), Precision(torch.bfloat16, 3e-2))
"""Compared in this order; the last one is timed."""

KINDS = {"mlp.experts": "gradients of experts", "mlp.gate": "gradients of routers", "": "gradients of all else"}
"""Kinds of gradients, by what the names of weights contain."""


def version() -> str | None:
    """Return the version of transformers that is installed, or None."""
    return installed("transformers")


def measure_transformers(session: Session) -> None:
    """Compare results, then time training and generation."""
    settings = session.settings
    on_gpus = settings.backend == "cuda"
    if not on_gpus and torch.cuda.is_available():
        raise BackendUnavailable(
            "transformers puts models on GPUs where there are any; hide them: CUDA_VISIBLE_DEVICES="
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    env.say_local_rank(torch.cuda.current_device() if on_gpus else session.rank)
    with _folder(session) as folder:
        found = session.attempt("transformers: making the model", _prepare, session, folder)
        for layout in found or ():
            for tokens in settings.tokens:
                what = f"transformers: batches: {layout.batches}, T={tokens}"
                session.attempt(what, _measure, session, folder, layout, tokens)
            integration.close_groups()
        session.device.synchronize()


@contextmanager
def _folder(session: Session) -> Iterator[Path]:
    """Make a folder that all ranks know; rank 0 removes it. Collective."""
    with tempfile.TemporaryDirectory(prefix="tokenferry-bench-") if session.rank == 0 else nullcontext() as own:
        yield Path(session.gather(own)[0])
        dist.barrier(session.pg)


def _prepare(session: Session, folder: Path) -> tuple[ParallelLayout, ...]:
    """Write the model, and return how it can be shared. Collective."""
    found = layouts(session.settings.ranks)
    own = sorted({layout.own.name for layout in found})
    session.send({"transformers version": {"version": version(), "own": own}})
    if session.rank == 0:
        save_model(session.settings, session.device.torch_device, folder)
    dist.barrier(session.pg)
    return found


def _measure(session: Session, folder: Path, layout: ParallelLayout, tokens: int) -> None:
    batch = Batch.draw(session, tokens, shared=layout.shared)
    about = {"own": layout.own.name, "batches": layout.batches}
    models: dict[str, Model] = {}
    for precision in PRECISIONS:
        models.clear()  # before the next ones are loaded
        ways = (layout.own, *layout.others)
        models = {way.name: Model(folder, way, precision.dtype) for way in ways}
        compared = batch.first(EXACT_TOKENS) if precision.dtype == torch.float32 else batch
        expected = models[layout.own.name].results(compared)
        for way in layout.others:
            worst = worst_differences(session.pg, models[way.name].results(compared), expected)
            label = {"experts": way.name, **about, "dtype": precision.name, "tokens": compared.ids.shape[1]}
            session.send({"transformers results": {**label, "differ_by": worst}})
            precision.check(way.name, layout.own.name, worst)
        if precision.dtype == torch.float32:
            _compare_generation(session, layout, models, batch)
    sizes = session.settings.model
    assert sizes is not None
    different = 1 if layout.shared else session.settings.ranks
    measures = {name: partial(_seconds, session, model, batch) for name, model in models.items()}
    for name, times in in_turns(session, measures).items():
        generation = times.pop("generation")
        label = {"experts": name, **about, "tokens": tokens, "dtype": precision.name}
        training = {"trained": different * tokens, "training": times}
        generated = different * sizes.batch * sizes.new_tokens
        item = {**label, **training, "generated": generated, "generation": generation}
        session.send({"transformers": item})


def _seconds(session: Session, model: Model, batch: Batch) -> Seconds:
    """Time training steps, in both modes, and generation. Collective."""
    training = wall_times(session, lambda i: model.train(batch), STEPS)
    with no_collections():
        return {**training, "generation": seconds_of_runs(session, lambda i: model.generate(batch), 1)}


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
        gradients = take_gradients(self.model, KINDS)
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


def _compare_generation(session: Session, layout: ParallelLayout, models: Mapping[str, Model], batch: Batch) -> None:
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
