r"""How good an update is, measured against the exact natural gradient.

For an update u (a direction to subtract from the parameters) and the exact Fisher matrix F of a
batch,

.. math:: \gamma(u) = \frac{\sqrt{u^\top F u}}{|u^\top \nabla L|}

does not depend on the length of u, and ``½/γ²`` is the largest decrease of the loss that the
quadratic model allows along u. The natural gradient ``F⁺∇L`` has the smallest γ there is, with
``γ² = 1/(∇Lᵀ F⁺ ∇L)`` (Wu et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.derivatives.passes import Passes, derivatives, pushed_forward
from natgrad.fisher import Batch
from natgrad.likelihoods import LikelihoodLike, as_likelihood
from natgrad.operators.linear_map import check_real


@dataclass(frozen=True)
class UpdateQuality:
    """The quality of one update.

    Attributes:
        slope: ``⟨u, ∇L⟩``; positive for a direction of descent.
        curvature: ``uᵀFu``.
        gradient_indicator: γ(∇L), that of the gradient itself.
    """

    slope: float
    curvature: float
    gradient_indicator: float

    @property
    def indicator(self) -> float:
        """γ(u), the smaller the better; infinite for an update that does not change the loss."""
        return math.sqrt(self.curvature) / abs(self.slope) if self.slope else math.inf

    @property
    def relative(self) -> float:
        """``γ(u)/γ(∇L)``: below 1 the update is better than the gradient."""
        return self.indicator / self.gradient_indicator

    @property
    def best_decrease(self) -> float:
        """``½/γ²``, the largest decrease of the loss along u in the quadratic model."""
        return 0.5 / self.indicator**2 if self.indicator else math.inf

    @property
    def best_step(self) -> float:
        """The length of the step along −u that brings it, ``⟨u, ∇L⟩/uᵀFu``."""
        return self.slope / self.curvature if self.curvature else math.inf


def update_quality(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    update: Mapping[str, Tensor],
    likelihood: LikelihoodLike = "categorical",
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> UpdateQuality:
    """Measure an update against the exact Fisher matrix of some data, without forming it.

    It costs one gradient and two Jacobian-vector products. Statistics of batch norms in train mode
    are functions of the parameters here, as in :func:`natgrad.gauss_newton_matrix`.

    Args:
        model: The model, in its present mode; left as it was.
        data: A pair ``(inputs, targets)`` or a re-iterable of such pairs; inputs may be a tensor, a
            tuple of positional arguments or a dict of keyword arguments.
        update: Parameter name → direction that a step subtracts, e.g. what
            ``fisher_matrix(...).solve(gradient)`` returns. Parameters left out stay as they are.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        output: Picks the tensor the likelihood looks at out of the model's output.

    Raises:
        TypeError: If the update is no mapping to tensors of real numbers.
        ValueError: If a name or shape does not fit the model, no target counts, a layer cannot be
            differentiated twice, or the update or the gradient is zero or not finite.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """
    passes = Passes.of(model, data, as_likelihood(likelihood), output)
    layout = passes.layout
    if not isinstance(update, Mapping):
        raise TypeError(
            f"update must be parameter name → direction, got {type(update).__name__}: a flat "
            "vector becomes one by the to_dict() of a Fisher matrix's layout"
        )
    check_real(update.values())
    for name, value in update.items():
        if layout.shapes.get(name) != tuple(value.shape):
            raise ValueError(
                f"the update's entry {name!r} of shape {tuple(value.shape)} fits no trainable "
                "parameter of the model"
            )
    direction = layout.to_column({name: value.detach() for name, value in update.items()})
    gradient, count = torch.zeros_like(direction), 0.0
    for one in passes:
        if one.count() > 0:
            loss = one.loss()
            gradient += derivatives(loss, passes, [torch.ones_like(loss)])[0].unsqueeze(1)
            count += one.count()
    if count == 0:
        raise ValueError("no target of the data counts, so there is no loss to change")
    gradient /= count
    size, square = float(direction.square().sum()), float(gradient.square().sum())
    if not (0 < size < math.inf and 0 < square < math.inf):
        raise ValueError(
            "the update and the gradient must be finite and not zero, got squared norms "
            f"{size:.3g} and {square:.3g}"
        )
    columns, forms = torch.cat([direction, gradient], 1), [0.0, 0.0]
    for one in passes:
        if one.likelihood is None or not one.count() > 0:
            continue
        root = one.likelihood.output_hessian_root(one.output.detach(), one.target)
        for index, moved in enumerate(pushed_forward(one.output, passes, columns)):
            events = one.likelihood.split_events(moved).to(root.dtype).unsqueeze(-1)
            forms[index] += float((root.mT @ events).square().sum()) / count
    slope = float((direction * gradient).sum())
    return UpdateQuality(slope, forms[0], math.sqrt(forms[1]) / square)
