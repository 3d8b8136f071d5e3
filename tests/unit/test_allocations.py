"""Each tensor that the package makes names its dtype and its device: torch's defaults, which users change, have no say.

`tests/contract/test_ambient.py` runs calls under other defaults; this finds every line.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("tokenferry").origin).parent

NUMBERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    *("tril_indices", "triu_indices", "zeros"),
}
"""Functions of torch that take a dtype and a device, and fall back to defaults."""

MODULES = {"Bilinear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "Linear", "MultiheadAttention", "RMSNorm"}
"""Modules of torch.nn with parameters, likewise."""

NEEDED = {
    **dict.fromkeys(NUMBERS | MODULES, ("dtype", "device")),
    # Always in host memory.
    "frombuffer": ("dtype",),
    "Generator": ("device",),
}

LEGACY = {"Tensor", "BoolTensor", "ByteTensor", "DoubleTensor", "FloatTensor", "IntTensor", "LongTensor"}
"""Constructors that cannot name them all."""

OF_TORCH = ("torch", "nn", "torch.nn")
ALIASED = {f"torch.{name}" for name in NUMBERS}


def unnamed(tree: ast.Module) -> list[str]:
    """Return the line of each allocation that leaves its dtype or device to torch's defaults, and what it lacks."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    wrong = [(node.lineno, fault) for node in calls if (fault := lacks(node))]
    # Under another name this test would not see them.
    called = {id(node.func) for node in calls}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in OF_TORCH:
            names = {alias.name for alias in node.names} & NEEDED.keys()
            wrong += [
                (node.lineno, f"from {node.module} import {name}: call it as {node.module}.{name}") for name in names
            ]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ALIASED and id(node) not in called:
            wrong.append((node.lineno, f"{ast.unparse(node)} that is not called: call it here"))
    return [f"{line}: {fault}" for line, fault in sorted(wrong)]


def lacks(call: ast.Call) -> str:
    """Return what a call of a function of torch should name and does not; "" if nothing."""
    module, name = ast.unparse(call.func.value), call.func.attr
    if module not in OF_TORCH:
        return ""
    if name in LEGACY:
        return f"{module}.{name}() cannot name dtype and device"
    given = {keyword.arg for keyword in call.keywords}
    if name == "Generator" and call.args:
        given.add("device")
    missing = [what for what in NEEDED.get(name, ()) if what not in given]
    return f"{module}.{name}() without {' and '.join(missing)}" if missing else ""


def test_every_allocation_names_dtype_and_device():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        for line in unnamed(ast.parse(path.read_text(), str(path)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("torch.zeros(3, dtype=torch.int64, device=x.device)", True),
        ("torch.zeros(3, dtype=torch.int64)", False),
        ("torch.zeros(3, device='cpu')", False),
        ("torch.tensor(\n    [1.0]\n)", False),
        ("torch.zeros_like(x)", True),
        ("x.new_empty(3)", True),
        ("torch.frombuffer(data, dtype=torch.uint8)", True),
        ("torch.Generator()", False),
        ("torch.Generator(device)", True),
        ("torch.Generator(device='cpu')", True),
        ("nn.Linear(2, 3)", False),
        ("torch.nn.Linear(2, 3, dtype=torch.float32, device=device)", True),
        ("torch.FloatTensor(3)", False),
        ("from torch import zeros", False),
        ("make = torch.zeros", False),
        ("from torch import Tensor, nn", True),
    ],
)
def test_what_is_missing_is_noticed(text, good):
    assert (unnamed(ast.parse(text)) == []) is good
