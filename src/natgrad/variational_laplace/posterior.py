r"""Laplace's linearised posterior as a sparse Gaussian process.

In the dual, the space of functions, the prior ``N(0, I/δ)`` of the parameters of the linearised
model is a Gaussian process with the tangent kernel ``J Jᵀ/δ``. Its posterior is sought among

.. math:: q = N\left(\theta^*, (\delta I + J_Z^\top A J_Z)^{-1}\right), \qquad A \succeq 0,

with the rows ``J_Z`` of inducing points Z: the predictive mean is the network's output and

.. math:: \mathrm{Cov}\, f(x) = \tfrac1\delta \left[ J J^\top
          - J J_Z^\top (\delta A^{-1} + J_Z J_Z^\top)^{-1} J_Z J^\top \right].

With ``H = Σ_n J_nᵀ Λ_n J_n`` and the orthonormal basis U of the span of the rows of Z the bound

.. math:: \log p(D \mid \theta^*) - \tfrac12 \mathrm{tr}(H \Sigma_q) - \mathrm{KL}(q \,\|\, p)

of Laplace's evidence is largest for ``J_Zᵀ A J_Z = U B Uᵀ`` with ``B = Uᵀ H U``, which is Laplace's
posterior with its Fisher matrix projected to the span. A natural-gradient step of rate ρ on a
mini-batch is ``B ← (1 − ρ) B + ρ Uᵀ Ĥ U``, so steps of rate 1/t are a running mean and end at the
optimum when every sample has been seen. There the bound is that of Titsias (2009),

.. math:: \log p(D \mid \theta^*) - \tfrac12 \left[ \delta \|\theta^*\|^2
          + \log\det(I + B/\delta) + \mathrm{tr}(H - U B U^\top)/\delta \right],

in closed form as a function of δ, and for Gaussian noise of its variance.

Source: Ortega, Rodríguez Santana & Hernández-Lobato, Variational linearized Laplace approximation
for Bayesian deep learning (2024), arXiv 2302.12565. The paper takes the step for A by Adam, and
leaves ``δ‖θ*‖²`` out of the divergence.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_integer, check_range
from natgrad.capture import Capture
from natgrad.capture.evaluation import count_samples, evaluated, output_rows
from natgrad.capture.model_output import unwrap
from natgrad.distributed.replicas import check_alone
from natgrad.fisher import Batch, FisherType
from natgrad.fisher.batches import batches_of, batches_with_samples, check_reiterable
from natgrad.fisher.estimation import partial_samples, update_from_output
from natgrad.fisher.types import as_fisher_type
from natgrad.jacobians import Jacobians
from natgrad.laplace.evidence import ascend
from natgrad.laplace.linearized import LinearizedPosterior
from natgrad.laplace.observations import log_normalizer
from natgrad.likelihoods import Gaussian, Likelihood, LikelihoodLike, as_likelihood
from natgrad.operators import FisherMatrix
from natgrad.variational_laplace.inducing_points import choose_inducing_points
from natgrad.variational_laplace.predictive_fit import PredictiveFit
from natgrad.variational_laplace.projected import ProjectedOperator, sample_grams

PART = "all layers"


class VariationalLaplace(LinearizedPosterior):
    """A Gaussian posterior around trained parameters from inducing points, VaLLA.

    Predictions, samples of the parameters and the choice of δ are the calls of
    :class:`natgrad.Laplace`, and ``log_marginal_likelihood()`` is a lower bound of Laplace's.

    Args:
        model: The trained model; it runs in its present mode (call ``model.eval()`` first) and is
            left as it was.
        data: The training data: a pair ``(inputs, targets)`` or a re-iterable of such pairs in
            random order, as a data loader with ``shuffle=True``.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module. The variance of
            ``Gaussian(variance)`` is that of the noise.
        inducing: M, how many inducing points to choose from the data, default 100; or the points
            themselves, as the model takes them.
        selection: How they are chosen: ``"k_means"`` (default), the means of M clusters;
            ``"random"``; or ``"greedy"``, one by one where the prior variance given the others is
            largest. Among ``20 M`` samples.
        outputs: ``"all"`` (default), every inducing point stands for all C outputs, ``R = M·C``
            rows; or ``"one"``, point m for output ``m mod C`` alone, R = M, as in the source.
        prior_precision: δ, the inverse variance of every parameter under the prior. It may be set
            later.
        parameters: ``"all"``, or ``"last_layer"`` to be uncertain about the last layer alone.
        fisher: ``"exact"``, or ``"mc"`` for one vector per sample instead of C.
        steps: Mini-batches to see; all of the data by default, which gives the optimum.
        count: Number of samples in the data, which mini-batches stand for; by default the length
            of ``data.dataset``. Without ``steps`` the samples are counted.
        seed: Seed of the choice of inducing points and of sampled labels.
        output: Picks the tensor the likelihood looks at out of the model's output.

    Attributes:
        inducing: The inducing points.
        matrix: The Fisher matrix, the mean over data points, projected to the span of their rows.
        count: N, the number of data points.
        log_likelihood: ``log p(D | θ*)``, up to constants, as in :class:`natgrad.Laplace`.

    Memory is ``2R²``, the factored rows of the inducing points, and those of one batch with their
    products with R rows. A step costs ``B·R`` products of rows and ``B·R²`` for B rows of a batch,
    whatever N is.

    Raises:
        ValueError: If an argument is out of range or the data cannot be used.

    Example:
        >>> posterior = natgrad.VariationalLaplace(model, loader, inducing=50)
        >>> posterior.optimize_prior_precision()
        >>> probabilities = posterior.predict(x)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batch | Iterable[Batch],
        likelihood: LikelihoodLike = "categorical",
        inducing: Any = 100,
        *,
        selection: str = "k_means",
        outputs: Literal["all", "one"] = "all",
        prior_precision: float = 1.0,
        parameters: Literal["all", "last_layer"] = "all",
        fisher: str | FisherType = "exact",
        steps: int | None = None,
        count: int | None = None,
        seed: int = 0,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_choice("parameters", parameters, "all", "last_layer")
        check_choice("outputs", outputs, "all", "one")
        if steps is not None:
            check_integer("steps", steps)
        check_alone(model, "VariationalLaplace")
        self.model: nn.Module = unwrap(model)
        self.likelihood: Likelihood = as_likelihood(likelihood)
        self.output: Callable[[Any], Any] | None = self.likelihood.selection(output)
        self.prior_precision = prior_precision
        self._factorised = None
        self._fisher, self._seed = as_fisher_type(fisher), seed
        check_reiterable(data)
        first = next(batches_with_samples(data), None)
        if first is None:
            raise ValueError("data has no batches")
        self._trainable = self._last_layer(first[0]) if parameters == "last_layer" else None
        if steps is not None and count is None:
            count = _length(data)
        with self._only_trainable():
            if isinstance(inducing, Integral):
                generator = torch.Generator().manual_seed(seed)
                inputs = (one[0] for one in batches_with_samples(data))
                inducing = choose_inducing_points(
                    self.model, inputs, cast(int, inducing), selection, generator, self.output
                )
            self.inducing = inducing
            with Capture(self.model, self.output) as capture:
                capture.check_covered()
                values, rows = output_rows(capture, inducing)
                if outputs == "one":
                    rows = rows.combined(_unit_weights(rows))
                seen = _Moments(ProjectedOperator.span(rows))
                self._see(capture, data, seen, steps)
            if seen.count == 0:
                raise ValueError("no target of the data counts, so there is nothing to learn from")
            names = seen.span.layout.names
            parameter = dict(self.model.named_parameters())
            self._squared_norm = sum(float(parameter[n].detach().square().sum()) for n in names)
        scale = 1.0 if steps is None or count is None else count / seen.samples
        self.count: float = seen.count * scale
        self.log_likelihood: float = seen.log_likelihood * scale
        self._observed = seen.observed * scale
        self._trace = seen.trace * scale  # tr H
        self._set(seen.span.rotated(seen.moment * (scale / self.count)), tuple(rows))
        self._mean = self._center(self.matrix.layout)[:, 0]
        self._best = self.count * self._projected.values.double()  # Eigenvalues of Uᵀ H U

    def _see(self, capture: Capture, data: Any, seen: _Moments, steps: int | None) -> None:
        """Add up what batches say: ``Uᵀ H U``, ``tr H`` and the likelihood."""
        generators: dict[torch.device, torch.Generator] = {}
        for inputs, target in itertools.islice(batches_of(data), steps):
            if target is None:
                raise ValueError("the posterior needs targets with every batch")
            with evaluated(capture, inputs) as found:
                recorded, detached = capture.find_pass(found), found.detach()
                if detached.numel() == 0:
                    continue
                target = recorded.samples_first(target)
                own = self.likelihood.of_shapes(recorded.heads)
                weights = own.event_weights(detached, target)
                count = own.count(detached, target)
                seen.samples += recorded.samples
                if float(count) == 0:
                    continue
                seen.count += float(count)
                seen.log_likelihood += log_normalizer(own, detached, target)[0]
                seen.log_likelihood -= float(own.loss(detached, target) * count)
                seen.observed += float(own.spread(weights, detached).sum())
                generator = generators.setdefault(
                    found.device, torch.Generator(found.device).manual_seed(self._seed)
                )
                update_from_output(
                    seen, capture, own, self._fisher, found, weights, count,
                    partial=partial_samples(weights), generator=generator, target=target,
                    retain_graph=False,
                )  # fmt: skip

    def _set(self, projected: ProjectedOperator, blocks: tuple[str, ...]) -> None:
        """Make ``U B Uᵀ/N`` the Fisher matrix."""
        self.matrix: FisherMatrix = FisherMatrix(
            projected.layout, {PART: projected}, {PART: blocks}, "inducing_points"
        )
        self._factorised = None

    @property
    def _projected(self) -> ProjectedOperator:
        return cast("ProjectedOperator", self.matrix.parts[PART])

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Return the bound of the evidence ``log p(D)`` of the data, up to constants.

        It is Laplace's where the span of the inducing points' rows has the rows of all data.

        Args:
            prior_precision: δ; the present one by default. The bound is that for the covariance
                that is best for it.
        """
        delta = float(self.prior_precision if prior_precision is None else prior_precision)
        logdet = float((1.0 + self._best / delta).log().sum())
        divergence = delta * self._squared_norm + logdet + self._left / delta
        return float(self.log_likelihood - 0.5 * divergence)

    @property
    def _left(self) -> float:
        """``tr(H − U B Uᵀ)``, of what the span leaves out; negative only by rounding."""
        return max(self._trace - float(self._best.sum()), 0.0)

    def elbo(self, inputs: Any, targets: Any) -> float:
        """Return an estimate of the bound from a mini-batch, unbiased for the present posterior.

        The mean over the mini-batches of all data, of equal size, is
        :meth:`log_marginal_likelihood` if ``steps`` was not given, and at most that otherwise.

        Args:
            inputs: Inputs of the batch.
            targets: Its targets.
        """
        self._check_parameters(self._mean, self.matrix.layout)
        seen = _Moments(self._projected)
        seen.inverse = cast("ProjectedOperator", self._inverse().parts[PART])
        with self._only_trainable(), Capture(self.model, self.output) as capture:
            self._see(capture, [(inputs, targets)], seen, None)
        if seen.count == 0:
            raise ValueError("the batch has no targets that count")
        delta, values = self.prior_precision, self.count * self._projected.values.double()
        divergence = (delta / (delta + values) - 1.0 + (1.0 + values / delta).log()).sum()
        fit = seen.log_likelihood - 0.5 * seen.trace / self.count
        penalty = float(divergence) + float(delta) * self._squared_norm
        return self.count / seen.count * fit - 0.5 * penalty

    def optimize_noise(self) -> tuple[float, float]:
        """Set δ and the variance of Gaussian noise to the maximum of the bound over both.

        Returns:
            δ and the variance of ``likelihood``.

        Raises:
            TypeError: If the likelihood is not Gaussian.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(
                f"optimize_noise() needs a gaussian likelihood, not {self.likelihood!r}: use "
                "optimize_prior_precision()"
            )
        values, left = self._best.cpu(), self._left
        # log p(D | θ*) = c − quadratic − observed/2 log σ², at the present variance.
        normalizer = -0.5 * self._observed * math.log(self.likelihood.variance)
        quadratic = normalizer - self.log_likelihood
        self.optimize_prior_precision()
        start = torch.tensor([self.prior_precision, 1.0], dtype=torch.float64).log()
        logarithms = start.requires_grad_(True)

        def bound() -> Tensor:
            delta, factor = logarithms.exp().unbind()
            prior = delta * self._squared_norm + left / (factor * delta)
            prior = prior + (1.0 + values / (factor * delta)).log().sum()
            return -quadratic / factor - 0.5 * (self._observed * logarithms[1] + prior)

        ascend(bound, logarithms)
        delta, factor = logarithms.detach().exp().tolist()
        self.prior_precision = delta
        self._scale_noise(factor)
        projected = self._projected
        scaled = dataclasses.replace(projected, values=projected.values / factor)
        self._set(scaled, self.matrix.members[PART])
        return delta, self.likelihood.variance

    def fit_predictive(
        self,
        data: Batch | Iterable[Batch],
        steps: int,
        *,
        rate: float = 0.1,
        lr: float = 0.05,
        mean_term: bool = True,
    ) -> list[float]:
        """Fit to the predictive density of the targets, which the source trains with.

        The objective is ``Σ log E_q p(y | f) − KL`` (α-divergence, α = 1), outputs of a sample
        taken for independent and classes by the probit approximation. It starts at the present
        posterior; ``log_marginal_likelihood()`` and ``elbo()`` are about the bound, as before.

        Args:
            data: A pair ``(inputs, targets)``, or mini-batches, begun again when they end.
            steps: Number of mini-batches.
            rate: Rate of the natural-gradient steps on the covariance, in (0, 1].
            lr: Rate of Adam on the logarithms of δ and, of Gaussian noise, the variance; 0 leaves
                them.
            mean_term: Whether ``δ‖θ*‖²/2`` is part of the divergence; the source leaves it out,
                and δ may then grow until nothing is uncertain away from the data.

        Returns:
            The objective before every step, estimated from its mini-batch.

        Raises:
            ValueError: If an argument is out of range, or there is no data.
            TypeError: If the likelihood is not categorical, Bernoulli or Gaussian.
        """
        check_integer("steps", steps)
        check_range("lr", lr)
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self._check_parameters(self._mean, self.matrix.layout)
        projected = self._projected
        start = [math.log(self.prior_precision), 0.0]
        logarithms = projected.values.new_tensor(start, dtype=torch.float64).requires_grad_(True)
        adam = torch.optim.Adam([logarithms], lr) if lr > 0 else None
        moment = torch.diag(self.count * projected.values.double())
        norm = self._squared_norm if mean_term else 0.0
        fit, history = PredictiveFit(moment, logarithms, rate, norm, adam), []
        with self._only_trainable(), Capture(self.model, self.output) as capture:
            for inputs, target in itertools.islice(_endless(data), steps):
                output, rows = output_rows(capture, inputs)
                target = capture.passes[-1].samples_first(target)
                own = self.likelihood
                count = float(own.count(output, target))
                if count == 0:
                    continue
                coordinates = projected.coordinates(rows).unflatten(0, (rows.samples, -1))
                scale = self.count / count
                prior = sample_grams(rows, diagonal=True)
                history.append(fit.step(own, output, target, coordinates, prior, scale))
        moment, self.prior_precision, factor = fit.result()
        self._set(projected.rotated(moment / self.count), self.matrix.members[PART])
        if isinstance(self.likelihood, Gaussian):
            self._scale_noise(factor)
        return history

    def _scale_noise(self, factor: float) -> None:
        """Multiply the variance of Gaussian noise."""
        likelihood = cast("Gaussian", self.likelihood)
        before = -0.5 * self._observed * math.log(likelihood.variance)
        self.likelihood = dataclasses.replace(likelihood, variance=likelihood.variance * factor)
        after = before - 0.5 * self._observed * math.log(factor)
        self.log_likelihood = (self.log_likelihood - before) / factor + after
        self._trace /= factor
        self._best = self._best / factor


