"""The tasks of quality.py: networks, data and losses, and what a training run is judged by."""

from __future__ import annotations

import gzip
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import networks
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import natgrad
from natgrad.experiments.data import load_dataset
from natgrad.experiments.formats import read_idx

Batch = tuple[Tensor, ...]
Optimizers = list[torch.optim.Optimizer]


class Progress(Protocol):
    """The clock and the budget of a run."""

    @property
    def amount(self) -> float: ...

    @property
    def done(self) -> bool: ...

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR: ...

    def begin_step(self) -> None: ...

    def end_step(self, loss: float = 0.0) -> None: ...


class Problem:
    """What is trained. Every network has an optimizer of its own."""

    def make_models(self) -> list[nn.Module]:
        """Return networks as they are before training."""
        raise NotImplementedError

    def likelihoods(self) -> list[Any]:
        """Return what natgrad is told of the output of every network."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """Return endless batches."""
        raise NotImplementedError

    def train_step(self, models: list[nn.Module], optimizers: Optimizers, batch: Batch) -> Tensor:
        """Take one step and return the loss before it."""
        raise NotImplementedError

    def fit(
        self, models: list[nn.Module], optimizers: Optimizers, progress: Progress, seed: int
    ) -> None:
        """Train until the budget is used up."""
        batches = self.batches(seed)
        schedulers = [progress.scheduler(optimizer) for optimizer in optimizers]
        while not progress.done:
            batch = next(batches)
            progress.begin_step()
            loss = self.train_step(models, optimizers, batch)
            for scheduler in schedulers:
                scheduler.step()
            progress.end_step(float(loss))

    def evaluate(self, models: list[nn.Module]) -> tuple[float, float]:
        """Return the loss on a fixed sample of the training set, and the metric."""
        raise NotImplementedError


def epochs(tensors: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Return batches of whole epochs in random order, the incomplete last one left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield tuple(t[chosen] for t in tensors)


@dataclass(frozen=True)
class Supervised(Problem):
    """One network, inputs and targets; the last tensor of a batch holds the targets."""

    make_model: Callable[[], nn.Module]
    train: Batch
    held_out: Batch
    batch_size: int
    criterion: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor]  # A mean over samples.
    likelihood: Any = "categorical"
    measured: int = 2000  # Size of the samples that are measured.

    def make_models(self) -> list[nn.Module]:
        return [self.make_model()]

    def likelihoods(self) -> list[Any]:
        return [self.likelihood]

    def batches(self, seed: int) -> Iterator[Batch]:
        return epochs(self.train, self.batch_size, seed)

    def train_step(self, models: list[nn.Module], optimizers: Optimizers, batch: Batch) -> Tensor:
        optimizers[0].zero_grad()
        loss = self.criterion(models[0](*batch[:-1]), batch[-1])
        loss.backward()
        optimizers[0].step()
        return loss.detach()

    def evaluate(self, models: list[nn.Module]) -> tuple[float, float]:
        return (
            self._mean(models[0], self.train, self.criterion),
            self._mean(models[0], self.held_out, self.metric),
        )

    def _mean(self, model: nn.Module, data: Batch, of: Callable[..., Tensor]) -> float:
        parts = list(zip(*(t[: self.measured].split(250) for t in data), strict=True))
        values = [of(model(*part[:-1]), part[-1]) * len(part[-1]) for part in parts]
        return float(sum(values)) / sum(len(part[-1]) for part in parts)


# Images.


def read_pixels(folder: Path, name: str, part: str, count: int) -> Tensor:
    """Return images of MNIST or Fashion-MNIST as rows of pixels in [0, 1]."""
    paths = sorted((folder / name).rglob(f"{part}-images-idx3-ubyte*"))
    if not paths:
        raise SystemExit(f"no {name} in {folder}")
    return torch.tensor(read_idx(paths[0])[:count]).flatten(1) / 255


def error_percent(output: Tensor, target: Tensor) -> Tensor:
    return 100 * (output.argmax(-1) != target).float().mean()


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.sigmoid() - target).square().flatten(1).sum(1).mean()


def sum_over_pixels(logits: Tensor, target: Tensor) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return loss / len(target)


def autoencoder(
    folder: Path, data: str, sizes: tuple[int, ...], activation: Any, batch_size: int, mean: bool
) -> Problem:
    train, test = (
        read_pixels(folder, data, part, count)
        for part, count in (("train", 10_000), ("t10k", 2000))
    )
    return Supervised(
        partial(networks.autoencoder, sizes, activation),
        (train, train),
        (test, test),
        batch_size,
        functional.binary_cross_entropy_with_logits if mean else sum_over_pixels,
        squared_error,
        nn.BCEWithLogitsLoss() if mean else natgrad.Bernoulli("sum"),
    )


def classifier(
    folder: Path,
    data: str,
    make_model: Callable[[], nn.Module],
    batch_size: int,
    metric: Callable[[Tensor, Tensor], Tensor] = error_percent,
    turned: bool = False,
) -> Problem:
    """Return a classification of images; those of CIFAR-100 are 20 classes of 16 × 16 pixels."""
    classes = range(20) if data == "cifar100" else None
    loaded = load_dataset(data, folder, train_samples=10_000, test_samples=2000, classes=classes)
    train, test = loaded.train_inputs, loaded.test_inputs
    if data == "cifar100":
        train, test = functional.avg_pool2d(train, 2), functional.avg_pool2d(test, 2)
    if turned:
        train, test = turn(train, 1), turn(test, 2)
    return Supervised(
        make_model,
        (train, loaded.train_labels),
        (test, loaded.test_labels),
        batch_size,
        functional.cross_entropy,
        metric,
    )


def turn(images: Tensor, seed: int) -> Tensor:
    """Return images, each turned by a random multiple of 90°."""
    quarters = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(seed))
    turned = images.clone()
    for k in range(1, 4):
        turned[quarters == k] = images[quarters == k].rot90(k, (2, 3))
    return turned


# Regression.


def regression(folder: Path, scale: float) -> Problem:
    """Learn a fixed random network; inputs have scales from 3 to 0.03 and matter equally."""
    generator = torch.Generator().manual_seed(0)
    d_in, hidden, d_out = 21, 64, 7
    inputs = torch.randn(22_000, d_in, generator=generator)
    first = torch.randn(d_in, hidden, generator=generator) / d_in**0.5
    second = torch.randn(hidden, d_out, generator=generator)
    targets = torch.tanh(1.5 * inputs @ first) @ second
    targets = scale * (targets - targets.mean(0)) / targets.std(0)
    inputs = inputs * torch.logspace(0.5, -1.5, d_in)

    def normalised_error(output: Tensor, target: Tensor) -> Tensor:
        return 1000 * (output - target).square().mean() / scale**2

    return Supervised(
        partial(networks.mlp, (d_in, 128, 128, 128, d_out), nn.Tanh),
        (inputs[:20_000], targets[:20_000]),
        (inputs[20_000:], targets[20_000:]),
        256,
        functional.mse_loss,
        normalised_error,
        nn.MSELoss(),
    )


# Text.


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the tokens that are not padding (-100)."""
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten())


