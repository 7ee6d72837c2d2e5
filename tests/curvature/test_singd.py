"""SINGD and IKFAC against the recursion written with dense matrices."""

from __future__ import annotations

import copy
import functools
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import natgrad
from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import Curvature, as_structure
from natgrad.curvature.cost import Workload
from natgrad.curvature.singd import InverseFactorStatistics
from natgrad.fisher import as_fisher_type, fisher_matrix, partial_samples, update_from_output
from natgrad.fisher import estimation as fisher_module
from natgrad.jacobians import LinearJacobian, factor_terms
from natgrad.likelihoods import as_likelihood
from natgrad.operators import GradientSource
from natgrad.operators.structured_matrix import StructuredMatrix
from natgrad.optim import SINGD
from tests import dense, pairwise
from tests.cases import CASES, Case, generator, normal
from tests.curvature.structures_table import FACTORED, SOME
from tests.methods import curvature_of
from tests.methods import make_optimizer as make_any_optimizer
from tests.operators.test_structured_factors import STRUCTURES, Largest, projection
from tests.state import same

#: The recursion of the paper, with nothing added.
PLAIN: dict[str, Any] = {
    "factor_lr": 0.1,
    "early_factor_lr": False,
    "max_change": None,
    "initial_scale": "identity",
}
SIZES: dict[str, Any] = {"block_size": 2, "hierarchical_sizes": (1, 2)}
STEPS = 6
DAMPINGS = [0.3, 0.1, 0.5, 0.02, 0.1, 0.2]


# -- the reference ---------------------------------------------------------------------------------


@dataclass
class Recursion:
    """K, C and their momenta of one group of one layer, moved as the formulas say.

    Attributes:
        structures: Structures of K and C.
        lr: β₁.
        momentum: α₁.
        coupled: SINGD or IKFAC.
    """

    structures: tuple[str, str] = ("dense", "dense")
    lr: float = 0.1
    momentum: float = 0.0
    coupled: bool = True
    max_change: float | None = None
    batch_scale: bool = False
    early: bool = False
    k: Tensor | None = None
    c: Tensor | None = None
    moments: list[Tensor] = field(default_factory=list)
    steps: int = 0

    def project(self, side: int, symmetric: Tensor) -> Tensor:
        return projection(self.structures[side], symmetric, block_size=2, corners=(1, 2))

    def step(self, a: Tensor, b: Tensor, damping: float) -> None:
        eyes = [torch.eye(len(x), dtype=x.dtype) for x in (a, b)]
        if self.k is None:
            self.k, self.c = eyes
            self.moments = [torch.zeros_like(eye) for eye in eyes]
            if self.batch_scale:
                mean_a, mean_b = a.diagonal().mean(), b.diagonal().mean()
                both = (mean_a * mean_b + damping) ** -0.25
                scales = (both, both)
                if not self.coupled:
                    scales = (mean_a + damping) ** -0.5, (mean_b + damping) ** -0.5
                self.k, self.c = scales[0] * self.k, scales[1] * self.c
        k, c = self.k, self.c
        h_k, h_c = k.T @ a @ k, c.T @ b @ c
        if self.coupled:
            d_a, d_b = len(a), len(b)
            bracket_k = h_c.trace() / d_b * h_k + damping * (c.T @ c).trace() / d_b * k.T @ k
            bracket_c = h_k.trace() / d_a * h_c + damping * (k.T @ k).trace() / d_a * c.T @ c
        else:
            bracket_k, bracket_c = h_k + damping * k.T @ k, h_c + damping * c.T @ c
        share = 1.0 if self.max_change is None else 1 - self.momentum
        moved = []
        for side, (factor, bracket) in enumerate(((k, bracket_k), (c, bracket_c))):
            projected = self.project(side, bracket - eyes[side])
            m = self.momentum * self.moments[side] + share / 2 * projected
            rate = max(self.lr, 1 / (self.steps + 2)) if self.early else self.lr
            if self.max_change is not None:
                sums = (m.abs().sum(0).max() * m.abs().sum(1).max()).sqrt()
                rate = min(rate, float(self.max_change / torch.minimum(m.norm(), sums)))
            moved.append(factor @ (eyes[side] - rate * m))
            self.moments[side] = m
        self.k, self.c = moved
        self.steps += 1

    def inverses(self) -> tuple[Tensor, Tensor]:
        """Return K Kᵀ and C Cᵀ."""
        assert self.k is not None and self.c is not None
        return self.k @ self.k.T, self.c @ self.c.T


class Reference:
    """The recursion of every group of every layer of a model.

    Args:
        options: Fields of :class:`Recursion`.
        one_hot: Indices of blocks whose input factor is diagonal.
    """

    def __init__(self, one_hot: Sequence[int] = (), **options: Any) -> None:
        self.options, self.one_hot = options, one_hot
        self.groups: dict[int, list[Recursion]] = {}
        self.where: dict[int, Tensor] = {}

    def step(self, found: Sequence[tuple[Tensor, Any]], damping: float) -> None:
        for block, (where, factors) in enumerate(found):
            self.where[block] = where
            options = dict(self.options)
            if block in self.one_hot:
                structures = options.get("structures", ("dense", "dense"))
                options["structures"] = ("diagonal", structures[1])
            made = self.groups.setdefault(block, [Recursion(**options) for _ in factors])
            for recursion, (a, b) in zip(made, factors, strict=True):
                recursion.step(a, b, damping)

    def inverse(self, size: int) -> Tensor:
        """Return C Cᵀ ⊗ K Kᵀ in flat order, the identity where no layer was reached."""
        total = torch.eye(size, dtype=torch.float64)
        for block, made in self.groups.items():
            index = self.where[block].flatten()
            total[index, index] = 0.0
            total += dense.kron(size, self.where[block], [r.inverses() for r in made])
        return total


