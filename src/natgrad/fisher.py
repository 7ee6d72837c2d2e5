r"""Fisher types: which output vectors are pulled back, and the function that builds a Fisher.

Every type gives vectors :math:`v_{nk}` such that
:math:`F = \frac{1}{count} \sum_{nk} J_n^\top v_{nk} v_{nk}^\top J_n`: columns of the square root
of the output Hessian (``exact``), pseudo-gradients of sampled labels (``mc``), or gradients at the
true labels (``empirical``), or those divided by their norms (``improved``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import FisherMatrix, make_structure
from natgrad.curvature.base import RowReceiver
from natgrad.curvature.exact_rows import ScaledRows
from natgrad.jacobians import Jacobians, LinearJacobian
from natgrad.likelihoods import Likelihood, as_likelihood

__all__ = [
    "FISHER_TYPES",
    "EmpiricalFisher",
    "ExactFisher",
    "FisherType",
    "ImprovedFisher",
    "MonteCarloFisher",
    "as_fisher_type",
    "fisher_matrix",
]

#: Vectors are pulled back in chunks whose gradients at all layers' outputs have at most this many
#: entries together (2^26 float32 = 256 MiB).
CHUNK_ELEMENTS = 2**26


class FisherType(ABC):
    """Which output vectors define the Fisher matrix."""

    #: Name under which it is known.
    name: ClassVar[str]
    #: Whether the user's own backward pass already carries the rows.
    from_user_gradients = False
    #: Whether the vectors of different samples are independent with mean zero.
    independent: ClassVar[bool] = False

    def directions(self, outputs: int) -> int:
        """Return how many vectors are pulled back per sample with so many outputs."""
        return outputs

    @abstractmethod
    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the vectors to pull back, ``(K, *output.shape)``.

        Args:
            likelihood: The likelihood.
            output: Model output, ``(N, ...)``, detached.
            weights: Event weights ``(N, E)``.
            generator: Source of randomness.
            target: True target, where it is known.
            cotangent: Gradient of the user's loss with respect to the output, where it is known.
        """

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return ``u`` (N, K) with ``Σ_k vectors_kn u_nk = cotangent_n``, or None.

        With it a natural gradient in sample space needs no division by the damping: if
        ``∇L = Jᵀu`` then ``(F + λI)⁻¹∇L = Jᵀ (JJᵀ/count + λI)⁻¹ u`` (push-through identity).
        """
        return None

    def row_scales(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Return scales t and coordinates u of :class:`ScaledRows`, ``(N·K,)`` each, or None.

        A type that returns them has its damping added in the units of ``TJJᵀT/count`` by the
        structures that keep exact rows. The arguments are those of :meth:`vectors`.
        """
        return None


@dataclass(frozen=True)
class ExactFisher(FisherType):
    """The Fisher matrix itself: expectation over the model's labels, in closed form."""

    name: ClassVar[str] = "exact"

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the columns of the square root of the output Hessian."""
        return likelihood.root_vectors(output) * _like_output(likelihood, output, weights.sqrt())

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return ``S⁺ r``."""
        plain = likelihood.root_inverse_apply(output, cotangent)
        columns = plain.shape[1] // weights.shape[1]
        scale = weights.sqrt().repeat_interleave(columns, dim=1)
        return torch.where(scale > 0, plain / scale, torch.zeros_like(plain))


@dataclass(frozen=True)
class MonteCarloFisher(FisherType):
    """Labels sampled from the model.

    Attributes:
        samples: Draws per input; the error falls as one over its square root.
    """

    name: ClassVar[str] = "mc"
    independent: ClassVar[bool] = True
    samples: int = 1

    def directions(self, outputs: int) -> int:
        """Return the number of draws."""
        return self.samples

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return one pseudo-gradient per draw, scaled by ``1/√samples``."""
        drawn = likelihood.sampled_vectors(output, generator, self.samples)
        return drawn * _like_output(likelihood, output, weights.sqrt())


@dataclass(frozen=True)
class EmpiricalFisher(FisherType):
    """Gradients at the true labels. Cheap, but not the Fisher matrix (Kunstner et al. 2019)."""

    name: ClassVar[str] = "empirical"
    from_user_gradients = True

    def directions(self, outputs: int) -> int:
        """Return 1."""
        return 1

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of each sample's weighted loss."""
        if target is None:
            raise ValueError("the empirical Fisher matrix needs the true targets")
        return likelihood.gradient(output, target).unsqueeze(0)


