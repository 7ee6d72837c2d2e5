"""A ResNet-18 on CIFAR-100, trained by K-FAC, EKFAC, AdamW and SGD in the same loop.

    python examples/cifar100_resnet.py --data DIR --fast       # minutes on a CPU
    python examples/cifar100_resnet.py --data DIR              # the whole set, for a GPU
    python examples/cifar100_resnet.py --data DIR --optimizer kfac --epochs 100 --resume

DIR (or the environment variable NATGRAD_DATA) holds CIFAR-100: its original archive of the python
or binary version, packed or unpacked, or ``train.npz`` and ``test.npz`` with arrays `images` and
`labels`; a sub-folder ``cifar100`` is found too. The validation set is the test set.

The optimizers take turns, one epoch each, from the same start on the same batches, so that changes
of the machine's speed hit all alike. After every epoch each writes a checkpoint, from which
``--resume`` goes on. The end is a table and ``cifar100-resnet.png`` in the output folder. The clock
runs during training steps only: augmentation, forward, backward, optimizer.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import DataError, Dataset, load_dataset

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

# The best of a small search at the size of --fast, over 2 epochs: 0.1 and 0.03 for SGD, 3e-3 and
# 1e-3 for AdamW. The natural gradients have their default, a factor on the measured length.
RATES = {"kfac": 1.5, "ekfac": 1.5, "adamw": 1e-3, "sgd": 0.03}
NATURAL = {"kfac": natgrad.KFAC, "ekfac": natgrad.EKFAC}


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer; from here on no line of the program depends on which one."""
    if name in NATURAL:
        return NATURAL[name](model, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


# The network.


class Block(nn.Module):
    """Two convolutions and the shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet18(classes: int, width: int = 64) -> nn.Sequential:
    """Return the ResNet-18 for images of 32 x 32: a 3 x 3 stem, four stages of two blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels_in = width
    for channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(channels_in, channels, stride), Block(channels, channels, 1)]
        channels_in = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, classes)]
    return nn.Sequential(*layers)


# The data.