def make_optimizer(kind: Any, model: nn.Module, *args: Any, **options: Any) -> Any:
    """Return an optimizer whose factors take a step with every update unless told otherwise."""
    if "factors" in options:
        options.setdefault("inverses", options["factors"])
    return make_any_optimizer(kind, model, *args, **options)


@contextmanager
def watched(model: nn.Module, output: Any = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Give an empty estimate and a function that updates it with one batch."""
    with Capture(model, output) as capture:
        structure = curvature_of("singd", capture, **options)

        def feed(x: Any, y: Tensor, likelihood: Any, kind: str, decay: float = 1.0) -> None:
            likelihood, fisher = as_likelihood(likelihood), as_fisher_type(kind)
            with evaluated(capture, x) as z:
                weights = likelihood.event_weights(z.detach(), y)
                update_from_output(
                    structure, capture, likelihood, fisher, z, weights,
                    likelihood.count(z.detach(), y), partial=partial_samples(weights), target=y,
                    retain_graph=False,
                )  # fmt: skip
            structure.join(decay)

        yield structure, feed


def estimated(
    model: nn.Module, data: Any, likelihood: Any, kind: str = "exact", **options: Any
) -> Curvature:
    """Return the estimate from one batch, or a list of some, before the first step."""
    with watched(model, **options) as (f, feed):
        for x, y in data if isinstance(data, list) else [data]:
            feed(x, y, likelihood, kind)
    return f


def factors_in(f: Curvature) -> dict[str, tuple[StructuredMatrix, StructuredMatrix]]:
    """Return part name → K and C."""
    metrics = {name: f.operator(name).metric for name in f.parts}
    return {name: (metric.inputs, metric.outputs) for name, metric in metrics.items()}


def steps_of(f: Curvature) -> list[int]:
    """Return how many steps each part's factors have taken."""
    averages = [present.average for present in f.estimates.values()]
    return [0 if average is None else average.steps for average in averages]


def move(model: nn.Module, seed: int) -> None:
    """Change all parameters a little."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))


def gradient_source(structure: Curvature, seed: int) -> tuple[GradientSource, Tensor]:
    flat = normal(structure.layout.numel, seed=seed)
    return GradientSource(structure.layout.to_dict(flat)), flat


def check_matrix(structure: Curvature, inverse: Tensor, seed: int = 0) -> None:
    """Check the matrix, its inverse and the preconditioned gradient."""
    source, flat = gradient_source(structure, seed)
    natural, matrix = structure.natural_gradient(source), structure.matrix()
    dense.assert_same(structure.layout.to_flat(natural), inverse @ flat)
    dense.assert_same(matrix.solve(flat), inverse @ flat)
    dense.assert_same(matrix.to_dense(), torch.linalg.inv(inverse))


def one_hot_blocks(case: Case) -> list[int]:
    return [i for i, spec in enumerate(case.blocks) if spec.unit == "columns"]


# -- step by step ----------------------------------------------------------------------------------


FORMULA_CASES = [
    name
    for name in FACTORED
    if name not in ("generic", "lstm", "bilinear", "dictionary_output", "other_head")
]


def reached(found: Sequence[tuple[Tensor, Any]]) -> list[tuple[Tensor, Any]]:
    """Leave out layers whose output gradients are all zero, which no step moves."""
    return [(where, pairs) for where, pairs in found if any(b.any() for _, b in pairs)]


@pytest.mark.parametrize("name", FORMULA_CASES)
def test_every_layer_kind_follows_the_formulas(name):
    """Dense SINGD and IKFAC over changing parameters, targets, Fisher types and damping."""
    case = CASES[name]()
    model = copy.deepcopy(case.model)
    size = sum(p.numel() for p in dense.parameters(model).values())
    variants = [
        {"coupled": True, "factor_momentum": 0.5},
        {"coupled": False, "factor_momentum": 0.0},
    ]
    one_hot = one_hot_blocks(case)
    references = [
        Reference(one_hot, coupled=v["coupled"], momentum=v["factor_momentum"]) for v in variants
    ]
    with (
        watched(model, case.output, **PLAIN, **variants[0]) as (first, feed_first),
        watched(model, case.output, **PLAIN, **variants[1]) as (second, feed_second),
    ):
        for step in range(2):
            move(model, step)
            y, kind = case.target("categorical", seed=step), ("exact", "empirical")[step]
            loss = case.loss("categorical")
            found = dense.kfac_pairs(model, case.x, y, loss, case.blocks, kind, output=case.output)
            both = zip((first, second), (feed_first, feed_second), references, strict=True)
            for structure, feed, reference in both:
                feed(case.x, y, "categorical", kind)
                structure.refresh(DAMPINGS[step])
                reference.step(reached(found), DAMPINGS[step])
                check_matrix(structure, reference.inverse(size), step)


@functools.cache
def steps_on_the_way() -> list[tuple[Tensor, Tensor, str, Any]]:
    """Return input, target, Fisher type and K-FAC's pairs of every step of a model that moves."""
    case = CASES["conv1d"]()
    model, found = copy.deepcopy(case.model), []
    for step in range(STEPS):
        move(model, step)
        x = normal(*case.x.shape, seed=step)
        y, kind = case.target("categorical", seed=step), ("exact", "empirical")[step % 2]
        loss = case.loss("categorical")
        found.append((x, y, kind, dense.kfac_pairs(model, x, y, loss, case.blocks, kind)))
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
def test_every_structure_follows_the_formulas(structure, coupled, bounded):
    """Six steps with momentum, from the identity or scaled, with and without bounded changes."""
    model = copy.deepcopy(CASES["conv1d"]().model)
    size = sum(p.numel() for p in model.parameters())
    options = PLAIN | SIZES | {"coupled": coupled, "factor_momentum": 0.4}
    extra = {}
    if bounded:
        options |= {"max_change": 0.3, "initial_scale": "batch", "early_factor_lr": True}
        extra = {"max_change": 0.3, "batch_scale": True, "early": True}
    reference = Reference(structures=(structure, structure), coupled=coupled, momentum=0.4, **extra)
    with watched(model, factor_structures=structure, **options) as (f, feed):
        for step, (x, y, kind, found) in enumerate(steps_on_the_way()):
            move(model, step)
            feed(x, y, "categorical", kind)
            f.refresh(DAMPINGS[step])
            reference.step(found, DAMPINGS[step])
            check_matrix(f, reference.inverse(size), step)
        assert set(steps_of(f)) == {STEPS}
        for factors, block in zip(factors_in(f).values(), reference.groups.values(), strict=True):
            for factor, name in zip(factors, "kc", strict=True):
                expected = torch.stack([getattr(r, name) for r in block])
                dense.assert_same(factor.to_dense(), expected)
                assert factor.structure == structure


def test_structures_of_the_two_factors_are_chosen_apart():
    case = CASES["mlp"]()
    reference = Reference(structures=("lower_triangular", "diagonal"))
    options = PLAIN | {"factor_structures": ("lower_triangular", "diagonal")}
    with watched(case.model, **options) as (f, feed):
        y, loss = case.target("categorical"), case.loss("categorical")
        for _ in range(3):
            feed(case.x, y, "categorical", "exact")
            f.refresh(0.1)
            reference.step(dense.kfac_pairs(case.model, case.x, y, loss, case.blocks), 0.1)
        check_matrix(f, reference.inverse(f.layout.numel))


@pytest.mark.parametrize("momentum_on", ["natural_gradient", "gradient"])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_optimizer_takes_these_steps(coupled, momentum_on):
    """Parameters over seven steps of an interval of 2, with momentum and weight decay."""
    case = CASES["mlp"]()
    model, copied = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = make_optimizer(
        SINGD,
        model,
        "categorical",
        lr=0.3,
        damping=0.05,
        momentum=0.8,
        nesterov=False,
        weight_decay=0.1,
        fisher="empirical",
        factors=2,
        early=False,
        kl_clip=None,
        coupled=coupled,
        momentum_on=momentum_on,
        factor_momentum=0.5,
        factor_lr=0.1,
        early_factor_lr=False,
        max_change=None,
        initial_scale="identity",
    )
    reference = Reference(coupled=coupled, momentum=0.5)
    loss, buffer = case.loss("categorical"), torch.zeros(())
    for step in range(7):
        x, y = normal(9, 3, seed=step), torch.randint(0, 3, (9,), generator=generator(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

        leaves = list(copied.parameters())
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(
                functional.cross_entropy(copied(x), y), leaves)]
        )  # fmt: skip
        if step % 2 == 0:
            found = dense.kfac_pairs(copied, x, y, loss, case.blocks, "empirical")
            reference.step(found, 0.05)
        inverse = reference.inverse(len(gradient))
        if momentum_on == "gradient":
            buffer = 0.8 * buffer + gradient
            direction = inverse @ buffer
        else:
            buffer = direction = 0.8 * buffer + inverse @ gradient
        with torch.no_grad():
            before = torch.nn.utils.parameters_to_vector(leaves)
            moved = before * (1 - 0.3 * 0.1) - 0.3 * direction
            torch.nn.utils.vector_to_parameters(moved, leaves)
        dense.assert_same(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), moved)


