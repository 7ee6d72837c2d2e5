"""What natgrad would do with a user's model, layer by layer, and its Fisher matrix on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import call_model, count_samples, takes
from natgrad.capture.model_output import losses, require_output
from natgrad.experiments.batches import LoaderBatches
from natgrad.experiments.factories import described, evaluating
from natgrad.experiments.objectives import find_loss
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import LayerJacobian, SumJacobian
from natgrad.layouts import ParameterLayout
from natgrad.likelihoods import Likelihood, as_likelihood
from natgrad.operators import Operator
from natgrad.optim import Preconditioner
from natgrad.optim.summary import Summary, summarize
from natgrad.tools.spectrum import (
    SpectralDensity,
    effective_dimension,
    spectral_density,
    top_eigenpairs,
)


class InspectionError(ValueError):
    """A model that cannot be inspected; the message says why."""


def shared_positions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Run a model once, in evaluation mode, and count the positions sharing each block's weights.

    Block name → T: pixels of a convolution, tokens of a sequence, 1 for a plain layer.
    """
    try:
        with evaluating(model), Capture(model) as capture:
            output = require_output(call_model(model, _arguments(model, inputs)), None)
            jacobians = capture.pull_back(output, torch.ones_like(output).unsqueeze(0))
    except Exception as error:
        raise InspectionError(f"The model fails on the example: {described(error)}.") from error
    return {name: _positions(jacobian) for name, jacobian in jacobians.items()}


