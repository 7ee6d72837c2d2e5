"""Bounds on the length of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["clip_scales"]


def clip_scales(
    groups: Sequence[dict[str, Any]],
    quadratic: float,
    squares: Sequence[float] | None = None,
    norm_clip: float | None = None,
) -> list[float]:
    """Return the factor, at most 1, on every parameter group's step.

    Args:
        groups: Parameter groups; ``"kl_clip"`` bounds ``η²·quadratic``.
        quadratic: ``δᵀFδ`` of the step of all groups at learning rate 1.
        squares: Squared Euclidean norm of every group's step at learning rate 1.
        norm_clip: Bound on the norm of all groups' steps together, after ``"kl_clip"``.
    """
    rates = [group["lr"] * group["unit"] for group in groups]
    scales = [1.0] * len(groups)
    for index, (group, lr) in enumerate(zip(groups, rates, strict=True)):
        if group["kl_clip"] is not None and quadratic > 0 and lr:
            scales[index] = min(1.0, (group["kl_clip"] / (quadratic * lr**2)) ** 0.5)
    if norm_clip is not None and squares is not None:
        terms = zip(rates, scales, squares, strict=True)
        total = sum((lr * scale) ** 2 * square for lr, scale, square in terms)
        if total > norm_clip**2:
            scales = [scale * norm_clip / total**0.5 for scale in scales]
    return scales
