"""One table of all structures: how each is built, what it is by definition, what it can do.

Every comparison of a structure with dense matrices is made from here, in
``test_every_structure.py``. A new structure is one more :class:`Entry`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import natgrad
from natgrad import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import Curvature, as_structure
from natgrad.fisher import (
    as_fisher_type,
    estimation,
    fisher_matrix,
    partial_samples,
    update_from_output,
)
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.likelihoods import as_likelihood
from natgrad.operators import FisherMatrix
from tests import dense
from tests import dense_kronecker as kronecker
from tests.cases import CASES, Case, generator
from tests.dense_two_level import damped, two_level
from tests.operators.test_structured_factors import projection

#: What does not depend on the kind of layer is seen on these.
SOME = (
    "mlp", "tokens", "conv2d", "embedding", "tied_embedding", "generic", "layer_norm",
    "self_attention",
)  # fmt: skip
LIKELIHOODS = ("categorical", "gaussian", "bernoulli", "poisson")
FACTORED = tuple(name for name in CASES if CASES[name]().has_kfac)
#: Draws of the sampled Fisher matrix in comparisons.
DRAWS = 3


# -- the data, as natgrad sees it ------------------------------------------------------------------


class Rows:
    """Keeps the rows of one batch, to hand them on to any number of estimates."""

    def __init__(self, additive: bool, by_layer: bool, count: Tensor) -> None:
        self.additive, self.by_layer, self.count = additive, by_layer, count
        self.chunks: list[tuple[Jacobians, Any, bool]] = []

    def observe(self, jacobians: Jacobians, count: Any, *, continued: bool = False) -> None:
        self.chunks.append((jacobians, count, continued))

    def hand_on(self, curvature: Curvature, decay: float) -> None:
        for jacobians, count, continued in self.chunks:
            curvature.observe(jacobians, count, continued=continued)
        curvature.join(decay, counts_absent=True)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, whose rows are pulled back once for all estimates.

    Attributes:
        model: The model.
        x: Its input.
        target: Targets.
        likelihood: What natgrad is given.
        kind: Fisher type.
        output: Picks the output.
        chunk: Bound on what is pulled back at once; natgrad's own by default.
    """

    model: torch.nn.Module
    x: Any
    target: Any
    likelihood: Any = "categorical"
    kind: str = "exact"
    output: Any = None
    chunk: int | None = None

    def rows(self, curvature: Curvature) -> Rows:
        """Return the rows, in as many chunks and as independent as an estimate may have them."""
        additive = curvature.additive and (self.chunk is not None or self.kind == "mc")
        return rows_of(self, additive, additive and curvature.by_layer)


@functools.cache
def rows_of(batch: Batch, additive: bool, by_layer: bool) -> Rows:
    """Pull back the rows of a batch."""
    likelihood, fisher = as_likelihood(batch.likelihood), fisher_type(batch.kind)
    chunk = estimation.PULL_BACK_ELEMENTS if batch.chunk is None else batch.chunk
    with (
        mock.patch.object(estimation, "PULL_BACK_ELEMENTS", chunk),
        Capture(batch.model, batch.output) as capture,
        evaluated(capture, batch.x) as z,
    ):
        weights = likelihood.event_weights(z.detach(), batch.target)
        count = likelihood.count(z.detach(), batch.target)
        rows = Rows(additive, by_layer, count)
        update_from_output(
            rows, capture, likelihood, fisher, z, weights, count,
            partial=partial_samples(weights), generator=generator(0), target=batch.target,
            retain_graph=False,
        )  # fmt: skip
    return rows


@functools.cache
def layouts_of(model: torch.nn.Module) -> tuple[dict[str, BlockLayout], ParameterLayout]:
    """Return the layouts of a model's blocks and of its parameters."""
    with Capture(model) as capture:
        return {name: block.layout for name, block in capture.blocks.items()}, capture.layout


