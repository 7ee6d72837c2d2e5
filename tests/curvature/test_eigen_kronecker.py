"""EKFAC, TKFAC and TEKFAC against dense definitions, theorems and step-by-step computations."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad.curvature.ekfac as ekfac_module
import natgrad.curvature.tekfac
import natgrad.curvature.tkfac
from natgrad import Capture
from natgrad.curvature import Curvature
from natgrad.fisher import estimation as fisher_module
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import Jacobians, LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.likelihoods import Gaussian
from natgrad.operators import GradientSource, KroneckerOperator
from natgrad.optim import EKFAC, TEKFAC, TKFAC
from tests import dense
from tests import dense_kronecker as reference
from tests.cases import CASES, Case, normal
from tests.curvature.test_structures import (
    build,
    check_interface,
    check_pseudo_inverse,
    labels,
    stacks,
)
from tests.methods import curvature_of, make_optimizer

EIGEN = ["ekfac", "tekfac"]
STRUCTURES = [*EIGEN, "tkfac"]
OPTIMIZERS = {"ekfac": EKFAC, "tkfac": TKFAC, "tekfac": TEKFAC}
FACTORS = {
    "ekfac": reference.kfac_factors,
    "tekfac": reference.tkfac_factors,
    "tkfac": reference.tkfac_factors,
}
KINDS = ["exact", "empirical"]
FACTORED = [name for name in CASES if CASES[name]().has_kfac]
EMBEDDINGS = ("embedding", "language_model")


def size_of(case: Case) -> int:
    return case.jacobian[1].shape[-1]


def part_of(f, names):
    (part,) = [part for part in f.parts.values() if part.layout.names == tuple(names)]
    return part


def dense_basis(basis: Tensor | None, group: int, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) if basis is None else basis[group]


def assert_diagonalises(basis: Tensor, factor: Tensor) -> None:
    eye = torch.eye(len(factor), dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-11)
    rotated = basis.T @ factor @ basis
    off = rotated - torch.diag(rotated.diagonal())
    assert off.abs().max() <= 1e-10 * factor.abs().max()


def expected_eigen(f, size, found, count, factors) -> Tensor:
    """Return ``U diag(UᵀFU) Uᵀ`` in natgrad's bases, which must diagonalise given factors."""
    result = torch.zeros(size, size, dtype=torch.float64)
    for block, pairs in zip(found, factors, strict=True):
        part = part_of(f, block.names)
        basis_a, basis_b = part.input_basis, part.output_basis
        for group, (index, (a, b)) in enumerate(zip(block.where, pairs, strict=True)):
            u_a = dense_basis(basis_a, group, len(a))
            u_b = dense_basis(basis_b, group, len(b))
            if b.abs().max() > 1e-20:
                assert_diagonalises(u_a, a)
                assert_diagonalises(u_b, b)
            rows = block.rows[:, group]
            reference.place(result, index, reference.eigen_block(rows, count, u_a, u_b))
    return result


def compare(case: Case, name: str, likelihood: str, kind: str, sharing: str) -> None:
    """Compare the three structures of one case with their definitions and with one another."""
    size = size_of(case)
    found, count = reference.blocks(case, likelihood, kind)
    exact = reference.exact_groups(size, found, count)
    errors = {}
    for structure in ("kfac", *STRUCTURES):
        f = build(case, likelihood, structure, kind, weight_sharing=sharing)
        matrix = f.to_dense()
        errors[structure] = (matrix - exact).norm()
        if structure == "kfac":
            continue
        factors = [FACTORS[structure](block, count, sharing) for block in found]
        if sharing == "reduce" and name in EMBEDDINGS:
            # The reduced input factor of an embedding is kept as its diagonal.
            factors[0] = [(torch.diag(a.diagonal()), b) for a, b in factors[0]]
        if structure == "tkfac":
            pairs = [(b.where, p) for b, p in zip(found, factors, strict=True)]
            expected = reference.kronecker_matrix(size, pairs)
        else:
            expected = expected_eigen(f, size, found, count, factors)
        torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-12)
        dense.assert_same(f.trace(), case.fisher(likelihood, kind)[1].trace(), 1e-10)
    assert errors["ekfac"] <= errors["kfac"] * (1 + 1e-12) + 1e-13
    assert errors["tekfac"] <= errors["tkfac"] * (1 + 1e-12) + 1e-13


