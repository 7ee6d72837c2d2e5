"""What all structures share, compared with dense matrices; see ``structures_table.py``."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad
from natgrad import Capture
from natgrad.curvature.cost import Workload
from natgrad.fisher import estimation as fisher_module
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import Jacobians
from natgrad.likelihoods import Categorical, Gaussian, Likelihood
from natgrad.operators import FisherMatrix, GradientSource
from tests import dense
from tests.cases import CASES, Case, generator, labels, normal, rows
from tests.curvature.structures_table import (
    FACTORED,
    FIRST_STEP,
    LIKELIHOODS,
    SOME,
    TABLE,
    Batch,
    Entry,
    Problem,
    problem,
    problem_of,
)

ENTRIES = list(TABLE.values())
UNFACTORED = tuple(name for name in CASES if name not in FACTORED)


#: What ``fisher_matrix`` is asked for by Fisher type; other entries get the rows pulled back once.
FOR_USERS = {"exact": ("kfac",), "empirical": ("kfac",), "mc": ("kfac", "full", "kpsvd[1]")}


def table(cases: str | tuple[str, ...] | None = None, keep: Any = lambda entry: True) -> Any:
    """Parametrise over entries, and over cases by name or over those of a field of the entry.

    Entries follow one another within a case, whose reference is then computed once.
    """
    entries = [entry for entry in ENTRIES if keep(entry)]
    if cases is None:
        return pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in entries])
    pairs = [
        pytest.param(entry, name, id=f"{entry.name}-{name}")
        for name in CASES
        for entry in entries
        if name in (getattr(entry, cases) if isinstance(cases, str) else cases)
        and (name in entry.cases or cases == "layers")
    ]
    return pytest.mark.parametrize(("entry", "name"), pairs)


def own(entry: Entry) -> bool:
    """Whether an entry differs from all before it in what it sums up, not in its inverse alone."""
    return entry.same_sums is None


def flatten(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in named.values()])


# -- the definition --------------------------------------------------------------------------------


@table("layers")
def test_it_is_its_definition(entry, name):
    """For every likelihood, Fisher type and setting of shared weights."""
    likelihoods = LIKELIHOODS if entry.everywhere or name in SOME[:4] else LIKELIHOODS[:1]
    for likelihood in likelihoods:
        for kind in ("exact", "empirical"):
            compare(entry, problem(name, likelihood, kind))
    # Parameters beside layers within a module get rows that are right on average.
    if len(likelihoods) > 1 and name != "generic":
        compare(entry, problem(name, "categorical", "mc"))
    # Without shared weights all settings mean the same, which some cases see.
    if entry.sharings and (name in SOME or problem(name).shares_weights):
        for likelihood in LIKELIHOODS if entry.everywhere else LIKELIHOODS[:1]:
            for kind in ("exact", "empirical"):
                for sharing in entry.sharings[1:]:
                    compare(entry, problem(name, likelihood, kind), sharing=sharing)


def compare(
    entry: Entry, given: Problem, sharing: str | None = None, batch: Batch | None = None
) -> None:
    """Compare a matrix with its definition and with what theory says of it."""
    options = {} if sharing is None else {"weight_sharing": sharing}
    if batch is None and sharing is None and entry.name in FOR_USERS[given.kind]:
        found = entry.of_user(given)
    else:
        found = entry.build(given if batch is None else batch, **options)
    matrix = found.to_dense()
    expected = entry.definition(given, found, **({} if sharing is None else {"sharing": sharing}))
    assert matrix.dtype == torch.float64
    scale = float(given.fisher.norm())
    torch.testing.assert_close(matrix, expected, rtol=entry.tolerance, atol=1e-9 * scale + 1e-12)
    if scale > 1e-9:
        dense.assert_same(matrix, expected, entry.tolerance)
    if entry.keeps_trace:
        torch.testing.assert_close(found.trace(), given.fisher.trace(), rtol=1e-10, atol=1e-13)
    if entry.not_below is not None:
        worse = distance(entry.not_below, given, sharing)
        assert (matrix - given.exact_groups).norm() <= worse * (1 + 1e-12) + 1e-13


@functools.cache
def distance(name: str, given: Problem, sharing: str | None) -> Tensor:
    """Return how far an entry's matrix is from the exact blocks."""
    entry = TABLE[name]
    options = {"weight_sharing": sharing} if sharing in entry.sharings else {}
    return (entry.build(given, **options).to_dense() - given.exact_groups).norm()


