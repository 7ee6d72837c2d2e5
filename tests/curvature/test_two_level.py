"""Two-level K-FAC against dense matrices: K-FAC's inverse, the exact Fisher, the coarse formula."""

from __future__ import annotations

import copy
import io
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
from natgrad.likelihoods import Categorical, Gaussian, Likelihood
from natgrad.operators import GradientSource
from natgrad.operators.coarse_level import leading_eigenvector as found_eigenvector
from natgrad.optim import KFAC, TwoLevelKFAC
from tests import dense
from tests.cases import CASES, Case, generator, normal
from tests.curvature.test_structures import build, labels
from tests.methods import curvature_of, make_optimizer

FACTORED = [name for name in CASES if CASES[name]().has_kfac]
SPACES = ["nicolaides", "spectral", "residual", "krylov"]
FORMS = ["residual", "additive"]
LINEAR = ["nicolaides", "spectral"]
DAMPING = 0.05


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def coarse_basis(
    space: str, gradient: Tensor, f: Tensor, kfac: Tensor, inverse: Tensor, damping, indices,
    found=None,
) -> Tensor:  # fmt: skip
    """Return R, (P, m), for blocks that F reaches, given by their flat indices.

    Where the leading eigenvalue of a block of K-FAC's matrix is not simple, which of its
    eigenvectors is taken is up to the structure ``found``.
    """
    first = inverse @ gradient
    if space == "residual":
        wholes = [inverse @ (gradient - damped(f, damping) @ first)]
    elif space == "krylov":
        wholes = [first, inverse @ (f @ first)]
    else:
        wholes = [torch.ones_like(gradient)]
    columns = []
    for index in indices:
        i = index.flatten()
        if not bool(f.diagonal()[i].any()):
            continue
        for whole in wholes:
            column = torch.zeros_like(gradient)
            if space == "spectral":
                column[i] = leading_eigenvector(kfac, i, found)
            else:
                column[i] = whole[i]
            columns.append(column)
    return torch.stack(columns, 1)


def leading_eigenvector(kfac: Tensor, index: Tensor, found) -> Tensor:
    block = kfac[index.unsqueeze(1), index]
    values, vectors = torch.linalg.eigh(block)
    if len(values) == 1 or values[-1] - values[-2] > 1e-6 * values[-1]:
        return vectors[:, -1]
    assert found is not None
    whole = torch.zeros(len(kfac), 1, dtype=kfac.dtype)
    coarse = found.coarse
    basis = coarse.fixed_basis(lambda name: found_eigenvector(found.parts[name]))
    for name, vector in basis.items():
        found.layout.scatter(coarse.blocks[name], vector, whole)
    vector = whole[index, 0]
    dense.assert_same(block @ vector, values[-1] * vector)
    return vector


