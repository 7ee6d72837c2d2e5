"""The spectrum of the Fisher matrix of a user's model on a user's data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import count_samples
from natgrad.experiments.batches import LoaderBatches
from natgrad.experiments.factories import described
from natgrad.experiments.inspection import InspectionError
from natgrad.fisher import fisher_matrix
from natgrad.layouts import ParameterLayout
from natgrad.tools.spectrum import effective_dimension, spectral_density, top_eigenpairs

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
    """What the eigenvalues of a Fisher matrix are like.

    Attributes:
        samples: Samples that it is of.
        parameters: P, how many eigenvalues there are.
        trace: Their sum.
        top: The largest, from the largest on.
        decades: Exponent k → estimate of the eigenvalues from 10ᵏ to 10ᵏ⁺¹, largest first, from
            random vectors.
        rest: Estimate of those below all of these: zero, or zero to rounding.
        effective_dimension: λ → ``Σ μ/(μ + λ)``, estimated likewise, for λ above rounding.
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
    likelihood: str,
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
    training = model.training
    model.eval()
    try:
        matrix = fisher_matrix(model, batches, likelihood, structure, fisher)
    except Exception as error:  # A user's model may raise anything.
        raise InspectionError(f"{described(error)}.") from error
    finally:
        model.train(training)
    parameters = matrix.shape[0]
    if parameters < 2:
        raise InspectionError("A spectrum needs at least two parameters.")
    values, vectors = top_eigenpairs(matrix, min(number, parameters - 1))
    density = spectral_density(matrix)
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


def _eigenpair(layout: ParameterLayout, value: Tensor, vector: Tensor) -> Eigenpair:
    """Say which module an eigenvector lies in."""
    shares: dict[str, float] = {}
    for name, piece in layout.to_dict(vector).items():
        module = name.rpartition(".")[0] or name
        shares[module] = shares.get(module, 0.0) + float(piece.square().sum())
    layer = max(shares, key=shares.__getitem__)
    return Eigenpair(float(value), layer, shares[layer] / sum(shares.values()))