@st.composite
def stacks(draw):
    """A random stack of linear layers and nonlinearities, with data."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers, specs = [], []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        bias = draw(st.booleans())
        specs.append(rows(str(len(layers)), *(["weight", "bias"] if bias else ["weight"])))
        layers += [nn.Linear(a, b, bias=bias), draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU]))()]
    model = nn.Sequential(*layers[:-1]).double()
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    x = normal(draw(st.integers(1, 4)), *lead, sizes[0], seed=draw(st.integers(0, 100)))
    return Case(model, x, tuple(specs))


@drawn(
    stacks(), st.sampled_from(["gaussian", "bernoulli", "poisson"]),
    st.sampled_from(["exact", "empirical"]), st.sampled_from(["expand", "reduce", "split"]),
)  # fmt: skip
def test_random_stacks(case, likelihood, kind, sharing):
    given = problem_of(case, likelihood, kind)
    for entry in filter(own, ENTRIES):
        compare(entry, given, sharing if sharing in entry.sharings else None)


@functools.cache
def masked_problems(name: str, kind: str) -> list[tuple[Problem, dict[int | None, Batch]]]:
    """Return problems with ignored, weighted, and ignored, weighted and smoothed events.

    Each with batches of which one vector is pulled back at once, or some, or all.
    """
    case = CASES[name]()
    y = case.target("categorical")
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    ignored = y.clone()
    ignored.view(-1)[::3] = -100
    found = []
    for target, options in (
        (ignored, {}),
        (y, {"weight": weights}),
        (ignored, {"weight": weights, "label_smoothing": 0.1}),
    ):
        loss = dense.categorical(case.class_dim, **options)
        likelihood = Categorical(
            class_weights=options.get("weight"),
            label_smoothing=options.get("label_smoothing", 0.0),
        )
        partial = (target.reshape(len(y), -1) == -100).any(1) if target is ignored else None
        given = problem_of(case, likelihood, kind, target, loss, partial)
        found.append((given, {n: replace(given.batch, chunk=n) for n in (None, 1, 60)}))
    return found


@table(("tokens", "pixels", "mixed_pixels", "conv2d"), own)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_masks_weights_and_smoothing(entry, name, kind):
    """Ignored, weighted and smoothed events, whatever pieces the vectors come in."""
    for given, batches in masked_problems(name, kind):
        for chunk, batch in batches.items():
            if chunk is not None and (not entry.additive or (chunk == 60 and not entry.everywhere)):
                continue
            if chunk is not None and given.partial is None and name != "tokens":
                continue  # Weights alone.
            for sharing in entry.sharings or (None,):
                compare(entry, given, sharing, batch)


@table(UNFACTORED, lambda entry: entry.keeps_trace and entry.layers == FACTORED)
def test_rows_that_are_sums_keep_the_trace_and_come_closer(entry, name):
    """Attention and tied weights, for which no definition is written down here."""
    given = problem(name)
    found, case = entry.build(given), given.case
    exact = dense.structured(given.fisher, "block_diagonal", case.model, case.blocks)
    dense.assert_same(found.trace(), exact.trace(), 1e-10)
    if entry.not_below is not None:
        worse = TABLE[entry.not_below].build(given).to_dense()
        errors = [(m - exact).norm() for m in (found.to_dense(), worse)]
        assert errors[0] <= errors[1] * (1 + 1e-12)


@table(
    ("mlp", "conv2d", "generic", "tied_embedding", "adapter"),
    lambda entry: entry.limit and own(entry),
)
def test_large_factors_are_kept_as_diagonals(entry, name):
    given = problem(name)
    limit = 70 if name == "adapter" else 4  # Of 9 outputs, with 1 input, beyond an eighth of it.
    found = entry.build(given, max_factor_size=limit)
    if name in entry.layers:
        expected = entry.definition(given, found, limit=limit)
        torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-12)
    if entry.keeps_trace:
        dense.assert_same(found.trace(), given.fisher.trace(), 1e-10)
    check_interface(entry, given, found)


@table(None, lambda entry: entry.exact_for_one_sample)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_one_sample_is_exact(entry, likelihood):
    """The block of one sample is a Kronecker product, however many vectors are pulled back."""
    for kind in ("exact", "empirical"):
        given = problem("batch_of_one", likelihood, kind)
        for sharing in entry.sharings or (None,):
            options = {} if sharing is None else {"weight_sharing": sharing}
            matrix = entry.build(given, **options).to_dense()
            dense.assert_same(matrix, given.exact_groups)


@table(None, lambda entry: entry.exact_for_one_sample)
def test_deep_linear_networks_with_squared_loss_are_exact(entry):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).double()
    for x, y in (
        (normal(7, 3), normal(7, 2, seed=1)),
        (normal(3, 4, 3), normal(3, 4, 2, seed=1)),  # Positions, of which "expand" is exact.
    ):
        exact = fisher_matrix(model, (x, y), "gaussian", "block_diagonal").to_dense()
        dense.assert_same(entry.matrix(model, (x, y), "gaussian").to_dense(), exact)


# -- what a matrix can do --------------------------------------------------------------------------


def check_interface(entry: Entry, given: Problem, found: FisherMatrix) -> None:
    """Check every method against the matrix as a dense one."""
    matrix = found.to_dense()
    size = len(matrix)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    lowest = float(eigenvalues[0])
    damping = entry.damping if entry.positive else max(entry.damping, entry.damping - 2 * lowest)
    assert found.shape == (size, size) and found.dtype == torch.float64
    assert list(found.parameter_names) == list(dense.parameters(given.case.model))
    assert found.structure == entry.structure
    assert entry.structure in repr(found) and str(size) in repr(found)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-10)
    if entry.positive:
        assert lowest >= -1e-9 * float(matrix.norm())

    vector, columns = normal(size, seed=1), normal(size, 3, seed=2)
    dense.assert_same(found @ vector, matrix @ vector)
    dense.assert_same(found @ columns, matrix @ columns)
    dense.assert_same(found.diagonal(), matrix.diagonal())
    dense.assert_same(found.trace(), matrix.trace())
    actual = found.eigenvalues()
    assert actual.shape == (size,) and (actual.diff() <= 0).all()
    assert (actual - eigenvalues.flip(0)).abs().max() <= 1e-9 * eigenvalues.abs().max()

    solution = entry.solve(given, found, matrix, damping, torch.cat([vector[:, None], columns], 1))
    inverse = found.inverse(damping)
    for solve in (lambda v: found.solve(v, damping), lambda v: inverse @ v):
        dense.assert_same(solve(vector), solution[:, 0], 1e-8)
        dense.assert_same(solve(columns), solution[:, 1:], 1e-8)
    eye = torch.eye(size, dtype=torch.float64)
    sign, logarithm = torch.linalg.slogdet(matrix + damping * eye)
    if lowest + damping > 0:
        assert sign == 1
        torch.testing.assert_close(found.logdet(damping), logarithm, rtol=1e-9, atol=1e-9)
    if entry.root:
        root = found.inverse_root(damping) @ eye
        torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-10)
        dense.assert_same(root @ root, entry.solve(given, found, matrix, damping, eye), 1e-8)
    if given.name in SOME:
        check_forms(found, matrix, inverse)


def check_forms(found: FisherMatrix, matrix: Tensor, inverse: FisherMatrix) -> None:
    """Check SciPy's operator, dicts and other floating types."""
    import numpy
    import scipy.sparse.linalg

    size = len(matrix)
    operator, vector = found.to_scipy(), normal(size, seed=1)
    assert isinstance(operator, scipy.sparse.linalg.LinearOperator)
    assert operator.shape == found.shape and operator.dtype == numpy.float64
    numpy.testing.assert_allclose(operator @ numpy.eye(size), matrix.numpy(), rtol=0, atol=1e-11)
    product = (matrix @ vector).numpy()
    numpy.testing.assert_allclose(operator @ vector.numpy(), product, atol=1e-10)
    numpy.testing.assert_allclose(operator.T @ vector.numpy(), product, atol=1e-10)

    named, start = {}, 0
    for name in found.parameter_names:
        shape = tuple(found.layout.shapes[name])
        named[name] = vector[start : start + math.prod(shape)].reshape(shape)
        start += named[name].numel()
    assert start == size
    for result, flat in ((inverse @ named, inverse @ vector), (found @ named, found @ vector)):
        assert list(result) == list(found.parameter_names)
        assert [t.shape for t in result.values()] == [t.shape for t in named.values()]
        assert torch.equal(flatten(result), flat)
    for dtype in (torch.float32, torch.bfloat16):
        low = vector.to(dtype)
        for one in (found, inverse):
            assert torch.equal(one @ low, (one @ low.double()).to(dtype))


