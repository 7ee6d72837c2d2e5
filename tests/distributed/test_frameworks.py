"""Accelerate, Lightning and the Hugging Face Trainer in two processes."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from tests import processes
from tests.distributed.networks import make, weights
from tests.methods import make_optimizer

STEPS, SHARE = 6, 8


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(natgrad.KFAC, model, factors=1, inverses=2)


def share(rank: int) -> TensorDataset:
    """Return the samples of a process, in the order it sees them."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(STEPS * SHARE, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (len(x),), generator=generator))


def alone() -> Tensor:
    """Train on what both processes have together."""
    model = make("mlp")
    optimizer = optimizer_of(model)
    for pair in zip(*(DataLoader(share(rank), SHARE) for rank in range(2)), strict=True):
        x, y = (torch.cat(each) for each in zip(*pair, strict=True))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return weights(model)


def by_accelerate(rank: int, path: str) -> Tensor:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = make("mlp")
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for x, y in DataLoader(share(rank), SHARE):
        optimizer.zero_grad()
        accelerator.backward(functional.cross_entropy(prepared(x), y))
        optimizer.step()
    return weights(model)


def by_lightning(rank: int, path: str, shards: bool = False) -> Tensor:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make("mlp")

        def configure_model(self) -> None:
            if shards:
                mesh = self.device_mesh["data_parallel"]
                for layer in (self.net[0], self.net[2], self.net[4], self.net):
                    fully_shard(layer, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, logger=False, default_root_dir=path,
        strategy=ModelParallelStrategy(2, 1) if shards else "ddp", use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(share(rank), SHARE))
    return whole(module.net)


def whole(model: nn.Module) -> Tensor:
    parameters: list[Any] = list(model.parameters())
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in full])


def by_trainer(rank: int, path: str) -> Tensor:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make("mlp")

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            columns = [{"x": x, "labels": y} for x, y in share(rank)]
            return DataLoader(columns, SHARE)  # type: ignore[arg-type]

    model = Classifier()
    arguments = transformers.TrainingArguments(
        path, max_steps=STEPS, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_strategy="no",
    )  # fmt: skip
    optimizer = optimizer_of(model.net)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = InOrder(model=model, args=arguments, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.args.world_size == 2
    return weights(model.net)


#: Package → what is trained with it, in processes that load it once.
FRAMEWORKS: dict[str, list[Callable[[int, str], Tensor]]] = {
    "accelerate": [by_accelerate],
    "lightning": [by_lightning, functools.partial(by_lightning, shards=True)],
    "transformers": [by_trainer],
}


def trained(rank: int, name: str, port: int, path: str) -> list[Tensor]:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    return [train(rank, path) for train in FRAMEWORKS[name]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks_train_the_joint_batch(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = processes.run(trained, name, port, str(tmp_path), join=False)
    expected, start = alone(), weights(make("mlp"))
    for first, second in zip(*every, strict=True):
        assert torch.equal(first, second)
        assert float((first - expected).norm() / (expected - start).norm()) < 1e-10
