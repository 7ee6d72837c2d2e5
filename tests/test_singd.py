"""SINGD and IKFAC against the recursion written with dense matrices."""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad
from natgrad import fisher as fisher_module
from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import GradientSource, factor_terms, make_structure
from natgrad.curvature.cost import Workload
from natgrad.curvature.singd import SINGDFisher
from natgrad.fisher import as_fisher_type, fisher_matrix, update_from_output
from natgrad.jacobians import LinearJacobian
from natgrad.likelihoods import as_likelihood
from natgrad.optim.singd import SINGD
from tests import dense
from tests.cases import CASES, Case, generator, normal
from tests.test_structured_factors import STRUCTURES, Largest, projection
from tests.test_structures import KFAC_CASES, check_interface

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


@contextmanager
def watched(model: nn.Module, output: Any = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Give an empty structure and a function that updates it with one batch."""
    with Capture(model, output) as capture:
        structure = make_structure("singd", capture.blocks, capture.layout, **options)

        def feed(x: Any, y: Tensor, likelihood: Any, kind: str) -> None:
            likelihood, fisher = as_likelihood(likelihood), as_fisher_type(kind)
            with evaluated(capture, x) as z:
                update_from_output(
                    structure, capture, likelihood, fisher, z,
                    likelihood.event_weights(z.detach(), y), likelihood.count(z.detach(), y),
                    target=y, retain_graph=False,
                )  # fmt: skip

        yield structure, feed


def move(model: nn.Module, seed: int) -> None:
    """Change all parameters a little."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))


def gradient_source(structure: Any, seed: int) -> tuple[GradientSource, Tensor]:
    flat = normal(structure.layout.numel, seed=seed)
    return GradientSource(structure.layout.to_dict(flat)), flat


def check_matrix(structure: Any, inverse: Tensor, seed: int = 0) -> None:
    """Check the matrix, its inverse and the preconditioned gradient."""
    source, flat = gradient_source(structure, seed)
    natural = structure.layout.to_flat(structure.precondition(source))
    dense.assert_same(natural, inverse @ flat)
    dense.assert_same(structure.solve(flat), inverse @ flat)
    dense.assert_same(structure.to_dense(), torch.linalg.inv(inverse))


def one_hot_blocks(case: Case) -> list[int]:
    return [i for i, spec in enumerate(case.blocks) if spec.unit == "columns"]


# -- step by step ----------------------------------------------------------------------------------


FORMULA_CASES = [
    name
    for name in KFAC_CASES
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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
def test_every_structure_follows_the_formulas(structure, coupled, bounded):
    """Six steps with momentum, from the identity or scaled, with and without bounded changes."""
    case = CASES["conv1d"]()
    model = copy.deepcopy(case.model)
    size = sum(p.numel() for p in model.parameters())
    options = PLAIN | SIZES | {"coupled": coupled, "factor_momentum": 0.4}
    extra = {}
    if bounded:
        options |= {"max_change": 0.3, "initial_scale": "batch", "early_factor_lr": True}
        extra = {"max_change": 0.3, "batch_scale": True, "early": True}
    reference = Reference(structures=(structure, structure), coupled=coupled, momentum=0.4, **extra)
    with watched(model, factor_structures=structure, **options) as (f, feed):
        for step in range(STEPS):
            move(model, step)
            x = normal(*case.x.shape, seed=step)
            y, kind = case.target("categorical", seed=step), ("exact", "empirical")[step % 2]
            loss = case.loss("categorical")
            found = dense.kfac_pairs(model, x, y, loss, case.blocks, kind)
            feed(x, y, "categorical", kind)
            f.refresh(DAMPINGS[step])
            reference.step(found, DAMPINGS[step])
            check_matrix(f, reference.inverse(size), step)
        for part, block in zip(f.parts.values(), reference.groups.values(), strict=True):
            assert part.steps == STEPS
            for factor, name in ((part.inputs, "k"), (part.outputs, "c")):
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
        check_matrix(f, reference.inverse(f.shape[0]))


@pytest.mark.parametrize("momentum_on", ["natural_gradient", "gradient"])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_optimizer_takes_these_steps(coupled, momentum_on):
    """Parameters over seven steps of an interval of 2, with momentum and weight decay."""
    case = CASES["mlp"]()
    model, copied = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = SINGD(
        model, "categorical", lr=0.3, damping=0.05, momentum=0.8, nesterov=False,
        weight_decay=0.1, fisher="empirical", factor_interval=2, early_updates=False,
        kl_clip=None, coupled=coupled, momentum_on=momentum_on, factor_momentum=0.5,
        factor_lr=0.1, early_factor_lr=False, max_change=None, initial_scale="identity",
    )  # fmt: skip
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
        both = [torch.diag_embed(x) if x.dim() == 2 else x for x in part.kronecker_factors()]
        result.append((list(both[0]), list(both[1])))
    return result


def check_statistics(
    case: Case, data: Any, likelihood: Any, kind: str = "exact", **options: Any
) -> None:
    """Check one step from the identity against the factors of the library's K-FAC."""
    kfac = fisher_matrix(case.model, data, likelihood, "kfac", kind, output=case.output, **options)
    f = fisher_matrix(
        case.model, data, likelihood, "singd", kind, output=case.output, **PLAIN, **options
    )
    f.refresh(0.2)
    statistics = kfac_statistics(kfac)
    moved = 0
    for part, (a, b) in zip(f.parts.values(), statistics, strict=True):
        for group, pair in enumerate(zip(a, b, strict=True)):
            recursion = Recursion()
            if part.steps:
                recursion.step(*pair, 0.2)
                dense.assert_same(part.inputs.to_dense()[group], recursion.k)
                dense.assert_same(part.outputs.to_dense()[group], recursion.c)
        moved += part.steps
    assert moved > 0


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_statistics_are_those_of_kfac(name, sharing):
    """All layer kinds, attention, tied weights and modules without a formula included."""
    case = CASES[name]()
    y = case.target("gaussian")
    check_statistics(case, (case.x, y), "gaussian", weight_sharing=sharing)


@pytest.mark.parametrize("chunk", [None, 1, 60])
@pytest.mark.parametrize("name", ["tokens", "pixels", "conv2d", "language_model", "tied_embedding"])
def test_chunks_batches_and_ignored_events(name, chunk, monkeypatch):
    """Statistics that come in pieces, of directions, of rows and of batches."""
    if chunk is not None:
        monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(factor_terms, "CHUNK_ELEMENTS", chunk)
    case = CASES[name]()
    y = case.target("categorical")
    masked = y.clone()
    masked.view(-1)[::3] = -100
    x, n = case.x, len(case.x)
    for sharing in ("expand", "reduce"):
        for kind in ("exact", "empirical"):
            for target in (y, masked):
                check_statistics(case, (x, target), "categorical", kind, weight_sharing=sharing)
            batches = [(x[: n - 1], masked[: n - 1]), (x[n - 1 :], masked[n - 1 :])]
            check_statistics(case, batches, "categorical", kind, weight_sharing=sharing)


def test_subsets_of_positions_are_those_of_kfac():
    case = CASES["pooled_tokens"]()
    y = case.target("gaussian")
    check_statistics(case, (case.x, y), "gaussian", rows_per_unit=2.0)
    f, whole = (
        fisher_matrix(case.model, (case.x, y), "gaussian", "singd", rows_per_unit=limit)
        for limit in (1.0, None)
    )
    f.refresh(0.1), whole.refresh(0.1)
    assert (f.to_dense() - whole.to_dense()).norm() > 1e-3 * whole.to_dense().norm()


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_discount_weighs_what_waits_for_a_step(factor):
    """Two batches before one step, the first discounted, as in K-FAC; factors are not touched."""
    case = CASES["mlp"]()
    model = case.model
    second = normal(6, 3, seed=5), torch.randint(0, 3, (6,), generator=generator(5))
    y, loss = case.target("categorical"), case.loss("categorical")
    counts = [factor * len(case.x), 6.0]
    with watched(model, **PLAIN) as (f, feed):
        feed(case.x, y, "categorical", "exact")
        f.discount(factor)
        feed(*second, "categorical", "exact")
        f.refresh(0.1)
        f.discount(0.0)
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
        check_matrix(f, reference.inverse(f.shape[0]))
        assert all(part.steps == 1 for part in f.parts.values())


# -- where it goes ---------------------------------------------------------------------------------


def converge(
    case: Case, steps: int, damping: float, likelihood: str = "categorical", **options: Any
) -> SINGDFisher:
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
    expected = sum(dense.kron(f.shape[0], where, pairs) for where, pairs in inverses)
    check_matrix(f, expected)


def divergence(p: Tensor, q: Tensor, a: Tensor, b: Tensor, damping: float) -> Tensor:
    """Return twice KL(N(0, Q ⊗ P) ‖ N(0, (B ⊗ A + λI)⁻¹)), up to a constant."""
    precision = torch.kron(b, a) + damping * torch.eye(len(a) * len(b), dtype=a.dtype)
    covariance = torch.kron(q, p)
    return (precision @ covariance).trace() - torch.linalg.slogdet(covariance).logabsdet


@pytest.mark.parametrize("name", ["mlp", "conv1d"])
def test_singd_converges_to_the_nearest_kronecker_product(name):
    """Both brackets vanish, where the divergence from the damped inverse is least."""
    case, damping = CASES[name](), 0.1
    f = converge(case, 90, damping)
    for part, (_, pairs) in zip(f.parts.values(), factors_of(case), strict=True):
        ks, cs = part.inputs.to_dense(), part.outputs.to_dense()
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
    dense.assert_same(f.to_dense(), exact + 0.7 * torch.eye(4, dtype=torch.float64))


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
            (part,) = f.parts.values()
            state = part.state_dict()
            for key, start in zip(("inputs", "outputs"), starts, strict=True):
                root = torch.linalg.cholesky(torch.linalg.inv(start))
                state["matrices"][key] = [root.unsqueeze(0)]
            part.load_state_dict(state, torch.device("cpu"))
            feed(case.x, y, "categorical", "exact")
            f.refresh(damping)
            found = [torch.linalg.inv(x[0]) for x in part.inverse_factors()]
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
            matrices.append(f.to_dense())
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
                values = f.eigenvalues()
                assert values.isfinite().all() and (values > 0).all()
            assert all(part.steps == 30 for part in f.parts.values())


# -- multiplying rows instead of gradients ---------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_give_what_the_gradient_gives(structure, bias):
    """Where rows are fewer than units; a gradient of zeros shows what was multiplied."""
    model = nn.Sequential(nn.Linear(40, 30, bias=bias)).double()
    x, y = normal(50, 40), normal(50, 30, seed=1)
    f = fisher_matrix(
        model, (x, y), "gaussian", "singd", "empirical", factor_structures=structure, **SIZES
    )
    (name,), (part,) = f.blocks, f.parts.values()
    used = 0
    for samples in (2, 100):
        a, delta = normal(samples, 1, 1, 40, seed=2), normal(samples, 1, 1, 1, 30, seed=3)
        rows = LinearJacobian(f.blocks[name], a, delta)
        gradient = rows.to_dense().sum(0)
        gradients = f.layout.to_dict(gradient)
        silent = {key: torch.zeros_like(value) for key, value in gradients.items()}
        before = f.precondition(GradientSource(gradients, {name: rows}))
        if part.steps == 0:
            assert same(before, gradients)
            f.refresh(0.1)
        natural = f.layout.to_flat(f.precondition(GradientSource(gradients)))
        both = f.layout.to_flat(f.precondition(GradientSource(gradients, {name: rows})))
        dense.assert_same(both, natural)
        alone = f.layout.to_flat(f.precondition(GradientSource(silent, {name: rows})))
        if part.rows_are_cheaper(samples):
            used += 1
            dense.assert_same(alone, natural)
        else:
            assert not alone.any()
    assert used == (structure != "diagonal")


def test_only_plain_weight_matrices_take_rows():
    for name, expected in (
        ("one_layer", [True]),
        ("conv1d", [False, True, True]),
        ("embedding", [False, True]),
        ("layer_norm", [True, False, False, True]),
        ("frozen", [False, True, True]),
    ):
        case = CASES[name]()
        y = case.target("gaussian")
        f = fisher_matrix(case.model, (case.x, y), "gaussian", "singd", output=case.output)
        assert [part.rows_are_cheaper(0) for part in f.parts.values()] == expected


# -- the matrix as an object -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv1d", "embedding", "layer_norm", "self_attention"])
@pytest.mark.parametrize("structure", ["dense", "hierarchical"])
def test_interface(name, structure):
    case = CASES[name]()
    f = fisher_matrix(
        case.model, (case.x, case.target("categorical")), "categorical", "singd",
        output=case.output, factor_structures=structure, **SIZES,
    )  # fmt: skip
    eye = torch.eye(f.shape[0], dtype=torch.float64)
    dense.assert_same(f.to_dense(), eye)
    f.refresh(0.1)
    matrix = f.to_dense()
    assert (matrix - eye).norm() > 0.1
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-10)
    check_interface(f, matrix, True)
    source, flat = gradient_source(f, 1)
    dense.assert_same(f.layout.to_flat(f.precondition(source)), f.solve(flat))
    dense.assert_same(f.solve(flat), torch.linalg.solve(matrix, flat))
    root = f.inverse_root(eye, 0.3)
    torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-10)
    dense.assert_same(root @ root, torch.linalg.inv(matrix + 0.3 * eye))


