"""The plain training loop that every framework is compared with, and models to train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature.singd import InverseFactorStatistics
from tests.methods import OF_PLAIN_LENGTH, make_optimizer, measures

#: Curvature is averaged over steps.
AVERAGING: dict[str, Any] = {
    "kfac": natgrad.KFAC,
    "ekfac": natgrad.EKFAC,
    "diagonal": natgrad.DiagonalNGD,
    "singd": natgrad.SINGD,
}
#: Curvature is that of the rows of the present batch.
ROWS: dict[str, Any] = {
    "exact": natgrad.ExactNGD,
    "block_diagonal": natgrad.BlockDiagonalNGD,
    "improved": natgrad.ImprovedEmpiricalNGD,
    "conjugate_gradient": natgrad.ConjugateGradientNGD,
    "thermodynamic": functools.partial(natgrad.ThermodynamicNGD, delay=5.0, temperature=1e-10),
}
#: Curvature is that of some steps at the beginning, the third one without.
FIRST_STEPS: dict[str, Any] = {"fngd": functools.partial(natgrad.FNGD, coefficient_steps=2)}
#: All that train in any loop that calls ``backward`` and ``step``.
OPTIMIZERS: dict[str, Any] = AVERAGING | ROWS | FIRST_STEPS
#: One of each kind of loop, as base classes do the same for all that share them. EGN and Padam have
#: steps of their own: the one's closure does not call ``backward``, the other knows no model.
REPRESENTATIVES: list[str] = ["kfac", "exact", "fngd", "egn", "padam"]


def make(name: str, model: nn.Module, likelihood: Any = "categorical", **options: Any) -> Any:
    """Make an optimizer; averaging ones update and factorise at different steps.

    Those that measure the length of their steps do so unless a test is about plain ones.
    """
    if name == "padam":
        return natgrad.Padam(model.parameters(), lr=4 * options.get("lr", 0.1))
    if name == "egn":
        return make_optimizer(natgrad.EGN, model, likelihood, **({"momentum": 0.9} | options))
    measured = measures(OPTIMIZERS[name]) and not OF_PLAIN_LENGTH & set(options)
    defaults: dict[str, Any] = {} if measured else {"lr": 0.1, "momentum": 0.9}
    if name in AVERAGING:
        defaults |= {"factors": 2, "inverses": 3}
    return make_optimizer(OPTIMIZERS[name], model, likelihood, **(defaults | options))


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a small convolutional classifier of 1 x 6 x 6 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def perceptron(seed: int = 0) -> nn.Sequential:
    """Return a classifier of the same images with two linear layers."""
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def images(samples: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Return images and labels a linear rule gives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 6, 6, generator=generator, dtype=torch.float64)
    rule = torch.randn(36, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x.to(dtype), (x.flatten(1) @ rule).argmax(1)


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float64):
    """Return ``count`` different batches."""
    return [images(size, seed, dtype) for seed in range(count)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    scheduler: Any = None,
) -> list[float]:
    """Run the loop that the README shows; return the losses."""
    losses = []
    if isinstance(optimizer, natgrad.EGN):
        return [optimizer.step(lambda b=batch: loss(model, b)) for batch in data]
    optimizer.zero_grad()
    for index, batch in enumerate(data, 1):
        value = loss(model, batch)
        (value / accumulate).backward()
        losses.append(float(value.detach()))
        if index % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses


def assert_curvature_everywhere(optimizer: Any, unused: tuple[str, ...] = ()) -> None:
    """Every block the model uses has factors that are not zero and an inverse that is finite."""
    if isinstance(optimizer, natgrad.Padam):
        return
    if isinstance(optimizer, natgrad.FNGD):  # Rows go, coefficients stay.
        coefficients = optimizer.coefficients()
        assert coefficients and all(c.isfinite() for c in coefficients.values())
        return
    curvature = optimizer.preconditioner.curvature
    matrix = curvature.matrix()
    for name, part in matrix.parts.items():
        found = curvature.estimates[name]
        if name in unused:
            assert part.trace() == 0, name
            continue
        assert part.trace() > 0 and found.average.is_finite(), name
        assert found.inverse is not None, name
        assert found.inverse.dtype == part.dtype, name
        if isinstance(found.average, InverseFactorStatistics):
            assert found.average.steps > 0, name
    covered = {n for part in curvature.parts.values() for n in part.layout.names}
    trainable = {n for n, p in optimizer.model.named_parameters() if p.requires_grad}
    assert covered | set(optimizer.preconditioner.capture.uncovered) == trainable
