"""Two-level K-FAC against dense matrices: K-FAC's inverse, the exact Fisher, the coarse formula."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import Capture
from natgrad.curvature import Curvature
from natgrad.curvature.cost import Workload
from natgrad.fisher import estimation as fisher_module
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import DenseJacobian, LinearJacobian
from natgrad.likelihoods import Categorical, Likelihood
from natgrad.operators import GradientSource
from natgrad.optim import KFAC, TwoLevelKFAC
from tests import dense, pairwise
from tests.cases import CASES, Case, generator, labels, normal
from tests.curvature.structures_table import TABLE, problem
from tests.curvature.test_structures import build
from tests.dense_two_level import coarse_basis, damped, two_level
from tests.methods import curvature_of, make_optimizer
from tests.state import flat

SPACES = ["nicolaides", "spectral", "residual", "krylov"]
FORMS = ["residual", "additive"]
DAMPING = 0.05


def estimated(case: Case, likelihood: Likelihood | None = None, **options) -> Curvature:
    """Return the estimate of a case's Fisher matrix from its batch."""
    likelihood = Categorical() if likelihood is None else likelihood
    with Capture(case.model, case.output) as capture:
        curvature = curvature_of("two_level", capture, **options)
        dense.call(case.model, case.x, case.output)
        output = capture.passes[-1].output
        rows = capture.pull_back(output, likelihood.root_vectors(output.detach()))
        curvature.update(rows, rows.samples)
    return curvature


def natural_gradient(curvature: Curvature, gradient: Tensor) -> Tensor:
    """Return the flat natural gradient by the last inverses."""
    source = GradientSource(curvature.layout.to_dict(gradient))
    return curvature.layout.to_flat(curvature.natural_gradient(source))


# -- the solution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", list(CASES))
def test_galerkin_property_and_error(name, space):
    """For every layer kind: nothing is left of the residual in the coarse space."""
    given = problem(name)
    case, f = given.case, given.fisher
    gradient = normal(len(f), seed=5)
    entry = TABLE["two_level" if space == "nicolaides" else f"two_level[{space}]"]
    found, one_level = entry.build(given), TABLE["kfac"].build(given)
    matrix = damped(f, DAMPING)
    inverse = one_level.solve(torch.eye(len(f), dtype=f.dtype), DAMPING)
    indices = dense.block_indices(case.model, case.blocks)
    kfac = one_level.to_dense()
    r = coarse_basis(space, gradient, f, kfac, inverse, DAMPING, indices, found)
    r = r / r.norm(dim=0).clamp(min=1e-300)
    solution = found.solve(gradient, DAMPING)
    left = r.T @ (gradient - matrix @ solution)
    assert left.abs().max() <= 1e-9 * gradient.norm()
    exact = torch.linalg.solve(matrix, gradient)
    errors = [u - exact for u in (solution, inverse @ gradient)]
    corrected, plain = ((e @ matrix @ e).sqrt() for e in errors)
    assert corrected <= plain * (1 + 1e-9)


@given(
    seed=st.integers(0, 10**6),
    space=st.sampled_from(SPACES),
    damping=st.sampled_from([1e-6, 1e-3, 0.1, 10.0]),
    factored=st.booleans(),
    width=st.integers(1, 5),
)
def test_error_is_never_above_that_of_kfac(seed, space, damping, factored, width):
    g = generator(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    ).double()
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    data = (x, None)
    f = damped(fisher_matrix(model, data, "gaussian", "full").to_dense(), damping)
    gradient = torch.randn(len(f), generator=g, dtype=torch.float64)
    exact = torch.linalg.solve(f, gradient)
    errors = []
    for structure, options in (("kfac", {}), ("two_level", {"coarse_space": space})):
        found = fisher_matrix(
            model, data, "gaussian", structure, factored_damping=factored, **options
        )
        error = found.solve(gradient, damping) - exact
        errors.append((error @ f @ error).sqrt())
    scale = (exact @ f @ exact).sqrt()
    assert errors[1] <= errors[0] + 1e-8 * scale
    if space == "krylov":  # M⁻¹g is in the space, and so is no step at all.
        assert errors[1] <= scale * (1 + 1e-8)
        assert gradient @ (exact + error) >= -1e-8 * scale**2


