"""Figures of two methods on the same draws, taken together draw by draw."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["differences", "ratios"]


def ratios(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratios of the numbers of draws that belong together; NaN for ∞/∞."""
    return [a / b for a, b in zip(numbers, others, strict=True)]


def differences(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the differences of the numbers of draws that belong together."""
    return [a - b for a, b in zip(numbers, others, strict=True)]