@dataclass(frozen=True)
class ImprovedFisher(FisherType):
    r"""Gradients at the true labels, each divided by its norm at the output (iEF).

    .. math:: F^\star = \frac{1}{count} \sum_n \frac{w_n}{s_n} g_n g_n^\top, \qquad
              s_n = \|\partial \ell_n / \partial f_n\|^2

    with ``g_n = J_nᵀ ∂ℓ_n/∂f_n``. The empirical Fisher matrix weighs a sample less the better it
    is fitted, so that its natural gradient grows without bound for fitted samples; the scaling
    undoes that. For one output per sample it is the Gauss-Newton matrix. It costs one vector per
    sample to pull back. With several events per sample (tokens) each event is normalised on its
    own and gets a random sign, which leaves the cross terms between events zero on average.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """

    name: ClassVar[str] = "improved"

    def directions(self, outputs: int) -> int:
        """Return 1."""
        return 1

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised gradients times the roots of the event weights, K = 1."""
        if target is not None:
            gradient = likelihood.gradient(output, target)
        elif cotangent is not None:
            gradient = cotangent.to(weights.dtype)
        else:
            raise ValueError("the improved empirical Fisher matrix needs the true targets")
        events = likelihood.split_events(gradient)  # (N, E, C)
        squares = events.square().sum(-1)
        # Fitted events have s → 0 with a bounded ratio; the mean sets the scale of rounding.
        floor = torch.finfo(squares.dtype).eps * squares.mean()
        scale = weights.to(squares).sqrt() * (squares + floor).rsqrt()
        scale = torch.where(squares > 0, scale, torch.zeros_like(scale))
        if events.shape[1] > 1:
            draws = torch.randint(0, 2, squares.shape, generator=generator, device=squares.device)
            scale = scale * (2.0 * draws - 1.0)
        return likelihood.merge_events(events * scale.unsqueeze(-1), output).unsqueeze(0)

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return the norms of the gradients; None with several events, which share a row."""
        if weights.shape[1] > 1:
            return None
        vectors = self.vectors(likelihood, output, weights, cotangent=cotangent)[0].flatten(1)
        norm = vectors.square().sum(1)
        inner = (vectors * cotangent.flatten(1).to(vectors.dtype)).sum(1)
        share = torch.where(norm > 0, inner / torch.where(norm > 0, norm, 1.0), 0.0)
        return share.unsqueeze(1)


