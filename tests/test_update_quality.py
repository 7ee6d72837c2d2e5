"""The quality of updates, against dense Fisher matrices."""

from __future__ import annotations

import copy

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


@pytest.mark.parametrize(
    "name",
    ["mlp", "tokens", "conv2d", "layer_norm", "dictionary_output", "self_attention"],
)
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


def both(u, matrix, g):
    """Return what the quality of an update is made of: its two forms and the gradient's."""
    return float(u @ matrix @ u), float(u @ g), float((g @ matrix @ g).sqrt() / (g @ g))


def test_packed_sequences_dropout_and_statistics_of_batches():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cell = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True)
            self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, tokens, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.table(tokens), lengths, batch_first=True, enforce_sorted=False
            )
            hidden = self.cell(packed)[1][0][-1]
            return self.head(nn.functional.dropout(self.norm(hidden), 0.5, self.training))

    torch.manual_seed(0)
    model = Reader().double()
    x = torch.randint(9, (6, 4)), torch.tensor([4, 2, 1, 3, 4, 2])
    y = torch.tensor([0, 1, 2, 0, 1, 1])
    update = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    u, state = torch.cat([one.flatten() for one in update.values()]), copy.deepcopy(model)
    torch.manual_seed(5)
    leaves = list(state.parameters())
    z = state(*x)  # Masks and statistics of one pass hold for the gradient and for both products.
    rows = [torch.autograd.grad(e, leaves, retain_graph=True) for e in z.flatten()]
    jac = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    total = dense.categorical().total
    gradient = dense.output_gradient(dense.categorical(), z, y).flatten() @ jac / 6
    hessian = torch.autograd.functional.hessian(lambda z: total(z, y), z.detach()).reshape(18, 18)
    expected = both(u, jac.T @ hessian @ jac / 6, gradient)
    torch.manual_seed(5)
    found = update_quality(model, (x, y), update)
    assert (found.curvature, found.slope, found.gradient_indicator) == pytest.approx(
        expected, rel=1e-9
    )
    assert torch.equal(model.norm.running_mean, torch.zeros(5).double())


def test_heads_and_several_batches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return {"class": self.a(h), "value": self.b(h)}

    torch.manual_seed(0)
    model, likelihood = Two().double(), {"class": "categorical", "value": "gaussian"}
    batches = [
        (normal(n, 3, seed=n), {"class": torch.arange(n) % 2, "value": normal(n, 1, seed=9)})
        for n in (5, 2)
    ]
    update = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    matrix = fisher_matrix(model, batches, likelihood, "full")
    for x, y in batches:
        out = model(x)
        loss = nn.functional.cross_entropy(out["class"], y["class"], reduction="sum")
        (loss + 0.5 * (out["value"] - y["value"]).square().sum()).div(7).backward()
    gradient = matrix.layout.to_flat({n: p.grad for n, p in model.named_parameters()})
    expected = both(matrix.layout.to_flat(update), matrix.to_dense(), gradient)
    found = update_quality(model, batches, update, likelihood)
    assert (found.curvature, found.slope, found.gradient_indicator) == pytest.approx(
        expected, rel=1e-9
    )


def test_what_is_no_update_and_targets_that_do_not_count_are_named():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), normal(5, 3), torch.tensor([0, 1, 1, 0, 1])
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match="parameter name"):
        update_quality(model, (x, y), torch.ones(8))
    with pytest.raises(TypeError, match="real numbers"):
        update_quality(model, (x, y), {name: value * 1j for name, value in update.items()})
    with pytest.raises(ValueError, match="no target of the data counts"):
        update_quality(model, (x, torch.full_like(y, -100)), update)
