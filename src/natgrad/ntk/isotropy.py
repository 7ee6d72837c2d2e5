r"""The constants α of isotropic natural gradients in wide networks.

A structure is isotropic when its update, seen in function space, is a multiple of the identity,
:math:`J \hat F^{-1} J^\top / N = \alpha I`. Gradient descent with learning rate η then contracts
the residual by ``1 − ηα`` per step, so ``η = 1/α`` converges in one step of the linearised network
(Karakida & Osawa 2020).
"""

from __future__ import annotations

from natgrad.curvature.block_tridiagonal import tridiagonal_coefficients

__all__ = ["isotropic_constant"]


def isotropic_constant(
    structure: str,
    depth: int,
    samples: int,
    *,
    input_dim: int | None = None,
    width: int | None = None,
    active_fraction: float = 0.5,
) -> float:
    """Return α of a wide fully connected network at zero damping, for the squared loss.

    Args:
        structure: ``"full"``, ``"block_diagonal"``, ``"block_tridiagonal"``, ``"kfac"`` or
            ``"unit_wise"``.
        depth: Number of weight layers ``L``.
        samples: Training samples ``N`` of the full batch.
        input_dim: Input dimension ``M_0``; needed for kfac when it is below ``N``.
        width: Hidden width ``M``; needed for unit_wise.
        active_fraction: ``γ``, the share of samples with a non-zero slope at a hidden unit: 1/2
            for ReLU, 1 for smooth activations.

    Returns:
        1 for the full matrix; ``L``; ``s`` or ``s + 1`` for ``L = 3s`` or ``3s + 1``; for kfac
        ``N(L − 1) + 1``, with the first layer counting ``min(M_0, N)``; ``γM(L − 1) + 1``.

    Raises:
        ValueError: If the structure has no such constant, as the diagonal, or a number it needs is
            missing; for the block tri-diagonal form at depth ``3s + 2``.
    """
    key = structure.replace("-", "_")
    if depth < 1 or samples < 1:
        raise ValueError(f"depth and samples must be at least 1, got {depth} and {samples}")
    if key in ("full", "exact"):
        return 1.0
    if key == "block_diagonal":
        return float(depth)
    if key == "block_tridiagonal":
        return float(tridiagonal_coefficients(depth).sum())
    if key == "kfac":
        if depth == 1:
            return 1.0
        first = samples if input_dim is None else min(samples, input_dim)
        return float(first + samples * (depth - 2) + 1)
    if key == "unit_wise":
        if width is None:
            raise ValueError("isotropic_constant of 'unit_wise' needs the hidden width")
        return active_fraction * width * (depth - 1) + 1.0
    raise ValueError(
        f"structure {structure!r} is not isotropic in wide networks, so it has no constant α; "
        "structures that are: full, block_diagonal, block_tridiagonal, kfac, unit_wise"
    )
