"""A mean and its variance as two outputs: one likelihood, whatever the second one is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import MeanAndScale, as_likelihood
from tests.cases import generator, normal
from tests.methods import make_optimizer

#: What the second output is → it of the logarithm of the variance, and the variance of it.
FORMS = {
    "variance": (torch.exp, lambda s: s),
    "deviation": (lambda r: (r / 2).exp(), torch.square),
    "log_variance": (lambda r: r, torch.exp),
    "log_deviation": (lambda r: r / 2, lambda s: (2 * s).exp()),
}


class Model(nn.Module):
    """A network that returns m and s, as a tuple or as halves of a tensor."""

    def __init__(self, form: str, size: int = 3, whole: bool = False) -> None:
        super().__init__()
        self.form, self.whole = FORMS[form][0], whole
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2 * size)).double()
        for index, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=index) / 2

    def forward(self, x: Tensor):
        mean, rest = self.net(x).chunk(2, -1)
        out = mean, self.form(rest)
        return torch.cat(out, -1) if self.whole else out


def nll(form: str, out, y: Tensor, averages: bool = True) -> Tensor:
    mean, s = out if isinstance(out, tuple) else out.chunk(2, -1)
    loss = functional.gaussian_nll_loss(mean, y, FORMS[form][1](s), eps=1e-12)
    return loss if averages else loss * y[0].numel()


@pytest.mark.parametrize("form", FORMS)
def test_the_hessian_is_the_expected_one(form):
    """By Gauss-Hermite quadrature, which is exact for what is quadratic in the target."""
    mean, rest = normal(2, 3), normal(2, 3, seed=1)
    z = torch.cat([mean, FORMS[form][0](rest)], -1)
    likelihood = MeanAndScale(form, reduce_outputs="sum")
    expected = 0.0
    for sign in (-1.0, 1.0):  # Two points of ±1 have the moments up to the third.
        y = mean + sign * (rest / 2).exp()

        def total(w: Tensor, y: Tensor = y) -> Tensor:
            return likelihood.nll(w, y).sum()

        expected = expected + torch.autograd.functional.hessian(total, z) / 2
        gradient = torch.autograd.functional.jacobian(total, z)
        torch.testing.assert_close(likelihood.gradient(z, y), gradient)
    found = likelihood.output_hessian(z).squeeze(1)
    for n in range(2):
        torch.testing.assert_close(found[n], expected[n, :, n])
    draws = likelihood.sampled_vectors(z[:1].expand(20000, -1), generator(1), 1)[0]
    moment = draws.mT @ draws / len(draws)
    assert (moment - found[0]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_tells_what_the_second_output_is(form, whole, averages):
    x, y = normal(12, 4), normal(12, 3, seed=1)
    model = Model(form, whole=whole)
    likelihood = MeanAndScale(keys=None if whole else (0, 1))
    optimizer = natgrad.KFAC(model, likelihood)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nll(form, model(x), y, averages).backward()
        optimizer.step()
    expected = MeanAndScale(form, likelihood.keys, "mean" if averages else "sum")
    assert optimizer.preconditioner.observer.likelihood == expected
    other = natgrad.KFAC(copy.deepcopy(model), likelihood)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.preconditioner.observer.likelihood == expected


@pytest.mark.parametrize("method", ["ExactNGD", "KFAC"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_steps_do_not_depend_on_what_it_is(fisher, method):
    x, y, found = normal(12, 4), normal(12, 3, seed=1), []
    for form in FORMS:
        model = Model(form)
        optimizer = make_optimizer(
            getattr(natgrad, method), model, MeanAndScale(), fisher=fisher, damping=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            nll(form, model(x), y).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("errors", [1.0, 100.0])
def test_it_is_seen_in_low_precision(form, errors):
    """Though targets lie a hundred deviations from their means, as at the start of training."""
    z = torch.cat([normal(32, 3), FORMS[form][0](normal(32, 3, seed=1))], -1)
    z, y = z.bfloat16().requires_grad_(), z[:, :3] + errors * normal(32, 3, seed=2)
    loss = functional.gaussian_nll_loss(z[:, :3], y.bfloat16(), FORMS[form][1](z[:, 3:]))
    (1024 * loss).backward()
    found, said = MeanAndScale(keys=None).seen_with(z.detach(), z.grad)
    assert found == MeanAndScale(form, None, "mean") and not said
    _, scale = found.infer_event_weights(z.detach(), z.grad)
    torch.testing.assert_close(scale, scale.new_tensor(1024 / 32), rtol=0.03, atol=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_scale_are_seen_without_a_target(form):
    z = torch.cat([normal(8, 3), FORMS[form][0](normal(8, 3, seed=1))], -1).requires_grad_()
    y, likelihood = normal(8, 3, seed=2), MeanAndScale(form, None, "sum")
    w = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    (cotangent,) = torch.autograd.grad((w * likelihood.nll(z, y)).sum() * 0.7, z)
    weights, scale = likelihood.infer_event_weights(z.detach(), cotangent)
    torch.testing.assert_close((weights * scale).squeeze(1), 0.7 * w)
    torch.testing.assert_close(weights[weights > 0].mean(), weights.new_tensor(1.0))
    bound = likelihood.largest_decrement(z.detach(), cotangent, weights, scale)
    assert 0 < bound < float("inf")


def test_the_loss_of_torch_stands_for_it():
    x, y = normal(12, 4), normal(12, 3, seed=1)
    assert as_likelihood(nn.GaussianNLLLoss()) == MeanAndScale("variance", reduce_outputs="mean")
    assert as_likelihood(functional.gaussian_nll_loss) == as_likelihood(nn.GaussianNLLLoss())
    one = natgrad.fisher_matrix(Model("variance"), (x, y), nn.GaussianNLLLoss(), "full")
    same = MeanAndScale("log_variance", None, "mean")
    two = natgrad.fisher_matrix(Model("log_variance", whole=True), (x, y), same, "full")
    torch.testing.assert_close(one.to_dense(), two.to_dense())
    loss = as_likelihood(nn.GaussianNLLLoss()).loss(torch.cat(Model("variance")(x), -1), y)
    torch.testing.assert_close(loss, nll("variance", Model("variance")(x), y))


def test_refusals():
    model, x = Model("variance"), normal(12, 4)
    optimizer = natgrad.KFAC(model, MeanAndScale())
    with pytest.warns(UserWarning, match="no loss of MeanAndScale"):
        mean, s = model(x)
        (mean.square().mean() + s.square().mean()).backward()
    with pytest.raises(ValueError, match="one shape"):
        MeanAndScale().of_shapes({0: torch.Size([4, 3]), 1: torch.Size([4, 1])})
    with pytest.raises(ValueError, match="scale must be one of"):
        MeanAndScale("precision")
    with pytest.raises(ValueError, match="target of the shape of the means"):
        MeanAndScale().nll(torch.ones(2, 4), torch.ones(2, 3))
    del optimizer
