"""Small wave functions and, from dense matrices and explicit sums, all that is tested of them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

X = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
Y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
# Configurations are in the order of binary numbers, where 0 is spin down.
Z = torch.tensor([[-1, 0], [0, 1]], dtype=torch.complex128)


class RealAmplitude(nn.Module):
    """A perceptron for ``log ψ``."""

    def __init__(self, sites: int, hidden: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Linear(sites, hidden).double()
        self.out = nn.Linear(hidden, 1).double()
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.4 * noise

    def forward(self, spins: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(spins)))[:, 0]


class ComplexAmplitude(nn.Module):
    """Two perceptrons for the modulus and the phase of ψ."""

    def __init__(self, sites: int, hidden: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.modulus = RealAmplitude(sites, hidden, seed)
        self.phase = RealAmplitude(sites, hidden, seed + 1)

    def forward(self, spins: Tensor) -> Tensor:
        return torch.complex(self.modulus(spins), self.phase(spins))


AMPLITUDES = {"real": RealAmplitude, "complex": ComplexAmplitude}


def product(sites: int, factors: dict[int, Tensor]) -> Tensor:
    """Return the Kronecker product of matrices at some sites and identities at all others."""
    identity = torch.eye(2, dtype=torch.complex128)
    return functools.reduce(torch.kron, [factors.get(site, identity) for site in range(sites)])


def ising(sites: int, coupling: float, field: float) -> Tensor:
    bonds = [(i, (i + 1) % sites) for i in range(sites)]
    matrix = -field * sum(product(sites, {i: X}) for i in range(sites))
    return matrix - coupling * sum(product(sites, {i: Z, j: Z}) for i, j in bonds)


def heisenberg(sites: int, coupling: float) -> Tensor:
    bonds = [(i, (i + 1) % sites) for i in range(sites)]
    terms = [product(sites, {i: pauli, j: pauli}) for i, j in bonds for pauli in (X, Y, Z)]
    return 0.25 * coupling * sum(terms)


def ising_energy(sites: int, field: float) -> float:
    """Return the ground state energy of a periodic chain of even length, by free fermions."""
    waves = [(2 * k + 1) * math.pi / sites for k in range(sites)]
    return -sum(math.sqrt(1 + field**2 - 2 * field * math.cos(wave)) for wave in waves)


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def energy(model: nn.Module, spins: Tensor, matrix: Tensor) -> Tensor:
    """Return ``⟨ψ|H|ψ⟩/⟨ψ|ψ⟩``, to be differentiated."""
    psi = torch.exp(model(spins)).to(torch.complex128)
    return (psi.conj() @ matrix @ psi).real / (psi.conj() @ psi).real


def gradient(model: nn.Module, spins: Tensor, matrix: Tensor) -> Tensor:
    found = torch.autograd.grad(energy(model, spins, matrix), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in found])


def rows(model: nn.Module, spins: Tensor) -> Tensor:
    """Return ``∂ log ψ/∂θ``, ``(N, P)``, complex, one entry of log ψ at a time."""
    found = []
    for value in model(spins):
        parts = [value.real, value.imag] if value.is_complex() else [value, 0 * value]
        flat = []
        for part in parts:
            grads = torch.autograd.grad(
                part, list(model.parameters()), retain_graph=True, materialize_grads=True
            )
            flat.append(torch.cat([g.reshape(-1) for g in grads]))
        found.append(torch.complex(flat[0], flat[1]))
    return torch.stack(found)


def probabilities(model: nn.Module, spins: Tensor) -> Tensor:
    weights = torch.exp(2 * model(spins).detach().real)
    return weights / weights.sum()


def metric(derivatives: Tensor, shares: Tensor) -> Tensor:
    """Return the real part of the quantum geometric tensor, ``⟨O*O⟩ − ⟨O*⟩⟨O⟩``."""
    mean = sum(p * row for p, row in zip(shares, derivatives, strict=True))
    moment = sum(
        p * torch.outer(row.conj(), row) for p, row in zip(shares, derivatives, strict=True)
    )
    return (moment - torch.outer(mean.conj(), mean)).real


def forces(derivatives: Tensor, shares: Tensor, local_energies: Tensor) -> Tensor:
    """Return ``2 Re (⟨O* E_loc⟩ − ⟨O*⟩⟨E_loc⟩)``."""
    local = local_energies.to(torch.complex128)
    mean = (shares.unsqueeze(1) * derivatives.conj()).sum(0)
    joint = (shares.unsqueeze(1) * derivatives.conj() * local.unsqueeze(1)).sum(0)
    return 2 * (joint - mean * (shares * local).sum()).real
