r"""The quadratic model of the loss with the Fisher matrix of the present batch.

.. math:: M(\delta) = \tfrac12 \delta^\top (F + D) \delta + \langle g, \delta \rangle

D is the damping, a diagonal matrix that is constant on every parameter group. F is never formed:
what the model says about a few directions ``V`` follows from the products ``JV`` with the rows of
the batch. Source: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
curvature (2015), sections 6.4 and 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed import Replicas
from natgrad.distributed.shards import whole
from natgrad.fisher import RowReceiver
from natgrad.jacobians import Jacobians
from natgrad.jacobians.collection import in_type
from natgrad.layouts import ParameterLayout, inner_product

#: Two directions count as one if the squared sine of their angle, in the metric of the model, is
#: less than this.
LEAST_ANGLE = 1e-6

Matrix = list[list[float]]


class BatchFisher:
    """The Fisher matrix of one batch, kept as its factored rows.

    Args:
        layout: Order of all trainable parameters.
        exactly: Whether samples that a layer couples are pulled back one by one, as their own rows
            are had in no other way. Otherwise such a layer adds the square of its summed row, what
            it adds on average for vectors of random signs, but for products with other layers.
    """

    def __init__(self, layout: ParameterLayout, exactly: bool = True) -> None:
        self.layout = layout
        self.additive: bool = not exactly
        self.by_layer: bool = self.additive
        self._rows: list[tuple[int, Jacobians]] = []
        self._passes = 0
        self._count: Tensor | float = 0.0

    def observe(
        self, jacobians: Jacobians, count: Tensor | float, *, continued: bool = False
    ) -> None:
        """Keep rows; see :meth:`natgrad.curvature.Curvature.observe`."""
        if not continued:
            self._count, self._passes = self._count + count, self._passes + 1
        self._rows.append((self._passes, in_type(jacobians, self.layout.dtype)))

    def pass_over(self) -> None:
        """Note a pass without rows, of which other processes have some."""
        self._passes += 1

    def sums(self, directions: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Return what processes add up to have ``VᵀFV`` of the batch of all.

        Args:
            directions: k directions, parameter name → tensor; zero where a name is missing.

        Returns:
            "gram", what the rows of samples add to ``count · VᵀFV``, ``(k, k)``; "count"; and
            "products", ``J V``, ``(k, K)``, for every row that is a sum over samples, by pass and
            block, of which the same holds. All in float64.
        """
        size, device = len(directions), self.layout.device
        gram, products = torch.zeros(size, size, dtype=torch.float64, device=device), {}
        chunks: Counter[int] = Counter()
        for number, rows in self._rows:
            alone = []
            for name, block in rows.items():
                if not block.summed:
                    alone.append(name)
                    continue
                own = rows.of_blocks([name], rows.layout)
                own.samples, own.directions = block.samples, block.directions
                products[f"{number} {chunks[number]} {name}"] = _products(own, directions)
            chunks[number] += 1
            found = _products(rows.of_blocks(alone, rows.layout), directions)
            gram += found @ found.T
        count = torch.as_tensor(self._count, dtype=torch.float64, device=device)
        return {"gram": gram, "count": count, "products": products}


