"""KPSVD where it falls back, and over the updates of a training."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import kpsvd
from natgrad.curvature.kronecker_svd import deflation, lanczos, symmetric_part
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import LinearJacobian
from natgrad.operators import GradientSource
from natgrad.operators.kronecker_sum import KroneckerSumOperator
from natgrad.optim import KPSVD
from tests import dense, pairwise
from tests import dense_kronecker as reference
from tests.cases import CASES, labels, normal
from tests.curvature.test_structures import build
from tests.dense_kronecker import kron_sum, truncated
from tests.methods import make_optimizer
from tests.state import flat


@pytest.mark.parametrize("name", ["mlp", "mlp_without_bias", "one_layer", "layer_norm"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_all_products_make_the_block(name, kind):
    """Without shared positions symmetric factors can represent all of it."""
    case = CASES[name]()
    found, count = reference.blocks(case, "categorical", kind)
    exact = reference.exact_groups(case.jacobian[1].shape[-1], found, count)
    matrix = build(case, "categorical", "kpsvd", kind, rank=100).to_dense()
    dense.assert_same(matrix, exact)


def test_missing_pairs_are_zero():
    """A block with fewer pairs than asked for has zeros in their place."""
    for part in build(CASES["layer_norm"](), "categorical", "kpsvd", rank=5).parts.values():
        assert len(part.inputs) == len(part.outputs) == part.rank == 5


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_per_sample_gradients_are_made_once_where_they_are_few(name, monkeypatch):
    """However many products are taken; too many to be kept are made at each, which is the same."""
    made = []
    for method in ("per_sample_gradients", "augmented_inputs"):
        before = getattr(LinearJacobian, method)
        monkeypatch.setattr(
            LinearJacobian, method, lambda *rows, _made=before: made.append(1) or _made(*rows)
        )
    case, found = CASES[name](), []
    data = case.x, case.target("categorical")
    for budget in (kpsvd.CHUNK_ELEMENTS, 1):
        monkeypatch.setattr(kpsvd, "CHUNK_ELEMENTS", budget)
        matrix = fisher_matrix(case.model, data, structure="kpsvd")
        found.append((matrix.to_dense(), len(made)))
        made.clear()
    (kept, few), (again, many) = found
    assert few <= len(matrix.parts) and many > 3 * few
    assert torch.equal(kept, again)


@pytest.mark.parametrize("find", [deflation, lanczos])
def test_float32_does_not_iterate_below_its_rounding(find):
    """A bound that float64 meets takes no more products, and finds the same pairs."""
    spread = torch.logspace(0, -1, 7).double()
    rows = spread[:, None] * normal(9, 1, 7, 4)  # (rows, G, d_out, d_in)

    def found(dtype: torch.dtype) -> tuple[Tensor, int]:
        given, products = rows.to(dtype), []

        def forward(v: Tensor) -> Tensor:
            products.append(v)
            return symmetric_part(torch.einsum("rgoi,gop,rgpj->gij", given, v, given))

        def adjoint(u: Tensor) -> Tensor:
            return symmetric_part(torch.einsum("rgoi,gij,rgpj->gop", given, u, given))

        start = torch.eye(7, dtype=dtype).unsqueeze(0)
        a, b = (pair[:, 0].double() for pair in find(forward, adjoint, start, 2, 1e-12, 1000))
        return kron_sum(a, b), len(products)

    (exact, enough), (single, taken) = found(torch.float64), found(torch.float32)
    assert taken <= enough < 1000
    dense.assert_same(single, exact, 1e-5)


def indefinite_part(factored_damping: bool) -> KroneckerSumOperator:
    """Return a part whose second product spoils the first, as decompositions of it would."""
    f = build(CASES["mlp"](), "categorical", "kpsvd", factored_damping=factored_damping)
    part = next(iter(f.parts.values()))
    return dataclasses.replace(
        part,
        leading_only=True,
        inputs=torch.cat([part.inputs, -2 * part.inputs]),
        outputs=torch.cat([part.outputs, part.outputs]),
    )


@pytest.mark.parametrize("factored", [True, False])
def test_indefinite_sum_falls_back_to_the_first_product(factored):
    part, damping = indefinite_part(factored), 1e-3
    if factored:
        with pytest.raises(natgrad.linalg.FactorizationError, match="positive definite"):
            dataclasses.replace(part, leading_only=False).inverse(damping)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            inverse = part.inverse(damping)
    (warning,) = said  # Said once.
    assert "first product alone" in str(warning.message)
    layout = part.layout
    matrix = torch.kron(part.outputs[0, 0], part.inputs[0, 0])
    matrix = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    gradients = layout.to_dict(normal(layout.numel))
    found = inverse.natural_gradient(GradientSource(gradients))
    stacked = torch.cat([g.reshape(layout.d_out, -1) for g in gradients.values()], 1)
    solution = torch.linalg.solve(matrix, stacked.flatten()).reshape(stacked.shape)
    result = torch.cat([found[n].reshape(layout.d_out, -1) for n in layout.names], 1)
    dense.assert_same(result, solution)
    assert part.logdet(damping).isnan()


# -- updates and training --------------------------------------------------------------------------


class StepByStep:
    """The running decomposition of an MLP's layers, by dense matrices."""

    def __init__(self, case, rank: int, decay: float, damping: float) -> None:
        self.case, self.rank, self.decay, self.damping = case, rank, decay, damping
        self.count = 0.0
        self.pairs: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.inverses: dict[tuple, Tensor] = {}

    def step(self, model, x: Tensor, y: Tensor, update: bool, refresh: bool) -> Tensor:
        leaves = list(model.parameters())
        loss = functional.cross_entropy(model(x), y)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        now = type(self.case)(model, x, self.case.blocks)
        found, count = reference.blocks(now, "categorical", "exact")
        if update:
            self.count = self.decay * self.count + count
        result = torch.zeros_like(gradient)
        for block in found:
            key, (d_out, d_in) = block.names, block.where.shape[1:]
            rows = block.rows[:, 0].flatten(1)
            if update:
                matrix = rows.T @ rows
                if key in self.pairs:
                    matrix = matrix + self.decay * kron_sum(*self.pairs[key])
                self.pairs[key] = truncated(matrix, d_out, d_in, self.rank)
            if refresh:
                self.inverses[key] = self.inverse(*self.pairs[key])
            index = block.where.flatten()
            result[index] = self.inverses[key] @ gradient[index]
        return result

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        sign = torch.sign(a[0].trace())
        a, b = a * sign / self.count**0.5, b * sign / self.count**0.5
        pi = (a[0].trace() / len(a[0]) / (b[0].trace() / len(b[0]))).sqrt()
        root = self.damping**0.5
        a[0] += root * pi * torch.eye(len(a[0]), dtype=a.dtype)
        b[0] += root / pi * torch.eye(len(b[0]), dtype=b.dtype)
        return torch.linalg.inv(kron_sum(a, b))


