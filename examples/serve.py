"""Serving: prompts by dispatch and combine, then tokens by decode calls, in one process with one group.

    python examples/serve.py                                              # one rank, small
    torchrun --standalone --nproc-per-node 4 examples/serve.py --large    # a rank on each GPU

With --parts it also times a step, its calls alone, and what it computes alone; --json FILE keeps all numbers.

Requests come and go: a batch has slots, and a request leaves its own after its last token. A decode step runs all
layers for two halves of the batch, one of which computes while the rows of the other are on their way. On GPUs a step
is one CUDA graph. There is no attention: each layer mixes in an average of earlier tokens instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tokenferry
from tokenferry import DecodeCombined, DecodeDispatched, MoeShape, Routing
from tokenferry.bench.report.about import about
from tokenferry.nn import MoELayer, Router
from tokenferry.nn.balance import ExpertLoads, Placement


@dataclass(frozen=True)
class Size:
    """The sizes of the model and of its load; the load is that of one rank.

    Attributes:
        batch_slots: Requests that are decoded at the same time.
        period: Decode steps between two looks at what is finished, and at what waits.
        prompt_rows: The most rows of prompts in a call.
        requests: How many there are in all.
        longest: The most tokens of a prompt, and of an answer.
    """

    num_layers: int = 2
    vocabulary: int = 64
    hidden: int = 32
    ffn_hidden: int = 16
    num_experts: int = 8
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    batch_slots: int = 6
    period: int = 4
    prompt_rows: int = 64
    requests: int = 10
    longest: int = 12


MOST_BELOW = {torch.float32: 0.0, torch.bfloat16: 0.5}
"""How much less likely than prefill's choice a decoded token may be there, in standard deviations of the scores."""
RUNS = 11
"""Runs of `Size.period` steps of which the median is taken."""
SMALL = Size()
LARGE = Size(
    8, 32000, 2048, 1024, 64, 8, torch.bfloat16, batch_slots=128, period=32, prompt_rows=8192, requests=512, longest=512
)


@dataclass(frozen=True)
class Served:
    """What a rank has served.

    Attributes:
        prompt_rows: Rows of its prompts.
        tokens: Tokens of its answers, those that prompts gave left out.
        steps: Decode steps, of all of which every rank took part.
        seconds: What the steps took, with handing out their tokens.
    """

    prompt_rows: int
    tokens: int
    steps: int
    seconds: float


@dataclass
class Request:
    """A prompt, and the tokens of its answer so far, of which there will be ``wanted``."""

    prompt: list[int]
    wanted: int
    answer: list[int] = field(default_factory=lambda: list[int]())


class Block(nn.Module):
    """A layer of the model: a mixture of the tokens so far, then experts."""

    def __init__(self, group: tokenferry.ExpertGroup, size: Size, seed: int) -> None:
        super().__init__()
        mixing = torch.randn(size.hidden, size.hidden, generator=torch.Generator().manual_seed(seed))
        self.mixing = nn.Parameter((mixing * size.hidden**-0.5).to(group.device, size.dtype))
        with group.device:
            router = Router(size.hidden, size.num_experts, size.top_k, seed=seed)
        self.router = router
        self.moe = MoELayer(group, size.ffn_hidden, router=router, seed=seed, dtype=size.dtype)
        # The layer is for prompts. Decode steps take the experts of this rank as they are: the same memory.
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.moe.expert_parameters())
        self.gate, self.up, self.down = (part.detach() for part in parts)

    def experts(self, rows: Tensor) -> Tensor:
        """Return ``[L, R*M, H]`` for rows ``[L, R*M, H]``; a real server has a grouped GEMM that skips unused rows."""
        inner = F.silu(torch.bmm(rows, self.gate)) * torch.bmm(rows, self.up)
        return torch.bmm(inner, self.down)


def norm(x: Tensor) -> Tensor:
    """Return rows of length 1."""
    return F.rms_norm(x, (x.shape[-1],))


def averages(rows: Tensor) -> Tensor:
    """Return ``[n, H]``: for each row the average of it and those before, each weighing half of the next."""
    place = torch.arange(len(rows), device=rows.device)
    weights = 0.5 ** (place[:, None] - place + 1).to(rows.dtype)
    return weights.tril() @ rows


