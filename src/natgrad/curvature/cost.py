"""What curvature costs, and the batch that costs are stated for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Cost", "Workload"]


@dataclass(frozen=True)
class Cost:
    """What a part of a structure costs.

    Attributes:
        factors: What is factorised, e.g. ``"785 x 785, 1024 x 1024"``.
        memory: Bytes of state between steps, factorisation included.
        refresh: Multiplications of one update and factorisation.
        step: Multiplications of preconditioning one gradient.
    """

    factors: str
    memory: int
    refresh: float
    step: float


@dataclass(frozen=True)
class Workload:
    """The batch that costs are stated for.

    Attributes:
        samples: ``N``.
        directions: Pulled-back vectors per sample ``K``.
        positions: Block name → shared positions ``T``; 1 where absent.
    """

    samples: int
    directions: int
    positions: Mapping[str, int] = field(default_factory=dict)
