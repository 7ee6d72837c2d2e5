"""Every structure of the Fisher matrix against the dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import linalg
from natgrad.fisher import estimation as fisher_module
from natgrad.fisher import fisher_matrix
from natgrad.likelihoods import Categorical, Gaussian, Likelihood
from tests import dense
from tests.cases import CASES, Attention, BlockSpec, Case, MeanPool, generator, normal, rows

EXACT_STRUCTURES = ["full", "block_diagonal", "block_tridiagonal", "unit_wise", "diagonal"]
STRUCTURES = [*EXACT_STRUCTURES, "kfac"]
POSITIVE = [s for s in STRUCTURES if s != "block_tridiagonal"]
LIKELIHOODS = ["categorical", "gaussian", "bernoulli", "poisson"]
KINDS = ["exact", "empirical"]


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]()


def build(case: Case, likelihood="gaussian", structure="full", kind="exact", **options):
    """Return natgrad's Fisher matrix of a case."""
    y = case.target(likelihood)
    return fisher_matrix(
        case.model, (case.x, y), likelihood, structure, kind, output=case.output, **options
    )


def expected_matrix(case: Case, likelihood: str, structure: str, kind: str) -> Tensor:
    """Return the dense matrix it should be."""
    y, f = case.fisher(likelihood, kind)
    if structure != "kfac":
        return dense.structured(f, structure, case.model, case.blocks)
    return dense.kfac(
        case.model, case.x, y, case.loss(likelihood), case.blocks, kind, output=case.output
    )


# -- every structure, Fisher type, likelihood and layer kind ---------------------------------------


@pytest.mark.parametrize("structure", EXACT_STRUCTURES)
def test_is_the_masked_dense_fisher(case, structure):
    for likelihood in LIKELIHOODS:
        for kind in KINDS:
            f = build(case, likelihood, structure, kind)
            dense.assert_same(f.to_dense(), expected_matrix(case, likelihood, structure, kind))


KFAC_CASES = [
    name
    for name in CASES
    if "attention" not in name and not name.startswith(("tied", "transformer"))
]


