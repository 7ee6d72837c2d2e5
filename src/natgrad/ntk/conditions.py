r"""Condition 1 of fast convergence: does the Jacobian have full row rank?

Loss ``½‖f − y‖²`` per sample, mean over ``N`` samples; Gram matrix ``G = JJᵀ`` without ``1/N``,
rows ``n·C + c``. Exact natural gradient descent converges at a rate that does not depend on the
conditioning of ``G`` if ``J`` has full row rank at the start and changes little along the way
(Zhang, Martens & Grosse 2019); the second condition is in :mod:`natgrad.ntk.stability`, the rates
are in :mod:`natgrad.ntk.convergence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import output_rows
from natgrad.jacobians import Jacobians
from natgrad.ntk.two_layer import angles


def identity_jacobians(
    model: nn.Module, x: Any, output: Callable[[Any], Tensor] | None = None
) -> tuple[Tensor, Jacobians]:
    """Return the output, detached, and the rows of its whole Jacobian, one per sample and output.

    Rows that are not finite, or do not cover a parameter, are a ValueError.
    """
    with Capture(model, output) as capture:
        capture.check_covered()
        z, jacobians = output_rows(capture, x)
    if not all(block.is_finite() for block in jacobians.values()):
        raise ValueError(
            "the Jacobian has NaN or infinite entries: check the inputs and the parameters"
        )
    return z, jacobians


@dataclass(frozen=True)
class JacobianConditions:
    """Whether the Jacobian has full row rank, and how well its Gram matrix is conditioned.

    Attributes:
        samples: ``N``.
        outputs: Outputs per sample ``C``.
        parameters: Trainable parameters ``P``.
        smallest_eigenvalue: ``λ_min`` of ``G = JJᵀ``; 0 where rounding made it negative.
        largest_eigenvalue: ``λ_max`` of ``G``.
        rank: Eigenvalues above ``N·C · eps · λ_max``, with eps that of the model's dtype.
        silent: Samples with an output whose Jacobian row is zero.
        duplicates: Pairs of equal inputs.
        proportional: Pairs of parallel or opposite inputs with proportional Jacobian rows, equal
            ones not included.
        limit_smallest_eigenvalue: ``λ_min`` of the infinite-width Gram matrix, where it was given.
    """

    samples: int
    outputs: int
    parameters: int
    smallest_eigenvalue: float
    largest_eigenvalue: float
    rank: int
    silent: tuple[int, ...] = ()
    duplicates: tuple[tuple[int, int], ...] = ()
    proportional: tuple[tuple[int, int], ...] = ()
    limit_smallest_eigenvalue: float | None = None

    @property
    def full_row_rank(self) -> bool:
        """Whether condition 1 holds: ``rank J = N·C``."""
        return self.rank == self.samples * self.outputs

    @property
    def condition_number(self) -> float:
        """``λ_max / λ_min`` of ``G``; infinite without full row rank."""
        if not self.full_row_rank:
            return math.inf
        return self.largest_eigenvalue / self.smallest_eigenvalue

    def __str__(self) -> str:
        rows = self.samples * self.outputs
        if self.full_row_rank:
            return (
                f"The Jacobian has full row rank {rows} (condition 1 holds): the eigenvalues of "
                f"its Gram matrix lie between {self.smallest_eigenvalue:.3g} and "
                f"{self.largest_eigenvalue:.3g}, condition number {self.condition_number:.3g}."
            )
        reasons = []
        if rows > self.parameters:
            reasons.append(f"{rows} rows are more than {self.parameters} parameters")
        if self.duplicates:
            reasons.append(f"samples {_pairs(self.duplicates)} are equal")
        if self.proportional:
            reasons.append(
                f"samples {_pairs(self.proportional)} are parallel or opposite and their rows "
                "proportional"
            )
        if self.silent:
            shown = ", ".join(map(str, self.silent[:5])) + (", ..." if self.silent[5:] else "")
            reasons.append(f"an output of samples {shown} depends on no parameter")
        why = "; ".join(reasons) or "the inputs show no reason, so try a wider network"
        return (
            f"The Jacobian has rank {self.rank} of {rows} rows, so condition 1 does not hold: "
            f"{why}."
        )


def _pairs(pairs: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{i} and {j}" for i, j in pairs[:3])
    return shown + (f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else "")


def jacobian_conditions(
    model: nn.Module,
    x: Any,
    *,
    kernel: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> JacobianConditions:
    """Check condition 1: whether the Jacobian of a model on some inputs has full row rank.

    Costs one forward pass, ``C`` backward passes at once and ``O((N·C)³)``.

    Args:
        model: Any module; it runs in its present mode and is left as it was.
        x: Its input: a tensor ``(N, ...)``, a tuple of arguments or a dict of keyword arguments.
        kernel: Gram matrix of the infinite-width limit, without ``1/N``, ``(N, N)`` or
            ``(N·C, N·C)``, e.g. :func:`~natgrad.ntk.two_layer.two_layer_kernel`.
        output: Picks the output tensor out of what the model returns.

    Returns:
        Rank, extreme eigenvalues, and, for a tensor ``x``, which samples are to blame.

    Raises:
        ValueError: If the kernel has the wrong shape or a parameter cannot be covered.
    """
    _, jacobians = identity_jacobians(model, x, output)
    samples, outputs = jacobians.samples, jacobians.directions
    limit = None
    if kernel is not None:
        if tuple(kernel.shape) not in ((samples,) * 2, (samples * outputs,) * 2):
            raise ValueError(
                f"kernel must have shape ({samples}, {samples}) or "
                f"({samples * outputs}, {samples * outputs}), got {tuple(kernel.shape)}: compute "
                "it on the same inputs"
            )
        limit = float(torch.linalg.eigvalsh(kernel.double())[0])
    gram = jacobians.gram()
    eps = torch.finfo(gram.dtype).eps
    gram = gram.double()
    values = torch.linalg.eigvalsh(gram)
    diagonal = gram.diagonal().reshape(samples, outputs)
    duplicates: list[tuple[int, int]] = []
    proportional: list[tuple[int, int]] = []
    if isinstance(x, Tensor) and len(x) == samples:
        duplicates, candidates = related_samples(x.detach())
        blocks = gram.reshape(samples, outputs, samples, outputs)
        for i, j in candidates:
            cross = blocks[i, :, j].diagonal().square()
            product = diagonal[i] * diagonal[j]
            if bool(((product > 0) & (cross >= (1.0 - 1e3 * eps) * product)).all()):
                proportional.append((i, j))
    return JacobianConditions(
        samples=samples,
        outputs=outputs,
        parameters=jacobians.layout.numel,
        smallest_eigenvalue=max(0.0, float(values[0])),
        largest_eigenvalue=float(values[-1]),
        rank=int((values > len(values) * eps * values[-1]).sum()),
        silent=tuple((diagonal == 0).any(1).nonzero()[:, 0].tolist()),
        duplicates=tuple(duplicates),
        proportional=tuple(proportional),
        limit_smallest_eigenvalue=limit,
    )


def related_samples(x: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of equal samples, and those parallel or opposite up to rounding."""
    eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    flat = x.double().flatten(1)
    angle = angles(flat, flat)
    rounding = 4.0 * max(eps, torch.finfo(torch.float64).eps) * flat.shape[1] ** 0.5
    aligned = torch.minimum(angle, math.pi - angle) <= rounding
    equal: list[tuple[int, int]] = []
    related: list[tuple[int, int]] = []
    for i, j in torch.triu(aligned, diagonal=1).nonzero().tolist():
        (equal if torch.equal(flat[i], flat[j]) else related).append((int(i), int(j)))
    return equal, related
