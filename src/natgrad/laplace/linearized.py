"""Predictions of a model linearised at its parameters, whose posterior is Gaussian."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated, output_rows
from natgrad.distributed.shards import whole
from natgrad.fisher.pieces import piece_of, sample_slices
from natgrad.jacobians import CHUNK_ELEMENTS
from natgrad.laplace.prior import checked_precision
from natgrad.layouts import ParameterLayout
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from natgrad.operators import FisherMatrix

#: Samples whose outputs are pulled back at a time.
CHUNK_SAMPLES = 16


class LinearizedPosterior(ABC):
    """A Gaussian posterior ``N(θ*, (s F + δI)⁻¹)`` and what follows from it through ``J``.

    Attributes:
        model: The trained model.
        likelihood: What its outputs mean.
        output: Picks the tensor the likelihood looks at out of the model's output.
        matrix: F.
        count: N, the number of data points.
    """

    model: nn.Module
    likelihood: Likelihood
    output: Callable[[Any], Any] | None
    matrix: FisherMatrix
    count: float

    #: Whether the model is kept in shards.
    _shards = False
    #: The parameters that are uncertain; None for all that are trainable.
    _trainable: frozenset[str] | None = None
    _prior_precision: float | dict[str, float] = 1.0
    #: The inverse of ``F + δ/s I`` with the damping it was made for.
    _factorised: tuple[Any, FisherMatrix] | None = None
    #: θ*, the parameters that data were seen with, ``(P,)``.
    _mean: Tensor

    @property
    def prior_precision(self) -> Any:
        """δ.

        Raises:
            ValueError: When set to something else than a positive finite number.
        """
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: Any) -> None:
        self._prior_precision = checked_precision(value)

    @property
    def _scale(self) -> float:
        """What F is multiplied by in the precision of the posterior, s."""
        return self.count

    @abstractmethod
    def log_marginal_likelihood(self, prior_precision: Any = None) -> Any:
        """Return the evidence ``log p(D)`` of the data, or a bound, up to constants."""

    def optimize_prior_precision(self, lowest: float = 1e-4, highest: float = 1e6) -> Any:
        """Set δ to the maximum of the evidence and return it.

        Args:
            lowest: Smallest δ tried.
            highest: Largest δ tried.

        Raises:
            ValueError: If they are not positive and finite, in this order.
        """
        self.prior_precision = self._best_precision(lowest, highest)
        return self.prior_precision

    def _best_precision(self, lowest: float, highest: float, **others: Any) -> float:
        """Return the one δ of highest evidence."""
        if not 0 < lowest < highest < math.inf:
            raise ValueError(
                "prior precisions are sought from a lowest to a highest one, which must be "
                f"positive and finite, got {lowest} and {highest}"
            )

        def score(delta: float) -> float:
            return float(self.log_marginal_likelihood(delta, **others))

        grid = torch.logspace(math.log10(lowest), math.log10(highest), 31).tolist()
        scores = [score(delta) for delta in grid]
        best = max(range(len(grid)), key=scores.__getitem__)
        left, right = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        for _ in range(20):  # Thirds in the logarithm, the evidence being smooth there.
            ratio = (right / left) ** (1 / 3)
            if score(left * ratio) < score(right / ratio):
                left *= ratio
            else:
                right /= ratio
        return float((left * right) ** 0.5)

    # The posterior.

    def _inverse(self) -> FisherMatrix:
        """Return ``(F + δ/s I)⁻¹``, factorised once for each δ."""
        damping = self._damping()
        if self._factorised is None or self._factorised[0] != damping:
            self._factorised = damping, self._damped_inverse(damping)
        return self._factorised[1]

    def _damping(self) -> Any:
        return self.prior_precision / self._scale

    def _damped_inverse(self, damping: Any) -> FisherMatrix:
        return self.matrix.inverse(damping)

    def _inverse_root(self) -> FisherMatrix:
        return self.matrix.inverse_root(self._damping())

    @property
    def covariance(self) -> FisherMatrix:
        """``(s F + δI)⁻¹``, ``P × P``: its diagonal holds the variances of the parameters."""
        return self._inverse() * (1.0 / self._scale)

    def _center(self, layout: ParameterLayout) -> Tensor:
        """Return the model's parameters, ``(P, 1)``."""
        values = dict(self.model.named_parameters())
        return layout.to_column({name: whole(values[name]).detach() for name in layout.names})

    def _check_parameters(self, mean: Tensor, layout: ParameterLayout) -> None:
        """Raise a ValueError unless the model's parameters are those that data were seen with."""
        own = self._center(layout)[:, 0]
        if own.shape != mean.shape or not bool(torch.equal(own, mean.to(own))):
            raise ValueError(
                "the model's parameters are not those that the posterior has seen data with: load "
                "them first, or make a new posterior"
            )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return samples of the parameters from the posterior, whatever is in the model now.

        They are ``θ* + (s F + δI)^(−1/2) ε`` with the symmetric root and standard normal ε, from
        eigendecompositions of what the structure keeps: of the Kronecker factors, or for exact
        blocks of the Gram matrix of their rows where these are fewer than parameters.

        Args:
            n: Number of samples.
            generator: Source of ε; None (default) is torch's global one.

        Returns:
            ``(n, P)``, entries in the order of ``matrix.parameter_names``; a row goes into the
            model by :func:`torch.nn.utils.vector_to_parameters` if all parameters are uncertain.

        Raises:
            FactorizationError: If the precision is not positive definite, as that of
                ``"block_tridiagonal"`` may be.
            NotImplementedError: For ``"two_level"``, whose inverse is not symmetric.
            ValueError: If ``n`` is not positive.
        """
        check_integer("the number of samples", n)
        root, layout = self._inverse_root(), self.matrix.layout
        noise = _standard_normal((n, layout.numel), layout.zeros(0), generator)
        # (sF + δI)^(−1/2) = (F + δ/s I)^(−1/2)/√s
        deviations = root @ noise.T
        samples: Tensor = (self._mean.unsqueeze(1) + deviations / self._scale**0.5).T
        return samples

    # Its outputs.

    def functional_variance(self, x: Any, *, joint: bool = False) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the linearised model's outputs, without noise.

        Args:
            x: Inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
                A few samples are taken at a time, unless the outputs of one depend on others.
            joint: Whether outputs of different samples are held against each other, too. The rows
                of all N samples are then there at once, in factored form.

        Returns:
            ``f(x, θ*)``, ``(N, …)``, and the covariance of each sample's outputs, ``(N, C, C)``;
            ``(N·C, N·C)``, the outputs of a sample side by side, if joint.

        Raises:
            ValueError: If there is no sample, or the model has other parameters than θ* now.
        """
        return self._joint_moments(x) if joint else self._moments(x, diagonal=False)

    def _moments(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor]:
        """Return the mean outputs and their covariances ``(N, C, C)``, or variances ``(N, C)``."""
        inverse = self._inverse()
        self._check_parameters(self._mean, self.matrix.layout)
        slices = sample_slices(self.model, x, CHUNK_SAMPLES, self.output)
        result: tuple[Tensor, Tensor] | None = None
        with self._only_trainable(), self._capture() as capture:
            for some in slices:
                mean, rows = output_rows(capture, piece_of(x, some))
                # J(sF + δI)⁻¹Jᵀ = J(F + δ/s I)⁻¹Jᵀ/s.
                found = mean, inverse.sample_forms(rows, diagonal=diagonal) / self._scale
                if len(slices) == 1:
                    return found
                if result is None:  # Pieces and their concatenation would be two copies.
                    samples = slices[-1].stop
                    empty = [one.new_empty(samples, *one.shape[1:]) for one in found]
                    result = empty[0], empty[1]
                for one, piece in zip(result, found, strict=True):
                    one[some] = piece
        assert result is not None
        return result

    def _joint_moments(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return the mean outputs and ``J(sF + δI)⁻¹Jᵀ``, some of its columns at a time."""
        inverse = self._inverse()
        self._check_parameters(self._mean, self.matrix.layout)
        with self._only_trainable(), self._capture() as capture:
            mean, rows = output_rows(capture, x)
            eye = torch.eye(rows.rows, dtype=inverse.dtype, device=inverse.device)
            step = max(1, CHUNK_ELEMENTS // inverse.shape[0])
            pieces = [
                rows.times(inverse.multiply(rows.transposed_times(some)))
                for some in eye.split(step, dim=1)
            ]
        return mean, torch.cat(pieces, 1) / self._scale

    def predict(
        self, x: Any, samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the predictive distribution.

        Args:
            x: Inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            samples: Average over this many draws of the outputs from their Gaussian instead of the
                probit approximation, which takes the outputs of a sample for independent. The
                error falls as one over its root. Without effect for a Gaussian likelihood, where
                the closed form is exact.
            generator: Source of randomness of the draws; None (default) is torch's global one.

        Returns:
            For a categorical likelihood probabilities ``(N, C)`` and for a Bernoulli one ``(N, …)``
            by the probit approximation ``f/√(1 + πv/8)``, or the mean over draws; for a Gaussian
            one mean and variance of each output, noise included.

        Raises:
            TypeError: For another likelihood, or several events per sample without ``samples``.
            ValueError: If ``samples`` is not positive, there is no input, or the model has other
                parameters than θ* now.
        """
        if samples is not None:
            check_integer("the number of samples", samples)
        if samples is not None and isinstance(self.likelihood, (Bernoulli, Categorical)):
            return self._mean_probabilities(*self._moments(x, False), samples, generator)
        mean, variance = self._moments(x, diagonal=True)
        variance = variance.view(mean.shape)
        scaled = mean / (1.0 + math.pi / 8.0 * variance).sqrt()
        if isinstance(self.likelihood, Gaussian):
            noise = 1.0 / self.likelihood.output_hessian(mean).diagonal(dim1=2, dim2=3)
            return mean, variance + noise.reshape(mean.shape)
        if isinstance(self.likelihood, Bernoulli):
            return torch.sigmoid(scaled)
        if isinstance(self.likelihood, Categorical) and mean.dim() == 2:
            return torch.softmax(scaled, 1)
        raise TypeError(
            f"predict() knows categorical (one event per sample), bernoulli and gaussian "
            f"likelihoods, not {self.likelihood!r} with outputs {tuple(mean.shape)}: use "
            "functional_variance(), or samples=… for several categorical events"
        )

    def _mean_probabilities(
        self, mean: Tensor, covariance: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean probabilities over draws of the outputs, in the shape of ``mean``."""
        values, vectors = torch.linalg.eigh(covariance)  # Singular where outputs move together.
        root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)
        mean = mean.to(root.dtype)
        total = torch.zeros_like(mean)
        for _ in range(samples):
            noise = _standard_normal((*values.shape, 1), mean, generator)
            drawn = mean + (root @ noise).view(mean.shape)
            if isinstance(self.likelihood, Bernoulli):
                total += torch.sigmoid(drawn)
            else:
                events = self.likelihood.split_events(drawn)
                total += self.likelihood.merge_events(torch.softmax(events, -1), drawn)
        return total / samples

    # The model.

    def _capture(self) -> Capture:
        return Capture(self.model, self.output, shards=self._shards)

    def _last_layer(self, inputs: Any) -> frozenset[str]:
        """Return the names of the parameters of the layer that is called last."""
        with self._capture() as capture, evaluated(capture, inputs) as output:
            rows = capture.pull_back(output, torch.ones_like(output.detach()).unsqueeze(0))
            # Parameters that are used outside the calls of modules come last, whenever they are.
            called = [name for name in rows if name not in capture.sources.direct] or list(rows)
            calls = capture.find_pass(output).calls
            numbers = {id(one): number for number, one in enumerate(calls)}
            last = {
                name: max(numbers[id(one)] for one in of)
                for name, of in capture.sources.by_block(calls).items()
            }  # Of a parameter that layers share, as a table and an output layer, the last one.
            found = max(reversed(called), key=lambda name: last.get(name, len(calls)))
            return frozenset(rows[found].layout.names)

    @contextmanager
    def _only_trainable(self) -> Iterator[None]:
        """Freeze all parameters that are not uncertain for a while."""
        frozen = [
            p
            for n, p in self.model.named_parameters()
            if self._trainable is not None and p.requires_grad and n not in self._trainable
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def _standard_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw on the generator's device, in the dtype and on the device of a tensor."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
