"""transformers, as it is published: models of three kinds whose experts lie on four gloo ranks, or two with GPUs.

Loss, gradients and greedy generation are compared with those of the same weights in one process, and, where this
version has it, with its own all_to_all. Nothing of transformers is changed or replaced.
"""

import functools
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError
from tokenferry.integrations import transformers as ours
from tokenferry.integrations.exchange import BatchExchange
from tokenferry.integrations.grouped_experts import GroupedExperts

ON_GPUS = torch.cuda.is_available()
R = 2 if ON_GPUS else 4
NEW_TOKENS = 4
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL = SIZES | {"vocab_size": 64, "intermediate_size": 32, "initializer_range": 0.2}
CONFIGS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, head_dim=8),
    "deepseek": DeepseekV3Config(
        **SMALL,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}


@dataclass(frozen=True)
class Layout:
    """How the ranks share batches: ``data`` groups of ``tensor`` ranks each; those of a group have the same batch."""

    data: int
    tensor: int

    def arguments(self, implementation: str) -> dict[str, Any]:
        """Return what makes `from_pretrained` share the experts so."""
        sizes = {"fsdp_size": self.data, "tp_size": self.tensor, "ep_size": R}
        if VERSION >= (5, 23):
            return {"distributed_config": DistributedConfig(**sizes, ep_implementation=implementation)}
        chosen = {"experts_implementation": "tokenferry"} if implementation == "tokenferry" else {}
        return {"distributed_config": DistributedConfig(**sizes), **chosen}


