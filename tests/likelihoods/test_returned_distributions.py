"""Models that return a distribution, or a mean and its scale side by side, and no likelihood."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, distributions, nn

import natgrad
from natgrad.likelihoods import Bernoulli, Gaussian, MeanAndScale
from tests.cases import normal

X, Y = normal(12, 4, seed=1), normal(12, 3, seed=2)
SCALES = {
    "variance": lambda v: nn.functional.softplus(v) + 0.1,
    "deviation": lambda v: nn.functional.softplus(v) + 0.1,
    "log_variance": lambda v: v,
    "log_deviation": lambda v: v,
}
DEVIATIONS = {
    "variance": Tensor.sqrt,
    "deviation": lambda s: s,
    "log_variance": lambda s: (s / 2).exp(),
    "log_deviation": Tensor.exp,
}


class Forecast(nn.Module):
    """Two outputs of three numbers each, given to ``returned``."""

    def __init__(self, returned) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        self.returned = returned

    def forward(self, x: Tensor):
        return self.returned(*self.layers(x).chunk(2, -1))


def trained(model: nn.Module, loss, *likelihood, steps: int = 4) -> tuple[Tensor, natgrad.KFAC]:
    optimizer = natgrad.KFAC(model, *likelihood)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), optimizer


def nll(found: distributions.Distribution) -> Tensor:
    return -found.log_prob(Y).sum() / len(Y)


RETURNED = {
    "plain": lambda m, v: distributions.Normal(m, SCALES["deviation"](v)),
    "independent": lambda m, v: distributions.Independent(
        distributions.Normal(m, SCALES["deviation"](v)), 1
    ),
}


@pytest.mark.parametrize("name", list(RETURNED))
def test_a_normal_distribution_is_its_mean_and_deviation(name):
    with pytest.warns(UserWarning, match=r"of MeanAndScale\(.*\) is taken"):
        found, optimizer = trained(Forecast(RETURNED[name]), nll)
    assert optimizer.preconditioner.observer.likelihood.scale == "deviation"
    likelihood = MeanAndScale("deviation", reduce_outputs="sum")
    model = Forecast(lambda m, v: (m, SCALES["deviation"](v)))
    wanted, _ = trained(model, lambda out: nll(distributions.Normal(*out)), likelihood)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("mean", [False, True])
def test_halves_of_an_output_are_seen(scale, mean):
    def loss(out: Tensor) -> Tensor:
        m, s = out.chunk(2, -1)
        found = nll(distributions.Normal(m, DEVIATIONS[scale](s)))
        return found / Y.shape[1] if mean else found

    def joined(m: Tensor, v: Tensor) -> Tensor:
        return torch.cat([m, SCALES[scale](v)], -1)

    with pytest.warns(UserWarning, match=r"of MeanAndScale\(.*\) is taken"):
        found, optimizer = trained(Forecast(joined), loss)
    assert optimizer.preconditioner.observer.likelihood.scale == scale
    likelihood = MeanAndScale(scale, keys=None, reduce_outputs="mean" if mean else "sum")
    wanted, _ = trained(Forecast(joined), loss, likelihood)
    torch.testing.assert_close(found, wanted)


def test_other_losses_of_halves_are_not():
    def squares(out: Tensor) -> Tensor:
        return (out - torch.cat([Y, Y.flip(0)], -1)).square().mean()

    with pytest.warns(UserWarning, match=r"of Gaussian\(.*\) is taken"):
        _, optimizer = trained(Forecast(lambda m, v: torch.cat([m, v], -1)), squares)
    assert type(optimizer.preconditioner.observer.likelihood) is Gaussian


def test_logits_of_a_distribution():
    model = Forecast(lambda m, v: distributions.Bernoulli(logits=m + v))
    labels = (Y > 0).double()
    with pytest.warns(UserWarning, match=r"of Bernoulli\(.*\) is taken"):
        found, _ = trained(model, lambda out: -out.log_prob(labels).sum() / len(Y))
    wanted, _ = trained(
        Forecast(lambda m, v: m + v),
        lambda z: -distributions.Bernoulli(logits=z).log_prob(labels).sum() / len(Y),
        Bernoulli(reduce_outputs="sum"),
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("events", [1, 2])
@pytest.mark.parametrize("made_of", ["logits", "probs"])
def test_classes_of_a_distribution(made_of, events):
    """Of a sample, or of each of several events of it."""

    def logits(m: Tensor, v: Tensor) -> Tensor:
        return m + v if events == 1 else torch.stack([m, v], 1)

    def returned(m: Tensor, v: Tensor) -> distributions.Categorical:
        z = logits(m, v)
        made = {"probs": z.softmax(-1)} if made_of == "probs" else {"logits": z}
        return distributions.Categorical(**made)

    labels = torch.arange(12 * events) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = trained(
            Forecast(returned), lambda out: -out.log_prob(labels.reshape(out.batch_shape)).mean()
        )
        wanted, _ = trained(
            Forecast(logits), lambda z: nn.functional.cross_entropy(z.flatten(0, -2), labels)
        )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("likelihood", [(), ({0: "categorical", 1: "gaussian"},)])
def test_a_policy_beside_its_value(likelihood):
    """The distribution comes first, as the tensor in its place would, or is a head."""
    labels = torch.arange(12) % 3

    def loss(policy: distributions.Categorical, value: Tensor) -> Tensor:
        return -policy.log_prob(labels).mean() + 0.5 * (value - Y.sum(1)).square().mean()

    def of_logits(logits: Tensor, value: Tensor) -> Tensor:
        return loss(distributions.Categorical(logits=logits), value)

    def returned(m: Tensor, v: Tensor) -> tuple[distributions.Categorical, Tensor]:
        return distributions.Categorical(logits=m), v.sum(1)

    ends = []
    for model, own in (
        (Forecast(returned), loss),
        (Forecast(lambda m, v: (m, v.sum(1))), of_logits),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not likelihood else "error")
            ends.append(trained(model, lambda out: own(*out), *likelihood)[0])  # noqa: B023
    torch.testing.assert_close(*ends)


def test_a_distribution_of_several_tensors_is_no_head():
    model = Forecast(lambda m, v: (distributions.Normal(m, v.exp()), v))
    with pytest.raises(ValueError, match="a head 0, .* under that key"):
        trained(model, lambda out: nll(out[0]), {0: "gaussian", 1: "gaussian"})


def test_a_lone_deviation_is_part_of_the_output():
    """Expanded by the distribution, it comes through the output as its mean does."""
    model = nn.Linear(4, 3).double()
    policy = Policy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*trains these parameters")
        warnings.filterwarnings("ignore", message="(?s).*is taken")
        _, optimizer = trained(policy, nll)
    assert isinstance(optimizer.preconditioner.observer.likelihood, MeanAndScale)
    assert "log_std" in {n for b in optimizer.preconditioner.curvature.blocks.values()
                         for n in b.names}  # fmt: skip


class Policy(nn.Module):
    def __init__(self, mean: nn.Module) -> None:
        super().__init__()
        self.mean, self.log_std = mean, nn.Parameter(torch.zeros(3).double())

    def forward(self, x: Tensor) -> distributions.Normal:
        return distributions.Normal(self.mean(x), self.log_std.exp())


def test_checkpoints_keep_what_was_seen():
    model = Forecast(RETURNED["plain"])
    with pytest.warns(UserWarning, match="is taken"):
        _, optimizer = trained(model, nll)
    other = copy.deepcopy(model)
    again = natgrad.KFAC(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.preconditioner.observer.likelihood == optimizer.preconditioner.observer.likelihood
    for _ in range(3):
        for one, net in ((optimizer, model), (again, other)):
            one.zero_grad()
            nll(net(X)).backward()
            one.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
