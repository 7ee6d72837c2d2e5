"""Fisher matrices and steps of networks whose rows are easily taken wrongly."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import natgrad
from tests.cases import normal
from tests.situations import BATCH_DIM, SITUATIONS

pytestmark = pytest.mark.filterwarnings("ignore")


def outputs(model: nn.Module, inputs, batch_dim: int) -> Tensor:
    """Return a model's output with samples in the first dimension."""
    if isinstance(inputs, dict):
        return model(**inputs).movedim(batch_dim, 0)
    return model(*inputs if isinstance(inputs, tuple) else (inputs,)).movedim(batch_dim, 0)


def rows_of(model: nn.Module, inputs, batch_dim: int) -> tuple[Tensor, Tensor]:
    """Return the output and the Jacobian ``(N, C, P)``, differentiated entry by entry."""
    trained = [p for p in model.parameters() if p.requires_grad]
    z = outputs(model, inputs, batch_dim)
    rows = []
    for entry in z.flatten():
        found = torch.autograd.grad(
            entry, trained, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.to_dense().flatten() for g in found]))
    return z.detach(), torch.stack(rows).unflatten(0, (len(z), -1))


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_fisher_matrix_is_that_of_torch_func(name, kind):
    model, inputs = SITUATIONS[name]()
    batch_dim = BATCH_DIM.get(name, 0)
    z, jacobian = rows_of(model, inputs, batch_dim)
    target = normal(*z.shape, seed=3)
    rows = jacobian
    if kind == "empirical":
        rows = torch.einsum("nc,ncp->np", (z - target).flatten(1), jacobian).unsqueeze(1)
    rows = rows.flatten(0, 1)
    expected = rows.T @ rows / len(z)
    given = target.movedim(0, batch_dim)
    for structure in ("full", "block_diagonal", "diagonal"):
        fisher = natgrad.fisher_matrix(model, (inputs, given), "gaussian", structure, kind)
        found = fisher.to_dense()
        wanted = expected
        if structure == "diagonal":
            wanted = torch.diag(expected.diagonal())
        elif structure == "block_diagonal":
            wanted = torch.where(found != 0, expected, torch.zeros_like(expected))
            assert fisher.trace() == pytest.approx(float(expected.trace()), rel=1e-9)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.EKFAC, natgrad.ExactNGD, natgrad.FNGD])
def test_batches_of_no_samples_change_nothing(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = kind(model, "gaussian")
    x = normal(5, 3)
    for batch in (x[:0], x, x[:0], x):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        if len(batch):
            assert not torch.equal(before[0], model[0].weight)
        assert all(p.isfinite().all() for p in model.parameters())
    y = normal(5, 2)
    with_empty = natgrad.fisher_matrix(model, [(x, y), (x[:0], y[:0])], "gaussian")
    without = natgrad.fisher_matrix(model, (x, y), "gaussian")
    torch.testing.assert_close(with_empty.to_dense(), without.to_dense())


@pytest.mark.parametrize("nested", [lambda x: [x, 2 * x], lambda x: {"left": x, "right": 2 * x}])
def test_inputs_may_be_lists_and_dicts_of_tensors(nested):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, given) -> Tensor:
            left, right = given.values() if isinstance(given, dict) else given
            return self.layer(left) * torch.tanh(self.layer(right))

    torch.manual_seed(0)
    model, inputs = Product().double(), (nested(normal(4, 3)),)
    z, jacobian = rows_of(model, inputs, 0)
    rows = jacobian.flatten(0, 1)
    found = natgrad.fisher_matrix(model, (inputs, None), "gaussian", "full").to_dense()
    torch.testing.assert_close(found, rows.T @ rows / len(z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["graph_convolution", "own_batch_norm", "contrastive", "functional_tying", "flat_tokens"],
)
def test_sampled_labels_are_right_on_average_in_one_pass(name):
    """Rows of coupled samples are summed before they are squared."""
    model, inputs = SITUATIONS[name]()
    z, jacobian = rows_of(model, inputs, 0)
    rows = jacobian.flatten(0, 1)
    expected = (rows.T @ rows / len(z)).diagonal()
    many = natgrad.fisher.MonteCarloFisher(samples=4000)
    fisher = natgrad.fisher_matrix(model, (inputs, None), "gaussian", "diagonal", many)
    assert (fisher.diagonal() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_step_is_that_of_the_dense_matrix_or_refused_by_name(name, kind):
    model, inputs = SITUATIONS[name]()
    batch_dim = BATCH_DIM.get(name, 0)
    z, jacobian = rows_of(model, inputs, batch_dim)
    target = normal(*z.shape, seed=3)
    residual = (z - target).flatten(1)
    per_sample = torch.einsum("nc,ncp->np", residual, jacobian)
    rows = (jacobian.flatten(0, 1) if kind == "exact" else per_sample) / len(z) ** 0.5
    gradient = per_sample.mean(0)
    damped = rows.T @ rows + 0.1 * torch.eye(rows.shape[1]).double()
    expected = torch.linalg.solve(damped, gradient)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    optimizer = natgrad.ExactNGD(
        model, "gaussian", fisher=kind, lr=1.0, damping=0.1, momentum=0.0, kl_clip=None
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        residuals = outputs(model, inputs, batch_dim) - target
        (0.5 * residuals.square().sum() / len(z)).backward()
        try:
            optimizer.step()
        except ValueError as error:
            assert kind == "empirical" and "use fisher='exact' or 'mc'" in str(error)
            return
    found = before - torch.cat([p.detach().flatten() for p in trained])
    untrusted = optimizer.preconditioner.untrusted
    if not untrusted:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    else:  # Only rows of single samples that the training gradient does not leave.
        assert kind == "empirical"
        sentences = " ".join(str(one.message) for one in told)
        assert all(parameter in sentences for parameter in untrusted)
        assert found.isfinite().all() and bool((found != 0).any())


METHODS = [
    natgrad.KFAC, natgrad.EKFAC, natgrad.TKFAC, natgrad.TEKFAC, natgrad.KPSVD, natgrad.TwoLevelKFAC,
    natgrad.SINGD, natgrad.FNGD, natgrad.UnitWiseNGD, natgrad.DiagonalNGD, natgrad.BlockDiagonalNGD,
    natgrad.ConjugateGradientNGD,
]  # fmt: skip


@pytest.mark.parametrize("kind", METHODS)
def test_methods_train_in_every_situation(kind):
    """One in all of them; the others, which see the same rows, in every third."""
    everywhere = kind is natgrad.KFAC
    for name in list(SITUATIONS)[METHODS.index(kind) % 3 :: 1 if everywhere else 3]:
        model, inputs = SITUATIONS[name]()
        batch_dim = BATCH_DIM.get(name, 0)
        optimizer = kind(model, "gaussian", lr=0.02, damping=0.1)
        target, losses = None, []
        for _ in range(4):
            optimizer.zero_grad()
            z = outputs(model, inputs, batch_dim)
            target = normal(*z.shape, seed=3) if target is None else target
            loss = 0.5 * (z - target).square().sum() / len(z)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0], (name, losses)
