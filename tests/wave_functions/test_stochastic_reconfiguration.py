"""Steps of given length against explicit sums over all configurations and dense solutions."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import natgrad
from natgrad.wave_functions import Heisenberg, TransverseFieldIsing, all_configurations
from natgrad.wave_functions.amplitude import LogAmplitude
from natgrad.wave_functions.rows import AmplitudeJacobian
from tests import dense
from tests.wave_functions import exact

SITES = 5
MATRIX = exact.ising(SITES, 1.0, 0.8)
HAMILTONIAN = TransverseFieldIsing(SITES, 1.0, 0.8)
SPINS = all_configurations(SITES)
KINDS = list(exact.AMPLITUDES)


def step_of(model: nn.Module, **options) -> torch.Tensor:
    """Return Δ of one step of length 1 with sums over all configurations."""
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN, lr=1.0, **options)
    before = exact.parameters_of(model)
    optimizer.step(SPINS, weights=exact.probabilities(model, SPINS))
    return before - exact.parameters_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_centred_derivatives(kind):
    model = exact.AMPLITUDES[kind](SITES)
    amplitude = LogAmplitude(model)
    derivatives = exact.rows(model, SPINS)
    found = amplitude.rows(SPINS)
    dense.assert_same(found[:, 0], derivatives.real, 1e-12)
    if kind == "complex":
        dense.assert_same(found[:, 1], derivatives.imag, 1e-12)
    shares = exact.probabilities(model, SPINS)
    rows = AmplitudeJacobian(amplitude, SPINS, shares, None)
    expected = exact.metric(derivatives, shares)
    for one in (rows, AmplitudeJacobian(amplitude, SPINS, shares, 7)):
        dense.assert_same(one.moment(), expected, 1e-12)
        dense.assert_same(one.trace(), expected.trace(), 1e-12)
        dense.assert_same(one.to_dense(), rows.to_dense(), 1e-12)
        dense.assert_same(one.gram(), rows.to_dense() @ rows.to_dense().T, 1e-12)
        columns = torch.randn(expected.shape[0], 3, dtype=torch.float64)
        dense.assert_same(one.matvec(columns), rows.to_dense() @ columns, 1e-12)
        columns = torch.randn(one.rows, 2, dtype=torch.float64)
        dense.assert_same(one.rmatvec(columns), rows.to_dense().T @ columns, 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_used_as_those_of_a_layer(kind, chunk_size):
    """By way of rows that are formed: products with others, combinations, Kronecker factors."""
    amplitude = LogAmplitude(exact.AMPLITUDES[kind](SITES))
    shares = torch.full((len(SPINS),), 1 / len(SPINS), dtype=torch.float64)
    rows = AmplitudeJacobian(amplitude, SPINS, shares, chunk_size)
    formed = rows.to_dense()
    other = AmplitudeJacobian(amplitude, SPINS.flip(0), shares, chunk_size)
    dense.assert_same(rows.gram(other), formed @ other.to_dense().T, 1e-12)
    by_sample = formed.unflatten(0, (len(SPINS), -1))
    weights = torch.randn(*by_sample.shape[:2], 3, dtype=torch.float64)
    combined = torch.einsum("nkj,nkp->njp", weights, by_sample)
    dense.assert_same(rows.combined(weights).to_dense(), combined.flatten(0, 1), 1e-12)
    dense.assert_same(rows.per_sample_gradients(2, 4).flatten(2), by_sample[2:4], 1e-14)
    found = rows.kronecker_factors()
    moment = found.inputs[0].tril() * found.outputs[0] / found.positions
    dense.assert_same(moment, (formed.T @ formed).tril(), 1e-12)
    assert rows.device == SPINS.device
    assert set(rows.state()) == {"configurations", "shares"}


def test_metric_of_a_positive_state_is_a_quarter_of_the_fisher_matrix():
    model = exact.RealAmplitude(SITES)
    shares = exact.probabilities(model, SPINS)
    scores = []
    for index in range(len(SPINS)):
        logs = torch.log_softmax(2 * model(SPINS), 0)
        found = torch.autograd.grad(logs[index], list(model.parameters()))
        scores.append(torch.cat([g.reshape(-1) for g in found]))
    fisher = sum(p * torch.outer(s, s) for p, s in zip(shares, scores, strict=True))
    rows = AmplitudeJacobian(LogAmplitude(model), SPINS, shares, None)
    dense.assert_same(4 * rows.moment(), fisher, 1e-11)


@pytest.mark.parametrize("space", ["samples", "parameters", None])
@pytest.mark.parametrize("chunk_size", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_damped_natural_gradient(kind, chunk_size, space):
    model = exact.AMPLITUDES[kind](SITES)
    derivatives, shares = exact.rows(model, SPINS), exact.probabilities(model, SPINS)
    metric = exact.metric(derivatives, shares)
    local = HAMILTONIAN.local_energies(model, SPINS)
    gradient = exact.gradient(model, SPINS, MATRIX)
    dense.assert_same(exact.forces(derivatives, shares, local), gradient, 1e-11)
    damped = metric + 1e-3 * torch.eye(len(metric), dtype=torch.float64)
    found = step_of(model, damping=1e-3, chunk_size=chunk_size, space=space)
    dense.assert_same(found, torch.linalg.solve(damped, gradient), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_both_spaces_agree(kind):
    found = [
        step_of(exact.AMPLITUDES[kind](SITES), damping=damping, space=space)
        for damping in (1e-2, 1e-4)
        for space in ("samples", "parameters")
    ]
    dense.assert_same(found[0], found[1], 1e-10)
    dense.assert_same(found[2], found[3], 1e-10)


def test_default_damping_is_a_share_of_the_trace():
    model = exact.RealAmplitude(SITES)
    shares = exact.probabilities(model, SPINS)
    trace = exact.metric(exact.rows(model, SPINS), shares).trace()
    expected = step_of(copy.deepcopy(model), damping=1e-4 * float(trace))
    dense.assert_same(step_of(model), expected, 1e-9)


@pytest.mark.parametrize(
    "solver", ["eigh", natgrad.solvers.ConjugateGradient(tolerance=1e-10, max_iterations=500)]
)
@pytest.mark.parametrize("chunk_size", [None, 6])
def test_other_solvers(solver, chunk_size):
    expected = step_of(exact.ComplexAmplitude(SITES), damping=1e-2)
    found = step_of(
        exact.ComplexAmplitude(SITES), damping=1e-2, solver=solver, chunk_size=chunk_size
    )
    dense.assert_same(found, expected, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_of_imaginary_time(kind):
    """A model of all amplitudes can go wherever ``exp(−τH)ψ`` goes: the rates agree."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            shape = (len(SPINS), 2 if kind == "complex" else 1)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.table = nn.Parameter(0.3 * noise)

        def forward(self, spins: torch.Tensor) -> torch.Tensor:
            matches = (spins.unsqueeze(1) == SPINS).all(2).double()
            found = matches @ self.table
            return torch.view_as_complex(found) if kind == "complex" else found[:, 0]

    model, errors = Table(), []
    state = torch.exp(model(SPINS).detach()).to(torch.complex128)
    for length in (1e-3, 5e-4):
        copied = copy.deepcopy(model)
        optimizer = natgrad.StochasticReconfiguration(
            copied, HAMILTONIAN, lr=length, damping=0.0, space="samples"
        )
        optimizer.step(SPINS, weights=exact.probabilities(copied, SPINS))
        found = torch.exp(copied(SPINS).detach()).to(torch.complex128)
        # Imaginary time 2η, as ∇E has a factor of 2.
        expected = torch.linalg.matrix_exp(-2 * length * MATRIX) @ state
        overlap = (found.conj() @ expected).abs().square()
        fidelity = overlap / (found.norm() * expected.norm()).square()
        errors.append(math.sqrt(max(0.0, 1 - float(fidelity))))
    assert errors[0] < 1e-3
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)  # Second order in the length.


