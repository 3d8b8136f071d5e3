r"""Training: a byte-level Mixture-of-Experts language model, with FSDP2 or DistributedDataParallel, and checkpoints.

    python examples/train_language_model.py                                          # one rank, small
    torchrun --standalone --nproc-per-node 8 examples/train_language_model.py --large --bf16 --text books \
        --steps 5000 --checkpoints runs
    torchrun --standalone --nproc-per-node 4 examples/train_language_model.py --large --bf16 --text books \
        --steps 5000 --resume runs/step-500

A step takes the same sequences on any number of ranks, so that a run that is resumed on another number goes on with the
same losses. Without `--text FOLDER` it reads the documents of this repository.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel

import tokenferry
from tokenferry.nn import GroupLimit, MoELayer, Router, parallelize, update_biases

BYTES = 256
CLIP_NORM = 1.0
SAVE_EVERY = 500


@dataclass(frozen=True)
class Size:
    """The sizes of the model, and of a step of all ranks together.

    Attributes:
        sequences: In a step; the number of ranks divides it.
        length: Bytes of a sequence.
    """

    num_layers: int = 2
    hidden: int = 32
    heads: int = 4
    ffn_hidden: int = 32
    num_experts: int = 8
    top_k: int = 2
    sequences: int = 8
    length: int = 32
    learning_rate: float = 3e-3


SMALL = Size()
LARGE = Size(16, 2048, 16, 1024, 64, 8, sequences=64, length=2048, learning_rate=3e-4)


class Block(nn.Module):
    """A layer of the model: attention to the bytes before, then experts."""

    def __init__(self, group: tokenferry.ExpertGroup, size: Size, seed: int) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.expert_norm = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        # Sigmoid scores with biases, which `update_biases` changes: they balance experts without an auxiliary loss.
        router = Router(size.hidden, size.num_experts, size.top_k, group_limit=GroupLimit(1, 1), seed=seed)
        self.moe = MoELayer(group, size.ffn_hidden, router=router, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, S, H]`` for ``[B, S, H]``."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        rows: Tensor = self.moe(self.expert_norm(x).flatten(0, 1))  # [B * S, H]: a token is a row
        return x + rows.view_as(x)


class LanguageModel(nn.Module):
    """Predicts each byte from those before it."""

    def __init__(self, group: tokenferry.ExpertGroup, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.hidden)
        self.places = nn.Embedding(size.length, size.hidden)
        self.blocks = nn.ModuleList(Block(group, size, seed) for seed in range(size.num_layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.head = nn.Linear(size.hidden, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return ``[B, S, 256]`` logits of the next byte for ``[B, S]`` bytes."""
        x = self.embedding(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Trainer:
    """A model that is spread over all ranks, with its optimizer; every method is collective."""

    def __init__(self, group: tokenferry.ExpertGroup, size: Size, arguments: argparse.Namespace) -> None:
        self.group, self.size, self.bf16 = group, size, bool(arguments.bf16)
        torch.manual_seed(0)  # the same on every rank, also where DistributedDataParallel would not copy it
        with group.device:
            self.bare = LanguageModel(group, size)
        self.model: nn.Module = self.bare
        if arguments.parallel == "fsdp":
            mesh = init_device_mesh(group.device.type, (group.num_ranks,))
            experts = parallelize(self.bare, mesh)
            for block in self.bare.blocks:
                fully_shard(block, mesh=mesh, ignored_params=experts)
            fully_shard(self.bare, mesh=mesh, ignored_params=experts)
        else:
            parallelize(self.bare)
            self.model = DistributedDataParallel(self.bare)
        # With FSDP2 all parameters are DTensors. With DDP only the experts are, and torch has to be told of the others.
        self.together = nullcontext if arguments.parallel == "fsdp" else implicit_replication
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=size.learning_rate, weight_decay=0.1)
        self.steps_done = 0

    def step(self, text: Tensor) -> Tensor:
        """Train on this rank's ``[B, S + 1]`` bytes; return the mean loss of all ranks, on the device."""
        # Parameters, their gradients and the optimizer stay float32.
        with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(text[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
        torch.autograd.backward(loss)  # of the mean over ranks, whatever the tool
        with self.together():
            nn.utils.clip_grad_norm_(self.bare.parameters(), CLIP_NORM)
            self.optimizer.step()
        self.optimizer.zero_grad()
        update_biases(self.bare)
        self.steps_done += 1
        mean = loss.detach() / self.group.num_ranks
        dist.all_reduce(mean)
        return mean

    def state(self) -> dict[str, Any]:
        """Return all that a run needs to go on. Names and shapes do not depend on R, nor on the tool."""
        with self.together():  # it makes the optimizer's state, if there is none yet, by a step
            model, optimizer = get_state_dict(self.bare, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps_done": torch.tensor(self.steps_done)}

    def save(self, folder: Path) -> None:
        """Save a checkpoint; each rank writes its own experts."""
        dcp.save(self.state(), checkpoint_id=folder / f"step-{self.steps_done}")  # type: ignore[attr-defined]

    def load(self, checkpoint: Path) -> None:
        """Load what any number of ranks has saved."""
        state = self.state()
        dcp.load(state, checkpoint_id=checkpoint)  # type: ignore[attr-defined]
        set_state_dict(self.bare, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.steps_done = int(state["steps_done"])

    def imbalance(self) -> tuple[int, float]:
        """Return the rows that all experts received in the last step, and the most of one, in means of its layer."""
        layers = [layer for layer in self.bare.modules() if isinstance(layer, MoELayer)]
        mine = torch.stack([layer.expert_counts for layer in layers if layer.expert_counts is not None])  # [layers, L]
        parts = [torch.empty_like(mine) for _ in range(self.group.num_ranks)]
        dist.all_gather(parts, mine)
        loads = torch.cat(parts, dim=1).double()
        return int(loads.sum()), float((loads.amax(1) / loads.mean(1)).max())


def read(folder: Path, length: int) -> Tensor:
    """Return the bytes of all text files of a folder, which must be enough for a sequence and the byte after it."""
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in (".md", ".txt"))
    if len(text) <= length:
        raise SystemExit(f"--text {folder}: expected more than {length} bytes in .md and .txt files, got {len(text)}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(text: Tensor, size: Size, step: int, group: tokenferry.ExpertGroup) -> Tensor:
    """Return this rank's ``[B / R, S + 1]`` bytes of a step, which depend on its number alone."""
    draws = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - size.length, (size.sequences,), generator=draws)
    places = starts.chunk(group.num_ranks)[group.rank][:, None] + torch.arange(size.length + 1)
    return text[places].to(group.device, torch.int64)


def train(group: tokenferry.ExpertGroup, size: Size, arguments: argparse.Namespace) -> None:
    """Train, save, and print losses and speed."""
    trainer, text = Trainer(group, size, arguments), read(arguments.text, size.length)
    if arguments.resume is not None:
        trainer.load(arguments.resume)
    if trainer.steps_done >= arguments.steps:
        raise SystemExit(f"--steps {arguments.steps}: expected more than the {trainer.steps_done} that are done")
    while trainer.steps_done < arguments.steps:
        start = time.perf_counter()
        loss = trainer.step(batch(text, size, trainer.steps_done, group)).item()  # waits for the device
        speed = size.sequences * size.length / (time.perf_counter() - start)
        if group.rank == 0:
            print(f"step {trainer.steps_done}: loss {loss:.6f}, {speed:.0f} tokens a second", flush=True)
        if arguments.checkpoints is not None and trainer.steps_done % (arguments.save_every or SAVE_EVERY) == 0:
            trainer.save(arguments.checkpoints)
    rows, most = trainer.imbalance()
    if group.rank == 0:
        print(f"experts received {rows} rows in the last step, the busiest one {most:.2f} times as many as the mean")


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level Mixture-of-Experts language model.")
    parser.add_argument("--parallel", choices=["fsdp", "ddp"], default="fsdp", help="what spreads all but the experts")
    parser.add_argument("--large", action="store_true", help="a model of 6.7 billion parameters, for GPUs")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, by torch.autocast")
    parser.add_argument("--steps", type=int, default=8, help="the last step, counted from the start of the first run")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs", help="a folder of text files")
    parser.add_argument("--checkpoints", type=Path, help="a folder that all ranks reach, for checkpoints")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help=f"with --checkpoints; {SAVE_EVERY}")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="a step-N of such a folder")
    arguments = parser.parse_args()
    for option, folder in (("--text", arguments.text), ("--resume", arguments.resume)):
        if folder is not None and not folder.is_dir():
            parser.error(f"{option}: there is no folder {folder}")
    if arguments.large and not torch.cuda.is_available():
        parser.error("--large: a model of 6.7 billion parameters is for GPUs, and torch sees none; leave it out")
    if arguments.save_every is not None and (arguments.checkpoints is None or arguments.save_every < 1):
        parser.error("--save-every: expected a positive number, and --checkpoints")
    return arguments


def main() -> None:
    """Make the process group and the group of the experts: of all ranks of torchrun, or of this process alone."""
    arguments = parsed()
    size = LARGE if arguments.large else SMALL
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if dist.is_torchelastic_launched():
        dist.init_process_group()  # gloo for CPUs, and NCCL where there are GPUs
    elif not dist.is_initialized():
        dist.init_process_group(init_method="tcp://localhost:0", rank=0, world_size=1)
    if size.sequences % dist.get_world_size():
        raise SystemExit(f"expected a number of ranks that divides {size.sequences}, got {dist.get_world_size()}")
    most = size.sequences * size.length // dist.get_world_size()
    shape = tokenferry.MoeShape(size.num_experts, size.top_k, size.hidden, max_tokens=most)
    with tokenferry.ExpertGroup(dist.group.WORLD, shape) as group:
        train(group, size, arguments)
    gc.collect()  # the model holds process groups, which must not outlive the next line
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