def test_function_space_map():
    case = CASES["conv1d"]()
    y = case.target("categorical")
    f = fisher_matrix(case.model, (case.x, y), "categorical", "singd")
    f.refresh(0.1)
    with Capture(case.model) as capture, evaluated(capture, case.x) as z:
        vectors = torch.eye(z.shape[1], dtype=z.dtype).unsqueeze(1).expand(-1, *z.shape)
        rows = capture.pull_back(z, vectors)
        for damping in (0.0, 0.3):
            jacobian = rows.to_dense()
            eye = torch.eye(f.shape[0], dtype=torch.float64)
            inverse = torch.linalg.inv(f.to_dense() + damping * eye)
            found = f.function_space_map(rows, damping=damping)
            dense.assert_same(sum(found.values()), jacobian @ inverse @ jacobian.T)


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
    optimizer = SINGD(
        model, "gaussian", factor_structures=structure, fisher="empirical",
        factor_momentum=momentum,
    )  # fmt: skip
    for _ in range(2):
        model(torch.randn(8, 256)).square().sum().backward()
        optimizer.step()
    expected = per_size(256) + per_size(320)
    f = optimizer.preconditioner.structure
    costs = f.costs(Workload(1000, 1))
    for name, part in f.parts.items():
        matrices = part.state_dict()["matrices"]
        kept = ["inputs", "outputs"]
        kept += ["_input_momentum", "_output_momentum"] * (momentum > 0)
        assert [key for key, value in matrices.items() if value is not None] == kept
        assert sum(t.numel() for key in kept for t in matrices[key]) == expected * len(kept) // 2
        metrics = structure == "dense"  # K Kᵀ, kept for preconditioning.
        assert costs[name].memory == 4 * expected * (1 + (momentum > 0) + metrics)
        assert structure.replace("_", " ") in costs[name].factors
    file = io.BytesIO()
    torch.save(f.state_dict(), file)
    assert file.tell() < 2 * 4 * expected * (1 + (momentum > 0)) + 20_000


