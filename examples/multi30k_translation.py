"""A transformer that translates German into English, by K-FAC, EKFAC, AdamW and SGD in one loop.

    python examples/multi30k_translation.py --data DIR --fast   # minutes on a CPU
    python examples/multi30k_translation.py --data DIR          # all of Multi30K
    python examples/multi30k_translation.py --data DIR --fast --optimizer kfac --label-smoothing 0.1

DIR (or the environment variable NATGRAD_DATA) or its sub-folder ``multi30k`` holds ``train.de``,
``train.en``, ``val.de`` and ``val.en``, one sentence a line, plain or compressed as ``.gz``.

All of the transformer is preconditioned: embeddings, attention, linear layers and LayerNorm. Words
are many, so ``max_factor_size`` keeps the factors with one row per word (embeddings, output layer)
as their diagonal, while the factors on the side of the width stay dense; the summary that is
printed first shows it. Padding counts neither in the loss nor in the curvature: both follow the
``ignore_index`` of the loss module.

The optimizers take turns, one epoch each, from the same start on the same batches, so that changes
of the machine's speed hit all alike. The end is a table with BLEU on the validation set, some
translations, and ``multi30k-translation.png`` in the output folder. The clock runs during training
steps only.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
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
from torch.nn.utils.rnn import pad_sequence

import natgrad
from natgrad.curvature import EigenKronecker, KroneckerFactors

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PAD, UNKNOWN, BEGIN, END = range(4)
LONGEST = 40  # Words of a sentence; the few longer ones are cut.

# The best of a small search at the size of --fast: 1, 0.3, 0.1 and 0.03 for SGD, of which the first
# two diverge; 3e-3 and 1e-3 for AdamW. The natural gradients have their default, a factor on the
# measured length.
RATES = {"kfac": 1.5, "ekfac": 1.5, "adamw": 3e-3, "sgd": 0.1}
NATURAL = {"kfac": natgrad.KFAC, "ekfac": natgrad.EKFAC}
STRUCTURES = {"kfac": KroneckerFactors, "ekfac": EigenKronecker}


def make_optimizer(
    name: str, model: nn.Module, criterion: nn.Module, lr: float, max_factor_size: int
) -> torch.optim.Optimizer:
    """Return an optimizer; from here on no line of the training depends on which one."""
    if name in NATURAL:
        structure = STRUCTURES[name](max_factor_size=max_factor_size)
        return NATURAL[name](model, criterion, lr=lr, structure=structure)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# The data.


def read_sentences(folder: Path | None) -> dict[str, list[list[str]]]:
    """Return the words of every sentence by file name."""
    if folder is None:
        raise SystemExit(
            "Multi30K is read from files: give --data DIR or set NATGRAD_DATA, the folder with "
            "train.de, train.en, val.de and val.en, plain or as .gz."
        )
    found = {}
    for name in ("train.de", "train.en", "val.de", "val.en"):
        for path in (
            place / (name + suffix)
            for place in (folder / "multi30k", folder)
            for suffix in ("", ".gz")
        ):
            if path.is_file():
                break
        else:
            raise SystemExit(
                f"There is no {name} or {name}.gz in {folder} or {folder / 'multi30k'}: expected "
                "train.de, train.en, val.de and val.en of Multi30K."
            )
        try:
            with (gzip.open if path.suffix == ".gz" else open)(
                path, "rt", encoding="utf-8"
            ) as file:
                found[name] = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in file]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise SystemExit(f"{path} cannot be read as UTF-8 text: {error}") from None
    for part in ("train", "val"):
        german, english = len(found[f"{part}.de"]), len(found[f"{part}.en"])
        if german != english or german == 0:
            raise SystemExit(
                f"{part}.de and {part}.en in {folder} must have equally many lines, and some: "
                f"they have {german} and {english}."
            )
    return found


class Vocabulary:
    """The words of one language that occur often enough, and their numbers."""

    def __init__(self, sentences: list[list[str]], min_frequency: int) -> None:
        counts = Counter(word for sentence in sentences for word in sentence)
        frequent = [word for word, count in counts.most_common() if count >= min_frequency]
        self.words = ["<pad>", "<unknown>", "<begin>", "<end>", *frequent]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentence: list[str]) -> Tensor:
        """Return the numbers of a sentence between begin and end."""
        numbers = [self.numbers.get(word, UNKNOWN) for word in sentence[:LONGEST]]
        return torch.tensor([BEGIN, *numbers, END])

    def decode(self, numbers: list[int]) -> list[str]:
        """Return the words up to the first end."""
        words = []
        for number in numbers:
            if number == END:
                break
            words.append(self.words[number])
        return words


class Corpus:
    """Training and validation pairs as padded batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        sentences = read_sentences(options.data)
        german, english = (sentences[f"train.{x}"][: options.samples] for x in ("de", "en"))
        self.german = Vocabulary(german, options.min_frequency)
        self.english = Vocabulary(english, options.min_frequency)
        self.batch_size, self.device = options.batch_size, options.device
        self.train = self._pairs(german, english)
        self.references = sentences["val.en"]
        self.val = self._pairs(sentences["val.de"], self.references)

    def _pairs(
        self, german: list[list[str]], english: list[list[str]]
    ) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(german, english, strict=True)
        return [(self.german.encode(g), self.english.encode(e)) for g, e in pairs]

    def batch(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return German and English, each (sentences, longest of them)."""
        german, english = zip(*pairs, strict=True)
        return tuple(
            pad_sequence(list(side), batch_first=True, padding_value=PAD).to(self.device)
            for side in (german, english)
        )

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one epoch: random batches of sentences of similar length."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        pool = 20 * self.batch_size
        groups = []
        for start in range(0, len(order), pool):
            chosen = sorted(order[start : start + pool], key=lambda i: len(self.train[i][0]))
            groups += [
                chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)
            ]
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield self.batch([self.train[i] for i in groups[index]])

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches."""
        pool = 20 * self.batch_size
        whole, rest = divmod(len(self.train), pool)
        return 20 * whole + math.ceil(rest / self.batch_size)


# The network.


class Translator(nn.Module):
    """An encoder-decoder transformer, LayerNorm before each part, with sinusoidal positions."""

    def __init__(
        self, german: int, english: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.german = nn.Embedding(german, width, padding_idx=PAD)
        self.english = nn.Embedding(english, width, padding_idx=PAD)
        sizes = (width, heads, 4 * width, dropout)
        encoder_layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        decoder_layer = nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(
            encoder_layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder_layer, depth, nn.LayerNorm(width))
        self.output = nn.Linear(width, english)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.german, self.english):
            nn.init.normal_(embedding.weight, std=width**-0.5)
            with torch.no_grad():
                embedding.weight[PAD].zero_()
        angles = torch.arange(LONGEST + 2)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        positions = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, table: nn.Embedding, words: Tensor) -> Tensor:
        """Return the embedded words with their positions."""
        scale = math.sqrt(table.embedding_dim)
        return self.dropout(scale * table(words) + self.positions[: words.shape[1]])

    def forward(self, german: Tensor, english: Tensor) -> Tensor:
        """Return the logits of the next English word behind every word of ``english``."""
        return self.output(self.decode(*self.encode(german), english))

    def encode(self, german: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoded sentences and where they are padding."""
        padding = german == PAD
        embedded = self.embed(self.german, german)
        return self.encoder(embedded, src_key_padding_mask=padding), padding

    def decode(self, memory: Tensor, padding: Tensor, english: Tensor) -> Tensor:
        """Return the decoder's activations."""
        length = english.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=english.device).triu(1)
        return self.decoder(
            self.embed(self.english, english),
            memory,
            tgt_mask=future,
            memory_key_padding_mask=padding,
        )

    @torch.no_grad()
    def translate(self, german: Tensor) -> list[list[int]]:
        """Return the numbers of greedy translations."""
        memory, padding = self.encode(german)
        english = torch.full((len(german), 1), BEGIN, device=german.device)
        for _ in range(LONGEST):
            logits = self.output(self.decode(memory, padding, english)[:, -1])
            english = torch.cat((english, logits.argmax(1, keepdim=True)), dim=1)
            if (english == END).any(1).all():
                break
        return english[:, 1:].tolist()