# -- the matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORED)
def test_dense_definition(name):
    for kind in KINDS:
        for sharing in ("expand", "reduce"):
            compare(CASES[name](), name, "categorical", kind, sharing)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
@pytest.mark.parametrize("name", ["mlp_without_bias", "conv2d", "tokens", "pooled_tokens"])
def test_other_likelihoods(name, likelihood):
    for kind in KINDS:
        compare(CASES[name](), name, likelihood, kind, "expand")


@given(
    stacks(), st.sampled_from(["gaussian", "bernoulli", "poisson"]), st.sampled_from(KINDS),
    st.sampled_from(["expand", "reduce"]),
)  # fmt: skip
def test_random_stacks(case, likelihood, kind, sharing):
    compare(case, "", likelihood, kind, sharing)


@pytest.mark.parametrize("name", [name for name in CASES if name not in FACTORED])
def test_unfactored_rows_keep_the_trace_and_come_closer(name):
    """Attention and tied weights, whose rows are sums: trace, order, and diagonal in the basis."""
    case = CASES[name]()
    exact = build(case, "categorical", "block_diagonal").to_dense()
    matrices = {}
    for structure in ("kfac", *STRUCTURES):
        f = build(case, "categorical", structure)
        matrices[structure] = f.to_dense()
        if structure == "kfac":
            continue
        dense.assert_same(f.trace(), exact.trace(), 1e-10)
        check_interface(f, matrices[structure], positive=True)
    for better, worse in (("ekfac", "kfac"), ("tekfac", "tkfac")):
        left, right = ((matrices[s] - exact).norm() for s in (better, worse))
        assert left <= right * (1 + 1e-12)


def test_tied_weights_give_partial_traces():
    case = CASES["tied_embedding"]()
    _, exact = case.fisher("gaussian", "exact")
    index = dense.indices(case.model)["embedding.weight"]  # V × d, as the head has it.
    f = build(case, "gaussian", "tkfac")
    flat = index.flatten()
    block = exact[flat.unsqueeze(1), flat].reshape(5, 3, 5, 3)
    inputs, outputs = torch.einsum("oioj->ij", block), torch.einsum("oipi->op", block)
    expected = torch.kron(outputs, inputs) / inputs.trace()
    dense.assert_same(f.to_dense()[flat.unsqueeze(1), flat], expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [*FACTORED])
def test_interface(name, structure):
    f = build(CASES[name](), "categorical", structure)
    check_interface(f, f.to_dense(), positive=True)
    assert f.structure == structure and structure in repr(f)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "batch_of_one", "conv2d", "frozen", "language_model"])
def test_zero_damping_is_the_pseudo_inverse(name, structure):
    case = CASES[name]()
    check_pseudo_inverse(build(case, "categorical", structure))


def test_traces_of_the_factors():
    for name in ("mlp", "conv2d", "generic"):
        f = build(CASES[name](), "categorical", "tkfac")
        for part in f.parts.values():
            a, b = part.factors
            traces = [m.diagonal(dim1=1, dim2=2).sum(1) for m in (a, b)]
            torch.testing.assert_close(*traces)  # √δ each: tr Φ = tr Ψ = 1.


def test_pi_rule_of_trace_restricted_factors():
    """(B + √λ/π I) ⊗ (A + π√λ I), for solve and for the function-space map."""
    case, damping = CASES["conv2d"](), 0.05
    found, count = reference.blocks(case, "gaussian", "exact")
    pairs = [(b.where, reference.tkfac_factors(b, count, "expand")) for b in found]
    inverse = dense.pi_damped_inverse(size_of(case), pairs, damping)
    f = build(case, "gaussian", "tkfac", factored_damping=True)
    columns = normal(size_of(case), 3)
    dense.assert_same(f.solve(columns, damping), inverse @ columns)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv2d", "embedding", "generic", "layer_norm"])
def test_function_space_map(name, structure):
    case = CASES[name]()
    capture = Capture(case.model, case.output)
    dense.call(case.model, case.x, case.output)
    output = capture.passes[-1].output
    rows = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
    with capture:
        curvature = curvature_of(structure, capture)
        curvature.update(rows, rows.samples)
        f = curvature.matrix()
        other = rows.combined(normal(rows.samples, rows.directions, 2, seed=3))
        found = f.function_space_map(rows, other, 0.3)
        eye = torch.eye(f.shape[0], dtype=torch.float64)
        moved = torch.linalg.solve(f.to_dense() + 0.3 * eye, rows.to_dense().T)
        dense.assert_same(sum(found.values()), other.to_dense() @ moved, 1e-8)