@pairwise.parametrize({"rank": [1, 2], "decay": [0.0, 0.7], "factor_interval": [1, 2]})
def test_life_cycle(rank, decay, factor_interval):
    """Eight steps with intervals against the step-by-step computation."""
    case = CASES["mlp"]()
    model, damping, lr = copy.deepcopy(case.model), 0.5, 0.3
    optimizer = make_optimizer(
        KPSVD, model, lr=lr, damping=damping, momentum=0.0, fisher="exact", decay=decay,
        early=False, factors=factor_interval, inverses=3, kl_clip=None, rank=rank,
        tolerance=1e-11, max_iterations=100,
    )  # fmt: skip
    steps = StepByStep(case, rank, decay, damping)
    for step in range(8):
        x, y = normal(9, 3, seed=step), labels(9, 3, step)
        update, refresh = step % factor_interval == 0, step % 3 == 0
        direction = steps.step(copy.deepcopy(model), x, y, update, refresh)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        dense.assert_same((before - after) / lr, direction, 1e-8)


SETTINGS = {"fisher": "exact", "factors": 2, "inverses": 3, "damping": 0.5}


@pytest.mark.parametrize("rank", [1, 2, 100])
def test_several_passes_of_a_step_are_one_batch(rank):
    models = [copy.deepcopy(CASES["mlp"]().model) for _ in range(2)]
    options = {**SETTINGS, "rank": rank, "factored_damping": False, "tolerance": 1e-12}
    optimizers = [make_optimizer(KPSVD, m, max_iterations=100, **options) for m in models]
    for step in range(4):
        x, y = normal(6, 3, seed=step), labels(6, 3, step)
        for model, optimizer, passes in zip(models, optimizers, (1, 3), strict=True):
            optimizer.zero_grad()
            for inputs, target in zip(x.chunk(passes), y.chunk(passes), strict=True):
                (functional.cross_entropy(model(inputs), target) / passes).backward()
            optimizer.step()
        dense.assert_same(*map(flat, models))


def test_one_product_of_several_updates_is_positive():
    case = CASES["conv2d"]()
    data = [(normal(*case.x.shape, seed=s), labels(len(case.x), 3, s)) for s in range(4)]
    matrix = fisher_matrix(case.model, data, "categorical", "kpsvd").to_dense()
    assert torch.linalg.eigvalsh(matrix)[0] >= -1e-12 * matrix.norm()


@pytest.mark.parametrize("method", ["deflation", "lanczos"])
def test_rows_whose_products_overflow_are_left_out(method):
    case = CASES["one_layer"]()
    model = copy.deepcopy(case.model).float()
    x, y = case.x.float(), case.target("gaussian").float()
    good = fisher_matrix(model, (x, y), "gaussian", "kpsvd", method=method)
    both = fisher_matrix(model, [(x, y), (x * 1e30, y)], "gaussian", "kpsvd", method=method)
    dense.assert_same(both.to_dense().double(), good.to_dense().double(), 1e-5)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 3, "factored_damping": True}, "ranks 1 and 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(CASES["mlp"](), "categorical", "kpsvd", **options)
