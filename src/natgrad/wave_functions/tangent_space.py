r"""The energy of a wave function in a few tangents of it.

With tangents ``ψ_j = t_j ψ``, ``⟨t_j⟩ = 0``, and real coefficients c

.. math:: E(c) = \frac{E + 2 g^\top c + c^\top A c}{1 + c^\top B c}, \qquad
          g_j = \mathrm{Re} \langle t_j^* (E_{loc} - E) \rangle, \quad
          A_{ij} = \mathrm{Re} \langle t_i^* (H\psi_j)/\psi \rangle, \quad
          B_{ij} = \mathrm{Re} \langle t_i^* t_j \rangle

whose minimum is an eigenvalue of a matrix of ``k + 1`` rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.wave_functions.hamiltonian import LocalValues

#: Tangents that others explain up to this share of their square are left out.
DEPENDENT = 1e-10


@dataclass(frozen=True)
class Minimum:
    """The lowest energy in some distance.

    Attributes:
        coefficients: c, ``(k,)``.
        energy: ``E(c)``.
        distance: ``‖Σ c_j ψ_j‖/‖ψ‖``, the tangent of the angle between the states, with what else
            was said to count.
        is_bounded: Whether the distance was the limit.
    """

    coefficients: Tensor
    energy: float
    distance: float
    is_bounded: bool


@dataclass(frozen=True)
class TangentSpace:
    """The quadratic forms in tangents of norm 1 that are orthogonal.

    Attributes:
        energy: E.
        slopes: g, ``(r,)``.
        hamiltonian: A, ``(r, r)``.
        lengths: Squared distances, ``(r, r)``.
        basis: The tangents in terms of those given, ``(k, r)``.
    """

    energy: float
    slopes: Tensor
    hamiltonian: Tensor
    lengths: Tensor
    basis: Tensor

    def minimum(self, distance: float) -> Minimum:
        """Return the lowest energy in some distance.

        The Lagrange multiplier of the distance is added to A ("level shift") and found by
        bisection.
        """
        found = self._shifted(0.0)
        if self._distance(found) <= distance:
            return self._minimum(found, False)
        low, high = 0.0, 1e-3 * float(self.slopes.norm()) / distance
        while self._distance(self._shifted(high)) > distance:
            low, high = high, 4 * high
        for _ in range(30):
            middle = (low + high) / 2
            if self._distance(self._shifted(middle)) > distance:
                low = middle
            else:
                high = middle
        return self._minimum(self._shifted(high), True)

    def _shifted(self, shift: float) -> Tensor:
        size = len(self.slopes)
        matrix = self.slopes.new_zeros(size + 1, size + 1)
        matrix[0, 1:] = matrix[1:, 0] = self.slopes
        matrix[1:, 1:] = self.hamiltonian + shift * self.lengths
        matrix[1:, 1:].diagonal().sub_(self.energy)
        lowest = linalg.eigh(matrix)[1][:, 0]
        return lowest[1:] / lowest[0]

    def _minimum(self, found: Tensor, is_bounded: bool) -> Minimum:
        excess = 2 * self.slopes @ found + found @ self.hamiltonian @ found
        square = float(found @ found)
        energy = self.energy + float(excess - square * self.energy) / (1 + square)
        return Minimum(self.basis @ found, energy, self._distance(found), is_bounded)

    def _distance(self, found: Tensor) -> float:
        return math.sqrt(float(found @ self.lengths @ found))


def tangent_space(
    values: LocalValues, shares: Tensor, lengths: Tensor | None = None
) -> TangentSpace:
    """Return the forms as means over configurations, whose shares ``(N,)`` have sum 1.

    A is symmetrised, and g is the covariance that vanishes without noise in an eigenstate (Umrigar
    et al. 2007 discuss both). ``lengths``, ``(k, k)``, are added to B where distances are measured.
    """
    energy = (shares * values.energies).sum()
    means = (shares.unsqueeze(1) * values.tangents).sum(0)
    tangents = values.tangents - means
    applied = values.applied - values.energies.unsqueeze(1) * means
    weighted = (shares.unsqueeze(1) * tangents).mH
    overlaps = (weighted @ tangents).real
    hamiltonian = (weighted @ applied.to(tangents.dtype)).real
    slopes = (weighted @ (values.energies - energy).to(tangents.dtype)).real
    scales = overlaps.diagonal().sqrt()
    scales = torch.where(scales > 0, 1 / scales, 0.0)
    found, vectors = linalg.eigh(scales * overlaps * scales.unsqueeze(1))
    kept = found > DEPENDENT * found[-1].clamp(min=torch.finfo(found.dtype).tiny)
    basis = scales.unsqueeze(1) * vectors[:, kept] / found[kept].sqrt()
    hamiltonian = basis.mT @ (hamiltonian + hamiltonian.mT) @ basis / 2
    limited = overlaps if lengths is None else overlaps + lengths
    limited = basis.mT @ limited @ basis
    return TangentSpace(float(energy.real), basis.mT @ slopes, hamiltonian, limited, basis)
