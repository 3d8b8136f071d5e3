r"""Fine-tuning: a Mixture-of-Experts model of Hugging Face's transformers, whose ranks share experts by tokenferry.

    python examples/finetune_transformers.py                                                # one rank, small
    torchrun --standalone --nproc-per-node 8 examples/finetune_transformers.py --bf16 \
        --model Qwen/Qwen3-30B-A3B --text notes --output tuned

Without `--model` it is a small Qwen3-MoE with random weights, whose tokens are bytes. A step takes the same sequences
on any number of ranks. Needs transformers 5.17 or newer, and on several ranks accelerate, by which transformers spreads
a model: `pip install '.[transformers]'` installs both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig
from transformers.distributed.configuration_utils import DistributedConfig

from tokenferry.integrations import transformers as integration
from tokenferry.nn import clip_grad_norm_

CLIP_NORM = 1.0
SMALL = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HAS_REGISTRY = VERSION >= (5, 23)
"""Of expert-parallel implementations. Before, transformers had one of functions that run experts."""


def num_ranks() -> int:
    """Return R, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shared_experts() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a model over all ranks."""
    if num_ranks() == 1:
        return {}
    integration.register()
    if HAS_REGISTRY:  # FSDP2 shards all but the experts, and each rank has its own part of a batch
        config = DistributedConfig(fsdp_size=num_ranks(), ep_size=num_ranks(), ep_implementation=integration.NAME)
        return {"distributed_config": config}
    # All ranks have the same batch, and copies of all but the experts; 5.19 shares the attention, too.
    if VERSION >= (5, 19):
        config = DistributedConfig(tp_size=num_ranks(), ep_size=num_ranks(), tp_plan={})
    else:
        experts = "model.layers.*.mlp.experts"
        plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
        config = DistributedConfig(tp_size=num_ranks(), tp_plan=plan)
    return {"distributed_config": config, "experts_implementation": integration.NAME}


def loaded(name: str) -> PreTrainedModel:
    """Return a model, spread over all ranks, in float32."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **shared_experts())
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.train()


def write_small(folder: str) -> None:
    """Write a small model with random weights: the same on every rank."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SMALL).save_pretrained(folder)


def by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each mesh: experts have another than the rest, and no call of torch takes both."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        found[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(found.values())


def batch(tokens: Tensor, step: int, arguments: argparse.Namespace) -> Tensor:
    """Return this rank's sequences of a step, which depend on its number alone."""
    draws = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - arguments.length + 1, (arguments.sequences,), generator=draws)
    if HAS_REGISTRY and num_ranks() > 1:
        starts = starts.chunk(num_ranks())[dist.get_rank()]
    return tokens[starts[:, None] + torch.arange(arguments.length)]


def mean_of_ranks(loss: Tensor) -> float:
    """Return the mean of the losses of all ranks."""
    mean = loss.detach() / num_ranks()
    if num_ranks() > 1:
        dist.all_reduce(mean)
    return mean.item()


def tune(model: PreTrainedModel, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Train all parameters, and print losses and speed."""
    parts = by_mesh(model)
    optimizer = torch.optim.AdamW([{"params": part} for part in parts], lr=arguments.learning_rate)
    device = parts[0][0].device
    for step in range(arguments.steps):
        start = time.perf_counter()
        ids = batch(tokens, step, arguments).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):  # parameters stay float32
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # gradients are those of the mean over ranks
        clip_grad_norm_(model, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        mean = mean_of_ranks(loss)  # waits for the device
        speed = arguments.sequences * arguments.length / (time.perf_counter() - start)
        if num_ranks() == 1 or dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean:.6f}, {speed:.0f} tokens a second", flush=True)


def run(name: str, arguments: argparse.Namespace) -> None:
    """Load a model, train it on the text, and save it."""
    text = "\n".join(path.read_text() for path in sorted(arguments.text.glob("*")) if path.suffix in (".md", ".txt"))
    tokenizer = AutoTokenizer.from_pretrained(name) if arguments.model else None
    tokens = torch.tensor(tokenizer(text)["input_ids"] if tokenizer else list(text.encode()), dtype=torch.int64)
    if len(tokens) < arguments.length:
        raise SystemExit(
            f"--text {arguments.text}: expected {arguments.length} tokens in .md and .txt, got {len(tokens)}"
        )
    model = loaded(name)
    tune(model, tokens, arguments)
    if arguments.output is not None:
        model.save_pretrained(arguments.output)  # on all ranks: all experts, as one process would save them
        if tokenizer:
            tokenizer.save_pretrained(arguments.output)


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a Mixture-of-Experts model of transformers.")
    parser.add_argument("--model", help="a name or a folder; without it, a small model with random weights")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs", help="a folder of text files")
    parser.add_argument("--output", type=Path, help="a folder for the tuned model")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, by torch.autocast")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8, help="of a step, of all ranks together")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    """Run on all ranks of torchrun, or in this process alone."""
    arguments = parsed()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.model:
            write_small(folder)  # each rank for itself: with a process group, only rank 0 would write
        if dist.is_torchelastic_launched():
            dist.init_process_group()  # gloo for CPUs, and NCCL where there are GPUs
        if arguments.sequences % num_ranks():
            raise SystemExit(f"--sequences {arguments.sequences}: expected a multiple of the {num_ranks()} ranks")
        run(arguments.model or folder, arguments)
    if num_ranks() > 1:
        integration.close_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
