r"""The linearised Laplace approximation: what a Fisher matrix says about uncertainty.

With a Gaussian prior :math:`N(0, \delta^{-1} I)` and the Fisher matrix F of N data points the
posterior of the parameters is :math:`N(\theta^*, (N F + \delta I)^{-1})`. Through the linearised
model it becomes a Gaussian over outputs (Immer, Korzepa & Bauer 2021),

.. math:: f(x) \sim N\left(f(x, \theta^*),\; J(x) (N F + \delta I)^{-1} J(x)^\top\right),

and the evidence of the data, for choosing δ without a validation set (MacKay 1992), is

.. math:: \log p(D) \approx \log p(D \mid \theta^*) + \tfrac12 \left[P \log \delta
          - \delta \|\theta^*\|^2 - \log\det(N F + \delta I)\right].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import (
    call_model,
    count_samples,
    evaluated,
    output_rows,
    take_samples,
    undisturbed,
)
from natgrad.capture.model_output import Selection, require_output, unwrap
from natgrad.curvature import Structure
from natgrad.distributed import Replicas
from natgrad.distributed.shards import mesh_group, whole
from natgrad.fisher import Batch, FisherType, fisher_matrix
from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    LikelihoodLike,
    as_likelihood,
)
from natgrad.likelihoods.heads import JoinedHeads
from natgrad.operators import FisherMatrix

__all__ = ["Laplace"]

#: Samples whose outputs are pulled back at a time.
CHUNK_SAMPLES = 16


class Laplace:
    """A Gaussian posterior around trained parameters, in any structure of the Fisher matrix.

    Args:
        model: The trained model; it runs in its present mode (call ``model.eval()`` first) and is
            left as it was.
        data: The training data: a pair ``(inputs, targets)`` or a re-iterable of such pairs, as a
            data loader.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module. The variance of
            ``Gaussian(variance)`` is that of the noise.
        structure: Structure of the Fisher matrix.
        prior_precision: δ, the inverse variance of every parameter under the prior. It may be set
            later.
        parameters: ``"all"``, or ``"last_layer"`` to be uncertain about the last layer alone.
        fisher: Fisher type.
        output: Picks the tensor the likelihood looks at out of the model's output.
        process_group: Processes that have a share of the data each, as in
            :func:`natgrad.fisher_matrix`; all must make the posterior, which is the same in each.
        **structure_options: Options of the structure.

    Attributes:
        matrix: The Fisher matrix, the mean over data points.
        count: N, the number of data points.
        log_likelihood: ``log p(D | θ*)``, up to constants that depend on neither the parameters nor
            the variance of Gaussian noise.

    Raises:
        ValueError: If an argument is out of range or the data cannot be used.

    Example:
        >>> posterior = natgrad.Laplace(model, loader, "categorical", "kfac")
        >>> posterior.optimize_prior_precision()
        >>> probabilities = posterior.predict(x)
    """

    #: Whether the model is kept in shards.
    _shards = False

    def __init__(
        self,
        model: nn.Module,
        data: Batch | Iterable[Batch],
        likelihood: LikelihoodLike = "categorical",
        structure: str | Structure = "kfac",
        *,
        prior_precision: float = 1.0,
        parameters: Literal["all", "last_layer"] = "all",
        fisher: str | FisherType = "exact",
        output: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
        **structure_options: Any,
    ) -> None:
        if parameters not in ("all", "last_layer"):
            raise ValueError(f"parameters must be 'all' or 'last_layer', got {parameters!r}")
        self.model: nn.Module = unwrap(model)
        mesh = mesh_group(self.model)
        self._shards, replicas = mesh is not None, Replicas.of(model, process_group or mesh)
        self.likelihood: Likelihood = as_likelihood(likelihood)
        self.output: Callable[[Any], Any] | None = self.likelihood.selection(output)
        self.prior_precision = prior_precision
        self._factorised: tuple[float, FisherMatrix] | None = None
        if iter(data) is data:
            raise ValueError(
                "data must be re-iterable, as a list or a data loader: it is read twice"
            )
        batches = cast("Iterable[Batch]", [data] if _is_pair(data) else data)
        self._trainable: frozenset[str] | None = None
        if parameters == "last_layer":
            first = next(iter(batches), None)
            own_layer = [] if first is None else sorted(self._last_layer(first[0]))
            device = next(self.model.parameters()).device
            layers = [one for one in replicas.gathered(own_layer, device) if one]
            if not layers:
                raise ValueError("data has no batches")
            self._trainable = frozenset(layers[0])
        with self._only_trainable():
            self.matrix: FisherMatrix = fisher_matrix(
                model, data, self.likelihood, structure, fisher, output=output,
                process_group=process_group, **structure_options,
            )  # fmt: skip
            names = self.matrix.parameter_names
            values = dict(self.model.named_parameters())
            self._squared_norm = sum(float(whole(values[n]).detach().square().sum()) for n in names)
        self.count: float = 0.0
        self.log_likelihood: float = 0.0
        for inputs, target in batches:
            if target is None:
                raise ValueError("the posterior needs targets with every batch")
            outputs, own = self._outputs(inputs)
            count = float(own.count(outputs, target))
            if count > 0:
                self.count += count
                self.log_likelihood -= float(own.loss(outputs, target)) * count
                self.log_likelihood += _log_normalizer(own, outputs, target)
        device = self.matrix.layout.device
        own_part = torch.tensor([self.count, self.log_likelihood], dtype=torch.float64)
        self.count, self.log_likelihood = replicas.summed(own_part.to(device), device).tolist()

    @property
    def prior_precision(self) -> float:
        """δ.

        Raises:
            ValueError: When set to something else than a positive finite number.
        """
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"prior_precision must be positive and finite, got {value}")
        self._prior_precision = float(value)

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Return the evidence ``log p(D)`` of the data, up to constants.

        It contains the observation noise, so that σ can be chosen by it, too: compare posteriors
        with ``Gaussian(variance=σ²)``.

        Args:
            prior_precision: δ; the present one by default.
        """
        delta = self.prior_precision if prior_precision is None else prior_precision
        size = self.matrix.shape[0]
        # log det(NF + δI) = P log N + log det(F + δ/N I)
        logdet = size * math.log(self.count) + float(self.matrix.logdet(delta / self.count))
        prior = size * math.log(delta) - delta * self._squared_norm
        return self.log_likelihood + 0.5 * (prior - logdet)

    def optimize_prior_precision(self, lowest: float = 1e-4, highest: float = 1e6) -> float:
        """Set δ to the maximum of the evidence and return it.

        Args:
            lowest: Smallest δ tried.
            highest: Largest δ tried.
        """
        grid = torch.logspace(math.log10(lowest), math.log10(highest), 31).tolist()
        scores = [self.log_marginal_likelihood(delta) for delta in grid]
        best = max(range(len(grid)), key=scores.__getitem__)
        left, right = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        for _ in range(20):  # Thirds in the logarithm, the evidence being smooth there.
            ratio = (right / left) ** (1 / 3)
            if self.log_marginal_likelihood(left * ratio) < self.log_marginal_likelihood(
                right / ratio
            ):
                left *= ratio
            else:
                right /= ratio
        self.prior_precision = (left * right) ** 0.5
        return self.prior_precision

    def functional_variance(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the linearised model's outputs, without noise.

        Args:
            x: Inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

        Returns:
            ``f(x, θ*)``, ``(N, …)``, and the covariance of each sample's outputs, ``(N, C, C)``.
        """
        return self._moments(x, diagonal=False)

    def _moments(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor]:
        """Return the mean outputs and their covariances ``(N, C, C)``, or variances ``(N, C)``."""
        inverse, samples = self._inverse(), count_samples(x)
        result: tuple[Tensor, Tensor] | None = None
        with self._only_trainable(), self._capture() as capture:
            for start in range(0, samples, CHUNK_SAMPLES):
                mean, rows = output_rows(
                    capture, take_samples(x, slice(start, start + CHUNK_SAMPLES))
                )
                # J(NF + δI)⁻¹Jᵀ = J(F + δ/N I)⁻¹Jᵀ/N.
                found = mean, inverse.sample_forms(rows, diagonal=diagonal) / self.count
                if result is None:  # Pieces and their concatenation would be two copies.
                    whole = [one.new_empty(samples, *one.shape[1:]) for one in found]
                    result = whole[0], whole[1]
                for one, piece in zip(result, found, strict=True):
                    one[start : start + len(piece)] = piece
        assert result is not None
        return result

    def _inverse(self) -> FisherMatrix:
        """Return ``(F + δ/N I)⁻¹``, factorised once for each δ."""
        damping = self.prior_precision / self.count
        if self._factorised is None or self._factorised[0] != damping:
            self._factorised = damping, self.matrix.inverse(damping)
        return self._factorised[1]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return samples of the parameters from ``N(θ*, (NF + δI)⁻¹)``.

        They are ``θ* + (NF + δI)^(−1/2) ε`` with the symmetric root and standard normal ε, from
        eigendecompositions of what the structure keeps: of the Kronecker factors, or for exact
        blocks of the Gram matrix of their rows where these are fewer than parameters.

        Args:
            n: Number of samples.
            generator: Source of ε; None (default) is torch's global one.

        Returns:
            ``(n, P)``, entries in the order of ``matrix.parameter_names``; a row goes into the
            model by :func:`torch.nn.utils.vector_to_parameters` if all parameters are uncertain.

        Raises:
            NotImplementedError: If the structure has no square root at hand; ``"full"``,
                ``"block_diagonal"``, ``"kfac"``, ``"ekfac"``, ``"tkfac"``, ``"tekfac"`` and
                ``"diagonal"`` have one.
            ValueError: If ``n`` is not positive.
        """
        if n < 1:
            raise ValueError(f"the number of samples must be at least 1, got {n}")
        layout = self.matrix.layout
        noise = _standard_normal((n, layout.numel), layout.zeros(0), generator)
        # (NF + δI)^(−1/2) = (F + δ/N I)^(−1/2)/√N
        deviations = self.matrix.inverse_root(self.prior_precision / self.count) @ noise.T
        values = dict(self.model.named_parameters())
        center = layout.to_column({name: whole(values[name]).detach() for name in layout.names})
        samples: Tensor = (center + deviations / self.count**0.5).T
        return samples

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
            ValueError: If ``samples`` is not positive.
        """
        if samples is not None and samples < 1:
            raise ValueError(f"the number of samples must be at least 1, got {samples}")
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

    def _outputs(self, inputs: Any) -> tuple[Tensor, Likelihood]:
        """Return the outputs, and the likelihood of them."""
        with undisturbed(self.model), torch.no_grad():
            found = call_model(self.model, inputs)
            heads = self.output(found) if isinstance(self.output, Selection) else None
            shapes = None if heads is None else {key: one.shape for key, one in heads.items()}
            return require_output(found, self.output), self.likelihood.of_shapes(shapes)

    def _capture(self) -> Capture:
        return Capture(self.model, self.output, shards=self._shards)

    def _last_layer(self, inputs: Any) -> frozenset[str]:
        with self._capture() as capture, evaluated(capture, inputs) as output:
            rows = capture.pull_back(output, torch.ones_like(output.detach()).unsqueeze(0))
            return frozenset(rows[list(rows)[-1]].layout.names)

    @contextmanager
    def _only_trainable(self) -> Iterator[None]:
        """Freeze all other parameters for a while."""
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


def _log_normalizer(likelihood: Likelihood, output: Tensor, target: Any) -> float:
    """Return the part of ``log p(D)`` beside the loss that depends on the noise, ``−Σ log σ``.

    Gaussian noise has it, once per observed output.
    """
    if isinstance(likelihood, JoinedHeads):
        heads = zip(
            likelihood.parts, likelihood.pieces(output), likelihood.targets(target), strict=True
        )
        total = 0.0
        for part, z, y in heads:
            count = float(part.count(z, y))
            # Losses of heads are means over their own events, times N.
            total += _log_normalizer(part, z, y) * len(output) / count if count > 0 else 0.0
        return total
    if not isinstance(likelihood, Gaussian):
        return 0.0
    precision = likelihood.output_hessian(output).diagonal(dim1=2, dim2=3)
    weights = likelihood.event_weights(output, target).to(precision)
    weights = weights if weights.dim() == 3 else weights.unsqueeze(-1)
    return float((weights * precision.log()).sum() / 2)


def _standard_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw on the generator's device, in the dtype and on the device of a tensor."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _is_pair(data: Any) -> bool:
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    return bool(pair and isinstance(data[1], (Tensor, Mapping)))