LAYOUTS = tuple(Layout(R // tensor, tensor) for tensor in (1, 2, 4) if tensor <= R)


def batch(number: int, tokens: int) -> Tensor:
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(number))
    return ids.cuda() if ON_GPUS else ids


def tokens_of(number: int) -> int:
    """Another length for each batch; where ranks share one, generation leaves all but one of them without tokens."""
    return (5, 9, 2, 7)[number]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Ran:
    """What a model gave: the loss of a batch, all gradients, and the tokens that it generated."""

    loss: Tensor
    gradients: dict[str, Tensor]
    tokens: list[list[int]]


def step(model: torch.nn.Module, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch, and all gradients."""
    ids = batch(number, tokens_of(number))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def generate(model: torch.nn.Module, number: int) -> list[list[int]]:
    ids = batch(number, tokens_of(number))
    with torch.no_grad():
        tokens = model.generate(ids[:1, :2], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokens.tolist()


def run(model: torch.nn.Module, number: int) -> Ran:
    loss, gradients = step(model, number)
    return Ran(loss, gradients, generate(model, number))


def run_twice_forward(model: torch.nn.Module, number: int, tokens: list[list[int]]) -> Ran:
    """Compute each layer again in backward; these tokens are not generated."""
    model.train().gradient_checkpointing_enable()
    loss, gradients = step(model, number)
    model.gradient_checkpointing_disable()
    model.eval()
    return Ran(loss, gradients, tokens)


@functools.cache
def in_one_process(folder: str, batches: int) -> list[Ran]:
    """What one process computes: the gradient of the mean loss of all batches in each result."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.cuda() if ON_GPUS else model
    ran = [run(model, number) for number in range(batches)]
    names = ran[0].gradients
    gradients = {name: torch.stack([each.gradients[name] for each in ran]).mean(0) for name in names}
    return [Ran(each.loss, gradients, each.tokens) for each in ran]


def check(what: str, got: Ran, want: Ran) -> None:
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: loss: {text}")
    assert got.gradients.keys() == want.gradients.keys(), what
    for name, gradient in want.gradients.items():
        torch.testing.assert_close(
            got.gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{what}: {name}: {text}"
        )
    assert got.tokens == want.tokens, f"{what}: {got.tokens} were generated, expected {want.tokens}"


class Calls:
    """How many dispatches there were with and without gradients, where their counts were, and how many groups."""

    def __init__(self) -> None:
        self.reset()
        dispatch, send, connect = ExpertGroup.dispatch, BatchExchange.send, ExpertGroup._with_heap
        grouped = GroupedExperts.__call__

        def noted(exchange, x, index, weights, options):
            self.counts[torch.is_grad_enabled(), options.counts] += 1
            return send(exchange, x, index, weights, options)

        def waited(group, x, routing, *, options=None):
            self.waits += options.counts == "host"
            return dispatch(group, x, routing, options=options)

        def counted(*args, **kwargs):
            self.groups += 1
            return connect(*args, **kwargs)

        def unsorted(*args):
            self.grouped += 1
            return grouped(*args)

        BatchExchange.send, ExpertGroup.dispatch, ExpertGroup._with_heap = noted, waited, counted
        GroupedExperts.__call__ = unsorted

    def reset(self) -> None:
        self.counts: Counter[tuple[bool, str]] = Counter()
        self.waits = self.groups = self.grouped = 0

    def check(self, layers: int, layout: Layout) -> None:
        """A training step waits for counts once a layer, and generation only where batches differ: once a layer."""
        inference = "device" if layout.data == 1 else "host"
        expected = {(True, "host"): layers, (False, inference): layers * NEW_TOKENS}
        assert self.counts == expected, f"{self.counts}, expected {expected}"
        waits = sum(count for (_, where), count in expected.items() if where == "host")
        assert self.waits == waits, f"{self.waits} dispatches waited, expected {waits}: none in a backward pass"
        assert self.grouped, "experts whose rows are grouped already"
        assert self.groups <= 1, "one group serves all layers, and models that are alive at the same time"


def has_layout(layout: Layout) -> bool:
    return VERSION >= (5, 20) or layout.tensor == R


def has_gradients(layout: Layout) -> bool:
    """Whether this version has the right ones, by its own exchange, too."""
    return VERSION >= (5, 23) or layout.tensor == R


def check_inference(what: str, model: torch.nn.Module, number: int, tokens: list[list[int]]) -> None:
    """Training is refused by all ranks, before anything is sent."""
    try:
        step(model, number)
    except ConfigError as error:
        assert "install 5.23 or newer" in str(error)  # noqa: PT017 - there is no pytest in a rank
    else:
        raise AssertionError(f"{what}: gradients that this version divides twice")
    got = generate(model, number)
    assert got == tokens, f"{what}: {got} were generated, expected {tokens}"


def parallel_models(folder: str) -> Iterator[tuple[str, Layout, torch.nn.Module]]:
    load = AutoModelForCausalLM.from_pretrained
    if VERSION >= (5, 19):
        for layout in filter(has_layout, LAYOUTS):
            for name in ("all_to_all", "tokenferry") if has_gradients(layout) else ("tokenferry",):
                yield name, layout, load(folder, **layout.arguments(name), dtype=torch.float32)
        return
    experts = "model.layers.*.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    parallel = DistributedConfig(tp_size=R, tp_plan=plan)
    yield (
        "tokenferry",
        Layout(1, R),
        load(folder, distributed_config=parallel, dtype=torch.float32, experts_implementation="tokenferry"),
    )


def rank_main(rank: int, scratch: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(R)}
    backend = "nccl" if ON_GPUS else "gloo"
    if ON_GPUS:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{scratch}/store", rank=rank, world_size=R)
    ours.register()
    calls = Calls()
    for kind in CONFIGS:
        for name, layout, model in parallel_models(f"{scratch}/{kind}"):
            number = rank // layout.tensor
            wanted = in_one_process(f"{scratch}/{kind}", layout.data)[number]
            what = f"{kind}, {name}, {layout}, rank {rank}"
            if not has_gradients(layout):
                check_inference(what, model, number, wanted.tokens)
                continue
            check(f"{what}, twice forward", run_twice_forward(model, number, wanted.tokens), wanted)
            calls.reset()
            check(what, run(model, number), wanted)
            if name == "tokenferry":
                calls.check(SIZES["num_hidden_layers"] - (kind == "deepseek"), layout)  # its first layer is dense
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("spawn" if ON_GPUS else "fork")
    with tempfile.TemporaryDirectory() as scratch:
        transformers.logging.disable_progress_bar()
        for kind, config in CONFIGS.items():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(f"{scratch}/{kind}")
        ranks = [context.Process(target=rank_main, args=(rank, scratch)) for rank in range(R)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    if failed:
        sys.exit(f"ranks {failed} failed")
    sys.stdout.write(f"{transformers.__version__} {Path(transformers.__file__).parents[1]}\n")


if __name__ == "__main__":
    main()
