"""Transposed convolutions: weight and bias of one layer are one block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from natgrad import Capture, fisher_matrix
from tests import dense
from tests.cases import normal

LAYERS = {
    "1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4)),
    "stride": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), (3, 3, 2)),
    "gaps": (lambda: nn.ConvTranspose1d(2, 2, 2, stride=3, output_padding=1), (2, 3)),
    "padding": (lambda: nn.ConvTranspose2d(2, 2, (1, 3), 1, (0, 2), dilation=(1, 2)), (2, 2, 3)),
    "groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1, groups=2), (4, 3, 3)),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 1, 2)),
    "no bias": (lambda: nn.ConvTranspose1d(2, 3, 3, bias=False), (2, 4)),
}  # fmt: skip


def expected(model: nn.Module, x: Tensor) -> Tensor:
    """Return the Fisher matrix of a Gaussian likelihood, JᵀJ/N."""
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(values)
    rows = torch.cat([one.flatten(2) for one in jacobian.values()], 2).flatten(0, 1)
    return rows.T @ rows / len(x)


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return nn.Sequential(make(), nn.Tanh(), nn.Flatten()).double(), normal(3, *shape)


@pytest.mark.parametrize("name", LAYERS)
def test_the_block_of_a_layer_couples_weight_and_bias(name):
    model, x = model_of(name)
    with Capture(model) as capture:
        assert len(capture.blocks) == 1
    found = fisher_matrix(model, (x, None), "gaussian", "block_diagonal")
    dense.assert_same(found.to_dense(), expected(model, x), 1e-12)
    columns = normal(found.shape[0], 2, seed=1)
    shifted = expected(model, x) + 0.1 * torch.eye(found.shape[0]).double()
    dense.assert_same(found.solve(columns, 0.1), torch.linalg.solve(shifted, columns), 1e-9)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["stride", "groups"])
def test_either_may_be_frozen(name, frozen):
    model, x = model_of(name)
    model[0].get_parameter(frozen).requires_grad_(False)
    found = fisher_matrix(model, (x, None), "gaussian", "block_diagonal")
    dense.assert_same(found.to_dense(), expected(model, x), 1e-12)


@pytest.mark.parametrize("name", ["1d", "stride", "groups"])
def test_kfac_is_exact_for_one_sample_and_one_position(name):
    """One position of one sample is a linear map of one input, whose rows are ``δ aᵀ``."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    wide = make()
    layer = type(wide)(wide.in_channels, wide.out_channels, 2, groups=wide.groups, padding=0)
    # All but the first position is cut off by the padding.
    layer.padding = tuple(1 for _ in layer.kernel_size)
    model = nn.Sequential(layer, nn.Flatten()).double()
    x = normal(1, shape[0], *[2] * (len(shape) - 1))
    assert model(x).shape == (1, layer.out_channels)
    found = fisher_matrix(model, (x, None), "gaussian", "kfac")
    dense.assert_same(found.to_dense(), expected(model, x), 1e-12)


class TiedAutoencoder(nn.Module):
    """Encoder and decoder with one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(2, 3, 2)
        self.decoder = nn.ConvTranspose1d(3, 2, 2)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x))).flatten(1)


def test_a_kernel_tied_to_a_convolution():
    torch.manual_seed(0)
    model, x = TiedAutoencoder().double(), normal(3, 2, 4)
    found = fisher_matrix(model, (x, None), "gaussian", "full")
    dense.assert_same(found.to_dense(), expected(model, x), 1e-12)
    kernel = fisher_matrix(model, (x, None), "gaussian", "kfac").parts["encoder.weight"]
    assert kernel.to_dense().shape == (12, 12)
