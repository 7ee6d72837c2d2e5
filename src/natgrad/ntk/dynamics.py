r"""Training curves in function space: what theory says that training will do.

A wide network follows its linearisation, :math:`f_{t+1} = f_t - \eta K r_t` on the training inputs
and :math:`f'_{t+1} = f'_t - \eta K' r_t` on others, with ``r = f − y`` for the squared loss. The
matrices K and K' depend on the method alone: the tangent kernel for gradient descent,
:math:`J \hat F^{-1} J^\top / N` for natural gradient descent (Karakida & Osawa 2020). A
:class:`NetworkInFunctionSpace` knows them; :func:`predict` iterates them in closed form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.curvature import STRUCTURES
from natgrad.likelihoods import Gaussian, Likelihood, as_likelihood

#: Steps of the iteration that losses without a closed form take, at most.
MAX_STEPS = 100_000


class NetworkInFunctionSpace(ABC):
    """A linearised network, seen through its outputs alone.

    Attributes:
        outputs: ``f_0`` on the N training inputs, ``(N, …)``, float64.
        test_outputs: ``f'_0`` on the test inputs, ``(N', …)``, or None.
    """

    outputs: Tensor
    test_outputs: Tensor | None

    @property
    def samples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @abstractmethod
    def maps(self, structure: str, damping: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Return K and K' for the loss ``½‖f − y‖²``, averaged over samples.

        Args:
            structure: ``"gd"`` for gradient descent, or a structure of the Fisher matrix.
            damping: λ, in the units of F.

        Returns:
            K, symmetric, and K' (None without test inputs): ``(N·C, N·C)`` and ``(N'·C, N·C)``, or
            ``(N, N)`` and ``(N', N)`` where all outputs share the same map.

        Raises:
            ValueError: If the structure has no such map, or is singular at this damping.
        """

    @abstractmethod
    def change(
        self,
        structure: str,
        damping: float,
        likelihood: Likelihood,
        outputs: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return how the outputs change per unit of learning rate, at given outputs.

        Args:
            structure: As in :meth:`maps`.
            damping: λ.
            likelihood: Any likelihood.
            outputs: Present outputs on the training inputs.
            target: Their targets.

        Returns:
            ``−J(F + λI)⁻¹∇L`` and ``−J'(F + λI)⁻¹∇L``, in the shapes of the outputs.
        """


@dataclass(frozen=True)
class Prediction:
    """Predicted outputs along training.

    Attributes:
        steps: The steps (or times) predicted, S of them.
        train: Outputs on the training inputs at each, ``(S, N, …)``.
        test: Outputs on the test inputs, ``(S, N', …)``, or None.
        train_loss: Mean loss on the training inputs, ``(S,)``.
        learning_rate: η.
        likelihood: The likelihood of the loss.
    """

    steps: tuple[float, ...]
    train: Tensor
    test: Tensor | None
    train_loss: Tensor
    learning_rate: float
    likelihood: Likelihood

    def test_loss(self, target: Tensor) -> Tensor:
        """Return the mean loss on the test inputs at each step, ``(S,)``.

        Raises:
            ValueError: If there are no test inputs.
        """
        if self.test is None:
            raise ValueError("the prediction has no test outputs: give the network test inputs")
        return _losses(self.likelihood, self.test, target)


def predict(
    network: NetworkInFunctionSpace,
    target: Tensor,
    structure: str = "full",
    *,
    steps: int | Sequence[float] = 10,
    lr: float | None = None,
    damping: float = 0.0,
    likelihood: str | Likelihood | nn.Module = "gaussian",
    output_damping: float | None = None,
    continuous: bool = False,
) -> Prediction:
    r"""Predict the outputs of a wide network along training.

    For the squared loss in closed form, for any number of steps at once:
    :math:`f_t = y + (I - \eta K)^t r_0` and
    :math:`f'_t = f'_0 - K' K^{-1} [I - (I - \eta K)^t] r_0`, exact for the linearised network,
    damped or not. For other losses the function-space iteration with the output Hessian at the
    present outputs, step by step.

    Args:
        network: A :class:`LinearizedNetwork` of a model, or an :class:`InfiniteNetwork`.
        target: The training targets, as the likelihood takes them.
        structure: ``"gd"``, or a structure of the Fisher matrix: ``"full"`` (exact natural
            gradient), ``"block_diagonal"``, ``"block_tridiagonal"``, ``"kfac"``, ``"unit_wise"``,
            and for a linearised network any other.
        steps: The last step, for all steps up to it, or the steps wanted (times, if continuous).
        lr: η; by default ``1/α``, α the mean of K's diagonal, and for ``"gd"`` one over its
            largest eigenvalue.
        damping: λ, in the units of F.
        likelihood: ``"gaussian"`` is ``½‖f − y‖²``. A name, a likelihood or a loss module.
        output_damping: If given, the outputs take damped Newton steps instead,
            ``f ← f − ηK(Λ + output_damping·I)⁻¹v`` with the map K of the squared loss: decoupled
            over samples wherever K is isotropic (Karakida & Osawa 2020, appendix on cross-entropy).
        continuous: Predict the flow ``df/dt = −ηKr`` instead of discrete steps; squared loss only.

    Returns:
        The outputs and the training loss at each step. A diverging prediction grows to infinity.

    Raises:
        ValueError: If an argument is out of range, the structure has no map, or K has no positive
            mean so that there is no learning rate to default to.
        TypeError: If ``network`` is a model instead of its view in function space.
    """
    if not isinstance(network, NetworkInFunctionSpace):
        raise TypeError(
            "predict() takes a network in function space: wrap the model as "
            "natgrad.ntk.LinearizedNetwork(model, x, x_test) or, for infinite width, "
            f"natgrad.ntk.InfiniteNetwork(model, x, x_test); got {type(network).__name__}"
        )
    likelihood = as_likelihood(likelihood)
    structure = check_structure(structure)
    times = _times(steps, continuous)
    check_damping(damping)
    if lr is None:
        lr = _default_rate(network, structure, damping, likelihood)
    elif not lr >= 0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    target = target.to(network.outputs.dtype) if target.is_floating_point() else target
    if isinstance(likelihood, Gaussian) and target.shape != network.outputs.shape:
        raise ValueError(
            f"target must have the shape of the outputs, {tuple(network.outputs.shape)}, got "
            f"{tuple(target.shape)}"
        )
    run = _Run(network, target, structure, times, lr, damping, likelihood)
    if isinstance(likelihood, Gaussian) and output_damping is None:
        if not bool(torch.isfinite(target).all()):
            raise ValueError(
                "target has entries that are NaN or infinite, and the closed form trains all "
                "outputs: leave those samples out"
            )
        train, test = _closed_form(run, continuous)
    elif continuous:
        raise ValueError(
            "continuous time is available for the squared loss without output_damping only: use "
            "discrete steps, with a small lr if the flow is wanted"
        )
    else:
        train, test = _iterate(run, output_damping)
    losses = _losses(likelihood, train, target)
    return Prediction(times, train, test, losses, lr, likelihood)


def check_structure(structure: str) -> str:
    """Return the normalised name of a structure or of gradient descent; a ValueError if unknown."""
    key = structure.replace("-", "_")
    key = {"exact": "full", "gradient_descent": "gd"}.get(key, key)
    if key != "gd" and key not in STRUCTURES:
        known = ", ".join(["gd", *sorted(STRUCTURES)])
        raise ValueError(f"structure must be one of {known}, got {structure!r}")
    return key


def _times(steps: int | Sequence[float], continuous: bool) -> tuple[float, ...]:
    times = tuple(steps) if isinstance(steps, Iterable) else tuple(range(index(steps) + 1))
    if not times or any(not 0 <= time < float("inf") for time in times):
        raise ValueError(f"steps must be numbers of at least 0, got {steps}")
    if not continuous and any(time != int(time) for time in times):
        raise ValueError(f"steps must be whole unless continuous=True, got {steps}")
    return times


def _default_rate(
    network: NetworkInFunctionSpace, structure: str, damping: float, likelihood: Likelihood
) -> float:
    curvature, scale = _output_scale(network, likelihood)
    coefficients, _ = network.maps(structure, damping * scale / curvature)
    if structure == "gd":
        return scale / (curvature * float(torch.linalg.eigvalsh(coefficients)[-1]))
    alpha = float(coefficients.diagonal().mean())
    if not alpha > 0:
        raise ValueError(
            f"the coefficients of {structure!r} have the mean {alpha:.3g}, so no learning rate "
            "follows from them: give lr"
        )
    return 1.0 / alpha


def _output_scale(network: NetworkInFunctionSpace, likelihood: Likelihood) -> tuple[float, float]:
    """Return the largest eigenvalue of any output Hessian, and data points per sample."""
    hessian = likelihood.output_hessian(network.outputs)
    scale = float(likelihood.count(network.outputs)) / network.samples
    return float(torch.linalg.eigvalsh(hessian).max()), scale


@dataclass(frozen=True)
class _Run:
    """A training run to predict; see :func:`predict`."""

    network: NetworkInFunctionSpace
    target: Tensor
    structure: str
    times: tuple[float, ...]
    lr: float
    damping: float
    likelihood: Likelihood


def _closed_form(run: _Run, continuous: bool) -> tuple[Tensor, Tensor | None]:
    # Λ = cI: a factor c in F is one of 1/c in the damping, and cancels in the rest; in gradient
    # descent it is one in the learning rate.
    curvature, scale = _output_scale(run.network, run.likelihood)
    lr = run.lr * curvature / scale if run.structure == "gd" else run.lr
    coefficients, cross = run.network.maps(run.structure, run.damping * scale / curvature)
    residual, test_outputs = run.network.outputs - run.target, run.network.test_outputs
    # Where all outputs share the map, they are its columns.
    columns = residual.reshape(coefficients.shape[0], -1)
    values, vectors = linalg.eigh(coefficients)
    rotated = vectors.T @ columns
    train, test = [], []
    for time in run.times:
        decay, covered = _decay(values, lr, time, continuous)
        moved = _product(vectors, decay.unsqueeze(1) * rotated)
        train.append(run.target + moved.reshape(residual.shape))
        if cross is not None and test_outputs is not None:
            move = _product(cross, _product(vectors, covered.unsqueeze(1) * rotated))
            test.append(test_outputs - move.reshape(test_outputs.shape))
    return torch.stack(train), torch.stack(test) if test else None


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return a product in which what overflows is infinite, not the NaN of ∞ − ∞ or 0·∞."""
    product = matrix @ columns
    return torch.where(product.isnan(), float("inf"), product)


def _decay(values: Tensor, lr: float, time: float, continuous: bool) -> tuple[Tensor, Tensor]:
    """Return ``(1 − ηλ)^t`` and ``[1 − (1 − ηλ)^t]/λ``, which tends to ηt for small λ."""
    product = lr * values
    if continuous:
        decay = torch.exp(-product * time)
        missing = -torch.expm1(-product * time)
    else:
        decay = (1.0 - product) ** time
        small = product.abs() < 0.5
        precise = -torch.expm1(time * torch.log1p(-torch.where(small, product, 0.0)))
        missing = torch.where(small, precise, 1.0 - decay)
    tiny = product.abs() * max(time, 1.0) < 1e-12
    return decay, torch.where(tiny, lr * time, missing / torch.where(tiny, 1.0, values))


def _iterate(run: _Run, output_damping: float | None) -> tuple[Tensor, Tensor | None]:
    network, last = run.network, max(run.times)
    if last > MAX_STEPS:
        raise ValueError(f"at most {MAX_STEPS} steps can be iterated, got {last:g}")
    if output_damping is not None and (run.structure == "gd" or not output_damping >= 0):
        raise ValueError(
            "output_damping must be at least 0 and goes with a natural-gradient structure, got "
            f"{output_damping} with {run.structure!r}"
        )
    maps = None if output_damping is None else network.maps(run.structure, run.damping)
    outputs, test_outputs = network.outputs, network.test_outputs
    train: dict[int, Tensor] = {}
    test: dict[int, Tensor] = {}
    for step in range(int(last) + 1):
        if step in run.times:
            train[step] = outputs
            if test_outputs is not None:
                test[step] = test_outputs
        if step == last:
            break
        if maps is None:
            change, test_change = network.change(
                run.structure, run.damping, run.likelihood, outputs, run.target
            )
        else:
            assert output_damping is not None
            newton = _newton(run.likelihood, outputs, run.target, output_damping)
            columns = newton.reshape(maps[0].shape[0], -1)
            change = -(maps[0] @ columns).reshape(outputs.shape)
            if maps[1] is not None and test_outputs is not None:
                test_change = -(maps[1] @ columns).reshape(test_outputs.shape)
        outputs = outputs + run.lr * change
        if test_outputs is not None:
            assert test_change is not None
            test_outputs = test_outputs + run.lr * test_change
    stacked = torch.stack([train[int(time)] for time in run.times])
    return stacked, torch.stack([test[int(time)] for time in run.times]) if test else None


def _newton(
    likelihood: Likelihood, outputs: Tensor, target: Tensor, output_damping: float
) -> Tensor:
    """Return ``(Λ + ρI)⁻¹v`` event by event; the pseudo-inverse at ρ = 0."""
    gradient = likelihood.split_events(likelihood.gradient(outputs, target))
    hessian = likelihood.output_hessian(outputs)
    if output_damping == 0:
        solved = torch.linalg.pinv(hessian, hermitian=True) @ gradient.unsqueeze(-1)
    else:
        shifted = linalg.add_to_diagonal(hessian, output_damping)
        solved = torch.linalg.solve(shifted, gradient.unsqueeze(-1))
    return likelihood.merge_events(solved[..., 0], outputs)


def _losses(likelihood: Likelihood, outputs: Tensor, target: Tensor) -> Tensor:
    return torch.stack([likelihood.loss(present, target) for present in outputs])