def _arguments(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return an example as the model takes it: a mapping alone mostly holds arguments by name."""
    by_name = len(inputs) == 1 and isinstance(inputs[0], Mapping) and takes(model, (), inputs[0])
    return inputs[0] if by_name else inputs


def likelihood_behind(criterion: Any) -> str | Likelihood:
    """Return the likelihood of the loss that a factory gave; "categorical" where it gave none."""
    if criterion is None:
        return "categorical"
    loss = find_loss(criterion) if isinstance(criterion, str) else criterion
    try:
        return as_likelihood(loss)
    except (TypeError, ValueError) as error:
        raise InspectionError(
            f"The likelihood behind the factory's loss cannot be told: give --likelihood "
            f"({described(error)})."
        ) from error


def inspect_model(
    model: nn.Module,
    structure: str,
    likelihood: str | Likelihood,
    fisher: str,
    samples: int,
    positions: Mapping[str, int] | None = None,
) -> Summary:
    """Return, layer by layer, what a structure would precondition, and at what cost.

    Costs are for a batch of so many samples, and blocks whose positions are not given count as one.
    """
    try:
        preconditioner = Preconditioner(model, likelihood, structure=structure, fisher=fisher)
    except (ValueError, TypeError) as error:
        raise InspectionError(f"{described(error)}.") from error
    return summarize(preconditioner, samples, positions)


def summary_values(summary: Summary, positions: Mapping[str, int] | None) -> dict[str, Any]:
    """Return a summary as JSON values; positions are null where they were not counted."""
    values = asdict(summary)
    for layer in values["layers"]:
        layer["positions"] = (positions or {}).get(layer["name"])
    totals = ("parameters", "covered", "memory", "refresh", "step")
    return {**values, **{name: getattr(summary, name) for name in totals}}


def example_of(data: str) -> tuple[Any, ...]:
    """Return the inputs of the first batch of ``package.module:loader``."""
    inputs, _ = next(iter(LoaderBatches(data, torch.device("cpu"), samples=1).measured()))
    return inputs if isinstance(inputs, tuple) else (inputs,)


def example_input(shape: str) -> tuple[Tensor, ...]:
    """Return a batch of two random inputs of a shape such as ``3,32,32``."""
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InspectionError(f"An input shape is given as sizes, such as 3,32,32, not {shape!r}.")
    return (torch.randn(2, *sizes),)


def _positions(jacobian: LayerJacobian) -> int:
    if isinstance(jacobian, SumJacobian):
        return sum(_positions(part) for part in jacobian.parts)
    return getattr(jacobian, "positions", 1)


#: Up to so many parameters all eigenvalues are found, and none estimated.
FEW_ENOUGH = 1000

#: λ for which the effective dimension is given, in the units of F.
DAMPINGS = tuple(10.0**exponent for exponent in range(0, -7, -1))


@dataclass(frozen=True)
class Eigenpair:
    """One of the largest eigenvalues, the module most of its eigenvector is in, and that share."""

    value: float
    layer: str
    share: float


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues of a Fisher matrix of so many samples are like; the trace is their sum.

    `top` are the largest. `decades` maps exponents k to how many there are from 10ᵏ to 10ᵏ⁺¹,
    largest first; `rest` are those below: zero, or zero to rounding. `effective_dimension` maps λ
    above rounding to ``Σ μ/(μ + λ)``. Both are estimated by random vectors beyond 1,000 parameters.
    """

    samples: int
    parameters: int
    trace: float
    top: tuple[Eigenpair, ...]
    decades: dict[int, float]
    rest: float
    effective_dimension: dict[float, float]


def fisher_spectrum(
    model: nn.Module,
    data: str,
    structure: str,
    likelihood: str | Likelihood,
    fisher: str,
    *,
    samples: int,
    number: int = 10,
) -> Spectrum:
    """Return the spectrum of the Fisher matrix of a model in evaluation mode, by products alone.

    The data, ``package.module:loader`` as for ``natgrad compare``, are the first batches that hold
    so many samples. So many of the largest eigenvalues are found, fewer if there are no more.

    Raises `FactoryError` if the data cannot be read, `InspectionError` if there is no such matrix.
    """
    batches = list(LoaderBatches(data, torch.device("cpu"), samples=samples).measured())
    try:
        with evaluating(model):
            batches = [_with_own_targets(model, one, likelihood, fisher) for one in batches]
            matrix = fisher_matrix(model, batches, likelihood, structure, fisher)
    except Exception as error:  # A user's model may raise anything.
        raise InspectionError(f"{described(error)}.") from error
    parameters = matrix.shape[0]
    if parameters < 2:
        raise InspectionError("A spectrum needs at least two parameters.")
    values, vectors = top_eigenpairs(matrix, min(number, parameters - 1))
    density = _all_eigenvalues(matrix) if parameters <= FEW_ENOUGH else spectral_density(matrix)
    smallest = float(values[0]) * torch.finfo(matrix.dtype).eps * parameters
    counts = density.weights * (parameters / len(density.nodes))
    known = density.nodes > max(smallest, 0.0)
    exponents = torch.where(known, density.nodes, 1.0).log10().floor().long()
    decades = {
        k: float(counts[known & (exponents == k)].sum())
        for k in range(int(exponents[known].max()), int(exponents[known].min()) - 1, -1)
    } if bool(known.any()) else {}  # fmt: skip
    return Spectrum(
        samples=sum(count_samples(inputs) for inputs, _ in batches),
        parameters=parameters,
        trace=float(matrix.trace()),
        top=tuple(_eigenpair(matrix.layout, *one) for one in zip(values, vectors.T, strict=True)),
        decades=decades,
        rest=float(counts[~known].sum()),
        effective_dimension={
            damping: float(effective_dimension(density, damping))
            for damping in DAMPINGS
            if damping > smallest
        },
    )


def _all_eigenvalues(matrix: Operator) -> SpectralDensity:
    """Return the distribution of the eigenvalues, none of them estimated."""
    values = matrix.eigenvalues().cpu().double().unsqueeze(0)
    return SpectralDensity(values, torch.full_like(values, 1 / values.numel()), values.numel())


def _with_own_targets(
    model: nn.Module, batch: tuple[Any, Any], likelihood: str | Likelihood, fisher: str
) -> tuple[Any, Any]:
    """Return a batch with the targets that the model's own loss is of, if it returns one.

    Causal language models shift the labels that they are given by one place. An InspectionError
    says that true targets are needed and the loss is of others.
    """
    inputs, labels = batch
    if not isinstance(inputs, Mapping) or labels is None:
        return batch
    made = call_model(model, inputs)
    output, own = require_output(made, None).detach(), losses(made)
    if not own:
        return batch
    candidates = [labels]
    if labels.dim() > 1 and not labels.is_floating_point():
        shifted = torch.full_like(labels, -100)
        shifted[:, :-1] = labels[:, 1:]
        candidates.append(shifted)
    for targets in candidates:
        loss = as_likelihood(likelihood).loss(output, targets)
        if torch.allclose(loss.to(own[0].dtype), own[0].detach(), rtol=1e-3):
            return inputs, targets
    if fisher in ("empirical", "improved"):
        raise InspectionError(
            f"The loss that the model returns is not that of {likelihood} outputs and labels, "
            f"which the {fisher} Fisher matrix needs: give pairs of inputs and targets as data."
        )
    return batch


def _eigenpair(layout: ParameterLayout, value: Tensor, vector: Tensor) -> Eigenpair:
    """Say which module an eigenvector lies in."""
    shares: dict[str, float] = {}
    for name, piece in layout.to_dict(vector).items():
        module = name.rpartition(".")[0] or name
        shares[module] = shares.get(module, 0.0) + float(piece.square().sum())
    layer = max(shares, key=shares.__getitem__)
    return Eigenpair(float(value), layer, shares[layer] / sum(shares.values()))
