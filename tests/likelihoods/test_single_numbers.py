"""Outputs of one number per sample, ``(N,)``, are those of shape ``(N, 1)``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.cases import normal

X, Y = normal(12, 4, seed=1), normal(12, seed=2)
LOSSES = {
    "gaussian": lambda z: functional.mse_loss(z, Y),
    "bernoulli": lambda z: functional.binary_cross_entropy_with_logits(z, (Y > 0).double()),
    "poisson": lambda z: functional.poisson_nll_loss(z, Y.exp().round()),
    "masked": lambda z: (z - Y).square()[Y > 0].mean(),
}
METHODS = [
    natgrad.KFAC, natgrad.EKFAC, natgrad.SINGD, natgrad.ExactNGD, natgrad.ImprovedEmpiricalNGD,
    natgrad.FNGD,
]  # fmt: skip


class Regression(nn.Module):
    def __init__(self, squeezes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.squeezes = squeezes

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return out.squeeze(-1) if self.squeezes else out


class ActorCritic(nn.Module):
    def __init__(self, squeezes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.policy, self.value = nn.Linear(4, 3).double(), Regression(squeezes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


def trained(kind, model, likelihood, loss) -> Tensor:
    optimizer = kind(model, likelihood)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", list(LOSSES))
def test_steps(kind, name):
    likelihood = "gaussian" if name == "masked" else name
    found = trained(kind, Regression(True), likelihood, LOSSES[name])
    wanted = trained(kind, Regression(False), likelihood, lambda z: LOSSES[name](z[:, 0]))
    torch.testing.assert_close(found, wanted)


class Squeezed(nn.Module):
    def __init__(self, outputs: int, squeezes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
        self.squeezes = squeezes

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return out.squeeze() if self.squeezes else out


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_last_batch_of_one_that_is_squeezed(kind, outputs):
    """``out.squeeze()`` takes the dimension of its samples away, too."""
    ends = []
    for squeezes in (True, False):
        model = Squeezed(outputs, squeezes)
        optimizer = kind(model, nn.BCEWithLogitsLoss() if outputs == 1 else "categorical")
        for x in (X[:5], X[5:10], X[10:11], X[11:]):
            y = torch.arange(len(x)) % 3
            z = model(x)
            optimizer.zero_grad()
            if outputs == 1:
                labels = (y > 0).double().reshape(z.shape)
                functional.binary_cross_entropy_with_logits(z, labels).backward()
            else:
                functional.cross_entropy(z, y.reshape(z.shape[:-1])).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.ExactNGD])
def test_targets_of_a_squeezed_batch_may_be_told(kind):
    ends = []
    for squeezes in (True, False):
        model, criterion = Squeezed(3, squeezes), nn.CrossEntropyLoss()
        optimizer = kind(model, criterion)
        for x in (X[:5], X[5:6]):
            optimizer.zero_grad()
            z = model(x)
            y = (torch.arange(len(x)) % 3).reshape(z.shape[:-1])
            optimizer.loss(criterion, z, y).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", METHODS)
def test_steps_of_a_head(kind):
    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        policy, value = out
        label = torch.arange(len(policy)) % 3
        return functional.cross_entropy(policy, label) + (value.reshape(-1) - Y).square().mean()

    likelihood = {0: "categorical", 1: nn.MSELoss()}
    found = [trained(kind, ActorCritic(squeezes), likelihood, loss) for squeezes in (True, False)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "improved"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
def test_the_matrix(likelihood, fisher):
    target = (Y > 0).double()
    found = natgrad.fisher_matrix(Regression(True), (X, target), likelihood, fisher=fisher)
    wanted = natgrad.fisher_matrix(Regression(False), (X, target[:, None]), likelihood,
                                   fisher=fisher)  # fmt: skip
    torch.testing.assert_close(found.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("inducing", [None, X[:5]])
def test_predictions_of_a_posterior(likelihood, inducing):
    def posterior(squeezes: bool):
        target = (Y > 0).double()
        data = X, target if squeezes else target[:, None]
        if inducing is None:
            return natgrad.Laplace(Regression(squeezes), data, likelihood)
        return natgrad.VariationalLaplace(Regression(squeezes), data, likelihood, inducing=inducing)

    found, wanted = posterior(True), posterior(False)
    torch.testing.assert_close(found.log_marginal_likelihood(), wanted.log_marginal_likelihood())
    mean, covariance = found.functional_variance(X)
    wanted_mean, wanted_covariance = wanted.functional_variance(X)
    torch.testing.assert_close(mean, wanted_mean[:, 0])
    torch.testing.assert_close(covariance, wanted_covariance)
    gaussian = likelihood == "gaussian"
    ours, theirs = (one.predict(X) if gaussian else (one.predict(X),) for one in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other[:, 0])


@pytest.mark.parametrize("structure", ["gd", "full", "kfac"])
def test_predicted_training(structure):
    def course(squeezes: bool):
        network = natgrad.ntk.LinearizedNetwork(Regression(squeezes), X, X[:3])
        target = Y if squeezes else Y[:, None]
        return natgrad.ntk.predict(network, target, structure, steps=[1, 5], lr=0.1, damping=0.01)

    found, wanted = course(True), course(False)
    torch.testing.assert_close(found.train, wanted.train[..., 0])
    torch.testing.assert_close(found.test, wanted.test[..., 0])


def test_classes_without_samples_are_refused():
    model = nn.Linear(4, 3).double()
    optimizer = natgrad.KFAC(model)  # Held: what nobody holds takes its hooks away.
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="give a single sample a first dimension of size 1"):
        functional.cross_entropy(model(X[0]), torch.tensor(1)).backward()


@pytest.mark.parametrize("advantage", [1.0, -0.3])
def test_policies_of_one_state_are_refused(advantage):
    model = nn.Linear(4, 3).double()
    optimizer = natgrad.KFAC(model)
    optimizer.zero_grad()
    policy = torch.distributions.Categorical(logits=model(X[0]))
    with pytest.raises(ValueError, match="give a single sample a first dimension of size 1"):
        (-advantage * policy.log_prob(torch.tensor(1)) - 0.01 * policy.entropy()).backward()


def energies(z: Tensor) -> Tensor:
    """Return what tells data from draws of an energy-based model, whose gradient sums to zero."""
    data, drawn = z.chunk(2)
    return data.mean() - drawn.mean()


def survival(z: Tensor) -> Tensor:
    """Return the loss of Cox's proportional hazards, every sample an event."""
    return -(z - z.logcumsumexp(0)).mean()