@pytest.mark.parametrize("name", KFAC_CASES)
def test_kfac_is_explicit_sums_of_outer_products(name):
    case = CASES[name]()
    assert case.has_kfac
    for likelihood in LIKELIHOODS:
        for kind in KINDS:
            y = case.target(likelihood)
            for sharing in ("expand", "reduce"):
                if sharing == "reduce" and name in ("embedding", "language_model"):
                    continue  # the reduced factor of an embedding keeps its diagonal; see below
                f = build(case, likelihood, "kfac", kind, weight_sharing=sharing)
                expected = dense.kfac(
                    case.model, case.x, y, case.loss(likelihood), case.blocks, kind,
                    sharing=sharing, output=case.output,
                )  # fmt: skip
                dense.assert_same(f.to_dense(), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_loss_modules_stand_for_their_likelihoods(structure):
    case = CASES["mlp"]()
    y = case.target("gaussian")
    for criterion, factor in ((nn.MSELoss(), 2 / 3), (nn.MSELoss(reduction="sum"), 2)):
        f = fisher_matrix(case.model, (case.x, y), criterion, structure)
        dense.assert_same(
            f.to_dense(), factor * expected_matrix(case, "gaussian", structure, "exact")
        )
    labels = case.target("categorical")
    expected = expected_matrix(case, "categorical", structure, "empirical")
    for reduction in ("mean", "sum"):
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        f = fisher_matrix(case.model, (case.x, labels), criterion, structure, "empirical")
        dense.assert_same(f.to_dense(), expected)


def test_attention_is_made_of_linear_layers():
    """K-FAC of ``nn.MultiheadAttention`` is that of the same thing written with ``nn.Linear``."""

    class Written(nn.Module):
        def __init__(self, attention: nn.MultiheadAttention, head: nn.Linear) -> None:
            super().__init__()
            self.inputs = nn.Linear(4, 12)
            self.inputs.weight, self.inputs.bias = attention.in_proj_weight, attention.in_proj_bias
            self.outputs, self.head = nn.Linear(4, 4).double(), head
            self.outputs.load_state_dict(attention.out_proj.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                part.unflatten(2, (2, 2)).transpose(1, 2) for part in self.inputs(x).chunk(3, 2)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v)
            return self.head(self.outputs(mixed.transpose(1, 2).flatten(2)).mean(1))

    case = CASES["self_attention"]()
    written = Written(case.model.attention, case.model.head)
    specs = (rows("inputs"), rows("outputs"), rows("head"))
    y = case.target("categorical")
    with torch.no_grad():
        torch.testing.assert_close(written(case.x), case.z)
    for sharing in ("expand", "reduce"):
        expected = dense.kfac(written, case.x, y, case.loss("categorical"), specs, sharing=sharing)
        f = build(case, "categorical", "kfac", weight_sharing=sharing)
        dense.assert_same(f.to_dense(), expected)


def test_cross_attention_kfac_exists():
    """The factors of a cross attention are positive and its trace is that of its parts."""
    for name in ("cross_attention", "cross_attention_other_sizes", "transformer_layer"):
        f = build(CASES[name](), "categorical", "kfac")
        matrix = f.to_dense()
        assert matrix.isfinite().all()
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12
        dense.assert_same(f.trace(), matrix.trace())


def test_tied_kfac_keeps_the_trace_of_its_uses():
    """A = Σ tr(B_i) A_i, B = Σ tr(A_i) B_i over Σ tr(A_i) tr(B_i), for embedding and head."""
    case = CASES["tied_embedding"]()
    y = case.target("gaussian")
    z = case.z
    vectors = dense.fisher_vectors(dense.gaussian(), z, y, "exact")
    # The tied weight as an embedding (V × d with one-hot inputs) and as a linear map.
    model, recorded = dense.record(case.model, case.x, vectors, ["embedding", "head"])
    as_embedding = dense.kfac_factors(model.embedding, recorded["embedding"], len(z), bias=False)[0]
    as_linear = dense.kfac_factors(model.head, recorded["head"], len(z), bias=False)[0]
    pairs = [(as_embedding[1], as_embedding[0]), as_linear]  # (d × d, V × V) for both
    a = sum(b_i.trace() * a_i for a_i, b_i in pairs)
    b = sum(a_i.trace() * b_i for a_i, b_i in pairs)
    scale = sum(a_i.trace() * b_i.trace() for a_i, b_i in pairs)
    f = build(case, "gaussian", "kfac")
    index = dense.indices(case.model)["embedding.weight"].flatten()
    block = f.to_dense()[index.unsqueeze(1), index]
    dense.assert_same(block, torch.kron(b, a) / scale)
    dense.assert_same(block.trace(), scale)


def test_reduced_embedding_keeps_the_diagonal_of_its_input_factor():
    case = CASES["embedding"]()
    y = case.target("gaussian")
    z = case.z
    vectors = dense.fisher_vectors(dense.gaussian(), z, y, "exact")
    model, recorded = dense.record(case.model, case.x, vectors, ["0"])
    ((a, b),) = dense.kfac_factors(model[0], recorded["0"], len(z), bias=False, sharing="reduce")
    f = build(case, "gaussian", "kfac", weight_sharing="reduce")
    where = dense.augmented_indices(case.model, case.blocks[0])
    size = f.shape[0]
    index = dense.indices(case.model)["0.weight"].flatten()
    expected = dense.kron(size, where, [(torch.diag(a.diagonal()), b)])
    dense.assert_same(f.to_dense()[index.unsqueeze(1), index], expected[index.unsqueeze(1), index])


def test_large_factors_are_kept_as_diagonals():
    case = CASES["mlp"]()
    y = case.target("categorical")
    loss = case.loss("categorical")
    vectors = dense.fisher_vectors(loss, case.z, y, "exact")
    model, recorded = dense.record(case.model, case.x, vectors, ["0", "2", "4"])
    size = case.jacobian[1].shape[-1]
    expected = torch.zeros(size, size, dtype=torch.float64)
    for spec in case.blocks:
        layer = model.get_submodule(spec.layer)
        ((a, b),) = dense.kfac_factors(layer, recorded[spec.layer], len(case.z))
        a, b = (m if len(m) <= 4 else torch.diag(m.diagonal()) for m in (a, b))
        expected += dense.kron(size, dense.augmented_indices(case.model, spec), [(a, b)])
    f = build(case, "categorical", "kfac", max_factor_size=4)
    dense.assert_same(f.to_dense(), expected)
    check_interface(f, expected, positive=True)


# -- the interface ---------------------------------------------------------------------------------


def pseudo_inverse(matrix: Tensor, threshold: float = 1e-11) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    keep = values.abs() > threshold * values.abs().max()
    return (vectors[:, keep] / values[keep]) @ vectors[:, keep].T


def check_interface(f, matrix: Tensor, positive: bool, damping: float = 0.05) -> None:
    """Check every method against the dense matrix."""
    size = len(matrix)
    eye = torch.eye(size, dtype=matrix.dtype)
    assert f.shape == (size, size)
    vector, columns = normal(size, seed=1), normal(size, 3, seed=2)
    dense.assert_same(f.to_dense(), matrix)
    dense.assert_same(f @ vector, matrix @ vector)
    dense.assert_same(f @ columns, matrix @ columns)
    dense.assert_same(f.diagonal(), matrix.diagonal())
    dense.assert_same(f.trace(), matrix.trace())
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
    actual = f.eigenvalues()
    assert actual.shape == (size,) and (actual.diff() <= 0).all()
    assert (actual - eigenvalues).abs().max() <= 1e-9 * eigenvalues.abs().max()
    inverse = torch.linalg.inv(matrix + damping * eye)
    dense.assert_same(f.solve(vector, damping), inverse @ vector, 1e-8)
    dense.assert_same(f.solve(columns, damping), inverse @ columns, 1e-8)
    sign, logarithm = torch.linalg.slogdet(matrix + damping * eye)
    if positive:
        assert sign == 1
        torch.testing.assert_close(f.logdet(damping), logarithm, rtol=1e-9, atol=1e-9)
    import numpy
    import scipy.sparse.linalg

    operator = f.to_scipy()
    assert isinstance(operator, scipy.sparse.linalg.LinearOperator)
    assert operator.shape == f.shape and operator.dtype == numpy.float64
    numpy.testing.assert_allclose(operator @ numpy.eye(size), matrix.numpy(), rtol=0, atol=1e-11)
    numpy.testing.assert_allclose(operator @ vector.numpy(), (matrix @ vector).numpy(), atol=1e-10)
    numpy.testing.assert_allclose(
        operator.T @ vector.numpy(), (matrix @ vector).numpy(), atol=1e-10
    )
    start = 0
    named, preconditioned, product = {}, f.solve(vector, damping), f @ vector
    shapes = [tuple(f.layout.shapes[name]) for name in f.parameter_names]
    for name, shape in zip(f.parameter_names, shapes, strict=True):
        named[name] = vector[start : start + torch.Size(shape).numel()].reshape(shape)
        start += named[name].numel()
    assert start == size
    for result, flat in ((f.solve(named, damping), preconditioned), (f @ named, product)):
        assert list(result) == list(f.parameter_names)
        assert [tuple(t.shape) for t in result.values()] == shapes
        assert torch.equal(torch.cat([t.flatten() for t in result.values()]), flat)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_interface(case, structure):
    f = build(case, "categorical", structure)
    matrix = f.to_dense()
    assert list(f.parameter_names) == list(dense.parameters(case.model))
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-14)
    check_interface(f, matrix, positive=structure in POSITIVE)


