"""Residual networks with BatchNorm and vision transformers against dense Gaussian algebra."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad import Laplace, VariationalLaplace, fisher_matrix
from natgrad.laplace import linearized
from tests import dense
from tests.cases import normal


class Residual(nn.Module):
    """A convolution, two more beside a shortcut, a classifier; BatchNorm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.body = nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh(),
            nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3),
        )  # fmt: skip
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(x + self.body(x)).mean((2, 3)))


class Transformer(nn.Module):
    """Patches, positions, attention and a perceptron behind LayerNorms, the mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 4, 4))
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.joint, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.perceptron = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        heads = self.joint(self.norms[0](x)).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head((x + self.perceptron(self.norms[1](x))).mean(1))


def network(kind: type[nn.Module]) -> nn.Module:
    """Return a network in evaluation mode, its running statistics those of some data."""
    torch.manual_seed(0)
    model = kind().double()
    model.train()
    for seed in range(3):
        model(2.0 * normal(16, 1, 4, 4, seed=seed) + 1.0)
    return model.eval()


@pytest.mark.parametrize("kind", [Residual, Transformer])
@pytest.mark.parametrize("structure", ["full", "kfac", "ekfac"])
def test_posteriors_are_the_dense_ones_in_pieces_of_any_size(kind, structure):
    model = network(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y, new = normal(12, 1, 4, 4), torch.arange(12) % 3, normal(5, 1, 4, 4, seed=7)
    posterior = Laplace(model, [(x[:7], y[:7]), (x[7:], y[7:])], structure=structure,
                        prior_precision=0.5)  # fmt: skip
    fisher = posterior.matrix.to_dense()
    if structure != "ekfac":  # Whose basis is that of one batch or the other.
        whole = fisher_matrix(model, (x, y), structure=structure).to_dense()
        dense.assert_same(fisher, whole, 1e-8)
    sigma = torch.linalg.inv(12 * fisher + 0.5 * torch.eye(len(fisher)).double())
    _, jacobian = dense.jacobian(model, new)
    expected = jacobian @ sigma @ jacobian.mT
    for together in (1, 2, 16):
        with mock.patch.object(linearized, "CHUNK_SAMPLES", together):
            dense.assert_same(posterior.functional_variance(new)[1], expected, 1e-7)
    rows = jacobian.flatten(0, 1)
    _, joint = posterior.functional_variance(new, joint=True)
    dense.assert_same(joint, rows @ sigma @ rows.T, 1e-7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_the_last_layer_is_the_one_called_last(kind):
    """Not a parameter of the model itself, as the table of positions."""
    model = network(kind)
    posterior = Laplace(model, (normal(6, 1, 4, 4), torch.arange(6) % 3), structure="full",
                        parameters="last_layer")  # fmt: skip
    assert posterior.matrix.parameter_names == ("head.weight", "head.bias")


class Language(nn.Module):
    """Tokens whose table is the output layer, too."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.table, self.body, self.product = nn.Embedding(5, 4), nn.Linear(4, 4), product
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.table(tokens)).mean(1))
        return functional.linear(x, self.table.weight) if self.product else self.head(x)


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("kind", [Laplace, VariationalLaplace])
@pytest.mark.parametrize("product", [False, True])
def test_a_table_that_is_the_output_layer_is_the_last_layer(kind, product):
    torch.manual_seed(0)
    model, tokens = Language(product).double(), torch.arange(18).view(6, 3) % 5
    options = {"selection": "random", "inducing": 6} if kind is VariationalLaplace else {}
    posterior = kind(model, (tokens, torch.arange(6) % 5), parameters="last_layer", **options)
    assert posterior.matrix.parameter_names == ("table.weight",)