class _Moments:
    """What rows of data add up to, as they come from the output."""

    additive, by_layer = True, False

    def __init__(self, span: ProjectedOperator) -> None:
        self.span = span
        size = len(span.values)
        self.moment = torch.zeros(size, size, dtype=torch.float64, device=span.device)
        self.inverse: ProjectedOperator | None = None
        self.samples, self.count, self.log_likelihood = 0, 0.0, 0.0
        self.observed, self.trace = 0.0, 0.0

    def observe(
        self, jacobians: Jacobians, count: Tensor | float, *, continued: bool = False
    ) -> None:
        """Add ``Uᵀ Jᵀ J U`` and ``tr J Jᵀ``; or ``tr J (·) Jᵀ`` alone for an inverse."""
        if self.inverse is not None:
            self.trace += float(self.inverse.sample_forms((), jacobians, diagonal=True).sum())
            return
        own = self.span.coordinates(jacobians)
        self.moment += own.T @ own
        self.trace += sum(float(block.diagonal().sum()) for block in jacobians.values())


def _unit_weights(rows: Jacobians) -> Tensor:
    """Return weights ``(M, C, 1)`` that take output ``m mod C`` of sample m."""
    first = next(iter(rows.values()))
    chosen = torch.arange(rows.samples, device=first.device) % rows.directions
    return nn.functional.one_hot(chosen, rows.directions).to(first.dtype).unsqueeze(2)


def _endless(data: Batch | Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches_with_samples(data):
            empty = False
            yield batch
        if empty:
            raise ValueError("data has no batches")


def _length(data: Any) -> int:
    """Return the number of samples behind some data."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if pair and isinstance(data[1], (Tensor, Mapping)):
        return count_samples(data[0])
    try:
        return len(data.dataset)
    except (AttributeError, TypeError):
        raise ValueError(
            "steps needs to know how many samples the data has: give count=..., or a DataLoader "
            "of a dataset with a length"
        ) from None