@pytest.mark.parametrize("structure", ["diagonal", "block_diagonal", "hierarchical"])
def test_training_forms_no_large_matrix(structure):
    """No tensor of a training step exceeds the weights by much, though d² does by far."""
    model = nn.Sequential(nn.Linear(4000, 2, bias=False))
    optimizer = SINGD(model, "gaussian", factor_structures=structure, factor_interval=1)
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
    optimizer = SINGD(model, "categorical", factor_interval=1, max_factor_size=10)
    parts = optimizer.preconditioner.structure.parts
    assert [p.inputs.structure for p in parts.values()] == ["diagonal", "diagonal"]
    assert [p.outputs.structure for p in parts.values()] == ["dense", "dense"]
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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("coupled", [True, False])
def test_pure_bfloat16_without_any_decomposition(structure, coupled, no_decompositions):
    model = network().bfloat16()
    optimizer = SINGD(
        model, "categorical", factor_structures=structure, coupled=coupled, factor_interval=2,
        damping=1e-2, factor_momentum=0.5, **SIZES,
    )  # fmt: skip
    losses = train(model, optimizer, 40, torch.bfloat16)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    for part in optimizer.preconditioner.structure.parts.values():
        assert part.steps > 15
        matrices = part.state_dict()["matrices"].values()
        stored = [t for entries in matrices if entries is not None for t in entries]
        assert len(stored) >= 4 and all(t.dtype == torch.bfloat16 for t in stored)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("coupled", [True, False])
