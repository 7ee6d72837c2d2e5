"""
Lightning
=========

``configure_optimizers`` returns a natural-gradient method as it would any other; clipping,
accumulation and checkpoints are the Trainer's.
"""

import logging
import tempfile
import warnings

import lightning
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(num_workers|logging interval|LeafSpec).*")
digits = load_dataset("digits")
train = TensorDataset(digits.train_inputs.flatten(1), digits.train_labels)
test = TensorDataset(digits.test_inputs.flatten(1), digits.test_labels)


# %%
# The optimizer gets the part of the module that ``training_step`` calls.


class Classifier(lightning.LightningModule):
    """A network of two layers, trained by whatever ``make_optimizer`` makes."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
        self.make_optimizer = make_optimizer
        self.losses, self.accuracy = [], []

    def training_step(self, batch, index):
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.accuracy.append((self.net(x).argmax(1) == y).float().mean().item())

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.net)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, int(steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(make_optimizer):
    lightning.seed_everything(0, verbose=False)
    module = Classifier(make_optimizer)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        gradient_clip_val=5.0,
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(train, 60, shuffle=True), DataLoader(test, len(test)))
    return module


runs = {
    "KFAC": fit(natgrad.KFAC),
    "AdamW, lr = 0.003": fit(lambda net: torch.optim.AdamW(net.parameters(), lr=3e-3)),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for name, module in runs.items():
    left.semilogy(module.losses, label=name)
    right.plot(range(1, 7), [100 - 100 * one for one in module.accuracy], marker="o")
left.set(xlabel="step", ylabel="training loss")
right.set(xlabel="epoch", ylabel="validation error / %")
left.legend()
plt.show()
