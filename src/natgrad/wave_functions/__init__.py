"""Variational Monte Carlo: wave functions of spins, energies, samples and natural gradient."""

from natgrad.wave_functions.configurations import all_configurations, probabilities
from natgrad.wave_functions.energy_statistics import EnergyStatistics, energy_statistics
from natgrad.wave_functions.hamiltonian import Connected, Hamiltonian, chain
from natgrad.wave_functions.heisenberg import Heisenberg
from natgrad.wave_functions.ising import TransverseFieldIsing
from natgrad.wave_functions.metropolis import Metropolis
from natgrad.wave_functions.stochastic_reconfiguration import (
    ReconfigurationStep,
    StochasticReconfiguration,
)

__all__ = [
    "Connected",
    "EnergyStatistics",
    "Hamiltonian",
    "Heisenberg",
    "Metropolis",
    "ReconfigurationStep",
    "StochasticReconfiguration",
    "TransverseFieldIsing",
    "all_configurations",
    "chain",
    "energy_statistics",
    "probabilities",
]