UNNAMED = {
    "binary": lambda z: functional.binary_cross_entropy_with_logits(z, (Y > 0).double()),
    "density": lambda z: -z.mean(),
    "energies": energies,
    "survival": survival,
    "ranks": lambda z: functional.softplus(z[1:] - z[:-1]).mean(),
}


@pytest.mark.parametrize("name", list(UNNAMED))
def test_losses_without_a_likelihood(name):
    """The gradient decides for ``(N,)`` as it does for ``(N, 1)``."""
    loss = UNNAMED[name]
    with pytest.warns(UserWarning, match="a single class"):
        found = trained(natgrad.KFAC, Regression(True), "categorical", loss)
        wanted = trained(natgrad.KFAC, Regression(False), "categorical", lambda z: loss(z[:, 0]))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("squeezes", [True, False])
def test_means_of_large_outputs_are_no_binary_labels(squeezes, sign):
    """Densities of much data are far from zero, where a sigmoid is 0 or 1."""
    model = Regression(squeezes)
    with torch.no_grad():
        model.layers[2].bias += 30 * sign
    optimizer = natgrad.KFAC(model)
    with pytest.warns(UserWarning, match=r"that of Gaussian\(.*\) is taken"):
        (sign * model(X).mean()).backward()
    optimizer.step()
    assert type(optimizer.preconditioner.observer.likelihood) is natgrad.likelihoods.Gaussian
