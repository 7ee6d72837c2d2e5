"""From a model and data, or from one recorded pass, to a Fisher matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.capture.model_output import unwrap
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.distributed import Replicas
from natgrad.distributed.replicas import PlacedGenerator
from natgrad.distributed.shards import mesh_groups
from natgrad.fisher.batches import Batch, batches_of
from natgrad.fisher.types import FisherType, as_fisher_type
from natgrad.jacobians import Jacobians, LinearJacobian, SumJacobian
from natgrad.jacobians.collection import ScaledRows
from natgrad.likelihoods import Likelihood, LikelihoodLike, as_likelihood
from natgrad.operators import FisherMatrix

#: Vectors are pulled back in chunks whose gradients at all layers' outputs have at most this many
#: entries together (2^26 float32 = 256 MiB).
PULL_BACK_ELEMENTS = 2**26


class RowReceiver(Protocol):
    """What takes the rows that are pulled back from the output, as curvature does."""

    @property
    def additive(self) -> bool:
        """Whether rows may come in chunks."""

    @property
    def by_layer(self) -> bool:
        """Whether rows of different layers are never multiplied with each other."""

    def observe(
        self, jacobians: Jacobians, count: Tensor | float, *, continued: bool = False
    ) -> None:
        """Take rows; see :meth:`natgrad.curvature.Curvature.observe`."""


def update_from_output(
    receiver: RowReceiver,
    capture: Capture,
    likelihood: Likelihood,
    fisher: FisherType,
    output: Tensor,
    weights: Tensor,
    count: Tensor,
    *,
    partial: Tensor | None,
    generator: torch.Generator | None = None,
    target: Tensor | None = None,
    cotangent: Tensor | None = None,
    retain_graph: bool = True,
) -> None:
    """Pull the Fisher's vectors back through a recorded pass and hand the rows on.

    Receivers that sum over rows take the vectors in chunks, so that memory stays bounded for many
    classes or tokens.

    Args:
        receiver: What takes the rows.
        capture: What recorded the pass.
        likelihood: What the output means.
        fisher: Which vectors are pulled back.
        output: The pass's output, with its graph.
        weights: Event weights, ``(N, E)``.
        count: Their sum, as a mean-reduced loss divides by it.
        partial: What :func:`partial_samples` finds in the weights, or zeros where another process
            finds some: samples whose positions that no vector reaches are left out of input
            factors.
        generator: Source of randomness.
        target: True target, where it is known.
        cotangent: Gradient of the user's loss with respect to the output, where it is known.
        retain_graph: Keep the graph for a later backward pass.
    """
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        detached = output.detach()
        vectors = fisher.vectors(likelihood, detached, weights, generator, target, cotangent)
        scaled = fisher.row_scales(likelihood, detached, weights, target, cotangent)
    total = vectors.shape[0]
    step = total
    if receiver.additive:
        step = max(1, min(total, PULL_BACK_ELEMENTS // max(1, capture.find_pass(output).elements)))
    independent = fisher.independent and receiver.additive and receiver.by_layer
    active: dict[tuple[str, int], Tensor | None] = {}
    if partial is not None and step < total:
        # Which positions any of the vectors reaches: those a random combination of them reaches.
        probe = torch.Generator(vectors.device).manual_seed(0)
        mix = torch.randn(total, generator=probe, device=vectors.device, dtype=vectors.dtype)
        combined = torch.tensordot(mix, vectors, dims=1).unsqueeze(0)
        found = capture.pull_back(output, combined, partial=partial, independent=independent)
        active = {place: rows.active_positions for place, rows in _linear_rows(found)}
    for start in range(0, total, step):
        stop = min(start + step, total)
        jacobians = capture.pull_back(
            output,
            vectors[start:stop],
            retain_graph=retain_graph or stop < total,
            partial=partial,
            independent=independent,
        )
        for place, rows in _linear_rows(jacobians) if active else ():
            if place in active:
                rows.active_positions = active[place]
        if scaled is not None:
            jacobians = ScaledRows(jacobians, *scaled)
        receiver.observe(jacobians, count, continued=start > 0)


def draw_in_step(
    likelihood: Likelihood, fisher: FisherType, output: Tensor, generator: PlacedGenerator
) -> None:
    """Draw the random numbers of a batch of which no sample of this process counts.

    Other processes need them, and the next batch begins after them everywhere. The output is ``(N,
    ...)``, detached, where N may be 0; the generator knows the place of its samples.
    """
    if not fisher.draws:
        return
    place = generator.place
    if len(output) == 0:  # As if it had one sample of the batch.
        output = output.new_zeros(1, *output.shape[1:])
        generator.place = replace(place, before=0, samples=1)
    with torch.no_grad():
        weights, nothing = likelihood.event_weights(output), torch.zeros_like(output)
        fisher.vectors(likelihood, output, weights, generator, cotangent=nothing)
    generator.place = place


def partial_samples(weights: Tensor) -> Tensor | None:
    """Return of which samples some of the events do not count, ``(N,)``; None for none."""
    found = (weights == 0).flatten(1).any(1)
    return found if bool(found.any()) else None


def _linear_rows(jacobians: Jacobians) -> Iterator[tuple[tuple[str, int], LinearJacobian]]:
    """Yield the rows of linear maps, with their blocks' names and places within them."""
    for name, block in jacobians.items():
        for place, rows in enumerate(block.parts if isinstance(block, SumJacobian) else [block]):
            if isinstance(rows, LinearJacobian):
                yield (name, place), rows