def windows_of(folder: Path, as_bytes: bool = False) -> tuple[Batch, Batch]:
    """Return windows of 64 characters of tiny Shakespeare and those one further, and held out."""
    path = folder / "tinyshakespeare" / "input.txt"
    if not path.exists():
        raise SystemExit(f"no tinyshakespeare/input.txt in {folder}")
    text = path.read_bytes()
    number = {c: c if as_bytes else i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([number[c] for c in text])
    cut = int(0.9 * len(codes))

    def windows(codes: Tensor, stride: int) -> Batch:
        found = codes.unfold(0, 65, stride)
        found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()

    return windows(codes[:cut], 16), windows(codes[cut:], 64)


def characters(folder: Path, make_model: Callable[[], nn.Module], batch_size: int) -> Problem:
    """Predict every next character."""
    return Supervised(
        make_model, *windows_of(folder), batch_size, token_loss, token_loss, measured=250
    )


def translation(folder: Path, longest: int = 16, symbols: int = 2000) -> Problem:
    """Translate English sentences to German ones; padding is ignored."""
    texts = {
        (part, language): _sentences(folder / "multi30k" / f"{part}.{language}.gz")
        for part in ("train", "val")
        for language in ("en", "de")
    }
    # Padding, start, end and rare words come first.
    known = {
        language: {
            word: number
            for number, (word, _) in enumerate(
                Counter(w for s in texts["train", language] for w in s).most_common(symbols - 4), 4
            )
        }
        for language in ("en", "de")
    }

    def tensors(part: str, count: int) -> Batch:
        pairs = [
            (english, german)
            for english, german in zip(texts[part, "en"], texts[part, "de"], strict=True)
            if max(len(english), len(german)) < longest
        ][:count]
        source = torch.zeros(len(pairs), longest, dtype=torch.int64)
        before, after = source.clone(), torch.full_like(source, -100)
        for i, (english, german) in enumerate(pairs):
            source[i, : len(english)] = torch.tensor([known["en"].get(w, 3) for w in english])
            codes = torch.tensor([1, *(known["de"].get(w, 3) for w in german), 2])
            before[i, : len(codes) - 1], after[i, : len(codes) - 1] = codes[:-1], codes[1:]
        return source, before, after

    return Supervised(
        lambda: networks.Translator(symbols, longest),
        tensors("train", 10_000),
        tensors("val", 500),
        16,
        token_loss,
        token_loss,
        measured=500,
    )


def _sentences(path: Path) -> list[list[str]]:
    if not path.exists():
        raise SystemExit(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in file]


# Two networks against each other.


class GAN(Problem):
    """Draw digits of 14 × 14 pixels: two MLPs, non-saturating losses.

    The metric is the Fréchet distance between random features of real and drawn images.
    """

    latent, batch_size, measured = 32, 64, 2000

    def __init__(self, folder: Path) -> None:
        pixels = read_pixels(folder, "mnist", "train", 12_000).view(-1, 1, 28, 28)
        images = 2 * functional.avg_pool2d(pixels, 2).flatten(1) - 1
        self.images, held_out = images[:10_000], images[10_000:]
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.randn(196, 64, generator=generator) / 14
        self.noise = torch.randn(self.measured, self.latent, generator=generator)
        self.real = self._moments(held_out)

    def make_models(self) -> list[nn.Module]:
        return [
            networks.mlp((self.latent, 256, 256, 196), nn.ReLU).append(nn.Tanh()),
            networks.mlp((196, 256, 256, 1), partial(nn.LeakyReLU, 0.2)),
        ]

    def likelihoods(self) -> list[Any]:
        return ["gaussian", "bernoulli"]

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for (images,) in epochs((self.images,), self.batch_size, seed):
            yield images, torch.randn(2, len(images), self.latent, generator=generator)

    def train_step(self, models: list[nn.Module], optimizers: Optimizers, batch: Batch) -> Tensor:
        (draw, judge), (images, noise) = models, batch
        optimizers[1].zero_grad()
        loss = self._judge(judge, images, draw(noise[0]).detach())
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        functional.softplus(-judge(draw(noise[1]))).mean().backward()
        optimizers[0].step()
        return loss.detach()

    def evaluate(self, models: list[nn.Module]) -> tuple[float, float]:
        draw, judge = models
        images = draw(self.noise)
        mean, covariance = self._moments(images)
        real_mean, real_covariance = self.real
        # tr (C₁C₂)^½ is the sum of the roots of the eigenvalues of the product.
        roots = torch.linalg.eigvals(covariance @ real_covariance).real.clamp_min(0).sqrt()
        distance = (mean - real_mean).square().sum() + torch.trace(covariance + real_covariance)
        loss = self._judge(judge, self.images[: self.measured], images)
        return float(loss), float(distance - 2 * roots.sum())

    def _judge(self, judge: nn.Module, real: Tensor, drawn: Tensor) -> Tensor:
        logits = judge(torch.cat([real, drawn]))
        truth = torch.zeros_like(logits)
        truth[: len(real)] = 1
        return functional.binary_cross_entropy_with_logits(logits, truth)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = functional.relu(images @ self.projection).double()
        return features.mean(0), features.T.cov()


# Hugging Face.


class ByTrainer(Supervised):
    """A model of transformers that transformers.Trainer trains."""

    def fit(
        self, models: list[nn.Module], optimizers: Optimizers, progress: Progress, seed: int
    ) -> None:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                progress.begin_step()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                progress.end_step()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=round(progress.amount),
                per_device_train_batch_size=self.batch_size,
                seed=seed,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = Trainer(
                models[0],
                arguments,
                train_dataset=[{"input_ids": x, "labels": x} for x in self.train[0][:10_000]],
                optimizers=(optimizers[0], progress.scheduler(optimizers[0])),
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()


def gpt2_trainer(folder: Path) -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )

    def loss(output: Any, target: Tensor) -> Tensor:
        return token_loss(output.logits, target)

    return ByTrainer(
        lambda: GPT2LMHeadModel(config),
        *windows_of(folder, as_bytes=True),
        16,
        loss,
        loss,
        measured=250,
    )


@dataclass(frozen=True)
class Task:
    """A problem and the budgets of its runs.

    Attributes:
        title: What is trained.
        metric: What the held-out metric is; lower is better.
        load: Makes the problem from the folder of the data.
        seconds: Budget in processor time.
        steps: Budget in steps, about those that AdamW takes in `seconds`.
        steps_only: Whether the budget is always in steps.
        usual_rates: Middles of searches where they are not the usual ones, from trials.
        requires: Package that must be installed.
    """

    title: str
    metric: str
    load: Callable[[Path], Problem]
    seconds: float
    steps: int
    steps_only: bool = False
    usual_rates: dict[str, float] = field(default_factory=dict)
    requires: str = "torch"


TASKS = {
    "ae_tanh": Task(
        "tanh autoencoder 784-300-150-50-16, Fashion-MNIST, BCE mean over pixels",
        "squared error",
        lambda folder: autoencoder(
            folder, "fashion_mnist", (784, 300, 150, 50, 16), nn.Tanh, 256, mean=True
        ),
        seconds=20,
        steps=1100,
        usual_rates={"sgd": 0.3},
    ),
    "ae_relu": Task(
        "ReLU autoencoder 784-400-150-30, MNIST, BCE summed over pixels",
        "squared error",
        lambda folder: autoencoder(folder, "mnist", (784, 400, 150, 30), nn.ReLU, 200, mean=False),
        seconds=20,
        steps=1200,
        usual_rates={"sgd": 3e-3},
    ),
    "mlp_tanh": Task(
        "tanh MLP of 9 hidden layers of 128, Fashion-MNIST",
        "error %",
        lambda folder: classifier(
            folder, "fashion_mnist", lambda: networks.mlp((784, *9 * (128,), 10), nn.Tanh), 256
        ),
        seconds=15,
        steps=1500,
        usual_rates={"adamw": 1e-3, "soap": 3e-3, "muon": 3e-3},
    ),
    "mlp_gelu": Task(
        "GELU MLP of 6 hidden layers of 256, MNIST turned by multiples of 90°",
        "error %",
        lambda folder: classifier(
            folder,
            "mnist",
            lambda: networks.mlp((784, *6 * (256,), 10), nn.GELU),
            128,
            turned=True,
        ),
        seconds=15,
        steps=1500,
        usual_rates={"sgd": 0.3},
    ),
    "regression": Task(
        "tanh MLP 21-128-128-128-7, a random network's outputs, MSE",
        "1000 nMSE",
        lambda folder: regression(folder, 1.0),
        seconds=10,
        steps=4000,
        usual_rates={"sgd": 0.3, "adamw": 0.01},
    ),
    "regression_1000": Task(
        "tanh MLP 21-128-128-128-7, a random network's outputs × 1000, MSE",
        "1000 nMSE",
        lambda folder: regression(folder, 1000.0),
        seconds=10,
        steps=4000,
        usual_rates={"sgd": 1e-4, "adamw": 0.1, "soap": 0.3, "muon": 0.1, "psgd": 0.3},
    ),
    "gpt": Task(
        "GPT of 2 blocks of 96, characters of Shakespeare",
        "validation loss",
        lambda folder: characters(folder, lambda: networks.Transformer(96), 16),
        seconds=30,
        steps=850,
    ),
    "resnet": Task(
        "ResNet of 7 convolutions with BatchNorm, 20 classes of CIFAR-100 at 16 × 16",
        "error %",
        lambda folder: classifier(folder, "cifar100", lambda: networks.resnet(20), 64),
        seconds=30,
        steps=850,
    ),
    "vit": Task(
        "vision transformer of 3 blocks of 64, 20 classes of CIFAR-100 at 16 × 16",
        "error %",
        lambda folder: classifier(
            folder, "cifar100", lambda: networks.VisionTransformer(16, 4, 20), 64
        ),
        seconds=30,
        steps=1100,
        usual_rates={"adamw": 1e-3, "soap": 3e-3},
    ),
    "convnext": Task(
        "ConvNeXt of 3 blocks of 40, 20 classes of CIFAR-100 at 16 × 16",
        "error %",
        lambda folder: classifier(folder, "cifar100", lambda: networks.convnext(20, 40), 32),
        seconds=30,
        steps=1050,
        usual_rates={"sgd": 0.3},
    ),
    "lstm": Task(
        "LSTM of 128, characters of Shakespeare",
        "validation loss",
        lambda folder: characters(folder, networks.LSTM, 16),
        seconds=20,
        steps=1400,
        usual_rates={"sgd": 1.0, "adamw": 0.01},
    ),
    "translation": Task(
        "encoder and decoder of 2 blocks of 96, English to German of Multi30K",
        "validation loss",
        translation,
        seconds=30,
        steps=800,
        usual_rates={"sgd": 0.03},
    ),
    "mobilenet": Task(
        "MobileNetV3-like network with BatchNorm, few steps, 20 classes of CIFAR-100 at 16 × 16",
        "held-out loss",
        lambda folder: classifier(
            folder,
            "cifar100",
            lambda: networks.mobilenet(20),
            64,
            metric=functional.cross_entropy,
        ),
        seconds=5,
        steps=60,
        steps_only=True,
        usual_rates={"adamw": 0.01, "muon": 0.03},
    ),
    "gan": Task(
        "GAN of two MLPs, MNIST at 14 × 14",
        "Fréchet distance",
        GAN,
        seconds=15,
        steps=2000,
        usual_rates={"sgd": 0.01, "adamw": 1e-3, "muon": 1e-3},
    ),
    "gpt2_trainer": Task(
        "GPT-2 of 2 blocks of 96 under transformers.Trainer, bytes of Shakespeare",
        "validation loss",
        gpt2_trainer,
        seconds=5,
        steps=100,
        steps_only=True,
        requires="transformers",
        usual_rates={"sgd": 0.3},
    ),
}
