"""What a kernel writes down, put into words; no GPU is needed to read it."""

import pytest
import torch

from tokenferry.backends.cpu_messages import dtype_code
from tokenferry.backends.cuda_faults import Ledger, Signature
from tokenferry.errors import MismatchError
from tokenferry.kernels.board import Fault

SIGNATURE = Signature(
    "dispatch", num_experts=4, max_tokens=8, device_counts=0, bytes_of_topk_idx=16, dtype=dtype_code(torch.float32)
)


@pytest.mark.parametrize(
    ("word", "seen", "told"),
    [
        (1, 6, "num_experts is 4 on rank 0 and 6 on rank 2"),
        (2, 99, "max_tokens is 8 on rank 0 and 99 on rank 2"),
        (3, 1, "device counts is 0 on rank 0 and 1 on rank 2"),
        (4, 8, "bytes of topk_idx is 16 on rank 0 and 8 on rank 2"),
        (5, dtype_code(torch.bfloat16), "dtype is torch.float32 on rank 0 and torch.bfloat16 on rank 2"),
    ],
)
def test_what_differs_is_called_what_the_user_calls_it(word, seen, told):
    ledger = Ledger(0)
    ledger.note(7, SIGNATURE)
    error = ledger.explain([Fault.mismatch, 7, 2, word, seen, SIGNATURE.fields[word][1], 2, 0])
    assert isinstance(error, MismatchError)
    assert str(error) == (
        f"dispatch #7: rank 0 and rank 2 made different calls: {told}; it has to be the same on all ranks"
    )