# -- every kind of rows ----------------------------------------------------------------------------


def kfac_statistics(f: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return A and B of every group of every part of a K-FAC matrix, dense."""
    result = []
    for part in f.parts.values():
        both = [torch.diag_embed(x) if x.dim() == 2 else x for x in part.factors]
        result.append((list(both[0]), list(both[1])))
    return result


def check_statistics(
    case: Case, data: Any, likelihood: Any, kind: str = "exact", **options: Any
) -> None:
    """Check one step from the identity against the factors of the library's K-FAC."""
    kfac = fisher_matrix(case.model, data, likelihood, "kfac", kind, output=case.output, **options)
    f = estimated(case.model, data, likelihood, kind, output=case.output, **PLAIN, **options)
    check_traces(f, kfac)
    f.refresh(0.2)
    check_traces(f, kfac)
    assert any(steps_of(f))
    found = zip(factors_in(f).values(), steps_of(f), kfac_statistics(kfac), strict=True)
    for (k, c), steps, statistics in found:
        for group, pair in enumerate(zip(*statistics, strict=True)):
            recursion = Recursion()
            if steps:
                recursion.step(*pair, 0.2)
                dense.assert_same(k.to_dense()[group], recursion.k)
                dense.assert_same(c.to_dense()[group], recursion.c)


def check_traces(f: Curvature, kfac: Any) -> None:
    """Check the traces that relative damping is a share of, whether sums wait or were used."""
    for name, part in kfac.parts.items():
        found = f.structure.trace(f.parts[name], f.estimates[name].average)
        torch.testing.assert_close(found.double(), part.trace(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name not in FACTORED or name in SOME])
@pytest.mark.parametrize("sharing", ["expand", "reduce", "split"])
def test_statistics_are_those_of_kfac(name, sharing):
    """Attention and tied weights, too, for which no definition is written down."""
    case = CASES[name]()
    y = case.target("gaussian")
    check_statistics(case, (case.x, y), "gaussian", weight_sharing=sharing)


@pairwise.parametrize(
    {
        "name": ["conv2d", "language_model", "tied_embedding"],
        "chunk": [None, 1, 60],
        "sharing": ["expand", "reduce", "split"],
        "kind": ["exact", "empirical"],
    }
)
def test_chunks_batches_and_ignored_events(name, chunk, sharing, kind, monkeypatch):
    """Statistics that come in pieces, of directions, of rows and of batches."""
    if chunk is not None:
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", chunk)
        monkeypatch.setattr(factor_terms, "CHUNK_ELEMENTS", chunk)
    case = CASES[name]()
    y = case.target("categorical")
    masked = y.clone()
    masked.view(-1)[::3] = -100
    x, n = case.x, len(case.x)
    for target in (y, masked):
        check_statistics(case, (x, target), "categorical", kind, weight_sharing=sharing)
    batches = [(x[: n - 1], masked[: n - 1]), (x[n - 1 :], masked[n - 1 :])]
    check_statistics(case, batches, "categorical", kind, weight_sharing=sharing)


def test_subsets_of_positions_are_those_of_kfac():
    case = CASES["pooled_tokens"]()
    y = case.target("gaussian")
    check_statistics(case, (case.x, y), "gaussian", rows_per_unit=2.0)
    matrices = []
    for limit in (1.0, None):
        f = estimated(case.model, (case.x, y), "gaussian", rows_per_unit=limit)
        f.refresh(0.1)
        matrices.append(f.matrix().to_dense())
    assert (matrices[0] - matrices[1]).norm() > 1e-3 * matrices[1].norm()


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_decay_weighs_what_waits_for_a_step(factor):
    """Two batches before one step, the first discounted, as in K-FAC; factors are not touched."""
    case = CASES["mlp"]()
    model = case.model
    second = normal(6, 3, seed=5), torch.randint(0, 3, (6,), generator=generator(5))
    y, loss = case.target("categorical"), case.loss("categorical")
    counts = [factor * len(case.x), 6.0]
    with watched(model, **PLAIN) as (f, feed):
        feed(case.x, y, "categorical", "exact")
        feed(*second, "categorical", "exact", decay=factor)
        f.refresh(0.1)
        f.join(0.0)
        f.refresh(0.1)  # Nothing waits, so it does nothing.
        reference = Reference()
        found = [dense.kfac_pairs(model, x, t, loss, case.blocks) for x, t in ((case.x, y), second)]
        mixed = []
        for (where, old), (_, new) in zip(*found, strict=True):
            pairs = [
                tuple(
                    sum(n * m for n, m in zip(counts, both, strict=True)) / sum(counts)
                    for both in zip(o, p, strict=True)
                )
                for o, p in zip(old, new, strict=True)
            ]
            mixed.append((where, pairs))
        reference.step(mixed, 0.1)
        check_matrix(f, reference.inverse(f.layout.numel))
        assert set(steps_of(f)) == {1}


# -- where it goes ---------------------------------------------------------------------------------


def converge(
    case: Case, steps: int, damping: float, likelihood: str = "categorical", **options: Any
) -> Curvature:
    """Repeat one batch at constant parameters."""
    y = case.target(likelihood)
    defaults = PLAIN | {"factor_lr": 0.5, "max_change": 0.9, "initial_scale": "batch"}
    with watched(case.model, case.output, **(defaults | options)) as (f, feed):
        for _ in range(steps):
            feed(case.x, y, likelihood, "exact")
            f.refresh(damping)
    return f


def factors_of(case: Case, likelihood: str = "categorical") -> Any:
    y, loss = case.target(likelihood), case.loss(likelihood)
    return dense.kfac_pairs(case.model, case.x, y, loss, case.blocks, output=case.output)


@pytest.mark.parametrize("name", ["mlp", "conv1d", "embedding"])
def test_ikfac_converges_to_damped_kfac(name):
    """``(B + λI)⁻¹ ⊗ (A + λI)⁻¹`` at constant curvature."""
    case = CASES[name]()
    f = converge(case, 70, 0.1, coupled=False)
    inverses = []
    for where, pairs in factors_of(case):
        damped = [[x + 0.1 * torch.eye(len(x), dtype=x.dtype) for x in pair] for pair in pairs]
        inverses.append((where, [tuple(map(torch.linalg.inv, pair)) for pair in damped]))
    expected = sum(dense.kron(f.layout.numel, where, pairs) for where, pairs in inverses)
    check_matrix(f, expected)


def divergence(p: Tensor, q: Tensor, a: Tensor, b: Tensor, damping: float) -> Tensor:
    """Return twice KL(N(0, Q ⊗ P) ‖ N(0, (B ⊗ A + λI)⁻¹)), up to a constant."""
    precision = torch.kron(b.contiguous(), a.contiguous()) + damping * torch.eye(
        len(a) * len(b), dtype=a.dtype
    )
    covariance = torch.kron(q, p)
    return (precision @ covariance).trace() - torch.linalg.slogdet(covariance).logabsdet


@pytest.mark.parametrize("name", ["mlp", "conv1d"])
def test_singd_converges_to_the_nearest_kronecker_product(name):
    """Both brackets vanish, where the divergence from the damped inverse is least."""
    case, damping = CASES[name](), 0.1
    f = converge(case, 90, damping)
    for factors, (_, pairs) in zip(factors_in(f).values(), factors_of(case), strict=True):
        ks, cs = (factor.to_dense() for factor in factors)
        for k, c, (a, b) in zip(ks, cs, pairs, strict=True):
            h_k, h_c = k.T @ a @ k, c.T @ b @ c
            for own, other, h, h_other in ((k, c, h_k, h_c), (c, k, h_c, h_k)):
                bracket = h_other.trace() / len(other) * h
                bracket += damping * other.square().sum() / len(other) * own.T @ own
                torch.testing.assert_close(
                    bracket, torch.eye(len(own), dtype=own.dtype), rtol=0, atol=1e-10
                )
            p, q = (k @ k.T).requires_grad_(), (c @ c.T).requires_grad_()
            gradients = torch.autograd.grad(divergence(p, q, a, b, damping), [p, q])
            for gradient, inverse in zip(gradients, (p, q), strict=True):
                assert gradient.norm() <= 1e-9 * torch.linalg.inv(inverse.detach()).norm()


def test_one_eigenvalue_is_damped_exactly():
    """Where A and B are multiples of the identity, the matrix is F + λI itself."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    x, y = 3.0 * torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    with watched(model, **PLAIN, coupled=True) as (f, feed):
        for _ in range(250):
            feed(x, y, "gaussian", "exact")
            f.refresh(0.7)
    exact = dense.fisher(model, x, y, dense.gaussian(), "exact")
    dense.assert_same(f.matrix().to_dense(), exact + 0.7 * torch.eye(4, dtype=torch.float64))


def test_a_step_is_a_moving_average_to_first_order():
    """``K Kᵀ = S⁻¹`` goes to ``((1 − β)S + β(A + λI))⁻¹`` with an error of β²."""
    case = CASES["one_layer"]()
    y, damping = case.target("categorical"), 0.2
    ((_, ((a, b),)),) = factors_of(case)
    starts = []
    for seed, size in ((1, len(a)), (2, len(b))):
        half = normal(size, size + 2, seed=seed)
        starts.append(half @ half.T / size + torch.eye(size, dtype=torch.float64))
    errors = []
    for lr in (1e-3, 1e-4):
        with watched(case.model, **(PLAIN | {"factor_lr": lr, "coupled": False})) as (f, feed):
            ((name, identities),) = factors_in(f).items()
            roots = [torch.linalg.cholesky(torch.linalg.inv(s)).unsqueeze(0) for s in starts]
            factors = tuple(
                replace(one, entries=(root,)) for one, root in zip(identities, roots, strict=True)
            )
            empty = InverseFactorStatistics(torch.zeros((), dtype=torch.float64), factors)
            f.estimates[name] = replace(f.estimates[name], average=empty)
            feed(case.x, y, "categorical", "exact")
            f.refresh(damping)
            found = [torch.linalg.inv(x[0]) for x in f.operator(name).metric.factors]
        pairs = zip(found, starts, (a, b), strict=True)
        errors.append([
            (s_new - ((1 - lr) * s + lr * (m + damping * torch.eye(len(m))))).norm()
            for s_new, s, m in pairs
        ])  # fmt: skip
    for large, small in zip(*errors, strict=True):
        assert 99 < large / small < 101


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if "toeplitz" not in s])
def test_structures_are_exact_for_diagonal_statistics(structure):
    """Orthogonal inputs and outputs have diagonal A and B, for which nothing is dropped."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64))
    y = torch.zeros(5, 4, dtype=torch.float64)
    matrices = []
    for kept in ("dense", structure):
        options = PLAIN | SIZES | {"factor_structures": kept, "factor_momentum": 0.5}
        with watched(model, **options) as (f, feed):
            for step in range(5):
                feed(x + step * torch.diag(x.diagonal().flip(0)), y, "gaussian", "exact")
                f.refresh(0.1)
            matrices.append(f.matrix().to_dense())
    assert (matrices[0] - torch.diag(matrices[0].diagonal())).norm() < 1e-12
    torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-12, atol=1e-12)