@pytest.mark.parametrize(
    ("model", "space"),
    [
        (nn.Sequential(nn.Linear(1, 1, bias=False)), "nicolaides"),
        (nn.Sequential(nn.Linear(1, 1, bias=False)), "spectral"),
        (nn.Sequential(nn.Linear(1, 1)), "krylov"),
        (
            nn.Sequential(
                nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False), nn.Tanh(),
                nn.Linear(1, 1, bias=False),
            ),
            "nicolaides",
        ),
    ],
)  # fmt: skip
def test_coarse_space_that_is_the_whole_space_gives_the_exact_solution(model, space):
    model = copy.deepcopy(model).double()
    x = normal(5, 1)
    found = fisher_matrix(model, (x, None), "gaussian", "two_level", coarse_space=space)
    exact = fisher_matrix(model, (x, None), "gaussian", "full")
    gradient = normal(found.shape[0], seed=1)
    dense.assert_same(found.solve(gradient, 0.3), exact.solve(gradient, 0.3))


@pytest.mark.parametrize("space", SPACES)
def test_refreshed_inverses_with_factored_damping_are_those_of_the_matrix(space):
    for name in ("mlp", "conv2d", "embedding", "tied_embedding", "self_attention", "generic"):
        found = estimated(CASES[name](), coarse_space=space, factored_damping=True)
        gradient = normal(found.layout.numel)
        found.refresh(0.4)
        dense.assert_same(natural_gradient(found, gradient), found.matrix().solve(gradient, 0.4))


def test_without_rows_the_inner_product_is_the_quadratic_form():
    with Capture(CASES["mlp"]().model) as capture:
        found = curvature_of("two_level", capture, coarse_space="spectral")
    gradients = found.layout.to_dict(normal(found.layout.numel))
    assert float(found.quadratic(gradients, torch.tensor(-2.0))) == 2.0


@pytest.mark.parametrize("space", SPACES)
def test_rows_in_several_batches_and_chunks(space, monkeypatch):
    case = CASES["mlp"]()
    batches = [(normal(n, 3, seed=n), labels(n, 3, n)) for n in (3, 5)]
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    options = {"structure": "two_level", "coarse_space": space}
    vector = normal(build(case, "categorical", "kfac").shape[0])
    whole = fisher_matrix(case.model, joined, **options).solve(vector, DAMPING)
    dense.assert_same(fisher_matrix(case.model, batches, **options).solve(vector, DAMPING), whole)
    monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", 1)
    chunked = fisher_matrix(case.model, batches, **options)
    assert len(chunked.coarse.pieces) == 6
    dense.assert_same(chunked.solve(vector, DAMPING), whole)


# -- rows ------------------------------------------------------------------------------------------


def test_rows_are_kept_in_the_smaller_form():
    wide = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    kept = fisher_matrix(wide, (normal(3, 9), None), "gaussian", "two_level", "mc").coarse.pieces[
        0
    ][1]
    assert all(type(block) is LinearJacobian for block in kept.values())
    image = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2 * 7 * 7, 2)).double()
    data = (normal(3, 1, 8, 8), None)
    kept = fisher_matrix(image, data, "gaussian", "two_level", "mc").coarse.pieces[0][1]
    assert [type(block) for block in kept.values()] == [DenseJacobian, LinearJacobian]


@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding"])
def test_changes_in_place_do_not_reach_the_rows(name):
    case = CASES[name]()
    x = case.x.clone()
    found = fisher_matrix(case.model, (x, case.target("categorical")), structure="two_level")
    vector = normal(found.shape[0])
    before = found.solve(vector, DAMPING)
    x.zero_()
    assert torch.equal(found.solve(vector, DAMPING), before)