# -- where theory says more ------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_one_sample_is_exact(likelihood, structure):
    """The block of one sample is a Kronecker product, however many vectors are pulled back."""
    case = CASES["batch_of_one"]()
    for kind in KINDS:
        exact = build(case, likelihood, "block_diagonal", kind).to_dense()
        for sharing in ("expand", "reduce"):
            f = build(case, likelihood, structure, kind, weight_sharing=sharing)
            dense.assert_same(f.to_dense(), exact)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_deep_linear_network_with_squared_loss_is_exact(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).double()
    data = (normal(7, 3), normal(7, 2, seed=1))
    exact = fisher_matrix(model, data, "gaussian", "block_diagonal").to_dense()
    dense.assert_same(fisher_matrix(model, data, "gaussian", structure).to_dense(), exact)
    tokens = (normal(3, 4, 3), normal(3, 4, 2, seed=1))
    exact = fisher_matrix(model, tokens, "gaussian", "block_diagonal").to_dense()
    f = fisher_matrix(model, tokens, "gaussian", structure, weight_sharing="expand")
    dense.assert_same(f.to_dense(), exact)


def test_equal_norms_make_it_kfac():
    """With inputs and output gradients of constant norms the weights say nothing."""
    layout = BlockLayout(("w",), ((3, 4),), 1, 3, 4, has_bias=False)
    a = functional.normalize(normal(6, 1, 1, 4), dim=-1)
    delta = 2 * functional.normalize(normal(6, 2, 1, 1, 3, seed=1), dim=-1)
    sums = LinearJacobian(layout, a, delta)
    phi, psi = natgrad.curvature.tkfac._weighted_moments(sums, "expand", None)
    plain = sums.kronecker_factors()
    dense.assert_same(phi / phi[0].trace(), plain.inputs / plain.inputs[0].trace())
    dense.assert_same(psi / psi[0].trace(), plain.outputs / plain.outputs[0].trace())


def test_token_wise_networks_have_exact_partial_traces():
    """Rows of single positions: *expand* keeps both partial traces of every block."""
    case = CASES["tokens"]()
    found, count = reference.blocks(case, "categorical", "exact")
    f = build(case, "categorical", "tkfac")
    for block in found:
        a, b = (factor[0] for factor in part_of(f, block.names).factors)
        rows = block.rows[:, 0]
        dense.assert_same(a * b.trace(), torch.einsum("roi,roj->ij", rows, rows) / count)
        dense.assert_same(b * a.trace(), torch.einsum("roi,rpi->op", rows, rows) / count)


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 4), st.booleans(), st.integers(0, 50),
)  # fmt: skip
def test_second_moments_of_any_shape(n, k, t, groups, d_out, d_in, bias, seed):
    layout = BlockLayout(
        ("w", "b") if bias else ("w",),
        ((groups * d_out, d_in), (groups * d_out,)) if bias else ((groups * d_out, d_in),),
        groups, d_out, d_in, has_bias=bias,
    )  # fmt: skip
    a, delta = normal(n, t, groups, d_in, seed=seed), normal(n, k, t, groups, d_out, seed=seed + 1)
    jacobian = LinearJacobian(layout, a, delta)
    u_a = torch.linalg.qr(normal(groups, layout.d_augmented, layout.d_augmented))[0]
    u_b = torch.linalg.qr(normal(groups, d_out, d_out, seed=2))[0]
    rows = jacobian.per_sample_gradients()
    for left, right in ((u_a, u_b), (None, u_b), (u_a, None), (None, None)):
        rotated = rows if right is None else right.mT @ rows
        rotated = rotated if left is None else rotated @ left
        expected = rotated.square().sum((0, 1))
        dense.assert_same(ekfac_module.second_moments(jacobian, left, right), expected)