def test_every_structure_trains(structure, coupled):
    """Without a decomposition in float32 either; some steps are watched operation by operation."""
    model = network()
    optimizer = SINGD(
        model, "categorical", factor_structures=structure, coupled=coupled, factor_interval=2,
        damping=1e-3 if coupled else 1e-2, **SIZES,
    )  # fmt: skip
    with NoDecompositions():
        losses = train(model, optimizer, 3)
    losses += train(model, optimizer, 57)
    assert losses[-1] < 0.15 * losses[0]


def test_factor_dtype():
    """Factors of another type than the parameters, and the matrix as an object in full."""
    x, y = data()
    matrices = {}
    for dtype in (None, torch.bfloat16, torch.float64):
        f = fisher_matrix(network(), (x, y), structure="singd", factor_dtype=dtype)
        f.refresh(0.1)
        stored = torch.float32 if dtype is None else dtype
        assert all(part.inputs.dtype == stored for part in f.parts.values())
        source = GradientSource(f.layout.to_dict(torch.ones(f.shape[0])))
        assert all(t.dtype == stored for t in f.precondition(source).values())
        matrices[dtype] = f.to_dense()
        assert matrices[dtype].dtype == (
            torch.float64 if stored == torch.float64 else torch.float32
        )
    exact = matrices[torch.float64]
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 5e-2)):
        assert (matrices[dtype].double() - exact).norm() <= tolerance * exact.norm()
    model = network()
    optimizer = SINGD(model, factor_dtype=torch.bfloat16, factor_interval=2, damping=1e-2)
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_half_parameters_have_full_factors():
    model = network().half()
    with Capture(model) as capture:
        f = make_structure("singd", capture.blocks, capture.layout)
    assert {part.inputs.dtype for part in f.parts.values()} == {torch.float32}


