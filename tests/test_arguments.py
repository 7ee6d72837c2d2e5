"""Arguments that are whole numbers: NumPy's as well as Python's, no truth values, none too low."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import natgrad
from natgrad import ntk, tools, wave_functions
from natgrad.laplace import calibration, largest_entries
from natgrad.residuals import AdaptivePoints


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 24).double().view(8, 3)


def matrix() -> natgrad.FisherMatrix:
    return natgrad.fisher_matrix(network(), (inputs(), torch.arange(8) % 2), structure="kfac")


def posterior() -> natgrad.Laplace:
    return natgrad.Laplace(network(), (inputs(), torch.arange(8) % 2))


def variational(inducing: int, steps: int | None = None) -> natgrad.VariationalLaplace:
    data = (inputs(), torch.arange(8) % 2)
    return natgrad.VariationalLaplace(network(), data, "categorical", inducing, steps=steps)


def averaged(number: int) -> natgrad.WeightAverage:
    model = network()
    return natgrad.WeightAverage(torch.optim.SGD(model.parameters(), 0.1), model, start=number)


def residual() -> natgrad.Residual:
    return natgrad.Residual(lambda model, x: model(x), inputs())


#: Argument → how it is given, and its least value.
ARGUMENTS = {
    "Refresh.factors": (lambda n: natgrad.Refresh(factors=n), 1),
    "Refresh.inverses": (lambda n: natgrad.Refresh(inverses=n), 1),
    "LevenbergMarquardt.interval": (lambda n: natgrad.LevenbergMarquardt(1.0, interval=n), 1),
    "MeasuredLR.interval": (lambda n: natgrad.optim.MeasuredLength(interval=n), 1),
    "LineSearch.max_trials": (lambda n: natgrad.optim.LineSearch(max_trials=n), 1),
    "FNGD.coefficient_steps": (lambda n: natgrad.FNGD(network(), coefficient_steps=n), 1),
    "ConjugateGradient": (lambda n: natgrad.solvers.ConjugateGradient(max_iterations=n), 1),
    "MonteCarloFisher.samples": (lambda n: natgrad.fisher.MonteCarloFisher(samples=n), 1),
    "KroneckerProducts.rank": (lambda n: natgrad.curvature.KroneckerProducts(rank=n), 1),
    "ImplicitSGD.inner_steps": (
        lambda n: natgrad.ImplicitSGD(network().parameters(), inner_steps=n), 1,
    ),
    "ImplicitSGD.history": (lambda n: natgrad.ImplicitSGD(network().parameters(), history=n), 1),
    "ResidualNGD.chunk_size": (
        lambda n: natgrad.ResidualNGD(network(), residual(), chunk_size=n), 1,
    ),
    "AdaptivePoints.most": (
        lambda n: AdaptivePoints(network(), residual(), lambda k: torch.rand(k, 3), most=n), 1,
    ),
    "WeightAverage.start": (averaged, 0),
    "Laplace.sample": (lambda n: posterior().sample(n), 1),
    "Laplace.predict": (lambda n: posterior().predict(inputs(), samples=n), 1),
    "largest_entries": (lambda n: largest_entries({"a": torch.rand(5)}, n), 1),
    "calibration.bins": (
        lambda n: calibration(torch.full((4, 2), 0.5), torch.arange(4) % 2, bins=n), 1,
    ),
    "VariationalLaplace.steps": (lambda n: variational(2, n), 1),
    "empirical_kernel.batch_size": (
        lambda n: ntk.empirical_kernel(network(), inputs(), batch_size=n), 1,
    ),
    "isotropic_constant.depth": (lambda n: ntk.isotropic_constant("kfac", n, 5), 1),
    "TwoLayerNetwork.width": (lambda n: ntk.TwoLayerNetwork(3, n), 1),
    "estimate_trace.products": (lambda n: tools.estimate_trace(matrix(), n), 4),
    "estimate_diagonal.products": (lambda n: tools.estimate_diagonal(matrix(), n), 4),
    "spectral_density.steps": (lambda n: tools.spectral_density(matrix(), n), 1),
    "spectral_density.vectors": (lambda n: tools.spectral_density(matrix(), 3, vectors=n), 1),
    "top_eigenpairs.number": (lambda n: tools.top_eigenpairs(matrix(), n), 1),
    "quantization_error.bits": (lambda n: tools.quantization_error(network(), matrix(), n), 2),
    "Metropolis.sites": (lambda n: wave_functions.Metropolis(network(), n), 1),
    "Metropolis.chains": (lambda n: wave_functions.Metropolis(network(), 3, chains=n), 1),
    "Metropolis.sweep": (lambda n: wave_functions.Metropolis(network(), 3, sweep=n), 1),
    "Metropolis.burn_in": (lambda n: wave_functions.Metropolis(network(), 3, burn_in=n), 0),
    "chain.sites": (wave_functions.chain, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_whole_numbers_are_taken_and_others_refused(name):
    give, least = ARGUMENTS[name]
    for number in (least + 1, np.int64(least + 1), np.int32(least + 1)):
        give(number)
    for number in (least - 1, np.int64(least - 1), True, np.True_, least + 1.5, str(least + 1)):
        with pytest.raises(ValueError, match=f"integer of at least {least}, got"):
            give(number)


def test_a_number_of_inducing_points_is_none_of_their_values():
    assert len(variational(np.int64(3)).inducing) == 3
    with pytest.raises(ValueError, match="inducing must be an integer of at least 1, got True"):
        variational(True)