@pytest.mark.parametrize("structure", POSITIVE)
@pytest.mark.parametrize("name", ["mlp", "batch_of_one", "conv2d", "frozen", "language_model"])
def test_zero_damping_is_the_pseudo_inverse(name, structure):
    case = CASES[name]()
    data = [(case.x, case.target("categorical"))]
    check_pseudo_inverse(fisher_matrix(case.model, data, "categorical", structure))


@pytest.mark.parametrize("structure", POSITIVE)
def test_zero_damping_with_more_rows_than_parameters(structure):
    """The softmax's shift invariance keeps even this Fisher matrix singular."""
    data = [(normal(9, 3, seed=s), labels(9, 3, s)) for s in range(30)]
    f = fisher_matrix(CASES["mlp"]().model, data, "categorical", structure)
    check_pseudo_inverse(f)


def check_pseudo_inverse(f) -> None:
    """Check solve(v, 0) on the range, outside it, and as the limit of small damping."""
    matrix = f.to_dense()
    inverse = pseudo_inverse(matrix)
    vector = matrix @ normal(len(matrix), seed=1)  # in the range
    solution = f.solve(vector)
    dense.assert_same(matrix @ solution, vector, 1e-8)
    dense.assert_same(solution, inverse @ vector, 1e-6)
    anything = normal(len(matrix), seed=2)
    outside = anything - inverse @ (matrix @ anything)
    largest = torch.linalg.matrix_norm(inverse, 2)
    assert f.solve(outside).norm() <= 1e-8 * largest * anything.norm()
    small = f.solve(vector, 1e-4 / float(largest))
    dense.assert_same(small, inverse @ vector, 2e-4)