def fisher_matrix(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: LikelihoodLike = "categorical",
    structure: str | Structure = "kfac",
    fisher: str | FisherType = "exact",
    *,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    batch_dim: int | None = None,
    process_group: Any = None,
    **structure_options: Any,
) -> FisherMatrix:
    r"""Return the Fisher matrix of a model on some data, in a chosen structure.

    .. math:: F = \frac{1}{count} \sum_n J_n^\top \Lambda_n J_n

    Several processes that have a share of the data each (``process_group=``, or a model wrapped in
    DistributedDataParallel or sharded by ``fully_shard``) make one matrix of the data of all of
    them, and all must call it. It is the one that a single process makes of batches that are
    theirs laid end to end, the first ones, the second ones and so on; who has fewer waits.

    Args:
        model: Any module; it runs in its present train or eval mode. Gradients, the random state
            and the hooks of the model are left as they were.
        data: A pair ``(inputs, targets)`` or an iterable of such pairs. Inputs may be a tensor, a
            tuple of positional arguments or a dict of keyword arguments. Targets give ignored
            events and weights, and the labels of the empirical and improved Fisher; they may be
            None for ``exact`` and ``mc``. NaN in a target of a regression means that it is missing.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module, whose mean over
            outputs is then in F as in the loss (names stand for sums over outputs); for several
            outputs a mapping from their keys to such, and targets are a mapping, too.
        structure: A name in :data:`natgrad.curvature.STRUCTURES`, or a
            :class:`natgrad.curvature.Structure`. SINGD's is filled by training alone: here it is
            the identity, with a warning. An object keeps its options, whose defaults are those of
            training: ``KroneckerFactors()`` takes a random subset of the positions where they are
            many, and splits the damping, the name ``"kfac"`` neither.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"``, ``"improved"`` or a :class:`FisherType` with
            options of its own, such as ``MonteCarloFisher(samples=10)``.
        seed: Seed of sampled labels.
        output: Picks the tensor the likelihood looks at out of the model's output.
        batch_dim: The dimension of that tensor, and of targets of as many dimensions, that holds
            the samples; by default the first, or the second where they turn out to lie there.
        process_group: Processes whose data it is, with equal models; by default those that the
            model is wrapped or sharded for, and no others. Pass ``model.module`` for the data of
            this process alone.
        **structure_options: Options of the structure, e.g. ``weight_sharing="reduce"`` for kfac.

    Returns:
        The Fisher matrix, ``P × P`` with ``P`` the number of trainable parameters, in the order of
        :func:`torch.nn.utils.parameters_to_vector`.

    Raises:
        ValueError: If a name is unknown, the data is empty or no target counts, or a parameter
            cannot be covered.

    Example:
        >>> F = natgrad.fisher_matrix(model, (x, y), structure="kfac")
        >>> P = F.inverse(damping=1e-3)  # factorised once
        >>> step = P @ gradient
    """
    chosen = as_structure(structure, **structure_options)
    if chosen.recursive:
        warnings.warn(
            f"structure {chosen.name!r} is the state of a recursion, which one look at data "
            "leaves at the identity: take 'kfac', which it follows in training",
            stacklevel=2,
        )
    curvature = curvature_of(
        model,
        data,
        as_likelihood(likelihood),
        chosen,
        as_fisher_type(fisher),
        seed=seed,
        output=output,
        batch_dim=batch_dim,
        process_group=process_group,
    )
    return curvature.matrix()


