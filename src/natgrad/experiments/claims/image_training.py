"""Convolutional networks of the kinds that papers train, and one loop that trains them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments.claims.claim import Setting
from natgrad.experiments.data import Dataset
from natgrad.experiments.random_state import reproducible

Curves = dict[str, list[float]]
"""``loss`` (mean over the batches of an epoch), ``accuracy`` (on test images after it) and
``seconds`` (of training until then, without what measuring took), one entry an epoch."""


def _convolution(d_in: int, d_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the resolution, but for its stride, and a BatchNorm."""
    padding = size // 2
    convolution = nn.Conv2d(d_in, d_out, size, stride=stride, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(d_out)]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut past them (He et al. 2016)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(d_in, d_out, 3, stride), _convolution(d_out, d_out, 3)
        self.body: nn.Sequential = nn.Sequential(*first, nn.ReLU(), *second)
        changes = d_in != d_out or stride > 1
        self.shortcut: nn.Module = nn.Sequential(
            *(_convolution(d_in, d_out, 1, stride) if changes else ())
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, d_in, H, W) to (N, d_out, H / stride, W / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: ResNet-20 is (16, 32, 64) with 3 blocks each.

    `widths` are the channels of each stage, every one of which but the first halves the resolution;
    `blocks` those of each stage.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        d_in = widths[0]
        layers: list[nn.Module] = [*_convolution(channels, d_in, 3), nn.ReLU()]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(d_in, width, 2 if stage and not block else 1))
                d_in = width
        self.features: nn.Sequential = nn.Sequential(*layers)
        self.classifier: nn.Linear = nn.Linear(d_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class VGG(nn.Module):
    """3×3 convolutions and ReLU without normalisation; VGG-16 is its 13 convolutions (2014).

    `widths` are the channels, group by group; each group ends in a maximum of 2×2 pixels as long as
    there are so many.
    """

    def __init__(
        self, channels: int, classes: int, widths: Sequence[Sequence[int]], side: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        d_in = channels
        for group in widths:
            for width in group:
                layers += [nn.Conv2d(d_in, width, 3, padding=1), nn.ReLU()]
                d_in = width
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features: nn.Sequential = nn.Sequential(*layers)
        self.classifier: nn.Linear = nn.Linear(d_in * side**2, classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):  # He et al. 2015: else nothing comes through.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


@dataclass(frozen=True)
class ImageTask:
    """Images to train a network on, which is made of channels, classes and side.

    Of every epoch's batches a last incomplete one is left out.
    """

    data: Dataset
    network: Callable[[int, int, int], nn.Module]
    epochs: int
    batch_size: int = 128

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.data.train_labels) // self.batch_size

    def model(self, draw: int) -> nn.Module:
        """Return the network at random weights, numbered by `draw`."""
        channels, side, _ = self.data.input_shape
        with reproducible(draw):
            model = self.network(channels, self.data.classes, side)
        return model.to(self.data.train_inputs.device)


def residual(setting: Setting, widths: Sequence[int], blocks: int, classes: int) -> ImageTask:
    """Return a ResNet-8 of width 8 to train; at the published size that of `ResNet`'s arguments."""
    widths, blocks = setting.of(((8, 16, 32), 1), (widths, blocks))
    network = lambda c, k, side: ResNet(c, k, widths, blocks)  # noqa: E731
    return ImageTask(images(setting, 2560, classes), network, setting.of(6, 200))


def images(setting: Setting, train_samples: int, classes: int) -> Dataset:
    """Return the images of a claim: all of them at the published size.

    At the small size they are of the first `classes` classes, 2×2 pixels made one, with half as
    many test images; all of the digits, which stand in where there are no files.
    """
    if setting.full or setting.data == "digits":
        return setting.dataset()
    found = setting.dataset(
        train_samples, test_samples=train_samples // 2, classes=tuple(range(classes))
    )
    train, test = (functional.avg_pool2d(x, 2) for x in (found.train_inputs, found.test_inputs))
    return replace(found, train_inputs=train, test_inputs=test)


def processor_time(device: torch.device) -> float:
    """Return the processor seconds of this process; on an accelerator, those of the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def train(task: ImageTask, make: Callable[[nn.Module], torch.optim.Optimizer], draw: int) -> Curves:
    """Train the network of a task; a run whose loss is not finite ends there, with infinite losses.

    Random weights and the order of the images are numbered by a draw; the learning rate stays as
    `make` made it.
    """
    data, device = task.data, task.data.train_inputs.device
    model = task.model(draw)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(draw)
    found: list[tuple[float, float, float]] = []
    seconds = 0.0
    while len(found) < task.epochs:
        order = torch.randperm(len(data.train_labels), generator=generator)
        model.train()
        losses: list[Tensor] = []
        began = processor_time(device)
        for chosen in order.split(task.batch_size)[: task.steps]:
            optimizer.zero_grad()
            output = model(data.train_inputs[chosen])
            loss = functional.cross_entropy(output, data.train_labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        seconds += processor_time(device) - began
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            found += [(math.inf, 1.0 / data.classes, seconds)] * (task.epochs - len(found))
        else:
            found.append((mean, _accuracy(model, data), seconds))
    columns = zip(*found, strict=True)
    return {
        name: [*one] for name, one in zip(("loss", "accuracy", "seconds"), columns, strict=True)
    }


@torch.no_grad()
def _accuracy(model: nn.Module, data: Dataset) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in data.test_inputs.split(500)])
    return float((found == data.test_labels).double().mean())
