"""What makes Kronecker factors cheap: triangles, shared moments, some rows, staggered inverses."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import Capture, linalg
from natgrad.curvature import KroneckerFactors, as_structure
from natgrad.jacobians import FIRST_DRAW, LinearJacobian
from natgrad.jacobians.moments import second_moments
from tests.cases import CASES, normal
from tests.methods import curvature_of, make_optimizer

# Triangles.


@given(
    rows=st.integers(1, 40),
    size=st.sampled_from([1, 3, 255, 256, 257, 300, 384]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_lower_gram(rows: int, size: int, seed: int) -> None:
    x = normal(rows, size, seed=seed)
    expected = x.T @ x
    torch.testing.assert_close(linalg.symmetric(linalg.lower_gram(x)), expected)
    into = torch.zeros(size + 1, size + 1, dtype=x.dtype)
    linalg.lower_gram(x, into[:size, :size])
    torch.testing.assert_close(linalg.symmetric(into)[:size, :size], expected)


def test_factorisations_read_the_lower_triangle_only() -> None:
    x = normal(40, 12)
    matrix = x.T @ x
    lower = matrix.tril() + 7.0 * torch.ones_like(matrix).triu(1)
    torch.testing.assert_close(linalg.inverse(lower), torch.linalg.inv(matrix))
    torch.testing.assert_close(linalg.eigh(lower)[0], torch.linalg.eigvalsh(matrix))


def test_wide_layers_have_the_factors_of_their_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280), nn.Tanh(), nn.Linear(280, 2)).double()
    x = normal(20, 300)
    found = natgrad.fisher_matrix(model, (x, None), structure="kfac")
    a, _ = found.parts["0"].factors
    augmented = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(a[0], augmented.T @ augmented / 20)
    assert torch.equal(a, a.mT)


# Layers that read the same tensor.


class Attention(nn.Module):
    """Three projections of one input, one of another, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 4), nn.Linear(5, 4)
        self.value, self.other = nn.Linear(5, 4, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        shifted = x.flip(1)
        mixed = self.query(x) * self.key(x) + self.value(x) * self.other(shifted)
        return mixed.mean(1)


def test_shared_inputs_share_their_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Attention().double()
    x = normal(6, 3, 5)
    computed = []
    original = LinearJacobian._second_moment_of

    def count(self: LinearJacobian, *args):
        computed.append(self.layout.names[0])
        return original(self, *args)

    monkeypatch.setattr(LinearJacobian, "_second_moment_of", count)
    found = natgrad.fisher_matrix(model, (x, None), structure="kfac")
    # Query and key share one; value has no bias and other reads another tensor.
    assert sorted(computed) == ["other.weight", "query.weight", "value.weight"]
    rows = torch.cat([x.flatten(0, 1), torch.ones(18, 1, dtype=x.dtype)], 1)
    expected = rows.T @ rows / 18
    for name in ("query", "key", "other"):
        torch.testing.assert_close(found.parts[name].factors[0][0], expected)
    torch.testing.assert_close(found.parts["value"].factors[0][0], expected[:5, :5])


# Some positions.

SHARED = [
    name
    for name in CASES
    if name not in ("self_attention_time_first_masked", "cross_attention")
    and any(
        kind in name
        for kind in ("conv", "pixels", "tokens", "norm", "embedding", "self_attention", "repeated")
    )
]


@pytest.mark.parametrize("name", SHARED)
def test_positions_are_those_of_the_rows(name: str) -> None:
    case = CASES[name]()
    with Capture(case.model, case.output) as capture:
        output = case.model(case.x)
        output = capture.passes[-1].output if case.output else output
        assert output is not None
        jacobians = capture.pull_back(output, normal(2, *output.shape, seed=3))
        for jacobian in jacobians.values():
            if not isinstance(jacobian, LinearJacobian) or jacobian.positions < 2:
                continue
            chosen = torch.tensor([0, jacobian.positions - 1])
            some = jacobian.subsampled(chosen)
            scale = (jacobian.positions / 2) ** 0.5
            torch.testing.assert_close(some.inputs, jacobian.inputs[:, chosen])
            torch.testing.assert_close(
                some.output_gradients, scale * jacobian.output_gradients[:, :, chosen]
            )


@pytest.mark.parametrize("name", SHARED)
def test_samples_are_those_of_the_rows(name: str) -> None:
    case = CASES[name]()
    with Capture(case.model, case.output) as capture:
        output = case.model(case.x)
        output = capture.passes[-1].output if case.output else output
        assert output is not None
        jacobians = capture.pull_back(output, normal(2, *output.shape, seed=3))
        chosen = torch.tensor([0, output.shape[0] - 1])
        for jacobian in jacobians.values():
            if isinstance(jacobian, LinearJacobian):
                some = jacobian.of_samples(chosen)
                torch.testing.assert_close(
                    some.per_sample_gradients(), jacobian.per_sample_gradients()[chosen]
                )


def test_moments_of_some_samples_are_unbiased() -> None:
    """The mean over all subsets of a size is the moment of all samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    with Capture(model) as capture:
        output = model(normal(5, 2, 5))
        jacobian = capture.pull_back(output, normal(2, *output.shape, seed=3))["0"]
    assert isinstance(jacobian, LinearJacobian)
    bases = (torch.linalg.qr(normal(1, 5, 5)).Q, torch.linalg.qr(normal(1, 3, 3)).Q)
    whole = second_moments(jacobian, *bases)
    subsets = torch.combinations(torch.arange(5), 2)
    parts = [2.5 * second_moments(jacobian.of_samples(chosen), *bases) for chosen in subsets]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)
    assert (parts[0] - whole).norm() > 0.01 * whole.norm()


def test_ekfac_takes_some_samples_of_shared_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)).double()
    found = []
    for limit in (3, None):
        optimizer = make_optimizer(natgrad.EKFAC, model, max_moment_samples=limit)
        functional.cross_entropy(model(normal(8, 1, 8, 8)), torch.arange(8) % 2).backward()
        optimizer.step()
        with Capture(model) as capture:
            output = model(normal(8, 1, 8, 8))
            jacobians = capture.pull_back(output, normal(1, *output.shape))
        structure = optimizer.preconditioner.curvature.structure
        found.append([structure._sampled(jacobians[name], FIRST_DRAW) for name in ("0", "2")])
    assert [(rows.samples, weight) for rows, weight in found[0]] == [(3, 8 / 3), (8, 1.0)]
    assert [(rows.samples, weight) for rows, weight in found[1]] == [(8, 1.0), (8, 1.0)]
    with pytest.raises(ValueError, match="max_moment_samples must be at least 1"):
        make_optimizer(natgrad.EKFAC, model, max_moment_samples=0)


def test_factors_of_some_positions_are_unbiased() -> None:
    """The mean over all subsets of a size is the factor of all positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    x = normal(5, 2, 5)
    with Capture(model) as capture:
        output = model(x)
        jacobian = capture.pull_back(output, normal(2, *output.shape, seed=3))["0"]
    assert isinstance(jacobian, LinearJacobian)
    positions = jacobian.positions
    whole = jacobian.kronecker_factors()
    subsets = torch.combinations(torch.arange(positions), 2)
    sums = [jacobian.subsampled(subset).kronecker_factors() for subset in subsets]
    inputs = torch.stack([one.inputs / one.positions for one in sums]).mean(0)
    outputs = torch.stack([one.outputs for one in sums]).mean(0)
    torch.testing.assert_close(inputs, whole.inputs / whole.positions)
    torch.testing.assert_close(outputs, whole.outputs)
    assert (sums[0].outputs - whole.outputs).norm() > 0.01 * whole.outputs.norm()


def test_draws_differ_between_updates_and_continue_after_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)).double()
    x = normal(4, 1, 8, 8)

    with Capture(model) as capture:
        kind = KroneckerFactors(rows_per_unit=2)

        def update(curvature, seed: int, decay: float) -> None:
            output = model(x)
            curvature.observe(capture.pull_back(output, normal(1, *output.shape, seed=seed)), 4.0)
            curvature.join(decay)

        first = curvature_of(kind, capture)
        update(first, 1, 1.0)
        once = first.matrix().parts["0"].factors[0]
        update(first, 1, 0.0)
        assert not torch.equal(once, first.matrix().parts["0"].factors[0])
        second = curvature_of(kind, capture)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for curvature in (first, second):
            update(curvature, 2, 1.0)
    pairs = [one.matrix().parts["0"].factors for one in (first, second)]
    for left, right in zip(*pairs, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="rows_per_unit must be positive"):
        KroneckerFactors(rows_per_unit=0)


