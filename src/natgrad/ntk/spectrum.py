r"""The eigenvalues of the Fisher matrix: measured, and predicted for random wide networks.

For the Gaussian likelihood with unit variance ``F = JᵀJ/N`` (the loss ``½‖f − y‖²``, mean over
samples) shares its non-zero eigenvalues with ``G/N``, ``G = JJᵀ``. In a wide random network ``G``
is nearly ``[(k₁ − k₂) I + k₂ 11ᵀ] ⊗ I_C``, with ``k₁`` the mean of its diagonal and ``k₂`` the mean
over pairs of samples, output by output. The eigenvalues of that matrix give, with ``P`` parameters,

.. math::
    m_\lambda = \frac{\operatorname{tr} F}{P} = \frac{C k_1}{P}, \qquad
    s_\lambda = \frac{\operatorname{tr} F^2}{P}
              = \frac{C}{P} \left( \frac{N-1}{N} k_2^2 + \frac{1}{N} k_1^2 \right), \qquad
    \lambda_{\max} = \frac{N-1}{N} k_2 + \frac{1}{N} k_1 \quad (C \text{ times}).

The first is exact. A fully connected network of width ``M``, with widths ``M_l = α_l M``, has
``P ≈ αM²`` parameters, ``α = Σ_{l=1}^{L−1} α_l α_{l−1}``. With ``k_i = αM κ_i`` the three become
``κ₁C/M``, ``α((N−1)/N κ₂² + κ₁²/N) C`` and ``α((N−1)/N κ₂ + κ₁/N) M``: a few eigenvalues grow with
the width while the mean vanishes. This holds in standard parameterisation, where the variance of
the weights, not a factor in front of them, falls with the width.

Source: Karakida, Akaho & Amari, Universal Statistics of Fisher Information in Deep Neural Networks
(2019); the form in ``k₁``, ``k₂`` and ``P`` needs no widths and serves any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.ntk.conditions import identity_jacobians
from natgrad.ntk.infinite import infinite_kernel
from natgrad.ntk.networks import Architecture


@dataclass(frozen=True)
class SpectrumPrediction:
    """Statistics of the Fisher spectrum that two numbers determine.

    Attributes:
        mean: ``m_λ``, the mean of all ``P`` eigenvalues.
        second_moment: ``s_λ``, the mean of their squares.
        largest: ``λ_max``, which occurs once per output. It is an average of eigenvalues, so the
            largest one measured is never below it.
    """

    mean: float
    second_moment: float
    largest: float

    @property
    def largest_step(self) -> float:
        """``2/λ_max``: gradient descent on the mean of ``½‖f − y‖²`` diverges above it."""
        return 2.0 / self.largest


@dataclass(frozen=True)
class FisherSpectrum:
    """The measured spectrum of the exact Gaussian Fisher matrix of a model.

    Attributes:
        samples: ``N``.
        outputs: Outputs per sample ``C``.
        parameters: Trainable parameters ``P``, the size of F.
        eigenvalues: Eigenvalues of ``G/N``, descending, ``(N·C,)``, float64. They are those of F,
            up to zeros.
        diagonal: ``k₁``, the mean diagonal entry of ``G = JJᵀ``.
        off_diagonal: ``k₂``, the mean of ``G`` over pairs of different samples at the same output;
            0 for one sample.
    """

    samples: int
    outputs: int
    parameters: int
    eigenvalues: Tensor
    diagonal: float
    off_diagonal: float

    @property
    def mean(self) -> float:
        """``m_λ = tr F / P``."""
        return float(self.eigenvalues.sum()) / self.parameters

    @property
    def second_moment(self) -> float:
        """``s_λ = tr F² / P``."""
        return float(self.eigenvalues.square().sum()) / self.parameters

    @property
    def largest(self) -> Tensor:
        """The ``C`` largest eigenvalues, descending, ``(C,)``."""
        return self.eigenvalues[: self.outputs]

    @property
    def largest_step(self) -> float:
        """``2/λ_max``: gradient descent on the mean of ``½‖f − y‖²`` diverges above it."""
        return 2.0 / float(self.eigenvalues[0])

    @property
    def prediction(self) -> SpectrumPrediction:
        """What ``k₁`` and ``k₂`` alone predict, to compare with the measured values."""
        return _predict(
            self.diagonal, self.off_diagonal, self.samples, self.outputs, self.parameters
        )

    def order_parameters(self, widths: Sequence[int]) -> tuple[float, float]:
        """Return ``(κ₁, κ₂) = (k₁, k₂)/(αM)`` of a fully connected network.

        Args:
            widths: Layer widths ``M_0`` (inputs) to ``M_{L−1}`` (last hidden layer).

        Raises:
            ValueError: As :func:`predict_spectrum`.
        """
        scale = _pair_sum(widths) / max(widths[1:])
        return self.diagonal / scale, self.off_diagonal / scale


def fisher_spectrum(
    model: nn.Module, x: Any, *, output: Callable[[Any], Tensor] | None = None
) -> FisherSpectrum:
    """Measure the spectrum of the exact Fisher matrix of a Gaussian likelihood.

    F itself is never formed: all comes from the Gram matrix of the Jacobian, ``(N·C, N·C)``.

    Args:
        model: Any module; it runs in its present mode and is left as it was.
        x: Its input: a tensor ``(N, ...)``, a tuple of arguments or a dict of keyword arguments.
        output: Picks the output tensor ``(N, ...)`` out of what the model returns.

    Raises:
        ValueError: If a parameter cannot be covered or the output depends on none.

    Example:
        >>> spectrum = fisher_spectrum(model, x)
        >>> spectrum.largest_step, spectrum.prediction.largest_step
    """
    _, jacobians = identity_jacobians(model, x, output)
    samples, outputs = jacobians.samples, jacobians.directions
    gram = jacobians.gram().double()
    values = torch.linalg.eigvalsh(gram).clamp(min=0.0).flip(0) / samples
    by_output = gram.reshape(samples, outputs, samples, outputs).diagonal(dim1=1, dim2=3)
    means = _entry_means(by_output.mean(-1))
    return FisherSpectrum(samples, outputs, jacobians.layout.numel, values, *means)


def predict_spectrum(
    kappa: tuple[float, float], widths: Sequence[int], samples: int, outputs: int
) -> SpectrumPrediction:
    """Return the statistics of a wide fully connected network from its order parameters.

    Args:
        kappa: ``(κ₁, κ₂)``: measured (:meth:`FisherSpectrum.order_parameters`), or those of
            infinite width, which depend on the activation, the variances of weights and biases, the
            inputs and the ratios of widths only.
        widths: Layer widths ``M_0`` (inputs) to ``M_{L−1}`` (last hidden layer). ``M`` is the
            largest hidden width, here and in ``kappa``. ``P`` is taken as ``αM²``, without biases
            and output weights.
        samples: ``N``.
        outputs: ``C``.

    Raises:
        ValueError: If there are fewer than two widths, or a number is not positive.
    """
    weights = _pair_sum(widths)
    check_integer("samples", samples)
    check_integer("outputs", outputs)
    scale = weights / max(widths[1:])
    return _predict(kappa[0] * scale, kappa[1] * scale, samples, outputs, weights)


def infinite_spectrum(architecture: Architecture | nn.Module, x: Tensor) -> SpectrumPrediction:
    r"""Predict the statistics of a random network in *standard* parameterisation, unseen.

    The dual matrix of that network tends to :math:`\sum_l (M_{l-1}/\sigma_{w,l}^2) \Theta_l` for
    the layer kernels :math:`\Theta_l` of NTK parameterisation, whose weights are larger by
    :math:`\sqrt{M_{l-1}}/\sigma_w` and whose gradients are smaller by as much.

    Args:
        architecture: A fully connected network without biases, as :func:`infinite_kernel` takes
            it; widths and variances are those of the network in standard parameterisation.
        x: Inputs, ``(N, …)``.

    Raises:
        ValueError: If the network has biases, or as :func:`infinite_kernel`.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.of(architecture)
    if any(architecture.bias_variances):
        raise ValueError(
            "the order parameters are known for networks without biases: set bias_variance to 0"
        )
    widths, variances = architecture.widths, architecture.weight_variances
    kernels = infinite_kernel(architecture, x).layers
    scales = [m / variance for m, variance in zip(widths[:-1], variances, strict=True)]
    dual = torch.stack([k * scale for k, scale in zip(kernels, scales, strict=True)]).sum(0)
    return _predict(*_entry_means(dual), len(dual), architecture.outputs, _pair_sum(widths))


def _entry_means(gram: Tensor) -> tuple[float, float]:
    """Return the mean entry on the diagonal and off it (0 without such)."""
    samples, trace = len(gram), float(gram.trace())
    pairs = samples * (samples - 1)
    return trace / samples, (float(gram.sum()) - trace) / pairs if pairs else 0.0


def _pair_sum(widths: Sequence[int]) -> int:
    """Return ``αM² = Σ_l M_l M_{l−1}``."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            "widths must hold the input dimension and every hidden width, all positive, got "
            f"{list(widths)}"
        )
    return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def _predict(
    diagonal: float, off_diagonal: float, samples: int, outputs: int, parameters: int
) -> SpectrumPrediction:
    share = 1.0 / samples
    second = (1.0 - share) * off_diagonal**2 + share * diagonal**2
    # The constant vector leads unless samples repel each other on average.
    outlier = (1.0 - share) * off_diagonal + share * diagonal
    return SpectrumPrediction(
        mean=outputs * diagonal / parameters,
        second_moment=outputs * second / parameters,
        largest=max(outlier, share * (diagonal - off_diagonal)),
    )
