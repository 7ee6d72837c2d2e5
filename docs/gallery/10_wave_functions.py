"""
A wave function
===============

The ground state of a chain of ten spins in a transverse field by variational Monte Carlo.
Stochastic reconfiguration is the natural gradient of the energy; there is nothing to tune.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad
from natgrad.wave_functions import (
    Metropolis,
    TransverseFieldIsing,
    all_configurations,
    probabilities,
)

torch.set_num_threads(1)
torch.manual_seed(0)
sites = 10


class BoltzmannMachine(nn.Module):
    """A restricted Boltzmann machine: ``log ψ(σ) = Σ log cosh(Wσ + b)``."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(sites, 2 * sites).double()
        nn.init.normal_(self.hidden.weight, std=0.05)

    def forward(self, spins):
        return torch.log(torch.cosh(self.hidden(spins))).sum(-1)


# %%
# Samples come from Markov chains; a step sees 1,024 of them.

model, hamiltonian = BoltzmannMachine(), TransverseFieldIsing(sites, field=1.0)
sampler = Metropolis(model, sites, chains=64)
optimizer = natgrad.StochasticReconfiguration(model, hamiltonian)
spins, energies = all_configurations(sites), []
for _ in range(40):
    optimizer.step(sampler.sample(16))
    with torch.no_grad():  # The energy over all configurations, to look at.
        local = hamiltonian.local_energies(model, spins)
        energies.append(float((probabilities(model, spins) * local).sum()))

# %%
# As many configurations are few enough to know the ground state exactly.

matrix = hamiltonian.matrix(spins).to_dense()
lowest, second = (float(value) for value in torch.linalg.eigvalsh(matrix)[:2])

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.semilogy(range(1, 41), [one - lowest for one in energies], marker=".")
axes.axhline(second - lowest, color="grey", linestyle="--", label="first excited state")
axes.set(xlabel="step", ylabel="energy above the ground state")
axes.legend()
plt.show()