def labels(count: int, classes: int, seed: int) -> Tensor:
    return torch.randint(0, classes, (count,), generator=generator(seed))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_logdet_without_damping(structure):
    x, y = normal(40, 2), normal(40, 2, seed=1)
    f = fisher_matrix(regular_net(), (x, y), "gaussian", structure)
    matrix = f.to_dense()
    sign, logarithm = torch.linalg.slogdet(matrix)
    if sign > 0:
        torch.testing.assert_close(f.logdet(), logarithm, rtol=1e-8, atol=1e-8)
    singular = build(CASES["batch_of_one"](), "gaussian", structure)
    if structure in POSITIVE and structure != "diagonal":
        assert singular.logdet() < -100  # −∞ up to rounding of zero eigenvalues


def regular_net() -> nn.Module:
    """A net whose Fisher matrix on enough data has full rank."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_block_diagonal_is_full(likelihood, kind):
    case = CASES["one_layer"]()
    full = build(case, likelihood, "full", kind).to_dense()
    for structure in ("block_diagonal", "block_tridiagonal"):
        dense.assert_same(build(case, likelihood, structure, kind).to_dense(), full)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_kfac_is_exact(likelihood, kind):
    case = CASES["batch_of_one"]()
    expected = build(case, likelihood, "block_diagonal", kind).to_dense()
    for sharing in ("expand", "reduce"):
        f = build(case, likelihood, "kfac", kind, weight_sharing=sharing)
        dense.assert_same(f.to_dense(), expected)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_deep_linear_kfac_is_block_diagonal(depth, width, samples, bias):
    torch.manual_seed(depth + 10 * width)
    sizes = [3, *[width] * (depth - 1), 2]
    model = nn.Sequential(
        *(nn.Linear(a, b, bias=bias) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    ).double()
    data = (normal(samples, 3), normal(samples, 2, seed=1))
    expected = fisher_matrix(model, data, "gaussian", "block_diagonal").to_dense()
    dense.assert_same(fisher_matrix(model, data, "gaussian", "kfac").to_dense(), expected)


def test_deep_linear_kfac_with_shared_weights():
    """Expand is exact for a loss summed over positions, reduce for positions averaged at the end.

    Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
    architectures (2023), propositions 1 and 2.
    """
    torch.manual_seed(0)
    body = [nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2)]
    x = normal(4, 5, 3)
    for model, sharing, other, shape in (
        (nn.Sequential(*body), "expand", "reduce", (4, 5, 2)),
        (nn.Sequential(*body, MeanPool()), "reduce", "expand", (4, 2)),
    ):
        model = copy.deepcopy(model).double()
        data = (x, normal(*shape, seed=1))
        exact = fisher_matrix(model, data, "gaussian", "block_diagonal").to_dense()
        right = fisher_matrix(model, data, "gaussian", "kfac", weight_sharing=sharing).to_dense()
        wrong = fisher_matrix(model, data, "gaussian", "kfac", weight_sharing=other).to_dense()
        dense.assert_same(right, exact)
        assert (wrong - exact).norm() > 1e-2 * exact.norm()


# -- invariance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 60, 200])
def test_batches_of_any_size_and_order_add_up(structure, kind, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", chunk)
    for name in ("mlp", "conv2d"):
        case = CASES[name]()
        x, y = normal(7, *case.x.shape[1:], seed=4), labels(7, 3, 5)
        together = fisher_matrix(case.model, (x, y), "categorical", structure, kind).to_dense()
        eye = torch.eye(len(together), dtype=torch.float64)
        splits = [[4, 3], [3, 4], [1, 5, 1], [7]]
        for sizes in splits:
            batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
            for data in (batches, batches[::-1]):
                parts = fisher_matrix(case.model, iter(data), "categorical", structure, kind)
                dense.assert_same(parts.to_dense(), together)
                vector = normal(len(together), seed=6)
                expected = torch.linalg.solve(together + 0.1 * eye, vector)
                dense.assert_same(parts.solve(vector, 0.1), expected, 1e-8)
        order = torch.randperm(7, generator=generator(8))
        shuffled = fisher_matrix(case.model, (x[order], y[order]), "categorical", structure, kind)
        dense.assert_same(shuffled.to_dense(), together)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_with_masked_events_add_up(structure):
    case = CASES["tokens"]()
    x, y = normal(6, 4, 3, seed=1), torch.randint(0, 3, (6, 4), generator=generator(2))
    y[torch.rand(6, 4, generator=generator(3)) < 0.4] = -100
    whole = fisher_matrix(case.model, (x, y), structure=structure).to_dense()
    halves = fisher_matrix(case.model, [(x[:2], y[:2]), (x[2:], y[2:])], structure=structure)
    dense.assert_same(halves.to_dense(), whole)


# -- events that are ignored, weighted or smoothed -------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 60])
@pytest.mark.parametrize("name", ["tokens", "pixels", "mixed_pixels", "conv2d"])
def test_masks_weights_and_smoothing(name, structure, kind, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", chunk)
    case = CASES[name]()
    y = case.target("categorical")
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    masked = y.clone()
    masked.view(-1)[::3] = -100
    for target, options in (
        (masked, {}),
        (y, {"weight": weights}),
        (masked, {"weight": weights, "label_smoothing": 0.1}),
    ):
        loss = dense.categorical(case.class_dim, **options)
        likelihood = Categorical(
            class_weights=options.get("weight"),
            label_smoothing=options.get("label_smoothing", 0.0),
        )
        f = fisher_matrix(case.model, (case.x, target), likelihood, structure, kind)
        if structure == "kfac":
            expected = dense.kfac(
                case.model, case.x, target, loss, case.blocks, kind,
                skip_silent=target is masked,
            )  # fmt: skip
        else:
            expected = dense.fisher(case.model, case.x, target, loss, kind, computed=case.jacobian)
            expected = dense.structured(expected, structure, case.model, case.blocks)
        dense.assert_same(f.to_dense(), expected)


def test_class_dim_and_missing_targets():
    case = CASES["tokens"]()
    y = case.target("categorical")
    moved = nn.Sequential(case.model, nn.Unflatten(2, (3, 1)), Squeeze())
    f = fisher_matrix(moved, (case.x, y), Categorical(class_dim=1), "full")
    expected = case.fisher("categorical", "exact")[1]
    dense.assert_same(f.to_dense(), expected)
    without = fisher_matrix(case.model, (case.x, None), "categorical", "full")
    dense.assert_same(without.to_dense(), expected)


class Squeeze(nn.Module):
    """(N, T, C, 1) to (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1).mT


