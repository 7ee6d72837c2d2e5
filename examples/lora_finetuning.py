r"""Fine-tuning a language model through low-rank adapters, by K-FAC and by AdamW.

    python examples/lora_finetuning.py --fast
    python examples/lora_finetuning.py --data ~/data --optimizer kfac --steps 400
    python examples/lora_finetuning.py --model ~/models/llama

It needs ``pip install transformers peft``. Nothing is downloaded: the script first trains a small
Llama on bytes itself (a minute; kept in the output directory for the next run), on the text of
``--data`` (tiny Shakespeare's ``input.txt``, or any folder of .txt files; the environment variable
NATGRAD_DATA says the same) or on an artificial language. Then it freezes the model, adds LoRA
adapters by peft, and fine-tunes them on another style of the same text: all in capitals. With
``--model`` a local folder of pretrained weights is taken as it is, with its own tokenizer.

To natgrad the adapters are ordinary linear layers: frozen weights have no curvature, so K-FAC costs
two small Kronecker factors per adapter matrix. The loop is the same for both optimizers;
``--search`` tries as many learning rates for one as for the other.

It writes ``lora.png`` and ``lora.json`` to the output directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import peft
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import natgrad

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

OPTIMIZERS = {"adamw": "AdamW", "kfac": "K-FAC"}
STYLES = {"adamw": ("#7f7f7f", "--"), "kfac": ("#1f77b4", "-")}
LEARNING_RATES = {"adamw": 1e-2, "kfac": 1.5}
"""Defaults without ``--search``."""
SEARCH = {"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "kfac": (0.5, 1.0, 1.5, 3.0)}


def artificial_text(characters: int = 400_000) -> str:
    """Return sentences of a small grammar over invented words."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = {
        kind: ["".join(draw.choices(syllables, k=draw.randint(1, 3))) + ending for _ in range(60)]
        for kind, ending in (("noun", "n"), ("verb", "t"), ("adjective", "s"))
    }
    kinds = ("adjective", "noun", "verb", "adjective", "noun")
    sentences, total = [], 0
    while total < characters:
        first = 0 if draw.random() < 0.5 else 1
        chosen = [draw.choice(words[kind][: draw.randint(1, 60)]) for kind in kinds[first:]]
        sentences.append(" ".join(chosen).capitalize() + ".\n")
        total += len(sentences[-1])
    return "".join(sentences)


def read_text(folder: Path | None) -> str:
    """Return all .txt files of a folder (searched to any depth), or the artificial language."""
    if folder is None:
        return artificial_text()
    nested = folder / "tinyshakespeare"
    files = sorted((nested if nested.is_dir() else folder).rglob("*.txt"))
    if not files:
        raise SystemExit(f"no .txt files in {folder}")
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


class Bytes:
    """The tokenizer of the model trained here: one token per byte."""

    size = 256

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(text.encode())


@dataclass(frozen=True)
class Texts:
    """Tokens to pretrain on, to fine-tune on, and to test the fine-tuned model on."""

    before: Tensor
    train: Tensor
    test: Tensor

    @classmethod
    def split(cls, text: str, tokenizer: Bytes | transformers.PreTrainedTokenizerBase) -> Texts:
        """Take 80 % as it is, and the rest in capitals."""
        cut, end = int(0.8 * len(text)), int(0.95 * len(text))
        parts = text[:cut], text[cut:end].upper(), text[end:].upper()
        return cls(*(torch.tensor(tokenizer.encode(part)) for part in parts))