# -- the data, as the reference sees it ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """What a matrix is estimated from.

    Attributes:
        case: Model and input.
        target: Targets.
        likelihood: What natgrad is given.
        loss: The reference's loss.
        kind: Fisher type.
        vectors: What is pulled back from the output, (K, N, ...).
        name: Name of the case in the table of cases, if it has one.
        partial: Samples of which some event is ignored, (N,): positions of theirs which no vector
            reaches are left out of input factors.
    """

    case: Case
    target: Tensor
    likelihood: Any
    loss: dense.Loss
    kind: str
    vectors: Tensor
    name: str = ""
    partial: Tensor | None = None

    @cached_property
    def batch(self) -> Batch:
        """What natgrad is given."""
        case = self.case
        return Batch(case.model, case.x, self.target, self.likelihood, self.kind, case.output)

    @cached_property
    def count(self) -> float:
        """What means over events divide by."""
        return float(self.loss.count(self.case.z, self.target))

    @cached_property
    def size(self) -> int:
        """Number of parameters."""
        return self.case.jacobian[1].shape[-1]

    @cached_property
    def fisher(self) -> Tensor:
        """The Fisher matrix, (P, P): JᵀΛJ/count, or the rows' products."""
        return dense.fisher(
            self.case.model, self.case.x, self.target, self.loss, self.kind, vectors=self.vectors,
            computed=self.case.jacobian,
        )  # fmt: skip

    @cached_property
    def blocks(self) -> list[kronecker.DenseBlock]:
        """Rows, inputs and output gradients of the blocks that the output depends on."""
        return kronecker.blocks_of(self.case, self.vectors)

    @property
    def shares_weights(self) -> bool:
        """Whether a layer meets several positions of a sample."""
        return any(b.inputs is not None and b.inputs.shape[1] > 1 for b in self.blocks)

    @cached_property
    def exact_groups(self) -> Tensor:
        """The Fisher matrix without what couples groups or blocks."""
        return kronecker.exact_groups(self.size, self.blocks, self.count)


@functools.cache
def problem(
    name: str, likelihood: str = "categorical", kind: str = "exact", seed: int = 7
) -> Problem:
    """Return the problem of a case by name, with a target drawn from a seed."""
    case = CASES[name]()
    return replace(problem_of(case, likelihood, kind, case.target(likelihood, seed)), name=name)


def problem_of(
    case: Case,
    likelihood: Any,
    kind: str,
    target: Tensor | None = None,
    loss: dense.Loss | None = None,
    partial: Tensor | None = None,
) -> Problem:
    """Return the problem of a case; ``loss`` where the likelihood is an object."""
    y = case.target(likelihood) if target is None else target
    loss = case.loss(likelihood) if loss is None else loss
    if kind == "mc":
        own = as_likelihood(likelihood)
        weights = own.event_weights(case.z, y)
        drawn = fisher_type(kind).vectors(own, case.z, weights, generator(0), y)
    else:
        drawn = dense.fisher_vectors(loss, case.z, y, kind)
    return Problem(case, y, likelihood, loss, kind, drawn, partial=partial)


def fisher_type(kind: str) -> Any:
    """Return natgrad's Fisher type."""
    return natgrad.MonteCarloFisher(DRAWS) if kind == "mc" else as_fisher_type(kind)


# -- definitions: from rows to the dense matrix ----------------------------------------------------

Pairs = list[tuple[Tensor, Tensor]]
Definition = Callable[..., Tensor]


def masked(structure: str) -> Definition:
    """Entries of the Fisher matrix that a structure keeps."""

    def matrix(problem: Problem, found: Any, **_: Any) -> Tensor:
        case = problem.case
        return dense.structured(problem.fisher, structure, case.model, case.blocks)

    return matrix


