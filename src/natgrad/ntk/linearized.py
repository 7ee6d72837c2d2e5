"""A finite network, linearised at its present parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import output_rows
from natgrad.curvature import Curvature, as_structure
from natgrad.jacobians import Jacobians
from natgrad.likelihoods import Likelihood
from natgrad.ntk.coefficients import cast_inputs
from natgrad.ntk.dynamics import NetworkInFunctionSpace


class LinearizedNetwork(NetworkInFunctionSpace):
    """The first-order Taylor expansion of a model in its parameters.

    It trains as a network of infinite width with this model's tangent kernel would: Jacobian rows
    stay what they are. Every structure of the Fisher matrix has its maps, from the same code that
    optimizers use.

    Args:
        model: Any model natgrad can capture, in its present mode; left as it was.
        x: N training inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        x_test: N' further inputs, or None.
        output: Picks the tensor the likelihood looks at out of the model's output.
        dtype: Precision; a copy of the model is made in it.
        structure_options: Structure name → its options, e.g. ``{"kfac": {"weight_sharing":
            "reduce"}}``.

    Raises:
        ValueError: If a parameter cannot be covered.

    Example:
        >>> network = natgrad.ntk.LinearizedNetwork(model, x, x_test)
        >>> curve = natgrad.ntk.predict(network, y, "block_diagonal", lr=1 / 3, steps=20)
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        x_test: Any = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        structure_options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        model = copy.deepcopy(model).to(dtype)
        self._options = structure_options or {}
        with Capture(model, output) as capture:
            capture.check_covered()
            self._blocks = {name: block.layout for name, block in capture.blocks.items()}
            self._layout = capture.layout
            self.outputs: Tensor
            self.outputs, self._rows = output_rows(capture, cast_inputs(x, dtype))
            self.test_outputs: Tensor | None = None
            self._test_rows: Jacobians | None = None
            if x_test is not None:
                self.test_outputs, self._test_rows = output_rows(
                    capture, cast_inputs(x_test, dtype)
                )

    def layer_kernels(self) -> dict[str, Tensor]:
        """Return block name → ``J_l J_lᵀ``, ``(N·C, N·C)``, without a factor 1/N."""
        return {name: block.gram() for name, block in self._rows.items()}

    def maps(self, structure: str, damping: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Return K and K'; see :meth:`NetworkInFunctionSpace.maps`."""
        if structure == "gd":
            train = self._rows.gram() / self.samples
            if self._test_rows is None:
                return train, None
            return train, self._test_rows.gram(self._rows) / self.samples
        curvature = self._curvature(structure)
        curvature.update(self._rows, self.samples)
        matrix = curvature.matrix()
        shares = matrix.function_space_map(self._rows, None, damping)
        train = _sum(shares) / self.samples
        train = 0.5 * (train + train.T)
        if self._test_rows is None:
            return train, None
        shares = matrix.function_space_map(self._rows, self._test_rows, damping)
        return train, _sum(shares) / self.samples

    def change(
        self,
        structure: str,
        damping: float,
        likelihood: Likelihood,
        outputs: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs' change; see :meth:`NetworkInFunctionSpace.change`."""
        count = float(likelihood.count(outputs, target))
        gradient = likelihood.gradient(outputs, target) / count
        direction = self._rows.rmatvec(gradient.flatten(1))
        if structure != "gd":
            roots = likelihood.root_vectors(outputs, target).flatten(2)  # (K, N, C)
            curvature = self._curvature(structure)
            curvature.update(self._rows.combined(roots.permute(1, 2, 0)), count)
            direction = curvature.matrix().solve(direction, damping)
        change = -self._rows.matvec(direction).reshape(outputs.shape)
        if self._test_rows is None or self.test_outputs is None:
            return change, None
        return change, -self._test_rows.matvec(direction).reshape(self.test_outputs.shape)

    def _curvature(self, name: str) -> Curvature:
        options = self._options.get(name, {})
        structure = as_structure(name, training=True, every_row=True, **options)
        return Curvature(structure, self._blocks, self._layout)


def _sum(shares: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(shares.values())).sum(0)
