"""Cases: the inputs of every rank. The same seeds give the same tensors on every rank, so each rank knows all inputs.

Every value of a row is made from the token's number in the whole group: a row that lands in the wrong place, or a sum
in which one is missing or doubled, cannot look right. Exponents are spread so widely that a float32 sum in another
order has other bits.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.testing.oracle import Oracle, Sent
from tokenferry.types import MoeShape

ROUTINGS = (
    "even",
    "repeated",
    "half_dropped",
    "one_rank_idle",
    "all_to_expert_0",
    "nothing",
    "own_rank",
    "one_token_all",
)
"""Kinds of routing.

even: distinct experts at random. repeated: with repetition. half_dropped: slots are -1 at random. one_rank_idle: no
token chooses the last rank. all_to_expert_0: every slot is 0. nothing: every slot is -1. own_rank: only experts of the
own rank. one_token_all: each rank's first token chooses as many experts as it can, the others none.
"""

_MASK = (1 << 40) - 1


@dataclass(frozen=True)
class Case:
    """One situation: sizes, dtypes and a kind of routing.

    Attributes:
        tokens: T of each rank; its length is R.
        experts: E.
        top_k: K.
        hidden: H.
        dtype: Dtype of the rows.
        idx_dtype: Dtype of ``topk_idx``.
        routing: One of `ROUTINGS`.
        weights: Whether gate weights travel along.
        seed: Seed; another one gives other rows and routings of the same kind.
    """

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int = 16
    dtype: torch.dtype = torch.bfloat16
    idx_dtype: torch.dtype = torch.int64
    routing: str = "even"
    weights: bool = True
    seed: int = 0

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}-{str(self.idx_dtype).removeprefix('torch.')}"
        sizes = f"T{'_'.join(map(str, self.tokens))}-E{self.experts}-K{self.top_k}-H{self.hidden}"
        return f"{self.routing}-{sizes}-{kind}-w{int(self.weights)}-s{self.seed}"

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.tokens)

    @property
    def shape(self) -> MoeShape:
        """The sizes, with the least M that holds every rank's tokens."""
        return MoeShape(self.experts, self.top_k, self.hidden, max_tokens=max(*self.tokens, 1))

    def inputs(self) -> tuple[Sent, ...]:
        """Return the inputs of each rank."""
        return tuple(self._sent(rank) for rank in range(self.ranks))

    def rows(self, rank: int, dtype: torch.dtype, width: int, salt: int) -> Tensor:
        """Return ``[T, width]`` values of the tokens of ``rank``; another ``salt``, other values."""
        first = sum(self.tokens[:rank]) + (self.seed * 64 + salt) * 1_000_003
        return _known_rows(first, self.tokens[rank], width, dtype).clone()

    def gates(self, rank: int, salt: int = 0) -> Tensor:
        """Return ``[T, K]`` float32 gate weights of ``rank``, none of them 0."""
        return self.rows(rank, torch.float32, self.top_k, 32 + salt)

    def _sent(self, rank: int) -> Sent:
        x = self.rows(rank, self.dtype, self.hidden, 0)
        return Sent(x, _known_choices(self, rank).clone(), self.gates(rank) if self.weights else None)

    def choices(self, rank: int) -> Tensor:
        """Return ``[T, K]`` chosen experts of ``rank``."""
        pick = random.Random(f"{self.seed} {rank} {self.routing}")
        chosen = [self._choose(pick, rank, token) for token in range(self.tokens[rank])]
        return torch.tensor(chosen, dtype=self.idx_dtype, device="cpu").reshape(self.tokens[rank], self.top_k)

    def _choose(self, pick: random.Random, rank: int, token: int) -> list[int]:
        local = self.experts // self.ranks
        pool = {
            "one_rank_idle": range(max(self.experts - local, 1)),
            "own_rank": range(rank * local, rank * local + local),
        }.get(self.routing, range(self.experts))
        if self.routing == "all_to_expert_0":
            return [0] * self.top_k
        if self.routing == "nothing" or (self.routing == "one_token_all" and token):
            return [-1] * self.top_k
        if self.routing == "repeated":
            return [pick.choice(pool) for _ in range(self.top_k)]
        chosen = pick.sample(pool, min(self.top_k, len(pool)))
        chosen += [-1] * (self.top_k - len(chosen))
        if self.routing == "half_dropped":
            chosen = [e if pick.random() < 0.5 else -1 for e in chosen]
        pick.shuffle(chosen)
        return chosen


