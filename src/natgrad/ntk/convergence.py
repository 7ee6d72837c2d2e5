r"""Step sizes with a guarantee, linear rates, and a bound on generalisation.

Loss ``½‖f − y‖²`` per sample, mean over ``N`` samples; residual ``r = f − y``; Gram matrix
``G = JJᵀ`` without ``1/N``. Two conditions make exact natural gradient descent converge linearly
(Zhang, Martens & Grosse 2019): ``J`` has full row rank at the start
(:func:`~natgrad.ntk.conditions.jacobian_conditions`), and it changes little within the distance the
parameters travel (:class:`~natgrad.ntk.stability.JacobianStability`).

**Why they suffice.** Let ``λ = λ_min(G(w₀))`` and suppose ``‖J(w) − J(w₀)‖₂ ≤ δ√λ`` in the ball
``‖w − w₀‖ ≤ 3‖r₀‖/√λ``. One step changes the residual by ``−η J̄ J_k⁺ r_k`` with ``J̄`` the mean
Jacobian on the segment, and ``J̄ J_k⁺ = I + (J̄ − J_k) J_k⁺``. Here ``‖J̄ − J_k‖ ≤ 2δ√λ`` and
``‖J_k⁺‖ ≤ 1/((1 − δ)√λ)``, so the second term is at most ``C = 2δ/(1 − δ)`` and
``‖r_{k+1}‖² ≤ (1 − 2η + 2ηC + η²(1 + C)²) ‖r_k‖²``, which is at most ``(1 − η)‖r_k‖²`` if
``η ≤ (1 − 2C)/(1 + C)²``. All steps together then have length at most
``2‖r₀‖/((1 − δ)√λ)``, which is within the ball because ``C < ½`` means ``δ < 1/5``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["gd", "ngd", "kfac"]


@dataclass(frozen=True)
class ConvergenceBounds:
    """Step sizes with a guarantee, and the linear rate they guarantee.

    Attributes:
        method: ``"gd"``, ``"ngd"`` or ``"kfac"``.
        largest_step: The guarantee holds for learning rates below it (``"ngd"``: up to it).
        step_size: The learning rate ``factor`` belongs to.
        factor: Bound of ``‖u_{k+1} − y‖² / ‖u_k − y‖²``, below 1.
    """

    method: Method
    largest_step: float
    step_size: float
    factor: float


def convergence_bounds(
    gram: Tensor | None = None,
    *,
    method: Method = "gd",
    samples: int | None = None,
    inputs: Tensor | None = None,
    step_size: float | None = None,
    stability: float = 0.0,
    strong_convexity: float = 1.0,
    smoothness: float = 1.0,
) -> ConvergenceBounds:
    r"""Return the largest learning rate with a guarantee and the rate per step it gives.

    Learning rates are those of the mean loss ``(1/N) Σ ½‖u_n − y_n‖²`` and of natgrad's
    optimizers. ``"gd"`` and ``"kfac"`` are about the linearised network; ``"ngd"`` is a theorem
    about the network itself, given the constant of condition 2.

    * ``"gd"``: the residual follows ``r ← (I − ηG/N) r``, so it shrinks if ``η < 2N/λ_max(G)``, by
      ``max |1 − ηλ/N|`` over the eigenvalues of ``G``.
    * ``"ngd"``: see the top of this module; ``η ≤ (1 − 2C)/(1 + C)²`` and factor ``1 − η``.
      For a loss that is ``μ``-strongly convex with ``κ``-Lipschitz gradient in the outputs, the
      update ``Jᵀ(JJᵀ)⁻¹∇_uℓ`` is, with a constant Jacobian, gradient descent on ``u``:
      ``η ≤ 2/(μ + κ)``, factor ``1 − 2ημκ/(μ + κ)`` (Nesterov 2004, theorem 2.1.15), with ``y`` the
      minimiser.
    * ``"kfac"``: on :class:`~natgrad.ntk.two_layer.TwoLayerNetwork`, ``J`` is the row-wise
      Kronecker product of slopes ``S`` and inputs ``X``, so residuals are mapped by ``N`` times
      ``P_X ∘ P_S``. If the slopes have full row rank, ``P_S = I`` and
      ``r_i ← (1 − ηN (P_X)_ii) r_i``, ``P_X = X(XᵀX)⁺Xᵀ``. The rate is set by ``min_i (P_X)_ii``,
      which is at least ``min_i ‖x_i‖²/λ_max(XᵀX)``. N is there because each factor is a mean.

    Args:
        gram: ``G = JJᵀ`` without ``1/N``, ``(N·C, N·C)``, at the start or in the limit of infinite
            width; needed for ``"gd"``.
        method: ``"gd"``, ``"ngd"`` or ``"kfac"``.
        samples: ``N``; by default the size of ``gram``, right for one output.
        inputs: ``X``, ``(N, d)``; needed for ``"kfac"``.
        step_size: Learning rate to give the factor of; by default the one with the smallest.
        stability: ``C`` of condition 2, between 0 and ½; 0 means infinite width. ``"ngd"`` only.
        strong_convexity: ``μ`` of the loss in one sample's outputs. ``"ngd"`` only.
        smoothness: ``κ`` of the loss in one sample's outputs. ``"ngd"`` only.

    Raises:
        ValueError: If something needed is missing, a matrix has the wrong shape or is singular, a
            constant is out of range, or no guarantee is known for ``step_size``.
    """
    if method != "ngd" and (stability, strong_convexity, smoothness) != (0.0, 1.0, 1.0):
        raise ValueError(
            "stability, strong_convexity and smoothness concern method='ngd' only, got "
            f"method={method!r}: leave them out"
        )
    if method == "ngd":
        return _ngd_bounds(step_size, stability, strong_convexity, smoothness)
    if method == "gd":
        if gram is None or gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            shape = None if gram is None else tuple(gram.shape)
            raise ValueError(f"method='gd' needs the Gram matrix, (N·C, N·C), got {shape}")
        values = torch.linalg.eigvalsh(gram.double()) / (samples or len(gram))
    elif method == "kfac":
        if inputs is None or inputs.dim() != 2:
            shape = None if inputs is None else tuple(inputs.shape)
            raise ValueError(f"method='kfac' needs the inputs, (N, d), got {shape}")
        left, singular, _ = torch.linalg.svd(inputs.double(), full_matrices=False)
        kept = singular > max(inputs.shape) * torch.finfo(torch.float64).eps * singular[0]
        values = len(inputs) * left[:, kept].square().sum(1)
    else:
        raise ValueError(f"method must be 'gd', 'ngd' or 'kfac', got {method!r}")
    smallest, largest = float(values.min()), float(values.max())
    if not smallest > len(values) * torch.finfo(torch.float64).eps * largest:
        raise ValueError(
            "the residual map is singular, so some residuals never shrink: "
            + (
                "gram must be positive definite; see jacobian_conditions for the reason"
                if method == "gd"
                else "remove inputs that are zero"
            )
        )
    limit = 2.0 / largest
    step = _checked_step(step_size, 2.0 / (smallest + largest), limit, strict=True)
    factor = max(abs(1.0 - step * smallest), abs(1.0 - step * largest)) ** 2
    return ConvergenceBounds(method, limit, step, factor)


def _ngd_bounds(
    step_size: float | None, stability: float, convexity: float, smoothness: float
) -> ConvergenceBounds:
    if not 0.0 <= stability < 0.5:
        raise ValueError(
            f"stability must be at least 0 and below 1/2, got {stability}: condition 2 does not "
            "hold, so nothing is guaranteed; a wider network has a smaller constant"
        )
    if not 0.0 < convexity <= smoothness < math.inf:
        raise ValueError(
            "strong_convexity must be positive and at most smoothness, got "
            f"{convexity} and {smoothness}"
        )
    if stability > 0.0 and (convexity, smoothness) != (1.0, 1.0):
        raise ValueError(
            "a guarantee with stability above 0 is known for the squared loss only: leave out "
            "strong_convexity and smoothness, or set stability to 0"
        )
    total = convexity + smoothness
    limit = 2.0 / total * (1.0 - 2.0 * stability) / (1.0 + stability) ** 2
    step = _checked_step(step_size, limit, limit, strict=False)
    factor = max(0.0, 1.0 - 2.0 * step * convexity * smoothness / total)
    return ConvergenceBounds("ngd", limit, step, factor)


def _checked_step(step_size: float | None, default: float, limit: float, *, strict: bool) -> float:
    if step_size is None:
        return default
    if not (0.0 < step_size < limit or (step_size == limit and not strict)):
        raise ValueError(
            f"step_size must be positive and {'below' if strict else 'at most'} {limit:.6g} for a "
            f"guarantee, got {step_size}"
        )
    return step_size


def generalization_bound(kernel: Tensor, targets: Tensor) -> float:
    r"""Return ``√(2 yᵀ(G∞)⁻¹y / n)``, the leading term of the bound on the population loss.

    It concerns :class:`~natgrad.ntk.two_layer.TwoLayerNetwork` trained from a small ``weight_std``
    to zero training loss, by natural or ordinary gradient descent, on unit-norm inputs, and a loss
    that is bounded by 1 and 1-Lipschitz in the output (Arora et al. 2019; Zhang, Martens & Grosse
    2019). A term that falls with ``n`` and does not depend on the targets comes on top. The unit is
    that of the loss; 1 or more says nothing.

    Args:
        kernel: ``G∞`` of the training inputs, ``(n, n)``, from
            :func:`~natgrad.ntk.two_layer.two_layer_kernel`.
        targets: ``y``, ``(n,)`` or ``(n, 1)``.

    Raises:
        ValueError: If shapes do not fit, the inputs did not have norm 1 (the diagonal of the kernel
            is ``‖x‖²/2``), or the kernel is singular.
    """
    y = targets.double().reshape(-1)
    if kernel.shape != (len(y), len(y)):
        raise ValueError(
            f"kernel must have shape ({len(y)}, {len(y)}) for {len(y)} targets, got "
            f"{tuple(kernel.shape)}; targets have one entry per sample"
        )
    kernel = kernel.double()
    _check_norms((2.0 * kernel.diagonal()).clamp(min=0.0).sqrt())
    values = torch.linalg.eigvalsh(kernel)
    if not float(values[0]) > len(y) * torch.finfo(torch.float64).eps * float(values[-1]):
        raise ValueError(
            "the kernel is singular, so the bound is infinite: remove equal inputs, and opposite "
            "pairs if there are more than input dimensions"
        )
    solved = torch.cholesky_solve(y.unsqueeze(1), torch.linalg.cholesky(kernel))[:, 0]
    return math.sqrt(2.0 * float(y @ solved) / len(y))


def _check_norms(norms: Tensor) -> None:
    if not bool(((norms - 1.0).abs() <= 1e-6).all()):
        raise ValueError(
            "the theory assumes inputs of Euclidean norm 1, got norms between "
            f"{float(norms.min()):.4g} and {float(norms.max()):.4g}: divide each sample by its norm"
        )