# -- Monte Carlo -----------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_monte_carlo_is_exact_in_expectation(name, likelihood):
    case = CASES[name]()
    exact = case.fisher(likelihood, "exact")[1]
    y = case.target(likelihood)
    runs = torch.stack(
        [
            fisher_matrix(
                case.model,
                (case.x, y),
                likelihood,
                "full",
                seed=seed,
                fisher=natgrad.MonteCarloFisher(20),
            ).to_dense()
            for seed in range(40)
        ]
    )
    error = (runs.mean(0) - exact).abs()
    deviation = runs.std(0) / len(runs) ** 0.5
    z_scores = error / (deviation + 1e-12 * exact.abs().max())
    # Over a thousand distinct entries: 5.5 standard errors of a mean of 40 are very rare.
    assert z_scores.max() < 5.5
    traces = runs.diagonal(dim1=1, dim2=2).sum(1)
    assert (traces.mean() - exact.trace()).abs() < 4 * traces.std() / len(runs) ** 0.5
    relative = (runs.mean(0) - exact).norm() / exact.norm()
    assert relative < 0.15


@pytest.mark.parametrize("structure", STRUCTURES)
def test_monte_carlo_error_falls_with_draws(structure):
    case = CASES["mlp"]()
    exact = build(case, "categorical", structure).to_dense()
    few = build(case, "categorical", structure, seed=1, kind=natgrad.MonteCarloFisher(2)).to_dense()
    many = build(
        case, "categorical", structure, seed=1, kind=natgrad.MonteCarloFisher(2000)
    ).to_dense()
    again = build(
        case, "categorical", structure, seed=1, kind=natgrad.MonteCarloFisher(2)
    ).to_dense()
    other = build(
        case, "categorical", structure, seed=2, kind=natgrad.MonteCarloFisher(2)
    ).to_dense()
    assert torch.equal(few, again) and not torch.equal(few, other)
    assert (many - exact).norm() < 0.12 * exact.norm()
    assert (many - exact).norm() < 0.3 * (few - exact).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_monte_carlo_of_weighted_and_averaged_losses(reduction):
    case = CASES["mlp"]()
    weights = torch.tensor([0.3, 3.0, 1.0], dtype=torch.float64)
    for criterion, y in (
        (nn.CrossEntropyLoss(weights, label_smoothing=0.2), case.target("categorical")),
        (nn.BCEWithLogitsLoss(reduction=reduction), case.target("bernoulli")),
        (nn.PoissonNLLLoss(reduction=reduction), case.target("poisson")),
        (nn.MSELoss(reduction=reduction), case.target("gaussian")),
    ):
        data = (case.x, y)
        exact = fisher_matrix(case.model, data, criterion, "full").to_dense()
        mc = fisher_matrix(
            case.model, data, criterion, "full", fisher=natgrad.MonteCarloFisher(4000)
        ).to_dense()
        assert (mc - exact).norm() < 0.1 * exact.norm()