# -- manners in a training loop --------------------------------------------------------------------


def tensors(value: Any) -> list[Any]:
    """Return all leaves of nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in tensors(v)]
    return [value]


def same(left: Any, right: Any) -> bool:
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("structure", ["dense", "block_diagonal", "hierarchical"])
@pytest.mark.parametrize("stop", [7, 9])
def test_a_resumed_run_is_the_same_bit_by_bit(structure, stop, tmp_path):
    """Saved in the middle of an interval, with statistics that wait because of staggering."""

    def make(model: nn.Module) -> SINGD:
        return SINGD(
            model, factor_structures=structure, factor_interval=3, stagger=True,
            factor_momentum=0.5, **SIZES,
        )  # fmt: skip

    model = network()
    optimizer = make(model)
    train(model, optimizer, stop)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    waiting = [
        part.state_dict()["matrices"]["_input_sum"] is not None
        for part in optimizer.preconditioner.structure.parts.values()
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
    optimizer = SINGD(model, factor_interval=2, factor_structures="lower_triangular")
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
    optimizer = SINGD(model, factor_structures=structure, factor_interval=1, **SIZES)
    train(model, optimizer, 3)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    x, y = data()
    x[5, 2] = float("nan")
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="skipped a step"):
        optimizer.step()
    assert same(before, [model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 1)
    assert all(p.steps == 4 for p in optimizer.preconditioner.structure.parts.values())


def test_a_step_is_taken_back_as_a_whole():
    """Snapshots hold references; whatever follows leaves them as they were."""
    case = CASES["conv1d"]()
    y = case.target("categorical")
    with watched(case.model) as (f, feed):
        feed(case.x, y, "categorical", "exact")
        f.refresh(0.1)
        feed(case.x, y, "categorical", "exact")
        before, snapshot = copy.deepcopy(f.state_dict()), f.snapshot()
        f.discount(0.5)
        feed(2 * case.x, y, "categorical", "exact")
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
                states.append(f.parts["0"].to_dense())  # Tanh makes ±1 of ±inf for the others.
                assert f.to_dense().isfinite().all()
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2])


def test_the_rest_of_a_batch_that_is_not_finite_is_left_out_too():
    """A further chunk of directions has no inputs of its own and no count."""
    case = CASES["mlp"]()
    matrices = []
    for broken in (False, True):
        with Capture(case.model) as capture:
            f = make_structure("singd", capture.blocks, capture.layout)
            with evaluated(capture, case.x) as z:
                vectors = normal(2, *z.shape)
                if broken:
                    f.update(capture.pull_back(z, math.nan * vectors), 4.0)
                    f.update(capture.pull_back(z, vectors), 0.0)
                f.update(capture.pull_back(z, vectors), 4.0)
                f.update(capture.pull_back(z, 2.0 * vectors), 0.0)
        f.refresh(0.1)
        matrices.append(f.to_dense())
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
        draws = {name: part.draws for name, part in f.parts.items()}
        after = f.state_dict()
        for name, part in after.items():
            assert part["draws"] == draws[name] == before[name].pop("draws") + 1
            part.pop("draws")
        assert same(before, after)
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
        optimizer = SINGD(
            model, damping=damping, factor_interval=2, kl_clip=None, lr=1.0, momentum=0.0,
            fisher="exact",
        )  # fmt: skip

        def closure(model: nn.Module = model, optimizer: SINGD = optimizer) -> float:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.item()

        losses.append([optimizer.step(closure) for _ in range(60)])
        dampings.append(optimizer.param_groups[0]["damping"])
    assert dampings[0] < 1.0 and dampings[1] == 10.0
    assert losses[0][-1] < 0.5 * losses[1][-1]


def test_early_and_staggered_steps():
    """Factors move at steps 0, 1, 2, 4, 8 and then every tenth; staggered ones as often."""
    for stagger in (False, True):
        model = network()
        optimizer = SINGD(model, factor_interval=10, stagger=stagger)
        counts = []
        for _ in range(30):
            train(model, optimizer, 1)
            parts = optimizer.preconditioner.structure.parts.values()
            counts.append([part.steps for part in parts])
        assert counts[9] == [5, 5, 5]
        assert counts[29] == [7, 7, 7]
        if not stagger:
            assert [c[0] for c in counts[:11]] == [1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 6]


def test_warm_up_and_other_options_pass_through():
    model = network()
    optimizer = SINGD(
        model, curvature_warmup=2, ema_decay=0.9, norm_clip=0.1, fallback="sgd", kl_clip=1e-3
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
            SINGD(model, **options)
    with pytest.raises(TypeError, match="'singd' has no option 'damping_rule'"):
        SINGD(model, damping_rule="pi")
    state = SINGD(model, factor_structures="diagonal").state_dict()
    with pytest.raises(ValueError, match="make the optimizer with the options the checkpoint"):
        SINGD(model).load_state_dict(state)