def test_bounded_changes_survive_any_statistics():
    """Rows a million times larger from one step to the next, and back."""
    case = CASES["mlp"]()
    y = case.target("gaussian")
    for coupled in (True, False):
        with watched(case.model, coupled=coupled) as (f, feed):
            for step in range(30):
                feed(case.x * 10.0 ** (6 * (step % 2)), y, "gaussian", "exact")
                f.refresh(1e-4)
                values = f.matrix().eigenvalues()
                assert values.isfinite().all() and (values > 0).all()
            assert set(steps_of(f)) == {30}


# -- multiplying rows instead of gradients ---------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_give_what_the_gradient_gives(structure, bias):
    """Where rows are fewer than units; a gradient of zeros shows what was multiplied."""
    model = nn.Sequential(nn.Linear(40, 30, bias=bias)).double()
    x, y = normal(50, 40), normal(50, 30, seed=1)
    f = estimated(model, (x, y), "gaussian", "empirical", factor_structures=structure, **SIZES)
    (block,) = f.blocks.values()
    a, delta = normal(2, 1, 1, 40, seed=2), normal(2, 1, 1, 1, 30, seed=3)
    rows = {block.names[0]: LinearJacobian(block, a, delta)}
    gradients = f.layout.to_dict(rows[block.names[0]].to_dense().sum(0))
    silent = {key: torch.zeros_like(value) for key, value in gradients.items()}
    assert same(f.natural_gradient(GradientSource(gradients, rows)), gradients)
    f.refresh(0.1)
    sources = [(gradients, None), (gradients, rows), (silent, rows)]
    natural, both, alone = (
        f.layout.to_flat(f.natural_gradient(GradientSource(*source))) for source in sources
    )
    dense.assert_same(both, natural)
    dense.assert_same(alone, natural)
    assert f.structure.takes_rows(block, 2) == (structure != "diagonal")
    assert not f.structure.takes_rows(block, 100)