def load(folder: Path | None, samples: int | None) -> Dataset:
    """Return CIFAR-100, or a class-balanced part of it with a fifth as many validation images."""
    if folder is None:
        raise SystemExit(
            "CIFAR-100 is read from files: give --data DIR or set NATGRAD_DATA, the folder with "
            "cifar-100-python.tar.gz, cifar-100-binary.tar.gz, or train.npz and test.npz."
        )
    try:
        return load_dataset(
            "cifar100",
            folder,
            train_samples=samples,
            test_samples=None if samples is None else max(1, samples // 5),
        )
    except DataError as error:
        raise SystemExit(str(error)) from None


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to 4 pixels in both directions and mirror half of them."""
    count, _, height, width = images.shape
    rows = torch.randint(9, (count, 1, 1), generator=generator) + torch.arange(height)[:, None]
    columns = torch.randint(9, (count, 1, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(count, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(-1), columns)
    sample = torch.arange(count)[:, None, None]
    padded = functional.pad(images, (4, 4, 4, 4))
    # Indexed on both sides of a slice, channels come last.
    return padded[sample, :, rows, columns].movedim(-1, 1).contiguous()


# Training.


class Run:
    """One network, its optimizer, and what was measured on the way."""

    def __init__(self, name: str, data: Dataset, options: argparse.Namespace) -> None:
        self.name, self.data = name, data
        self.seed, self.batch_size, self.epochs = options.seed, options.batch_size, options.epochs
        self.checkpoint: Path = options.output / f"cifar100-resnet-{name}.pt"
        torch.manual_seed(self.seed)
        self.model = resnet18(data.classes, options.width).to(data.train_inputs.device)
        lr = RATES[name] if options.lr is None else options.lr
        self.optimizer = make_optimizer(name, self.model, lr)
        self.steps_per_epoch = max(1, len(data.train_labels) // self.batch_size)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=self.steps_per_epoch * self.epochs
        )
        self.settings = {
            "lr": lr,
            "width": options.width,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "samples": len(data.train_labels),
        }
        self.epoch = 0
        self.losses: list[float] = []  # One per step ...
        self.seconds: list[float] = []  # ... and the clock after it.
        self.validation: list[dict[str, float]] = []  # One per epoch.

    def train_epoch(self, progress: Progress, task: TaskID) -> None:
        """Train for one epoch, validate, and write a checkpoint."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + self.epoch)
        order = torch.randperm(len(self.data.train_labels), generator=generator)
        clock = self.seconds[-1] if self.seconds else 0.0
        self.model.train()
        for index in range(self.steps_per_epoch):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            start = time.perf_counter()
            images = augment(self.data.train_inputs[chosen], generator)
            labels = self.data.train_labels[chosen]
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
            clock += time.perf_counter() - start
            self.seconds.append(clock)
            progress.update(task, advance=1, loss=f"{recent(self.losses):.3f}")
        self.epoch += 1
        self.validation.append({"step": len(self.losses), "seconds": clock, **self.validate()})
        progress.update(task, accuracy=f"{self.validation[-1]['accuracy']:.1%}")
        self.save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return mean loss and accuracy over the validation set."""
        self.model.eval()
        labels = self.data.test_labels
        logits = torch.cat([self.model(part) for part in self.data.test_inputs.split(500)])
        return {
            "loss": functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }

    def save(self) -> None:
        """Write the checkpoint beside the old one, then swap them: one is whole at any moment."""
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "losses": self.losses,
            "seconds": self.seconds,
            "validation": self.validation,
        }
        partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # The data are on disk before the name points to them.
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(
            self.checkpoint, map_location=self.data.train_inputs.device, weights_only=True
        )
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{self.checkpoint} was written with other settings ({state['settings']}): "
                "repeat them, or leave out --resume to start anew."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch = state["epoch"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.validation = state["validation"]


def recent(losses: list[float], count: int = 20) -> float:
    """Return the mean of the last losses."""
    return sum(losses[-count:]) / len(losses[-count:])


# What is shown.


def draw(file: Path, runs: list[Run], title: str) -> None:
    """Draw training loss and validation accuracy against steps and seconds."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row")
    for run in runs:
        means = [recent(run.losses[max(0, i - 19) : i + 1]) for i in range(len(run.losses))]
        steps = range(1, len(means) + 1)
        style: dict[str, Any] = {"label": f"{run.name}, lr {run.settings['lr']:g}"}
        axes[0, 0].plot(steps, means, **style)
        axes[0, 1].plot(run.seconds, means, **style)
        percent = [100 * entry["accuracy"] for entry in run.validation]
        for axis, unit in zip(axes[1], ("step", "seconds"), strict=True):
            axis.plot([entry[unit] for entry in run.validation], percent, marker="o", **style)
    axes[0, 0].set_ylabel("training loss, mean of 20 steps")
    axes[1, 0].set_ylabel("validation accuracy, %")
    axes[1, 0].set_xlabel("steps")
    axes[1, 1].set_xlabel("seconds of training")
    axes[0, 1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def tabulate(runs: list[Run]) -> Table:
    """Return the final figures of all runs."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in (
        "optimizer",
        "rate",
        "steps",
        "seconds",
        "ms/step",
        "train loss",
        "val loss",
        "accuracy",
    ):
        table.add_column(column)
    for run in runs:
        last = run.validation[-1]
        table.add_row(
            run.name,
            f"{run.settings['lr']:g}",
            f"{len(run.losses)}",
            f"{last['seconds']:.0f}",
            f"{1000 * last['seconds'] / len(run.losses):.0f}",
            f"{recent(run.losses):.3f}",
            f"{last['loss']:.3f}",
            f"{last['accuracy']:.1%}",
        )
    return table


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("NATGRAD_DATA") or None)
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=[*RATES, "all"],
        default=["kfac", "adamw", "sgd"],
        help="one or several; default: %(default)s",
    )
    parser.add_argument("--fast", action="store_true", help="width 16, 5,000 images, 3 epochs")
    parser.add_argument("--epochs", type=int, help="default: 100, or 3 with --fast")
    parser.add_argument("--batch-size", type=int, help="default: 128, or 64 with --fast")
    parser.add_argument("--width", type=int, help="channels of the first stage; default: 64 or 16")
    parser.add_argument("--samples", type=int, help="training images; default: all, or 5,000")
    parser.add_argument("--lr", type=float, help="learning rate, instead of each optimizer's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/examples"))
    parser.add_argument("--resume", action="store_true", help="go on from checkpoints in --output")
    options = parser.parse_args()
    if "all" in options.optimizer:
        options.optimizer = list(RATES)
    defaults = (3, 64, 16, 5000) if options.fast else (100, 128, 64, None)
    for key, value in zip(("epochs", "batch_size", "width", "samples"), defaults, strict=True):
        if getattr(options, key) is None:
            setattr(options, key, value)
        elif getattr(options, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1")
    return options


def main() -> None:
    options = parse()
    console = Console()
    data = load(options.data, options.samples).to(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [Run(name, data, options) for name in dict.fromkeys(options.optimizer)]
    count = sum(p.numel() for p in runs[0].model.parameters())
    title = (
        f"ResNet-18 of width {options.width} ({count:,} parameters), "
        f"{len(data.train_labels):,} images of CIFAR-100, batch {options.batch_size}"
    )
    console.print(title)
    for run in runs:
        if isinstance(run.optimizer, natgrad.NaturalGradient):
            console.print(f"{run.name}: {str(run.optimizer.summary()).splitlines()[-2]}")
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("training loss {task.fields[loss]}, accuracy {task.fields[accuracy]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = []
        for run in runs:
            if options.resume:
                run.load()
            total = run.steps_per_epoch * run.epochs
            done = len(run.losses)
            loss = f"{recent(run.losses):.3f}" if done else "–"
            accuracy = f"{run.validation[-1]['accuracy']:.1%}" if done else "–"
            tasks.append(
                progress.add_task(
                    run.name, total=total, completed=done, loss=loss, accuracy=accuracy
                )
            )
        for epoch in range(options.epochs):
            for run, task in zip(runs, tasks, strict=True):
                if run.epoch == epoch:
                    run.train_epoch(progress, task)
    console.print(tabulate(runs))
    plot = options.output / "cifar100-resnet.png"
    draw(plot, runs, title)
    console.print(f"Curves: {plot}")


if __name__ == "__main__":
    main()
