"""The demo's training loops: with the experts sharded over ranks, and with all in one process; same text and seed."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication

from tokenferry.api import ExpertGroup
from tokenferry.demo.model import ByteTransformer
from tokenferry.nn import MoELayer
from tokenferry.testing.dense import DenseMoE
from tokenferry.testing.world import Progress
from tokenferry.types import BackendName, Combined, Dispatched, DispatchOptions, MoeShape, Plan, Quantized, Routing

TEXT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """The options of both runs.

    Args:
        steps: Optimizer steps.
        ranks: R of the run over ranks.
        seed: The seed of parameters and batches.
        dtype: The dtype of parameters and rows.
        device: ``"cpu"``, or ``"cuda"``: each rank's own GPU, and the first GPU for the run in one process.
        batch: Sequences in the batch of all ranks.
        context: Bytes in a sequence.
        hidden: H.
        heads: Attention heads.
        layers: Blocks.
        experts: E.
        top_k: K.
        ffn_hidden: Hidden size of an expert.
        learning_rate: The learning rate of AdamW.
    """

    steps: int
    ranks: int
    seed: int
    dtype: torch.dtype = torch.float64
    device: BackendName = "cpu"
    batch: int = 16
    context: int = 64
    hidden: int = 64
    heads: int = 4
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    ffn_hidden: int = 128
    learning_rate: float = 3e-3


@dataclass(slots=True)
class History:
    """The history of a run: one entry per step in each list.

    Attributes:
        ranks: R.
        losses: The mean loss of the whole batch, in nats per byte.
        expert_tokens: ``[E]`` rows that each expert received, summed over layers.
        dispatch_s: Seconds in dispatch and redispatch on rank 0, including the wait for other ranks.
        combine_s: Seconds in combine on rank 0, including the wait for other ranks.
        step_s: Seconds of the whole step.
    """

    ranks: int
    losses: list[float] = field(default_factory=list)
    expert_tokens: list[list[int]] = field(default_factory=list)
    dispatch_s: list[float] = field(default_factory=list)
    combine_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


class TimedGroup(ExpertGroup):
    """An ExpertGroup that sums the seconds of its calls, forward and backward.

    On a GPU it synchronizes the device before and after each call, so that nothing else is counted. This slows training
    down.
    """

    dispatch_s = 0.0
    combine_s = 0.0

    def now(self) -> float:
        """Return the time in seconds, after all work queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def dispatch(
        self,
        x: Tensor | Quantized,
        routing: Routing,
        *,
        options: DispatchOptions | None = None,
        num_sms: int | None = None,
    ) -> Dispatched[Any]:
        """Time `ExpertGroup.dispatch`."""
        start = self.now()
        result = super().dispatch(x, routing, options=options, num_sms=num_sms)
        self.dispatch_s += self.now() - start
        return result

    def redispatch(
        self,
        x: Tensor | Quantized,
        plan: Plan,
        *,
        topk_weights: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Dispatched[Any]:
        """Time `ExpertGroup.redispatch`, the backward of combine."""
        start = self.now()
        result = super().redispatch(x, plan, topk_weights=topk_weights, num_sms=num_sms)
        self.dispatch_s += self.now() - start
        return result

    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Combined:
        """Time `ExpertGroup.combine`, also the backward of dispatch."""
        start = self.now()
        result = super().combine(y, plan, topk_weights=topk_weights, bias=bias, out=out, num_sms=num_sms)
        self.combine_s += self.now() - start
        return result


def load_text(folder: Path | None = None) -> Tensor:
    """Return the first 4 MiB of the source text of Python's standard library as bytes, its modules sorted by name.

    Raises:
        FileNotFoundError: this Python has no sources of its library; the message names the folder.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    data = bytearray()
    for path in sorted(folder.glob("*.py")):
        data += path.read_bytes()
    if len(data) < 100_000:
        raise FileNotFoundError(
            f"demo: expected the source text of Python's standard library (*.py) in {folder}, found {len(data)} bytes; "
            "use a Python that includes it"
        )
    return torch.frombuffer(data[:TEXT_BYTES], dtype=torch.uint8)


def batch_of(text: Tensor, options: Options, step: int) -> Tensor:
    """Return the whole batch of one step, ``[batch, context + 1]`` int64, the same for every rank and run."""
    generator = torch.Generator(device="cpu").manual_seed(options.seed * 1_000_003 + step)
    high, size = len(text) - options.context, (options.batch,)
    starts = torch.randint(high, size, generator=generator, dtype=torch.int64, device="cpu")
    columns = torch.arange(options.context + 1, dtype=torch.int64, device="cpu")
    return text[starts[:, None] + columns].long()


def make_model(options: Options, make_moe: Callable[[int], nn.Module]) -> ByteTransformer:
    """Return the model of the demo with the mixtures of ``make_moe``."""
    o = options
    return ByteTransformer(o.hidden, o.context, o.heads, o.layers, make_moe, o.seed).to(o.device, o.dtype)


def make_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of both runs.

    Adam divides each gradient by its own magnitude, which would amplify rounding errors of gradients near zero to full
    steps. An eps above these errors keeps the two runs comparable.
    """
    return torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), eps=1e-5)