@dataclass(frozen=True)
class GramDampedImprovedFisher(ImprovedFisher):
    r"""The improved empirical Fisher matrix with damping on the Gram matrix of loss gradients.

    .. math:: \Delta = G^\top (G G^\top + count\,\lambda I)^{-1} D w^{1/2}
              = (\tilde F + \lambda I)^{-1} \frac{1}{count} \sum_n w_n s_n g_n, \qquad
              \tilde F = \frac{1}{count} \sum_n w_n g_n g_n^\top

    with rows ``√w_n g_n`` of G and ``D = diag(s)``. The rows of :class:`ImprovedFisher` are those
    divided by ``√s_n``, hence its scales ``t_n = √s_n``. It makes a difference only to structures
    that keep exact rows, when they precondition a gradient, and takes one event per sample.
    """

    def row_scales(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``√s`` and ``√(ws)``, for gradients of the loss without its reduction or scale.

        Raises:
            ValueError: If samples have several events.
        """
        if weights.shape[1] > 1:
            raise ValueError(
                f"damping_rule='gram' needs one event per sample, and there are {weights.shape[1]} "
                "(tokens or pixels): use damping_rule='fisher'"
            )
        roots = weights[:, 0].sqrt()
        if target is not None:
            gradient = likelihood.gradient(output, target)
        elif cotangent is not None:
            _, scale = likelihood.infer_event_weights(output, cotangent)
            gradient = cotangent.to(weights.dtype) / scale
        else:
            raise ValueError("the improved empirical Fisher matrix needs the true targets")
        weighted = gradient.flatten(1).norm(dim=1)  # w_n √s_n
        scales = torch.where(roots > 0, weighted / roots.square(), torch.zeros_like(weighted))
        return scales, roots * scales


#: Name → function of ``mc_samples`` that makes the Fisher type.
FISHER_TYPES: dict[str, Callable[[int], FisherType]] = {
    "exact": lambda mc_samples: ExactFisher(),
    "mc": MonteCarloFisher,
    "empirical": lambda mc_samples: EmpiricalFisher(),
    "improved": lambda mc_samples: ImprovedFisher(),
}


def as_fisher_type(fisher: str | FisherType, mc_samples: int = 1) -> FisherType:
    """Return the Fisher type of a name.

    Raises:
        ValueError: If the name is unknown or ``mc_samples`` is not positive.
    """
    if isinstance(fisher, FisherType):
        return fisher
    if fisher not in FISHER_TYPES:
        raise ValueError(f"fisher must be one of {', '.join(sorted(FISHER_TYPES))}, got {fisher!r}")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
    return FISHER_TYPES[fisher](mc_samples)


def _like_output(likelihood: Likelihood, output: Tensor, per_event: Tensor) -> Tensor:
    """Spread event values ``(N, E)`` over the output's shape."""
    events = likelihood.split_events(output)
    spread = per_event.to(output.device).unsqueeze(-1).expand(events.shape)
    return likelihood.merge_events(spread, output)


def update_from_output(
    structure: RowReceiver,
    capture: Capture,
    likelihood: Likelihood,
    fisher: FisherType,
    output: Tensor,
    weights: Tensor,
    count: Tensor,
    *,
    generator: torch.Generator | None = None,
    target: Tensor | None = None,
    cotangent: Tensor | None = None,
    retain_graph: bool = True,
) -> None:
    """Pull the Fisher's vectors back through a recorded pass and add the rows to a structure.

    Structures that are sums over rows take the vectors in chunks, so that memory stays bounded for
    many classes or tokens.
    """
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        detached = output.detach()
        vectors = fisher.vectors(likelihood, detached, weights, generator, target, cotangent)
        scaled = fisher.row_scales(likelihood, detached, weights, target, cotangent)
    skip_silent = bool((weights == 0).any())
    total = vectors.shape[0]
    step = total
    if structure.additive:
        step = max(1, min(total, CHUNK_ELEMENTS // max(1, capture.find_pass(output).elements)))
    active: dict[str, Tensor | None] = {}
    if skip_silent and step < total:
        # Which positions any of the vectors reaches: those a random combination of them reaches.
        probe = torch.Generator(vectors.device).manual_seed(0)
        mix = torch.randn(total, generator=probe, device=vectors.device, dtype=vectors.dtype)
        combined = torch.tensordot(mix, vectors, dims=1).unsqueeze(0)
        found = capture.pull_back(output, combined, skip_silent=True)
        active = _active_positions(found)
    for start in range(0, total, step):
        stop = min(start + step, total)
        jacobians = capture.pull_back(
            output,
            vectors[start:stop],
            retain_graph=retain_graph or stop < total,
            skip_silent=skip_silent,
            independent=fisher.independent and structure.additive,
        )
        for name, positions in active.items():
            block = jacobians.get(name)
            if isinstance(block, LinearJacobian):
                block.active_positions = positions
        if scaled is not None:
            jacobians = ScaledRows(jacobians, *scaled)
        structure.update(jacobians, count if start == 0 else torch.zeros_like(count))


def _active_positions(jacobians: Jacobians) -> dict[str, Tensor | None]:
    return {
        name: block.active_positions
        for name, block in jacobians.items()
        if isinstance(block, LinearJacobian)
    }


Batch = tuple[Any, "Tensor | None"]


def fisher_matrix(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: str | Likelihood | nn.Module = "categorical",
    structure: str = "kfac",
    fisher: str | FisherType = "exact",
    *,
    mc_samples: int = 1,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    **structure_options: Any,
) -> FisherMatrix:
    r"""Return the Fisher matrix of a model on some data, in a chosen structure.

    .. math:: F = \frac{1}{count} \sum_n J_n^\top \Lambda_n J_n

    Args:
        model: Any module; it runs in its present train or eval mode. Gradients, the random state
            and the hooks of the model are left as they were.
        data: A pair ``(inputs, targets)`` or an iterable of such pairs. Inputs may be a tensor, a
            tuple of positional arguments or a dict of keyword arguments. Targets give ignored
            events and weights, and the labels of the empirical and improved Fisher; they may be
            None for ``exact`` and ``mc``.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        structure: ``"full"``, ``"block_diagonal"``, ``"block_tridiagonal"``, ``"unit_wise"``,
            ``"diagonal"``, ``"kfac"``, ``"ekfac"``, ``"tkfac"``, ``"tekfac"``, ``"kpsvd"``,
            ``"two_level"``, ``"singd"``, ``"conjugate_gradient"`` or ``"thermodynamic"``.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        seed: Seed of those draws.
        output: Picks the tensor the likelihood looks at out of the model's output.
        **structure_options: Options of the structure, e.g. ``weight_sharing="reduce"`` for kfac.

    Returns:
        The Fisher matrix, ``P × P`` with ``P`` the number of trainable parameters, in the order of
        :func:`torch.nn.utils.parameters_to_vector`.

    Raises:
        ValueError: If a name is unknown, the data is empty, or a parameter cannot be covered.

    Example:
        >>> F = natgrad.fisher_matrix(model, (x, y), structure="kfac")
        >>> step = F.solve(gradient, damping=1e-3)
    """
    likelihood = as_likelihood(likelihood)
    fisher = as_fisher_type(fisher, mc_samples)
    with Capture(model, output) as capture:
        capture.check_covered()
        matrix = make_structure(structure, capture.blocks, capture.layout, **structure_options)
        generators: dict[torch.device, torch.Generator] = {}
        batches = 0
        for inputs, target in _batches(data):
            batches += 1
            with evaluated(capture, inputs) as found:
                generator = generators.setdefault(
                    found.device, torch.Generator(found.device).manual_seed(seed)
                )
                detached = found.detach()
                update_from_output(
                    matrix,
                    capture,
                    likelihood,
                    fisher,
                    found,
                    likelihood.event_weights(detached, target),
                    likelihood.count(detached, target),
                    generator=generator,
                    target=target,
                    retain_graph=False,
                )
    if batches == 0:
        raise ValueError("data has no batches, so there is nothing to estimate a Fisher from")
    return matrix


def _batches(data: Any) -> Iterator[Batch]:
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if pair and (data[1] is None or isinstance(data[1], Tensor)):
        yield data[0], data[1]
        return
    for batch in data:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                "data must be a pair (inputs, targets) or an iterable of such pairs, got a batch "
                f"of type {type(batch).__name__}"
            )
        yield batch[0], batch[1]
