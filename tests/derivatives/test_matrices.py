"""Hessian, Gauss-Newton matrix and Jacobian by products, against dense torch.func derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import natgrad
from natgrad import Categorical, fisher_matrix, gauss_newton_matrix, hessian_matrix, jacobian_matrix
from natgrad.derivatives import HessianMatrix
from tests import dense
from tests.cases import CASES, normal

KINDS = {"categorical": "mlp", "gaussian": "conv2d", "poisson": "mlp", "bernoulli": "layer_norm"}


def flat_loss(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return a function of the flat parameters, and these."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]

    def function(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        return loss(functional_call(model, values, (x,)))

    return function, torch.cat([parameters[name].detach().reshape(-1) for name in names])


def dense_hessian(case: Any, likelihood: str, target: Tensor) -> Tensor:
    own = natgrad.likelihoods.as_likelihood(likelihood)
    function, flat = flat_loss(case.model, lambda z: own.loss(z, target), case.x)
    return torch.autograd.functional.hessian(function, flat)


@pytest.mark.parametrize("likelihood, name", KINDS.items())
def test_hessian_and_everything_an_operator_can_do(likelihood, name):
    case = CASES[name]()
    target = case.target(likelihood)
    matrix = hessian_matrix(case.model, (case.x, target), likelihood)
    expected = dense_hessian(case, likelihood, target)
    size = len(expected)
    assert matrix.shape == (size, size) and matrix.dtype == torch.float64
    dense.assert_same(matrix.to_dense(), expected)
    assert float(torch.linalg.eigvalsh(expected)[0]) < 0  # So that signs matter.
    columns = normal(size, 3, seed=2)
    dense.assert_same(matrix @ columns, expected @ columns)
    dense.assert_same(matrix @ columns[:, 0], expected @ columns[:, 0])
    assert (matrix @ columns.float()).dtype == torch.float32
    named = matrix.layout.to_dict(columns[:, 0])
    dense.assert_same(matrix.layout.to_flat(matrix @ named), expected @ columns[:, 0])
    dense.assert_same(matrix.trace(), expected.trace())
    dense.assert_same(matrix.diagonal(), expected.diagonal())
    dense.assert_same(matrix.frobenius_norm(), expected.norm())
    shift = 1.0 - 2.0 * float(torch.linalg.eigvalsh(expected)[0])
    shifted = expected + shift * torch.eye(size).double()
    dense.assert_same(matrix.logdet(shift), torch.logdet(shifted))
    dense.assert_same(matrix.det(shift).log(), torch.logdet(shifted))
    assert bool(torch.isnan(matrix.logdet(1e-9)))
    for solver in ("direct", "conjugate_gradient"):
        found = matrix.inverse(shift, solver) @ columns
        dense.assert_same(found, torch.linalg.solve(shifted, columns), 5e-3)
    root = matrix.inverse_root(shift).to_dense()
    dense.assert_same(root @ root @ shifted, torch.eye(size).double(), 1e-8)
    scipy = pytest.importorskip("scipy.sparse.linalg")
    operator = matrix.to_scipy()
    assert isinstance(operator, scipy.LinearOperator)
    dense.assert_same(torch.from_numpy(operator @ columns.numpy()), expected @ columns)
    fisher = fisher_matrix(case.model, (case.x, target), likelihood, "diagonal")
    for total in (matrix + 2.0 * fisher, 2.0 * fisher + matrix):
        dense.assert_same(total.to_dense(), expected + 2.0 * fisher.to_dense())
    dense.assert_same((-0.5 * matrix).to_dense(), -0.5 * expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch_norm_train"])
def test_gauss_newton_matrix_is_the_full_fisher_matrix(name):
    """For every layer, but for statistics of a batch, which are constants in a Fisher matrix."""
    case = CASES[name]()
    data, columns = (case.x, case.target("categorical")), normal(case.jacobian[1].shape[-1], 2)
    matrix = gauss_newton_matrix(case.model, data, output=case.output)
    full = fisher_matrix(case.model, data, structure="full", output=case.output)
    dense.assert_same(matrix @ columns, full @ columns, 1e-8)
    jacobian = jacobian_matrix(case.model, data, output=case.output)
    expected = case.jacobian[1].reshape(-1, columns.shape[0])
    assert jacobian.shape == expected.shape
    dense.assert_same(jacobian @ columns, expected @ columns)
    weights = normal(expected.shape[0], 2, seed=3)
    dense.assert_same(jacobian.T @ weights, expected.T @ weights)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("samples", [2, 30])
def test_jacobian_as_a_matrix(samples):
    """With fewer rows than parameters, and with more; over batches of several sizes."""
    model, x = network(), normal(samples, 3)
    _, found = dense.jacobian(model, x)
    expected = found.reshape(2 * samples, -1)
    jacobian = jacobian_matrix(model, [(x[:1], None), (x[1:], None)])
    assert jacobian.shape == expected.shape and jacobian.T.T is jacobian
    assert jacobian.T.shape == expected.T.shape
    dense.assert_same(jacobian.to_dense(), expected)
    dense.assert_same(jacobian.T.to_dense(), expected.T)
    named = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.reshape(-1) for p in named.values()])
    dense.assert_same(jacobian @ named, expected @ flat)
    assert (jacobian.T @ torch.ones(2 * samples)).dtype == torch.float32
    pytest.importorskip("scipy")
    for one, other in ((jacobian, expected), (jacobian.T, expected.T)):
        vector = normal(one.shape[1], seed=4)
        dense.assert_same(torch.from_numpy(one.to_scipy() @ vector.numpy()), other @ vector)
        vector = normal(one.shape[0], seed=5)
        dense.assert_same(torch.from_numpy(one.to_scipy().T @ vector.numpy()), other.T @ vector)


def test_batches_masks_and_several_heads():
    model, x = network(), normal(7, 3)
    y = torch.tensor([0, 1, -100, 1, 1, -100, 0])
    whole = hessian_matrix(model, (x, y), Categorical())
    parts = hessian_matrix(model, [(x[:3], y[:3]), (x[3:], y[3:])], nn.CrossEntropyLoss())
    assert whole.count == parts.count == 5
    function, flat = flat_loss(model, lambda z: nn.functional.cross_entropy(z, y), x)
    expected = torch.autograd.functional.hessian(function, flat)
    for found in (whole, parts):
        dense.assert_same(found.to_dense(), expected)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.body(x)
            return {"a": z, "b": z.square()}

    two, targets = Two(), {"a": y.clamp(min=0), "b": normal(7, 2, seed=3)}
    matrix = hessian_matrix(two, (x, targets), {"a": "categorical", "b": "gaussian"})

    def loss(out: dict[str, Tensor]) -> Tensor:
        first = nn.functional.cross_entropy(out["a"], targets["a"])
        return first + 0.5 * (out["b"] - targets["b"]).square().sum(1).mean()

    function, flat = flat_loss(two, loss, x)
    dense.assert_same(matrix.to_dense(), torch.autograd.functional.hessian(function, flat))


def test_spectra_and_estimators_take_them():
    model, x = network(), normal(20, 3)
    matrix = hessian_matrix(model, (x, torch.arange(20) % 2))
    expected = torch.linalg.eigvalsh(matrix.to_dense())
    pytest.importorskip("scipy")
    values, vectors = natgrad.tools.top_eigenpairs(matrix, 3)
    dense.assert_same(values, expected.flip(0)[:3], 1e-8)
    dense.assert_same(matrix @ vectors, vectors * values, 1e-6)
    density = natgrad.tools.spectral_density(matrix, steps=32, vectors=8)
    trace, error = density.sum_of(lambda t: t)
    assert abs(trace - float(expected.sum())) < 5 * error
    # Exact from twice as many products as parameters on.
    assert natgrad.tools.estimate_trace(matrix, 64)[0] == pytest.approx(float(expected.sum()))


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    matrix = hessian_matrix(model, (x, y))
    vector = torch.ones(matrix.shape[0])
    first = matrix @ vector
    assert torch.equal(matrix @ vector, first)  # The same masks again.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_linear_models_and_what_depends_on_no_parameter():
    """Where derivatives end: a Hessian of zero, outputs without parameters in them."""
    x, y = normal(5, 3), normal(5, 2, seed=1)
    linear = nn.Linear(3, 2).double()
    dense.assert_same(hessian_matrix(linear, (x, y), "gaussian").to_dense(),
                      fisher_matrix(linear, (x, y), "gaussian", "full").to_dense())  # fmt: skip

    class Detached(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).detach()

    constant = Detached(3, 2).double()
    for matrix in (hessian_matrix(constant, (x, y), "gaussian"),
                   gauss_newton_matrix(constant, (x, y), "gaussian")):  # fmt: skip
        assert not (matrix @ normal(8, 2)).any()
    jacobian = jacobian_matrix(constant, (x, None))
    assert not (jacobian @ normal(8)).any() and not (jacobian.T @ normal(10)).any()


def test_wrong_input_is_named():
    model, x, y = network(), normal(5, 3), torch.arange(5) % 2
    with pytest.raises(ValueError, match="needs targets"):
        hessian_matrix(model, (x, None))
    with pytest.raises(ValueError, match="re-iterable"):
        hessian_matrix(model, iter([(x, y)]))
    with pytest.raises(ValueError, match="no batches"):
        jacobian_matrix(model, [])
    with pytest.raises(ValueError, match="no target"):
        hessian_matrix(model, (x, torch.full((5,), -100)))
    with pytest.raises(ValueError, match="no trainable parameter"):
        jacobian_matrix(nn.Tanh(), (x, None))
    matrix, jacobian = hessian_matrix(model, (x, y)), jacobian_matrix(model, (x, y))
    for one in (matrix, jacobian):
        with pytest.raises(ValueError, match="length 32"):
            one @ torch.ones(31)
        with pytest.raises(TypeError, match="a tensor or a dict"):
            one @ [1.0]
        with pytest.raises(ValueError, match="trainable parameters as keys"):
            one @ {"0.weight": model[0].weight}
    with pytest.raises(TypeError, match="no names"):
        jacobian.T @ {"0.weight": model[0].weight}
    assert repr(matrix) == "HessianMatrix(32 x 32)" and isinstance(matrix, HessianMatrix)


def test_inference_mode_is_refused_where_derivatives_would_be_zero():
    model, data = network(), (normal(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    hessian, jacobian = hessian_matrix(model, data), jacobian_matrix(model, data)
    vector, update = torch.ones(hessian.shape[0]), dict(model.named_parameters())
    with torch.inference_mode():
        for function in (
            lambda: hessian @ vector,
            lambda: gauss_newton_matrix(model, data),
            lambda: jacobian @ vector,
            lambda: jacobian.T @ torch.ones(jacobian.shape[0]),
            lambda: natgrad.update_quality(model, data, update),
        ):
            with pytest.raises(RuntimeError, match="inference_mode"):
                function()