def batches(tokens: Tensor, size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yield random pieces of the text for ever, ``(size, length)``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per token."""
    return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def test_loss(model: nn.Module, tokens: Tensor, length: int) -> float:
    """Return the mean loss over pieces at even distances in the text."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - length - 1, 64).long().unsqueeze(1)
    loss = float(loss_of(model, tokens[starts + torch.arange(length)]))
    model.train()
    return loss


def pretrained(
    options: argparse.Namespace, tokens: Tensor, progress: Progress
) -> transformers.PreTrainedModel:
    """Return the model trained here, from the output directory if it is there."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=Bytes.size, max_position_embeddings=options.length, hidden_size=options.width,
        intermediate_size=2 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    settings = [options.length, options.width, options.layers, options.pretraining_steps]
    content = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()[:12]
    path = options.output / f"pretrained-{key}"
    if path.is_dir():
        return transformers.LlamaForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = options.pretraining_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    bar = progress.add_task("pretraining", total=steps, measured="")
    for _, batch in zip(range(steps), batches(tokens, 16, options.length, 0), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(bar, advance=1, measured=f"loss {float(loss.detach()):.3f}")
    model.save_pretrained(path)
    return model


@dataclass
class Run:
    """What an optimizer did."""

    name: str
    lr: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)


def adapted(base: transformers.PreTrainedModel, options: argparse.Namespace) -> nn.Module:
    """Return a copy of the model with fresh adapters on all its linear layers but the last."""
    copy = type(base)(base.config)
    copy.load_state_dict(base.state_dict())
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(copy, config)


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer; K-FAC takes the model, AdamW its trainable parameters."""
    if name == "kfac":
        return natgrad.KFAC(model, lr=lr)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr, weight_decay=0.0)