@functools.cache
def factors_of(
    factors: Callable[..., Pairs], problem: Problem, sharing: str, limit: int | None
) -> list[Pairs]:
    """Return the pairs (A, B) of every block's groups; those kept as diagonals are diagonal."""

    def kept(factor: Tensor, diagonal: bool) -> Tensor:
        return torch.diag(factor.diagonal()) if diagonal else factor

    return [
        [
            (kept(a, block.one_hot or large(a, b, limit)[0]), kept(b, large(a, b, limit)[1]))
            for a, b in factors(block, problem.count, sharing, problem.partial)
        ]
        for block in problem.blocks
    ]


def large(a: Sized, b: Sized, limit: int | None) -> tuple[bool, bool]:
    """Return which factors are kept as diagonals, of inputs and of outputs."""
    if limit is None:
        return False, False
    return len(a) > limit, len(b) > limit or (8 * len(b) > limit and len(b) > 8 * len(a))


def product(factors: Callable[..., Pairs]) -> Definition:
    """``B ⊗ A``."""

    def matrix(
        problem: Problem, found: Any, sharing: str = "expand", limit: int | None = None
    ) -> Tensor:
        pairs = factors_of(factors, problem, sharing, limit)
        where = [block.where for block in problem.blocks]
        return kronecker.kronecker_matrix(problem.size, list(zip(where, pairs, strict=True)))

    return matrix


def eigen(factors: Callable[..., Pairs]) -> Definition:
    """``U diag(UᵀFU) Uᵀ`` in natgrad's bases, which must diagonalise the factors."""

    def matrix(
        problem: Problem, found: FisherMatrix, sharing: str = "expand", limit: int | None = None
    ) -> Tensor:
        result = torch.zeros(problem.size, problem.size, dtype=torch.float64)
        pairs = factors_of(factors, problem, sharing, limit)
        for block, of_groups in zip(problem.blocks, pairs, strict=True):
            (part,) = [one for one in found.parts.values() if one.layout.names == block.names]
            for group, (index, (a, b)) in enumerate(zip(block.where, of_groups, strict=True)):
                bases = [
                    torch.eye(len(m), dtype=torch.float64) if basis is None else basis[group]
                    for basis, m in ((part.input_basis, a), (part.output_basis, b))
                ]
                if b.abs().max() > 1e-20:
                    for basis, factor in zip(bases, (a, b), strict=True):
                        assert_diagonalises(basis, factor)
                rows = block.rows[:, group]
                kronecker.place(result, index, kronecker.eigen_block(rows, problem.count, *bases))
        return result

    return matrix


def assert_diagonalises(basis: Tensor, factor: Tensor) -> None:
    eye = torch.eye(len(factor), dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-11)
    rotated = basis.T @ factor @ basis
    off = rotated - torch.diag(rotated.diagonal())
    assert off.abs().max() <= 1e-10 * factor.abs().max()


@functools.cache
def all_products_of(problem: Problem) -> list[list[tuple[Tensor, Tensor]]]:
    """Return all pairs (A, B), (R, d, d) each, of every block's groups, leading ones first."""
    return [
        [
            kronecker.truncated(
                block.rows[:, group].flatten(1).T @ block.rows[:, group].flatten(1) / problem.count,
                *block.where.shape[1:],
                rank=1000,
            )
            for group in range(len(block.where))
        ]
        for block in problem.blocks
    ]


