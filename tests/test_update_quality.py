"""The quality of updates, against dense Fisher matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import natgrad
from natgrad import fisher_matrix, update_quality
from tests import dense
from tests.cases import CASES, normal


def gradient_of(case, likelihood, y):
    loss = natgrad.likelihoods.as_likelihood(likelihood).loss(
        dense.call(case.model, case.x, case.output), y
    )
    names = [n for n, p in case.model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for p in case.model.parameters() if p.requires_grad],
                                allow_unused=True)  # fmt: skip
    parameters = dict(case.model.named_parameters())
    return {
        n: torch.zeros_like(parameters[n]) if g is None else g
        for n, g in zip(names, found, strict=True)
    }


@pytest.mark.parametrize("name", ["mlp", "tokens", "conv2d", "layer_norm", "dictionary_output"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_against_the_dense_fisher_matrix(name, likelihood):
    case = CASES[name]()
    y, dense_fisher = case.fisher(likelihood, "exact")
    layout = fisher_matrix(case.model, (case.x, y), likelihood, "full", output=case.output).layout
    gradient = gradient_of(case, likelihood, y)
    update = {n: normal(*g.shape, seed=i) for i, (n, g) in enumerate(gradient.items())}
    found = update_quality(case.model, (case.x, y), update, likelihood, output=case.output)
    u, g = layout.to_flat(update), layout.to_flat(gradient)
    assert found.slope == pytest.approx(float(u @ g), rel=1e-9)
    assert found.curvature == pytest.approx(float(u @ dense_fisher @ u), rel=1e-9)
    gamma = float((u @ dense_fisher @ u).sqrt() / (u @ g).abs())
    reference = float((g @ dense_fisher @ g).sqrt() / (g @ g))
    assert found.indicator == pytest.approx(gamma, rel=1e-9)
    assert found.relative == pytest.approx(gamma / reference, rel=1e-9)
    assert found.best_decrease == pytest.approx(0.5 / gamma**2, rel=1e-9)
    longer = {n: 3.0 * v for n, v in update.items()}
    again = update_quality(case.model, (case.x, y), longer, likelihood, output=case.output)
    assert again.indicator == pytest.approx(gamma, rel=1e-9)


def test_the_natural_gradient_is_the_best_update():
    case = CASES["mlp"]()
    y = case.target("categorical")
    gradient = gradient_of(case, "categorical", y)
    exact = fisher_matrix(case.model, (case.x, y), "categorical", "full")
    flat = exact.layout.to_flat(gradient)
    pseudo = torch.linalg.pinv(exact.to_dense(), rtol=1e-11, hermitian=True)
    least = float((flat @ pseudo @ flat).rsqrt())
    best = update_quality(case.model, (case.x, y), exact.solve(gradient))
    assert best.indicator == pytest.approx(least, rel=1e-6)
    assert best.best_step == pytest.approx(1.0, rel=1e-6)
    for structure in ("block_diagonal", "kfac", "unit_wise", "diagonal"):
        for fisher in ("exact", "empirical", "improved"):
            matrix = fisher_matrix(case.model, (case.x, y), "categorical", structure, fisher)
            found = update_quality(case.model, (case.x, y), matrix.solve(gradient, 1e-4))
            assert found.indicator >= least * (1 - 1e-9)
    own = update_quality(case.model, (case.x, y), gradient)
    assert own.relative == pytest.approx(1.0)


def test_partial_updates_dict_inputs_and_errors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, scale=1.0):
            return self.second(torch.tanh(self.first(x))) * scale

    torch.manual_seed(0)
    model = Model().double()
    x, y = normal(5, 3), torch.tensor([0, 1, 1, 0, 1])
    update = {"first.weight": normal(4, 3)}
    state = torch.random.get_rng_state()
    found = [
        update_quality(model, (inputs, y), update)
        for inputs in (x, (x,), {"x": x}, {"x": x, "scale": 1.0})
    ]
    assert len({round(f.indicator, 12) for f in found}) == 1
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    for bad in ({"first.bias": normal(3)}, {"third": normal(3)}):
        with pytest.raises(ValueError, match="fits no trainable"):
            update_quality(model, (x, y), bad)
    with pytest.raises(ValueError, match="not zero"):
        update_quality(model, (x, y), {"first.weight": torch.zeros(4, 3).double()})
