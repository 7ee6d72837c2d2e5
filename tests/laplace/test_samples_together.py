"""Predictions and kernels of models that take no sample by itself, or not from the front."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from natgrad import Laplace, VariationalLaplace
from natgrad.laplace import linearized
from natgrad.ntk import empirical_kernel
from tests import dense
from tests.cases import normal


class TimeFirst(nn.Module):
    """Steps of time come first, as in recurrent layers by default."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][-1])


class Graph(nn.Module):
    """Nodes of one graph, each with its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        hidden = torch.tanh(neighbours @ self.first(x))
        return neighbours @ self.second(hidden)


class Centred(nn.Module):
    """Every sample beside the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden - hidden.mean(0))


def cases() -> dict[str, tuple[nn.Module, object]]:
    torch.manual_seed(0)
    neighbours = (normal(20, 20) > 0).double() / 10
    found = {
        "time first": (TimeFirst(), normal(40, 20, 2)),
        "as long as wide": (TimeFirst(), normal(20, 20, 2)),
        "graph": (Graph(), (normal(20, 3), neighbours)),
        "sparse graph": (Graph(), (normal(20, 3), neighbours.to_sparse())),
        "centred": (Centred(), normal(20, 3)),
    }
    return {name: (model.double(), x) for name, (model, x) in found.items()}


def jacobian(model: nn.Module, x: object) -> tuple[Tensor, Tensor]:
    arguments = x if isinstance(x, tuple) else (x,)
    z, parameters = model(*arguments), list(model.parameters())
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in z.flatten()]
    return z.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("kind", [Laplace, VariationalLaplace])
@pytest.mark.parametrize("name", list(cases()))
def test_predictions_are_those_of_all_samples_together(kind, name):
    model, x = cases()[name]
    z, rows = jacobian(model, x)
    options = {"inducing": x} if kind is VariationalLaplace else {"structure": "full"}
    y = normal(*z.shape, seed=3)
    posterior = kind(model, (x, y), "gaussian", prior_precision=0.5, **options)
    covariance = rows @ torch.linalg.inv(rows.T @ rows + 0.5 * torch.eye(rows.shape[1])) @ rows.T
    blocks = covariance.view(20, 2, 20, 2)[range(20), :, range(20)]
    mean, found = posterior.functional_variance(x)
    dense.assert_same(mean, z)
    dense.assert_same(found, blocks, 1e-6)
    mean, variance = posterior.predict(x)
    dense.assert_same(mean, z)
    dense.assert_same(variance, blocks.diagonal(dim1=1, dim2=2) + 1.0, 1e-7)


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", list(cases()))
def test_kernels_are_those_of_all_samples_together(name, batch_size):
    model, x = cases()[name]
    _, rows = jacobian(model, x)
    dense.assert_same(empirical_kernel(model, x, batch_size=batch_size), rows @ rows.T)
    trace = empirical_kernel(model, x, outputs="trace", batch_size=batch_size)
    own = rows.view(20, 2, -1)
    dense.assert_same(trace, torch.einsum("nkp,mkp->nm", own, own))


@pytest.mark.filterwarnings("ignore:natgrad")
def test_the_predictive_fit_takes_targets_as_the_model_lays_its_outputs():
    class Steps(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x)[0])

    class Sequences(Steps):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    x, y, found = normal(3, 4, 2), torch.arange(12).view(3, 4) % 2, []
    model = Steps().double()
    for kind, turned in ((Steps, False), (Sequences, True)):
        same = kind().double()
        same.load_state_dict(model.state_dict())
        data = (x.transpose(0, 1), y.T) if turned else (x, y)
        posterior = VariationalLaplace(same, data, "categorical", data[0])
        found.append(torch.tensor(posterior.fit_predictive(data, 3), dtype=torch.float64))
    dense.assert_same(found[0], found[1], 1e-6)


def test_samples_that_stand_alone_are_taken_a_few_at_a_time():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(20, 3)
    posterior = Laplace(model, (x, normal(20, 2)), "gaussian", "full")
    whole = posterior.functional_variance(x)
    with mock.patch.object(linearized, "output_rows", wraps=linearized.output_rows) as made:
        again = posterior.functional_variance(x)
    assert [len(call.args[1]) for call in made.call_args_list] == [16, 4]
    for one, other in zip(whole, again, strict=True):
        dense.assert_same(one, other)
