r"""Fisher-weighted averages of models: one network that does what several were trained for.

.. math:: \theta = \arg\min_\theta \sum_i w_i (\theta - \theta_i)^\top (F_i + \lambda I)
                   (\theta - \theta_i)

the mode of the product of the Laplace posteriors of the models. With λ → ∞ it is the plain average,
with diagonal matrices the entry-wise average with weights F_i.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from natgrad.arguments import check_damping
from natgrad.capture.model_output import unwrap
from natgrad.operators import FisherMatrix
from natgrad.optim import RelativeDamping
from natgrad.tools.linear_system import solved
from natgrad.tools.parameters import values_of

Model = TypeVar("Model", bound=nn.Module)


def merge(
    models: Sequence[Model],
    matrices: Sequence[FisherMatrix],
    weights: Sequence[float] | None = None,
    *,
    damping: float | RelativeDamping = RelativeDamping(0.1),  # noqa: B008
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Model:
    """Return a model with the Fisher-weighted average of the parameters of several.

    It solves ``Σ w_i(F_i + λI) θ = Σ w_i(F_i + λI) θ_i`` by conjugate gradients on products, scaled
    by the diagonal: with diagonal matrices that is exact at once, and no sum of different
    structures is ever formed.

    Args:
        models: Models of one architecture, usually trained on from the same parameters.
        matrices: The Fisher matrix of each on its own data, in any structures.
        weights: w_i ≥ 0, by default equal; numbers of data points give the posterior of all data.
        damping: λ, in the units of F; a :class:`natgrad.RelativeDamping`, by default a tenth,
            is a share of the mean eigenvalue of ``Σ w_i F_i / Σ w_i``.
        tolerance: Residual, relative to the right-hand side, at which the iteration ends.
        max_iterations: Most iterations; a warning says if they were too few.

    Returns:
        A copy of the first model with the merged parameters. Buffers of floating type, such as
        running statistics, are averaged with the weights alone; those of weight 0 do not count.

    Raises:
        ValueError: If numbers of models, matrices and weights differ, a weight is negative or not
            finite or all are zero, or parameters, buffers, shapes or frozen parameters differ.

    Source: Matena & Raffel, Merging models with Fisher-weighted averaging (2022), with diagonals;
    Tam, Bansal & Raffel, Merging by matching models in task parameter subspaces (2024), the linear
    system and its solution by conjugate gradients.

    Example:
        >>> both = natgrad.tools.merge([model_a, model_b], [F_a, F_b])
    """
    numbers = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if not models or len(models) != len(matrices) or len(models) != len(numbers):
        raise ValueError(
            "merge takes as many matrices, and weights if any, as models, at least 1: got "
            f"{len(models)} models, {len(matrices)} matrices and {len(numbers)} weights"
        )
    if not (min(numbers) >= 0 and 0 < sum(numbers) < math.inf):
        raise ValueError(f"weights must be at least 0, finite and not all of them 0, got {numbers}")
    shares = [w / sum(numbers) for w in numbers]
    models = [cast("Model", unwrap(model)) for model in models]
    layout = matrices[0].layout
    for matrix in matrices:
        if matrix.layout.shapes != layout.shapes:
            raise ValueError("the matrices must be about the same parameters of the same shapes")
    _check_rest(models, set(layout.names))
    flat = [layout.to_flat(values_of(layout, m)).detach().to(layout.dtype) for m in models]
    if isinstance(damping, RelativeDamping):
        traces = (w * float(f.trace()) for w, f in zip(shares, matrices, strict=True))
        shift = damping.share * max(0.0, sum(traces)) / max(1, layout.numel)
    else:
        check_damping(damping)
        shift = float(damping)

    def multiply(vector: Tensor) -> Tensor:
        products = (w * (f @ vector) for w, f in zip(shares, matrices, strict=True))
        return sum(products, shift * vector)

    mean = sum((w * x for w, x in zip(shares, flat, strict=True)), torch.zeros_like(flat[0]))
    right = sum(
        (w * (f @ (x - mean)) for w, f, x in zip(shares, matrices, flat, strict=True)),
        torch.zeros_like(mean),
    )
    diagonal = sum(
        (w * f.diagonal() for w, f in zip(shares, matrices, strict=True)),
        torch.full_like(mean, shift),
    )
    change = solved(multiply, right, diagonal, tolerance, max_iterations)
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        target = dict(merged.named_parameters())
        for name, value in layout.to_dict(mean + change).items():
            target[name].copy_(value)
        used = [model for model, share in zip(models, shares, strict=True) if share > 0]
        positive = [share for share in shares if share > 0]
        for name, buffer in merged.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(_mean([model.get_buffer(name) for model in used], positive))
    return merged


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return a weighted mean; entries all the same, infinite ones too, stay as they are."""
    each = torch.stack(list(values), -1)
    wide = each.to(torch.promote_types(each.dtype, torch.float32))
    mean = (wide @ wide.new_tensor(shares)).to(each.dtype)
    return torch.where((each == each[..., :1]).all(-1), each[..., 0], mean)


def _check_rest(models: Sequence[nn.Module], merged: set[str]) -> None:
    """Make sure that parameters that are not merged, and shapes of buffers, are all the same."""
    shapes = [{n: b.shape for n, b in model.named_buffers()} for model in models]
    for own in shapes[1:]:
        different = sorted(n for n in shapes[0].keys() | own if shapes[0].get(n) != own.get(n))
        if different:
            raise ValueError(
                f"the buffers {different} are not of the same shape in all models: merge models of "
                "one architecture"
            )
    first = dict(models[0].named_parameters())
    for model in models[1:]:
        for name, value in model.named_parameters():
            if name not in merged and not (name in first and torch.equal(value, first[name])):
                raise ValueError(
                    f"parameter {name!r} is in no Fisher matrix and differs between the models: "
                    "make it trainable before fisher_matrix, or the same in all models"
                )
