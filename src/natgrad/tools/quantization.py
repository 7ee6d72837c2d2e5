r"""What rounding weights costs: ``½ δᵀFδ``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.operators import FisherMatrix
from natgrad.tools.parameters import values_of, weight_blocks, weight_names, weight_places


@dataclass(frozen=True)
class QuantizationError:
    """How much the loss rises when weights are rounded, to second order.

    Attributes:
        layers: Block name → ``½ δᵀFδ`` for rounding this block alone, in the units of the loss.
        total: The same for all of them together; the sum over layers, if F has no entries between
            them.
        rounded: Parameter name → rounded weights, for ``model.load_state_dict(..., strict=False)``.
    """

    layers: dict[str, float]
    total: float
    rounded: dict[str, Tensor]


def quantization_error(
    model: nn.Module,
    matrix: FisherMatrix,
    bits: int | Mapping[str, int],
    *,
    per_unit: bool = True,
) -> QuantizationError:
    """Return what rounding the weights of each layer to some bits costs.

    Weights go to the nearest multiple of ``max|w| / (2^(bits−1) − 1)``. Biases, the weights of
    norms and other parameters of one dimension stay as they are. The model is not changed.

    Args:
        model: The trained model.
        matrix: F of the training data, in any structure.
        bits: Bits per weight, at least 2: one number, or block name → number for the layers to
            round.
        per_unit: Whether every output unit (of a module without a formula every entry of a
            weight's first dimension) has its own maximum, default True, or the weight one.

    Raises:
        ValueError: If a number of bits is below 2, a layer unknown, or the parameters are not those
            of the matrix.

    Source: Dong et al., HAWQ-V2: Hessian aware trace-weighted quantization (2020), of which this is
    the quadratic form itself.

    Example:
        >>> error = natgrad.tools.quantization_error(model, F, bits=4)
        >>> worst = max(error.layers, key=error.layers.get)
    """
    blocks = weight_blocks(model, bits if isinstance(bits, Mapping) else None)
    numbers = bits if isinstance(bits, Mapping) else dict.fromkeys(blocks, bits)
    for name, number in numbers.items():
        check_integer(f"the number of bits of {name!r}", number, 2)
    layout = matrix.layout
    theta = layout.to_flat(values_of(layout, model)).detach().to(layout.dtype)
    errors = theta.new_zeros(layout.numel, len(blocks))
    for column, (name, block) in enumerate(blocks.items()):
        for where in weight_places(layout, block):
            weights = theta[where]
            dims = (-1,) if per_unit else (0, 1, 2)
            scale = weights.abs().amax(dims, keepdim=True) / (2 ** (int(numbers[name]) - 1) - 1)
            safe = torch.where(scale > 0, scale, 1.0)
            errors[where, column] = (weights / safe).round() * safe - weights
    products = matrix @ errors
    each = 0.5 * (errors * products).sum(0)
    total = 0.5 * float(torch.dot(errors.sum(1), products.sum(1)))
    changed = layout.to_dict(theta + errors.sum(1))
    names = {n for block in blocks.values() for n in weight_names(block)}
    rounded = {n: v.to(layout.dtypes[n]) for n, v in changed.items() if n in names}
    return QuantizationError(dict(zip(blocks, each.tolist(), strict=True)), total, rounded)