def two_level(
    space: str, form: str, gradient: Tensor, f: Tensor, kfac: Tensor, inverse: Tensor, damping,
    indices, found=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the solution and R by dense algebra; columns of R are scaled to length 1."""
    r = coarse_basis(space, gradient, f, kfac, inverse, damping, indices, found)
    norms = r.norm(dim=0)
    r = r[:, norms > 0] / norms[norms > 0]
    matrix = damped(f, damping)
    first = inverse @ gradient
    right = gradient if form == "additive" else gradient - matrix @ first
    coarse = torch.linalg.pinv(r.T @ matrix @ r, hermitian=True, rtol=1e-13)
    return first + r @ (coarse @ (r.T @ right)), r


def dense_matrices(case: Case, kind: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """Return the Fisher matrix, K-FAC's and the inverse of that, damped."""
    y, f = case.fisher("categorical", kind)
    kfac = dense.kfac(
        case.model, case.x, y, case.loss("categorical"), case.blocks, kind, output=case.output
    )
    return f, kfac, torch.linalg.inv(damped(kfac, DAMPING))


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
@pytest.mark.parametrize("name", FACTORED)
def test_dense_formula(name, space):
    case = CASES[name]()
    indices = dense.block_indices(case.model, case.blocks)
    for kind in ("exact", "empirical"):
        f, kfac, inverse = dense_matrices(case, kind)
        gradient = normal(len(f), seed=4)
        for form in FORMS:
            found = build(case, "categorical", "two_level", kind, coarse_space=space, form=form)
            expected, _ = two_level(
                space, form, gradient, f, kfac, inverse, DAMPING, indices, found
            )
            dense.assert_same(found.solve(gradient, DAMPING), expected, 1e-8)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", list(CASES))
def test_galerkin_property_and_error(name, space):
    """For every layer kind: nothing is left of the residual in the coarse space."""
    case = CASES[name]()
    _, f = case.fisher("categorical", "exact")
    gradient = normal(len(f), seed=5)
    found = build(case, "categorical", "two_level", coarse_space=space)
    one_level = build(case, "categorical", "kfac")
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
def test_several_columns_are_solved_one_by_one(space):
    found = build(CASES["mlp"](), "categorical", "two_level", coarse_space=space)
    columns = normal(found.shape[0], 3)
    single = [found.solve(column, DAMPING) for column in columns.T]
    dense.assert_same(found.solve(columns, DAMPING), torch.stack(single, 1))
    named = found.layout.to_dict(columns[:, 0])
    dense.assert_same(found.layout.to_flat(found.solve(named, DAMPING)), single[0])


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_embedding"])
def test_the_matrix_is_that_of_kfac(name):
    found, kfac = (build(CASES[name](), "categorical", s) for s in ("two_level", "kfac"))
    assert torch.equal(found.to_dense(), kfac.to_dense())
    assert torch.equal(found.eigenvalues(), kfac.eigenvalues())
    assert torch.equal(found.diagonal(), kfac.diagonal())
    assert found.trace() == kfac.trace() and found.logdet(0.1) == kfac.logdet(0.1)
    vector = normal(found.shape[0])
    assert torch.equal(found @ vector, kfac @ vector)
    assert "two_level" in repr(found)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_refreshed_inverses_are_those_of_the_matrix(space, factored):
    for name in ("mlp", "conv2d", "embedding", "tied_embedding", "self_attention", "generic"):
        found = estimated(CASES[name](), coarse_space=space, factored_damping=factored)
        gradient = normal(found.layout.numel)
        found.refresh(0.4)
        dense.assert_same(natural_gradient(found, gradient), found.matrix().solve(gradient, 0.4))


@pytest.mark.parametrize("space", LINEAR)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv2d", "embedding", "tied_linear", "generic"])
def test_function_space_map(name, form, space):
    case = CASES[name]()
    capture = Capture(case.model, case.output)
    dense.call(case.model, case.x, case.output)
    output = capture.passes[-1].output
    jacobians = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
    found = build(case, "gaussian", "two_level", coarse_space=space, form=form)
    shares = found.function_space_map(jacobians, damping=0.7)
    jacobian = jacobians.to_dense()
    columns = found.solve(jacobian.T.contiguous(), 0.7)
    dense.assert_same(sum(shares.values()), jacobian @ columns, 1e-8)
    for layer, share in shares.items():
        index = torch.cat([torch.arange(s.start, s.stop) for s in found.layout.slices(
            found.coarse.blocks[layer])])  # fmt: skip
        dense.assert_same(share, jacobian[:, index] @ columns[index], 1e-7)


@pytest.mark.parametrize("space", ["residual", "krylov"])
def test_no_function_space_map_where_the_operator_is_not_linear(space):
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        output = case.model(case.x)
        jacobians = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
    found = build(case, "gaussian", "two_level", coarse_space=space)
    with pytest.raises(ValueError, match="depends on the gradient"):
        found.function_space_map(jacobians, damping=0.1)


@pytest.mark.parametrize("space", SPACES)
def test_every_block_may_have_its_own_damping(space):
    case = CASES["mlp"]()
    curvature = estimated(case, coarse_space=space)
    values = dict(zip(curvature.blocks, (0.01, 0.3, 2.0), strict=True))
    curvature.refresh(values)
    f, kfac, _ = dense_matrices(case)
    indices = dense.block_indices(case.model, case.blocks)
    shift = torch.zeros(len(f), dtype=f.dtype)
    for index, value in zip(indices, values.values(), strict=True):
        shift[index] = value
    gradient = normal(len(f))
    inverse = torch.linalg.inv(kfac + torch.diag(shift))
    # With the damping inside F, what is left is undamped.
    expected, _ = two_level(
        space if space != "krylov" else "nicolaides", "residual", gradient,
        f + torch.diag(shift), kfac, inverse, 0.0, indices,
    )  # fmt: skip
    natural = natural_gradient(curvature, gradient)
    dense.assert_same(curvature.matrix().inverse(values) @ gradient, natural)
    if space != "krylov":
        dense.assert_same(natural, expected, 1e-8)
    else:
        first = inverse @ gradient
        vectors = [first, inverse @ (f @ first)]
        r = torch.zeros(len(f), 6, dtype=f.dtype)
        for number, index in enumerate(indices):
            for k, vector in enumerate(vectors):
                r[index, 2 * number + k] = vector[index]
        left = r.T @ (gradient - (f + torch.diag(shift)) @ natural)
        assert (left / r.norm(dim=0)).abs().max() <= 1e-9 * gradient.norm()


@pytest.mark.parametrize("space", SPACES)
def test_parts_may_be_refreshed_one_by_one(space):
    found, other = (estimated(CASES["mlp"](), coarse_space=space) for _ in range(2))
    found.refresh(0.4)
    for name in other.parts:
        other.refresh(0.4, [name])
    gradient = normal(found.layout.numel)
    assert torch.equal(natural_gradient(found, gradient), natural_gradient(other, gradient))


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


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("name", ["batch_of_one", "out_of_order", "detached", "frozen", "conv2d"])
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


def test_before_any_update():
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        found = curvature_of("two_level", capture, coarse_space="spectral")
    vector = normal(found.layout.numel)
    assert torch.equal(natural_gradient(found, vector), vector)
    found.refresh(0.1)
    assert torch.equal(natural_gradient(found, vector), vector)
    dense.assert_same(found.matrix().solve(vector, 0.5), 2 * vector)
    gradients = found.layout.to_dict(vector)
    assert float(found.quadratic(gradients, torch.tensor(-2.0))) == 2.0


@pytest.mark.parametrize("space", SPACES)
def test_batches_with_nan_are_left_out(space, monkeypatch):
    case = CASES["mlp"]()
    good, other = ((normal(*case.x.shape, seed=s), labels(len(case.x), 3, s)) for s in (0, 1))
    bad = (good[0] * float("nan"), good[1])
    vector = normal(build(case, "categorical", "kfac").shape[0])
    for _ in range(2):
        found, expected = (
            fisher_matrix(case.model, data, structure="two_level", coarse_space=space)
            for data in ([good, bad, other], [good, other])
        )
        assert torch.equal(found.solve(vector, 0.1), expected.solve(vector, 0.1))
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", 1)


def test_a_gradient_with_nan_stays_nan():
    for space in SPACES:
        found = estimated(CASES["mlp"](), coarse_space=space)
        found.refresh(0.1)
        vector = normal(found.layout.numel)
        vector[3] = float("nan")
        assert not bool(torch.isfinite(natural_gradient(found, vector)).all())
        assert not bool(torch.isfinite(found.matrix().solve(vector, 0.1)).all())


# -- training --------------------------------------------------------------------------------------


def train(optimizer, model: nn.Module, steps: range, x_like: Tensor, classes: int = 3) -> None:
    for step in steps:
        optimizer.zero_grad()
        n = len(x_like)
        if x_like.is_floating_point():
            x = normal(*x_like.shape, seed=step)
        else:
            x = torch.randint(0, 5, x_like.shape, generator=generator(step))
        functional.cross_entropy(model(x), labels(n, classes, step)).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("factors", "inverses", "decay"), [(1, 1, 0.0), (1, 3, 0.7), (2, 3, 0.7)])
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