# -- large factors, several batches, chunks --------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_embedding", "generic"])
def test_large_factors_are_kept_as_diagonals(name, structure):
    case = CASES[name]()
    limit = 4
    f = build(case, "categorical", structure, max_factor_size=limit)
    matrix = f.to_dense()
    check_interface(f, matrix, positive=True)
    dense.assert_same(f.trace(), case.fisher("categorical", "exact")[1].trace(), 1e-10)
    if not case.has_kfac:
        return
    found, count = reference.blocks(case, "categorical", "exact")
    factors = [
        [
            tuple(m if len(m) <= limit else torch.diag(m.diagonal()) for m in pair)
            for pair in FACTORS[structure](block, count, "expand")
        ]
        for block in found
    ]
    if structure == "tkfac":
        pairs = [(b.where, p) for b, p in zip(found, factors, strict=True)]
        expected = reference.kronecker_matrix(f.shape[0], pairs)
    else:
        expected = expected_eigen(f, f.shape[0], found, count, factors)
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-12)


def several(case: Case, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    shape = case.x.shape
    return [(normal(*shape, seed=s), labels(shape[0], 3, s)) for s in range(count)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_several_batches_are_one(name, structure):
    case = CASES[name]()
    data = several(case)
    joined = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    whole = fisher_matrix(case.model, joined, "categorical", structure).to_dense()
    parts = fisher_matrix(case.model, data, "categorical", structure).to_dense()
    dense.assert_same(parts, whole)


@pytest.mark.parametrize("structure", EIGEN)
def test_more_rows_than_may_wait_are_measured_in_the_first_basis(structure, monkeypatch):
    monkeypatch.setattr(ekfac_module, "KEPT_ELEMENTS", 0)
    case = CASES["mlp"]()
    data = several(case)
    f = fisher_matrix(case.model, data, "categorical", structure)
    first = fisher_matrix(case.model, data[:1], "categorical", structure)
    joined = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    whole = Case(case.model, joined[0], case.blocks)
    z, jac = whole.jacobian
    exact = dense.fisher(whole.model, joined[0], joined[1], dense.categorical(), computed=(z, jac))
    matrix = f.to_dense()
    dense.assert_same(f.trace(), exact.trace())
    for spec in case.blocks:
        where = dense.augmented_indices(case.model, spec)[0]
        index = where.flatten()
        block = exact[index.unsqueeze(1), index]
        part = part_of(first, spec.names)
        basis = torch.kron(part.output_basis[0], part.input_basis[0])
        expected = basis @ torch.diag((basis.T @ block @ basis).diagonal()) @ basis.T
        dense.assert_same(matrix[index.unsqueeze(1), index], expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "pooled_tokens", "embedding"])
def test_chunks_of_vectors_add_up(name, structure, monkeypatch):
    case = CASES[name]()
    whole = build(case, "categorical", structure).to_dense()
    monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", 1)
    dense.assert_same(build(case, "categorical", structure).to_dense(), whole)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ignored_positions(structure, sharing, monkeypatch):
    """Ignored tokens give the matrix of shorter sequences."""
    model = copy.deepcopy(CASES["tokens"]().model)
    # Enough samples for reduced factors without a null space, whose basis is arbitrary.
    x, y = normal(8, 4, 3), labels(32, 3, 0).reshape(8, 4)
    ignored = y.clone()
    ignored[:, 2:] = -100
    short = fisher_matrix(
        model, (x[:, :2], y[:, :2]), nn.CrossEntropyLoss(), structure, weight_sharing=sharing
    )
    for chunk in (fisher_module.PULL_BACK_ELEMENTS, 1):
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", chunk)
        masked = fisher_matrix(
            model, (x, ignored), nn.CrossEntropyLoss(), structure, weight_sharing=sharing
        )
        dense.assert_same(masked.to_dense(), short.to_dense())


def test_errors_are_clear():
    case = CASES["mlp"]()
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match="reduce"):
            build(case, structure=structure, weight_sharing="both")
        with pytest.raises(TypeError, match=f"'{structure}'.*nonsense"):
            build(case, structure=structure, nonsense=1)
    with pytest.raises(TypeError, match="factored_damping"):
        build(case, structure="ekfac", factored_damping=True)


# -- training --------------------------------------------------------------------------------------


