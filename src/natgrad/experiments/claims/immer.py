"""Immer, Korzepa & Bauer (2021): predictions by the linearised model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import natgrad
from natgrad.experiments.claims.claim import Setting, Source
from natgrad.experiments.claims.side_by_side import Task, at_rate, mlp
from natgrad.experiments.data import Dataset

SOURCE = Source(
    "immer-korzepa-bauer",
    "Immer, Korzepa & Bauer, Improving predictions of Bayesian neural nets via local linearization "
    "(2021)",
)

DRAWS = 5
#: Training images, and test images at most.
SAMPLES = 200
EPOCHS = 100
WEIGHT_SAMPLES = 50
STRUCTURES = {"full": "full", "kfac": "K-FAC", "diagonal": "diagonal"}
TUNED = {"kfac": "K-FAC", "diagonal": "diagonal"}
#: Prior precisions δ of which the held-out likelihood chooses, for every way to predict.
PRECISIONS = (0.1, 1.0, 10.0, 100.0)


def _data(setting: Setting) -> Dataset:
    count = setting.of(SAMPLES, 5 * SAMPLES)
    return setting.dataset(count, test_samples=count)


def _trained(data: Dataset, precision: float, seed: int) -> nn.Module:
    """Return a network at the maximum a posteriori, near enough, by Adam with full batches."""
    task = Task.of(data, 50)
    samples, inputs = task.x.shape
    model = mlp((inputs, 32, data.classes), seed, dtype=torch.float64)
    adam = partial(at_rate(torch.optim.Adam, weight_decay=precision / samples), rate=3e-3)
    return task.train(model, adam, EPOCHS * samples // 50, seed=seed).model.eval()


def sampled_predictive(posterior: natgrad.Laplace, x: Tensor, samples: int, seed: int) -> Tensor:
    """Return the network's mean probabilities ``(N, C)`` at weights drawn from its posterior."""
    draws = posterior.sample(samples, torch.Generator().manual_seed(seed))
    values = map(posterior.matrix.layout.to_dict, draws)
    with torch.no_grad():
        outputs = [functional_call(posterior.model, one, (x,)) for one in values]
    return torch.stack(outputs).softmax(-1).mean(0)


def _nll(probabilities: Tensor, labels: Tensor) -> float:
    return float(functional.nll_loss(probabilities.clamp(min=1e-30).log(), labels))


@SOURCE.claim("linearised", "abstract")
def linearised(setting: Setting) -> Iterator[dict[str, float]]:
    """Negative log-likelihoods (NLL) of 200 training and 200 test images.

    A network with 32 hidden tanh units, at δ = 1 and its maximum a posteriori; 50 samples of
    weights, and the probit approximation of the linearised model.

    Says: The posterior of the generalised Gauss-Newton matrix is one of the linearised model:
    predictions by that are better than those of the network at sampled weights, which underfit.
    Rule:
        test NLL, sampled weights − linearised ≥ 0 (better)
        training NLL, sampled weights − linearised ≥ 0 (underfits)
    """
    data = _data(setting)
    sets = {
        "training": (data.train_inputs.flatten(1).double(), data.train_labels),
        "test": (data.test_inputs.flatten(1).double(), data.test_labels),
    }
    for draw in setting.each(range(DRAWS)):
        model = _trained(data, 1.0, setting.seed_of(draw))
        for structure, title in STRUCTURES.items():
            posterior = natgrad.Laplace(model, sets["training"], "categorical", structure)
            for name, (x, labels) in sets.items():
                linear = _nll(_probabilities(posterior, x), labels)
                sampled = _nll(sampled_predictive(posterior, x, WEIGHT_SAMPLES, draw), labels)
                yield {f"{name} NLL, sampled weights − linearised, {title}": sampled - linear}


def _probabilities(posterior: natgrad.Laplace, x: Tensor) -> Tensor:
    found = posterior.predict(x)
    assert isinstance(found, Tensor)
    return found


@SOURCE.claim("tuned", "experiments")
def tuned(setting: Setting) -> Iterator[dict[str, float]]:
    """Test NLL with δ of 0.1, 1, 10 and 100 chosen on half of 200 test images.

    The network is trained anew for every δ; the other half is judged.

    Says: With the prior precision of each chosen on held-out data, predictions of the linearised
    model are at least as good as those of the network at its maximum a posteriori, and better than
    those at sampled weights.
    Rule:
        test NLL, linearised − maximum a posteriori ≤ 0 (as good)
        test NLL, sampled weights − linearised ≥ 0 (better)
    Remark: With one prior precision for training and posterior, predictions of the linearised model
    are behind those at the maximum a posteriori by half a nat here.
    """
    data = _data(setting)
    train = data.train_inputs.flatten(1).double(), data.train_labels
    x, labels = data.test_inputs.flatten(1).double(), data.test_labels
    half = len(x) // 2
    for draw in setting.each(range(DRAWS)):
        found: dict[str, list[tuple[float, float]]] = {}
        for precision in PRECISIONS:
            model = _trained(data, precision, setting.seed_of(draw))
            with torch.no_grad():
                predictions = {"maximum a posteriori": model(x).softmax(1)}
            for structure, title in TUNED.items():
                posterior = natgrad.Laplace(
                    model, train, "categorical", structure, prior_precision=precision
                )
                predictions[f"linearised, {title}"] = _probabilities(posterior, x)
                predictions[f"sampled weights, {title}"] = sampled_predictive(
                    posterior, x, WEIGHT_SAMPLES, draw
                )
            for name, one in predictions.items():
                pair = _nll(one[:half], labels[:half]), _nll(one[half:], labels[half:])
                found.setdefault(name, []).append(pair)
        best = {name: min(pairs)[1] for name, pairs in found.items()}
        mode = best["maximum a posteriori"]
        for title in TUNED.values():
            linear, sampled = best[f"linearised, {title}"], best[f"sampled weights, {title}"]
            yield {
                f"test NLL, linearised − maximum a posteriori, {title}": linear - mode,
                f"test NLL, sampled weights − linearised, {title}": sampled - linear,
            }
        yield {"test NLL, maximum a posteriori": mode}
