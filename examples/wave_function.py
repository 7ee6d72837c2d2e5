"""The ground state of a spin chain by variational Monte Carlo, without a setting to tune.

python examples/wave_function.py --fast                         # seconds
python examples/wave_function.py --hamiltonian heisenberg --sites 16
python examples/wave_function.py --exact --sites 10             # sums instead of samples
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn

import natgrad
from natgrad.wave_functions import (
    Hamiltonian,
    Heisenberg,
    Metropolis,
    TransverseFieldIsing,
    all_configurations,
    energy_statistics,
    probabilities,
)


class BoltzmannMachine(nn.Module):
    """A restricted Boltzmann machine: ``log ψ(σ) = a·σ + Σ log cosh(Wσ + b)``."""

    def __init__(self, sites: int, density: int = 2) -> None:
        super().__init__()
        self.visible = nn.Linear(sites, 1, bias=False)
        self.hidden = nn.Linear(sites, density * sites)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward(self, spins: Tensor) -> Tensor:
        """Return ``log ψ``, ``(N,)``."""
        size = self.hidden(spins).abs()
        log_cosh = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        return self.visible(spins)[:, 0] + log_cosh.sum(-1)


def ground_state_energy(hamiltonian: Hamiltonian, spins: Tensor) -> float:
    """Return the lowest eigenvalue, by LOBPCG on the sparse matrix over all configurations."""
    matrix = hamiltonian.matrix(spins)
    torch.manual_seed(0)
    start = torch.randn(len(spins), 3, dtype=spins.dtype)
    return float(torch.lobpcg(matrix, X=start, largest=False, niter=1000, tol=1e-12)[0][0])


def main(arguments: list[str] | None = None) -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hamiltonian", choices=("ising", "heisenberg"), default="ising")
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--exact", action="store_true", help="sum over all configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="8 sites, 20 steps")
    options = parser.parse_args(arguments)
    if options.fast:
        options.sites, options.steps = 8, 20
    is_ising = options.hamiltonian == "ising"
    hamiltonian: Hamiltonian
    if is_ising:
        hamiltonian = TransverseFieldIsing(options.sites)
    else:
        hamiltonian = Heisenberg(options.sites, marshall=True)
    spins = all_configurations(options.sites, None if is_ising else 0)
    lowest = ground_state_energy(hamiltonian, spins)
    torch.manual_seed(options.seed)
    model = BoltzmannMachine(options.sites).double()
    move = "flip" if is_ising else "exchange"
    sampler = Metropolis(model, options.sites, chains=64, move=move, seed=options.seed)
    optimizer = natgrad.StochasticReconfiguration(model, hamiltonian)
    seconds = 0.0
    for step in range(options.steps + 1):
        if step % 5 == 0:
            # The true energy of the model, which no step is told.
            shares = probabilities(model, spins)
            energy = float((shares * hamiltonian.local_energies(model, spins)).sum())
            error = (energy - lowest) / abs(lowest)
            print(f"step {step:3d}  {seconds:6.2f} s  energy {energy:.8f}  error {error:.1e}")
        start = time.perf_counter()
        if options.exact:
            optimizer.step(spins, weights=probabilities(model, spins))
        else:
            optimizer.step(sampler.sample(max(1, options.samples // 64)))
        seconds += time.perf_counter() - start
    print(f"exact energy {lowest:.8f}")
    found = energy_statistics(hamiltonian.local_energies(model, sampler.sample(50)))
    print(
        f"sampled energy {found.mean:.6f} ± {found.error:.6f}, R-hat {found.r_hat:.3f}, "
        f"V-score {found.v_score(options.sites):.1e}"
    )


if __name__ == "__main__":
    main()
