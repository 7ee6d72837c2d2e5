"""Isotropy of structures, against its definition in dense linear algebra."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import ntk
from natgrad.fisher import MonteCarloFisher
from natgrad.likelihoods import as_likelihood
from natgrad.ntk import isotropic_constant, isotropy
from tests import dense, pairwise
from tests.cases import CASES, normal
from tests.ntk import examples, reference
from tests.ntk.examples import inputs, slope
from tests.ntk.reference import STRUCTURES, Linear

#: Without biases, unless a test says so.
mlp = functools.partial(examples.mlp, bias=0.0)


@dataclass
class Expected:
    """What the definition gives, for rows ``Ĵ = Λ^½J`` with the symmetric root."""

    alpha: float
    deviation: float
    values: Tensor
    shares: list[tuple[float, float]]


def definition(
    rows: Tensor, inverse: Tensor, columns: list[Tensor], hessians: Tensor, count: float
) -> Expected:
    """Compare ``M = ĴF⁻¹Ĵᵀ/N`` with αΠ, Π the projection on the range of Λ.

    Args:
        rows: ``J``, ``(N·C, P)``.
        inverse: ``(F + λI)⁻¹``.
        columns: Indices of each layer's parameters.
        hessians: Λ, ``(N, C, C)``.
        count: N.
    """
    root = reference.in_blocks(reference.roots(hessians))
    pinv = [torch.linalg.pinv(h, rtol=1e-12, hermitian=True) for h in hessians]
    projection = torch.block_diag(*(h @ p for h, p in zip(hessians, pinv, strict=True)))
    rank = float(projection.trace())
    seen = root @ rows
    moved = inverse @ seen.T / count
    total = seen @ moved
    alpha = float(total.trace()) / rank
    size = float((alpha * projection).norm())
    shares = []
    for index in columns:
        share = seen[:, index] @ moved[index]
        own = float(share.trace()) / rank
        shares.append((own, float((share - own * projection).norm()) / size))
    deviation = float((total - alpha * projection).norm()) / size
    return Expected(alpha, deviation, torch.linalg.eigvalsh(total), shares)


def of_chain(
    model: nn.Module, x: Tensor, structure: str, damping: float, hessians: Tensor,
    own: Tensor | None = None,
) -> Expected:  # fmt: skip
    """Return the definition's values for a chain; ``own`` replaces Λ in the structure."""
    _, layers = reference.chain(model, x)
    own = hessians if own is None else own
    inverse = reference.inverse(layers, structure, damping, own)
    columns = reference.groups(layers, "block_diagonal")
    return definition(reference.jacobian(layers), inverse, columns, hessians, len(x))


def assert_found(found, wanted: Expected, tolerance: float) -> None:
    """Compare all numbers; errors are relative to α, or to the layers' shares of it."""
    scale = max(abs(wanted.alpha), 1e-300)
    assert abs(found.alpha - wanted.alpha) < tolerance * scale
    assert abs(found.deviation - wanted.deviation) < tolerance * max(1.0, wanted.deviation)
    values = torch.linalg.eigvalsh(found.coefficients)
    dense.assert_same(values, wanted.values, tolerance)
    for layer, (alpha, deviation) in zip(found.layers, wanted.shares, strict=True):
        assert abs(layer.alpha - alpha) < tolerance * max(scale, abs(alpha))
        assert abs(layer.deviation - deviation) < tolerance * max(1.0, deviation)
    assert sum(layer.alpha for layer in found.layers) == pytest.approx(found.alpha, rel=1e-9)
    largest, smallest = float(wanted.values[-1]), float(wanted.values[0])
    if smallest < -1e-5 * largest:
        assert found.largest_learning_rate == 0.0
    else:
        assert found.largest_learning_rate == pytest.approx(2 / largest, rel=tolerance)
    if wanted.alpha > 0:
        assert found.learning_rate == pytest.approx(1 / wanted.alpha, rel=tolerance)
    else:
        assert math.isnan(found.learning_rate)