def _products(rows: Jacobians, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return ``J V``, ``(k, N·K)`` in float64, layer by layer: V is in no single matrix."""
    found = []
    for direction in directions:
        total = rows.layout.zeros(rows.rows)
        for block in rows.values():
            pieces = [
                direction[n].reshape(-1).to(total.dtype)
                if n in direction
                else total.new_zeros(size)
                for n, size in zip(block.layout.names, block.layout.sizes, strict=True)
            ]
            total = total + block.matvec(torch.cat(pieces).unsqueeze(1))[:, 0]
        found.append(total.double())
    return torch.stack(found)


def fisher_gram(
    batch: BatchFisher | None, directions: Sequence[dict[str, Tensor]], replicas: Replicas
) -> Tensor:
    """Return ``VᵀFV`` of k directions for the batch of all processes, ``(k, k)`` in float64.

    It is 0 for no rows; the share of a process is None if none of its samples counts.
    """
    directions = [{n: whole(value) for n, value in one.items()} for one in directions]
    size, device = len(directions), next(iter(directions[0].values())).device
    zeros = torch.zeros(size, size, dtype=torch.float64, device=device)
    own: dict[str, Any] = {"gram": zeros, "count": zeros[0, 0], "products": {}}
    found = replicas.summed(own if batch is None else batch.sums(directions), device)
    total: Tensor = found["gram"]
    count: Tensor = found["count"]
    for products in found["products"].values():
        total = total + products @ products.T
    return total / torch.where(count > 0, count, 1.0)


class RowReceivers:
    """Hands rows to two receivers.

    Args:
        first: The one.
        second: The other.

    Attributes:
        additive: Whether rows may come in chunks: only if both are content with that.
        by_layer: Whether neither multiplies rows of different layers.
    """

    def __init__(self, first: RowReceiver, second: RowReceiver) -> None:
        self.receivers = first, second
        self.additive: bool = first.additive and second.additive
        self.by_layer: bool = first.by_layer and second.by_layer

    def observe(
        self, jacobians: Jacobians, count: Tensor | float, *, continued: bool = False
    ) -> None:
        """Hand rows on."""
        for one in self.receivers:
            one.observe(jacobians, count, continued=continued)


def group_grams(directions: Sequence[dict[str, Tensor]], groups: Sequence[Sequence[str]]) -> Tensor:
    """Return every group's ``VᵀV``, ``(G, k, k)`` in float64, zero where a name is missing."""
    size = len(directions)
    device = next((v.device for direction in directions for v in direction.values()), None)
    result = torch.zeros(len(groups), size, size, dtype=torch.float64, device=device)
    for group, names in enumerate(groups):
        for i, left in enumerate(directions):
            for j, right in enumerate(directions[: i + 1]):
                shared = {n: left[n] for n in names if n in left and n in right}
                if shared:
                    result[group, i, j] = result[group, j, i] = inner_product(shared, right)
    return result


def slopes(directions: Sequence[dict[str, Tensor]], gradient: dict[str, Tensor]) -> Tensor:
    """Return ``Vᵀg``, ``(k,)`` in float64; see :func:`inner_product`."""
    return torch.stack([inner_product(direction, gradient).double() for direction in directions])


def quadratic_form(coefficients: Sequence[float], matrix: Matrix) -> float:
    """Return ``cᵀAc``."""
    return sum(
        left * entry * right
        for left, row in zip(coefficients, matrix, strict=True)
        for right, entry in zip(coefficients, row, strict=True)
    )


@dataclass(frozen=True)
class QuadraticModel:
    """The model on the span of one or two directions, ``δ = Σ_i c_i v_i``.

    Attributes:
        fisher: ``VᵀFV``.
        damping: ``VᵀDV``.
        slopes: ``Vᵀg``.
    """

    fisher: Matrix
    damping: Matrix
    slopes: list[float]

    def value(self, coefficients: Sequence[float]) -> float:
        """Return ``M(δ) − M(0)``."""
        square = quadratic_form(coefficients, self.fisher)
        square += quadratic_form(coefficients, self.damping)
        return 0.5 * square + sum(c * b for c, b in zip(coefficients, self.slopes, strict=True))

    def minimiser(self) -> list[float] | None:
        """Return the coefficients with the least M.

        Of two directions that are nearly the same in the metric of the model only the first is
        used. None if the model has no minimum below ``M(0)``, or is not finite.
        """
        a = [
            [f + d for f, d in zip(*rows, strict=True)]
            for rows in zip(self.fisher, self.damping, strict=True)
        ]
        b = self.slopes
        found = [0.0] * len(b)
        if not a[0][0] > 0:
            return None
        if len(b) == 2 and a[1][1] > 0:
            determinant = a[0][0] * a[1][1] - a[0][1] * a[1][0]
            if determinant > LEAST_ANGLE * a[0][0] * a[1][1]:
                found[0] = (a[0][1] * b[1] - a[1][1] * b[0]) / determinant
                found[1] = (a[1][0] * b[0] - a[0][0] * b[1]) / determinant
        if not any(found):
            found[0] = -b[0] / a[0][0]
        return found if -float("inf") < self.value(found) < 0 else None
