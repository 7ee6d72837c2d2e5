"""Markov chains against the distribution they draw from, and statistics against formulas."""

from __future__ import annotations

import math

import pytest
import torch

from natgrad.wave_functions import Metropolis, all_configurations, energy_statistics
from natgrad.wave_functions.configurations import codes
from tests.wave_functions import exact


@pytest.mark.parametrize("move", ["flip", "exchange"])
@pytest.mark.parametrize("kind", exact.AMPLITUDES)
def test_samples_are_distributed_as_the_square(kind, move):
    sites = 6
    model = exact.AMPLITUDES[kind](sites, seed=3)
    spins = all_configurations(sites, 0 if move == "exchange" else None)
    shares = exact.probabilities(model, spins)
    sampler = Metropolis(model, sites, chains=256, move=move, sweep=12)
    samples = sampler.sample(40)
    assert samples.shape == (256, 40, sites) and samples.dtype == torch.float64
    counts = torch.bincount(codes(samples.flatten(0, 1)), minlength=2**sites).double()
    counts = counts[codes(spins)]
    total = 256 * 40
    assert counts.sum() == total
    # χ² of D − 1 degrees of freedom; consecutive samples are all but independent.
    chi = float(((counts - total * shares).square() / (total * shares)).sum())
    degrees = len(spins) - 1
    assert abs(chi - degrees) < 6 * math.sqrt(2 * degrees)
    assert 0 < sampler.acceptance < 1


def test_chains_go_on_from_a_checkpoint_bit_by_bit():
    model = exact.RealAmplitude(5)
    first, second = (Metropolis(model, 5, chains=4, seed=seed) for seed in (1, 2))
    first.sample(3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.sample(4), second.sample(4))
    with pytest.raises(ValueError, match="configurations"):
        Metropolis(model, 5, chains=3).load_state_dict(first.state_dict())


def test_the_global_random_state_is_left_alone():
    model = exact.RealAmplitude(5)
    before = torch.get_rng_state()
    Metropolis(model, 5, chains=4).sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_of_independent_samples():
    generator = torch.Generator().manual_seed(0)
    values = 3 + 2 * torch.randn(64, 500, generator=generator, dtype=torch.float64)
    found = energy_statistics(values)
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.variance == pytest.approx(float(values.var(correction=0)), rel=1e-12)
    # The error of an error from 64 blocks is 9 %.
    assert found.error == pytest.approx(2 / math.sqrt(values.numel()), rel=0.4)
    assert found.r_hat == pytest.approx(1.0, abs=0.01)
    assert found.v_score(10, reference=1.0) == 10 * found.variance / (found.mean - 1) ** 2


def test_statistics_of_correlated_samples():
    """An autoregressive process of coefficient a has ``1 + 2τ = (1 + a)/(1 − a)``."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(16, 4000, generator=generator, dtype=torch.float64)
    coefficient, values = 0.8, [noise[:, 0] / math.sqrt(1 - 0.8**2)]
    for step in range(1, noise.shape[1]):
        values.append(coefficient * values[-1] + noise[:, step])
    found = energy_statistics(torch.stack(values, 1))
    expected = (1 / (1 - coefficient**2) * 9 / noise.numel()) ** 0.5
    assert found.error == pytest.approx(expected, rel=0.4)
    assert 2 < found.correlation_time < 8  # 4 but for noise.


def test_statistics_tell_chains_that_disagree():
    values = torch.randn(4, 100, dtype=torch.float64) + torch.arange(4.0).unsqueeze(1)
    within = values.var(1).mean()
    expected = math.sqrt(0.99 + float(values.mean(1).var() / within))
    assert energy_statistics(values).r_hat == pytest.approx(expected, rel=1e-12)
    assert math.isnan(energy_statistics(values[0]).r_hat)
    assert energy_statistics(torch.ones(3, 4)).error == 0


def test_statistics_of_complex_energies():
    values = torch.complex(torch.randn(5, 20).double(), torch.randn(5, 20).double())
    found = energy_statistics(values)
    assert found.mean == pytest.approx(float(values.real.mean()))
    assert found.variance == pytest.approx(float((values - values.mean()).abs().square().mean()))


def test_wrong_arguments_are_refused():
    model = exact.RealAmplitude(5)
    with pytest.raises(ValueError, match="sum 0"):
        Metropolis(model, 5, move="exchange")
    with pytest.raises(ValueError, match="burn_in"):
        Metropolis(model, 5, burn_in=-1)
    with pytest.raises(ValueError, match="count"):
        Metropolis(model, 5).sample(0)
    with pytest.raises(ValueError, match="two entries"):
        energy_statistics(torch.ones(1))