# Training.


class Run:
    """One network, its optimizer, and what was measured on the way."""

    def __init__(self, name: str, corpus: Corpus, options: argparse.Namespace) -> None:
        self.name, self.corpus, self.seed = name, corpus, options.seed
        torch.manual_seed(self.seed)
        self.model = Translator(
            len(corpus.german),
            len(corpus.english),
            options.width,
            options.depth,
            heads=4,
            dropout=0.1,
        ).to(options.device)
        self.lr = RATES[name] if options.lr is None else options.lr
        self.criterion = nn.CrossEntropyLoss(
            ignore_index=PAD, label_smoothing=options.label_smoothing
        )
        self.optimizer = make_optimizer(
            name, self.model, self.criterion, self.lr, options.max_factor_size
        )
        total = corpus.steps_per_epoch * options.epochs
        warmup = max(1, total // 20)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(  # Linear rise, then a cosine.
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / total)) / 2,
        )
        self.losses: list[float] = []  # One per step ...
        self.seconds: list[float] = []  # ... and the clock after it.
        self.validation: list[dict[str, float]] = []  # One per epoch.
        self.translations: list[list[str]] = []
        self.bleu = 0.0

    def train_epoch(self, progress: Progress, task: TaskID) -> None:
        """Train for one epoch and measure the validation loss."""
        epoch_seed = 10_000 * self.seed + len(self.validation)
        torch.manual_seed(epoch_seed)  # The same dropout for all optimizers.
        clock = self.seconds[-1] if self.seconds else 0.0
        self.model.train()
        for german, english in self.corpus.batches(epoch_seed):
            start = time.perf_counter()
            self.optimizer.zero_grad()
            logits = self.model(german, english[:, :-1])
            loss = self.criterion(logits.flatten(0, 1), english[:, 1:].flatten())
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
            clock += time.perf_counter() - start
            self.seconds.append(clock)
            progress.update(task, advance=1, loss=f"{recent(self.losses):.3f}")
        entry = {"step": len(self.losses), "seconds": clock, "loss": self.validate()}
        self.validation.append(entry)
        progress.update(task, validation=f"{entry['loss']:.3f}")

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean cross-entropy per English word, without label smoothing."""
        self.model.eval()
        criterion = nn.CrossEntropyLoss(ignore_index=PAD, reduction="sum")
        total, words = 0.0, 0
        for start in range(0, len(self.corpus.val), 128):
            german, english = self.corpus.batch(self.corpus.val[start : start + 128])
            targets = english[:, 1:].flatten()
            total += criterion(self.model(german, english[:, :-1]).flatten(0, 1), targets).item()
            words += int((targets != PAD).sum())
        return total / words

    def translate(self) -> None:
        """Translate the validation set and compute BLEU."""
        self.model.eval()
        for start in range(0, len(self.corpus.val), 128):
            german, _ = self.corpus.batch(self.corpus.val[start : start + 128])
            numbers = self.model.translate(german)
            self.translations += [self.corpus.english.decode(sentence) for sentence in numbers]
        self.bleu = bleu(self.translations, self.corpus.references)


def recent(losses: list[float], count: int = 20) -> float:
    """Return the mean of the last losses."""
    return sum(losses[-count:]) / len(losses[-count:])


def bleu(candidates: list[list[str]], references: list[list[str]]) -> float:
    """Return corpus BLEU in percent, of lower-case words, with up to four words in a row."""
    logarithms = 0.0
    for size in range(1, 5):
        right = total = 0
        for candidate, reference in zip(candidates, references, strict=True):
            found, wanted = (
                Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
                for words in (candidate, reference)
            )
            right += (found & wanted).total()
            total += found.total()
        if right == 0:
            return 0.0
        logarithms += math.log(right / total) / 4
    ratio = sum(map(len, references)) / sum(map(len, candidates))
    return 100 * math.exp(logarithms + min(0.0, 1 - ratio))


# What is shown.


def draw(file: Path, runs: list[Run], title: str) -> None:
    """Draw training and validation loss against steps and seconds."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row")
    for run in runs:
        means = [recent(run.losses[max(0, i - 19) : i + 1]) for i in range(len(run.losses))]
        style: dict[str, Any] = {"label": f"{run.name}, lr {run.lr:g}: BLEU {run.bleu:.1f}"}
        axes[0, 0].plot(range(1, len(means) + 1), means, **style)
        axes[0, 1].plot(run.seconds, means, **style)
        losses = [entry["loss"] for entry in run.validation]
        for axis, unit in zip(axes[1], ("step", "seconds"), strict=True):
            axis.plot([entry[unit] for entry in run.validation], losses, marker="o", **style)
    axes[0, 0].set_ylabel("training loss, mean of 20 steps")
    axes[1, 0].set_ylabel("validation loss")
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
        "BLEU",
    ):
        table.add_column(column)
    for run in runs:
        table.add_row(
            run.name,
            f"{run.lr:g}",
            f"{len(run.losses)}",
            f"{run.seconds[-1]:.0f}",
            f"{1000 * run.seconds[-1] / len(run.losses):.0f}",
            f"{recent(run.losses):.3f}",
            f"{run.validation[-1]['loss']:.3f}",
            f"{run.bleu:.1f}",
        )
    return table


