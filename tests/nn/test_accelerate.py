"""accelerate around a model with experts: it trains as torch's tool does, and cannot save experts by itself."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel

from support import clients
from support.closeness import all_close
from support.training_jobs import Model, batch, open_group, wholes
from tokenferry.nn import parallelize

STEPS, PARTS = 3, 2


def made(group):
    model = Model(group, torch.float32)
    parallelize(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def accelerated(rank: int, pg: dist.ProcessGroup, folder: str) -> tuple[dict, dict, dict]:
    """Return what three steps of accelerate and of torch make of the same model, and what saving says."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": pg.size(), "LOCAL_WORLD_SIZE": pg.size()}
    errors = {}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in names.items()}), open_group(pg) as group:
        try:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
            model, optimizer = accelerator.prepare(*made(group))
            assert isinstance(model, DistributedDataParallel)
            for step in range(STEPS * PARTS):
                with accelerator.accumulate(model), implicit_replication():
                    accelerator.backward(loss(model, rank, step))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.02)
                    optimizer.step()
                    optimizer.zero_grad()
            saves = {
                "save_state": lambda: accelerator.save_state(folder),
                "save_model": lambda: accelerator.save_model(model, folder),
            }
            for name, save in saves.items():
                if name == "save_state" and rank != 0:
                    continue  # rank 0 alone writes the model
                with pytest.raises(RuntimeError) as caught:
                    save()
                errors[name] = str(caught.value)
            found = wholes(model)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        model, optimizer = made(group)
        model = DistributedDataParallel(model)
        for step in range(STEPS):
            for part in range(PARTS):
                (loss(model, rank, step * PARTS + part) / PARTS).backward()
            with implicit_replication():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
                optimizer.step()
            optimizer.zero_grad()
        return found, wholes(model), errors


def loss(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    x = batch(10 * step + rank, torch.float32, 5)
    return (model(x) - x.roll(1, -1)).square().mean()


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_as_torch_does_and_does_not_save(worlds, tmp_path):
    clients.need("accelerate", "safetensors")
    for rank, (found, want, errors) in enumerate(worlds(2).run(accelerated, str(tmp_path))):
        all_close(found, want, 1e-6)
        for name, message in errors.items():
            assert "invalid python storage" in message, f"{name} on rank {rank}"
