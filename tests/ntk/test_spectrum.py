"""The Fisher spectrum against dense eigenvalues, and its prediction for wide random networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from natgrad import fisher_matrix
from natgrad.ntk import MLP
from natgrad.ntk.spectrum import fisher_spectrum, infinite_spectrum, predict_spectrum
from tests.cases import generator, normal


def fully_connected(widths: Sequence[int], outputs: int, activation=nn.ReLU, seed: int = 0):
    """A network in standard parameterisation: variance 2/fan-in, no biases."""
    layers: list[nn.Module] = []
    g = generator(seed)
    for a, b in itertools.pairwise([*widths, outputs]):
        layer = nn.Linear(a, b, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_((2 / a) ** 0.5 * torch.randn(b, a, generator=g))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), (5, 3)),
    "more rows than parameters": (lambda: nn.Linear(2, 2).double(), (6, 2)),
    "convolution": (convolutional, (4, 2, 4, 4)),
    "one sample": (lambda: nn.Linear(3, 2).double(), (1, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_dense_fisher_matrix(name):
    make, shape = MODELS[name]
    model, x = make(), normal(*shape)
    found = fisher_spectrum(model, x)
    dense = fisher_matrix(model, (x, None), "gaussian", "full").to_dense()
    values = torch.linalg.eigvalsh(dense).flip(0)
    shared = min(len(values), len(found.eigenvalues))
    torch.testing.assert_close(
        found.eigenvalues[:shared], values[:shared].clamp(min=0), rtol=1e-9, atol=1e-12
    )
    assert float(found.eigenvalues[shared:].sum()) < 1e-12
    assert found.parameters == len(values)
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert found.second_moment == pytest.approx(float(values.square().mean()), rel=1e-9)
    torch.testing.assert_close(found.largest, values[: found.outputs])
    assert found.largest_step == pytest.approx(2 / float(values[0]))


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_order_parameters_are_means_over_the_dense_gram_matrix(samples, outputs, width):
    torch.manual_seed(samples)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    x = normal(samples, 2, seed=width)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    jac = torch.cat([r.flatten(2) for r in rows.values()], dim=2)  # (N, C, P)
    diagonal, off = [], []
    for c in range(outputs):
        gram = jac[:, c] @ jac[:, c].T
        diagonal += gram.diagonal().tolist()
        off += [float(gram[i, j]) for i in range(samples) for j in range(samples) if i != j]
    found = fisher_spectrum(model, x)
    assert found.diagonal == pytest.approx(sum(diagonal) / len(diagonal))
    assert found.off_diagonal == pytest.approx(sum(off) / len(off) if off else 0.0, abs=1e-12)
    # The mean needs no assumption; the second moment cannot be below that of the means.
    assert found.prediction.mean == pytest.approx(found.mean)
    assert found.prediction.second_moment <= found.second_moment * (1 + 1e-12)
    # Rayleigh quotients: for every model the prediction is not above the largest eigenvalue.
    assert found.prediction.largest <= float(found.eigenvalues[0]) * (1 + 1e-12)
    assert found.prediction.largest_step >= found.largest_step * (1 - 1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("off_diagonal", [0.6, -0.2])
def test_prediction_is_exact_where_its_assumption_is(outputs, off_diagonal):
    """A linear model on inputs with XXᵀ = (k₁ − k₂)I + k₂ 11ᵀ."""
    n = 5
    gram = (1 - off_diagonal) * torch.eye(n).double() + off_diagonal
    values, vectors = torch.linalg.eigh(gram)
    x = vectors * values.clamp(min=0).sqrt()
    found = fisher_spectrum(nn.Linear(n, outputs, bias=False).double(), x)
    assert found.diagonal == pytest.approx(1.0)
    assert found.off_diagonal == pytest.approx(off_diagonal)
    predicted = found.prediction
    assert predicted.mean == pytest.approx(found.mean)
    assert predicted.second_moment == pytest.approx(found.second_moment)
    assert predicted.largest_step == pytest.approx(found.largest_step)
    torch.testing.assert_close(
        found.largest, torch.full((outputs,), predicted.largest, dtype=torch.float64)
    )


def relu_order_parameters(widths: Sequence[int], overlap: float) -> tuple[float, float]:
    """Return (κ₁, κ₂) of infinite width: inputs of squared norm d, with the given cosine.

    ``k = Σ_l (δ_l·δ'_l)(h_{l−1}·h'_{l−1})``. Forward, the mean squared activation stays 1 at
    variance 2/fan-in and the cosine is mapped by the arc-cosine kernel of degree 1; backward, of
    degree 0.
    """
    cosines = [overlap]
    for _ in widths[1:]:
        angle = math.acos(cosines[-1])
        cosines.append((math.sin(angle) + (math.pi - angle) * cosines[-1]) / math.pi)
    backward = [1.0]
    for cosine in reversed(cosines[:-1]):
        backward.insert(0, backward[0] * (1 - math.acos(cosine) / math.pi))
    k1 = sum(widths)
    k2 = sum(m * c * b for m, c, b in zip(widths, cosines, backward, strict=True))
    scale = sum(a * b for a, b in itertools.pairwise(widths)) / max(widths[1:])
    return k1 / scale, k2 / scale


def test_random_wide_network_has_the_predicted_spectrum():
    """Width 600, 30 samples, 3 outputs: mean, second moment, and three large eigenvalues."""
    widths, outputs, samples = [600, 600, 600], 3, 30
    model, x = fully_connected(widths, outputs), normal(samples, 600)
    x = x / x.norm(dim=1, keepdim=True) * 600**0.5
    found = fisher_spectrum(model, x)
    for predicted, tolerance in [
        (found.prediction, 0.05),
        (predict_spectrum(found.order_parameters(widths), widths, samples, outputs), 0.05),
        (predict_spectrum(relu_order_parameters(widths, 0.0), widths, samples, outputs), 0.15),
    ]:
        assert predicted.mean == pytest.approx(found.mean, rel=tolerance)
        assert predicted.second_moment == pytest.approx(found.second_moment, rel=tolerance)
        assert predicted.largest == pytest.approx(float(found.largest.mean()), rel=tolerance)
    # C outliers, far from the bulk.
    assert found.eigenvalues[outputs - 1] > 5 * found.eigenvalues[outputs]
    kappa = found.order_parameters(widths)
    alpha, width = 2.0, 600
    formula = predict_spectrum(kappa, widths, samples, outputs)
    share = (samples - 1) / samples
    assert formula.mean == pytest.approx(kappa[0] * outputs / width)
    assert formula.second_moment == pytest.approx(
        alpha * (share * kappa[1] ** 2 + kappa[0] ** 2 / samples) * outputs
    )
    assert formula.largest == pytest.approx(alpha * (share * kappa[1] + kappa[0] / samples) * width)


def test_gradient_descent_diverges_above_the_predicted_step():
    """The linearised network at 1.2 times the predicted bound, and at 0.8 times."""
    widths, samples = [100, 300, 300], 10
    model, x = fully_connected(widths, 1), normal(samples, 100)
    found = fisher_spectrum(model, x)
    predicted = found.prediction.largest_step
    residual = normal(samples, seed=2)
    for share, grows in ((1.2, True), (0.8, False)):
        factors = 1 - share * predicted * found.eigenvalues
        assert (float((factors**200 * residual).norm()) > 10 * float(residual.norm())) == grows


def test_odd_activations_have_no_outliers():
    """Without biases tanh keeps uncorrelated inputs uncorrelated: κ₂ ≈ 0."""
    widths = [300, 300, 300]
    x = normal(30, 300)
    relu = fisher_spectrum(fully_connected(widths, 1), x)
    tanh = fisher_spectrum(fully_connected(widths, 1, nn.Tanh), x)
    k1, k2 = tanh.order_parameters(widths)
    assert abs(k2) < 0.05 * k1
    assert tanh.largest_step > 3 * relu.largest_step


def test_wrong_sizes_are_refused():
    for widths in ([3], [3, 0]):
        with pytest.raises(ValueError, match="widths must hold"):
            predict_spectrum((1.0, 0.5), widths, 3, 1)
    with pytest.raises(ValueError, match="at least 1"):
        predict_spectrum((1.0, 0.5), [3, 4], 0, 1)


def test_infinite_width_predicts_the_mean_over_random_networks():
    """Without looking at any network; means over draws within five standard errors."""
    widths, draws = (12, 400, 400, 2), 12
    x = normal(8, 12)
    x = x * 12**0.5 / x.norm(dim=1, keepdim=True)
    torch.manual_seed(0)
    found = []
    for _ in range(draws):
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
            nn.init.normal_(layers[-2].weight, std=(2.0 / a) ** 0.5)
        spectrum = fisher_spectrum(nn.Sequential(*layers[:-1]).double(), x)
        theory = spectrum.prediction
        found.append([theory.mean, theory.second_moment, theory.largest])
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std(0) / draws**0.5
    limit = infinite_spectrum(MLP(widths), x)
    expected = torch.tensor([limit.mean, limit.second_moment, limit.largest]).double()
    # Squares of fluctuating entries add about 1/M to second moments.
    assert ((values.mean(0) - expected).abs() < 5 * error + expected / 100).all()
    assert (error < 0.1 * expected).all()
    with pytest.raises(ValueError, match="without biases"):
        infinite_spectrum(MLP(widths, bias_variance=0.1), x)