def test_only_plain_weight_matrices_take_rows():
    for name, expected in (
        ("one_layer", [True]),
        ("conv1d", [False, True, True]),
        ("embedding", [False, True]),
        ("layer_norm", [True, False, False, True]),
        ("frozen", [False, True, True]),
    ):
        with watched(CASES[name]().model) as (f, _):
            assert [f.structure.takes_rows(block, 0) for block in f.blocks.values()] == expected


# -- memory ----------------------------------------------------------------------------------------


def wide_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(256, 320, bias=False), nn.Tanh(), nn.Linear(320, 256, bias=False)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_memory_is_that_of_the_structure(structure, momentum):
    """Costs, state and checkpoints hold the structure's numbers only."""
    per_size = {
        "dense": lambda d: d * d,
        "diagonal": lambda d: d,
        "block_diagonal": lambda d: 32 * d,
        "lower_triangular": lambda d: d * (d + 1) // 2,
        "upper_triangular": lambda d: d * (d + 1) // 2,
        "lower_toeplitz": lambda d: d,
        "upper_toeplitz": lambda d: d,
        "hierarchical": lambda d: 33 * (d - 32) + 3 * 16 * 16,
    }[structure]
    model = wide_net()
    optimizer = make_optimizer(
        SINGD,
        model,
        "gaussian",
        factor_structures=structure,
        fisher="empirical",
        factor_momentum=momentum,
    )
    for _ in range(2):
        model(torch.randn(8, 256)).square().sum().backward()
        optimizer.step()
    expected = per_size(256) + per_size(320)
    f = optimizer.preconditioner.curvature
    costs = f.costs(Workload(1000, 1))
    for name, present in f.estimates.items():
        kept = present.average
        assert kept.waiting is None
        assert sum(factor.numel for factor in kept.factors) == expected
        assert (kept.momenta is not None) == (momentum > 0)
        assert sum(factor.numel for factor in kept.momenta or ()) == expected * (momentum > 0)
        metrics = structure == "dense"  # K Kᵀ, kept for preconditioning.
        assert costs[name].memory == 4 * expected * (1 + (momentum > 0) + metrics)
        assert structure.replace("_", " ") in costs[name].factors
    file = io.BytesIO()
    torch.save(f.state_dict(), file)
    assert file.tell() < 2 * 4 * expected * (1 + (momentum > 0)) + 20_000


