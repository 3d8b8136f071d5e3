"""transformers, as it is published: its experts as `GroupedExperts` runs them, against its own function for that."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tokenferry.integrations.grouped_experts import GroupedExperts

H, F, L = 32, 16, 6
COUNTS = (3, 0, 5, 1, 0, 2)
PADDING = 3
"""Rows without data behind those of the experts."""

CONFIG = SimpleNamespace(
    num_experts=L,
    num_local_experts=L,
    hidden_size=H,
    intermediate_size=F,
    moe_intermediate_size=F,
    hidden_act="silu",
    _experts_implementation="grouped_mm",
)


class Transposed(nn.Module):
    """Weights of the other order, as those of Aria."""

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts, self.act_fn = L, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.empty(L, H, 2 * F))
        self.down_proj = nn.Parameter(torch.empty(L, F, H))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError


class Biased(Transposed):
    """Experts that add more than a product, as those of GPT-OSS."""


class Ungated(nn.Module):
    """Experts without a gate, as those of NemotronH."""

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts, self.act_fn = L, nn.GELU()
        self.up_proj = nn.Parameter(torch.empty(L, F, H))
        self.down_proj = nn.Parameter(torch.empty(L, H, F))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError


BIASED = use_experts_implementation(has_bias=True, is_transposed=True)(Biased)
KINDS = (
    Qwen3MoeExperts,
    use_experts_implementation(is_transposed=True)(Transposed),
    use_experts_implementation(has_gate=False)(Ungated),
)


def ran(experts: nn.Module, run, rows: Tensor, weights: Tensor) -> list[Tensor]:
    """Return outputs and all gradients of rows that hold data."""
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    out = run(rows, weights)[: sum(COUNTS)]
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    data = [each[: sum(COUNTS)] for each in (out.detach(), rows.grad, weights.grad)]
    return [*data, *(p.grad.clone() for p in experts.parameters())]


def gives_the_same_bits(kind: type[nn.Module], dtype: torch.dtype, of_weights: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = kind(CONFIG).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    experts._is_expert_parallel = True  # 5.18 and later leave rows with the number L out only then
    index = torch.arange(L + 1).repeat_interleave(torch.tensor((*COUNTS, PADDING)))
    rows, weights = torch.randn(len(index), H, dtype=dtype), torch.rand(len(index), dtype=of_weights)
    offsets = torch.tensor((0, *COUNTS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    assert grouped.apply_now()
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    want = ran(experts, lambda x, w: own(experts, x, index.unsqueeze(1), w.unsqueeze(1)), rows, weights)
    found = ran(experts, lambda x, w: grouped(x, offsets, w), rows, weights)
    for number, (got, expected) in enumerate(zip(found, want, strict=True)):
        assert got.dtype == expected.dtype, f"{kind.__name__}, {number}: {got.dtype}, expected {expected.dtype}"
        assert got.equal(expected), f"{kind.__name__} in {dtype}, {number}: {got - expected}"


def is_left_alone() -> None:
    """Whatever would not mean the same."""
    assert GroupedExperts.of(BIASED(CONFIG)) is None, "biases"
    assert GroupedExperts.of(SimpleNamespace(forward=None)) is None, "no module of transformers"
    replaced = Qwen3MoeExperts(CONFIG)
    replaced.forward = lambda *arguments: None
    assert GroupedExperts.of(replaced) is None, "another forward"
    experts = Qwen3MoeExperts(CONFIG)
    grouped = GroupedExperts.of(experts)
    assert grouped.apply_now()
    for name in ("eager", "batched_mm", None):
        experts.config = SimpleNamespace(_experts_implementation=name)
        assert not grouped.apply_now(), name
    experts.config = CONFIG
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert not grouped.apply_now(), "scaled weights"
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    ALL_EXPERTS_FUNCTIONS.register("grouped_mm", lambda *arguments: own(*arguments))
    assert GroupedExperts.of(Qwen3MoeExperts(CONFIG)) is None, "another function under the name"


def main() -> None:
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            for of_weights in {dtype, torch.float32}:
                gives_the_same_bits(kind, dtype, of_weights)
    is_left_alone()
    sys.stdout.write(f"{transformers.__version__} {Path(transformers.__file__).parents[1]}\n")


if __name__ == "__main__":
    main()