def show_translations(console: Console, runs: list[Run], count: int = 4) -> None:
    """Print the first validation sentences beside their translations."""
    corpus = runs[0].corpus
    for index in range(min(count, len(corpus.val))):
        german = corpus.german.decode(corpus.val[index][0][1:].tolist())
        console.print(f"\n{'German':<9} {' '.join(german)}", markup=False, highlight=False)
        for run in runs:
            words = " ".join(run.translations[index])
            console.print(f"{run.name:<9} {words}", markup=False, highlight=False)
        words = " ".join(corpus.references[index])
        console.print(f"{'reference':<9} {words}", markup=False, highlight=False)


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
    parser.add_argument(
        "--fast", action="store_true", help="width 128, 2 layers, 5,000 pairs, 3 epochs"
    )
    parser.add_argument("--epochs", type=int, help="default: 20, or 3 with --fast")
    parser.add_argument("--batch-size", type=int, help="sentences; default: 128, or 64 with --fast")
    parser.add_argument("--width", type=int, help="a multiple of 8; default: 256, or 128")
    parser.add_argument("--depth", type=int, help="layers of each side; default: 3, or 2")
    parser.add_argument("--samples", type=int, help="training pairs; default: all, or 5,000")
    parser.add_argument("--min-frequency", type=int, default=2, help="of words with a number")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument(
        "--max-factor-size", type=int, default=1100, help="larger factors stay diagonal"
    )
    parser.add_argument("--lr", type=float, help="learning rate, instead of each optimizer's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/examples"))
    options = parser.parse_args()
    if "all" in options.optimizer:
        options.optimizer = list(RATES)
    keys = ("epochs", "batch_size", "width", "depth", "samples")
    defaults = (3, 64, 128, 2, 5000) if options.fast else (20, 128, 256, 3, None)
    for key, value in zip(keys, defaults, strict=True):
        if getattr(options, key) is None:
            setattr(options, key, value)
        elif getattr(options, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1")
    if options.width % 8:
        parser.error("--width must be a multiple of 8: four heads, sines and cosines")
    return options


def main() -> None:
    options = parse()
    console = Console()
    corpus = Corpus(options)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [Run(name, corpus, options) for name in dict.fromkeys(options.optimizer)]
    count = sum(p.numel() for p in runs[0].model.parameters())
    title = (
        f"Transformer of width {options.width} ({count:,} parameters), "
        f"{len(corpus.train):,} pairs of Multi30K, batch {options.batch_size}"
    )
    for run in runs:
        if isinstance(run.optimizer, natgrad.NaturalGradient):
            print(f"{run.name}\n{run.optimizer.summary()}\n")
    console.print(f"{title}; {len(corpus.german):,} German, {len(corpus.english):,} English words")
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("training loss {task.fields[loss]}, validation {task.fields[validation]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = corpus.steps_per_epoch * options.epochs
        tasks = [progress.add_task(run.name, total=total, loss="–", validation="–") for run in runs]
        for _ in range(options.epochs):
            for run, task in zip(runs, tasks, strict=True):
                run.train_epoch(progress, task)
        for run in runs:
            run.translate()
    show_translations(console, runs)
    console.print(tabulate(runs))
    plot = options.output / "multi30k-translation.png"
    draw(plot, runs, title)
    console.print(f"Curves: {plot}")


if __name__ == "__main__":
    main()
