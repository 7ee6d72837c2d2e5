r"""Activation functions with the derivatives that the chain rule needs.

A network that propagates derivatives of second order needs, for every activation φ, the values
``φ(z), φ'(z), φ''(z)`` as functions that autograd can differentiate once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: What an activation module and its input z turn into ``(φ(z), φ'(z), φ''(z))`` with.
ActivationDerivatives = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]


class Sine(nn.Module):
    r"""The activation ``sin(ωz)``, for networks that represent waves.

    Args:
        frequency: ω.

    Source: Sitzmann et al., Implicit neural representations with periodic activation functions
    (2020).
    """

    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, z: Tensor) -> Tensor:
        """Return ``sin(ωz)``."""
        return torch.sin(self.frequency * z)

    def extra_repr(self) -> str:
        """Show the frequency."""
        return f"frequency={self.frequency}"


_DERIVATIVES: dict[type[nn.Module], ActivationDerivatives] = {}


def register_activation(module_type: type[nn.Module], derivatives: ActivationDerivatives) -> None:
    """Teach :class:`natgrad.TaylorNetwork` an elementwise activation of your own.

    Args:
        module_type: The module class; subclasses are not included.
        derivatives: ``derivatives(module, z)`` returning ``(φ(z), φ'(z), φ''(z))``, each in the
            shape of z and differentiable by autograd.

    Raises:
        TypeError: If ``module_type`` is not a subclass of :class:`torch.nn.Module`.

    Example:
        >>> register_activation(Square, lambda module, z: (z**2, 2 * z, torch.full_like(z, 2.0)))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    _DERIVATIVES[module_type] = derivatives


def activation_derivatives(module: nn.Module) -> ActivationDerivatives:
    """Return how a module's derivatives are computed; a TypeError if its type is not known."""
    found = _DERIVATIVES.get(type(module))
    if found is None:
        known = ", ".join(sorted(kind.__name__ for kind in _DERIVATIVES))
        raise TypeError(
            f"TaylorNetwork takes Linear layers and the activations {known}, got "
            f"{type(module).__name__}: describe it with natgrad.residuals.register_activation, or "
            "use jacobians='vmap', which takes any module"
        )
    return found


def _identity(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z, torch.ones_like(z), torch.zeros_like(z)


def _tanh(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(z)
    slope = 1 - h.square()
    return h, slope, -2 * h * slope


def _sine(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(module, Sine)
    omega = module.frequency
    h = torch.sin(omega * z)
    return h, omega * torch.cos(omega * z), -(omega**2) * h


def _sigmoid(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.sigmoid(z)
    slope = h * (1 - h)
    return h, slope, slope * (1 - 2 * h)


def _silu(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s, slope, bend = _sigmoid(module, z)
    return z * s, s + z * slope, 2 * slope + z * bend


def _softplus(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(module, nn.Softplus)
    beta = module.beta
    s, slope, _ = _sigmoid(module, beta * z)
    # Beyond its threshold PyTorch's softplus is the identity.
    linear = beta * z > module.threshold
    h = nn.functional.softplus(z, beta, module.threshold)
    return h, torch.where(linear, 1.0, s), torch.where(linear, 0.0, beta * slope)


def _gelu(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(module, nn.GELU)
    if module.approximate == "none":
        cumulative = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        return z * cumulative, cumulative + z * density, (2 - z.square()) * density
    # ½z(1 + tanh g) with g = √(2/π)(z + 0.044715z³), by the product rule.
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    inner = scale * (1 + 3 * cubic * z.square())
    first = (1 - t.square()) * inner
    second = (1 - t.square()) * (scale * 6 * cubic * z) - 2 * t * first * inner
    return 0.5 * z * (1 + t), 0.5 * (1 + t + z * first), first + 0.5 * z * second


register_activation(nn.Identity, _identity)
register_activation(nn.Tanh, _tanh)
register_activation(Sine, _sine)
register_activation(nn.Sigmoid, _sigmoid)
register_activation(nn.SiLU, _silu)
register_activation(nn.Softplus, _softplus)
register_activation(nn.GELU, _gelu)