class StepByStep:
    """Moving averages, bases and moments of an MLP's layers, by dense matrices."""

    def __init__(self, structure: str, case: Case, decay: float, damping: float, rule: str) -> None:
        self.structure, self.case, self.rule = structure, case, rule
        self.decay, self.damping = decay, damping
        self.count = 0.0
        self.sums: dict[tuple, dict[str, Tensor]] = {}
        self.bases: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.moments: dict[tuple, Tensor] = {}
        self.inverses: dict[tuple, Tensor] = {}

    def step(self, model: nn.Module, x: Tensor, y: Tensor, update: bool, refresh: bool) -> Tensor:
        """Return the preconditioned gradient, flat."""
        now = Case(model, x, self.case.blocks)
        leaves = list(model.parameters())
        loss = functional.cross_entropy(model(x), y)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        found, count = reference.blocks(now, "categorical", "exact")
        if update:
            self.count = self.decay * self.count + count
        for block in found:
            self.advance(block, update, refresh)
        result = torch.zeros_like(gradient)
        for block in found:
            index = block.where.flatten()
            result[index] = self.inverses[block.names] @ gradient[index]
        return result

    def advance(self, block: reference.DenseBlock, update: bool, refresh: bool) -> None:
        key, rows = block.names, block.rows[:, 0]
        new: dict[str, Tensor] = {}
        if update:
            new = self.terms(block)
            if key in self.sums:
                new = {k: v + self.decay * self.sums[key][k] for k, v in new.items()}
            self.sums[key] = new
        old = self.moments.get(key)
        if update and old is not None:
            old = self.decay * old
        if refresh:
            a, b = self.factors(key)
            basis = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
            if old is not None:
                before = torch.kron(self.bases[key][1], self.bases[key][0])
                after = torch.kron(basis[1], basis[0])
                matrix = before @ torch.diag(old) @ before.T
                old = (after.T @ matrix @ after).diagonal()
            self.bases[key] = basis
        if update:
            rotated = rows.flatten(1) @ torch.kron(self.bases[key][1], self.bases[key][0])
            measured = rotated.square().sum(0)
            old = measured if old is None else old + measured
        self.moments[key] = old
        if self.structure == "tkfac":
            if refresh:
                self.inverses[key] = self.kronecker_inverse(*self.factors(key))
            return
        basis = torch.kron(self.bases[key][1], self.bases[key][0])
        damped = self.moments[key] / self.count + self.damping
        self.inverses[key] = basis @ torch.diag(1 / damped) @ basis.T

    def terms(self, block: reference.DenseBlock) -> dict[str, Tensor]:
        a, delta = block.inputs[:, 0, 0], block.gradients[:, :, 0, 0]  # (N, i), (K, N, o)
        if self.structure == "ekfac":
            inputs = a.T @ a
            outputs = torch.einsum("kno,knp->op", delta, delta)
            return {"inputs": inputs, "outputs": outputs, "terms": torch.tensor(float(len(a)))}
        return {
            "inputs": torch.einsum("kno,kno,ni,nj->ij", delta, delta, a, a),
            "outputs": torch.einsum("ni,ni,kno,knp->op", a, a, delta, delta),
            "terms": torch.tensor(1.0),
        }

    def factors(self, key: tuple) -> tuple[Tensor, Tensor]:
        sums = self.sums[key]
        a, b = sums["inputs"], sums["outputs"]
        if self.structure == "ekfac":
            return a / sums["terms"], b / self.count
        root = (a.trace() / self.count).sqrt()
        return root * a / a.trace(), root * b / b.trace()

    def kronecker_inverse(self, a: Tensor, b: Tensor) -> Tensor:
        eye_a, eye_b = (torch.eye(len(m), dtype=torch.float64) for m in (a, b))
        if self.rule == "exact":
            product = torch.kron(b.contiguous(), a.contiguous())
            return torch.linalg.inv(product + self.damping * torch.eye(len(product)).to(a))
        pi = (a.trace() / len(a) / (b.trace() / len(b))) ** 0.5
        root = self.damping**0.5
        left, right = b + root / pi * eye_b, a + root * pi * eye_a
        return torch.linalg.inv(torch.kron(left.contiguous(), right.contiguous()))


