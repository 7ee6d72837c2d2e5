"""Leading singular pairs of a matrix known by its products with symmetric matrices.

Pairs come as ``(A, B)`` per group, ``(R, G, d, d)``, with ``‖A‖ = ‖B‖ = √σ``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A product with symmetric matrices, one per group.
Product = Callable[[Tensor], Tensor]

#: Residuals do not fall below so many machine epsilons: float32 would never meet a bound of 1e-12.
ROUNDING = 8


def deflation(
    forward: Product, adjoint: Product, start: Tensor, rank: int, tolerance: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Return the leading pairs one after the other, each by power iteration.

    Args:
        forward: ``V ↦ Z V``.
        adjoint: ``U ↦ Zᵀ U``.
        start: Identity of the output side, ``(G, d_out, d_out)``.
        rank: Number of pairs.
        tolerance: Largest residual, relative to the largest σ; no less than rounding.
        limit: Most iterations.
    """
    tolerance = max(tolerance, ROUNDING * torch.finfo(start.dtype).eps)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    largest: Tensor | None = None
    for index in range(rank):
        v = start if index == 0 else _random_like(start, index)
        v = v / _norm(v)
        sigma = _norm(v)
        for _ in range(limit):
            image = forward(v)
            for a, b in zip(inputs, outputs, strict=True):
                image = image - a * _inner(b, v)
            length = _norm(image)
            u = image / _floored(length)
            back = adjoint(u)
            for a, b in zip(inputs, outputs, strict=True):
                back = back - b * _inner(a, u)
            sigma = _norm(back)
            residual = _norm(back - length * v)
            scale = sigma if largest is None else largest
            v = back / _floored(sigma)
            if bool((residual <= tolerance * scale).all()):
                break
        largest = sigma if largest is None else largest
        a, b = _signed(u, v, sigma)
        inputs.append(a)
        outputs.append(b)
    return torch.stack(inputs), torch.stack(outputs)


def lanczos(
    forward: Product, adjoint: Product, start: Tensor, rank: int, tolerance: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Return the leading pairs of ``Z`` on a Krylov space of ``ZᵀZ``, kept orthonormal.

    The products with all basis vectors are kept, so residuals are known without further ones.
    Where the space stops growing a random direction takes its place, lest a pair be missed.

    Args:
        forward: ``V ↦ Z V``.
        adjoint: ``U ↦ Zᵀ U``.
        start: Identity of the output side, ``(G, d_out, d_out)``.
        rank: Number of pairs.
        tolerance: Largest residual, relative to the largest σ; no less than rounding.
        limit: Most iterations.
    """
    tolerance = max(tolerance, ROUNDING * torch.finfo(start.dtype).eps)
    groups, d_out = start.shape[:2]
    size = d_out * (d_out + 1) // 2
    basis = backs = start.new_zeros(groups, 0, d_out**2)
    images: list[Tensor] = []
    # A generic start: the identity alone may be orthogonal to some pair.
    candidate = start / _norm(start) + 0.1 * _random_like(start, 0)
    steps = min(max(limit, rank), size)
    for step in range(steps):
        vector = _orthogonal(candidate, basis)
        lost = _norm(vector) <= 1e3 * torch.finfo(start.dtype).eps * _norm(candidate)
        if bool(lost.any()):
            vector = torch.where(lost, _orthogonal(_random_like(start, step + 1), basis), vector)
        vector = vector / _floored(_norm(vector))
        # Once more, as what is left may be small.
        vector = _orthogonal(vector, basis)
        vector = vector / _floored(_norm(vector))
        basis = torch.cat([basis, vector.flatten(1).unsqueeze(1)], dim=1)
        images.append(forward(vector))
        candidate = adjoint(images[-1])
        backs = torch.cat([backs, candidate.flatten(1).unsqueeze(1)], dim=1)
        # Not before one direction more than wanted was seen: the wanted may all be in it.
        if step >= rank and _are_found(basis, backs, rank, tolerance):
            break
    left, sigma, _ = torch.linalg.svd(
        torch.stack([image.flatten(1) for image in images], 2), full_matrices=False
    )
    kept = min(rank, sigma.shape[1])
    left, sigma = left[..., :kept], sigma[:, :kept]
    u = left.mT.unflatten(-1, (int(left.shape[1] ** 0.5 + 0.5), -1))
    present = (sigma > size * torch.finfo(sigma.dtype).eps * sigma[:, :1])[..., None, None]
    sigma = sigma[..., None, None]
    # V as an image of Zᵀ, so that its null space is that of the rows to rounding.
    v = torch.stack([adjoint(u[:, index]) for index in range(kept)], 1)
    v = torch.where(present, v / torch.where(present, sigma, 1.0), 0.0)
    a, b = _signed(u, v, torch.where(present, sigma, 0.0))
    missing = rank - a.shape[1]
    if missing > 0:  # Smaller matrices have fewer pairs.
        a = torch.cat([a, a.new_zeros(groups, missing, *a.shape[2:])], 1)
        b = torch.cat([b, b.new_zeros(groups, missing, *b.shape[2:])], 1)
    return a.transpose(0, 1).contiguous(), b.transpose(0, 1).contiguous()


def _are_found(basis: Tensor, backs: Tensor, rank: int, tolerance: float) -> bool:
    """Return whether the leading pairs on a space have small residuals ``σ‖Zᵀu − σv‖``."""
    squares, right = torch.linalg.eigh(symmetric_part(basis @ backs.mT))
    squares, right = squares[:, -rank:], right[..., -rank:].mT
    residual = (right @ backs - squares.unsqueeze(-1) * (right @ basis)).norm(dim=-1)
    return bool((residual <= tolerance * squares[:, -1:]).all())


def _signed(u: Tensor, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(√σ U, √σ V)``, symmetric, with the signs that make ``tr V ≥ 0``."""
    trace = v.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scale = torch.where(trace < 0, -sigma.sqrt(), sigma.sqrt())
    return symmetric_part(u * scale), symmetric_part(v * scale)


def _orthogonal(matrices: Tensor, basis: Tensor) -> Tensor:
    """Return ``(G, d, d)`` less its components along ``(G, k, d²)``, taken away twice."""
    flat = matrices.flatten(1).unsqueeze(1)
    for _ in range(2):
        flat = flat - (flat @ basis.mT) @ basis
    return flat[:, 0].view(matrices.shape)


def _random_like(matrices: Tensor, seed: int) -> Tensor:
    """Return symmetric random matrices of norm 1, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
    values = symmetric_part(values).to(matrices)
    return values / _norm(values)


def symmetric_part(matrices: Tensor) -> Tensor:
    """Return ``(M + Mᵀ)/2``."""
    return (matrices + matrices.mT) / 2


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return norms


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum((-2, -1), keepdim=True)


def _floored(norm: Tensor) -> Tensor:
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)
