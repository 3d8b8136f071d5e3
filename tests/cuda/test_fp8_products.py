"""FP8 products of experts on a GPU, beside the same on the CPU."""

import pytest
import torch

from tokenferry.nn import by_expert, fp8_products

OFFSETS = torch.tensor((0, 40, 40, 200, 256))


def linear(product, rows, weight):
    return product(rows, weight)


@pytest.mark.parametrize("columns", [64, 72], ids=["in FP8", "in float32"])
def test_products_on_a_gpu_are_those_on_the_cpu(columns):
    """On compute capability 9.0 grouped, without a wait for the device; 72 is no multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(260, 128, generator=generator).bfloat16()
    weights = torch.randn(4, 128, columns, generator=generator).bfloat16()
    upstream = torch.randn(256, columns, generator=generator).bfloat16()
    found = {}
    for device in ("cpu", "cuda"):
        inputs = [each.to(device, copy=True).requires_grad_() for each in (rows, weights)]
        offsets = OFFSETS.to(device)
        grouped = fp8_products.can_group(inputs[0], (inputs[1],))
        assert grouped == (device == "cuda" and columns == 64 and torch.cuda.get_device_capability() == (9, 0))
        torch.cuda.set_sync_debug_mode("error" if grouped else "default")
        try:
            out = by_expert(linear, inputs[0], offsets, inputs[1], fp8=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grads = torch.autograd.grad(out[:256], inputs, upstream.to(device))
        found[device] = [out[:256].detach().cpu(), grads[0][:256].cpu(), grads[1].cpu()]
    for what, got, want in zip(("out", "rows", "weights"), found["cuda"], found["cpu"], strict=True):
        off = (got.double() - want.double()).norm() / want.double().norm()
        assert off < 2.0**-7, f"{what}: {off}"
