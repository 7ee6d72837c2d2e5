"""Steps of the best length: the energy in a space of tangents, and how far it is trusted."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

import natgrad
from natgrad.wave_functions import (
    Heisenberg,
    Metropolis,
    TransverseFieldIsing,
    all_configurations,
)
from natgrad.wave_functions.amplitude import LogAmplitude
from natgrad.wave_functions.tangent_space import tangent_space
from tests import dense
from tests.wave_functions import exact

SITES = 5
MATRIX = exact.ising(SITES, 1.0, 0.8)
HAMILTONIAN = TransverseFieldIsing(SITES, 1.0, 0.8)
SPINS = all_configurations(SITES)
KINDS = list(exact.AMPLITUDES)


def space_of(model, count=3):
    """Return the forms, and ψ and its tangents as columns of norm ‖ψ‖ and so on, explicitly."""
    generator = torch.Generator().manual_seed(5)
    derivatives, shares = exact.rows(model, SPINS), exact.probabilities(model, SPINS)
    directions = torch.randn(derivatives.shape[1], count, generator=generator, dtype=torch.float64)
    amplitude = LogAmplitude(model)
    values = HAMILTONIAN.local_values(lambda x: amplitude.tangents(x, directions), SPINS, 9)
    psi = torch.exp(model(SPINS).detach()).to(torch.complex128)
    psi = psi / psi.norm()
    columns = (derivatives - (shares.unsqueeze(1) * derivatives).sum(0)) @ directions.to(psi.dtype)
    return tangent_space(values, shares), torch.cat(
        [psi.unsqueeze(1), psi.unsqueeze(1) * columns], 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_energy_in_the_tangents_is_that_of_the_explicit_state(kind):
    space, columns = space_of(exact.AMPLITUDES[kind](SITES))
    for distance in (0.05, 0.3, 1e3):
        found = space.minimum(distance)
        one = found.coefficients.new_ones(1)
        state = columns @ torch.cat([one, found.coefficients]).to(columns.dtype)
        expected = (state.conj() @ MATRIX @ state).real / state.norm() ** 2
        assert found.energy == pytest.approx(float(expected), rel=1e-11)
        away = (state - columns[:, 0]).norm()
        assert found.distance == pytest.approx(float(away), rel=1e-9)
        assert found.is_bounded == (found.distance > 0.999 * distance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_minimum_is_the_lowest_eigenvalue(kind):
    space, columns = space_of(exact.AMPLITUDES[kind](SITES))
    overlaps = (columns.mH @ columns).real
    matrix = (columns.mH @ MATRIX @ columns).real
    factor = torch.linalg.cholesky(overlaps)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    assert space.minimum(1e6).energy == pytest.approx(
        float(torch.linalg.eigvalsh(whole)[0]), rel=1e-11
    )


def test_no_state_within_the_distance_is_lower():
    space, _ = space_of(exact.ComplexAmplitude(SITES))
    found = space.minimum(0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.randn(len(space.slopes), generator=generator, dtype=torch.float64)
        other *= 0.1 / other.norm()
        numerator = space.energy + 2 * space.slopes @ other + other @ space.hamiltonian @ other
        assert float(numerator) / (1 + 0.01) >= found.energy - 1e-12


def test_distances_in_parameters_count():
    model = exact.RealAmplitude(SITES)
    amplitude = LogAmplitude(model)
    torch.manual_seed(0)
    directions = torch.randn(amplitude.layout.numel, 3, dtype=torch.float64)
    values = HAMILTONIAN.local_values(lambda x: amplitude.tangents(x, directions), SPINS)
    shares = exact.probabilities(model, SPINS)
    metric = exact.metric(exact.rows(model, SPINS), shares)
    lengths = 0.3 * directions.mT @ directions
    found = tangent_space(values, shares, lengths).minimum(0.1)
    step = directions @ found.coefficients
    expected = step @ metric @ step + 0.3 * step @ step
    assert found.distance == pytest.approx(float(expected) ** 0.5, rel=1e-10)
    assert found.is_bounded and found.distance == pytest.approx(0.1, rel=1e-6)


def test_dependent_tangents_are_left_out():
    model = exact.RealAmplitude(SITES)
    amplitude = LogAmplitude(model)
    torch.manual_seed(0)
    columns = torch.randn(amplitude.layout.numel, 2, dtype=torch.float64)
    shares = exact.probabilities(model, SPINS)
    found = []
    for directions in (columns, torch.cat([columns, columns.sum(1, True), 0 * columns], 1)):
        values = HAMILTONIAN.local_values(
            lambda x, directions=directions: amplitude.tangents(x, directions), SPINS
        )
        minimum = tangent_space(values, shares).minimum(0.2)
        found.append((minimum.energy, directions @ minimum.coefficients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-11)
    dense.assert_same(found[1][1], found[0][1], 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_goes_to_the_minimum_in_the_span_of_natural_gradients(kind):
    model = exact.AMPLITUDES[kind](SITES)
    derivatives, shares = exact.rows(model, SPINS), exact.probabilities(model, SPINS)
    metric, gradient = exact.metric(derivatives, shares), exact.gradient(model, SPINS, MATRIX)
    identity = torch.eye(len(metric), dtype=torch.float64)
    natural = [
        torch.linalg.solve(metric + share * metric.trace() * identity, gradient)
        for share in (1e-2, 1e-4, 1e-6)
    ]
    directions = torch.stack(natural, 1)
    amplitude = LogAmplitude(model)
    values = HAMILTONIAN.local_values(lambda x: amplitude.tangents(x, directions), SPINS)
    lengths = 1e-2 * metric.trace() * directions.mT @ directions
    minimum = tangent_space(values, shares, lengths).minimum(0.01)
    assert minimum.is_bounded
    before = exact.parameters_of(model)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)
    optimizer._distance = 0.01  # So short that the first trial is taken.
    energy = optimizer.step(SPINS, weights=shares)
    moved = exact.parameters_of(model) - before
    assert optimizer.last.trials == 1
    dense.assert_same(moved, directions @ minimum.coefficients, 1e-6)
    after = exact.energy(model, SPINS, MATRIX).item()
    assert after < energy and energy == pytest.approx(float(optimizer.last.energy), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_raises_the_energy_of_sums_without_noise(kind):
    model = exact.AMPLITUDES[kind](SITES, seed=7)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)
    energies = [optimizer.step(SPINS, weights=exact.probabilities(model, SPINS)) for _ in range(15)]
    assert all(b <= a + 1e-12 for a, b in zip(energies, energies[1:], strict=False))
    lowest = float(torch.linalg.eigvalsh(MATRIX)[0])
    assert lowest - 1e-12 < energies[-1] < energies[0]


@pytest.mark.parametrize("hamiltonian", ["ising", "heisenberg"])
def test_the_ground_state_is_reached(hamiltonian):
    sites = 6
    spins = all_configurations(sites, 0 if hamiltonian == "heisenberg" else None)
    model = exact.RealAmplitude(sites, hidden=8, seed=1)
    operator = (
        Heisenberg(sites, marshall=True)
        if hamiltonian == "heisenberg"
        else (TransverseFieldIsing(sites))
    )
    lowest = float(torch.linalg.eigvalsh(operator.matrix(spins).to_dense())[0])
    optimizer = natgrad.StochasticReconfiguration(model, operator)
    for _ in range(40):
        energy = optimizer.step(spins, weights=exact.probabilities(model, spins))
    assert abs(energy / lowest - 1) < 1e-4


def test_an_eigenstate_stays():
    """Where nothing can be gained nothing moves: uniform ψ for a field alone."""
    model = exact.RealAmplitude(SITES)
    torch.nn.init.zeros_(model.out.weight)
    hamiltonian = TransverseFieldIsing(SITES, coupling=0.0)
    optimizer = natgrad.StochasticReconfiguration(model, hamiltonian)
    before = exact.parameters_of(model)
    for weights in (torch.ones(len(SPINS)), None):
        assert optimizer.step(SPINS, weights=weights) == pytest.approx(-SITES, rel=1e-12)
        assert torch.equal(exact.parameters_of(model), before)
    assert optimizer.last.variance < 1e-20


def test_tangents_and_decisions_come_from_different_halves_of_the_samples():
    """Samples of which the second half is one configuration decide on nothing."""
    model = exact.RealAmplitude(SITES)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)
    before = exact.parameters_of(model)
    optimizer.step(torch.cat([SPINS, SPINS[:1].expand(32, -1)]))
    assert torch.equal(exact.parameters_of(model), before)
    optimizer.step(torch.cat([SPINS, SPINS.flip(0)]))
    assert not torch.equal(exact.parameters_of(model), before)


def test_samples_lead_near_the_ground_state():
    sites = 8
    model = exact.RealAmplitude(sites, hidden=8, seed=1)
    hamiltonian = TransverseFieldIsing(sites)
    sampler = Metropolis(model, sites, chains=64)
    optimizer = natgrad.StochasticReconfiguration(model, hamiltonian)
    for _ in range(40):
        optimizer.step(sampler.sample(16))
    spins = all_configurations(sites)
    lowest = exact.ising_energy(sites, 1.0)
    energy = exact.energy(model, spins, exact.ising(sites, 1.0, 1.0)).item()
    assert abs(energy / lowest - 1) < 5e-3


def test_a_resumed_run_goes_on_bit_by_bit():
    model = exact.ComplexAmplitude(SITES)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)

    def steps(model, optimizer):
        for _ in range(3):
            optimizer.step(SPINS, weights=exact.probabilities(model, SPINS))
        return exact.parameters_of(model)

    steps(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other = exact.ComplexAmplitude(SITES, seed=9)
    other.load_state_dict(states[0])
    resumed = natgrad.StochasticReconfiguration(other, HAMILTONIAN)
    resumed.load_state_dict(states[1])
    expected = steps(model, optimizer)
    for found in (steps(other, resumed), steps(*copied), steps(*pickled)):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="checkpoint is of parameters"):
        natgrad.StochasticReconfiguration(exact.RealAmplitude(SITES), lr=0.1).load_state_dict(
            {**states[1], "param_groups": [{"params": [0, 1, 2, 3]}], "state": {}}
        )


def test_single_precision():
    model = exact.RealAmplitude(6, hidden=8).float()
    spins = all_configurations(6, dtype=torch.float32)
    optimizer = natgrad.StochasticReconfiguration(model, TransverseFieldIsing(6))
    for _ in range(30):
        energy = optimizer.step(spins, weights=exact.probabilities(model, spins))
    assert abs(energy / exact.ising_energy(6, 1.0) - 1) < 1e-3


def test_what_is_not_finite_moves_nothing():
    model = exact.RealAmplitude(SITES)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)
    with torch.no_grad():
        model.out.bias.fill_(math.nan)
    before = exact.parameters_of(model)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(SPINS)
    found = exact.parameters_of(model)
    assert torch.equal(found.nan_to_num(), before.nan_to_num()) and optimizer.last.length == 0


class Attending(torch.nn.Module):
    """log ψ by a layer of a transformer."""

    def __init__(self):
        super().__init__()
        self.spin = torch.nn.Linear(1, 4)
        self.layer = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.layer(self.spin(x.unsqueeze(-1))).mean(1)).squeeze(1)


@pytest.mark.parametrize("training", [True, False])
def test_tangents_of_a_transformer(training):
    torch.manual_seed(0)
    model = Attending().double().train(training)
    directions = torch.randn(sum(p.numel() for p in model.parameters()), 2).double()
    with torch.no_grad():
        logs, found = LogAmplitude(model).tangents(SPINS, directions)
    torch.testing.assert_close(found, exact.rows(model, SPINS).real @ directions)
    optimizer = natgrad.StochasticReconfiguration(model, HAMILTONIAN)
    weights = (2 * model(SPINS).detach()).exp()
    first = optimizer.step(SPINS, weights=weights)
    assert optimizer.step(SPINS, weights=(2 * model(SPINS).detach()).exp()) < first
