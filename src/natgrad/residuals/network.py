"""A residual loss as a model whose output are the residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from natgrad.residuals.joint_points import JointPoints
from natgrad.residuals.residual import Residual, as_residuals
from natgrad.residuals.taylor import TaylorNetwork


class ResidualNetwork(nn.Module):
    r"""Turns a residual loss into regression to zero, for any optimizer.

    The output has one row per point, ``√(w_b Σ_a N_a / N_b) r_b(x_bn)``, padded with zeros where
    parts of the problem have fewer residuals per point than others. Half its mean squared norm
    over rows is the loss, so that to natgrad it is a Gaussian model with targets zero.

    Args:
        model: A :class:`natgrad.TaylorNetwork`.
        residuals: The parts by name, or one. Points and weights may be changed at any time.

    Raises:
        TypeError: If the model is something else.

    Example:
        >>> problem = natgrad.ResidualNetwork(natgrad.TaylorNetwork(network), residuals)
        >>> optimizer = natgrad.KFAC(problem, "gaussian")
        >>> loss = problem.loss()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, model: TaylorNetwork, residuals: Residual | Mapping[str, Residual]) -> None:
        super().__init__()
        if not isinstance(model, TaylorNetwork):
            raise TypeError(
                f"ResidualNetwork needs a natgrad.TaylorNetwork, got {type(model).__name__}: wrap "
                "the network in one, or use natgrad.ResidualNGD, which takes any module"
            )
        self.model = model
        self.residuals: dict[str, Residual] = as_residuals(residuals)

    def forward(
        self,
        chosen: Sequence[tuple[str, slice]] | None = None,
        joint: JointPoints | None = None,
    ) -> Tensor:
        """Return the scaled residuals, ``(Σ N_b, K)``.

        Args:
            chosen: Parts and which of their points, for a chunk of the output; all by default.
            joint: The points of all processes, which the N are of; those here by default.

        Raises:
            ValueError: If a part has no points.
        """
        if joint is None:
            joint = JointPoints.of({name: (len(one), 0) for name, one in self.residuals.items()})
        parts = [
            residual.row_scale(joint.counts[name]) * joint.total**0.5 * value
            for name, residual, value in self._pieces(chosen)
        ]
        width = max([joint.least_width, *(part.shape[1] for part in parts)])
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    def loss(self) -> Tensor:
        """Return ``Σ_b w_b/(2N_b) Σ_n ‖r_bn‖²``."""
        output: Tensor = self(None)
        return output.square().sum() / (2 * len(output))

    def values(self) -> dict[str, Tensor]:
        """Return the residuals as they are, part by part, ``(N_b, R_b)``."""
        return {name: value for name, _, value in self._pieces(None)}

    def _pieces(
        self, chosen: Sequence[tuple[str, slice]] | None
    ) -> list[tuple[str, Residual, Tensor]]:
        if chosen is None:
            chosen = [(name, slice(0, len(r))) for name, r in self.residuals.items()]
        parts = [(name, self.residuals[name], which) for name, which in chosen]
        stack = self.model(torch.cat([residual.points[which] for _, residual, which in parts]))
        stacks = stack.split([which.stop - which.start for *_, which in parts])
        return [
            (name, residual, self.values_of_stack(residual, piece, which))
            for (name, residual, which), piece in zip(parts, stacks, strict=True)
        ]

    def values_of_stack(self, residual: Residual, stack: Tensor, chosen: slice) -> Tensor:
        """Return the residuals of some points of a part, ``(n, R)``.

        The stack ``(n, T, C)`` is what the model returns at these points.
        """

        def at_point(stack: Tensor, point: Tensor, *data: Tensor) -> Tensor:
            return residual.at(self.model.split(stack), point, *(data or (None,)))

        data = () if residual.data is None else (residual.data[chosen],)
        return vmap(at_point)(stack, residual.points[chosen], *data)
