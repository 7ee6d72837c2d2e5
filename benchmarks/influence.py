"""How well influence scores foretell what training on other samples does, and what they cost.

An MLP is trained on 2,000 digits of MNIST, and again on 100 random halves of them, from three seeds
each. The scores of a training sample for a test sample, summed over the samples of a half, foretell
the order of the test sample's losses over the halves; the rank correlation of that, averaged over
test samples, is the linear datamodelling score (Park et al., TRAK, 2023). Beside natgrad's stand
kronfluence, where it is installed, and the product of gradients alone. Times are processor seconds
of one thread, the making of the Fisher matrix included.

    export NATGRAD_DATA=DIR           # holds mnist/
    python benchmarks/influence.py --output results/influence
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset
from natgrad.experiments.drawing import line_style, new_figure

TRAIN, TEST, SUBSETS, SEEDS, EPOCHS, LABEL_SEEDS = 2000, 200, 100, 3, 30, 3


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-3)
    steps = epochs * (len(x) // 50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50)[: len(x) // 50]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.cross_entropy(model(x), y, reduction="none")


def retrained(data: tuple[Tensor, ...], subsets: Tensor, seeds: int, epochs: int) -> Tensor:
    """Return test losses of networks trained on subsets, means over seeds, (subsets, M)."""
    x, y, u, v = data
    rows = []
    for number, subset in enumerate(subsets):
        runs = [
            losses(train(make_model(1000 * number + s), x[subset], y[subset], epochs), u, v)
            for s in range(1, seeds + 1)
        ]
        rows.append(torch.stack(runs).mean(0))
    return torch.stack(rows)


def datamodelling_score(scores: Tensor, subsets: Tensor, measured: Tensor) -> Tensor:
    """Return the rank correlation over subsets of each test sample, (M,)."""
    foretold = torch.stack([scores[:, subset].sum(1) for subset in subsets])  # (subsets, M)
    ranks = [(one.argsort(0).argsort(0)).double() for one in (foretold, -measured)]
    a, b = (one - one.mean(0) for one in ranks)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def by_kronfluence(
    model: nn.Module, data: tuple[Tensor, ...], seed: int, strategy: str, share: float
) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            y = batch[1]
            if sample:
                y = torch.multinomial(logits.detach().softmax(1), 1).flatten()
            return functional.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    x, y, u, v = data
    task = Classification()
    torch.manual_seed(seed)
    damping = mock.patch("kronfluence.factor.config.HEURISTIC_DAMPING_SCALE", share)
    with tempfile.TemporaryDirectory() as folder, damping:
        analyzer = Analyzer(
            "mlp", prepare_model(copy.deepcopy(model), task), task, cpu=True, output_dir=folder,
            disable_tqdm=True,
        )  # fmt: skip
        arguments = FactorArguments(strategy=strategy)
        analyzer.fit_all_factors("f", TensorDataset(x, y), 500, factor_args=arguments)
        analyzer.compute_pairwise_scores(
            "s", "f", TensorDataset(u, v), TensorDataset(x, y), 200, 500,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"]


def by_natgrad(model: nn.Module, data: tuple[Tensor, ...], seed: int, **options: Any) -> Tensor:
    x, y, u, v = data
    loader = DataLoader(TensorDataset(x, y), 500)
    return natgrad.tools.influence(model, loader, (u, v), seed=seed, **options)


def methods() -> dict[str, Callable[..., Tensor]]:
    """Return title → scores of a model, data and a seed of sampled labels.

    Numbers are dampings as shares of the mean eigenvalue of every layer.
    """
    found: dict[str, Callable[..., Tensor]] = {
        "gradients alone": partial(by_natgrad, structure="diagonal", damping=1e9)
    }
    for structure in ("diagonal", "kfac", "ekfac", "full"):
        for fisher in ("mc",) if structure == "full" else ("exact", "mc"):
            for share in (0.1, 1.0, 10.0):
                found[f"natgrad {structure}, {fisher}, {share:g}"] = partial(
                    by_natgrad, structure=structure, fisher=fisher,
                    damping=natgrad.RelativeDamping(share),
                )  # fmt: skip
    try:
        import kronfluence  # noqa: F401
    except ImportError:
        print("kronfluence is not installed and left out")
        return found
    for strategy in ("kfac", "ekfac"):
        for share in (0.1, 1.0, 10.0):
            found[f"kronfluence {strategy}, mc, {share:g}"] = partial(
                by_kronfluence, strategy=strategy, share=share
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/influence"))
    parser.add_argument("--data", default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--subsets", type=int, default=SUBSETS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data or set NATGRAD_DATA: the folder that holds mnist/")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = load_dataset("mnist", arguments.data, train_samples=TRAIN, test_samples=TEST)
    data = found.train_inputs, found.train_labels, found.test_inputs, found.test_labels
    generator = torch.Generator().manual_seed(0)
    subsets = torch.stack(
        [torch.randperm(TRAIN, generator=generator)[: TRAIN // 2] for _ in range(arguments.subsets)]
    )
    kept = arguments.output / f"retrained-{arguments.subsets}-{arguments.seeds}.pt"
    if not kept.exists():
        torch.save(retrained(data, subsets, arguments.seeds, arguments.epochs), kept)
    measured = torch.load(kept)
    model = train(make_model(0), *data[:2], arguments.epochs)
    accuracy = float((model(data[2]).argmax(1) == data[3]).double().mean())
    results: dict[str, Any] = {"accuracy": accuracy, "methods": {}}
    all_scores: dict[str, Tensor] = {}
    for title, scores in methods().items():
        found_scores, seconds = [], []
        for seed in range(LABEL_SEEDS if ", mc," in title else 1):
            start = time.process_time()
            all_scores[title] = scores(model, data, seed)
            seconds.append(time.process_time() - start)
            one = datamodelling_score(all_scores[title], subsets, measured)
            found_scores.append(float(one.mean()))
        results["methods"][title] = {"scores": found_scores, "seconds": min(seconds)}
        shown = " ".join(f"{value:.3f}" for value in found_scores)
        print(f"{title:32s} {shown:18s} {min(seconds):.1f} s", flush=True)
    stacked = torch.stack([s.detach().double().flatten() for s in all_scores.values()])
    results["correlations"] = dict(zip(all_scores, stacked.corrcoef().tolist(), strict=True))
    (arguments.output / "influence.json").write_text(json.dumps(results, indent=1))
    draw(results).savefig(arguments.output / "influence.png", dpi=150, bbox_inches="tight")


def draw(results: dict[str, Any]) -> Any:
    """Draw the score against damping."""
    figure, (axes,) = new_figure()
    curves: dict[str, dict[float, list[float]]] = {}
    for title, one in results["methods"].items():
        name, _, share = title.rpartition(", ")
        if name:
            curves.setdefault(name, {})[float(share)] = one["scores"]
    for index, (name, points) in enumerate(curves.items()):
        means = [sum(values) / len(values) for values in points.values()]
        axes.plot(list(points), means, label=name, **line_style(index))
    axes.axhline(results["methods"]["gradients alone"]["scores"][0], color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("damping, as a share of the mean eigenvalue of each layer")
    axes.set_ylabel("linear datamodelling score")
    axes.legend(fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    main()