def test_training_takes_some_rows_and_fisher_objects_all() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    optimizer = natgrad.KFAC(model)
    assert optimizer.preconditioner.curvature.structure.rows_per_unit == 4.0
    assert as_structure("kfac").rows_per_unit is None


# Staggered factorisations.


def train(optimizer_options: dict, steps: int) -> tuple[nn.Module, natgrad.KFAC, list[list[str]]]:
    torch.manual_seed(0)
    sizes = (6, 30, 20, 10, 3)
    layers: list[nn.Module] = []
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer_options = {"early": False, **optimizer_options}
    optimizer = make_optimizer(natgrad.KFAC, model, factors=1, **optimizer_options)
    refreshed: list[list[str]] = []
    for step in range(steps):
        estimates = optimizer.preconditioner.curvature.estimates
        before = {name: one.inverse for name, one in estimates.items()}
        optimizer.zero_grad()
        functional.cross_entropy(model(normal(8, 6, seed=step)), torch.arange(8) % 3).backward()
        optimizer.step()
        estimates = optimizer.preconditioner.curvature.estimates
        refreshed.append([n for n, one in estimates.items() if one.inverse is not before[n]])
    return model, optimizer, refreshed


def test_staggering_factorises_every_layer_once_per_interval() -> None:
    _, optimizer, refreshed = train({"inverses": 3, "stagger": True}, 9)
    names = sorted(optimizer.preconditioner.curvature.parts)
    assert sorted(refreshed[0]) == names  # Nothing can be preconditioned before.
    assert refreshed[1] == refreshed[2] == []
    for start in (3, 6):
        window = [refreshed[start], refreshed[start + 1], refreshed[start + 2]]
        assert sorted(name for turn in window for name in turn) == names
        assert all(window)
    # The largest layer is alone in its turn.
    assert ["2"] in refreshed[3:6]


