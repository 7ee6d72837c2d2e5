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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import undisturbed
from natgrad.capture.model_output import require_output, unwrap
from natgrad.likelihoods import Likelihood, as_likelihood


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
    data: tuple[Any, Tensor],
    update: Mapping[str, Tensor],
    likelihood: str | Likelihood | nn.Module = "categorical",
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> UpdateQuality:
    """Measure an update against the exact Fisher matrix of a batch, without forming it.

    It costs one gradient and two Jacobian-vector products.

    Args:
        model: The model, in its present mode; left as it was.
        data: A pair ``(inputs, targets)``; inputs may be a tensor, a tuple of positional arguments
            or a dict of keyword arguments.
        update: Parameter name → direction that a step subtracts, e.g. what
            ``fisher_matrix(...).solve(gradient)`` returns. Parameters left out stay as they are.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        output: Picks the tensor the likelihood looks at out of the model's output.

    Raises:
        ValueError: If a name or shape does not fit the model, or the update or the gradient is zero
            or not finite.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """
    model = unwrap(model)
    likelihood = as_likelihood(likelihood)
    inputs, target = data
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, value in update.items():
        if name not in parameters or value.shape != parameters[name].shape:
            raise ValueError(
                f"the update's entry {name!r} of shape {tuple(value.shape)} fits no trainable "
                "parameter of the model"
            )

    def outputs_at(values: dict[str, Tensor]) -> Tensor:
        by_name = isinstance(inputs, Mapping)
        arguments = ((), dict(inputs)) if by_name else (inputs,)
        return require_output(torch.func.functional_call(model, values, *arguments), output)

    with undisturbed(model):
        leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        found = outputs_at(leaves)
        loss = likelihood.loss(found, target)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradient = {
            n: torch.zeros_like(p) if g is None else g.detach()
            for (n, p), g in zip(parameters.items(), grads, strict=True)
        }
        root = likelihood.output_hessian_root(found.detach(), target)
        count = float(likelihood.count(found.detach(), target))

        def quadratic(direction: dict[str, Tensor]) -> float:
            _, change = torch.func.jvp(outputs_at, (parameters,), (direction,))  # type: ignore[misc]
            events = likelihood.split_events(change.detach()).to(root.dtype)
            return float((root.mT @ events.unsqueeze(-1)).square().sum()) / count

        direction = {
            n: update[n].detach().to(p) if n in update else torch.zeros_like(p)
            for n, p in parameters.items()
        }
        slope = float(sum((direction[n] * gradient[n]).sum() for n in parameters))
        square = float(sum(g.square().sum() for g in gradient.values()))
        size = float(sum(d.square().sum() for d in direction.values()))
        if not (0 < size < math.inf and 0 < square < math.inf):
            raise ValueError(
                "the update and the gradient must be finite and not zero, got squared norms "
                f"{size:.3g} and {square:.3g}"
            )
        return UpdateQuality(slope, quadratic(direction), math.sqrt(quadratic(gradient)) / square)