@table("cases")
def test_interface(entry, name):
    given = problem(name)
    check_interface(entry, given, entry.build(given))


@functools.cache
def pulled_back(name: str) -> Jacobians:
    """Return a case's rows for the squared error."""
    case = CASES[name]()
    with Capture(case.model, case.output) as capture:
        dense.call(case.model, case.x, case.output)
        output = capture.passes[-1].output
        return capture.pull_back(output, Gaussian().root_vectors(output.detach()))


@table("mapped", lambda entry: entry.linear)
def test_function_space_map(entry, name):
    """``J'(F + λI)⁻¹Jᵀ``, layer by layer, for the rows of the matrix and for others."""
    given, jacobians = problem(name, "gaussian"), pulled_back(name)
    found = entry.build(given)
    matrix = found.to_dense()
    damping = max(0.3, entry.damping)
    if not entry.positive:
        damping = max(damping, 0.3 - 2 * float(torch.linalg.eigvalsh(matrix)[0]))
    combined = jacobians.combined(normal(jacobians.samples, jacobians.directions, 2, seed=3))
    for right, left in ((jacobians, None), (jacobians, combined), (combined, jacobians)):
        moved = entry.solve(given, found, matrix, damping, right.to_dense().T)
        shares = found.function_space_map(right, left, damping)
        left = right if left is None else left
        rows_left = left.to_dense()
        scale = (rows_left @ moved).abs().max()
        assert set(shares) == set(left)
        for layer, share in shares.items():
            own = torch.zeros(len(matrix), 1, dtype=torch.float64)
            for segment in found.layout.slices(left[layer].layout):
                own[segment] = 1.0
            assert (share - rows_left @ (own * moved)).abs().max() <= 1e-8 * scale, layer