def curvature_of(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: Likelihood,
    structure: Structure,
    fisher: FisherType,
    *,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    batch_dim: int | None = None,
    process_group: Any = None,
    known: Curvature | None = None,
) -> Curvature:
    """Return the sums over some data that :func:`fisher_matrix`, of the same arguments, takes.

    They are added to those over earlier data (``known``), in place, if there are some.

    Raises:
        ValueError: If the data is empty or no target counts, or a parameter cannot be covered.
    """
    mesh, _ = mesh_groups(unwrap(model))
    replicas = Replicas.of(model, process_group or mesh)
    with Capture(
        model, likelihood.selection(output), batch_dim=batch_dim, shards=mesh is not None
    ) as capture:
        capture.check_covered()
        layouts = {name: block.layout for name, block in capture.blocks.items()}
        curvature = Curvature(structure, layouts, capture.layout) if known is None else known
        curvature.replicas = replicas
        generators: dict[torch.device, PlacedGenerator] = {}
        batches, count = 0, 0.0
        for batch in batches_together(batches_of(data), replicas, capture):
            batches += 1
            count += _take_batch(curvature, capture, likelihood, fisher, batch, generators, seed)
            curvature.join(counts_absent=True)
    if batches == 0:
        raise ValueError("data has no batches, so there is nothing to estimate a Fisher from")
    home = curvature.layout.device
    if not float(replicas.summed(torch.tensor(count, dtype=torch.float64, device=home), home)) > 0:
        raise ValueError("no target of the data counts, so there is nothing to learn from")
    return curvature


def _take_batch(
    curvature: Curvature,
    capture: Capture,
    likelihood: Likelihood,
    fisher: FisherType,
    batch: Batch | None,
    generators: dict[torch.device, PlacedGenerator],
    seed: int,
) -> float:
    """Hand the rows of this process's share in a batch on; return the number of its data points."""
    replicas, home = curvature.replicas, capture.layout.device
    if batch is None:
        replicas.placed(0, [False], home)
        return 0.0
    inputs, target = batch
    with evaluated(capture, inputs) as found:
        if target is not None:
            target = capture.find_pass(found).samples_first(target)
        if found.device not in generators:
            generators[found.device] = PlacedGenerator(found.device)
            generators[found.device].manual_seed(seed)
        generator, detached = generators[found.device], found.detach()
        own = likelihood.of_shapes(capture.find_pass(found).heads)
        is_empty = detached.numel() == 0
        weights = None if is_empty else own.event_weights(detached, target)
        partial = None if weights is None else partial_samples(weights)
        place, flags = replicas.placed(len(found), [partial is not None], home)
        if partial is None and any(flag for (flag,) in flags):
            partial = detached.new_zeros(len(found), dtype=torch.bool)
        generator.place = curvature.place = place
        if weights is None:
            draw_in_step(own, fisher, detached, generator)
            return 0.0
        count = own.count(detached, target)
        update_from_output(
            curvature,
            capture,
            own,
            fisher,
            found,
            weights,
            count,
            partial=partial,
            generator=generator,
            target=target,
            retain_graph=False,
        )
        return float(count)


def batches_together(
    batches: Iterator[Batch], replicas: Replicas, capture: Capture
) -> Iterator[Batch | None]:
    """Yield a process's own batches, and None while others have some, if the model allows."""
    while True:
        batch = next(batches, None)
        have = [batch is not None]
        if not replicas.are_alone:
            have = [bool(one) for (one,) in replicas.told(have, capture.layout.device)]
        if not any(have):
            return
        if capture.shards and not all(have):
            raise ValueError(
                "processes have different numbers of batches, and a model in shards runs in all "
                "processes together: give them equal numbers of batches, of any sizes"
            )
        yield batch
