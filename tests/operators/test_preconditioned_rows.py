"""K-FAC's two routes, through the gradient and through its rows, against the explicit formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.curvature import Curvature
from natgrad.operators import KroneckerOperator
from tests.methods import make_optimizer

DAMPING = 0.03


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 44), nn.Tanh())
    model.append(nn.Linear(44, 4, bias=False))
    return model.double()


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (6,), generator=generator)


@pytest.fixture
def used(monkeypatch):
    """Record the blocks that take the route through rows, in the attempt that became the step."""
    blocks = []
    attempt = Curvature.natural_gradient

    def attempted(self, *args):
        blocks.clear()
        return attempt(self, *args)

    monkeypatch.setattr(Curvature, "natural_gradient", attempted)
    original = KroneckerOperator.multiply_rows

    def spy(self, *rows):
        blocks.append(self.layout.names[0].partition(".")[0])
        return original(self, *rows)

    monkeypatch.setattr(KroneckerOperator, "multiply_rows", spy)
    return blocks


def expected_direction(model, matrix):
    """Return (B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹ for every layer, as a flat vector."""
    pieces = []
    for name, part in matrix.parts.items():
        a, b = (factor[0] for factor in part.factors)
        layer = model[int(name)]
        gradient = layer.weight.grad
        if layer.bias is not None:
            gradient = torch.cat([gradient, layer.bias.grad[:, None]], dim=1)
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5
        left = torch.linalg.inv(b + DAMPING**0.5 / pi * torch.eye(len(b)))
        right = torch.linalg.inv(a + DAMPING**0.5 * pi * torch.eye(len(a)))
        result = left @ gradient @ right
        if layer.bias is not None:
            pieces += [result[:, :-1].flatten(), result[:, -1]]
        else:
            pieces.append(result.flatten())
    return torch.cat(pieces)


@pytest.mark.parametrize(
    ("way", "through_rows"),
    [
        ("plain", ["0", "2"]),
        ("clipped", ["0", "2"]),
        ("sum", ["0", "2"]),
        ("penalty", []),
        ("hook on one weight", []),
        ("accumulated", []),
        ("noise", []),
    ],
)
def test_both_routes_follow_the_formula(way, through_rows, used):
    torch.set_default_dtype(torch.float64)
    try:
        model = make()
        optimizer = make_optimizer(
            natgrad.KFAC, model, lr=1.0, damping=DAMPING, momentum=0.0, kl_clip=None, factors=1,
            inverses=1, decay=0.0, fisher="exact",
        )  # fmt: skip
        if way == "hook on one weight":
            model[2].weight.register_hook(lambda gradient: gradient.flip(0))
        inputs, targets = batch()
        reduction = "sum" if way == "sum" else "mean"
        loss = functional.cross_entropy(model(inputs), targets, reduction=reduction)
        if way == "penalty":
            loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        if way == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if way == "accumulated":
            inputs, targets = batch(1)
            functional.cross_entropy(model(inputs), targets).backward()
        if way == "noise":
            for p in model.parameters():
                p.grad += 1e-3 * torch.randn_like(p.grad)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        expected = expected_direction(model, optimizer.preconditioner.curvature.matrix())
        assert (before - after - expected).norm() < 1e-10 * expected.norm()
        assert used == through_rows
    finally:
        torch.set_default_dtype(torch.float32)


def test_batches_larger_than_the_layer_take_the_gradient(used):
    model = make()
    optimizer = natgrad.KFAC(model)
    inputs = torch.randn(200, 40, dtype=torch.float64)
    functional.cross_entropy(model(inputs), torch.zeros(200, dtype=torch.long)).backward()
    optimizer.step()
    assert used == []
