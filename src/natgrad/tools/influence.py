r"""Influence functions: which training samples a prediction is made of.

With the gradients g of the losses of single samples and the Fisher matrix F of the training data,

.. math:: score_{mn} = g_m^\top (F + \lambda I)^{-1} g_n .

Leaving training sample n out of the mean over N data points moves the optimum by
``(F + λI)⁻¹g_n/N``, and so the loss of test sample m by ``score/N``, to first order in 1/N.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.arguments import check_kind
from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import Structure, as_structure
from natgrad.distributed.replicas import check_alone
from natgrad.fisher import Batch, ExactFisher, FisherType, as_fisher_type, fisher_matrix
from natgrad.fisher.batches import batches_of, check_fixed_order
from natgrad.jacobians import (
    CHUNK_ELEMENTS,
    EmbeddingJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
)
from natgrad.likelihoods import Likelihood, LikelihoodLike, as_likelihood
from natgrad.operators import FisherMatrix
from natgrad.optim import RelativeDamping
from natgrad.tools.factor_cache import cached_matrix
from natgrad.tools.linear_system import part_dampings

Data = Batch | Iterable[Batch]


def influence(
    model: nn.Module,
    train: Data,
    test: Data,
    likelihood: LikelihoodLike = "categorical",
    structure: str | Structure = "ekfac",
    fisher: str | FisherType = "exact",
    *,
    damping: float | RelativeDamping = RelativeDamping(1.0),  # noqa: B008
    leave_one_out: bool = False,
    per_layer: bool = False,
    memory: float = 2**30,
    matrix: FisherMatrix | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    **structure_options: Any,
) -> Tensor | dict[str, Tensor]:
    r"""Return how much every training sample bears on the loss of every test sample.

    A score above 0 means that the training sample lowers the test sample's loss: without it that
    loss would be higher, by about ``score/N`` for N training data points.

    Gradients of single samples stay factored. What is kept at a time are the preconditioned
    gradients of as many test samples as fit ``memory``, ``P`` numbers each; the training data are
    read once for each such group. Beside them there are the rows of one batch, and temporaries of
    at most :data:`natgrad.jacobians.CHUNK_ELEMENTS` numbers.

    Args:
        model: The trained model; it runs in its present mode (call ``model.eval()`` first).
        train: Training data: a pair ``(inputs, targets)``, which is one batch, or a re-iterable of
            such pairs in a fixed order, as a data loader that does not shuffle.
        test: Test data, likewise.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module. The loss of a
            sample is the sum over its events (tokens).
        structure: Structure of the Fisher matrix.
        fisher: Fisher type.
        damping: λ, in the units of F; a :class:`natgrad.RelativeDamping` is a share of the mean
            eigenvalue of every part. The default is that eigenvalue itself; Grosse et al. take a
            tenth of it.
        leave_one_out: Return what leaving the sample out changes in the test loss, to first order
            in the change of the parameters: ``g_mᵀ(N(F + λI) − J_nᵀΛ_nJ_n)⁻¹g_n``. That is the
            score over N with its leverage correction, in regression ``1/(1 − h_n)``, and one Newton
            step towards the model without the sample. It takes one vector to pull back per output,
            and a matrix that holds all of a sample's own part, as exact ``"full"`` ones do.
        per_layer: Return the contribution of every block, which add up to the score.
        memory: Bytes for the preconditioned gradients of test samples, default 1 GiB.
        matrix: F, if it is known already; ``structure``, ``fisher``, ``seed`` and ``cache`` then
            mean nothing.
        cache: A file to keep F in. It is read again if model, training data, likelihood, structure,
            Fisher type, seed and output are the same, and written anew otherwise.
        progress: Show a progress bar; needs rich.
        seed: Seed of sampled labels.
        output: Picks the tensor the likelihood looks at out of the model's output.
        **structure_options: Options of the structure.

    Returns:
        Scores ``(M, N)`` for M test and N training samples, or block name → such.

    Raises:
        TypeError: If ``matrix`` is none of :func:`natgrad.fisher_matrix`.
        ValueError: If an argument is out of range, data are empty, shuffled or without targets, the
            structure cannot be kept in a file, or a sample has a leverage of 1 or more.

    Source: Koh & Liang, Understanding black-box predictions via influence functions (2017); Grosse
    et al., Studying large language model generalization with influence functions (2023).

    Example:
        >>> scores = natgrad.tools.influence(model, train_loader, (x_test, y_test))
        >>> most_helpful = scores.topk(5).indices  # (M, 5)
    """
    likelihood = as_likelihood(likelihood)
    for name, data in {"train": train, "test": test}.items():
        check_fixed_order(data, name)
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    if matrix is not None:
        check_kind("matrix", matrix, FisherMatrix)
    else:
        check_alone(model, "influence without matrix=")
        chosen, kind = as_structure(structure, **structure_options), as_fisher_type(fisher)
        make = functools.partial(
            fisher_matrix, model, train, likelihood, chosen, kind, seed=seed, output=output
        )
        matrix = make() if cache is None else cached_matrix(
            cache, make, model, train, likelihood, chosen, kind, seed, likelihood.selection(output)
        )  # fmt: skip
    inverse = matrix.inverse(part_dampings(matrix, damping))
    rows: dict[str, list[Tensor]] = {}
    with Capture(model, likelihood.selection(output)) as capture:
        count = _count(capture, likelihood, train) if leave_one_out else None
        for group in _groups(capture, likelihood, test, inverse, memory):
            found: dict[str, list[Tensor]] = {}
            removal = None if count is None else (inverse, count)
            for batch in _shown(train, progress):
                for jacobians in _sample_gradients(capture, likelihood, [batch], removal):
                    for name, values in _scores(jacobians, group, per_layer).items():
                        found.setdefault(name, []).append(values)
            if not found:
                raise ValueError("train has no samples, so there is nothing to score")
            for name, pieces in found.items():
                rows.setdefault(name, []).append(torch.cat(pieces, 1))
    if not rows:
        raise ValueError("test has no samples, so there is nothing to score")
    scores = {name: torch.cat(pieces) for name, pieces in rows.items()}
    return scores if per_layer else scores[""]


def _sample_gradients(
    capture: Capture,
    likelihood: Likelihood,
    data: Data,
    removal: tuple[FisherMatrix, float] | None = None,
) -> Iterator[Jacobians]:
    """Yield the gradients of the samples' losses, one row each, batch by batch.

    With ``(F + λI)⁻¹`` and N as ``removal`` they are gradients g with ``(F + λI)⁻¹g/N`` what
    removing a sample does: ``(I − S_nᵀJ_n(F + λI)⁻¹J_nᵀS_n/N)⁻¹`` acts on their coordinates in the
    columns of the root S (Woodbury).
    """
    for inputs, given in batches_of(data):
        with evaluated(capture, inputs) as found:
            recorded = capture.find_pass(found)
            target, z = _target(given, recorded.samples_first), found.detach()
            if z.numel() == 0:
                continue
            own = likelihood.of_shapes(recorded.heads)
            gradient = own.gradient(z, target)
            if removal is None:
                yield capture.pull_back(found, gradient.unsqueeze(0), retain_graph=False)
                continue
            inverse, count = removal
            exact, weights = ExactFisher(), own.event_weights(z, target)
            jacobians = capture.pull_back(found, exact.vectors(own, z, weights), retain_graph=False)
            u = exact.coordinates(own, z, gradient, weights)
            assert u is not None
            leverage = inverse.sample_forms(jacobians) / count
            _check_leverage(leverage, inverse.structure)
            eye = torch.eye(leverage.shape[1], dtype=leverage.dtype, device=leverage.device)
            u = torch.linalg.solve(eye - leverage, u.to(leverage.dtype).unsqueeze(2)) / count
            yield jacobians.combined(u.to(gradient.dtype))


def _check_leverage(leverage: Tensor, structure: str) -> None:
    """Make sure that something is left where a sample is taken out of the matrix."""
    largest = torch.linalg.eigvalsh(leverage)[:, -1]
    beyond = int((largest > 1 - 1e3 * torch.finfo(leverage.dtype).eps).sum())
    if beyond:
        raise ValueError(
            f"{beyond} of {len(largest)} samples have a leverage of 1 or more in structure "
            f"{structure!r}, which leave_one_out cannot take out of it: take structure='full' with "
            "fisher='exact', more damping, or leave_one_out=False"
        )


def _target(given: Any, samples_first: Callable[[Tensor], Tensor]) -> Any:
    if given is None:
        raise ValueError("influence needs targets with every batch, of training and test data")
    return samples_first(given) if isinstance(given, Tensor) else given


def _count(capture: Capture, likelihood: Likelihood, data: Data) -> float:
    """Return N, as a mean-reduced loss counts data points."""
    total = 0.0
    for inputs, given in batches_of(data):
        with evaluated(capture, inputs) as found:
            recorded = capture.find_pass(found)
            target = _target(given, recorded.samples_first)
            total += float(likelihood.of_shapes(recorded.heads).count(found.detach(), target))
    return total


def _groups(
    capture: Capture, likelihood: Likelihood, data: Data, inverse: FisherMatrix, memory: float
) -> Iterator[list[Tensor]]:
    """Yield ``(F + λI)⁻¹g`` of as many samples as fit memory, as columns ``(P, m)`` each."""
    layout = inverse.layout
    most = max(1, int(memory / (layout.numel * layout.dtype.itemsize)))
    step = max(1, min(most, CHUNK_ELEMENTS // layout.numel))
    group: list[Tensor] = []
    held = 0
    for rows in _sample_gradients(capture, likelihood, data):
        for start in range(0, rows.samples, step):
            stop = min(start + step, rows.samples)
            if held + stop - start > most:
                yield group
                group, held = [], 0
            columns = layout.zeros(layout.numel, stop - start)
            for block in rows.values():
                flat = block.layout.flat(block.per_sample_gradients(start, stop))[:, 0]
                layout.scatter(block.layout, flat.T, columns)
            group.append(inverse @ columns)
            held += stop - start
    if group:
        yield group


def _scores(rows: Jacobians, group: Sequence[Tensor], per_layer: bool) -> dict[str, Tensor]:
    """Return block name → products of all columns with the rows, ``(m, n)``; "" is their sum."""
    total: dict[str, Tensor] = {}
    for name, block in rows.items():
        columns = [rows.layout.gather(block.layout, some).to(block.dtype) for some in group]
        values = _products(block, columns).T
        key = name if per_layer else ""
        total[key] = total[key] + values if key in total else values
    return total


def _products(block: LayerJacobian, columns: Sequence[Tensor]) -> Tensor:
    """Return ``J V`` of one row per sample, ``(n, m)``, by the cheaper of two ways.

    With several positions per sample it is cheaper to form a few gradients at a time, as each of
    them then meets all columns; else they are never formed.
    """
    if isinstance(block, EmbeddingJacobian) or (
        isinstance(block, LinearJacobian) and block.positions == 1
    ):
        width = block.positions * block.layout.groups * block.layout.d_out
        step = max(1, CHUNK_ELEMENTS // max(1, block.samples * width))
        return torch.cat([block.matvec(v) for some in columns for v in some.split(step, 1)], 1)
    pieces = []
    for start, stop in block.chunks():
        flat = block.layout.flat(block.per_sample_gradients(start, stop))[:, 0]
        pieces.append(torch.cat([flat @ some for some in columns], 1))
    return torch.cat(pieces)


def _shown(data: Data, progress: bool) -> Iterator[Batch]:
    """Iterate over batches, with a bar if it is wanted."""
    if not progress:
        return batches_of(data)
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install 'natgrad[cli]'") from error
    number = None if isinstance(data, tuple) else getattr(data, "__len__", lambda: None)()
    return iter(track(batches_of(data), "influence", total=number))