# -- what a Fisher matrix leaves alone -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_nothing_of_the_users_is_disturbed(kind):
    case = CASES["batch_norm_train"]()
    model = nn.Sequential(copy.deepcopy(case.model), nn.Dropout(0.5))
    model.train()
    model(case.x).sum().backward()
    model[0][5].eval()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    data = (case.x, case.target("categorical"))
    fisher_matrix(model, data, "categorical", "block_diagonal", kind)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_it_works_without_gradients_enabled():
    case = CASES["mlp"]()
    with torch.no_grad():
        f = build(case, "categorical", "block_diagonal").to_dense()
    dense.assert_same(f, expected_matrix(case, "categorical", "block_diagonal", "exact"))
    assert not f.requires_grad


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(structure, dtype):
    case = CASES["mlp"]()
    model, x = copy.deepcopy(case.model).to(dtype), case.x.to(dtype)
    y = case.target("categorical")
    f = fisher_matrix(model, (x, y), "categorical", structure)
    reference = copy.deepcopy(model).double()
    expected = fisher_matrix(reference, (x.double(), y), "categorical", structure).to_dense()
    actual = f.to_dense()
    assert actual.dtype == torch.float32
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    vector = normal(len(expected), seed=1).float()
    assert f.solve(vector, 0.1).dtype == torch.float32