@pytest.mark.parametrize("space", ["samples", "parameters"])
@pytest.mark.parametrize("kind", KINDS)
def test_momentum_is_spring(kind, space):
    """Three steps against the least-squares problem that defines them, solved densely."""
    model = exact.AMPLITUDES[kind](SITES)
    reference = copy.deepcopy(model)
    damping, momentum, length = 1e-2, 0.9, 0.02
    optimizer = natgrad.StochasticReconfiguration(
        model, HAMILTONIAN, lr=length, damping=damping, momentum=momentum, space=space
    )
    previous = torch.zeros_like(exact.parameters_of(model))
    for count in range(3):
        chosen = SPINS[count::3]
        local = HAMILTONIAN.local_energies(reference, chosen)
        shares = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
        derivatives = exact.rows(reference, chosen)
        centred = (derivatives - derivatives.mean(0)) * shares.sqrt().unsqueeze(1)
        residual = 2 * shares.sqrt() * (local - local.mean())
        left = torch.cat([centred.real, centred.imag])
        right = torch.cat([residual.real, residual.imag if kind == "complex" else 0 * residual])
        identity = torch.eye(left.shape[1], dtype=torch.float64)
        previous = torch.linalg.lstsq(
            torch.cat([left, damping**0.5 * identity]),
            torch.cat([right, damping**0.5 * momentum * previous]),
        ).solution
        expected = exact.parameters_of(reference) - length * previous
        optimizer.step(chosen)
        dense.assert_same(exact.parameters_of(model), expected, 1e-10)
        nn.utils.vector_to_parameters(expected, reference.parameters())