@table(SOME, lambda entry: not entry.stepped)
def test_sums_and_multiples(entry, name):
    """Half the sum of one matrix and three times another one, which is a matrix again."""
    first, second = (entry.build(batch) for batch in batches_of(name, 2))
    combined = 0.5 * (first + second * 3.0)
    expected = 0.5 * (first.to_dense() + 3.0 * second.to_dense())
    dense.assert_same(combined.to_dense(), expected)
    columns = normal(len(expected), 2, seed=3)
    dense.assert_same(combined @ columns, expected @ columns)
    dense.assert_same(combined.trace(), expected.trace())
    dense.assert_same(combined.diagonal(), expected.diagonal())
    lowest = float(torch.linalg.eigvalsh(expected)[0])
    damping = 0.1 if entry.positive else max(0.1, 0.1 - 2 * lowest)
    damped = expected + damping * torch.eye(len(expected)).double()
    torch.testing.assert_close(combined.logdet(damping), torch.logdet(damped), rtol=1e-8, atol=1e-8)
    if "factored" not in entry.name:
        solution = torch.linalg.solve(damped, columns)
        dense.assert_same(combined.solve(columns, damping), solution, 1e-8)


# -- without damping -------------------------------------------------------------------------------


def check_pseudo_inverse(found: FisherMatrix) -> None:
    """Check solve(v, 0) on the range, outside it, and as the limit of small damping."""
    matrix = found.to_dense()
    inverse = torch.linalg.pinv(matrix, rtol=1e-11, hermitian=True)
    vector = matrix @ normal(len(matrix), seed=1)  # in the range
    solution = found.solve(vector)
    dense.assert_same(matrix @ solution, vector, 1e-8)
    dense.assert_same(solution, inverse @ vector, 1e-6)
    anything = normal(len(matrix), seed=2)
    outside = anything - inverse @ (matrix @ anything)
    largest = torch.linalg.matrix_norm(inverse, 2)
    assert found.solve(outside).norm() <= 1e-8 * largest * anything.norm()
    small = found.solve(vector, 1e-4 / float(largest))
    dense.assert_same(small, inverse @ vector, 2e-4)


PSEUDO = ("mlp", "batch_of_one", "conv2d", "frozen", "language_model")


@table(
    PSEUDO, lambda entry: entry.pseudo and entry.positive and entry.solution.__name__ == "inverted"
)
def test_zero_damping_is_the_pseudo_inverse(entry, name):
    check_pseudo_inverse(entry.build(problem(name)))