# -- block-tridiagonal specials --------------------------------------------------------------------


def deep_net(depth: int, width: int = 8) -> nn.Module:
    torch.manual_seed(depth)
    layers: list[nn.Module] = [nn.Linear(6, width)]
    for _ in range(depth - 2):
        layers += [nn.Tanh(), nn.Linear(width, width)]
    if depth > 1:
        layers += [nn.Tanh(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("depth", [1, 3, 4, 6])
def test_tridiagonal_solves_other_depths_without_damping(depth):
    """With fewer rows than parameters in every layer: least-norm solution on the rows' span."""
    model = deep_net(depth)
    data = (normal(3, 6), normal(3, 1 if depth > 1 else 8, seed=1))
    f = fisher_matrix(model, data, "gaussian", "block_tridiagonal")
    matrix = f.to_dense()
    vector = matrix @ normal(len(matrix), seed=2)
    dense.assert_same(matrix @ f.solve(vector), vector, 1e-6)


@pytest.mark.parametrize("depth", [2, 5, 8])
def test_tridiagonal_names_the_depth_it_cannot_solve(depth):
    model = deep_net(depth)
    data = (normal(3, 6), normal(3, 1, seed=1))
    f = fisher_matrix(model, data, "gaussian", "block_tridiagonal")
    vector = f.to_dense() @ normal(f.shape[0], seed=2)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{depth}\b.*damping") as error:
        f.solve(vector)
    assert "\n" not in str(error.value)
    damped = f.solve(vector, 0.01)
    eye = torch.eye(len(vector), dtype=torch.float64)
    dense.assert_same(damped, torch.linalg.solve(f.to_dense() + 0.01 * eye, vector), 1e-7)


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_clear():
    case = CASES["mlp"]()
    data = (case.x, case.target("categorical"))
    for options, kind, words in (
        ({"structure": "kronecker"}, ValueError, "block_diagonal"),
        ({"fisher": "true"}, ValueError, "empirical"),
        ({"likelihood": "softmax"}, ValueError, "categorical"),
        ({"structure": "unknown"}, ValueError, "kfac"),
        ({"weight_sharing": "both"}, ValueError, "reduce"),
        ({"damping_rule": "none"}, TypeError, "damping_rule"),
        ({"structure": "full", "weight_sharing": "reduce"}, TypeError, "weight_sharing"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ):
        with pytest.raises(kind, match=words):
            fisher_matrix(case.model, data, **options)
    with pytest.raises(ValueError, match="no batches"):
        fisher_matrix(case.model, [])
    with pytest.raises(ValueError, match="targets"):
        fisher_matrix(case.model, (case.x, None), fisher="empirical")
    with pytest.raises((ValueError, TypeError), match="pair"):
        fisher_matrix(case.model, [case.x])
    with pytest.raises(ValueError, match="depend"):
        fisher_matrix(case.model, data, output=lambda out: out.detach())
    frozen = copy.deepcopy(case.model).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        fisher_matrix(frozen, data)
    dropout = nn.Sequential(nn.LSTM(3, 3, 2, dropout=0.5), nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match="dropout.*eval"):
        fisher_matrix(dropout, data)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_vectors_are_checked(structure):
    f = build(CASES["mlp"](), "categorical", structure)
    size = f.shape[0]
    vector = normal(size)
    for wrong, kind in (
        (normal(size + 1), ValueError),
        (normal(2, size), ValueError),
        (normal(size, 1, 1), ValueError),
        ({"0.weight": normal(5, 3)}, ValueError),
        ([1.0] * size, TypeError),
    ):
        with pytest.raises(kind):
            f.solve(wrong, 0.1)
        with pytest.raises(kind):
            f @ wrong
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            f.solve(vector, damping)
        with pytest.raises(ValueError, match="damping"):
            f.logdet(damping)
    assert "mlp" not in repr(f) and str(size) in repr(f) and structure in repr(f)


def test_likelihood_objects_of_ones_own():
    """A user's likelihood with curvature twice the Gaussian's gives twice its Fisher matrix."""

    class Twice(Likelihood):
        def nll(self, output, target):
            return (output - target).square().sum(1)

        def gradient(self, output, target):
            return 2 * (output - target)

        def output_hessian_root(self, output, target=None):
            eye = torch.eye(output.shape[1], dtype=output.dtype)
            return (2**0.5 * eye).expand(len(output), 1, *eye.shape)

        def sample(self, output, generator=None):
            return output + 0.5**0.5 * torch.randn(output.shape, generator=generator).to(output)

    case = CASES["mlp"]()
    data = (case.x, case.target("gaussian"))
    for structure in STRUCTURES:
        mine = fisher_matrix(case.model, data, Twice(), structure).to_dense()
        theirs = fisher_matrix(case.model, data, Gaussian(0.5), structure).to_dense()
        dense.assert_same(mine, theirs)


# -- random architectures --------------------------------------------------------------------------


@st.composite
def stacks(draw):
    """A random stack of linear layers and nonlinearities, with data."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers, specs = [], []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        bias = draw(st.booleans())
        specs.append(rows(str(len(layers)), *(["weight", "bias"] if bias else ["weight"])))
        layers += [nn.Linear(a, b, bias=bias), draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU]))()]
    model = nn.Sequential(*layers[:-1]).double()
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    x = normal(draw(st.integers(1, 4)), *lead, sizes[0], seed=draw(st.integers(0, 100)))
    return Case(model, x, tuple(specs))


@given(stacks(), st.sampled_from(["gaussian", "bernoulli", "poisson"]), st.sampled_from(KINDS))
def test_random_stacks(case: Case, likelihood: str, kind: str):
    for structure in EXACT_STRUCTURES:
        f = build(case, likelihood, structure, kind)
        expected = expected_matrix(case, likelihood, structure, kind)
        torch.testing.assert_close(f.to_dense(), expected, rtol=1e-9, atol=1e-12)
    for sharing in ("expand", "reduce"):
        f = build(case, likelihood, "kfac", kind, weight_sharing=sharing)
        expected = dense.kfac(
            case.model, case.x, case.target(likelihood), case.loss(likelihood), case.blocks, kind,
            sharing=sharing,
        )  # fmt: skip
        torch.testing.assert_close(f.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_unknown_module_blocks_match_attention_in_eval_mode():
    """Dropout in attention and elsewhere is off in evaluation mode."""
    torch.manual_seed(0)
    model = Attention(False, dropout=0.5).double().eval()
    specs = (
        BlockSpec(("attention.in_proj_weight", "attention.in_proj_bias"), "attention"),
        rows("attention.out_proj"),
        rows("head"),
    )
    case = Case(model, normal(3, 3, 4), specs)
    f = build(case, "categorical", "block_diagonal")
    dense.assert_same(f.to_dense(), expected_matrix(case, "categorical", "block_diagonal", "exact"))


def test_matrices_that_cannot_fit_memory_are_refused_before_they_are_tried():
    cpu = torch.device("cpu")
    linalg.check_memory(1000, 2, torch.float32, cpu)
    with pytest.raises(ValueError, match="smaller batch, fisher='mc', or structure 'kfac'"):
        linalg.check_memory(10**7, 2, torch.float32, cpu)


def test_singular_tridiagonal_systems_are_an_error_with_a_remedy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 2)).double()
    inputs = torch.ones(4, 60, dtype=torch.float64)  # Four times the same sample.
    f = fisher_matrix(
        model, (inputs, torch.zeros(4, dtype=torch.long)), structure="block_tridiagonal"
    )
    with pytest.raises(ValueError, match="change the damping, or use structure 'block_diagonal'"):
        f.solve(torch.ones(f.shape[0], dtype=torch.float64), damping=1e-300)