def products_of(problem: Problem, rank: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the leading pairs (A, B) of every block's groups."""
    return [[(a[:rank], b[:rank]) for a, b in groups] for groups in all_products_of(problem)]


def nearest(rank: int) -> Definition:
    """The truncated singular value decomposition of the rearranged blocks."""

    def matrix(problem: Problem, found: Any, limit: int | None = None) -> Tensor:
        result = torch.zeros(problem.size, problem.size, dtype=torch.float64)
        pairs = products_of(problem, rank)
        by_kfac = factors_of(kronecker.kfac_factors, problem, "expand", limit)
        for block, of_groups, plain in zip(problem.blocks, pairs, by_kfac, strict=True):
            outputs, inputs = (range(size) for size in block.where.shape[1:])
            by_factors = any(large(inputs, outputs, limit))
            for index, (a, b), one in zip(block.where, of_groups, plain, strict=True):
                whole = torch.kron(one[1].contiguous(), one[0].contiguous())
                kronecker.place(result, index, whole if by_factors else kronecker.kron_sum(a, b))
        return result

    return matrix


#: Damping and step size of the one step that SINGD's factors have taken in comparisons.
FIRST_STEP = {"damping": 0.2, "lr": 0.1}
#: The recursion of the paper with nothing added, so that its first step is a short formula.
SINGD: dict[str, Any] = {
    "factor_lr": FIRST_STEP["lr"],
    "early_factor_lr": False,
    "max_change": None,
    "initial_scale": "identity",
    "block_size": 2,
    "hierarchical_sizes": (1, 2),
}


def first_step(coupled: bool, structure: str = "dense") -> Definition:
    """``(C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹`` after one step from the identity."""

    def moved(factor: Tensor, weight: Tensor | float, structure: str) -> Tensor:
        eye = torch.eye(len(factor), dtype=factor.dtype)
        bracket = weight * factor + FIRST_STEP["damping"] * eye - eye
        step = projection(structure, bracket, block_size=2, corners=(1, 2))
        root = eye - FIRST_STEP["lr"] / 2 * step
        return torch.linalg.inv(root @ root.T)

    def matrix(problem: Problem, found: Any, sharing: str = "expand") -> Tensor:
        result = torch.eye(problem.size, dtype=torch.float64)
        pairs = factors_of(kronecker.kfac_factors, problem, sharing, None)
        for block, of_groups in zip(problem.blocks, pairs, strict=True):
            for index, (a, b) in zip(block.where, of_groups, strict=True):
                if not (problem.vectors.any() and bool(block.rows.any())):
                    continue  # A layer that the output does not depend on.
                means = [m.trace() / len(m) if coupled else 1.0 for m in (a, b)]
                k = moved(a, means[1], "diagonal" if block.one_hot else structure)
                c = moved(b, means[0], structure)
                kronecker.place(result, index, torch.kron(c, k))
        return result

    return matrix


# -- what the damped inverse is --------------------------------------------------------------------

#: (problem, found, matrix, shift (P,), columns (P, k)) → solution (P, k).
Solution = Callable[[Problem, FisherMatrix, Tensor, Tensor, Tensor], Tensor]


def inverted(
    problem: Problem, found: FisherMatrix, matrix: Tensor, shift: Tensor, columns: Tensor
) -> Tensor:
    """``(F + λI)⁻¹ V``."""
    return torch.linalg.solve(damped(matrix, shift), columns)


def pi_inverted(factors: Callable[..., Pairs]) -> Solution:
    """``[(B + √λ/π I) ⊗ (A + π√λ I)]⁻¹ V``."""

    def pairs(problem: Problem) -> list[list[tuple[Tensor, Tensor]]]:
        found = factors_of(factors, problem, "expand", None)
        return [[(a.unsqueeze(0), b.unsqueeze(0)) for a, b in groups] for groups in found]

    return _first_damped(pairs)


def pi_products_inverted(rank: int) -> Solution:
    """``[(B_1 + √λ/π I) ⊗ (A_1 + π√λ I) + B_2 ⊗ A_2]⁻¹ V``."""
    return _first_damped(lambda problem: products_of(problem, rank))


def _first_damped(pairs: Callable[[Problem], list[list[tuple[Tensor, Tensor]]]]) -> Solution:
    def solution(
        problem: Problem, found: FisherMatrix, matrix: Tensor, shift: Tensor, columns: Tensor
    ) -> Tensor:
        total = torch.diag(shift)
        for block, groups in zip(problem.blocks, pairs(problem), strict=True):
            for index, (a, b) in zip(block.where, groups, strict=True):
                if not b.any():
                    continue
                a, b = a * torch.sign(a[0].trace()), b * torch.sign(b[0].trace())
                damping = float(shift[index.flatten()[0]])
                first = kronecker.pi_shifts(a[0], b[0], damping)
                a, b = (
                    torch.cat([x.unsqueeze(0), y[1:]]) for x, y in zip(first, (a, b), strict=True)
                )
                kronecker.place(total, index, kronecker.kron_sum(a, b))
        return torch.linalg.solve(total, columns)

    return solution


def corrected(space: str, form: str = "residual") -> Solution:
    """K-FAC's inverse with its coarse correction, column by column."""

    def solution(
        problem: Problem, found: FisherMatrix, matrix: Tensor, shift: Tensor, columns: Tensor
    ) -> Tensor:
        inverse = torch.linalg.inv(damped(matrix, shift))
        indices = dense.block_indices(problem.case.model, problem.case.blocks)
        solved = [
            two_level(
                space, form, column, problem.fisher, matrix, inverse, shift, indices, found
            )[0]
            for column in columns.T
        ]  # fmt: skip
        return torch.stack(solved, 1)

    return solution


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A structure with some options, as the tests know it.

    Attributes:
        name: Name of the entry.
        structure: Name of the structure.
        definition: From a problem to the dense matrix; natgrad's matrix is handed over for choices
            that a definition leaves open, such as the basis of an eigenspace.
        options: Options of the structure.
        layers: Cases whose matrix is compared with the definition.
        cases: Cases of all other comparisons.
        everywhere: Whether all likelihoods and maps are compared on all cases, not on some.
        sharings: Settings for shared weights.
        limit: Whether large factors are kept as diagonals.
        solution: What the damped inverse does.
        damping: λ of comparisons; some sums are indefinite without enough of it.
        joint: Whether all layers make one part.
        positive: Whether the matrix has no negative eigenvalue.
        linear: Whether the inverse is a matrix.
        root: Whether it has the root of its inverse.
        keeps_trace: Whether its trace is the exact one.
        additive: Whether batches and chunks of vectors are summed without loss.
        of_one_batch: Whether a checkpoint leaves the rows, and with them the matrix, out.
        pseudo: Whether zero damping gives the pseudo-inverse.
        not_below: Entry whose distance from the exact blocks bounds this one's.
        exact_for_one_sample: Whether the blocks of a single sample are kept exactly.
        same_sums: Entry that sums up the same, so that only the inverse differs.
        of_loss: Whether the matrix depends on the loss, and not on inputs alone.
        stepped: Whether the matrix follows only from a refresh.
        tolerance: Relative error of the matrix.
    """

    name: str
    structure: str
    definition: Definition
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = FACTORED
    cases: tuple[str, ...] = tuple(CASES)
    everywhere: bool = False
    sharings: tuple[str, ...] = ()
    limit: bool = False
    solution: Solution = inverted
    damping: float = 0.05
    joint: bool = False
    positive: bool = True
    linear: bool = True
    root: bool = False
    keeps_trace: bool = False
    additive: bool = True
    of_one_batch: bool = False
    pseudo: bool = True
    not_below: str | None = None
    exact_for_one_sample: bool = False
    same_sums: str | None = None
    of_loss: bool = True
    stepped: bool = False
    tolerance: float = 1e-9

    @property
    def mapped(self) -> tuple[str, ...]:
        """Cases of the function-space map."""
        return tuple(name for name in self.cases if self.everywhere or name in SOME)

    def build(self, given: Problem | Batch | list[Batch], **options: Any) -> FisherMatrix:
        """Return natgrad's matrix of a problem, or of some batches, from rows pulled back once."""
        if isinstance(given, Problem):
            return built(self.name, given, tuple(options.items()))
        estimate = self.estimate(given, **options)
        if self.stepped:
            estimate.refresh(FIRST_STEP["damping"])
        return estimate.matrix()

    def of_user(self, given: Problem) -> FisherMatrix:
        """Return what ``fisher_matrix`` makes of a problem."""
        case, data = given.case, (given.case.x, given.target)
        return self.matrix(case.model, data, given.likelihood, given.kind, case.output)

    def matrix(
        self,
        model: torch.nn.Module,
        data: Any,
        likelihood: Any = "categorical",
        kind: str = "exact",
        output: Any = None,
        **options: Any,
    ) -> FisherMatrix:
        """Return what ``fisher_matrix`` makes of one batch, or a list of some."""
        if self.stepped:
            pairs = data if isinstance(data, list) else [data]
            batches = [Batch(model, x, y, likelihood, kind, output) for x, y in pairs]
            return self.build(batches, **options)
        return fisher_matrix(
            model, data, likelihood, self.structure, fisher_type(kind), output=output,
            **{**self.options, **options},
        )  # fmt: skip

    def empty(self, batch: Batch, **options: Any) -> Curvature:
        """Return an estimate for a batch's model that has seen nothing."""
        structure = as_structure(self.structure, **{**self.options, **options})
        return Curvature(structure, *layouts_of(batch.model))

    def estimate(self, given: Batch | list[Batch], decay: float = 1.0, **options: Any) -> Curvature:
        """Return the estimate over some batches."""
        batches = given if isinstance(given, list) else [given]
        curvature = self.empty(batches[0], **options)
        for batch in batches:
            batch.rows(curvature).hand_on(curvature, decay)
        return curvature

    def solve(
        self,
        problem: Problem,
        found: FisherMatrix,
        matrix: Tensor,
        damping: float | Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Return what the damped inverse makes of columns, by dense algebra."""
        shift = torch.ones(len(matrix), dtype=matrix.dtype) * damping
        return self.solution(problem, found, matrix, shift, columns)


@functools.cache
def built(name: str, given: Problem, options: tuple[tuple[str, Any], ...]) -> FisherMatrix:
    """Return an entry's matrix of a problem, which is also what others are compared with."""
    return TABLE[name].build(given.batch, **dict(options))


EXACT: dict[str, Any] = {"layers": tuple(CASES), "everywhere": True}
KFAC = product(kronecker.kfac_factors)
TKFAC = product(kronecker.tkfac_factors)
FACTORS: dict[str, Any] = {
    "sharings": ("expand", "reduce"),
    "limit": True,
    "root": True,
    "exact_for_one_sample": True,
}
EIGEN: dict[str, Any] = FACTORS | {"keeps_trace": True}
SPLITS: dict[str, Any] = {"sharings": ("expand", "reduce", "split")}
TRACE = {"keeps_trace": True}
SPLIT = {"factored_damping": True}
#: Cases in which the pairs of one product, or two, are known to the reference.
FEW = ("mlp", "tokens", "conv1d", "conv2d", "layer_norm", "embedding", "detached")
SUM: dict[str, Any] = {
    "additive": False,
    "root": True,
    "exact_for_one_sample": True,
    "tolerance": 1e-8,
}
COARSE = FACTORS | {"root": False, "pseudo": False, "exact_for_one_sample": False}
VARIANT = COARSE | {"layers": FEW, "same_sums": "two_level"}
STEP: dict[str, Any] = {
    "sharings": ("expand", "reduce", "split"),
    "root": True,
    "stepped": True,
    "pseudo": False,
}

TABLE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("full", "full", masked("full"), **EXACT, **TRACE, joint=True, root=True,
              of_one_batch=True, exact_for_one_sample=False),
        Entry("block_diagonal", "block_diagonal", masked("block_diagonal"), **EXACT, **TRACE,
              root=True, of_one_batch=True, exact_for_one_sample=True),
        Entry("block_tridiagonal", "block_tridiagonal", masked("block_tridiagonal"), **EXACT,
              **TRACE, joint=True, positive=False, of_one_batch=True, pseudo=False, root=True),
        Entry("unit_wise", "unit_wise", masked("unit_wise"), **EXACT, **TRACE, root=True),
        Entry("diagonal", "diagonal", masked("diagonal"), **EXACT, **TRACE, root=True),
        Entry("kfac", "kfac", KFAC, **FACTORS | SPLITS, everywhere=True),
        Entry("kfac[factored]", "kfac", KFAC, SPLIT, **FACTORS | {"sharings": ()}, cases=FACTORED,
              layers=FEW, same_sums="kfac", solution=pi_inverted(kronecker.kfac_factors)),
        Entry("ekfac", "ekfac", eigen(kronecker.kfac_factors), **EIGEN | SPLITS,
              not_below="kfac"),
        Entry("tkfac", "tkfac", TKFAC, **EIGEN),
        Entry("tkfac[factored]", "tkfac", TKFAC, SPLIT, **EIGEN | {"sharings": ()}, cases=FACTORED,
              layers=FEW, same_sums="tkfac", solution=pi_inverted(kronecker.tkfac_factors)),
        Entry("tekfac", "tekfac", eigen(kronecker.tkfac_factors), **EIGEN, not_below="tkfac"),
        Entry("foof", "foof", product(kronecker.foof_factors),
              **FACTORS | {"exact_for_one_sample": False}, of_loss=False),
        Entry("kfoc", "kfoc", nearest(1), limit=True, **SUM, not_below="kfac"),
        Entry("kpsvd[1]", "kpsvd", nearest(1), limit=True, **SUM, not_below="tkfac"),
        Entry("kpsvd[2]", "kpsvd", nearest(2), {"rank": 2}, **SUM, positive=False,
              not_below="kpsvd[1]"),
        Entry("kpsvd[3]", "kpsvd", nearest(3), {"rank": 3}, **SUM, positive=False,
              not_below="kpsvd[2]"),
        Entry("kpsvd[all]", "kpsvd", nearest(1000), {"rank": 100}, **SUM | {"additive": True},
              cases=("mlp", "tokens", "conv2d"), positive=False, not_below="kpsvd[3]"),
        Entry("kpsvd[deflation]", "kpsvd", nearest(2), {"rank": 2, "method": "deflation"}, **SUM,
              layers=FEW, cases=("mlp", "tokens", "conv2d"), positive=False,
              not_below="kpsvd[1]"),
        Entry("kpsvd[1,factored]", "kpsvd", nearest(1), SPLIT, **SUM, layers=FEW, cases=FEW,
              same_sums="kpsvd[1]", solution=pi_products_inverted(1)),
        Entry("kpsvd[2,factored]", "kpsvd", nearest(2), SPLIT | {"rank": 2}, **SUM, layers=FEW,
              cases=("mlp", "tokens", "conv1d"), positive=False, damping=1.0,
              same_sums="kpsvd[2]", solution=pi_products_inverted(2)),
        Entry("two_level", "two_level", KFAC, **COARSE, solution=corrected("nicolaides")),
        Entry("two_level[additive]", "two_level", KFAC, {"form": "additive"}, **VARIANT,
              solution=corrected("nicolaides", "additive")),
        Entry("two_level[spectral]", "two_level", KFAC, {"coarse_space": "spectral"}, **VARIANT,
              solution=corrected("spectral")),
        Entry("two_level[residual]", "two_level", KFAC, {"coarse_space": "residual"}, **VARIANT,
              linear=False, solution=corrected("residual")),
        Entry("two_level[krylov]", "two_level", KFAC, {"coarse_space": "krylov"}, **VARIANT,
              linear=False, solution=corrected("krylov")),
        *(
            Entry(f"two_level[{space},additive]", "two_level", KFAC,
                  {"coarse_space": space, "form": "additive"}, **VARIANT | {"cases": FEW},
                  linear=space == "spectral", solution=corrected(space, "additive"))
            for space in ("spectral", "residual", "krylov")
        ),
        Entry("singd", "singd", first_step(True), SINGD, **STEP),
        Entry("singd[ikfac]", "singd", first_step(False), SINGD | {"coupled": False}, **STEP),
        Entry("singd[hierarchical]", "singd", first_step(True, "hierarchical"),
              SINGD | {"factor_structures": "hierarchical"}, **STEP | {"sharings": ()}),
    )
}  # fmt: skip