@pytest.mark.parametrize("stagger", [False, True])
def test_early_factorisations(stagger: bool) -> None:
    options = {"inverses": 6, "early": True, "stagger": stagger}
    _, _, refreshed = train(options, 12)
    assert [step for step in range(6) if len(refreshed[step]) == 4] == [0, 1, 2, 4]
    assert all(len(refreshed[step]) in (0, 4) for step in range(6))
    later = [name for step in range(6, 12) for name in refreshed[step]]
    assert sorted(later) == ["0", "2", "4", "6"]


def test_interval_of_one_needs_no_staggering() -> None:
    staggered, _, refreshed = train({"inverses": 1, "stagger": True}, 3)
    plain, _, _ = train({"inverses": 1}, 3)
    assert all(len(names) == 4 for names in refreshed)
    for p, q in zip(staggered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_coupled_structures_cannot_be_staggered() -> None:
    with pytest.raises(ValueError, match="independent layers"):
        make_optimizer(natgrad.BlockTridiagonalNGD, nn.Linear(2, 2), stagger=True)


def test_summary_tells_which_factors_are_diagonal() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.ConvTranspose1d(5, 3, 2, bias=False))
    factors = {layer.name: layer.factors for layer in natgrad.KFAC(model).summary().layers}
    assert factors == {"0": "diag(9), 4 x 4", "1": "5 x 5, 6 x 6"}
