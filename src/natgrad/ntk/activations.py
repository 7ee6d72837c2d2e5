r"""Gaussian expectations of activation functions: the steps of infinite-width kernels.

For ``(u, v) ~ N(0, [[q, c], [c, q']])`` every activation φ gives ``E[φ(u)φ(v)]`` and
``E[φ'(u)φ'(v)]``, in closed form (Williams 1997 for erf; Cho & Saul 2009 for ReLU; Tsuchida et al.
2021 for GELU) or, for smooth functions without one, by Mehler's expansion

.. math:: E[φ(u)φ(v)] = \sum_k a_k(q) a_k(q') ρ^k, \qquad a_k(q) = E[φ(\sqrt q z) h_k(z)],

with ``ρ = c/√(qq')`` and the normalised Hermite polynomials ``h_k``. Coefficients are
one-dimensional integrals, one per sample, not one per pair.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.ntk.hermite import hermite_series, mehler_sum, second_moments


class Erf(nn.Module):
    """The error function ``erf(x)``, elementwise."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``erf(input)``, of the same shape."""
        return torch.erf(input)


class Activation(ABC):
    """An elementwise function φ and its Gaussian expectations.

    Arguments of all methods are float64 tensors: variances ``q1`` (N,) and ``q2`` (N',), all
    positive, and covariances ``c`` (N, N'). Values of ``|c|`` above ``√(q q')``, as rounding leaves
    them, count as equal to it.

    Attributes:
        name: The name of the function.
        active_fraction: The share of centred Gaussian inputs with a non-zero slope: 0.5 for ReLU.
    """

    name: str
    active_fraction: ClassVar[float] = 1.0

    @abstractmethod
    def module(self) -> nn.Module:
        """Return a new module that computes φ."""

    @abstractmethod
    def covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ(u_i)φ(v_j)]``, (N, N')."""

    @abstractmethod
    def derivative_covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ'(u_i)φ'(v_j)]``, (N, N')."""

    @abstractmethod
    def variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ(u)²]`` for ``u ~ N(0, q)``, (N,)."""

    @abstractmethod
    def derivative_variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ'(u)²]`` for ``u ~ N(0, q)``, (N,)."""

    def error(self, q1: Tensor, q2: Tensor, input_error: float = 0.0) -> tuple[float, float]:
        """Bound the absolute errors of ``covariance`` and ``derivative_covariance``.

        ``input_error`` bounds that of ``c`` itself. Closed forms are exact up to rounding.
        """
        return 0.0, 0.0


class ClosedFormActivation(Activation):
    """An activation with closed forms, which subclasses give entry by entry, and a module."""

    make_module: ClassVar[Callable[[], nn.Module]]

    def module(self) -> nn.Module:
        """Return a new module that computes φ."""
        return type(self).make_module()

    @abstractmethod
    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ(u)φ(v)]`` for variances and covariances that broadcast."""

    @abstractmethod
    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ'(u)φ'(v)]`` for variances and covariances that broadcast."""

    def covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ(u_i)φ(v_j)]``, (N, N')."""
        return self._expectation(q1.unsqueeze(1), q2, c)

    def derivative_covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ'(u_i)φ'(v_j)]``, (N, N')."""
        return self._slope_expectation(q1.unsqueeze(1), q2, c)

    def variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ(u)²]``, which is ``E[φ(u)φ(v)]`` for equal ``u`` and ``v``, (N,)."""
        return self._expectation(q, q, q)

    def derivative_variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ'(u)²]``, (N,)."""
        return self._slope_expectation(q, q, q)


