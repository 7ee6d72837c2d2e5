r"""Condition 2 of fast convergence: how much does the Jacobian change along training?

See :mod:`natgrad.ntk.convergence` for what follows from it (Zhang, Martens & Grosse 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.ntk.conditions import identity_jacobians


@dataclass(frozen=True)
class StabilityMeasurement:
    """How far the Jacobian of a model has moved from where it was.

    Attributes:
        spectral_norm: ``‖J(w) − J(w₀)‖₂``.
        relative_change: ``‖J(w) − J(w₀)‖_F / ‖J(w₀)‖_F``.
        constant: ``C = 2δ/(1 − δ)`` with ``δ = ‖J(w) − J(w₀)‖₂ / √λ_min(G(w₀))``; infinite if
            ``δ ≥ 1`` or the Gram matrix is singular.
        distance: ``‖w − w₀‖`` over the trainable parameters.
        radius: ``3‖y − f(w₀)‖ / √λ_min(G(w₀))``, the distance within which condition 2 must hold;
            None without targets.
    """

    spectral_norm: float
    relative_change: float
    constant: float
    distance: float
    radius: float | None

    @property
    def stable(self) -> bool:
        """Whether ``C < ½``, as condition 2 asks, at the point of this measurement."""
        return self.constant < 0.5


class JacobianStability:
    r"""Measures condition 2: how much the Jacobian changes as a model is trained.

    The condition asks for ``C < ½`` everywhere within ``radius`` of the start, so a measurement at
    one point can refute it but not prove it. The change shrinks with the width ``m``: like
    ``m^(−1/2)`` for smooth activations, like ``m^(−1/4)`` for
    :class:`~natgrad.ntk.two_layer.TwoLayerNetwork`, where the share of ReLU units whose slope flips
    falls like ``m^(−1/2)`` and enters the squared norm.

    The Gram matrix of ``J − J₀`` comes from factored rows: those of a linear layer are
    ``δaᵀ − δ₀a₀ᵀ = (δ − δ₀)aᵀ + δ₀(a − a₀)ᵀ``, rows with twice as many positions, so that nothing
    large cancels and nothing of size rows × parameters is built.

    Args:
        model: Any module. It runs in its present mode and is left as it was; call ``model.eval()``
            first if it has dropout, which would change the Jacobian too.
        x: Its input: a tensor ``(N, ...)``, a tuple of arguments or a dict of keyword arguments.
        targets: Regression targets of the output's shape; needed for the radius.
        output: Picks the output tensor out of what the model returns.

    Attributes:
        smallest_eigenvalue: ``λ_min(G(w₀))``; 0 where the rank is not full.

    Raises:
        ValueError: If ``targets`` does not have the output's shape, a parameter cannot be covered,
            the Jacobian is zero, or, from :meth:`measure`, the model uses other layers than before.

    Example:
        >>> stability = JacobianStability(model, x, y)
        >>> train(model)
        >>> stability.measure().stable
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        targets: Tensor | None = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.model = model
        if isinstance(x, Tensor):
            x = x.detach().clone().requires_grad_(x.requires_grad)
        self._x = x
        self._output = output
        z, self._start = identity_jacobians(model, self._x, output)
        if targets is not None and targets.shape != z.shape:
            raise ValueError(
                f"targets must have the output's shape {tuple(z.shape)}, got {tuple(targets.shape)}"
            )
        gram = self._start.gram()
        values = torch.linalg.eigvalsh(gram.double())
        if not float(values[-1]) > 0.0:
            raise ValueError(
                "the Jacobian is zero on these inputs, so its change has no scale: check that the "
                "network is not dead"
            )
        threshold = len(values) * torch.finfo(gram.dtype).eps * values[-1]
        self.smallest_eigenvalue: float = float(values[0]) if values[0] > threshold else 0.0
        self._squared_norm = float(values.sum())
        self._residual = None if targets is None else float((z - targets).double().norm())
        self._parameters = self._flat_parameters()

    def measure(self) -> StabilityMeasurement:
        """Compare the Jacobian at the model's present parameters with the first one."""
        _, now = identity_jacobians(self.model, self._x, self._output)
        if set(now) != set(self._start):
            raise ValueError(
                "the model's output depends on other layers than when JacobianStability was made, "
                "so the Jacobians cannot be compared: make a new JacobianStability"
            )
        change = torch.zeros(now.rows, now.rows, dtype=torch.float64, device=now.layout.device)
        for name, block in now.items():
            change += _difference_gram(block, self._start[name])
        largest = max(0.0, float(torch.linalg.eigvalsh(change)[-1]))
        root = math.sqrt(self.smallest_eigenvalue)
        delta = math.sqrt(largest) / root if root > 0 else math.inf
        radius = None
        if self._residual is not None:
            radius = 3.0 * self._residual / root if root > 0 else math.inf
        return StabilityMeasurement(
            spectral_norm=math.sqrt(largest),
            relative_change=math.sqrt(max(0.0, float(change.trace())) / self._squared_norm),
            constant=2.0 * delta / (1.0 - delta) if delta < 1.0 else math.inf,
            distance=float((self._flat_parameters() - self._parameters).norm()),
            radius=radius,
        )

    def _flat_parameters(self) -> Tensor:
        leaves = [p.detach().flatten() for p in self.model.parameters() if p.requires_grad]
        return torch.cat(leaves).double()


def _difference_gram(now: LayerJacobian, start: LayerJacobian) -> Tensor:
    """Return ``(J − J₀)(J − J₀)ᵀ`` of one block, ``(N·K, N·K)``, float64."""
    if type(now) is LinearJacobian and type(start) is LinearJacobian:
        return _linear_difference(now, start).gram().double()
    result = torch.empty(now.rows, now.rows, dtype=torch.float64, device=now.device)
    k = now.directions
    for first, last in now.chunks():
        rows = _row_differences(now, start, first, last)
        for begin, end in now.chunks():
            if begin < first:
                continue
            columns = rows if begin == first else _row_differences(now, start, begin, end)
            block = rows @ columns.T
            result[first * k : last * k, begin * k : end * k] = block
            result[begin * k : end * k, first * k : last * k] = block.T
    return result


def _row_differences(now: LayerJacobian, start: LayerJacobian, first: int, last: int) -> Tensor:
    change = now.per_sample_gradients(first, last) - start.per_sample_gradients(first, last)
    return now.layout.flat(change).flatten(0, 1)


def _linear_difference(now: LinearJacobian, start: LinearJacobian) -> LinearJacobian:
    """Return rows ``δaᵀ − δ₀a₀ᵀ`` as ``(δ − δ₀)aᵀ + δ₀(a − a₀)ᵀ``, with the bias as an input."""
    now, start = now.augmented(), start.augmented()
    delta, delta0 = now.output_gradients, start.output_gradients
    return now.replaced(
        torch.cat([now.inputs, now.inputs - start.inputs], dim=1),
        torch.cat([delta - delta0, delta0], dim=2),
    )
