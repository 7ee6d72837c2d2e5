"""Factors of inputs that are data, which relative damping damps besides, against dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad import KFAC, SINGD, NaturalGradient, Refresh, RelativeDamping, fisher_matrix
from natgrad.capture import Capture
from natgrad.curvature import KroneckerFactors
from tests.cases import labels, normal
from tests.dense_kronecker import damped_inputs

STRUCTURES = [
    "kfac", "ekfac", "tkfac", "tekfac", "kpsvd", "kfoc", "two_level",
    KroneckerFactors(factored_damping=False), KroneckerFactors(max_factor_size=5),
]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(size, 6, seed=seed) + 0.5, labels(size, 3, seed)


def backpropagate(optimizer, model: nn.Module, *passes: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    for x, y in passes:
        (functional.cross_entropy(model(x), y) / len(passes)).backward()


def make(model: nn.Module, structure="kfac", data: float = 1.0, **refresh) -> NaturalGradient:
    often = {"factors": 1, "inverses": 1, "decay": 0.5, **refresh}
    return NaturalGradient(
        model, structure=structure, fisher="exact", lr=1e-3, refresh=Refresh(**often),
        damping=RelativeDamping(0.2, data=data),
    )  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_operators_add_the_partial_trace_over_inputs(structure, bias):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3)).double()
    matrix = fisher_matrix(model, batch(), "categorical", structure)
    operator = matrix.parts["0"]
    share = torch.tensor(0.7, dtype=torch.float64)
    found = operator.with_damped_inputs(share).to_dense()
    dense = operator.to_dense()
    if bias:
        expected = damped_inputs(dense, 4, 0.7)
    else:
        means = dense.view(4, 6, 4, 6).diagonal(dim1=1, dim2=3).mean(-1)
        expected = dense + 0.7 * torch.kron(means, torch.eye(6).double())
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, dense)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_layer_that_reads_the_data_is_inverted_so(structure):
    model = network()
    optimizer = make(model, structure, data=2.0)
    backpropagate(optimizer, model, batch(8))
    optimizer.step()
    curvature = optimizer.preconditioner.curvature
    share = torch.tensor(2.0 * 7 / 8, dtype=torch.float64)
    for name in ("0", "2"):
        plain = curvature.operator(name)
        damped = plain.with_damped_inputs(share) if name == "0" else plain
        damping = curvature.estimates[name].damping
        expected = damped.inverse(curvature.structure.inverse_damping(damping)).to_dense()
        found = curvature.estimates[name].inverse
        torch.testing.assert_close(found.to_dense(), expected)
    inverse = curvature.operator("0").inverse(curvature.estimates["0"].damping).to_dense()
    assert not torch.allclose(curvature.estimates["0"].inverse.to_dense(), inverse)


def test_kfac_against_its_factors_written_out():
    model = network()
    optimizer = make(model)
    x, y = batch(8)
    backpropagate(optimizer, model, (x, y))
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], 1)
    a = functional.pad(x, (0, 1), value=1.0)
    with torch.no_grad():
        hidden = torch.tanh(model[0](x))
        p = model[2](hidden).softmax(-1)
        back = torch.einsum("nk,ko,no->nko", p.sqrt(), model[2].weight, 1 - hidden.square())
        mean = torch.einsum("nk,nko->no", p.sqrt(), back)
        b = torch.einsum("nko,nkp->op", back, back) - mean.T @ mean
        first, second = a.T @ a / 8, b / 8
        last_a = functional.pad(hidden, (0, 1), value=1.0).square().sum() / 8
        last_b = (1 - p.square().sum(-1)).mean()
        trace = first.trace() * second.trace() + last_a * last_b
    damping = float(0.2 * trace / sum(q.numel() for q in model.parameters()))
    optimizer.step()
    first = first + first.trace() / 8 * torch.eye(7)
    pi = ((first.trace() / 7) / (second.trace() / 5)).sqrt()
    expected = torch.linalg.solve(
        second + damping**0.5 / pi * torch.eye(5), gradient
    ) @ torch.linalg.inv(first + damping**0.5 * pi * torch.eye(7))
    inverse = optimizer.preconditioner.curvature.estimates["0"].inverse
    column = torch.cat([gradient[:, :-1].flatten(), gradient[:, -1]])
    found = inverse.to_dense() @ column
    torch.testing.assert_close(found[:30].view(5, 6), expected[:, :-1])
    torch.testing.assert_close(found[30:], expected[:, -1])


def used_share(optimizer) -> float:
    """Return by what share of its mean the factor of data was damped in the last inverse."""
    curvature = optimizer.preconditioner.curvature
    present = curvature.estimates["0"]
    plain, damped = curvature.read("0", present.average), curvature.to_invert("0", present.average)
    a, more = plain.factors[0][0], damped.factors[0][0]
    torch.testing.assert_close(more - a, (more - a)[0, 0] * torch.eye(7).double())
    return float((more - a)[0, 0] / a.diagonal().mean())


def test_the_batch_counts_as_a_whole_and_is_averaged():
    model = network()
    optimizer = make(model)
    backpropagate(optimizer, model, batch(6, 1), batch(6, 2))
    optimizer.step()
    assert used_share(optimizer) == pytest.approx(7 / 12)
    backpropagate(optimizer, model, batch(3, 3))
    optimizer.step()
    assert used_share(optimizer) == pytest.approx(7 / ((12 * 0.5 + 3) / 1.5))


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
def test_weights_of_classes_do_not_matter(weight):
    model = network()
    optimizer = make(model)
    x, y = batch(8)
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y, weight=torch.full((3,), weight).double()).backward()
    optimizer.step()
    assert used_share(optimizer) == pytest.approx(7 / 8)


class Patches(nn.Module):
    """A layer at every position, then one answer for all or for each."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 5))
        self.last, self.each = nn.Linear(5, 3), each

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.get_submodule("0")(x))
        scores: Tensor = self.last(x if self.each else x.mean(1))
        return scores