def hessians_of(likelihood: str, f: Tensor) -> Tensor:
    if likelihood == "gaussian":
        return torch.eye(f.shape[1], dtype=f.dtype).expand(len(f), -1, -1)
    if likelihood == "categorical":
        p = f.exp() / f.exp().sum(1, keepdim=True)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    p = 1 / (1 + (-f).exp())
    return torch.diag_embed(p * (1 - p))


# -- the definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_isotropy_is_its_definition(structure, likelihood, damping, activation):
    model, x = mlp(6, 9, 8, 3, activation=activation, bias=0.2), inputs(3, 6)
    hessians = hessians_of(likelihood, model(x).detach())
    wanted = of_chain(model, x, structure, damping, hessians)
    found = isotropy(model, x, structure, damping, likelihood=likelihood)
    assert (found.structure, found.damping) == (structure, damping)
    assert [layer.name for layer in found.layers] == ["1", "3", "5"]
    # Undamped blocks of units have condition numbers of up to 1e7: 10·ε·κ.
    assert_found(found, wanted, 1e-9 if damping else 1e-7)
    assert found.rows == found.coefficients.shape[0] == 3 * 3


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_variance_of_the_likelihood(structure, damping):
    """F/σ² with rows J/σ: α is the same at zero damping, damping weighs σ² times as much."""
    model, x = mlp(6, 9, 9, 3, bias=0.2), inputs(3, 6)
    hessians = 4.0 * hessians_of("gaussian", model(x).detach())
    wanted = of_chain(model, x, structure, damping, hessians)
    likelihood = natgrad.likelihoods.Gaussian(variance=0.25)
    assert_found(isotropy(model, x, structure, damping, likelihood=likelihood), wanted, 1e-7)
    scaled = of_chain(model, x, structure, damping, 2 / 3 * hessians / 4.0)
    found = isotropy(model, x, structure, damping, likelihood=nn.MSELoss())  # (2/C)I
    assert_found(found, scaled, 1e-7)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_empirical_fisher(structure, likelihood):
    """The structure is made of outer products of gradients, the rows are still those of Λ."""
    model, x = mlp(6, 9, 8, 3), inputs(4, 6)
    f = model(x).detach()
    if likelihood == "gaussian":
        y = normal(4, 3, seed=5)
        gradient = f - y
    else:
        y = torch.arange(4) % 3
        gradient = f.softmax(1) - nn.functional.one_hot(y, 3)
    outer = gradient.unsqueeze(2) * gradient.unsqueeze(1)
    wanted = of_chain(model, x, structure, 0.1, hessians_of(likelihood, f), outer)
    found = isotropy(model, x, structure, 0.1, likelihood=likelihood, fisher="empirical", target=y)
    assert_found(found, wanted, 1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sampled_fisher(structure):
    model, x = mlp(6, 9, 8, 3), inputs(4, 6)
    f = model(x).detach()
    likelihood = as_likelihood("categorical")
    found = {}
    for seed in (3, 4):
        draws = torch.Generator().manual_seed(seed)
        weights = likelihood.event_weights(f, None)
        vectors = MonteCarloFisher().vectors(likelihood, f, weights, draws)
        assert vectors.shape == (1, 4, 3)
        outer = vectors[0].unsqueeze(2) * vectors[0].unsqueeze(1)
        wanted = of_chain(model, x, structure, 0.1, hessians_of("categorical", f), outer)
        found[seed] = isotropy(
            model, x, structure, 0.1, likelihood="categorical", fisher="mc", seed=seed
        )
        assert_found(found[seed], wanted, 1e-9)
    assert abs(found[3].alpha - found[4].alpha) > 1e-6


NAMES = ["conv2d", "transformer_layer", "layer_norm", "embedding", "generic", "tokens", "frozen"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise", "diagonal", "kfac"])
def test_other_models(name, structure):
    """Any model natgrad covers, its outputs of any shape."""
    case = CASES[name]()
    if structure == "kfac" and not case.has_kfac:
        return
    z, jac = case.jacobian
    rows = jac.reshape(z.numel(), -1)
    exact = rows.T @ rows / len(z)
    if structure == "kfac":
        factored = [spec for spec in case.blocks if spec.unit != "whole"]
        if len(factored) < len(case.blocks):
            return
        y = torch.zeros_like(z)
        pairs = dense.kfac_pairs(
            case.model, case.x, y, dense.gaussian(), case.blocks, sharing="split",
            output=case.output,
        )  # fmt: skip
        inverse = dense.pi_damped_inverse(len(exact), pairs, 0.2)
    else:
        matrix = dense.structured(exact, structure, case.model, case.blocks)
        inverse = torch.linalg.inv(matrix + 0.2 * torch.eye(len(exact), dtype=torch.float64))
    flat = z.flatten(1)
    columns = dense.block_indices(case.model, case.blocks)
    wanted = definition(rows, inverse, columns, hessians_of("gaussian", flat), len(z))
    found = isotropy(case.model, case.x, structure, 0.2, output=case.output)
    used = {frozenset(index.tolist()) for index in columns}
    assert len(found.layers) == len(used)
    # Layers come in the model's order or in that of calls: compare their shares as sets.
    order = sorted(range(len(columns)), key=lambda i: wanted.shares[i])
    mine = sorted(found.layers, key=lambda layer: (layer.alpha, layer.deviation))
    wanted.shares = [wanted.shares[i] for i in order]
    assert_found(ReorderedLayers(found, tuple(mine)), wanted, 1e-9)


class ReorderedLayers:
    def __init__(self, found, layers) -> None:
        self._found, self.layers = found, layers

    def __getattr__(self, name: str):
        return getattr(self._found, name)


# -- constants -------------------------------------------------------------------------------------


def tridiagonal_weights(depth: int) -> Tensor:
    sigma = torch.zeros(depth, depth, dtype=torch.float64)
    for i in range(depth):
        for j in range(max(0, i - 1), min(depth, i + 2)):
            sigma[i, j] = 1.0
    return torch.linalg.solve(sigma, torch.ones(depth, dtype=torch.float64))


@pairwise.parametrize(
    {
        "structure": ["full", "block_diagonal", "block_tridiagonal", "kfac"],
        "outputs": [1, 2, 3],
        "depth": range(1, 11),
    }
)
def test_wide_enough_networks_are_isotropic(structure, depth, outputs):
    """αI to rounding where every layer has as many inputs and units as there are rows."""
    samples = 4
    model = mlp(8, *[14] * (depth - 1), outputs, seed=depth)
    x = inputs(samples, 8, seed=depth)
    if structure == "block_tridiagonal" and depth % 3 == 2:
        with pytest.raises(ValueError, match=f"{depth} layers is singular"):
            isotropy(model, x, structure)
        with pytest.raises(ValueError, match=f"depth 3s \\+ 2 = {depth}"):
            isotropic_constant(structure, depth, samples)
        hessians = hessians_of("gaussian", model(x).detach())
        if depth == 2:
            wanted = of_chain(model, x, structure, 0.3, hessians)
            assert_found(isotropy(model, x, structure, 0.3), wanted, 1e-9)
        else:
            assert isotropy(model, x, structure, 0.3).alpha > 0
        return
    shares = {
        "full": None,
        "block_diagonal": [1.0] * depth,
        "block_tridiagonal": [] if depth % 3 == 2 else tridiagonal_weights(depth).tolist(),
        "kfac": [float(samples)] * (depth - 1) + [1.0],
    }[structure]
    alpha = 1.0 if shares is None else sum(shares)
    assert isotropic_constant(structure, depth, samples) == pytest.approx(alpha, abs=1e-12)
    found = isotropy(model, x, structure)
    assert found.alpha == pytest.approx(alpha, rel=1e-6)
    assert found.deviation < 1e-6
    assert found.learning_rate == pytest.approx(1 / alpha, rel=1e-6)
    assert found.largest_learning_rate == pytest.approx(2 / alpha, rel=1e-6)
    eye = torch.eye(samples * outputs, dtype=torch.float64)
    dense.assert_same(found.coefficients, alpha * eye, 1e-6)
    assert found.holds and f"holds for {structure}" in str(found)
    if shares is not None:
        for layer, share in zip(found.layers, shares, strict=True):
            assert layer.alpha == pytest.approx(share, abs=1e-6)
            assert layer.deviation < 1e-6


@pytest.mark.parametrize("depth", [3, 4, 5, 6])
def test_damped_tridiagonal_form_of_deep_networks(depth):
    model, x = mlp(5, *[6] * (depth - 1), 2), inputs(3, 5)
    hessians = hessians_of("gaussian", model(x).detach())
    for damping in (0.02, 0.5):
        wanted = of_chain(model, x, "block_tridiagonal", damping, hessians)
        assert_found(isotropy(model, x, "block_tridiagonal", damping), wanted, 1e-8)


def test_kfac_with_fewer_inputs_than_samples():
    """The first layer gives ``N·diag(P_X)``, of mean M_0, instead of NI."""
    for depth in (2, 3, 4):
        model, x = mlp(3, *[16] * (depth - 1), 2, seed=depth), inputs(5, 3)
        found = isotropy(model, x, "kfac")
        alpha = 3 + 5 * (depth - 2) + 1
        assert isotropic_constant("kfac", depth, 5, input_dim=3) == alpha
        assert found.alpha == pytest.approx(alpha, rel=1e-7)
        assert found.layers[0].alpha == pytest.approx(3, rel=1e-7)
        leverage = (x @ torch.linalg.inv(x.T @ x) @ x.T).diagonal()
        spread = torch.kron(torch.diag(5 * leverage), torch.eye(2, dtype=torch.float64))
        rest = (spread - 3 * torch.eye(10, dtype=torch.float64)).norm()
        size = alpha * math.sqrt(10)
        assert found.layers[0].deviation == pytest.approx(float(rest) / size, rel=1e-6)
        assert found.deviation == pytest.approx(float(rest) / size, rel=1e-6)
        assert max(layer.deviation for layer in found.layers[1:]) < 1e-7
        assert found.layers[0].reason == "it has 3 inputs for 5 samples"
        assert all(layer.reason == "" for layer in found.layers[1:])
        if found.deviation > 0.1:
            assert "layer '1' breaks it" in str(found)
    found = isotropy(mlp(2, 16, 1), inputs(5, 2), "kfac")
    assert not found.holds
    assert "layer '1' breaks it" in str(found) and "2 inputs for 5 samples" in str(found)


def test_kfac_of_one_layer_with_fewer_inputs_than_samples():
    """``A`` is of rank M_0 and ``B = I``: the map is P_X, of mean M_0/N."""
    for outputs in (1, 2):
        found = isotropy(mlp(3, outputs), inputs(5, 3), "kfac")
        assert found.alpha == pytest.approx(3 / 5, rel=1e-9)
    assert isotropic_constant("kfac", 1, 5, input_dim=3) == pytest.approx(3 / 5)


def test_kfac_with_fewer_units_than_rows():
    model, x = mlp(9, 4, 9, 1), inputs(6, 9)
    found = isotropy(model, x, "kfac")
    assert found.layers[0].reason == "it has 4 units for 6 rows"
    assert found.layers[1].reason == "it has 4 inputs for 6 samples"


WIDTHS = [64, 128, 256, 512]


@pytest.mark.parametrize("activation, fraction", [("relu", 0.5), ("tanh", 1.0)])
@pytest.mark.parametrize("depth, outputs", [(2, 1), (3, 1), (3, 2)])
def test_unit_wise_constant_of_wide_networks(activation, fraction, depth, outputs):
    """α → γM(L − 1)/C + 1, and the deviation falls like 1/√M."""
    samples, seeds = 4, 8
    x = inputs(samples, 6)
    deviations = []
    for width in WIDTHS:
        constant = isotropic_constant(
            "unit_wise", depth, samples, width=width, outputs=outputs, active_fraction=fraction
        )
        assert constant == fraction * width * (depth - 1) / outputs + 1
        square = 0.0
        for seed in range(seeds):
            model = mlp(6, *[width] * (depth - 1), outputs, activation=activation, seed=seed)
            found = isotropy(model, x, "unit_wise")
            # Every sample's share of active units is a mean of M (L − 1) coin tosses.
            bound = 5 / math.sqrt(samples * width * (depth - 1)) if fraction < 1 else 1e-3
            assert abs(found.alpha / constant - 1) < bound, (width, found.alpha, constant)
            square += found.deviation**2 / seeds
        deviations.append(math.sqrt(square))
    if fraction < 1 or outputs > 1:
        assert -0.65 < slope(WIDTHS, deviations) < -0.35, deviations
        assert deviations[-1] < 0.1
    else:
        # One output and no silent samples: the blocks of all units have full row rank.
        assert max(deviations) < 1e-4, deviations


def test_diagonal_stays_anisotropic_in_wide_networks():
    x = inputs(5, 8)
    for activation in ("relu", "tanh"):
        deviations = []
        for width in WIDTHS:
            model = mlp(8, width, width, 1, activation=activation)
            found = isotropy(model, x, "diagonal")
            deviations.append(found.deviation)
            assert not found.holds
            assert "a diagonal matrix is not isotropic at any width" in str(found)
        assert min(deviations) > 0.2 and abs(slope(WIDTHS, deviations)) < 0.1, deviations


def test_duplicate_samples_break_exact_natural_gradients():
    """The kernel's map is a projection of rank N − 1: α = (N − 1)/N, deviation 1/√(N − 1)."""
    for samples in (3, 5):
        x = inputs(samples, 8)
        x[1] = x[0]
        found = isotropy(mlp(8, 12, 12, 1), x, "full")
        assert found.alpha == pytest.approx((samples - 1) / samples, rel=1e-9)
        assert found.deviation == pytest.approx(1 / math.sqrt(samples - 1), rel=1e-7)
        assert found.largest_learning_rate == pytest.approx(2.0, rel=1e-9)
        assert not found.holds
        assert "does not hold for full" in str(found)
        assert "the Jacobian does not have full row rank" in str(found)
    found = isotropy(mlp(8, 12, 12, 1), x, "block_diagonal")
    assert "its Jacobian does not have full row rank" in str(found)
    found = isotropy(mlp(1, 1, 1), inputs(5, 1), "full")
    assert "the 2 parameters are fewer than the 5 rows" in str(found)
    found = isotropy(mlp(2, 1, 1), normal(5, 2), "block_diagonal")
    assert "fewer than the 5 rows" in str(found)


@pytest.mark.parametrize(
    "structure, damping",
    [("full", 0.0), ("full", 0.1), ("diagonal", 0.1), ("kfac", 0.0), ("kfac", 0.1),
     ("unit_wise", 0.01), ("block_diagonal", 0.02)],
)  # fmt: skip
def test_largest_learning_rate_is_the_limit_of_stability(structure, damping):
    """Training the parameters of the linear network just below and just above the limit."""
    model, x = mlp(3, 10, 9, 2, activation="relu"), inputs(5, 3)
    found = isotropy(model, x, structure, damping)
    linear = Linear.of(model, x)
    target = linear.outputs + normal(5, 2, seed=3)
    loss = reference.squared(target)
    for factor, growth in ((0.98, 0.96), (1.02, 1.04)):
        rate = factor * found.largest_learning_rate
        path, _ = linear.train(structure, 200, rate, damping, *loss)
        errors = (path - target).flatten(1).norm(dim=1)
        if factor < 1:
            assert bool((errors[1:] <= errors[:-1] * (1 + 1e-9)).all())
        else:
            assert float(errors[-1] / errors[-51]) == pytest.approx(growth**50, rel=0.05)


def test_structures_that_move_outputs_uphill():
    """A damped tri-diagonal form with a negative coefficient: no rate is stable."""
    model, x = mlp(4, 5, 5, 5, 5, 1), inputs(4, 4)
    hessians = hessians_of("gaussian", model(x).detach())
    seen = 0
    for damping in (0.01, 0.03, 0.1, 0.3):
        wanted = of_chain(model, x, "block_tridiagonal", damping, hessians)
        found = isotropy(model, x, "block_tridiagonal", damping)
        if float(wanted.values[0]) < -1e-3 * float(wanted.values[-1]):
            seen += 1
            assert found.largest_learning_rate == 0.0 and not found.holds
            assert "move away from their targets at every learning rate" in str(found)
    assert seen


# -- the sentence, the arguments, the model --------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("samples", [3, 7])
def test_the_report_is_one_sentence(structure, samples):
    found = isotropy(mlp(4, 12, 12, 1), inputs(samples, 4), structure)
    text = str(found)
    assert "\n" not in text and ". " not in text and text.endswith(".")
    assert text.count("hold") == 1 and structure in text
    assert f"{found.alpha:.4g}" in text and f"{found.largest_learning_rate:.4g}" in text
    if found.holds:
        assert found.deviation <= 0.1 and f"{found.learning_rate:.4g}" in text
        return
    worst = max(found.layers, key=lambda layer: layer.deviation)
    assert f"layer {worst.name!r} breaks it" in text


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac", "unit_wise"])
def test_damping_is_not_blamed_on_the_shape(structure):
    """At zero damping the same network is isotropic: shape and rank are no reasons."""
    model, x = mlp(6, 14, 14, 1), inputs(4, 6)
    assert isotropy(model, x, structure).deviation < 1e-6 or structure == "unit_wise"
    found = isotropy(model, x, structure, 1.0)
    assert not found.holds
    for reason in (layer.reason for layer in found.layers):
        assert "rank" not in reason and "units for" not in reason and "fewer" not in reason


def test_inputs_of_any_kind_and_options_of_the_structure():
    model, x = mlp(6, 9, 8, 2), inputs(3, 6)
    hessians = hessians_of("gaussian", model(x).detach())
    wanted = of_chain(model, x, "kfac", 0.1, hessians)
    for given in ((x,), {"input": x}, x.float().double()):
        found = isotropy(model, given, "kfac", 0.1)
        assert_found(found, wanted, 1e-6 if isinstance(given, Tensor) else 1e-9)
    _, layers = reference.chain(model, x)
    matrix = reference.fisher(layers, "kfac", hessians)
    columns = reference.groups(layers, "block_diagonal")
    inverse = reference.invert(matrix, 0.1)
    tikhonov = definition(reference.jacobian(layers), inverse, columns, hessians, 3)
    found = isotropy(model, x, "kfac", 0.1, factored_damping=False)
    assert_found(found, tikhonov, 1e-9)
    assert abs(tikhonov.alpha - wanted.alpha) > 1e-3 * wanted.alpha


def test_precision():
    model, x = mlp(6, 9, 8, 2), inputs(3, 6)
    low, x_low = copy.deepcopy(model).float(), x.float()
    exact = isotropy(low.double(), x_low.double(), "full")
    low = low.float()
    assert isotropy(low, x_low, "full").alpha == pytest.approx(exact.alpha, rel=1e-12)
    assert isotropy(low, x_low, "full").coefficients.dtype == torch.float64
    rough = isotropy(low, x_low, "full", 0.01, dtype=None)
    assert rough.coefficients.dtype == torch.float32
    exact = isotropy(low, x_low, "full", 0.01)
    assert rough.alpha == pytest.approx(exact.alpha, rel=1e-4)
    assert low[1].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_the_model_is_left_as_it_was(dtype, fisher):
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
    ).double()
    x = normal(6, 4)
    model(x).sum().backward()
    for training in (True, False):
        model.train(training)
        before = copy.deepcopy(model.state_dict())
        gradients = [p.grad.clone() for p in model.parameters()]
        state = torch.get_rng_state()
        isotropy(model, x, "kfac", 0.1, dtype=dtype, fisher=fisher)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(m.training == training for m in model.modules())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors():
    model, x = mlp(6, 9, 8, 2), inputs(3, 6)
    with pytest.raises(ValueError, match="structure must be one of"):
        isotropy(model, x, "nonsense")
    with pytest.raises(ValueError, match="(?i)likelihood"):
        isotropy(model, x, likelihood="nonsense")
    with pytest.raises(ValueError, match="fisher"):
        isotropy(model, x, fisher="nonsense")
    for damping in (-1.0, float("nan"), float("inf")):
        for structure in STRUCTURES:
            with pytest.raises(ValueError, match="damping"):
                isotropy(model, x, structure, damping)
    with pytest.raises(ValueError, match="target"):
        isotropy(model, x, fisher="empirical")
    with pytest.raises(TypeError, match="option"):
        isotropy(model, x, "full", nonsense=1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        isotropy(model, x, "full")
    uncovered = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten())
    with pytest.raises(ValueError, match="0.weight.*frequency"):
        isotropy(uncovered, torch.tensor([[0, 1], [2, 3]]), "full")


def test_constants():
    constants = [isotropic_constant("block_tridiagonal", depth, 5) for depth in (1, 3, 4, 6, 7, 9)]
    assert constants == [1, 1, 2, 2, 3, 3]
    assert isotropic_constant("full", 9, 5) == isotropic_constant("exact", 9, 5) == 1
    assert isotropic_constant("block_diagonal", 9, 5) == 9
    assert isotropic_constant("block-diagonal", 9, 5) == 9
    assert isotropic_constant("kfac", 4, 50) == 151
    assert isotropic_constant("kfac", 4, 50, input_dim=20) == 121
    assert isotropic_constant("kfac", 4, 50, input_dim=80) == 151
    assert isotropic_constant("kfac", 1, 50) == 1
    assert isotropic_constant("kfac", 4, 50, last_layer="scaled") == 200
    assert isotropic_constant("kfac", 1, 50, last_layer="scaled") == 50
    assert isotropic_constant("unit_wise", 4, 50, width=100) == 151
    assert isotropic_constant("unit_wise", 4, 50, width=100, outputs=3, active_fraction=1.0) == 101
    for structure, depth in (("diagonal", 3), ("block_tridiagonal", 5), ("unit_wise", 3), ("x", 2)):
        with pytest.raises(ValueError):
            isotropic_constant(structure, depth, 5)
    for depth, samples in ((0, 5), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            isotropic_constant("full", depth, samples)


# -- through the Fisher matrix as an object --------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("structure", ["full", "block_diagonal", "block_tridiagonal", "kfac"])
def test_function_space_map_is_alpha_times_the_identity(structure, depth, outputs):
    """J F̂⁺ Jᵀ/N = αI where every layer has more parameters, and width, than rows."""
    if structure == "block_tridiagonal" and depth % 3 == 2:
        with pytest.raises(ValueError, match=str(depth)):
            ntk.isotropic_constant(structure, depth, 4)
        return
    samples = 4
    model = mlp(6, *[10] * (depth - 1), outputs, seed=depth)
    x = normal(samples, 6, seed=depth)
    _, jac = dense.jacobian(model, x)
    jac = jac.flatten(0, 1)
    f = natgrad.fisher_matrix(model, (x, normal(samples, outputs)), "gaussian", structure)
    residual = normal(samples * outputs, seed=7)
    moved = jac @ f.solve(jac.T @ residual / samples)
    alpha = ntk.isotropic_constant(structure, depth, samples)
    dense.assert_same(moved, alpha * residual, 1e-6)


def test_unit_wise_map_is_nearly_isotropic_in_wide_networks():
    samples, depth, width = 3, 3, 600
    model = mlp(5, width, width, 1, activation="relu")
    x = normal(samples, 5)
    x = x / x.norm(dim=1, keepdim=True)
    _, jac = dense.jacobian(model, x)
    jac = jac.flatten(0, 1)
    f = natgrad.fisher_matrix(model, (x, normal(samples, 1)), "gaussian", "unit_wise")
    kernel = jac @ f.solve(jac.T / samples)
    alpha = ntk.isotropic_constant("unit_wise", depth, samples, width=width)
    relative = kernel / alpha - torch.eye(samples).double()
    assert relative.abs().max() < 0.15


def test_single_numbers_are_outputs_of_one_entry():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), normal(6, 3)
    flat = nn.Sequential(model, nn.Flatten(0))
    for structure in ("full", "kfac"):
        expected = isotropy(model, x, structure, 0.1)
        found = isotropy(flat, x, structure, 0.1)
        dense.assert_same(found.coefficients, expected.coefficients)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="one sample"):
        isotropy(torch.nn.Linear(3, 2), torch.zeros(0, 3))
