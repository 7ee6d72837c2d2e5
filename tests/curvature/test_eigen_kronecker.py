"""EKFAC, TKFAC and TEKFAC against theorems and step-by-step computations."""

from __future__ import annotations

import copy

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
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators import KroneckerOperator
from natgrad.optim import EKFAC, TEKFAC, TKFAC
from tests import dense, pairwise
from tests import dense_kronecker as reference
from tests.cases import CASES, Case, labels, normal
from tests.curvature.test_structures import build
from tests.methods import curvature_of, make_optimizer
from tests.state import flat

EIGEN = ["ekfac", "tekfac"]
OPTIMIZERS = {"ekfac": EKFAC, "tkfac": TKFAC, "tekfac": TEKFAC}


def part_of(f, names):
    (part,) = [part for part in f.parts.values() if part.layout.names == tuple(names)]
    return part


# -- the matrices ----------------------------------------------------------------------------------


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


def test_traces_of_the_factors():
    for name in ("mlp", "conv2d", "generic"):
        f = build(CASES[name](), "categorical", "tkfac")
        for part in f.parts.values():
            a, b = part.factors
            traces = [m.diagonal(dim1=1, dim2=2).sum(1) for m in (a, b)]
            torch.testing.assert_close(*traces)  # √δ each: tr Φ = tr Ψ = 1.


# -- where theory says more ------------------------------------------------------------------------


def test_equal_norms_make_it_kfac():
    """With inputs and output gradients of constant norms the weights say nothing."""
    layout = BlockLayout(("w",), ((3, 4),), 1, 3, 4, has_bias=False)
    a = functional.normalize(normal(6, 1, 1, 4), dim=-1)
    delta = 2 * functional.normalize(normal(6, 2, 1, 1, 3, seed=1), dim=-1)
    sums = LinearJacobian(layout, a, delta)
    phi, psi = natgrad.curvature.tkfac._weighted_moments(sums, "expand", (False, False))
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


def several(case: Case, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    shape = case.x.shape
    return [(normal(*shape, seed=s), labels(shape[0], 3, s)) for s in range(count)]


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


def test_the_damping_rule_is_for_factors():
    with pytest.raises(TypeError, match="factored_damping"):
        build(CASES["mlp"](), structure="ekfac", factored_damping=True)


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


@pairwise.parametrize(
    {
        "structure": [*EIGEN, "tkfac:factored", "tkfac:exact"],
        "decay": [0.0, 0.7],
        "factor_interval": [1, 2],
    }
)
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
    optimizer = make_optimizer(
        TKFAC, model, lr=lr, damping=damping, momentum=0.0, fisher="exact", kl_clip=None
    )
    functional.cross_entropy(model(normal(3, 40)), labels(3, 4, 0)).backward()
    gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    optimizer.step()
    assert used == ["0.weight"]
    expected = optimizer.preconditioner.curvature.matrix().solve(gradient, damping)
    dense.assert_same((before - flat(model)) / lr, expected, 1e-8)


def test_costs_are_stated():
    workload = natgrad.curvature.cost.Workload(samples=8, directions=3, positions={})
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        kfac, ekfac = (curvature_of(name, capture).costs(workload) for name in ("kfac", "ekfac"))
    for name, cost in ekfac.items():
        assert cost.memory > kfac[name].memory and cost.refresh > kfac[name].refresh
        assert cost.step == 2 * kfac[name].step and cost.factors == kfac[name].factors


def test_moments_of_a_batch_in_chunks_are_all_kept(monkeypatch):
    """Where rows of one update do not fit together, those of its first chunks count, too."""
    monkeypatch.setattr(ekfac_module, "KEPT_ELEMENTS", 1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with Capture(model) as capture:
        curvature, total, count = curvature_of("ekfac", capture), 0.0, 0.0
        for update in range(3):
            output = model(normal(5, 3, seed=update))
            total, count = 0.5 * total, 0.5 * count + 5
            for chunk in range(3):
                vectors = normal(2, *output.shape, seed=10 * update + chunk)
                rows = capture.pull_back(output, vectors)
                total = total + rows.to_dense().square().sum()
                curvature.observe(rows, 5.0, continued=chunk > 0)
            curvature.join(0.5)
            if update == 1:
                curvature.refresh(0.1)
    dense.assert_same(curvature.matrix().trace(), total / count)