# The checks of one case ask for the same inputs and answers again and again.


@functools.lru_cache(maxsize=256)
def _known_choices(case: Case, rank: int) -> Tensor:
    return case.choices(rank)


@functools.lru_cache(maxsize=256)
def _known_rows(first: int, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the rows of consecutive numbers."""
    return payload(torch.arange(first, first + num_rows, dtype=torch.int64, device="cpu"), width, dtype)


def payload(numbers: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return ``[len(numbers), width]`` values hashed from number and column, never 0, of magnitudes 2^-9 to 2^10.

    Args:
        numbers: ``[n]`` int64.
        width: Columns.
        dtype: Any floating-point dtype; values are rounded to it.
    """
    columns = torch.arange(width, dtype=torch.int64, device="cpu")
    state = numbers[:, None] * 2_654_435 + columns[None, :] * 40_503 + 12_345
    words = []
    for _ in range(3):
        state = ((state ^ (state >> 17)) * 1_103_515 + 1_013_904_223) & _MASK
        words.append(state >> 9)
    fraction = (words[0] & 0x3FFFFFF).double() / 2**26 + (words[1] & 0x3FFFFFF).double() / 2**52
    exponent = (words[2] % 19 - 9).double()
    sign = ((words[2] >> 12) & 1).double() * 2 - 1
    return (sign * (1 + fraction) * torch.exp2(exponent)).to(dtype)


def answers(case: Case, oracle: Oracle, rank: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return ``[num_rows, H]``: the answers of the experts of ``rank``, NaN in every row that combine must not read.

    Any rank can make any rank's answers. They depend on the token, the rank and the expert, and on nothing received, so
    that a wrong combine is not hidden by an equally wrong dispatch.
    """
    return _scatter(case, oracle, rank, (num_rows, case.hidden), dtype, salt=1)


def returned_weights(case: Case, oracle: Oracle, rank: int, num_rows: int) -> Tensor:
    """Return the weights that ``rank`` sends home, ``[num_rows, K]`` (rows) or ``[num_rows]``; NaN: not to be read."""
    if oracle.layout == "rows":
        return _scatter(case, oracle, rank, (num_rows, case.top_k), torch.float32, salt=2)
    return _scatter(case, oracle, rank, (num_rows, 1), torch.float32, salt=2).reshape(num_rows)


def _scatter(case: Case, oracle: Oracle, rank: int, shape: tuple[int, int], dtype: torch.dtype, *, salt: int) -> Tensor:
    table = torch.full(shape, torch.nan, dtype=dtype, device="cpu")
    places, values = _known_answers(case, oracle, rank, shape[1], salt)
    table[places] = values.to(dtype)
    return table


@functools.lru_cache(maxsize=64)
def _known_answers(case: Case, oracle: Oracle, rank: int, width: int, salt: int) -> tuple[Tensor, Tensor]:
    """Return the place of each row that holds an answer, and its ``[n, width]`` float64 values."""
    rows = oracle.rows(rank)
    numbers = [
        ((salt * 61 + rank) * 257 + (row.expert or 0)) * 100_003 + sum(case.tokens[: row.src_rank]) + row.src_token
        for row in rows
    ]
    places = torch.tensor([row.place for row in rows], dtype=torch.int64, device="cpu")
    tokens = torch.tensor(numbers, dtype=torch.int64, device="cpu") + case.seed * 7
    return places, payload(tokens, width, torch.float64)