def test_given_local_energies_and_repeated_samples():
    found = []
    for way in ("local energies", "hamiltonian", "weights"):
        model = exact.ComplexAmplitude(SITES)
        samples = SPINS[[3, 3, 3, 7, 9, 9, 20, 31]]
        optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN, lr=0.1, damping=1e-2)
        if way == "weights":
            optimizer.step(SPINS[[3, 7, 9, 20, 31]], weights=torch.tensor([3, 1, 2, 1, 1]))
        elif way == "hamiltonian":
            optimizer.step(samples.view(2, 4, SITES))
        else:
            optimizer.hamiltonian = None
            energies = HAMILTONIAN.local_energies(model, samples)
            assert optimizer.step(samples, energies) == pytest.approx(float(energies.real.mean()))
        found.append(exact.parameters_of(model))
    dense.assert_same(found[1], found[0], 1e-12)
    dense.assert_same(found[2], found[0], 1e-12)


def test_norm_constraint():
    model = exact.RealAmplitude(SITES)
    before = exact.parameters_of(model)
    optimizer = natgrad.StochasticReconfiguration(
        model, HAMILTONIAN, lr=1.0, norm_constraint=1e-4, damping=1e-3
    )
    optimizer.step(SPINS, weights=exact.probabilities(model, SPINS))
    moved = (exact.parameters_of(model) - before).norm()
    assert float(moved) == pytest.approx(1e-2, rel=1e-10)
    assert optimizer.last.length * optimizer.last.norm == pytest.approx(1e-2, rel=1e-10)


def test_memory_does_not_grow_with_rows():
    """Rows of two chunks at a time: what is allocated at once stays far below all rows."""
    sites, hidden = 10, 40
    spins = all_configurations(sites)

    def peak(chunk_size: int) -> int:
        model = exact.RealAmplitude(sites, hidden)
        amplitude = LogAmplitude(model)
        shares = exact.probabilities(model, spins)
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                result = function(*args, **(kwargs or {}))
                for tensor in torch.utils._pytree.tree_leaves(result):
                    if isinstance(tensor, torch.Tensor):
                        largest = max(largest, tensor.numel())
                return result

        with Watch():
            AmplitudeJacobian(amplitude, spins, shares, chunk_size).moment()
        return largest

    parameters = sum(p.numel() for p in exact.RealAmplitude(sites, hidden).parameters())
    assert peak(1024) >= 1024 * parameters
    # The matrix itself, and nothing of the size of all rows.
    assert peak(32) == parameters**2 < 1024 * parameters


def test_what_is_not_finite_moves_nothing():
    model = exact.RealAmplitude(SITES)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN, lr=0.1)
    before = exact.parameters_of(model)
    energies = torch.ones(len(SPINS), dtype=torch.float64)
    energies[3] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(SPINS, energies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(SPINS, energies)  # Said once.
    assert torch.equal(exact.parameters_of(model), before) and optimizer.last.length == 0


def test_wrong_arguments_are_refused():
    model = exact.RealAmplitude(SITES)
    make = natgrad.StochasticReconfiguration
    with pytest.raises(ValueError, match="need a hamiltonian"):
        make(model)
    with pytest.raises(ValueError, match="no momentum"):
        make(model, HAMILTONIAN, momentum=0.9)
    with pytest.raises(ValueError, match="norm_constraint must"):
        make(model, lr=0.1, norm_constraint=0.0)
    with pytest.raises(ValueError, match="space"):
        make(model, HAMILTONIAN, space="both")
    with pytest.raises(ValueError, match="model.eval"):
        make(nn.Sequential(nn.Linear(5, 1), nn.Dropout(0.5)), HAMILTONIAN)
    with pytest.raises(ValueError, match="no trainable"):
        make(nn.Flatten(), HAMILTONIAN)
    with pytest.raises(ValueError, match="real parameters only"):
        make(nn.Linear(5, 1, dtype=torch.complex128), HAMILTONIAN)
    with pytest.raises(ValueError, match="one log amplitude"):
        make(nn.Linear(5, 2).double(), Heisenberg(5), lr=0.1).step(SPINS)
    optimizer = make(model, lr=0.1)
    with pytest.raises(ValueError, match="no hamiltonian"):
        optimizer.step(SPINS)
    with pytest.raises(ValueError, match="one entry for each sample"):
        optimizer.step(SPINS, torch.ones(3))
    with pytest.raises(ValueError, match="not all zero"):
        optimizer.step(SPINS, torch.ones(32), torch.zeros(32))
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(closure=lambda: 1.0)
    with pytest.raises(ValueError, match="samples alone"):
        make(model, HAMILTONIAN).step(SPINS, torch.ones(32))
    with pytest.raises(ValueError, match="no groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("change", ["frozen", "type"])
def test_a_model_that_changes_later_is_taken_as_it_is(change):
    ends = []
    for changed_first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(SITES, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
        model.to(torch.float32 if change == "type" else torch.float64)
        if not changed_first:
            optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN, lr=0.1)
        if change == "type":
            model.double()
        else:
            model[0].requires_grad_(False)
        if changed_first:
            optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN, lr=0.1)
        for _ in range(2):
            optimizer.step(SPINS, weights=exact.probabilities(model, SPINS))
        ends.append(exact.parameters_of(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-14)
