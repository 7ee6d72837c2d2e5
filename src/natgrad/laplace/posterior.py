r"""The linearised Laplace approximation: what a Fisher matrix says about uncertainty.

With a Gaussian prior :math:`N(\mu, \Delta^{-1})`, mostly :math:`\Delta = \delta I`, and the Fisher
matrix F of N data points the posterior of the parameters is
:math:`N(\theta^*, (\tfrac{N}{T} F + \Delta)^{-1})`. Through the linearised model it becomes a
Gaussian over outputs (Immer, Korzepa & Bauer 2021),

.. math:: f(x) \sim N\left(f(x, \theta^*),\;
          J(x) (\tfrac{N}{T} F + \Delta)^{-1} J(x)^\top\right),

and the evidence of the data, for choosing Δ without a validation set (MacKay 1992), is

.. math:: \log p(D) \approx \tfrac1T \log p(D \mid \theta^*) + \tfrac12 \left[\log\det \Delta
          - \|\theta^* - \mu\|^2_\Delta - \log\det(\tfrac{N}{T} F + \Delta)\right].

The temperature T is 1 in Bayes' rule; below 1 the posterior is colder, as if there were more data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import call_model, undisturbed
from natgrad.capture.model_output import Selection, require_output, unwrap
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.distributed import Replicas
from natgrad.distributed.shards import mesh_groups
from natgrad.fisher import Batch, FisherType, as_fisher_type
from natgrad.fisher.batches import batches_of, batches_with_samples, check_reiterable
from natgrad.fisher.estimation import curvature_of
from natgrad.laplace.evidence import Evidence
from natgrad.laplace.linearized import LinearizedPosterior
from natgrad.laplace.observations import Observations
from natgrad.laplace.prior import (
    check_layers,
    checked_center,
    checked_mean,
    checked_precisions,
)
from natgrad.laplace.subnetwork import checked_masks, named_parameters
from natgrad.laplace.uncertain import UncertainMatrix
from natgrad.likelihoods import Gaussian, Likelihood, LikelihoodLike, as_likelihood
from natgrad.operators import FisherMatrix
from natgrad.statistics.rows import RowStatistics

Precision = float | Mapping[str, float]


class Laplace(LinearizedPosterior):
    """A Gaussian posterior around trained parameters, in any structure of the Fisher matrix.

    Args:
        model: The trained model; it runs in its present mode (call ``model.eval()`` first) and is
            left as it was.
        data: The training data: a pair ``(inputs, targets)`` or a re-iterable of such pairs, as a
            data loader. None for none yet: they come by :meth:`update` or :meth:`load_state_dict`.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module. The variance of
            ``Gaussian(variance)`` is that of the noise.
        structure: Structure of the Fisher matrix.
        prior_precision: δ, the inverse variance of every parameter under the prior: one number, or
            one for each layer by name. It may be set later.
        prior_mean: μ, default 0: one number, or tensors by parameter name, as the
            ``state_dict()`` of a model that training began with.
        temperature: T, default 1. The likelihood is taken to the power of 1/T.
        parameters: ``"all"``; ``"last_layer"`` to be uncertain about the last layer alone; or a
            subnetwork: names of parameters, or of modules with all that they hold; or masks by
            parameter name, as of :func:`natgrad.laplace.largest_entries`, for single entries. Of
            these the posterior is dense in every part of the matrix, unless that is diagonal.
        fisher: Fisher type.
        output: Picks the tensor the likelihood looks at out of the model's output.
        process_group: Processes that have a share of the data each, as in
            :func:`natgrad.fisher_matrix`; all must make the posterior, which is the same in each.
        **structure_options: Options of the structure.

    Attributes:
        matrix: The Fisher matrix, the mean over data points.
        count: N, the number of data points.

    Raises:
        ValueError: If an argument is out of range or the data cannot be used.

    Example:
        >>> posterior = natgrad.Laplace(model, loader, "categorical", "kfac")
        >>> posterior.optimize_prior_precision()
        >>> probabilities = posterior.predict(x)
    """

    _evidence: Evidence | None = None

    def __init__(
        self,
        model: nn.Module,
        data: Batch | Iterable[Batch] | None,
        likelihood: LikelihoodLike = "categorical",
        structure: str | Structure = "kfac",
        *,
        prior_precision: Precision = 1.0,
        prior_mean: float | Mapping[str, Tensor] = 0.0,
        temperature: float = 1.0,
        parameters: Literal["all", "last_layer"] | Collection[str] | Mapping[str, Tensor] = "all",
        fisher: str | FisherType = "exact",
        output: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
        **structure_options: Any,
    ) -> None:
        if isinstance(parameters, str) and parameters not in ("all", "last_layer"):
            raise ValueError(
                f"parameters must be 'all', 'last_layer' or a list of names, got {parameters!r}"
            )
        self.model: nn.Module = unwrap(model)
        mesh, _ = mesh_groups(self.model)
        self._shards, self._group = mesh is not None, process_group or mesh
        self._wrapped = model
        self.likelihood: Likelihood = as_likelihood(likelihood)
        self._chosen_output, self._first_likelihood = output, self.likelihood
        self.output: Callable[[Any], Any] | None = self.likelihood.selection(output)
        self.structure: Structure = as_structure(structure, **structure_options)
        self.fisher: FisherType = as_fisher_type(fisher)
        self._curvature: Curvature | None = None
        self.temperature = temperature
        self.prior_mean = prior_mean
        self._last_only = parameters == "last_layer"
        self._masks: dict[str, Tensor] | None = None
        if isinstance(parameters, Mapping):
            self._masks = checked_masks(self.model, parameters)
        if not isinstance(parameters, str):
            self._trainable = named_parameters(self.model, parameters)
        self._seen, self._updates, self._noise = Observations(), 0, 1.0
        if isinstance(prior_precision, Mapping):  # Checked once the layers are known.
            self._prior_precision = dict(prior_precision)
        else:
            self.prior_precision = prior_precision
        if data is not None:
            self.update(data)

    # Data.

    def update(self, data: Batch | Iterable[Batch]) -> None:
        """Take further data into the posterior, of the model as it is.

        The result is that of all data at once. EKFAC and TEKFAC stay in the eigenbases of the first
        data, so begin with some that are like all; KPSVD sums products of batches in their order.

        Args:
            data: A pair ``(inputs, targets)`` or a re-iterable of such pairs.

        Raises:
            ValueError: If the data cannot be used, or the parameters have changed since earlier
                data; the posterior is then as it was.
        """
        check_reiterable(data)
        replicas = Replicas.of(self._wrapped, self._group)
        if self._curvature is not None:
            self._check_parameters(self._mean, self._curvature.layout)
        elif self._last_only:
            self._trainable = self._found_last_layer(data, replicas)
        saved = None if self._curvature is None else self._curvature.snapshot()
        try:
            with self._only_trainable():
                curvature = curvature_of(
                    self._wrapped, data, self._first_likelihood, self.structure, self.fisher,
                    seed=self._updates, output=self._chosen_output, process_group=self._group,
                    known=self._curvature,
                )  # fmt: skip
            seen = self._seen + self._observed(data, replicas, curvature.layout.device)
        except BaseException:
            if saved is not None and self._curvature is not None:
                self._curvature.rollback(saved)
            raise
        self._take(curvature, seen)
        self._updates += 1

    def _found_last_layer(self, data: Any, replicas: Replicas) -> frozenset[str]:
        """Return the last layer's parameters, of whichever process has a batch."""
        first = next(batches_with_samples(data), None)
        own_layer = [] if first is None else sorted(self._last_layer(first[0]))
        device = next(self.model.parameters()).device
        layers = [one for one in replicas.gathered(own_layer, device) if one]
        if not layers:
            raise ValueError("data has no batches")
        return frozenset(layers[0])

    def _observed(self, data: Any, replicas: Replicas, device: torch.device) -> Observations:
        """Return what the data say, those of all processes together."""
        seen = Observations()
        for inputs, target in batches_of(data):
            if target is None:
                raise ValueError("the posterior needs targets with every batch")
            outputs, own = self._outputs(inputs)
            seen = seen + Observations.of(own, outputs, target)
        own_part = torch.tensor(dataclasses.astuple(seen), dtype=torch.float64)
        return Observations(*replicas.summed(own_part.to(device), device).tolist())

    def _outputs(self, inputs: Any) -> tuple[Tensor, Likelihood]:
        """Return the outputs, and the likelihood of them."""
        with undisturbed(self.model), torch.no_grad():
            found = call_model(self.model, inputs)
            heads = self.output(found) if isinstance(self.output, Selection) else None
            shapes = None if heads is None else {key: one.shape for key, one in heads.items()}
            own = self._first_likelihood.of_shapes(shapes)
            return require_output(found, self.output), own

    def _take(self, curvature: Curvature, seen: Observations) -> None:
        """Make sums over data the posterior's."""
        checked_mean(self._prior_mean, curvature.layout)
        self._prior_precision = checked_precisions(self._prior_precision, tuple(curvature.blocks))
        self._curvature, self._seen = curvature, seen
        self.count: float = seen.count
        matrix = curvature.matrix()
        self.matrix: FisherMatrix = matrix if self._noise == 1.0 else matrix * (1.0 / self._noise)
        self._uncertain = UncertainMatrix(self.matrix, curvature.blocks, self._masks)
        self._factorised = self._evidence = None
        self._mean = self._center(matrix.layout)[:, 0]

    @property
    def _fitted(self) -> Curvature:
        if self._curvature is None:
            raise ValueError(
                "the posterior has seen no data: call update(data) or load_state_dict(state) first"
            )
        return self._curvature

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that may have a prior precision each.

        Raises:
            ValueError: If there are no data yet.
        """
        return tuple(self._fitted.blocks)

    @property
    def log_likelihood(self) -> float:
        """``log p(D | θ*)``.

        Without the constants that depend on neither the parameters nor Gaussian noise.
        """
        return float(self._seen.log_likelihood(self._noise))

    # The prior.

    @property
    def prior_precision(self) -> Any:
        """δ, a number, or one for each layer by name.

        Raises:
            ValueError: When set to something that is not positive and finite, or has other names.
        """
        value = self._prior_precision
        return dict(value) if isinstance(value, dict) else value

    @prior_precision.setter
    def prior_precision(self, value: Any) -> None:
        layers = self.layers if isinstance(value, Mapping) else ()
        self._prior_precision = checked_precisions(value, layers)

    @property
    def prior_mean(self) -> Any:
        """μ, a number, or tensors by parameter name.

        Raises:
            ValueError: When set to something that is not finite, or has no tensor of the right
                shape for a parameter.
        """
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: Any) -> None:
        if isinstance(value, Mapping):  # A state_dict() changes as its model trains.
            tensors = {n: one for n, one in value.items() if isinstance(one, Tensor)}
            value = {name: one.detach().clone() for name, one in tensors.items()}
        else:
            value = checked_center(value)
        if self._curvature is not None:
            checked_mean(value, self._curvature.layout)
        self._prior_mean, self._evidence = value, None

    @property
    def temperature(self) -> float:
        """T.

        Raises:
            ValueError: When set to something else than a positive finite number.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {value}")
        self._temperature, self._evidence = float(value), None

    def _damping(self) -> Any:
        """Return what the prior adds to F: a number, or one for each layer."""
        self._fitted  # noqa: B018
        value = self._prior_precision
        if isinstance(value, dict):
            return {name: delta / self._scale for name, delta in value.items()}
        return value / self._scale

    @property
    def _scale(self) -> float:
        return self.count / self.temperature

    def _damped_inverse(self, damping: Any) -> FisherMatrix:
        return self._uncertain.inverse(damping)

    def _inverse_root(self) -> FisherMatrix:
        damping = self._damping()
        return self._uncertain.inverse_root(damping)

    # The evidence.

    @overload
    def log_marginal_likelihood(
        self,
        prior_precision: Precision | None = None,
        noise_variance: float | None = None,
    ) -> float: ...

    @overload
    def log_marginal_likelihood(
        self,
        prior_precision: Precision | Tensor | Mapping[str, Tensor] | None = None,
        noise_variance: float | Tensor | None = None,
    ) -> float | Tensor: ...

    def log_marginal_likelihood(
        self, prior_precision: Any = None, noise_variance: Any = None
    ) -> Any:
        """Return the evidence ``log p(D)`` of the data, up to constants.

        The matrix is decomposed at the first call only; further ones cost one logarithm per
        parameter. If one structure joins layers with different δ, they cost a determinant.

        Args:
            prior_precision: δ, one or one for each layer by name; the present one by default.
            noise_variance: Variance σ² of Gaussian noise; that of ``likelihood`` by default. θ* is
                taken for the maximum for any δ and σ².

        Returns:
            A number; or, if an argument is a tensor or has some, a float64 scalar that can be
            differentiated with respect to them.

        Raises:
            TypeError: If a variance is given and the likelihood is not Gaussian.
            ValueError: If an argument is out of range, or there are no data yet.
        """
        delta = self._prior_precision if prior_precision is None else prior_precision
        if isinstance(delta, Mapping):
            check_layers(delta, self.layers)
        given = [*(delta.values() if isinstance(delta, Mapping) else [delta]), noise_variance]
        for one in given:
            number = one.detach() if isinstance(one, Tensor) else one
            if number is not None and not 0 < float(number) < math.inf:
                raise ValueError(
                    f"prior precisions and noise variance must be positive and finite, got {one}"
                )
        noise: Any = self._noise
        if noise_variance is not None:
            noise = noise * noise_variance / self._gaussian("noise_variance").variance
        found = self._evidence_at_mode().value(delta, noise)
        return found if any(isinstance(one, Tensor) for one in given) else float(found)

    def _evidence_at_mode(self) -> Evidence:
        if self._evidence is None:
            layers, own = self.layers, self._uncertain
            mean = checked_mean(self._prior_mean, own.matrix.layout)
            deviations = own.of_parts(self._mean - mean)
            self._evidence = Evidence(
                layers, own.parts, own.owners, deviations, self._seen, self.temperature, self._noise
            )
        return self._evidence

    def _gaussian(self, what: str) -> Gaussian:
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"{what} needs a gaussian likelihood, not {self.likelihood!r}")
        return self.likelihood

    def optimize_prior_precision(
        self,
        lowest: float = 1e-4,
        highest: float = 1e6,
        *,
        per_layer: bool = False,
        noise: bool = False,
    ) -> Any:
        """Set δ to the maximum of the evidence and return it.

        One δ alone is searched on a grid, to a thousandth. More variables are then moved together
        by L-BFGS from there, so their maximum may be a local one.

        Args:
            lowest: Smallest δ tried.
            highest: Largest δ tried.
            per_layer: Whether each layer has a δ of its own.
            noise: Whether the variance of Gaussian noise is chosen with it, and set in
                ``likelihood``.

        Returns:
            δ, or δ by layer.

        Raises:
            TypeError: If ``noise`` is asked for and the likelihood is not Gaussian.
            ValueError: If ``lowest`` and ``highest`` are not positive and finite, in this order.
        """
        evidence, start = self._evidence_at_mode(), self._noise
        if noise:
            self._gaussian("noise=True")
            residuals = 2.0 * self._seen.loss / max(self._seen.observed, 1.0)
            start = max(residuals, 1e-8)
        variance = None
        if start != self._noise:
            variance = cast("Gaussian", self._first_likelihood).variance * start
        best = self._best_precision(lowest, highest, noise_variance=variance)
        if not (per_layer or noise):
            self.prior_precision = best
            return best
        names = self.layers if per_layer else ("",)
        found, factor = evidence.maximize(
            dict.fromkeys(names, best), start, (lowest, highest), noise
        )
        if noise:
            self._set_noise(factor)
            self._take(self._fitted, self._seen)
        self.prior_precision = found if per_layer else found[""]
        return self.prior_precision

    def _set_noise(self, noise: float) -> None:
        """Make the variance of Gaussian noise so many times that of the losses."""
        self._noise, own = noise, self._first_likelihood
        if isinstance(own, Gaussian):
            self.likelihood = dataclasses.replace(own, variance=own.variance * noise)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors and plain values, without the model.

        ``torch.load(..., weights_only=True)`` reads it.

        Raises:
            ValueError: If there are no data yet.
        """
        curvature, mean = self._fitted, self._prior_mean
        names = curvature.layout.names
        return {
            "structure": self.structure.name,
            "parameters": list(names),
            "mean": self._mean,
            "statistics": saved_statistics(curvature),
            "observations": dataclasses.asdict(self._seen),
            "updates": self._updates,
            "noise": self._noise,
            "temperature": self.temperature,
            "prior_precision": self.prior_precision,
            "prior_mean": {n: mean[n] for n in names} if isinstance(mean, Mapping) else mean,
            "masks": self._masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, of a posterior made with the same options.

        Args:
            state: What it returned.

        Raises:
            ValueError: If it is of another structure, of a model with other parameters, or no
                state of a posterior.
        """
        if "structure" not in state or "observations" not in state:
            raise ValueError("this is no state dict of a Laplace posterior")
        if state["structure"] != self.structure.name:
            raise ValueError(
                f"the state is of structure {state['structure']!r}, and this posterior's is "
                f"{self.structure.name!r}"
            )
        trainable, names = self._trainable, frozenset(state["parameters"])
        unknown = sorted(names - set(dict(self.model.named_parameters())))
        if unknown:
            raise ValueError(f"the state has parameters that the model has not: {unknown}")
        self._trainable = names
        try:
            with self._only_trainable(), self._capture() as capture:
                blocks = {name: block.layout for name, block in capture.blocks.items()}
                curvature = Curvature(self.structure, blocks, capture.layout)
            self._check_parameters(state["mean"], curvature.layout)
            load_statistics(curvature, state["statistics"])
        except BaseException:
            self._trainable = trainable
            raise
        self.temperature, self._updates = state["temperature"], state["updates"]
        self._prior_mean, self._prior_precision = state["prior_mean"], state["prior_precision"]
        self._masks = state["masks"]
        self._set_noise(state["noise"])
        self._take(curvature, Observations(**state["observations"]))


def saved_statistics(curvature: Curvature) -> dict[str, Any]:
    """Return part name → what is summed up in it."""
    state = {}
    for name, entry in curvature.state_dict().items():
        estimate = curvature.estimates[name]
        own = estimate.average
        # A checkpoint of training leaves rows out, as they are of one batch; here they are all.
        rows = own.rows() if isinstance(own, RowStatistics) else None
        kept = {key: entry[key] for key in ("average", "draws", "sizes", "matrices")}
        state[name] = {**kept, "rows": rows, "absent": estimate.absent}
    return state


def load_statistics(curvature: Curvature, state: Mapping[str, Any]) -> None:
    """Restore what :func:`saved_statistics` returned, which must have the same parts and sizes."""
    plain = {n: {**entry, "inverse": None, "damping": 0.0} for n, entry in state.items()}
    estimates = curvature.restored(plain)
    for name, estimate in estimates.items():
        entry, average = state[name], estimate.average
        if isinstance(average, RowStatistics) and entry["rows"] is not None:
            average = average.with_rows([entry["rows"]], curvature.parts[name].layout)
        estimates[name] = dataclasses.replace(estimate, average=average, absent=entry["absent"])
    curvature.estimates = estimates