@table(PSEUDO, lambda entry: entry.pseudo and not entry.positive)
def test_zero_damping_of_indefinite_sums_is_the_pseudo_inverse(entry, name):
    found = entry.build(problem(name))
    vector = normal(found.shape[0])
    inverse = torch.linalg.pinv(found.to_dense(), hermitian=True, rtol=1e-12)
    dense.assert_same(found.solve(vector), inverse @ vector, 1e-6)


@table(
    None, lambda entry: entry.pseudo and entry.positive and entry.solution.__name__ == "inverted"
)
def test_zero_damping_with_more_rows_than_parameters(entry):
    """The softmax's shift invariance keeps even this Fisher matrix singular."""
    data = [(normal(9, 3, seed=s), labels(9, 3, s)) for s in range(30)]
    check_pseudo_inverse(entry.matrix(CASES["mlp"]().model, data))


def regular_net() -> nn.Module:
    """A net whose Fisher matrix on enough data has full rank."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@table()
def test_logdet_without_damping(entry):
    x, y = normal(40, 2), normal(40, 2, seed=1)
    found = entry.matrix(regular_net(), (x, y), "gaussian")
    matrix = found.to_dense()
    if float(torch.linalg.eigvalsh(matrix)[0]) > 0:
        logarithm = torch.linalg.slogdet(matrix).logabsdet
        torch.testing.assert_close(found.logdet(), logarithm, rtol=1e-8, atol=1e-8)
    if entry.positive and entry.structure not in ("diagonal", "singd"):
        singular = entry.build(problem("batch_of_one", "gaussian"))
        assert singular.logdet() < -100  # −∞ up to rounding of zero eigenvalues


# -- batches ---------------------------------------------------------------------------------------


def check_same_matrix(entry: Entry, found: FisherMatrix, other: FisherMatrix) -> None:
    """Check that two matrices and their inverses are the same to rounding."""
    dense.assert_same(found.to_dense(), other.to_dense())
    vector = normal(found.shape[0], seed=6)
    lowest = float(torch.linalg.eigvalsh(other.to_dense())[0])
    damping = 0.1 if entry.positive else max(0.1, 0.1 - 2 * lowest)
    dense.assert_same(found.solve(vector, damping), other.solve(vector, damping), 1e-8)


@functools.cache
def pieces(name: str, kind: str, chunk: int | None) -> list[list[Batch]]:
    """Return the same samples together, in batches in another order, and shuffled."""
    case = CASES[name]()
    x, y = normal(7, *case.x.shape[1:], seed=4), labels(7, 3, 5)
    numbers, shuffled = torch.arange(7), torch.randperm(7, generator=generator(8))
    parts = [numbers.split(sizes)[::-1] for sizes in ([7], [4, 3], [1, 5, 1])]
    return [
        [Batch(case.model, x[n], y[n], "categorical", kind, chunk=chunk) for n in part]
        for part in (*parts, [shuffled])
    ]


@table(("mlp", "conv2d"), lambda entry: entry.additive and own(entry))
@pytest.mark.parametrize(
    ("kind", "chunk"),
    [("exact", None), ("exact", 60), ("empirical", 1)],
)
def test_batches_of_any_size_and_order_add_up(entry, name, kind, chunk):
    together, *others = (entry.build(batches) for batches in pieces(name, kind, chunk))
    for found in others:
        check_same_matrix(entry, found, together)


@table(None, lambda entry: entry.additive and own(entry))
def test_batches_with_masked_events_add_up(entry):
    case = CASES["tokens"]()
    x, y = normal(6, 4, 3, seed=1), torch.randint(0, 3, (6, 4), generator=generator(2))
    y[torch.rand(6, 4, generator=generator(3)) < 0.4] = -100
    whole = entry.matrix(case.model, (x, y))
    halves = entry.matrix(case.model, [(x[:2], y[:2]), (x[2:], y[2:])])
    check_same_matrix(entry, halves, whole)


@table(None, lambda entry: entry.sharings and own(entry))
def test_ignored_positions(entry, monkeypatch):
    """Ignored tokens give the matrix of shorter sequences."""
    model = CASES["tokens"]().model
    # Enough samples for reduced factors without a null space, whose basis is arbitrary.
    x, y = normal(8, 4, 3), labels(32, 3, 0).reshape(8, 4)
    ignored = y.clone()
    ignored[:, 2:] = -100
    loss = Categorical()
    whole = fisher_module.PULL_BACK_ELEMENTS
    for sharing in entry.sharings:
        short = entry.matrix(model, (x[:, :2], y[:, :2]), loss, weight_sharing=sharing)
        for chunk in (whole, 1):
            monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", chunk)
            found = entry.matrix(model, (x, ignored), loss, weight_sharing=sharing)
            check_same_matrix(entry, found, short)


@table()
def test_batches_that_are_not_finite_are_left_out(entry):
    case = CASES["mlp"]()
    good, other = ((normal(*case.x.shape, seed=s), labels(len(case.x), 3, s)) for s in (0, 1))
    bad = (good[0] * float("nan"), good[1])
    found = entry.matrix(case.model, [good, bad, other])
    check_same_matrix(entry, found, entry.matrix(case.model, [good, other]))


# -- estimates: refreshing, checkpoints, going back ------------------------------------------------


@functools.cache
def batches_of(name: str, count: int = 1) -> list[Batch]:
    """Return batches of a case that differ in their targets."""
    return [problem(name, "categorical", "empirical", seed).batch for seed in range(count)]


def estimated(entry: Entry, name: str, count: int = 1) -> Any:
    return entry.estimate(batches_of(name, count))


def natural(curvature: Any, seed: int = 0) -> Tensor:
    """Return the natural gradient of a random gradient by the last inverses."""
    gradients = curvature.layout.to_dict(normal(curvature.layout.numel, seed=seed))
    return curvature.layout.to_flat(curvature.natural_gradient(GradientSource(gradients)))


def damping_of(entry: Entry, curvature: Any) -> float:
    if entry.stepped:
        return FIRST_STEP["damping"]
    if entry.positive:
        return 0.3
    return max(1.0, 0.3 - 2 * float(torch.linalg.eigvalsh(curvature.matrix().to_dense())[0]))


@table(SOME)
def test_an_estimate_is_the_matrix(entry, name):
    """Also for several batches, and before the first one: zero, which leaves gradients alone."""
    case, batches = CASES[name](), batches_of(name, 2)
    if not entry.stepped and own(entry):
        data = [(batch.x, batch.target) for batch in batches]
        found = entry.matrix(case.model, data, "categorical", "empirical", case.output)
        assert torch.equal(entry.estimate(batches).matrix().to_dense(), found.to_dense())
    empty = entry.empty(batches[0])
    matrix = empty.matrix().to_dense()
    eye = torch.eye(len(matrix), dtype=torch.float64)
    assert torch.equal(matrix, eye if entry.stepped else 0 * eye)
    assert torch.equal(natural(empty), normal(len(matrix)))
    empty.refresh(0.1)
    assert torch.equal(natural(empty), normal(len(matrix)))
    if not entry.stepped:
        dense.assert_same(empty.matrix().solve(normal(len(matrix)), 0.5), 2 * normal(len(matrix)))


@table(SOME)
def test_refreshed_inverses_are_those_of_the_matrix(entry, name):
    """All parts together, or one by one."""
    curvature, other = (estimated(entry, name) for _ in range(2))
    damping = damping_of(entry, curvature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature.refresh(damping)
        for part in other.parts:
            other.refresh(damping, [part])
    given, found = problem(name, "categorical", "empirical", 0), curvature.matrix()
    shift, gradient = 0.0 if entry.stepped else damping, normal(curvature.layout.numel)
    expected = entry.solve(given, found, found.to_dense(), shift, gradient.unsqueeze(1))[:, 0]
    dense.assert_same(found.solve(gradient, shift), expected, 1e-8)
    dense.assert_same(natural(curvature), expected, 1e-8)
    dense.assert_same(natural(other), natural(curvature))


@table(("mlp", "conv2d", "layer_norm"), lambda entry: not entry.stepped)
def test_every_block_may_have_its_own_damping(entry, name):
    """As an operator and in a refresh; a joint part takes the largest."""
    given = problem(name)
    curvature = entry.estimate(given.batch)
    found = curvature.matrix()
    matrix, base = found.to_dense(), damping_of(entry, curvature)
    values = {block: base * 3.0**n for n, block in enumerate(curvature.blocks)}
    shift = torch.zeros(len(matrix), dtype=torch.float64)
    for block, value in values.items():
        for segment in found.layout.slices(curvature.blocks[block]):
            shift[segment] = max(values.values()) if entry.joint else value
    gradient = normal(len(matrix))
    expected = entry.solve(given, found, matrix, shift, gradient.unsqueeze(1))[:, 0]
    dense.assert_same(found.inverse(values) @ gradient, expected, 1e-8)
    curvature.refresh(values)
    dense.assert_same(natural(curvature), expected, 1e-8)


#: What statistics hold is the same for other layers.
HELD = ("mlp", "conv2d", "tied_embedding", "generic")


@table(HELD)
def test_checkpoints(entry, name):
    """What is loaded goes on as what was saved, bit by bit."""
    curvature = estimated(entry, name, 2)
    damping = damping_of(entry, curvature)
    curvature.refresh(damping)
    file = io.BytesIO()
    torch.save(curvature.state_dict(), file)
    file.seek(0)
    other = entry.empty(batches_of(name)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    if not entry.of_one_batch:
        assert torch.equal(other.matrix().to_dense(), curvature.matrix().to_dense())
        assert torch.equal(natural(other), natural(curvature))
    jacobians = pulled_back(name)
    for one in (curvature, other):
        one.observe(jacobians, jacobians.samples)
        one.join(0.0 if entry.of_one_batch else 0.5)
        one.refresh(damping)
    assert torch.equal(other.matrix().to_dense(), curvature.matrix().to_dense())
    assert torch.equal(natural(other), natural(curvature))


@table(HELD)
def test_what_was_taken_back_never_was(entry, name):
    """Snapshots are references: nothing that follows may change what they hold."""
    curvature = estimated(entry, name)
    damping = damping_of(entry, curvature)
    curvature.refresh(damping)
    before = curvature.matrix().to_dense().clone(), natural(curvature).clone()
    saved = curvature.snapshot()
    jacobians = pulled_back(name)
    curvature.observe(jacobians, jacobians.samples)
    curvature.join(0.5)
    curvature.refresh(3 * damping)
    assert not torch.equal(curvature.matrix().to_dense(), before[0])
    assert not torch.equal(natural(curvature), before[1])
    curvature.rollback(saved)
    assert torch.equal(curvature.matrix().to_dense(), before[0])
    assert torch.equal(natural(curvature), before[1])


@table(None, lambda entry: not entry.stepped and entry.structure != "diagonal")
def test_a_failed_refresh_keeps_the_last_inverse(entry, monkeypatch):
    curvature = estimated(entry, "mlp")
    damping = damping_of(entry, curvature)
    curvature.refresh(damping)
    before = natural(curvature)

    def fail(*_: Any) -> None:
        raise natgrad.linalg.FactorizationError("no")

    with monkeypatch.context() as broken:
        for function in ("eigh", "inverse", "cholesky", "require"):
            broken.setattr(natgrad.linalg, function, fail)
        with pytest.warns(UserWarning, match="could not be factorised"):
            curvature.refresh(2 * damping)
    assert torch.equal(natural(curvature), before)


@table(None, lambda entry: not entry.stepped)
def test_older_batches_fade(entry):
    """After a decay of 0 it is the matrix of the next data alone."""
    batches = batches_of("mlp", 2)
    curvature = entry.estimate(batches, decay=0.0)
    last = entry.build(batches[1])
    dense.assert_same(curvature.matrix().to_dense(), last.to_dense())
    if entry.keeps_trace and not entry.of_one_batch:
        faded = entry.estimate(batches, decay=0.25)
        exact = [problem("mlp", "categorical", "empirical", n).fisher.trace() for n in (0, 1)]
        dense.assert_same(faded.matrix().trace(), (0.25 * exact[0] + exact[1]) / 1.25)


# -- precision, likelihoods, errors ----------------------------------------------------------------


@table()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(entry, dtype):
    case = CASES["mlp"]()
    model, y = copy.deepcopy(case.model).to(dtype), case.target("categorical")
    x = case.x.to(dtype)
    found = entry.matrix(model, (x, y))
    exact = entry.matrix(copy.deepcopy(model).double(), (x.double(), y))
    matrix, expected = found.to_dense(), exact.to_dense()
    assert matrix.dtype == torch.float32
    error = (matrix.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    vector, damping = normal(len(expected), seed=1).float(), max(0.1, entry.damping)
    if not entry.positive:
        damping = max(damping, 0.1 - 2 * float(torch.linalg.eigvalsh(expected)[0]))
    solution = found.solve(vector, damping)
    assert solution.dtype == torch.float32
    wanted = exact.solve(vector.double(), damping)
    assert (solution - wanted).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * wanted.norm()


@table()
def test_loss_modules_stand_for_their_likelihoods(entry):
    if entry.stepped:
        return
    for criterion, factor in ((nn.MSELoss(), 2 / 3), (nn.MSELoss(reduction="sum"), 2)):
        given = problem("mlp", "gaussian")
        found = entry.matrix(given.case.model, (given.case.x, given.target), criterion)
        expected = (factor if entry.of_loss else 1.0) * entry.definition(given, found)
        dense.assert_same(found.to_dense(), expected, entry.tolerance)
    given = problem("mlp", "categorical", "empirical")
    data = (given.case.x, given.target)
    for reduction in ("mean", "sum"):
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        found = entry.matrix(given.case.model, data, criterion, "empirical")
        dense.assert_same(found.to_dense(), entry.definition(given, found), entry.tolerance)


class Twice(Likelihood):
    """A user's likelihood with curvature twice the Gaussian's."""

    def nll(self, output, target):
        return (output - target).square().sum(1)

    def gradient(self, output, target):
        return 2 * (output - target)

    def output_hessian_root(self, output, target=None):
        eye = torch.eye(output.shape[1], dtype=output.dtype)
        return (2**0.5 * eye).expand(len(output), 1, *eye.shape)

    def sample(self, output, generator=None):
        return output + 0.5**0.5 * torch.randn(output.shape, generator=generator).to(output)


@table()
def test_likelihood_objects_of_ones_own(entry):
    case = CASES["mlp"]()
    data = (case.x, case.target("gaussian"))
    mine = entry.matrix(case.model, data, Twice()).to_dense()
    theirs = entry.matrix(case.model, data, Gaussian(0.5)).to_dense()
    dense.assert_same(mine, theirs)


@table(None, lambda entry: not entry.stepped and own(entry) and entry.of_loss)
def test_monte_carlo_error_falls_with_draws(entry):
    case = CASES["mlp"]()
    data, name = (case.x, case.target("categorical")), entry.structure

    def drawn(draws: int, seed: int) -> Tensor:
        kind = natgrad.MonteCarloFisher(draws)
        return fisher_matrix(
            case.model, data, "categorical", name, kind, seed=seed, **entry.options
        ).to_dense()

    exact = entry.build(problem("mlp")).to_dense()
    few, many = drawn(2, 1), drawn(2000, 1)
    assert torch.equal(few, drawn(2, 1)) and not torch.equal(few, drawn(2, 2))
    assert (many - exact).norm() < 0.12 * exact.norm()
    assert (many - exact).norm() < 0.3 * (few - exact).norm()


@table()
def test_vectors_are_checked(entry):
    found = entry.build(problem("mlp"))
    size = found.shape[0]
    for wrong, kind in (
        (normal(size + 1), ValueError),
        (normal(2, size), ValueError),
        (normal(size, 1, 1), ValueError),
        ({"0.weight": normal(5, 3)}, ValueError),
        ([1.0] * size, TypeError),
    ):
        with pytest.raises(kind):
            found.solve(wrong, max(0.1, entry.damping))
        with pytest.raises(kind):
            found @ wrong
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            found.solve(normal(size), damping)
        with pytest.raises(ValueError, match="damping"):
            found.logdet(damping)


@table()
def test_options_are_checked(entry):
    batch = problem("mlp").batch
    with pytest.raises(TypeError, match=f"'{entry.structure}' has no option 'colour'"):
        entry.empty(batch, colour="red")
    if entry.sharings:
        with pytest.raises(ValueError, match="reduce"):
            entry.empty(batch, weight_sharing="both")


@table()
def test_costs_are_stated(entry):
    curvature = estimated(entry, "mlp")
    costs = curvature.costs(Workload(samples=4, directions=3))
    assert set(costs) == set(curvature.parts)
    for cost in costs.values():
        assert cost.memory > 0 and cost.refresh >= 0 and cost.step > 0 and cost.factors
    assert sum(cost.refresh for cost in costs.values()) > 0


@table(None, lambda entry: not entry.linear)
def test_no_function_space_map_where_the_inverse_is_not_linear(entry):
    found = entry.build(problem("mlp", "gaussian"))
    with pytest.raises(ValueError, match="depends on the gradient"):
        found.function_space_map(pulled_back("mlp"), damping=0.1)


@table(None, lambda entry: not entry.root)
def test_structures_without_a_root_say_so(entry):
    with pytest.raises(NotImplementedError, match=f"'{entry.structure}' has no square root"):
        entry.build(problem("mlp")).inverse_root(0.3)