class Server:
    """The model, with a batch of slots; every method is collective.

    Attributes:
        tokens: ``[batch_slots]``: the last token of each slot.
        left: ``[batch_slots]``: tokens that are still to come; 0: the slot is empty.
        memory: ``[layers, batch_slots, H]``: the average of earlier tokens in each layer.
        loads: The rows that each expert received in decode steps.
    """

    def __init__(self, group: tokenferry.ExpertGroup, size: Size) -> None:
        self.size = size
        # The same group, memory and connections, for the few tokens of half a batch.
        self.decoding = group.for_shape(replace(group.shape, max_tokens=size.batch_slots // 2))
        self.loads = ExpertLoads(group, size.num_layers)
        self.blocks = [Block(group, size, seed) for seed in range(size.num_layers)]
        device = group.device
        embedding = torch.randn(size.vocabulary, size.hidden, generator=torch.Generator().manual_seed(99))
        self.embedding = embedding.to(device, size.dtype)
        self.tokens, self.left = (torch.zeros(size.batch_slots, dtype=torch.int64, device=device) for _ in range(2))
        self.memory = torch.zeros(size.num_layers, size.batch_slots, size.hidden, dtype=size.dtype, device=device)

    def prefill(self, texts: list[list[int]]) -> tuple[list[Tensor], Tensor]:
        """Return scores of what comes next, by text ``[tokens, vocabulary]``, and memories ``[layers, texts, H]``."""
        size, device = self.size, self.embedding.device
        lengths = [len(text) for text in texts]
        tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int64, device=device)
        x, memory = self.embedding[tokens], self.memory.new_zeros(size.num_layers, len(texts), size.hidden)
        for number, block in enumerate(self.blocks):
            mixed = [averages(rows) for rows in torch.split(x @ block.mixing, lengths)]
            for i, rows in enumerate(mixed):
                memory[number, i] = rows[-1]
            x = x + torch.cat([*mixed, x[:0]])  # there may be no text
            x = x + block.moe(norm(x))  # dispatch and combine: T differs from rank to rank, and may be 0
        return list(torch.split(norm(x) @ self.embedding.T, lengths)), memory

    def step(self) -> None:
        """Decode a token for each taken batch slot. Shapes never change, so that a CUDA graph can hold it."""
        empty = (self.left == 0)[:, None]
        x, masks = list(self.embedding[self.tokens].chunk(2)), empty.chunk(2)
        on_way: list[DecodeCombined] = []
        for number, block in enumerate(self.blocks):
            sent: list[DecodeDispatched[Tensor]] = []
            for i, (mask, memory) in enumerate(zip(masks, self.memory[number].chunk(2), strict=True)):
                if on_way:  # what the layer before has added, which was on its way while the other half computed
                    on_way[i].hook()
                    x[i] = x[i] + on_way[i].x
                memory.copy_(0.5 * (memory + x[i] @ block.mixing))
                x[i] = x[i] + memory
                rows = norm(x[i])
                routing = block.router(rows)
                routing = Routing(routing.topk_idx.masked_fill(mask, -1), routing.topk_weights)  # empty slots
                stats = self.loads.stats(number)
                sent.append(self.decoding.decode_dispatch(rows, routing, stats=stats, return_hook=True))
            on_way = []
            for half in sent:
                half.hook()
                on_way.append(self.decoding.decode_combine(block.experts(half.x), half.plan, return_hook=True))
        for i, added in enumerate(on_way):
            added.hook()
            x[i] = x[i] + added.x
        self.tokens.copy_((norm(torch.cat(x)) @ self.embedding.T).argmax(-1))
        self.left.sub_(1).clamp_(0)

    def calls_alone(self) -> Callable[[], None]:
        """Return a function that makes the calls of a step, with rows and choices that are there already."""
        halves = [norm(rows) for rows in self.embedding[self.tokens].chunk(2)]
        routings = [[block.router(rows) for rows in halves] for block in self.blocks]

        def run() -> None:
            for chosen in routings:
                sent = [
                    self.decoding.decode_dispatch(rows, routing, return_hook=True)
                    for rows, routing in zip(halves, chosen, strict=True)
                ]
                for half in sent:
                    half.hook()
                    self.decoding.decode_combine(half.x, half.plan)

        return run

    def computation_alone(self) -> Callable[[], None]:
        """Return a function that does a step whose calls return at once, with rows of no meaning."""
        real, none = self.decoding, cast(tokenferry.ExpertGroup, NoCalls(self.decoding, self.size))

        def run() -> None:
            self.decoding = none
            self.step()
            self.decoding = real

        return run

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what ``run`` does: as a CUDA graph on GPUs, as it is elsewhere."""
        run()  # a first call allocates memory
        if self.embedding.device.type != "cuda":
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


class NoCalls:
    """A group whose decode calls do nothing: their results have the right shapes, and are zero."""

    def __init__(self, group: tokenferry.ExpertGroup, size: Size) -> None:
        rows = size.num_experts // group.num_ranks, group.num_ranks * group.shape.max_tokens, size.hidden
        self.by_expert = torch.zeros(rows, dtype=size.dtype, device=group.device)
        self.by_token = torch.zeros(size.batch_slots // 2, size.hidden, dtype=size.dtype, device=group.device)

    def decode_dispatch(self, *_: object, **__: object) -> SimpleNamespace:
        """Return rows for the experts of this rank."""
        return SimpleNamespace(x=self.by_expert, plan=None, hook=lambda: None)

    def decode_combine(self, *_: object, **__: object) -> SimpleNamespace:
        """Return a row for each token."""
        return SimpleNamespace(x=self.by_token, hook=lambda: None)


def requests(rank: int, size: Size) -> Iterator[Request]:
    """Make up prompts; their lengths and those of their answers differ."""
    draws = torch.Generator().manual_seed(rank)
    for _ in range(size.requests):
        length, wanted = cast(list[int], torch.randint(1, size.longest + 1, (2,), generator=draws).tolist())
        prompt = cast(list[int], torch.randint(size.vocabulary, (length,), generator=draws).tolist())
        yield Request(prompt, wanted)


def admit(server: Server, waiting: list[Request], running: dict[int, Request]) -> int:
    """Give free batch slots to waiting requests, and return the rows of their prompts."""
    free = [slot for slot in range(server.size.batch_slots) if slot not in running]
    new: dict[int, Request] = {}
    rows = 0
    while waiting and free and rows + len(waiting[0].prompt) <= server.size.prompt_rows:
        rows += len(waiting[0].prompt)
        new[free.pop(0)] = waiting.pop(0)
    scores, memory = server.prefill([request.prompt for request in new.values()])  # also without any
    for i, (slot, request) in enumerate(new.items()):
        request.answer.append(int(scores[i][-1].argmax()))
        server.tokens[slot] = request.answer[-1]
        server.left[slot] = request.wanted - 1
        server.memory[:, slot] = memory[:, i]
    running.update(new)
    return rows


def decode(server: Server, step: Callable[[], None], running: dict[int, Request]) -> list[int]:
    """Decode a period, hand out its tokens and free batch slots; return how many tokens each step had."""
    log = torch.empty(server.size.period, server.size.batch_slots, dtype=torch.int64, device=server.tokens.device)
    for row in log:
        step()
        row.copy_(server.tokens)
    found = cast(list[list[int]], log.tolist())  # the one wait of the host for the device
    server.decoding.synchronize()  # raises the errors of replays
    active = [0] * server.size.period
    for slot, request in list(running.items()):
        num_tokens = min(request.wanted - len(request.answer), server.size.period)
        for i in range(num_tokens):
            request.answer.append(found[i][slot])
            active[i] += 1
        if len(request.answer) == request.wanted:
            del running[slot]
    return active


def of_all_ranks(number: int) -> int:
    """Return the sum of a number over the ranks."""
    total = torch.tensor([number])
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def slowest(seconds: float) -> float:
    """Return the time of the slowest rank."""
    most = torch.tensor(seconds)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def of_each_rank(mine: Served) -> list[Served]:
    """Return what each rank has served, by rank."""
    if not dist.is_initialized():
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def parts(server: Server, rank: int) -> dict[str, float]:
    """Time steps back to back, then their calls alone and what they compute alone; all batch slots are taken.

    Return the seconds of each, the median of `RUNS` runs of a period, of the slowest rank.
    """
    device, times = server.tokens.device, dict[str, float]()
    server.tokens.random_(server.size.vocabulary)
    ways = {"a step": server.step, "its calls": server.calls_alone(), "its computation": server.computation_alone()}
    for name, way in ways.items():
        server.left.fill_(1 << 20)
        run, rounds = server.captured(way), list[float]()
        for _ in range(RUNS + 1):  # the first one warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            of_all_ranks(0)  # ranks begin together
            start = time.perf_counter()
            for _ in range(server.size.period):
                run()
            server.decoding.synchronize()
            rounds.append(slowest(time.perf_counter() - start) / server.size.period)
        times[name] = sorted(rounds[1:])[RUNS // 2]
    if rank == 0:
        whole, *alone = times.values()
        print(", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items()), end="; ")
        print(f"{whole / sum(alone):.2f} of the sum; {server.size.batch_slots / whole:.0f} tokens a second and rank")
    return times


def serve(server: Server, group: tokenferry.ExpertGroup, size: Size) -> Served:
    """Serve all requests, print the speed, and check the answers."""
    done = list(requests(group.rank, size))
    step, waiting = server.captured(server.step), list(done)
    running: dict[int, Request] = {}
    prompt_rows, per_step, seconds = 0, list[int](), 0.0
    while of_all_ranks(len(waiting) + len(running)):  # calls are collective: all go on as long as one has work
        prompt_rows += admit(server, waiting, running)
        start = time.perf_counter()
        per_step += decode(server, step, running)
        seconds += time.perf_counter() - start
    served = Served(prompt_rows, sum(per_step), len(per_step), seconds)
    busy = [num_tokens for num_tokens in per_step if num_tokens] or [0]
    print(
        f"rank {group.rank} of {group.num_ranks}: {prompt_rows} rows of {len(done)} prompts; {served.tokens} tokens in "
        f"{served.steps} steps of {min(busy)} to {max(busy)} tokens, {1e3 * seconds / served.steps:.2f} ms each: "
        f"{served.tokens / seconds:.0f} tokens a second"
    )
    rows = server.loads.take(Placement.of(torch.arange(size.num_experts), group.num_ranks))
    assert int(rows.sum()) == of_all_ranks(served.tokens) * size.top_k * size.num_layers
    check(server, group.rank, done)
    return served


def check(server: Server, rank: int, done: list[Request]) -> None:
    """Compare all answers with what prefill alone says of them; print how many tokens it would choose, too.

    The two ways to a token round differently, so that in bfloat16 it may prefer one that is about as likely.
    """
    below = list[Tensor]()
    for request in done:
        (scores,), _ = server.prefill([request.prompt + request.answer[:-1]])
        scores = scores[len(request.prompt) - 1 :].float()
        answer = torch.tensor(request.answer, dtype=torch.int64, device=scores.device)
        chosen = scores.gather(1, answer[:, None])[:, 0]
        below.append((scores.amax(1) - chosen) / scores.std(1))
    off = torch.cat(below)
    same, most = int((off == 0).sum()), float(off.max())
    others = f"; the others are at most {most:.3f} standard deviations below its choice" if same < len(off) else ""
    print(f"rank {rank}: prefill alone would choose {same} of {len(off)} tokens{others}")
    assert most <= MOST_BELOW[server.size.dtype]


def report(group: tokenferry.ExpertGroup, size: Size, served: list[Served], times: dict[str, float]) -> str:
    """Return all numbers as JSON; times of parts are empty if they were not asked for."""
    cuda = group.device.type == "cuda"
    found = {
        "schema": 2,  # 1: batch_slots were called seats
        **about("examples/serve.py"),
        "device": torch.cuda.get_device_name(group.device) if cuda else "cpu",
        "group": {"ranks": group.num_ranks, "backend": group.backend, "transport": group.transport},
        "size": {**asdict(size), "dtype": str(size.dtype).removeprefix("torch.")},
        "served": [asdict(one) for one in served],
        "parts": {name: {"seconds": seconds, "runs": RUNS} for name, seconds in times.items()},
    }
    return json.dumps(found, indent=1) + "\n"


def main() -> None:
    """Make the group: on all ranks of torchrun, or of this process alone."""
    parser = argparse.ArgumentParser(description="Serve made-up requests with a Mixture-of-Experts model.")
    parser.add_argument("--large", action="store_true", help="a size for GPUs")
    parser.add_argument("--parts", action="store_true", help="also time a step, its calls alone, and its computation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    arguments = parser.parse_args()
    file = cast("Path | None", arguments.json)
    if file is not None and not file.absolute().parent.is_dir():
        parser.error(f"--json {file}: there is no folder {file.parent}; make it, or choose another")
    size = LARGE if arguments.large else SMALL
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    shape = MoeShape(size.num_experts, size.top_k, size.hidden, max_tokens=size.prompt_rows)
    with tokenferry.ExpertGroup(dist.group.WORLD, shape) as group, torch.no_grad():
        group.warmup()
        server = Server(group, size)
        served = of_each_rank(serve(server, group, size))
        times = parts(server, group.rank) if arguments.parts else {}
        if file is not None and group.rank == 0:
            file.write_text(report(group, size, served, times), encoding="utf-8")
    del server
    gc.collect()  # its layers hold process groups, which must not outlive the next line
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