def test_layers_that_read_the_same_tensor_share_its_copy():
    found = build(CASES["cross_attention_other_sizes"](), "categorical", "two_level")
    assert found.coarse.pieces

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 30), nn.Linear(4, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    kept = fisher_matrix(Twice(), (torch.randn(3, 4), None), "gaussian", "two_level", "mc")
    a, b = kept.coarse.pieces[0][1].values()
    assert a.inputs.data_ptr() == b.inputs.data_ptr()


# -- degenerate input ------------------------------------------------------------------------------


@pairwise.parametrize(
    {
        "name": ["batch_of_one", "out_of_order", "detached", "frozen", "conv2d"],
        "damping": [0.0, 1e-12, 0.1],
        "form": FORMS,
        "space": SPACES,
    }
)
def test_never_nan(name, damping, form, space):
    """Singular coarse matrices, layers without rows, gradients of zero."""
    found = estimated(CASES[name](), coarse_space=space, form=form)
    found.refresh(damping)
    for gradient in (torch.zeros(found.layout.numel).double(), normal(found.layout.numel)):
        natural = natural_gradient(found, gradient)
        for solution in (found.matrix().solve(gradient, damping), natural):
            assert bool(torch.isfinite(solution).all())
            assert bool(gradient.any()) or not bool(solution.any())


def test_without_damping_the_coarse_level_is_a_pseudo_inverse():
    """Two blocks that do the same give a singular coarse matrix."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, data = Sum().double(), (normal(5, 2), None)
    found = fisher_matrix(model, data, "gaussian", "two_level")
    f = fisher_matrix(model, data, "gaussian", "full").to_dense()
    gradient = f @ normal(4)
    solution = found.solve(gradient, 0.0)
    ones = torch.zeros(4, 2, dtype=torch.float64)
    ones[:2, 0] = ones[2:, 1] = 1.0
    assert (ones.T @ (gradient - f @ solution)).abs().max() < 1e-12
    assert solution.norm() < 10 * gradient.norm()


def test_a_gradient_with_nan_stays_nan():
    for space in SPACES:
        found = estimated(CASES["mlp"](), coarse_space=space)
        found.refresh(0.1)
        vector = normal(found.layout.numel)
        vector[3] = float("nan")
        assert not bool(torch.isfinite(natural_gradient(found, vector)).all())
        assert not bool(torch.isfinite(found.matrix().solve(vector, 0.1)).all())


# -- training --------------------------------------------------------------------------------------


def train(optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        functional.cross_entropy(model(normal(4, 3, seed=step)), labels(4, 3, step)).backward()
        optimizer.step()


@pairwise.parametrize(
    {
        "factors, inverses, decay": [(1, 1, 0.0), (1, 3, 0.7), (2, 3, 0.7)],
        "space": SPACES,
        "form": FORMS,
    }
)
def test_life_cycle(factors, inverses, decay, space, form):
    """Steps with intervals against dense matrices: averaged factors, rows of the last update."""
    case = CASES["mlp"]()
    model, damping, lr = copy.deepcopy(case.model), 0.3, 0.2
    optimizer = make_optimizer(
        TwoLevelKFAC, model, lr=lr, damping=damping, momentum=0.0, fisher="exact", decay=decay,
        early=False, factors=factors, inverses=inverses, kl_clip=None, coarse_space=space,
        form=form,
    )  # fmt: skip
    indices = dense.block_indices(model, case.blocks)
    sums: list[list] = []
    inverse = kfac = f = None
    for step in range(7):
        x, y = normal(6, 3, seed=step), labels(6, 3, step)
        now = Case(copy.deepcopy(model), x, case.blocks)
        loss = functional.cross_entropy(now.model(x), y)
        gradients = torch.autograd.grad(loss, list(now.model.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients])
        if step % factors == 0:
            f = dense.fisher(now.model, x, y, now.loss("categorical"), "exact")
            pairs = dense.kfac_pairs(now.model, x, y, now.loss("categorical"), case.blocks)
            fresh = [[index, *group[0], 1.0] for index, group in pairs]
            if not sums:
                sums = fresh
            else:
                for old, new in zip(sums, fresh, strict=True):
                    for k in (1, 2, 3):
                        old[k] = decay * old[k] + new[k]
        if step % inverses == 0:
            means = [(index, [(a / weight, b / weight)]) for index, a, b, weight in sums]
            inverse = dense.pi_damped_inverse(len(f), means, damping)
            kfac = sum(dense.kron(len(f), index, group) for index, group in means)
        expected, _ = two_level(space, form, gradient, f, kfac, inverse, damping, indices)
        before = flat(model)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        dense.assert_same((before - flat(model)) / lr, expected, 1e-7)


SETTINGS = {"fisher": "mc", "factors": 2, "inverses": 3, "damping": 0.5}


def net() -> nn.Module:
    torch.manual_seed(1)
    return copy.deepcopy(CASES["mlp"]().model)


def test_a_state_of_other_layers_is_refused():
    model = net()
    optimizer = make_optimizer(TwoLevelKFAC, model, **SETTINGS)
    train(optimizer, model, range(1))
    other = TwoLevelKFAC(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    with pytest.raises(ValueError):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "improved"])
def test_every_fisher_type_and_uncovered_parameters(fisher):
    """The quadratic form sees the larger of inner product and exact form."""
    model = net()
    model[2].bias.requires_grad_(False)
    optimizer = TwoLevelKFAC(model, fisher=fisher)
    train(optimizer, model, range(3))
    curvature = optimizer.preconditioner.curvature
    layout, coarse = curvature.layout, curvature.matrix().coarse
    direction = layout.to_dict(normal(layout.numel))
    products = coarse.times(layout.to_column(direction))
    exact = float(products.square().sum() / coarse.count)
    found = curvature.quadratic(direction, torch.tensor(-0.5 * exact, dtype=torch.float64))
    assert float(found) == pytest.approx(exact)
    assert float(curvature.quadratic(direction, torch.tensor(1e9))) == pytest.approx(1e9)


def test_measured_learning_rate():
    model = net()
    optimizer = make_optimizer(TwoLevelKFAC, model, lr="isotropic", fisher="exact", factors=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(optimizer, model, range(3))
    assert bool(torch.isfinite(flat(model)).all())


def test_training_takes_the_krylov_space_and_the_matrix_all_ones():
    model = net()
    assert TwoLevelKFAC(model).preconditioner.curvature.structure.coarse_space == "krylov"
    assert build(CASES["mlp"](), "categorical", "two_level").coarse.space == "nicolaides"
    preconditioner = natgrad.Preconditioner(net(), structure="two_level")
    assert preconditioner.curvature.structure.coarse_space == "krylov"


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"coarse_space": "fine"}, ValueError),
        ({"form": "deflated"}, ValueError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error):
        build(CASES["mlp"](), "categorical", "two_level", **options)


@pytest.mark.parametrize("space", SPACES)
def test_costs_count_the_rows_kept(space):
    case = CASES["mlp"]()
    found = estimated(case, coarse_space=space)
    ((_, rows),) = found.matrix().coarse.pieces
    workload = Workload(rows.samples, rows.directions)
    costs = found.costs(workload)
    assert set(costs) == {*found.blocks, "all layers"}
    kept = sum(tensor.numel() for block in rows.values() for tensor in block.state().values())
    joint = costs["all layers"]
    assert joint.memory >= 8 * kept and joint.step > 0
    with Capture(case.model) as capture:
        plain = curvature_of("kfac", capture).costs(workload)
    assert all(costs[name] == plain[name] for name in plain)
    optimizer = make_optimizer(TwoLevelKFAC, copy.deepcopy(case.model), coarse_space=space)
    assert optimizer.summary().joint is not None
    assert optimizer.summary().memory > KFAC(copy.deepcopy(case.model)).summary().memory
