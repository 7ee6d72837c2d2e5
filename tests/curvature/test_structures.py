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
from natgrad.fisher import fisher_matrix
from natgrad.likelihoods import Categorical
from natgrad.statistics import KroneckerStatistics
from tests import dense
from tests.cases import CASES, Attention, BlockSpec, Case, MeanPool, normal, rows

LIKELIHOODS = ["categorical", "gaussian", "bernoulli", "poisson"]
KINDS = ["exact", "empirical"]


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
    for sharing in ("expand", "reduce", "split"):
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
    dense.assert_same(block, torch.kron(b.contiguous(), a.contiguous()) / scale)
    dense.assert_same(block.trace(), scale)


@pytest.mark.parametrize("share", [1e-3, 1e-7])
def test_factors_of_tied_weights_do_not_depend_on_how_much_is_left_of_their_sums(share):
    """As of a layer that was away for long, or of rows whose mean divides by a small trace."""
    one = torch.ones((), dtype=torch.float64)
    a, b = (x @ x.mT for x in (normal(2, 1, 3, 5), normal(2, 1, 4, 5, seed=1)))
    further = KroneckerStatistics(one, a[1], 3 * one, b[1])
    sums = KroneckerStatistics(one, a[0], 5 * one, b[0], further=further)
    for found, expected in zip(sums.scaled(share).mean_factors(), sums.mean_factors(), strict=True):
        torch.testing.assert_close(found, expected)


# -- limits ----------------------------------------------------------------------------------------


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

    Split is exact for both. Eschenhagen et al., Kronecker-factored approximate curvature for modern
    neural network architectures (2023), propositions 1 and 2.
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
        split = fisher_matrix(model, data, "gaussian", "kfac", weight_sharing="split").to_dense()
        dense.assert_same(right, exact)
        dense.assert_same(split, exact)
        assert (wrong - exact).norm() > 1e-2 * exact.norm()


# -- events that are ignored, weighted or smoothed -------------------------------------------------


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
        ({"weight_sharing": "both"}, ValueError, "split"),
        ({"structure": "tkfac", "weight_sharing": "split"}, ValueError, "'expand' or 'reduce'"),
        ({"structure": "tekfac", "weight_sharing": "split"}, ValueError, "'expand' or 'reduce'"),
        ({"structure": "foof", "weight_sharing": "split"}, ValueError, "'expand' or 'reduce'"),
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


# -- random architectures --------------------------------------------------------------------------


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
