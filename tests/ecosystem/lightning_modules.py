"""Modules for Lightning, apart from the tests: loading Lightning takes seconds."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from tests.ecosystem.loops import cross_entropy, make

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    """The module of the user guide."""

    def __init__(self, net: nn.Module, name: str = "kfac", schedule: bool = False) -> None:
        super().__init__()
        self.net, self.name, self.schedule = net, name, schedule

    def training_step(self, batch: Any, index: int) -> Tensor:
        return cross_entropy(self.net, batch)

    def configure_optimizers(self) -> Any:
        optimizer = make(self.name, self.net)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ByHand(Classifier):
    """Manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.net, batch))
        optimizer.step()


class LineSearch(Classifier):
    """Manual optimization for a closure that does not call ``backward``."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.optimizers().optimizer.step(lambda: cross_entropy(self.net, batch))


class Stop(Exception):
    """Stands for a crash."""


class Crashing(Classifier):
    crash = True

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.crash and self.trainer.global_step == 5:
            raise Stop
        return super().training_step(batch, index)


class Resumable:
    """A loader that knows where it is, as resuming within an epoch needs."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.position = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(module: Classifier, data: list[Any], checkpoint: Any = None, **options: Any) -> Any:
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, Resumable(data), ckpt_path=checkpoint)
    return trainer
