r"""The layer-wise block-diagonal Fisher matrix.

.. math:: F_l = \frac{1}{count} J_l^\top J_l
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from natgrad.curvature.full import ExactRows
from natgrad.curvature.structure import register_structure


@register_structure
@dataclass(frozen=True)
class BlockDiagonal(ExactRows):
    """The exact block of every layer; nothing between layers.

    In wide networks its update is isotropic in function space with α = L (Karakida & Osawa 2020):
    with learning rate ``1/L`` it follows the same function-space dynamics as exact NGD.
    """

    name: ClassVar[str] = "block_diagonal"
