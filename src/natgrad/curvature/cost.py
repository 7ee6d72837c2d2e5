"""What curvature costs, keeps and sends, and the batch that this is stated for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from natgrad.layouts import BlockLayout


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
        samples: ``N``, of all processes together.
        directions: Pulled-back vectors per sample ``K``.
        positions: Block name → shared positions ``T``; 1 where absent.
        processes: Processes that have an equal share of the samples each. Where there are several,
            gradients are preconditioned and never the rows that they sum to.
    """

    samples: int
    directions: int
    positions: Mapping[str, int] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class Elements:
    """How many numbers of a part are kept, and sent where processes share it.

    Scalars such as counts are left out.

    Attributes:
        statistics: Kept of sums, products, bases and moments.
        inverse: Kept of the inverse, without what it has in common with the statistics.
        sums: Added up over processes at an update of the curvature; of symmetric matrices the
            triangles.
        rows: Rows of the batch that each process sends at an update.
        handed_out: Sent after a factorisation by the process that made it.
    """

    statistics: int
    inverse: int
    sums: int
    rows: int
    handed_out: int

    @property
    def kept(self) -> int:
        """Kept between steps."""
        return self.statistics + self.inverse


def factored_elements(block: BlockLayout, samples: int, directions: int, positions: int) -> int:
    """Return the elements of a layer's factored rows: inputs (or indices) and gradients."""
    inputs = 1 if block.one_hot else max(1, block.d_in)
    return samples * positions * block.groups * (inputs + directions * block.d_out)
