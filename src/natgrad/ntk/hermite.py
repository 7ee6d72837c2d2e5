r"""Mehler's expansion: Gaussian expectations of products from one-dimensional integrals.

.. math:: E[φ(u)φ(v)] = \sum_k a_k(q) a_k(q') ρ^k, \qquad a_k(q) = E[φ(\sqrt q z) h_k(z)]

with the normalised Hermite polynomials ``h_k``. Coefficients are integrals by the trapezoid rule,
one per sample and power, exponentially accurate for analytic functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The trapezoid rule: beyond 13 the root of the normal density is below 1e-18.
_LIMIT, _NODES = 13.0, 1601
# Elements of a block of rows that Horner's scheme works on: it stays in the cache, and torch starts
# no threads for so few, which would meet after every power of ρ.
_BLOCK = 2**15
_TOLERANCE = 1e-12
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class HermiteSeries:
    """Hermite coefficients ``a_k(q_i)`` (K + 1, N), with ``q``, ``E[φ²]`` and errors, all (N,)."""

    variances: Tensor
    coefficients: Tensor
    moments: Tensor
    error: Tensor

    def select(self, places: Tensor) -> HermiteSeries:
        """Return the series of some samples."""
        return HermiteSeries(
            self.variances[places],
            self.coefficients[:, places],
            self.moments[places],
            self.error[places],
        )

    def last(self) -> tuple[int, int]:
        """Return the last even and the last odd power that matter, negative if none does."""
        # Products of what is dropped are below 1e-18 of the result's scale.
        matters = (self.coefficients.abs() > 1e-9 * self.moments.sqrt()).any(1)
        powers = matters.nonzero().squeeze(1).tolist()
        even = max((k for k in powers if k % 2 == 0), default=-2)
        odd = max((k for k in powers if k % 2 == 1), default=-1)
        return even, odd


def hermite_series(
    function: Callable[[Tensor], Tensor], q1: Tensor, q2: Tensor, max_terms: int
) -> tuple[HermiteSeries, HermiteSeries]:
    """Return the Hermite coefficients of φ for both sides' variances, cut after the same power."""
    values, places = torch.unique(torch.cat([q1, q2]), return_inverse=True)
    nodes, root = _quadrature_rule(values.device)
    basis = [root, nodes * root]
    for k in range(1, max_terms):
        following = nodes * basis[k] - math.sqrt(k) * basis[k - 1]
        basis.append(following / math.sqrt(k + 1))
    sampled = function(values.sqrt().unsqueeze(1) * nodes) * root
    coefficients = torch.stack(basis) @ sampled.T
    moments = (sampled**2).sum(1)
    tails = (moments - (coefficients**2).cumsum(0)).clamp_(min=0)
    enough = (tails <= _TOLERANCE * moments).all(1)
    terms = int(enough.int().argmax()) + 1 if bool(enough.any()) else max_terms + 1
    # The rule at half the nodes errs by about the root of the rule's own error.
    coarse = 2 * (sampled[:, ::2] ** 2).sum(1)
    error = tails[terms - 1] + (moments - coarse).abs() + terms * _EPSILON * moments
    series = HermiteSeries(values, coefficients[:terms], moments, error)
    return series.select(places[: len(q1)]), series.select(places[len(q1) :])


def mehler_sum(first: HermiteSeries, second: HermiteSeries, rho: Tensor) -> Tensor:
    """Return ``Σ_k a_k(q_i) a_k(q'_j) ρ_ij^k``, (N, N'), written over ``rho``."""
    rows = max(1, _BLOCK // max(1, rho.shape[1]))
    # Odd functions have odd powers only, even ones even powers, x·sigmoid(x) one odd power.
    last = first.last(), second.last()
    even, odd = max(last[0][0], last[1][0]), max(last[0][1], last[1][1])
    for start in range(0, rho.shape[0], rows):
        block = rho[start : start + rows]
        left = first.coefficients[:, start : start + rows].unsqueeze(2)
        right = second.coefficients.unsqueeze(1)
        square = block * block
        total = block.mul_(_horner(left, right, square, odd, 1))
        total += _horner(left, right, square, even, 0)
    return rho


def _horner(left: Tensor, right: Tensor, square: Tensor, last: int, first: int) -> Tensor:
    """Sum ``left[k] right[k] square^⌊k/2⌋`` over ``k = first, first + 2, …, last``."""
    total = torch.zeros_like(square)
    for k in range(last, first - 1, -2):
        total.mul_(square).addcmul_(left[k], right[k])
    return total


def _quadrature_rule(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the nodes of the trapezoid rule and the roots of their weights, (n,) each."""
    nodes = torch.linspace(-_LIMIT, _LIMIT, _NODES, dtype=torch.float64, device=device)
    step = 2 * _LIMIT / (_NODES - 1)
    return nodes, torch.exp(-(nodes**2) / 4) * math.sqrt(step / math.sqrt(2 * math.pi))


def second_moments(function: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    """Return ``E[φ(u)²]`` for ``u ~ N(0, q_i)`` by quadrature, (N,)."""
    values, places = torch.unique(q, return_inverse=True)
    nodes, root = _quadrature_rule(q.device)
    sampled = function(values.sqrt().unsqueeze(1) * nodes) * root
    return (sampled**2).sum(1)[places]