@pytest.mark.parametrize("each", [False, True])
def test_every_position_is_a_row(each):
    torch.manual_seed(0)
    model = Patches(each).double()
    optimizer = make(model)
    for size in (4, 6):
        output = model(normal(size, 9, 6))
        y = labels(size * 9 if each else size, 3, 0)
        optimizer.zero_grad()
        functional.cross_entropy(output.flatten(0, -2), y).backward()
        optimizer.step()
    assert used_share(optimizer) == pytest.approx(7 / (9 * (4 * 0.5 + 6) / 1.5))


@pytest.mark.parametrize("at", [3, 4, 5])  # At step 3 inverses are made without new rows.
def test_a_run_goes_on_from_a_checkpoint(at):
    model = network()
    optimizer = make(model, factors=2, inverses=3)
    runs = [(model, optimizer)]
    for step in range(9):
        if step == at:
            other = copy.deepcopy(model)
            resumed = make(other, factors=2, inverses=3)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            runs.append((other, resumed))
        for one, own in runs:
            backpropagate(own, one, batch(8 - step % 3, step))
            own.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert used_share(optimizer) == used_share(resumed)


def test_zero_damps_all_inputs_alike():
    model = network()
    optimizer = make(model, data=0.0)
    backpropagate(optimizer, model, batch())
    optimizer.step()
    assert used_share(optimizer) == 0.0
    with pytest.raises(ValueError, match="data must be"):
        RelativeDamping(0.2, data=-1.0)


def test_a_damping_in_units_of_the_matrix_is_all_there_is():
    model = network()
    optimizer = KFAC(model, fisher="exact", damping=1e-2)
    backpropagate(optimizer, model, batch())
    optimizer.step()
    assert used_share(optimizer) == 0.0


def test_singd_does_without():
    model = network()
    with_data, without = (
        SINGD(copy.deepcopy(model), fisher="exact", damping=RelativeDamping(0.2, data=data))
        for data in (1.0, 0.0)
    )
    for optimizer in (with_data, without):
        for seed in range(3):
            backpropagate(optimizer, optimizer.model, batch(seed=seed))
            optimizer.step()
    pairs = zip(with_data.model.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


# Which layers read the data.


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        scores: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0].squeeze(1))
        return scores


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.tanh(x @ self.weight.T))
        return scores


class Twice(nn.Module):
    """The same layer for data and for what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.tanh(self.same(torch.tanh(self.same(x)))))
        return scores


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(self.cell(x.unsqueeze(1))[0][:, -1])
            return scores

    return Recurrent()


MODELS = {
    "linear": (lambda: network().float(), {"0"}),
    "convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)
        ),
        {"1"},
    ),
    "norm first": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)),
        {"0"},
    ),
    "dropout first": (lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 3)), {"1"}),
    "attention": (Attends, {"attention.in_proj"}),
    "product": (Multiplies, {"Multiplies"}),
    "shared with later": (Twice, set()),
    "recurrent": (recurrent, set()),
}


def reading(model: nn.Module, x: Tensor) -> set[str]:
    with Capture(model) as capture:
        output = model(x)
        capture.pull_back(output, torch.ones(1, *output.shape))
        found = capture.sources.reading_data()
        assert found is not None
        return found


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_read_the_data(name):
    torch.manual_seed(0)
    make_model, expected = MODELS[name]
    model = make_model()
    assert {n for n in reading(model, torch.randn(4, 6)) if "norm" not in n} == expected


def test_inputs_that_want_a_gradient_are_none():
    assert reading(network().float(), torch.randn(4, 6, requires_grad=True)) == set()


def test_what_frozen_layers_make_of_data_is_data():
    model = network().float()
    model[0].requires_grad_(False)
    assert reading(model, torch.randn(4, 6)) == {"2"}
