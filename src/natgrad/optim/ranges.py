"""The ranges of optimizers' options."""

from __future__ import annotations

__all__ = ["check_range"]


def check_range(name: str, value: float, below: float = float("inf")) -> None:
    """Raise a ValueError unless ``0 <= value < below``."""
    if not 0 <= value < below:
        bound = "a finite number >= 0" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {bound}, got {value}")
