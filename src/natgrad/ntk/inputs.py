"""Inputs as the theory wants them: linearly independent, or spread evenly over their space."""

from __future__ import annotations

import torch
from torch import Tensor


def forster_transform(
    x: Tensor,
    x_test: Tensor | None = None,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor | None]:
    r"""Bring more samples than dimensions into radial isotropic position.

    With ``M_0 < N`` the first layer of K-FAC contributes ``N · diag(P_X)``, with ``P_X`` the
    projection on the range of the inputs, which is a multiple of the identity only if all
    ``(P_X)_nn`` are equal. Repeating ``X ← X (XᵀX)^{-1/2}`` and dividing each sample by its norm
    makes ``XᵀX = (N/M_0) I`` for unit-norm samples, hence ``(P_X)_nn = M_0/N``, and the layer
    counts ``M_0`` (Karakida & Osawa 2020).

    Args:
        x: Training inputs, ``(N, M_0)``, ``N > M_0``, in general position.
        x_test: Further inputs, ``(N', M_0)``, which get the same linear map and are divided by
            their norms.
        iterations: Most repetitions.
        tolerance: Relative error in Frobenius norm at which ``XᵀX`` counts as a multiple of the
            identity.

    Returns:
        Transformed inputs of norm 1, float64; None for absent test inputs.

    Raises:
        ValueError: If there are no more samples than dimensions, a sample is zero, the samples do
            not span all dimensions, or the iteration does not converge because too many of them
            lie in a subspace.
    """
    if x.dim() != 2 or x.shape[0] <= x.shape[1]:
        raise ValueError(
            f"the Forster transform is for more samples than dimensions, got {tuple(x.shape)}: "
            "with fewer, K-FAC needs no transform"
        )
    samples, dim = x.shape
    current = _unit_norm(x.double())
    total = torch.eye(dim, dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        values, vectors = torch.linalg.eigh(current.T @ current)
        deviation = float((values - samples / dim).norm() / (samples / dim * dim**0.5))
        if deviation <= tolerance:
            return current, None if x_test is None else _unit_norm(x_test.double() @ total)
        if float(values[0]) <= samples * torch.finfo(torch.float64).eps * float(values[-1]):
            raise ValueError(
                f"the samples span fewer than {dim} dimensions: project them on their principal "
                "components first"
            )
        # XᵀX grows to N/M_0 · I, so the map is scaled to keep the norms near 1.
        step = (vectors * ((samples / dim) / values).sqrt()) @ vectors.T
        current = _unit_norm(current @ step)
        total = total @ step
    raise ValueError(
        f"the Forster transform did not converge in {iterations} iterations (relative deviation "
        f"{deviation:.2g}): too many samples lie in a subspace; project them on fewer principal "
        "components first"
    )


def _unit_norm(x: Tensor) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError("a sample is zero, so it has no direction: remove it")
    directions: Tensor = x / norms
    return directions
