"""Binary labels whose ones are weighted, as by ``pos_weight``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad
from natgrad.likelihoods import Bernoulli, from_loss
from tests.cases import generator, normal
from tests.likelihoods.test_torch_losses import seen_by_optimizer

WEIGHTS = [torch.tensor(3.0), torch.tensor([0.3, 5.0, 1.0]), torch.tensor([[2.0], [0.5], [7.0]])]
TIGHT = dict(rtol=1e-12, atol=1e-13)


def case(weight: Tensor, seed: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Return outputs and labels of a shape that goes with weights."""
    shape = (6, 3, 2) if weight.dim() == 2 else (6, 3)
    labels = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return 2 * normal(*shape, seed=seed), labels if soft else labels.round()


@given(
    st.sampled_from(WEIGHTS), st.sampled_from(["mean", "sum"]), st.booleans(), st.integers(0, 999)
)
def test_loss_gradient_and_curvature_are_torchs(weight, reduction, soft, seed):
    criterion = nn.BCEWithLogitsLoss(pos_weight=weight.double(), reduction=reduction)
    likelihood = from_loss(criterion)
    output, target = case(weight, seed, soft)
    factor = len(output) if reduction == "mean" else 1  # The losses of single samples, added up.

    def total(z: Tensor) -> Tensor:
        return criterion(z, target) * factor

    torch.testing.assert_close(likelihood.nll(output, target).sum(), total(output), **TIGHT)
    assert float(likelihood.count(output, target)) == len(output)
    found = likelihood.loss(output, target) * len(output)
    torch.testing.assert_close(found, total(output), **TIGHT)
    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(likelihood.gradient(output, target), gradient, **TIGHT)
    hessian = torch.autograd.functional.hessian(total, output).reshape(output.numel(), -1)
    blocks = torch.block_diag(*likelihood.output_hessian(output, target)[:, 0])
    torch.testing.assert_close(blocks, hessian, **TIGHT)


@given(st.sampled_from(WEIGHTS), st.integers(0, 999), st.floats(0.01, 100))
def test_the_gradient_shows_the_weights(weight, seed, scale):
    likelihood = Bernoulli("sum", positive_weights=weight)
    output, target = case(weight, seed)
    cotangent = scale * likelihood.gradient(output, target)
    for known in (target, None):
        weights, found = likelihood.infer_event_weights(output, cotangent, known)
        expected = likelihood.spread(likelihood.event_weights(output, target), output)
        torch.testing.assert_close(likelihood.spread(weights, output), expected, **TIGHT)
        torch.testing.assert_close(float(found), scale, rtol=1e-9, atol=0.0)
        assert float(likelihood.seen_count(output, weights, known)) == len(output)


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("weight", WEIGHTS[:2], ids=["one for all", "one for each"])
def test_an_optimizer_sees_the_matrix_of_the_loss(weight):
    criterion = nn.BCEWithLogitsLoss(pos_weight=weight.double())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = normal(12, 4)
    y = torch.rand(12, 3, generator=generator(1)).round().double()
    seen = seen_by_optimizer(model, criterion, lambda m: criterion(m(x), y))
    expected = natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense()
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)
    plain = natgrad.fisher_matrix(model, (x, y), nn.BCEWithLogitsLoss(), "full").to_dense()
    assert float((seen - plain).norm()) > 0.05 * float(plain.norm())


@pytest.mark.parametrize("weights", [-1.0, [1.0, float("nan")], [1.0, -2.0]])
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match="positive_weights"):
        Bernoulli(positive_weights=weights)


def test_weights_can_be_compared():
    one = from_loss(nn.BCEWithLogitsLoss(pos_weight=torch.tensor([[2.0], [3.0]])))
    assert one == Bernoulli("mean", positive_weights=[[2.0], [3.0]]) and hash(one)
    assert one != from_loss(nn.BCEWithLogitsLoss())
