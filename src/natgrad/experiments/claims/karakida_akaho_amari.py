"""Karakida, Akaho & Amari (2019, 2021): the spectra of Fisher matrices of random wide networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from natgrad import fisher_matrix, ntk
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Task, at_rate
from natgrad.experiments.models import fully_connected
from natgrad.experiments.objectives import squared_error
from natgrad.experiments.theory.results import ByWidth

SOURCE = Source(
    "karakida-akaho-amari",
    "Karakida, Akaho & Amari, Universal statistics of Fisher information in deep neural networks: "
    "mean field approach (2019), and Pathological spectra of the Fisher information metric and its "
    "variants in deep neural networks (2021)",
)

#: Draws of the random weights and inputs.
DRAWS = 5
OUTPUTS = 10
DEPTH = 3
WIDTHS = (128, 256, 512, 1024)
SAMPLES = 100
#: Numbers of samples, and of layers, where these are what changes.
COUNTS = (10, 30, 100, 300, 1000)
DEPTHS = (2, 3, 5, 8)
#: Steps of gradient descent.
STEPS = 100
STATISTICS = ("mean", "second moment", "largest")


def _widths(setting: Setting) -> tuple[int, ...]:
    return setting.of(WIDTHS, (512, 1024, 2048, 4096))


def _samples(setting: Setting) -> int:
    return setting.of(SAMPLES, 1000)


def _seed(setting: Setting, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(setting.seed_of(draw))


def _inputs(width: int, samples: int, generator: torch.Generator) -> Tensor:
    """Return inputs with independent standard normal entries, as many as the network is wide."""
    return torch.randn(samples, width, generator=generator, dtype=torch.float64)


def _network(
    width: int, depth: int, outputs: int, generator: torch.Generator
) -> tuple[nn.Module, ntk.MLP]:
    """Return a random ReLU network of L weight layers, and the one that theory is about.

    The first is in standard parameterisation, with weights of variance 2/fan-in and no biases.
    """
    sizes = [width] * depth + [outputs]

    def layer(d_in: int, d_out: int) -> nn.Module:
        made = nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
        nn.init.normal_(made.weight, std=math.sqrt(2.0 / d_in), generator=generator)
        return made

    return fully_connected(sizes, layer, nn.ReLU), ntk.MLP(sizes, dtype=torch.float64)


def _measured_and_theory(
    width: int, depth: int, samples: int, outputs: int, generator: torch.Generator
) -> dict[str, tuple[float, float]]:
    """Return the three statistics of one random network: measured, and at infinite width."""
    x = _inputs(width, samples, generator)
    model, architecture = _network(width, depth, outputs, generator)
    found, theory = ntk.fisher_spectrum(model, x), ntk.infinite_spectrum(architecture, x)
    return {
        "mean": (found.mean, theory.mean),
        "second moment": (found.second_moment, theory.second_moment),
        "largest": (float(found.eigenvalues[0]), theory.largest),
    }


@SOURCE.claim("width", "2019, statistics of eigenvalues")
def width(setting: Setting) -> Figures:
    """Exponents, and the statistics at the largest width over those of infinite width.

    ReLU networks of three weight layers with ten linear outputs, in standard parameterisation; the
    inputs are random, of the dimension M and as many as the sample size.

    Says: With the width M of a random network, the mean eigenvalue of its Fisher matrix vanishes
    like 1/M, the mean square does not change, and the largest grows like M: flat in most
    directions, very steep in a few.
    Rule:
        exponent of the width, mean -1.1 to -0.9 (theory says −1)
        exponent of the width, second moment -0.15 to 0.15 (theory says 0)
        exponent of the width, largest 0.9 to 1.1 (theory says 1)
        measured / theory 0.9 to 1.1 (O(1/√M) is 0.03 at M = 1024)
    Remark: The largest is the first of ten outliers that theory has at one place; they are spread
    about it, the less the wider the network, so that its exponent is somewhat below 1.
    """
    widths, samples = _widths(setting), _samples(setting)
    found, shares = ({name: ByWidth() for name in STATISTICS} for _ in range(2))
    for one in setting.each(widths):
        for draw in range(DRAWS):
            generator = _seed(setting, draw)
            values = _measured_and_theory(one, DEPTH, samples, OUTPUTS, generator)
            for name, (measured, theory) in values.items():
                found[name].add(one, measured)
                shares[name].add(one, measured / theory)
    return {
        **{f"exponent of the width, {name}": found[name].exponents() for name in STATISTICS},
        **{f"measured / theory, {name}": shares[name][widths[-1]] for name in STATISTICS},
    }


@SOURCE.claim("depth", "2019, statistics of eigenvalues")
def depth(setting: Setting) -> Iterator[dict[str, float]]:
    """The statistics at a width of 512 (2048) over those of infinite width, L = 2 to 8.

    Says: The same formulas hold for every number of layers.
    Rule:
        measured / theory, mean 0.9 to 1.1 (O(1/√M), growing with the depth)
        measured / theory, second moment 0.8 to 1.2 (a square errs twice as much)
        measured / theory, largest 0.8 to 1.2 (as the square root of the second moment)
    Remark: At a width of 512 deep networks differ too much from draw to draw to tell: from five
    layers on, the largest eigenvalue is above the place of the outliers by a quarter and more.
    """
    size, samples = _widths(setting)[-2], _samples(setting)
    for one in setting.each(DEPTHS):
        for draw in range(2 * DRAWS):
            values = _measured_and_theory(size, one, samples, OUTPUTS, _seed(setting, draw))
            yield {f"measured / theory, {n}, L = {one}": a / b for n, (a, b) in values.items()}


@SOURCE.claim("samples", "2019, statistics of eigenvalues")
def samples(setting: Setting) -> Iterator[dict[str, float]]:
    """The largest eigenvalue for 10, 30, 100, 300 and 1000 samples, width 1024 (4096), C = 1.

    Says: The largest eigenvalue does not vanish however many the samples: it tends to ακ₂M.
    Rule:
        measured / theory 0.9 to 1.1 (O(1/√M) is 0.03 at M = 1024)
        largest eigenvalue of all samples, over that of ten ≥ 0.5 ((κ₂ + (κ₁ − κ₂)/N)/(κ₂ + (κ₁ −
            κ₂)/10), with κ₂ about half of κ₁)
    """
    size = _widths(setting)[-1]
    largest: dict[int, list[float]] = {count: [] for count in COUNTS}
    for count, found in setting.each(largest.items()):
        for draw in range(DRAWS):
            values = _measured_and_theory(size, DEPTH, count, 1, _seed(setting, draw))
            measured, theory = values["largest"]
            yield {f"measured / theory, N = {count}": measured / theory}
            found.append(measured)
    for change in ratios(largest[COUNTS[-1]], largest[COUNTS[0]]):
        yield {"largest eigenvalue of all samples, over that of ten": change}


@SOURCE.claim("learning-rate", "2019, abstract and experiments")
def learning_rate(setting: Setting) -> Iterator[dict[str, float]]:
    """The training loss after 100 steps of full batches, relative to the first.

    Targets are the outputs of another random network of width 512 (2048).

    Says: Gradient descent from random weights converges below the learning rate 2/λ_max, which
    theory gives without training, and explodes above it.
    Rule:
        loss below the bound ≤ 1 (it must fall)
        loss above the bound ≥ 1 (in the linear regime the leading residual grows by 1.2 and more a
            step)
    Remark: As in `karakida-osawa.divergence-from-start`, a finite network leaves the steep region
    before the growth ruins it: up to three times the bound, the loss after 100 steps is a fraction
    of the first. Rates below the bound all converge.
    """
    size, samples = _widths(setting)[-2], _samples(setting)
    for draw in setting.each(range(DRAWS)):
        generator = _seed(setting, draw)
        x = _inputs(size, samples, generator)
        model, architecture = _network(size, DEPTH, 1, generator)
        teacher, _ = _network(size, DEPTH, 1, generator)
        bound = ntk.infinite_spectrum(architecture, x).largest_step
        task = Task(x, teacher(x).detach(), squared_error)
        for factor in (0.5, 0.9, 1.1, 1.5, 2.0, 3.0):
            side = "below" if factor < 1 else "above"
            descent = partial(at_rate(torch.optim.SGD), rate=factor * bound)
            losses = task.train(model, descent, STEPS, every=1).losses
            exploded = max(losses) > 1e6 * losses[0]
            last = math.inf if exploded else losses[-1] / losses[0]
            yield {f"loss {side} the bound, at {factor:g} of it": last}


@SOURCE.claim("softmax", "2021, abstract")
def softmax(setting: Setting) -> Iterator[dict[str, float]]:
    """Ratios of leading eigenvalues of the exact Fisher matrices, Gaussian and categorical.

    Width 1024 (4096), three weight layers, ten outputs.

    Says: With linear outputs the C largest eigenvalues are outliers far from the bulk; softmax
    outputs disperse them, so that a tail spreads from the bulk.
    Rule:
        largest over C-th largest, linear outputs ≤ 1.5 (theory says C times the same, up to
            O(1/√M))
        largest over C-th largest, softmax, over linear ≥ 2 (a tail)
        widest gap among the leading 3C, linear outputs, over softmax ≥ 2 (ratio of neighbours:
            outliers are apart from the bulk, a tail is not)
    """
    size, samples = _widths(setting)[-1], _samples(setting)
    for draw in setting.each(range(DRAWS)):
        generator = _seed(setting, draw)
        x = _inputs(size, samples, generator)
        model, _ = _network(size, DEPTH, OUTPUTS, generator)
        linear, classes = (
            fisher_matrix(model, (x, None), likelihood, "full").eigenvalues()[: 3 * OUTPUTS + 1]
            for likelihood in ("gaussian", "categorical")
        )
        spread, dispersed = (float(v[0] / v[OUTPUTS - 1]) for v in (linear, classes))
        wide, narrow = (float((v[:-1] / v[1:]).max()) for v in (linear, classes))
        yield {
            "largest over C-th largest, linear outputs": spread,
            "largest over C-th largest, softmax, over linear": dispersed / spread,
            "widest gap among the leading 3C, linear outputs, over softmax": wide / narrow,
            "widest gap among the leading 3C, linear outputs": wide,
            "widest gap among the leading 3C, softmax": narrow,
        }
