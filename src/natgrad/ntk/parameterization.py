"""Layers in NTK parameterisation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from natgrad.capture.kinds import register_kind
from natgrad.capture.linear import LinearKind

__all__ = ["NTKLinear"]


class NTKLinear(nn.Linear):
    r"""A linear layer ``y = (σ_w / √d_in) W x + σ_b b`` with ``W, b ~ N(0, 1)``.

    The scale of the layer sits outside its parameters, so that the size of their gradients, and
    the neural tangent kernel, converge as the width grows (Jacot et al. 2018).

    Args:
        in_features: ``d_in``.
        out_features: ``d_out``.
        bias: Whether there is a bias.
        weight_variance: ``σ_w²``; 2 keeps the scale of activations through ReLU layers.
        bias_variance: ``σ_b²``.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if weight_variance <= 0 or bias_variance < 0:
            raise ValueError(
                "weight_variance must be positive and bias_variance at least 0, got "
                f"{weight_variance} and {bias_variance}"
            )
        self.weight_scale = (weight_variance / in_features) ** 0.5
        self.bias_scale = bias_variance**0.5
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw weight and bias from the standard normal distribution."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.normal_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(σ_w / √d_in) W x + σ_b b``."""
        output = nn.functional.linear(input * self.weight_scale, self.weight)
        return output if self.bias is None else output + self.bias_scale * self.bias


class _NTKLinearKind(LinearKind):
    def scales(self, module: nn.Module) -> tuple[float, float]:
        layer = cast(NTKLinear, module)
        return layer.weight_scale, layer.bias_scale


register_kind(_NTKLinearKind(), NTKLinear)