def finetune(
    name: str,
    lr: float,
    base: transformers.PreTrainedModel,
    texts: Texts,
    options: argparse.Namespace,
    progress: Progress,
) -> tuple[Run, torch.optim.Optimizer]:
    """Train fresh adapters; measuring is not counted in the seconds."""
    model, run, steps = adapted(base, options), Run(name, lr), options.steps
    optimizer = make_optimizer(name, model, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = progress.add_task(f"{OPTIMIZERS[name]} lr {lr:g}", total=steps, measured="")
    clock = time.process_time if options.cpu_time else time.perf_counter
    elapsed = 0.0
    stream = batches(texts.train, options.batch, options.length, options.seed)
    for step, batch in zip(range(steps + 1), stream, strict=False):
        if step % max(1, steps // 40) == 0 or step == steps:
            run.steps.append(step)
            run.seconds.append(elapsed)
            run.test.append(test_loss(model, texts.test, options.length))
        if step == steps:
            break
        begin = clock()
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        elapsed += clock() - begin
        run.train.append(float(loss.detach()))
        progress.update(bar, advance=1, measured=f"test loss {run.test[-1]:.3f}")
    progress.stop_task(bar)
    return run, optimizer


def draw(runs: list[Run], searched: list[Run], path: Path) -> None:
    """Draw test losses against steps and seconds, and those of the learning rates tried."""
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    panels = 3 if searched else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(4.1 * panels, 3.6), layout="constrained")
    for run in runs:
        colour, line = STYLES[run.name]
        label = f"{OPTIMIZERS[run.name]}, lr {run.lr:g}"
        for panel, x in ((axes[0], run.steps), (axes[1], run.seconds)):
            panel.plot(x, run.test, line, color=colour, linewidth=1.9, label=label)
    axes[0].set(xlabel="steps", ylabel="test loss (nats per token)")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    for name in OPTIMIZERS if searched else ():
        tried = [run for run in searched if run.name == name and math.isfinite(run.test[-1])]
        colour, line = STYLES[name]
        axes[2].plot(
            [run.lr for run in tried], [run.test[-1] for run in tried], line, color=colour,
            marker="o", markerfacecolor="white",
        )  # fmt: skip
        axes[2].set(xlabel="learning rate", ylabel="final test loss", xscale="log")
    for panel in axes:
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(console: Console, runs: list[Run]) -> None:
    """Print the table of what was reached."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    for heading in ("lr", "steps", "seconds", "ms/step", "loss before", "test loss"):
        table.add_column(heading, justify="right")
    for run in runs:
        steps, seconds = run.steps[-1], run.seconds[-1]
        table.add_row(
            OPTIMIZERS[run.name], f"{run.lr:g}", str(steps), f"{seconds:.1f}",
            f"{1000 * seconds / max(1, steps):.0f}", f"{run.test[0]:.3f}", f"{run.test[-1]:.3f}",
        )  # fmt: skip
    console.print(table)
    adamw, kfac = (next((r for r in runs if r.name == name), None) for name in OPTIMIZERS)
    if adamw and kfac:
        index = next((i for i, loss in enumerate(kfac.test) if loss <= adamw.test[-1]), None)
        if index is not None:
            console.print(
                f"K-FAC is at AdamW's last test loss after {kfac.steps[index]} of "
                f"{adamw.steps[-1]} steps ({kfac.seconds[index]:.1f} of "
                f"{adamw.seconds[-1]:.1f} seconds)."
            )
        else:
            console.print("K-FAC does not reach AdamW's last test loss.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = os.environ.get("NATGRAD_DATA")
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "all"], default="all")
    parser.add_argument("--steps", type=int, default=None, help="300, fast 60")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of the processor: for busy machines"
    )
    parser.add_argument("--fast", action="store_true", help="smaller model, fewer steps")
    parser.add_argument("--data", type=Path, default=Path(known) if known else None)
    parser.add_argument("--model", type=Path, default=None, help="local folder of a causal LM")
    parser.add_argument("--search", action="store_true", help="try four learning rates each")
    parser.add_argument("--adamw-lr", type=float, default=LEARNING_RATES["adamw"])
    parser.add_argument("--kfac-lr", type=float, default=LEARNING_RATES["kfac"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=None, help="tokens: 64, fast 32")
    parser.add_argument("--width", type=int, default=None, help="of the model: 128, fast 32")
    parser.add_argument("--layers", type=int, default=None, help="of the model: 4, fast 1")
    parser.add_argument("--pretraining-steps", type=int, default=None, help="1500, fast 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/lora_finetuning"))
    options = parser.parse_args(arguments)
    for name, full, fast in (
        ("steps", 300, 60), ("length", 64, 32), ("width", 128, 32), ("layers", 4, 1),
        ("pretraining_steps", 1500, 200),
    ):  # fmt: skip
        if getattr(options, name) is None:
            setattr(options, name, fast if options.fast else full)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    names = list(OPTIMIZERS) if options.optimizer == "all" else [options.optimizer]
    text = read_text(options.data)
    runs, searched, kept = [], [], None
    with Progress(
        TextColumn("{task.description:<18}"), BarColumn(bar_width=24),
        TextColumn("{task.fields[measured]}"), TimeElapsedColumn(), console=console,
    ) as progress:  # fmt: skip
        if options.model is None:
            texts = Texts.split(text, Bytes())
            base = pretrained(options, texts.before, progress)
        else:
            load = {"local_files_only": True}
            tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **load)
            base = transformers.AutoModelForCausalLM.from_pretrained(options.model, **load)
            texts = Texts.split(text, tokenizer)
        for name in names:
            lr = {"adamw": options.adamw_lr, "kfac": options.kfac_lr}[name]
            rates = SEARCH[name] if options.search else (lr,)
            tried = []
            for rate in rates:
                run, optimizer = finetune(name, rate, base, texts, options, progress)
                tried.append(run)
                if isinstance(optimizer, natgrad.KFAC):
                    kept = optimizer
            finite = [run for run in tried if math.isfinite(run.test[-1])]
            runs.append(min(finite or tried, key=lambda run: run.test[-1]))
            searched += tried if options.search else []
    if kept is not None:
        print(kept.summary(samples=options.batch))
    draw(runs, searched, options.output / "lora.png")
    results = {"runs": [asdict(run) for run in runs], "search": [asdict(run) for run in searched]}
    (options.output / "lora.json").write_text(json.dumps(results, indent=1))
    report(console, runs)
    console.print(f"Plot: {options.output / 'lora.png'}")


if __name__ == "__main__":
    main()