def loss_sum(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the summed loss of all positions of ``batch``, a scalar."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def train_sharded(rank: int, pg: dist.ProcessGroup, progress: Progress, options: Options) -> History:
    """Train on this rank's share of each batch, with E/R experts on each rank. A job of `World`."""
    o = options
    text = load_text()
    tokens = -(-o.batch // o.ranks) * o.context
    history = History(o.ranks)
    group = TimedGroup(pg, MoeShape(o.experts, o.top_k, o.hidden, max_tokens=tokens), backend=o.device)
    with group:
        group.warmup()
        model = make_model(o, lambda i: MoELayer(group, o.ffn_hidden, seed=moe_seed(o, i)))
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        mine = {id(p) for layer in layers for p in layer.expert_parameters()}
        shared = [p for p in model.parameters() if id(p) not in mine]
        optimizer = make_optimizer(o, model)
        for step in range(o.steps):
            start = time.perf_counter()
            group.dispatch_s = group.combine_s = 0.0
            share = batch_of(text, o, step).tensor_split(o.ranks)[rank].to(group.device)
            loss = loss_sum(model, share) * o.ranks / (o.batch * o.context)  # its mean over ranks is the batch's loss
            optimizer.zero_grad(set_to_none=False)
            torch.autograd.backward(loss)
            average_over_ranks(pg, [p.grad for p in shared if p.grad is not None])
            with implicit_replication():  # foreach steps of DTensors and tensors together
                optimizer.step()
            totals = reduce_metrics(pg, rank, loss.detach() / o.ranks, layers, o)
            history.losses.append(float(totals[0]))
            history.expert_tokens.append([int(n) for n in totals[1:]])
            history.dispatch_s.append(group.dispatch_s)
            history.combine_s.append(group.combine_s)
            history.step_s.append(group.now() - start)
            if rank == 0:
                progress(latest(history))
    return history


def average_over_ranks(pg: dist.ProcessGroup, tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in one all-reduce. Collective.

    The sum is computed on the CPU, since the process group may not support GPUs.
    """
    flat = torch.cat([t.flatten() for t in tensors]).cpu()
    dist.all_reduce(flat, group=pg)
    flat /= pg.size()
    for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def reduce_metrics(pg: dist.ProcessGroup, rank: int, loss: Tensor, layers: list[MoELayer], options: Options) -> Tensor:
    """Return ``[1 + E]`` float64: the loss of the whole batch, then each expert's rows over all layers. Collective."""
    metrics = torch.zeros(1 + options.experts, dtype=torch.float64, device="cpu")
    metrics[0] = loss.item()
    local = options.experts // options.ranks
    for layer in layers:
        assert layer.expert_counts is not None
        metrics[1 + rank * local : 1 + (rank + 1) * local] += layer.expert_counts.cpu()
    dist.all_reduce(metrics, group=pg)
    return metrics


def latest(history: History) -> dict[str, Any]:
    """Return the last entry of each list, as a progress item."""
    return {
        "loss": history.losses[-1],
        "expert_tokens": history.expert_tokens[-1],
        "dispatch_s": history.dispatch_s[-1],
        "combine_s": history.combine_s[-1],
        "step_s": history.step_s[-1],
    }


def moe_seed(options: Options, layer: int) -> int:
    """Return the seed of the parameters of one layer's mixture, the same in both runs."""
    return options.seed * options.layers + layer


def dense_layer(options: Options, layer: int) -> DenseMoE:
    """Return a mixture with all experts in this process, with the same initial parameters as the sharded one."""
    o = options
    with ExpertGroup(None, MoeShape(o.experts, o.top_k, o.hidden, max_tokens=1), backend="cpu") as group:
        initial = MoELayer(group, o.ffn_hidden, seed=moe_seed(o, layer))
    return DenseMoE(initial.router, [initial.state_dict()])


def train_dense(options: Options, on_step: Callable[[float], None]) -> History:
    """Train the same model with all experts in this process, on the whole of each batch, without communication."""
    o = options
    text = load_text()
    history = History(1)
    model = make_model(o, lambda i: dense_layer(o, i))
    optimizer = make_optimizer(o, model)
    for step in range(o.steps):
        start = time.perf_counter()
        loss = loss_sum(model, batch_of(text, o, step).to(o.device)) / (o.batch * o.context)
        optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(loss)
        optimizer.step()
        history.losses.append(loss.item())
        counts = [layer.expert_counts for layer in model.modules() if isinstance(layer, DenseMoE)]
        history.expert_tokens.append(torch.stack([c for c in counts if c is not None]).sum(0).tolist())
        history.step_s.append(time.perf_counter() - start)
        on_step(history.losses[-1])
    return history