def added_in_place(total, left, right, out_shape=None, **options) -> int:
    """Return the operations of ``addmm_``, which torch does not count by itself."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: added_in_place}


@pytest.mark.parametrize("rows_per_unit", [None, 2.0])
@pytest.mark.parametrize("positions", [1, 10])
@pytest.mark.parametrize("sharing", ["expand", "reduce", "split"])
@pytest.mark.parametrize("name", ["singd", "singd in bfloat16", "kfac"])
def test_multiplications_are_those_stated(name, sharing, positions, rows_per_unit):
    """Of an update and a step of the recursion; K-FAC's of an update, with nothing factorised."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 12, bias=False), nn.Tanh(), nn.Linear(12, 6, bias=False)]
    model, x = nn.Sequential(*layers).double(), normal(8, positions, 9)
    options = {"factor_dtype": torch.bfloat16} if "bfloat16" in name else {}
    options |= {"weight_sharing": sharing, "rows_per_unit": rows_per_unit}
    with Capture(model) as capture:
        f = curvature_of(name.partition(" ")[0], capture, **options)
        output = model(x)
        jacobians = capture.pull_back(output, normal(3, *output.shape, seed=3))
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            f.observe(jacobians, 8.0)
            f.join()
            if name != "kfac":
                f.refresh(0.1)
    stated = f.costs(Workload(8, 3, dict.fromkeys(f.parts, positions)))
    total = sum(cost.refresh for cost in stated.values())
    if name == "kfac":
        total -= 9**3 + 2 * 12**3 + 6**3
    assert counter.get_total_flops() == 2 * total


@pytest.mark.parametrize("structure", ["diagonal", "block_diagonal", "hierarchical"])
def test_training_forms_no_large_matrix(structure):
    """No tensor of a training step exceeds the weights by much, though d² does by far."""
    model = nn.Sequential(nn.Linear(4000, 2, bias=False))
    optimizer = make_optimizer(SINGD, model, "gaussian", factor_structures=structure, factors=1)
    x = torch.randn(8, 4000)
    with Largest() as largest:
        for _ in range(2):
            optimizer.zero_grad()
            functional.mse_loss(model(x), torch.zeros(8, 2)).backward()
            optimizer.step()
        optimizer.state_dict()
    assert largest.numel <= 33 * 4000


def test_large_factors_and_vocabularies_are_diagonal():
    model = nn.Sequential(nn.Embedding(100_000, 4), nn.Flatten(), nn.Linear(12, 3))
    optimizer = make_optimizer(
        SINGD, model, "categorical", factors=1, max_factor_size=10,
        lr=0.1, momentum=0.9, kl_clip=3e-5, nesterov=True,
    )  # fmt: skip
    factors = factors_in(optimizer.preconditioner.curvature).values()
    assert [(k.structure, c.structure) for k, c in factors] == [("diagonal", "dense")] * 2
    tokens, y = torch.randint(0, 100_000, (16, 3)), torch.randint(0, 3, (16,))
    losses = []
    with Largest() as largest:
        for _ in range(10):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(tokens), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert largest.numel == 400_000
    assert losses[-1] < 0.7 * losses[0]


# -- precision and decompositions ------------------------------------------------------------------


