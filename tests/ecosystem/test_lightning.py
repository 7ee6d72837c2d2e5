"""Lightning trains exactly as the plain loop does."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ecosystem.loops import (
    OPTIMIZERS,
    REPRESENTATIVES,
    assert_curvature_everywhere,
    batches,
    cross_entropy,
    make,
    network,
    train,
)
from tests.state import flat

lightning = pytest.importorskip("lightning")
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


@pytest.mark.parametrize("name", [n for n in REPRESENTATIVES if n != "egn"])
@pytest.mark.parametrize(
    "way", ["plain", "accumulation", "clipping", "scheduler", "everything", "by hand"]
)
def test_lightning_is_the_plain_loop(name, way):
    plain, wrapped = network(), network()
    data = batches(8)
    accumulate = 2 if way in ("accumulation", "everything") else 1
    clip = 0.5 if way in ("clipping", "everything") else None
    schedule = way in ("scheduler", "everything")
    optimizer = make(name, plain)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) if schedule else None
    train(plain, optimizer, data, accumulate=accumulate, clip=clip, scheduler=scheduler)

    module = (ByHand if way == "by hand" else Classifier)(wrapped, name, schedule)
    trainer = fit(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert torch.equal(flat(plain), flat(wrapped))
    assert not torch.equal(flat(plain), flat(network()))
    inner = trainer.optimizers[0]
    assert name == "padam" or inner.preconditioner.observer.steps == len(data) // accumulate
    assert_curvature_everywhere(inner)


class LineSearch(Classifier):
    """Manual optimization for a closure that does not call ``backward``."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.optimizers().optimizer.step(lambda: cross_entropy(self.net, batch))


def test_lightning_with_a_line_search_is_the_plain_loop():
    plain, wrapped = network(), network()
    data = batches(8)
    train(plain, make("egn", plain), data)
    trainer = fit(LineSearch(wrapped, "egn"), data)
    assert torch.equal(flat(plain), flat(wrapped))
    assert trainer.optimizers[0].preconditioner.observer.steps == len(data)


class Stop(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("name", [*OPTIMIZERS, "padam"])
def test_resuming_in_the_middle_of_an_epoch(name, tmp_path):
    data = batches(7)
    whole, parted = network(), network()
    fit(Classifier(whole, name, True), data, max_epochs=2)

    class Crashing(Classifier):
        crash = True

        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.crash and self.trainer.global_step == 5:
                raise Stop
            return super().training_step(batch, index)

    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1
    )
    with pytest.raises(Stop):
        fit(
            Crashing(parted, name, True), data, max_epochs=2,
            enable_checkpointing=True, callbacks=[saver],
        )  # fmt: skip
    last = sorted(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)[-1]
    assert torch.load(last, weights_only=True)["global_step"] == 4
    fresh = network(seed=3)
    fit(Classifier(fresh, name, True), data, max_epochs=2, checkpoint=last)
    assert torch.equal(flat(fresh), flat(whole))


def test_loss_falls_with_bfloat16_precision():
    net = network(dtype=torch.float32)
    x, y = batches(1, 32, torch.float32)[0]
    first = float(cross_entropy(copy.deepcopy(net), (x, y)).detach())
    fit(Classifier(net), [(x, y)] * 30, precision="bf16-mixed")
    assert float(cross_entropy(net, (x, y)).detach()) < 0.5 * first
    assert all(p.dtype == torch.float32 for p in net.parameters())