def net(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    if kind == "mlp":
        return copy.deepcopy(CASES["mlp"]().model), normal(4, 3)
    if kind == "convolution":
        layers = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 16, 3)]
        return nn.Sequential(*layers).double(), normal(4, 1, 5, 5)
    layers = [nn.Embedding(5, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double(), torch.zeros(4, 2, dtype=torch.long)


@pytest.mark.parametrize("kind", ["mlp", "convolution", "embedding"])
@pytest.mark.parametrize("space", SPACES)
def test_state_dict_round_trip(space, kind):
    """A resumed run goes on bit for bit, also between updates and between refreshes."""
    for saved_at in (1, 2, 3, 4):
        model, x = net(kind)
        optimizer = make_optimizer(TwoLevelKFAC, model, coarse_space=space, **SETTINGS)
        train(optimizer, model, range(saved_at), x)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        twin, _ = net(kind)
        twin.load_state_dict(state["model"])
        other = make_optimizer(TwoLevelKFAC, twin, coarse_space=space, **SETTINGS)
        other.load_state_dict(state["optimizer"])
        for each, copied in ((optimizer, model), (other, twin)):
            train(each, copied, range(saved_at, 8), x)
        assert torch.equal(flat(model), flat(twin))


def test_state_of_tied_layers_round_trips():
    for name in ("tied_embedding", "tied_linear", "generic", "self_attention"):
        case = CASES[name]()
        first = estimated(case)
        with Capture(case.model, case.output) as capture:
            second = curvature_of("two_level", capture)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        vector = normal(first.layout.numel)
        expected = first.matrix().solve(vector, 0.1)
        assert torch.equal(second.matrix().solve(vector, 0.1), expected)


def test_a_state_of_other_layers_is_refused():
    model, x = net("mlp")
    optimizer = make_optimizer(TwoLevelKFAC, model, **SETTINGS)
    train(optimizer, model, range(1), x)
    other = TwoLevelKFAC(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    with pytest.raises(ValueError):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("space", SPACES)
def test_steps_with_nan_are_taken_back(space):
    (model, x_like), (twin, _) = net("mlp"), net("mlp")
    optimizer, undisturbed = (
        make_optimizer(TwoLevelKFAC, m, coarse_space=space, **SETTINGS) for m in (model, twin)
    )
    for step in range(5):
        parameters = flat(model)
        x, y = normal(4, 3, seed=step), labels(4, 3, step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.zero_grad()
            functional.cross_entropy(model(x * float("nan")), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            model[2].bias.grad[0] = float("inf")  # Rows are finite here, the gradient is not.
            optimizer.step()
        assert torch.equal(flat(model), parameters)
        train(optimizer, model, range(step, step + 1), x_like)
        train(undisturbed, twin, range(step, step + 1), x_like)
        assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("convolution", [False, True])
def test_training_reduces_the_loss(convolution, space):
    torch.manual_seed(0)
    if convolution:
        first = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*first, nn.Linear(24, 3))
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    optimizer = make_optimizer(TwoLevelKFAC, model, coarse_space=space)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "improved"])
def test_every_fisher_type_and_uncovered_parameters(fisher):
    """The quadratic form sees the larger of inner product and exact form."""
    model, x = net("mlp")
    model[2].bias.requires_grad_(False)
    optimizer = TwoLevelKFAC(model, fisher=fisher)
    train(optimizer, model, range(3), x)
    curvature = optimizer.preconditioner.curvature
    layout, coarse = curvature.layout, curvature.matrix().coarse
    direction = layout.to_dict(normal(layout.numel))
    products = coarse.times(layout.to_column(direction))
    exact = float(products.square().sum() / coarse.count)
    found = curvature.quadratic(direction, torch.tensor(-0.5 * exact, dtype=torch.float64))
    assert float(found) == pytest.approx(exact)
    assert float(curvature.quadratic(direction, torch.tensor(1e9))) == pytest.approx(1e9)


def test_measured_learning_rate():
    model, x = net("mlp")
    optimizer = make_optimizer(TwoLevelKFAC, model, lr="isotropic", fisher="exact", factors=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(optimizer, model, range(3), x)
    assert bool(torch.isfinite(flat(model)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", SPACES)
def test_lower_precision(space, dtype):
    case = CASES["mlp"]()
    model, x = copy.deepcopy(case.model).to(dtype), case.x.to(dtype)
    y = case.target("categorical")
    found = fisher_matrix(model, (x, y), structure="two_level", coarse_space=space)
    vector = normal(found.shape[0]).float()
    solution = found.solve(vector, 0.1)
    exact = copy.deepcopy(model).double()
    reference = fisher_matrix(exact, (x.double(), y), structure="two_level", coarse_space=space)
    expected = reference.solve(vector.double(), 0.1)
    assert solution.dtype == torch.float32
    assert (solution - expected).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * (
        expected.norm()
    )


def test_training_takes_the_krylov_space_and_the_matrix_all_ones():
    model, _ = net("mlp")
    assert TwoLevelKFAC(model).preconditioner.curvature.structure.coarse_space == "krylov"
    assert build(CASES["mlp"](), "categorical", "two_level").coarse.space == "nicolaides"
    preconditioner = natgrad.Preconditioner(net("mlp")[0], structure="two_level")
    assert preconditioner.curvature.structure.coarse_space == "krylov"


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"coarse_space": "fine"}, ValueError),
        ({"form": "deflated"}, ValueError),
        ({"colour": "red"}, TypeError),
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