class NoDecompositions(TorchDispatchMode):
    """Raises on every operation that decomposes, inverts or solves."""

    names = re.compile(
        "linalg_(?!vector_norm)|cholesky|inverse|solve|eig|svd|(?<!s)qr|lu_factor|lu_unpack|lstsq|"
        "logdet|matrix_exp"
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.names.search(func.__name__):
            raise AssertionError(f"{func.__name__} was called")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_decompositions(monkeypatch) -> None:
    """Let every function that decomposes, inverts or solves raise."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a decomposition was called")

    for owner in (torch, torch.linalg, Tensor):
        for name in dir(owner):
            decomposes = NoDecompositions.names.search(name) or name in ("inv", "inv_ex", "det")
            if decomposes and not name.startswith("_") and name[0].islower():
                monkeypatch.setattr(owner, name, refuse)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    )


def data(samples: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 6, generator=generator(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()


def train(
    model: nn.Module, optimizer: Any, steps: int, dtype: torch.dtype = torch.float32
) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_mode_sees_decompositions():
    with NoDecompositions():
        for function in (
            torch.linalg.cholesky, torch.linalg.eigh, torch.linalg.inv, torch.inverse,
            torch.linalg.svd, torch.linalg.qr, torch.cholesky_inverse, torch.linalg.eigvalsh,
        ):  # fmt: skip
            with pytest.raises(AssertionError, match="was called"):
                function(torch.eye(3))
        with pytest.raises(AssertionError, match="was called"):
            torch.linalg.solve(torch.eye(3), torch.ones(3))


#: Every structure, and some of them without the coupling of the two factors.
TRAINED = [(True, name) for name in STRUCTURES] + [
    (False, name) for name in ("dense", "diagonal", "hierarchical")
]


@pytest.mark.parametrize(("coupled", "structure"), TRAINED)
def test_pure_bfloat16_without_any_decomposition(structure, coupled, no_decompositions):
    model = network().bfloat16()
    optimizer = make_optimizer(
        SINGD,
        model,
        "categorical",
        factor_structures=structure,
        coupled=coupled,
        factors=2,
        damping=1e-2,
        factor_momentum=0.5,
        **SIZES,
    )
    losses = train(model, optimizer, 32, torch.bfloat16)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert min(steps_of(optimizer.preconditioner.curvature)) > 15
    for present in optimizer.preconditioner.curvature.estimates.values():
        stored = [matrix.dtype for matrix in present.average.factors + present.average.momenta]
        assert stored == [torch.bfloat16] * 4


@pytest.mark.parametrize(("coupled", "structure"), TRAINED)
def test_every_structure_trains(structure, coupled):
    """Without a decomposition in float32 either; some steps are watched operation by operation."""
    model = network()
    optimizer = make_optimizer(
        SINGD,
        model,
        "categorical",
        factor_structures=structure,
        coupled=coupled,
        factors=2,
        damping=1e-3 if coupled else 1e-2,
        **SIZES,
    )
    with NoDecompositions():
        losses = train(model, optimizer, 3)
    losses += train(model, optimizer, 27)
    assert losses[-1] < 0.15 * losses[0]


def test_factor_dtype():
    """Factors of another type than the parameters, and the matrix as an object in full."""
    x, y = data()
    matrices = {}
    for dtype in (None, torch.bfloat16, torch.float64):
        f = estimated(network(), (x, y), "categorical", factor_dtype=dtype)
        f.refresh(0.1)
        stored = torch.float32 if dtype is None else dtype
        assert all(k.dtype == stored for k, _ in factors_in(f).values())
        source = GradientSource(f.layout.to_dict(torch.ones(f.layout.numel)))
        assert all(t.dtype == stored for t in f.natural_gradient(source).values())
        matrices[dtype] = f.matrix().to_dense()
        assert matrices[dtype].dtype == (
            torch.float64 if stored == torch.float64 else torch.float32
        )
    exact = matrices[torch.float64]
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 5e-2)):
        assert (matrices[dtype].double() - exact).norm() <= tolerance * exact.norm()
    model = network()
    optimizer = make_optimizer(SINGD, model, factor_dtype=torch.bfloat16, factors=2, damping=1e-2)
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_half_parameters_have_full_factors():
    model = network().half()
    with watched(model) as (f, _):
        assert {k.dtype for k, _ in factors_in(f).values()} == {torch.float32}


# -- manners in a training loop --------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "block_diagonal", "hierarchical"])
@pytest.mark.parametrize("stop", [7, 9])
def test_a_resumed_run_is_the_same_bit_by_bit(structure, stop, tmp_path):
    """Saved in the middle of an interval, with statistics that wait because of staggering."""

    def make(model: nn.Module) -> SINGD:
        return make_optimizer(
            SINGD,
            model,
            lr=0.1,
            factor_structures=structure,
            factors=3,
            stagger=True,
            factor_momentum=0.5,
            **SIZES,
        )

    model = network()
    optimizer = make(model)
    train(model, optimizer, stop)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    waiting = [
        present.average.waiting is not None
        for present in optimizer.preconditioner.curvature.estimates.values()
    ]
    assert any(waiting) == (stop == 7)
    train(model, optimizer, 8)

    resumed = network()
    second = make(resumed)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, 8)
    assert same(model.state_dict(), resumed.state_dict())
    assert same(optimizer.state_dict(), second.state_dict())


def test_a_copy_goes_on_as_the_original_does():
    model = network()
    optimizer = make_optimizer(SINGD, model, factors=2, factor_structures="lower_triangular")
    train(model, optimizer, 3)
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(copied_model, copied, 3)
    assert same(model.state_dict(), copied_model.state_dict())
    assert same(optimizer.state_dict(), copied.state_dict())
    assert "lower triangular 7, lower triangular 12" in str(optimizer.summary())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_batch_that_is_not_finite_changes_nothing(structure):
    model = network()
    optimizer = make_optimizer(SINGD, model, factor_structures=structure, factors=1, **SIZES)
    train(model, optimizer, 3)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    x, y = data()
    x[5, 2] = float("nan")
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="skipped a step"):
        optimizer.step()
    assert same(before, copy.deepcopy([model.state_dict(), optimizer.state_dict()]))
    train(model, optimizer, 1)
    assert set(steps_of(optimizer.preconditioner.curvature)) == {4}


def test_a_step_is_taken_back_as_a_whole():
    """Snapshots hold references; whatever follows leaves them as they were."""
    case = CASES["conv1d"]()
    y = case.target("categorical")
    with watched(case.model) as (f, feed):
        feed(case.x, y, "categorical", "exact")
        f.refresh(0.1)
        feed(case.x, y, "categorical", "exact")
        before, snapshot = copy.deepcopy(f.state_dict()), f.snapshot()
        feed(2 * case.x, y, "categorical", "exact", decay=0.5)
        f.refresh(0.3)
        assert not same(before, f.state_dict())
        f.rollback(snapshot)
        assert same(before, f.state_dict())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_that_are_not_finite_are_left_out(structure):
    """With their count: the next step is that of the other batch."""
    case = CASES["mlp"]()
    y = case.target("categorical")
    for value in (math.nan, math.inf):
        broken = case.x.clone()
        broken[0, 0] = value
        states = []
        for batches in ([case.x], [case.x, broken], [broken, case.x]):
            with watched(case.model, factor_structures=structure, **SIZES) as (f, feed):
                for x in batches:
                    feed(x, y, "categorical", "exact")
                f.refresh(0.1)
                states.append(f.operator("0").to_dense())  # Tanh makes ±1 of ±inf for the others.
                assert f.matrix().to_dense().isfinite().all()
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2])


def test_the_rest_of_a_batch_that_is_not_finite_is_left_out_too():
    """A further chunk of directions has no inputs of its own and no count."""
    case = CASES["mlp"]()
    matrices = []
    for broken in (False, True):
        with Capture(case.model) as capture:
            f = curvature_of("singd", capture)
            with evaluated(capture, case.x) as z:
                vectors = normal(2, *z.shape)
                for sign in ([math.nan] if broken else []) + [1.0]:
                    f.observe(capture.pull_back(z, sign * vectors), 4.0)
                    f.observe(capture.pull_back(z, 2.0 * vectors), 4.0, continued=True)
                    f.join()
        f.refresh(0.1)
        matrices.append(f.matrix().to_dense())
    assert torch.equal(*matrices)


def test_a_diverging_recursion_keeps_the_last_factors_and_names_the_layer():
    case = CASES["mlp"]()
    y = case.target("categorical")
    with watched(case.model, **(PLAIN | {"factor_lr": 1e100})) as (f, feed):
        feed(case.x, y, "categorical", "exact")
        f.refresh(0.1)
        before = copy.deepcopy(f.state_dict())
        feed(case.x, y, "categorical", "exact")
        with pytest.warns(UserWarning) as caught:
            f.refresh(0.1)
        messages = [str(w.message) for w in caught]
        assert len(messages) == 3
        for name, message in zip(("0", "2", "4"), messages, strict=True):
            assert f"'{name}' could not be factorised" in message
            assert "lower factor_lr or max_change" in message
        for name, part in f.state_dict().items():
            assert part["draws"] == before[name]["draws"] + 1
            assert same(part["inverse"], before[name]["inverse"])
            for key in ("factors", "momenta", "steps"):
                assert same(part["average"][key], before[name]["average"][key])
        feed(case.x, y, "categorical", "exact")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            f.refresh(0.1)


def test_adaptive_damping():
    """λ falls where the model proves right, and the factors follow λ."""
    x, y = data()
    losses, dampings = [], []
    for damping in (natgrad.LevenbergMarquardt(initial=10.0, interval=2), 10.0):
        model = network()
        optimizer = make_optimizer(
            SINGD,
            model,
            damping=damping,
            factors=2,
            kl_clip=None,
            lr=1.0,
            momentum=0.0,
            fisher="exact",
        )

        def closure(model: nn.Module = model, optimizer: SINGD = optimizer) -> float:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.item()

        losses.append([optimizer.step(closure) for _ in range(60)])
        dampings.append(optimizer.param_groups[0]["damping"])
    assert dampings[0] < 1.0 and dampings[1] == 10.0
    assert min(losses[0]) < 0.5 * min(losses[1])  # Steps as long as these are not steady.


def test_early_and_staggered_steps():
    """Factors move at steps 0, 1, 2, 4, 8 and then every tenth; staggered ones as often."""
    for stagger in (False, True):
        model = network()
        optimizer = make_optimizer(SINGD, model, lr=0.1, factors=10, stagger=stagger)
        counts = []
        for _ in range(30):
            train(model, optimizer, 1)
            counts.append(steps_of(optimizer.preconditioner.curvature))
        assert counts[9] == [5, 5, 5]
        assert counts[29] == [7, 7, 7]
        if not stagger:
            assert [c[0] for c in counts[:11]] == [1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 6]


def test_warm_up_and_other_options_pass_through():
    model = network()
    optimizer = make_optimizer(
        SINGD, model, lr=1.5, warmup=2, decay=0.9, norm_clip=0.1, fallback="sgd", kl_clip=1e-3
    )
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    assert same(before, model.state_dict())
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0]


def test_errors_are_clear():
    model = network()
    for options, message in [
        ({"factor_structures": "sparse"}, "factor structure must be one of dense.*'sparse'"),
        ({"factor_structures": ("dense",)}, "one name, or two"),
        ({"factor_lr": 0.0}, "factor_lr must be positive and finite, got 0.0"),
        ({"factor_momentum": 1.0}, r"factor_momentum must be in \[0, 1\), got 1.0"),
        ({"max_change": 1.0}, r"max_change must be in \(0, 1\) or None, got 1.0"),
        ({"initial_scale": "zero"}, "initial_scale must be 'batch' or 'identity', got 'zero'"),
        ({"factor_dtype": torch.float16}, "factor_dtype must be torch.bfloat16"),
        ({"weight_sharing": "none"}, "weight_sharing must be"),
        ({"rows_per_unit": 0.0}, "rows_per_unit must be positive"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_optimizer(SINGD, model, **options)
    with pytest.raises(TypeError, match="'singd' has no option 'factored_damping'"):
        as_structure("singd", factored_damping=True)
    model = network()
    optimizer = make_optimizer(SINGD, model, factor_structures="diagonal")
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="make the optimizer with the options the checkpoint"):
        SINGD(model).load_state_dict(optimizer.state_dict())


def test_a_model_trains_after_options_were_refused():
    """Also while the error, and with it the optimizer that was not made, is still around."""
    model = network()
    with pytest.raises(ValueError, match="block_size must be at least 1") as caught:
        make_optimizer(SINGD, model, block_size=0)
    losses = train(model, make_optimizer(SINGD, model), 20)
    assert losses[-1] < losses[0], caught
