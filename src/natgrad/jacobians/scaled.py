"""Rows that are damped in other units than their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from natgrad.jacobians.collection import Jacobians

if TYPE_CHECKING:
    from natgrad.jacobians.shares import Shares


class ScaledRows(Jacobians):
    r"""Rows that are damped in other units than their own.

    With ``T = diag(scales)`` and the gradient ``∇L = Jᵀu`` they are preconditioned by

    .. math:: J^\top (JJ^\top/count + \lambda T^{-2})^{-1} u
              = J^\top T (T JJ^\top T/count + \lambda I)^{-1} T u,

    the right side of which has a limit where a scale is 0. What a gradient holds beside ``Jᵀu``
    (penalties in the loss) is multiplied by the mean of the squared scales and solved for with
    ``JᵀT²J/count + λI``, which is the same where all scales are equal.

    Args:
        rows: The rows J, of the same blocks, samples and directions.
        scales: t ≥ 0, ``(N·K,)``.
        coordinates: u up to a common factor, ``(N·K,)``.
    """

    def __init__(self, rows: Jacobians, scales: Tensor, coordinates: Tensor) -> None:
        super().__init__(rows.layout, dict(rows), rows.samples, rows.directions)
        self.shares: Shares | None = rows.shares
        self.scales: Tensor = scales
        self.coordinates: Tensor = coordinates