@dataclass(frozen=True)
class ReLUActivation(ClosedFormActivation):
    """``max(x, 0)``; arc-cosine kernels of orders 1 and 0 (Cho & Saul 2009)."""

    name = "relu"
    make_module = nn.ReLU
    active_fraction: ClassVar[float] = 0.5

    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``√(qq')/2π · (√(1−ρ²) + ρ(π − arccos ρ))``."""
        rho = _correlation(q1, q2, c)
        result = (math.pi - rho.arccos()).mul_(rho)
        # As a product, which keeps its digits where ρ is close to 1.
        result += ((1 - rho) * (1 + rho)).sqrt_()
        return result.mul_((q1 / (2 * math.pi)).sqrt()).mul_((q2 / (2 * math.pi)).sqrt())

    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``(π − arccos ρ)/2π``."""
        angle = _correlation(q1, q2, c).arccos_()
        return angle.div_(-2 * math.pi).add_(0.5)


@dataclass(frozen=True)
class LeakyReLUActivation(ClosedFormActivation):
    """``x`` where positive, ``slope · x`` elsewhere.

    Attributes:
        slope: The slope of negative inputs; default 0.01, as in torch.

    Raises:
        ValueError: If the slope is zero or not finite.
    """

    slope: float = 0.01
    name = "leaky_relu"

    def __post_init__(self) -> None:
        if not math.isfinite(self.slope) or self.slope == 0:
            raise ValueError(
                f"the slope of a leaky ReLU must be finite and not zero, got {self.slope}; "
                "for slope 0 use ReLUActivation"
            )

    def module(self) -> nn.Module:
        """Return ``nn.LeakyReLU(slope)``."""
        return nn.LeakyReLU(self.slope)

    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``a c + (1 − a)² K`` with ReLU's ``K`` and the slope ``a``."""
        relu = ReLUActivation()._expectation(q1, q2, c)
        return relu.mul_((1 - self.slope) ** 2).add_(c, alpha=self.slope)

    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``a + (1 − a)² K'`` with ReLU's ``K'`` and the slope ``a``."""
        relu = ReLUActivation()._slope_expectation(q1, q2, c)
        return relu.mul_((1 - self.slope) ** 2).add_(self.slope)


@dataclass(frozen=True)
class ErfActivation(ClosedFormActivation):
    """The error function (Williams 1997)."""

    name = "erf"
    make_module = Erf

    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``2/π · arcsin(2c/√((1+2q)(1+2q')))``."""
        result = (2 * c * (1 + 2 * q1).rsqrt()).mul_((1 + 2 * q2).rsqrt())
        return result.clamp_(-1, 1).arcsin_().mul_(2 / math.pi)

    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``4/π /√((1+2q)(1+2q') − 4c²)``."""
        result = (1 + 2 * q1) * (1 + 2 * q2)
        result.addcmul_(c, c, value=-4)
        # By Cauchy and Schwarz the difference is at least 1, whatever rounding makes of it.
        return result.clamp_(min=1.0).rsqrt_().mul_(4 / math.pi)

    def derivative_variance(self, q: Tensor) -> Tensor:
        """Return ``4/π /√(1+4q)``, in which nothing cancels, (N,)."""
        return (1 + 4 * q).rsqrt() * (4 / math.pi)


@dataclass(frozen=True)
class GELUActivation(ClosedFormActivation):
    """``x Φ(x)`` with the normal distribution function Φ, not the tanh approximation."""

    name = "gelu"
    make_module = nn.GELU

    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return the closed form of Tsuchida et al. (2021).

        With ``P = (1+q)(1+q')``, ``D = P − c²`` and ``κ = 1/(1+q) + 1/(1+q') − 1`` it is
        ``(qq' + c²κ)/(2π√D) + c/4 + c·arcsin(c/√P)/2π``.
        """
        _, numerator, difference, angle = self._parts(q1, q2, c)
        result = numerator.mul_(difference.rsqrt_()).add_(angle.mul_(c))
        return result.div_(2 * math.pi).add_(c, alpha=0.25)

    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return the derivative of the expectation by ``c`` (Price's theorem).

        It is ``1/4 + arcsin(c/√P)/2π + c (2κ + 1 + (qq' + c²κ)/D)/(2π√D)``.
        """
        kappa, numerator, difference, angle = self._parts(q1, q2, c)
        result = numerator.div_(difference).add_(kappa, alpha=2).add_(1).mul_(c)
        result.mul_(difference.rsqrt_()).add_(angle)
        return result.div_(2 * math.pi).add_(0.25)

    @staticmethod
    def _parts(q1: Tensor, q2: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return κ, ``qq' + c²κ``, D and ``arcsin(c/√P)``, broadcast."""
        kappa = 1 / (1 + q1) + (1 / (1 + q2) - 1)
        numerator = (c * c).mul_(kappa).add_(q1 * q2)
        product = (1 + q1) * (1 + q2)
        angle = (c / product.sqrt()).clamp_(-1, 1).arcsin_()
        # D is at least 1 + q + q' for any covariance.
        return kappa, numerator, product.addcmul_(c, c, value=-1).clamp_(min=1.0), angle


@dataclass(frozen=True)
class LinearActivation(ClosedFormActivation):
    """The identity: a deep linear network."""

    name = "linear"
    make_module = nn.Identity

    def _expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        return c.clone()

    def _slope_expectation(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        return torch.ones_like(c)


@dataclass(frozen=True)
class QuadratureActivation(Activation):
    r"""Any smooth activation, by Mehler's expansion.

    The series is cut after ``K`` powers of ρ, the first ``K`` whose tail
    ``t = E[φ²] − Σ_{k≤K} a_k²`` is below 1e-12 of ``E[φ²]`` for every sample, or ``max_terms``. By
    Cauchy and Schwarz what is left out is at most ``√(t_i t_j) |ρ|^{K+1}``; ``error`` states this
    bound, at ``|ρ| = 1``, with allowances for the quadrature of the coefficients and for rounding.
    Kinks make the coefficients decay slowly: functions like ReLU need closed forms.

    Attributes:
        name: The name of the function.
        function: φ, elementwise on tensors.
        derivative: φ', elementwise on tensors.
        make_module: Makes the module that computes φ.
        max_terms: The most powers of ρ; default 400.

    Raises:
        ValueError: If ``max_terms`` is below 1.
    """

    name: str
    function: Callable[[Tensor], Tensor] = field(repr=False)
    derivative: Callable[[Tensor], Tensor] = field(repr=False)
    make_module: Callable[[], nn.Module] = field(repr=False)
    max_terms: int = 400

    def __post_init__(self) -> None:
        check_integer("max_terms", self.max_terms)

    def module(self) -> nn.Module:
        """Return a module made by ``make_module``."""
        return self.make_module()

    def covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ(u_i)φ(v_j)]`` by the series, (N, N')."""
        return self._expand(self.function, q1, q2, c)

    def derivative_covariance(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Return ``E[φ'(u_i)φ'(v_j)]`` by the series, (N, N')."""
        return self._expand(self.derivative, q1, q2, c)

    def variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ(u)²]`` by one-dimensional quadrature, (N,)."""
        return second_moments(self.function, q)

    def derivative_variance(self, q: Tensor) -> Tensor:
        """Return ``E[φ'(u)²]`` by one-dimensional quadrature, (N,)."""
        return second_moments(self.derivative, q)

    def error(self, q1: Tensor, q2: Tensor, input_error: float = 0.0) -> tuple[float, float]:
        """Bound the absolute errors of both series; see the class.

        The error of ``c`` is carried on with the largest slopes, ``E[φ'²]`` and ``E[φ''²]``, by
        Price's theorem.
        """
        bounds = []
        for function in (self.function, self.derivative):
            sides = []
            for series in hermite_series(function, q1, q2, self.max_terms):
                # The q-th part of Σ k a_k² is the second moment of the function's derivative.
                powers = torch.arange(series.coefficients.shape[0], device=q1.device)
                slope = (series.coefficients**2 * powers.unsqueeze(1)).sum(0) / series.variances
                sides.append([float(values.max()) for values in (series.error, slope)])
            (error1, slope1), (error2, slope2) = sides
            bounds.append(math.sqrt(error1 * error2) + input_error * math.sqrt(slope1 * slope2))
        return bounds[0], bounds[1]

    def _expand(
        self, function: Callable[[Tensor], Tensor], q1: Tensor, q2: Tensor, c: Tensor
    ) -> Tensor:
        first, second = hermite_series(function, q1, q2, self.max_terms)
        return mehler_sum(first, second, _correlation(q1.unsqueeze(1), q2, c))


def _correlation(q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
    """Return ρ in [−1, 1]; ±1 where it differs from that by rounding only.

    Slopes of ReLU change like ``√(1 − ρ)``, so that equal inputs would get slopes some 1e-9 off,
    and their kernel matrix a false rank.
    """
    rho = (c * q1.rsqrt()).mul_(q2.rsqrt()).clamp_(-1, 1)
    return torch.where(rho.abs() > 1 - 64 * torch.finfo(rho.dtype).eps, rho.sign(), rho)


def _tanh_slope(x: Tensor) -> Tensor:
    # Not 1 − tanh², which loses the digits of small slopes.
    return torch.cosh(x.clamp(-300, 300)) ** -2


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


#: The activations known by name.
ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        ReLUActivation(),
        LeakyReLUActivation(),
        ErfActivation(),
        GELUActivation(),
        LinearActivation(),
        QuadratureActivation("tanh", torch.tanh, _tanh_slope, nn.Tanh),
        QuadratureActivation("silu", nn.functional.silu, _silu_slope, nn.SiLU),
    )
}


def as_activation(activation: str | Activation) -> Activation:
    """Return an activation by name; an ``Activation`` is returned as it is."""
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation must be a name or an Activation, got {type(activation).__name__}; "
            f"names: {', '.join(ACTIVATIONS)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module computes, or None if it is not a known one.

    Known are ``nn.ReLU``, ``nn.LeakyReLU``, ``nn.GELU`` with ``approximate="none"``, ``nn.Tanh``,
    ``nn.SiLU``, ``nn.Identity`` and ``Erf``; subclasses are not.
    """
    kind = type(module)
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        slope = module.negative_slope
        return LeakyReLUActivation(slope) if slope else ReLUActivation()
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    names: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.GELU: "gelu",
        nn.Tanh: "tanh",
        nn.SiLU: "silu",
        nn.Identity: "linear",
        Erf: "erf",
    }
    return ACTIVATIONS[names[kind]] if kind in names else None