@pytest.mark.parametrize("factor_interval", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("structure", [*EIGEN, "tkfac:factored", "tkfac:exact"])
def test_life_cycle(structure, decay, factor_interval):
    """Eight steps with intervals against the step-by-step computation."""
    structure, _, rule = structure.partition(":")
    case = CASES["mlp"]()
    model, damping, lr = copy.deepcopy(case.model), 0.02, 0.3
    options = {"factored_damping": rule == "factored"} if rule else {}
    optimizer = make_optimizer(
        OPTIMIZERS[structure], model,
        lr=lr, damping=damping, momentum=0.0, fisher="exact", decay=decay,
        early=False,
        factors=factor_interval, inverses=3, kl_clip=None, **options,
    )  # fmt: skip
    steps = StepByStep(structure, case, decay, damping, rule)
    for step in range(8):
        x, y = normal(9, 3, seed=step), labels(9, 3, step)
        twin = copy.deepcopy(model)
        update, refresh = step % factor_interval == 0, step % 3 == 0
        direction = steps.step(twin, x, y, update, refresh)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        dense.assert_same((before - after) / lr, direction, 1e-8)


def train(optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x, y = normal(4, 3, seed=step), labels(4, 3, step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_rows_are_preconditioned_where_that_is_cheaper(monkeypatch):
    """TKFAC's inverses may be applied to the rows of the gradient, as K-FAC's may."""
    used = []
    original = KroneckerOperator.multiply_rows

    def spy(self, *rows):
        used.append(self.layout.names[0])
        return original(self, *rows)

    monkeypatch.setattr(KroneckerOperator, "multiply_rows", spy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 4)).double()
    before, lr, damping = flat(model), 0.5, 0.03
    optimizer = TKFAC(model, lr=lr, damping=damping, momentum=0.0, fisher="exact", kl_clip=None)
    functional.cross_entropy(model(normal(3, 40)), labels(3, 4, 0)).backward()
    gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    optimizer.step()
    assert used == ["0.weight"]
    expected = optimizer.preconditioner.curvature.matrix().solve(gradient, damping)
    dense.assert_same((before - flat(model)) / lr, expected, 1e-8)


SETTINGS: dict[str, Any] = {"fisher": "exact", "factors": 2, "inverses": 3}


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_dict_round_trip(structure):
    for saved_at in (1, 2, 3, 4):
        model = copy.deepcopy(CASES["mlp"]().model)
        optimizer = make_optimizer(OPTIMIZERS[structure], model, **SETTINGS)
        train(optimizer, model, range(saved_at))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        twin = copy.deepcopy(CASES["mlp"]().model)
        twin.load_state_dict(state["model"])
        other = make_optimizer(OPTIMIZERS[structure], twin, **SETTINGS)
        other.load_state_dict(state["optimizer"])
        for each, net in ((optimizer, model), (other, twin)):
            train(each, net, range(saved_at, 8))
        assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_looking_at_the_curvature_between_steps_changes_nothing(structure):
    models = [copy.deepcopy(CASES["mlp"]().model) for _ in range(2)]
    watched, other = (make_optimizer(OPTIMIZERS[structure], m, **SETTINGS) for m in models)
    for step in range(7):
        train(watched, models[0], range(step, step + 1))
        train(other, models[1], range(step, step + 1))
        matrix = watched.preconditioner.curvature.matrix()
        matrix.solve(flat(models[0]), 0.1)
        matrix.eigenvalues()
        watched.state_dict()
    assert torch.equal(flat(models[0]), flat(models[1]))


def estimated(case: Case, structure: str, batches: int = 1) -> Curvature:
    """Return the estimate of a case's Fisher matrix, with squared loss, from some batches."""
    with Capture(case.model, case.output) as capture:
        curvature = curvature_of(structure, capture)
        for rows in gaussian_rows(case, capture, batches):
            curvature.update(rows, rows.samples)
    return curvature


def gaussian_rows(case: Case, capture: Capture, batches: int) -> list[Jacobians]:
    result = []
    for seed in range(batches):
        capture.clear()
        dense.call(case.model, case.x if batches == 1 else several(case)[seed][0], case.output)
        output = capture.passes[-1].output
        result.append(capture.pull_back(output, Gaussian().root_vectors(output.detach())))
    return result


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_is_the_matrix(structure):
    """Rows that still wait are measured for the state."""
    case = CASES["conv2d"]()
    curvature = estimated(case, structure)
    with Capture(case.model) as capture:
        other = curvature_of(structure, capture)
    other.load_state_dict(curvature.state_dict())
    dense.assert_same(other.matrix().to_dense(), curvature.matrix().to_dense())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_steps_with_nan_are_taken_back(structure):
    models = [copy.deepcopy(CASES["mlp"]().model) for _ in range(2)]
    optimizer, undisturbed = (make_optimizer(OPTIMIZERS[structure], m, **SETTINGS) for m in models)
    for step in range(7):
        parameters = flat(models[0])
        x, y = normal(4, 3, seed=step), labels(4, 3, step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(models[0](x / (0 if step % 2 else float("nan"))), y)
        loss.backward()
        if step == 0:
            with pytest.warns(UserWarning, match="skipped"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(flat(models[0]), parameters)
        optimizer.zero_grad()
        functional.cross_entropy(models[0](x), y).backward()
        models[0][2].bias.grad[0] = float("inf")  # Rows are finite here, the gradient is not.
        optimizer.step()
        assert torch.equal(flat(models[0]), parameters)
        for each, net in ((optimizer, models[0]), (undisturbed, models[1])):
            train(each, net, range(step, step + 1))
        assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_with_nan_are_left_out_of_the_matrix(structure):
    case = CASES["mlp"]()
    good, other = several(case, 2)
    bad = (good[0] * float("nan"), good[1])
    f = fisher_matrix(case.model, [good, bad, other], "categorical", structure)
    expected = fisher_matrix(case.model, [good, other], "categorical", structure)
    dense.assert_same(f.to_dense(), expected.to_dense())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_failed_refresh_keeps_the_last_factorisation(structure, monkeypatch):
    curvature = estimated(CASES["mlp"](), structure)
    curvature.refresh(0.1)
    shapes = curvature.layout.shapes
    source = GradientSource({name: normal(*shape) for name, shape in shapes.items()})
    before = curvature.natural_gradient(source)

    def fail(*_: Any) -> None:
        raise natgrad.linalg.FactorizationError("no")

    monkeypatch.setattr(natgrad.linalg, "eigh", fail)
    monkeypatch.setattr(natgrad.linalg, "inverse", fail)
    with pytest.warns(UserWarning, match="could not be factorised"):
        curvature.refresh(0.2)
    after = curvature.natural_gradient(source)
    for name, value in before.items():
        assert torch.equal(after[name], value)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_refreshed_inverses_are_those_of_the_matrix(structure):
    for name in ("mlp", "conv2d", "embedding", "tied_embedding", "generic", "layer_norm"):
        curvature = estimated(CASES[name](), structure)
        shapes = curvature.layout.shapes
        gradients = {name: normal(*shape) for name, shape in shapes.items()}
        curvature.refresh(0.1)
        found = curvature.natural_gradient(GradientSource(gradients))
        for key, value in curvature.matrix().solve(gradients, 0.1).items():
            dense.assert_same(found[key], value)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_older_batches_fade(structure):
    """After a decay of 0 it is the matrix of the next data alone."""
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        batches = gaussian_rows(case, capture, 2)
        found = curvature_of(structure, capture)
        for rows in batches:
            found.observe(rows, rows.samples)
            found.join(0.0)
        exact = fisher_matrix(case.model, several(case, 2)[1], "gaussian", structure)
        dense.assert_same(found.matrix().to_dense(), exact.to_dense())
        faded = curvature_of(structure, capture)
        for rows in batches:
            faded.observe(rows, rows.samples)
            faded.join(0.25)
        squares = [rows.to_dense().square().sum() for rows in batches]
        expected = (0.25 * squares[0] + squares[1]) / (1.25 * batches[0].samples)
        dense.assert_same(faded.matrix().trace(), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(structure, dtype):
    case = CASES["mlp"]()
    model, y = copy.deepcopy(case.model).to(dtype), case.target("categorical")
    f = fisher_matrix(model, (case.x.to(dtype), y), "categorical", structure)
    exact = copy.deepcopy(model).double()
    reference_matrix = fisher_matrix(
        exact, (case.x.to(dtype).double(), y), "categorical", structure
    )
    found, expected = f.to_dense(), reference_matrix.to_dense()
    assert found.dtype == torch.float32
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("convolution", [False, True])
def test_training_reduces_the_loss(structure, convolution):
    torch.manual_seed(0)
    if convolution:
        first = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*first, nn.Linear(24, 3))
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    optimizer = OPTIMIZERS[structure](model)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_costs_are_stated():
    workload = natgrad.curvature.cost.Workload(samples=8, directions=3, positions={})
    case = CASES["mlp"]()
    kfac = estimated(case, "kfac").costs(workload)
    for name, cost in estimated(case, "ekfac").costs(workload).items():
        assert cost.memory > kfac[name].memory and cost.refresh > kfac[name].refresh
        assert cost.step == 2 * kfac[name].step and cost.factors == kfac[name].factors
