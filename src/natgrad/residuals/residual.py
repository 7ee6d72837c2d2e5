r"""Losses that are sums of squared residuals at points.

.. math:: L(\theta) = \sum_b \frac{w_b}{2 N_b} \sum_{n=1}^{N_b} \|r_b(\theta, x_{bn})\|^2, \qquad
          F = \sum_b \frac{w_b}{N_b} \sum_n J_{bn}^\top J_{bn}, \qquad
          J_{bn} = \frac{\partial r_b(\theta, x_{bn})}{\partial \theta}

Every part b of the problem (an equation, a boundary condition, data) is a :class:`Residual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: ``function(u, x)`` or ``function(u, x, data)``, for one point.
ResidualFunction = Callable[..., Tensor]


class Residual:
    r"""One part of a residual loss, ``w/(2N) Σ_n ‖r(u, x_n)‖²``.

    Args:
        function: ``function(u, x)`` for **one** point x ``(D,)``, returning the residual there, a
            scalar or a vector. u is the network as a function of one point, ``u(x)`` of shape
            ``(C,)``, to be differentiated by :mod:`torch.func` (``grad``, ``jacrev``, ``hessian``,
            ``jvp``). Where the model is a :class:`natgrad.TaylorNetwork`, u is the
            :class:`~natgrad.residuals.Taylor` of its value and derivatives at x instead, or in many
            dimensions what has the same fields but computes only those it is asked for. The
            function must be one that :func:`torch.func.vmap` can batch: no ``if`` on values.
        points: ``(N, D)``. N may be 0 in a process where others have points of the part.
        data: Given to the function as third argument, one entry per point, ``(N, ...)``: what is
            known there, such as a source or measured values.
        weight: w ≥ 0.

    Attributes:
        weight: May be changed between steps.

    Raises:
        ValueError: If points or data have wrong shapes or the weight is negative or not finite.

    Example:
        >>> def heat(u, x):
        ...     first = torch.func.jacrev(u)(x)
        ...     second = torch.func.hessian(u)(x)
        ...     return first[:, 1] - second[:, 0, 0]
        >>> residuals = {
        ...     "equation": natgrad.Residual(heat, points),
        ...     "start": natgrad.Residual(lambda u, x, y: u(x) - y, start, values, weight=10.0),
        ... }
    """

    def __init__(
        self,
        function: ResidualFunction,
        points: Tensor,
        data: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        self.function = function
        self.weight = weight
        self.replace(points, data)

    @property
    def weight(self) -> float:
        """The factor w of this part."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"weight must be a finite number >= 0, got {value}")
        self._weight = float(value)

    @property
    def points(self) -> Tensor:
        """Where the residual is taken, ``(N, D)``."""
        return self._points

    @property
    def data(self) -> Tensor | None:
        """What is known at the points, ``(N, ...)``."""
        return self._data

    def replace(self, points: Tensor, data: Tensor | None = None) -> None:
        """Take other points, as often as wanted (resampling between steps).

        Args:
            points: ``(N, D)``; N may change.
            data: ``(N, ...)``.

        Raises:
            ValueError: If the shapes are wrong.
        """
        if points.dim() != 2:
            raise ValueError(f"points must have shape (N, D), got {tuple(points.shape)}")
        if data is not None and (data.dim() == 0 or len(data) != len(points)):
            raise ValueError(
                f"data must have one entry for each of the {len(points)} points, got shape "
                f"{tuple(data.shape)}"
            )
        self._points, self._data = points.detach(), None if data is None else data.detach()

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self._points)

    def at(self, u: Any, point: Tensor, data: Tensor | None) -> Tensor:
        """Return the residual at one point, flat ``(R,)``.

        Raises:
            TypeError: If the function does not return a tensor.
        """
        value = self.function(u, point) if data is None else self.function(u, point, data)
        if not isinstance(value, Tensor):
            raise TypeError(f"a residual function must return a tensor, got {type(value).__name__}")
        return value.reshape(-1)

    def row_scale(self, points: int | None = None) -> float:
        """Return ``√(w/N)``: rows scaled by it sum to this part of F, residuals to the loss.

        Args:
            points: N of all processes; those here by default.
        """
        return math.sqrt(self.weight / (len(self) if points is None else points))

    def __repr__(self) -> str:
        """Show the function, the number of points and the weight."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Residual({name}, {len(self)} points, weight={self.weight:g})"


def as_residuals(residuals: Residual | Mapping[str, Residual]) -> dict[str, Residual]:
    """Return named parts; a lone one is called ``"residual"``. None, or others, are an error."""
    if not isinstance(residuals, (Residual, Mapping)):
        raise TypeError(
            "residuals must be a natgrad.Residual or a dict of them by name, got "
            f"{type(residuals).__name__}"
        )
    found = {"residual": residuals} if isinstance(residuals, Residual) else dict(residuals)
    for name, residual in found.items():
        if not isinstance(residual, Residual):
            raise TypeError(
                f"residuals must be natgrad.Residual objects by name, got "
                f"{type(residual).__name__} for {name!r}"
            )
    if not found:
        raise ValueError("residuals is empty: give at least one natgrad.Residual")
    return found
