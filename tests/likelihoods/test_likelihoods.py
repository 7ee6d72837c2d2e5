"""Likelihoods against autograd through torch's own losses, in float64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    as_likelihood,
    from_loss,
)
from natgrad.likelihoods.poisson_rates import counts_at

TOLERANCE = dict(rtol=1e-12, atol=1e-13)
DOUBLE = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian(function, output: Tensor) -> Tensor:
    """The full Hessian of a scalar function, (numel, numel)."""
    return torch.autograd.functional.hessian(function, output).reshape(output.numel(), -1)


def blocks_as_matrix(likelihood: Likelihood, output: Tensor, blocks: Tensor) -> Tensor:
    """Place (N, E, C, C) event blocks into a matrix over all entries of the output."""
    position = likelihood.split_events(torch.arange(output.numel()).reshape(output.shape))
    matrix = torch.zeros(output.numel(), output.numel(), dtype=blocks.dtype)
    for n in range(position.shape[0]):
        for e in range(position.shape[1]):
            matrix[position[n, e].unsqueeze(1), position[n, e].unsqueeze(0)] = blocks[n, e]
    return matrix


# -- drawing cases --------------------------------------------------------------------------------


@st.composite
def categorical_cases(draw, smoothing=True, soft=False):
    """A likelihood, an output, a target, and torch's own cross-entropy of them."""
    rank = draw(st.integers(2, 4))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    default = {2: 1, 3: 2, 4: 1}[rank]
    class_dim = draw(st.sampled_from([None, *range(1, rank), *range(1 - rank, 0)]))
    actual = default if class_dim is None else class_dim % rank
    shape[actual] = draw(st.integers(2, 5))
    g = generator(draw(st.integers(0, 2**20)))
    output = 3 * torch.randn(shape, generator=g, dtype=DOUBLE)
    target_shape = shape[:actual] + shape[actual + 1 :]
    classes = shape[actual]
    ignore_index = -100 if soft else draw(st.sampled_from([-100, 0, -1]))
    if soft:
        target = torch.randn(shape, generator=g, dtype=DOUBLE).softmax(actual)
    else:
        target = torch.randint(0, classes, target_shape, generator=g)
        if draw(st.booleans()):
            target[torch.rand(target_shape, generator=g) < 0.3] = ignore_index
        if (target == ignore_index).all():
            target.view(-1)[0] = classes - 1 if ignore_index == 0 else 0
    weights = torch.rand(classes, generator=g, dtype=DOUBLE) + 0.1
    weights = weights if draw(st.booleans()) else None
    s = draw(st.sampled_from([0.0, 0.1, 1.0] if smoothing else [0.0]))
    likelihood = Categorical(ignore_index, weights, s, class_dim)

    def reference(z: Tensor, reduction: str = "mean") -> Tensor:
        moved = target.movedim(actual, 1) if soft else target
        return functional.cross_entropy(
            z.movedim(actual, 1), moved, weights, ignore_index=ignore_index,
            label_smoothing=s, reduction=reduction,
        )  # fmt: skip

    return likelihood, output, target, reference


@st.composite
def elementwise_cases(draw):
    """The same for the likelihoods whose outputs are independent."""
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(2, 4)))]
    g = generator(draw(st.integers(0, 2**20)))
    output = torch.randn(shape, generator=g, dtype=DOUBLE)
    reduce_outputs = draw(st.sampled_from(["sum", "mean"]))
    name = draw(st.sampled_from(["gaussian", "bernoulli", "poisson"]))
    if name == "gaussian":
        variance = draw(st.sampled_from([0.3, 0.5, 2.0]))
        likelihood = Gaussian(variance, reduce_outputs)
        target = torch.randn(shape, generator=g, dtype=DOUBLE)

        def elements(z):
            return functional.mse_loss(z, target, reduction="none") / (2 * variance)

    elif name == "bernoulli":
        likelihood = Bernoulli(reduce_outputs)
        target = torch.rand(shape, generator=g, dtype=DOUBLE).round(
            decimals=draw(st.integers(0, 2))
        )

        def elements(z):
            return functional.binary_cross_entropy_with_logits(z, target, reduction="none")

    else:
        likelihood = Poisson(reduce_outputs)
        target = torch.randint(0, 6, shape, generator=g).to(DOUBLE)

        def elements(z):
            return functional.poisson_nll_loss(z, target, log_input=True, reduction="none")

    def reference(z: Tensor, reduction: str = "mean") -> Tensor:
        values = elements(z).flatten(1)
        values = values.mean(1) if reduce_outputs == "mean" else values.sum(1)
        return values.mean() if reduction == "mean" else values.sum()

    return likelihood, output, target, reference


ANY_CASE = st.one_of(categorical_cases(), categorical_cases(soft=True), elementwise_cases())


# -- definitions ----------------------------------------------------------------------------------


@given(ANY_CASE)
def test_loss_is_torchs_mean_loss(case):
    likelihood, output, target, reference = case
    torch.testing.assert_close(likelihood.loss(output, target), reference(output), **TOLERANCE)
    weights, nll = likelihood.event_weights(output, target), likelihood.nll(output, target)
    assert weights.shape == likelihood.split_events(output).shape[:2]
    assert len(nll) == len(output) and nll.numel() == weights.numel()
    total = (weights * nll.reshape(weights.shape)).sum()
    torch.testing.assert_close(total, reference(output, "sum"), **TOLERANCE)
    torch.testing.assert_close(
        likelihood.count(output, target) * reference(output), total, **TOLERANCE
    )


@given(ANY_CASE)
def test_loss_and_nll_are_differentiable(case):
    likelihood, output, target, reference = case
    output.requires_grad_()
    (expected,) = torch.autograd.grad(reference(output), output)
    (actual,) = torch.autograd.grad(likelihood.loss(output, target), output)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@given(ANY_CASE)
def test_gradient_is_autograds(case):
    likelihood, output, target, reference = case
    output.requires_grad_()
    (expected,) = torch.autograd.grad(reference(output, "sum"), output)
    torch.testing.assert_close(likelihood.gradient(output.detach(), target), expected, **TOLERANCE)


@given(ANY_CASE)
def test_hessian_is_autograds(case):
    likelihood, output, target, reference = case
    expected = hessian(lambda z: reference(z, "sum"), output)
    blocks = likelihood.output_hessian(output, target)
    n, events, size = likelihood.split_events(output).shape
    assert blocks.shape == (n, events, size, size)
    torch.testing.assert_close(blocks_as_matrix(likelihood, output, blocks), expected, **TOLERANCE)
    root = likelihood.output_hessian_root(output, target)
    torch.testing.assert_close(root @ root.mT, blocks, **TOLERANCE)


@given(ANY_CASE)
def test_root_vectors_sum_to_the_hessian(case):
    likelihood, output, target, reference = case
    vectors = likelihood.root_vectors(output, target)
    _, events, size = likelihood.split_events(output).shape
    assert vectors.shape == (events * size, *output.shape)
    expected = hessian(lambda z: reference(z, "sum"), output)
    n = len(output)
    rows = vectors.reshape(len(vectors), n, -1)
    sums = torch.einsum("kni,knj->nij", rows, rows)
    torch.testing.assert_close(torch.block_diag(*sums), expected, **TOLERANCE)
    parts = likelihood.split_events(vectors[0]) if events * size == 1 else None
    assert parts is None or parts.shape == (n, 1, 1)
    for k, vector in enumerate(vectors):
        outside = likelihood.split_events(vector).clone()
        outside[:, k // size] = 0
        assert not outside.any(), "vector (e, c) must be zero outside event e"


@given(ANY_CASE, st.integers(0, 1000))
def test_root_inverse_gives_the_cotangents_coordinates(case, seed):
    likelihood, output, target, reference = case
    vectors = likelihood.root_vectors(output, target)
    random = torch.randn(len(output), len(vectors), generator=generator(seed), dtype=DOUBLE)
    in_range = torch.einsum("kn...,nk->n...", vectors, random)
    cotangents = [in_range]
    if not target.is_floating_point() or not isinstance(likelihood, Categorical):
        cotangents.append(likelihood.gradient(output, target))
    for cotangent in cotangents:
        coordinates = likelihood.root_inverse_apply(output, cotangent, target)
        assert coordinates.shape == random.shape
        back = torch.einsum("kn...,nk->n...", vectors, coordinates)
        torch.testing.assert_close(back, cotangent, rtol=1e-10, atol=1e-12)
    weights = likelihood.event_weights(output, target)
    silent = coordinates.reshape(*weights.shape, -1)[weights == 0]
    assert not silent.any()


@given(ANY_CASE)
def test_without_a_target_all_weights_are_one(case):
    likelihood, output, _, _ = case
    n, events, _ = likelihood.split_events(output).shape
    assert torch.equal(likelihood.event_weights(output), torch.ones(n, events, dtype=DOUBLE))
    assert likelihood.count(output) == n * events
    plain = likelihood
    if isinstance(likelihood, Categorical):
        plain = Categorical(class_dim=likelihood.class_dim)
        label = torch.zeros(plain.sample(output).shape, dtype=torch.long)
    else:
        label = torch.zeros_like(output)
    torch.testing.assert_close(
        likelihood.output_hessian(output), plain.output_hessian(output, label), **TOLERANCE
    )


def test_class_weight_zero_and_masked_logits_are_finite():
    weights = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
    output = torch.tensor([[0.3, 1.0, -torch.inf], [0.1, 0.2, -torch.inf]], dtype=DOUBLE)
    target = torch.tensor([0, 1])
    likelihood = Categorical(class_weights=weights)
    expected = functional.cross_entropy(output, target, weights)
    torch.testing.assert_close(likelihood.loss(output, target), expected)
    for value in (
        likelihood.gradient(output, target),
        likelihood.output_hessian(output, target),
        likelihood.output_hessian_root(output, target),
        likelihood.root_inverse_apply(output, likelihood.gradient(output, target), target),
    ):
        assert value.isfinite().all()


def test_all_events_of_a_sample_ignored():
    output = torch.randn(2, 3, 4, generator=generator(0), dtype=DOUBLE)
    target = torch.tensor([[-100, -100, -100], [1, -100, 2]])
    likelihood = Categorical()
    assert likelihood.count(output, target) == 2
    assert not likelihood.gradient(output, target)[0].any()
    assert not likelihood.root_vectors(output, target)[:, 0].any()
    assert not likelihood.sampled_vectors(output, generator(0), 2, target)[:, 0].any()


# -- extreme outputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_keep_relative_accuracy(dtype):
    # Logits (a, 0, 0): 1 - p_0 = 2 exp(-a) / (1 + 2 exp(-a)) must not round to zero.
    a = 40.0
    output = torch.tensor([[a, 0.0, 0.0]], dtype=dtype)
    small = torch.exp(torch.tensor(-a, dtype=DOUBLE)) / (1 + 2 * torch.exp(torch.tensor(-a)))
    likelihood = Categorical()
    tolerance = dict(rtol=20 * torch.finfo(dtype).eps, atol=0)
    gradient = likelihood.gradient(output, torch.tensor([0]))[0].to(DOUBLE)
    torch.testing.assert_close(
        gradient, small * torch.tensor([-2.0, 1, 1], dtype=DOUBLE), **tolerance
    )
    expected = small * torch.tensor([[2.0, -1, -1], [-1, 1, 0], [-1, 0, 1]], dtype=DOUBLE)
    block = likelihood.output_hessian(output)[0, 0].to(DOUBLE)
    torch.testing.assert_close(block[0], expected[0], **tolerance)
    torch.testing.assert_close(block.diagonal(), expected.diagonal(), **tolerance)
    assert not block.sum(0).abs().max() > 1e-6 * small
    # The root is as accurate as long as p stays above its floor, the dtype's eps².
    output = output.clamp(max=20.0)
    root = likelihood.output_hessian_root(output)
    expected = likelihood.output_hessian(output).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close((root @ root.mT).diagonal(dim1=-2, dim2=-1), expected, **tolerance)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("logit", [30.0, 90.0, 300.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_roots_stay_invertible(dtype, logit, label):
    output = torch.tensor([[logit, 0.0, -1.0]], dtype=dtype)
    target = torch.tensor([label])
    likelihood = Categorical()
    cotangent = likelihood.gradient(output, target)
    coordinates = likelihood.root_inverse_apply(output, cotangent, target)
    assert coordinates.isfinite().all()
    back = torch.einsum("knc,nk->nc", likelihood.root_vectors(output, target), coordinates)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(back, cotangent, rtol=20 * eps, atol=20 * eps)
    root = likelihood.output_hessian_root(output)
    error = (root @ root.mT - likelihood.output_hessian(output)).abs().max()
    assert error <= 4 * eps**2 + 4 * eps * likelihood.output_hessian(output).abs().max()


@pytest.mark.parametrize("likelihood", [Bernoulli(), Bernoulli("mean")], ids=repr)
def test_saturated_bernoulli(likelihood):
    output = torch.tensor([[50.0, -50.0, 800.0, -800.0]])
    target = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    cotangent = likelihood.gradient(output, target)
    scale = 4 if likelihood.reduce_outputs == "mean" else 1
    expected = torch.tensor([[-1.9287498e-22, -1.0, 1.0, 0.0]]) / scale
    torch.testing.assert_close(cotangent, expected, rtol=1e-6, atol=0)
    coordinates = likelihood.root_inverse_apply(output, cotangent)
    back = torch.einsum("knc,nk->nc", likelihood.root_vectors(output), coordinates)
    torch.testing.assert_close(back, cotangent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    output = torch.randn(4, 5, generator=generator(0)).to(dtype)
    cases = [
        (Categorical(), torch.tensor([0, 1, 2, 3])),
        (Gaussian(), torch.zeros(4, 5)),
        (Bernoulli(), torch.ones(4, 5)),
        (Poisson(), torch.ones(4, 5)),
    ]
    for likelihood, target in cases:
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = [
                    likelihood.nll(output, target),
                    likelihood.loss(output, target),
                    likelihood.gradient(output, target),
                    likelihood.output_hessian(output, target),
                    likelihood.output_hessian_root(output, target),
                    likelihood.root_vectors(output, target),
                    likelihood.root_inverse_apply(output, likelihood.gradient(output, target)),
                    likelihood.sampled_vectors(output, generator(0), 3),
                    likelihood.event_weights(output, target),
                    likelihood.count(output, target),
                ]
            assert all(value.dtype == torch.float32 for value in got)
            wide = output.float()
            torch.testing.assert_close(got[2], likelihood.gradient(wide, target), rtol=0, atol=0)
            torch.testing.assert_close(got[3], likelihood.output_hessian(wide), rtol=0, atol=0)


# -- sampling -------------------------------------------------------------------------------------


def test_categorical_samples_follow_the_probabilities():
    output = torch.tensor([[0.0, 1.0, -1.0, 2.0], [5.0, 0.0, 0.0, -torch.inf]], dtype=DOUBLE)
    p = output.softmax(1)
    draws = 20_000
    many = output.unsqueeze(1).expand(2, draws, 4)
    labels = Categorical().sample(many, generator(1))
    assert labels.shape == (2, draws) and labels.dtype == torch.int64
    frequencies = functional.one_hot(labels, 4).double().mean(1)
    bound = 5 * (p * (1 - p) / draws).sqrt()
    assert ((frequencies - p).abs() <= bound).all()


@pytest.mark.parametrize("numbers", [0.0, 1 - 2**-24])
def test_classes_of_no_probability_are_not_sampled(numbers, monkeypatch):
    """Not even by the ends of what random numbers can be."""
    monkeypatch.setattr(Tensor, "uniform_", lambda of, generator: of.fill_(numbers))
    rare = [-torch.inf, 0.0, -torch.inf, 3.0, -torch.inf]
    output = torch.tensor([rare, [torch.nan] * 5, [-200.0, 0.0, -torch.inf, 3.0, -torch.inf]])
    labels = Categorical().sample(output)
    assert labels[0] == labels[2] == (1 if numbers > 0 else 3)
    assert 0 <= labels[1] < 5


def test_elementwise_samples_follow_their_moments():
    output = torch.tensor([[-1.0, 0.0, 1.5]], dtype=DOUBLE)
    draws = 20_000
    many = output.expand(draws, 3)
    cases = [
        (Gaussian(2.0), output, torch.full_like(output, 2.0), 3.0),
        (Gaussian(0.5, "mean"), output, torch.full_like(output, 1.5), 3.0),
        (Bernoulli(), output.sigmoid(), output.sigmoid() * (-output).sigmoid(), None),
        (Poisson(), output.exp(), output.exp(), None),
    ]
    for likelihood, mean, variance, _ in cases:
        sample = likelihood.sample(many, generator(2))
        assert sample.shape == many.shape and sample.dtype == DOUBLE
        fourth = (sample - mean).pow(4).mean(0)
        assert ((sample.mean(0) - mean).abs() <= 5 * (variance / draws).sqrt()).all(), likelihood
        spread = ((fourth - variance.square()).clamp_min(0) / draws).sqrt()
        error = ((sample - mean).square().mean(0) - variance).abs()
        assert (error <= 5 * spread + 1e-12).all(), likelihood


SAMPLED = [
    (Gaussian(0.7), None),
    (Gaussian(0.5, "mean"), None),
    (Bernoulli(), None),
    (Bernoulli("mean"), None),
    (Poisson(), None),
    (Poisson("mean"), None),
    (Categorical(), [0, 1]),
    (Categorical(label_smoothing=0.3), [0, 1]),
    (Categorical(class_weights=[0.5, 2.0, 1.0]), [0, 1]),
    (Categorical(class_weights=[0.5, 2.0, 1.0], label_smoothing=0.2), [-100, 1]),
]


@pytest.mark.parametrize("likelihood, labels", SAMPLED, ids=repr)
def test_sampled_vectors_have_the_hessian_as_second_moment(likelihood, labels):
    output = torch.tensor([[0.3, -1.0, 0.8], [1.0, 0.0, -0.5]], dtype=DOUBLE)
    target = None if labels is None else torch.tensor(labels)
    draws = 20_000
    vectors = likelihood.sampled_vectors(output, generator(3), draws, target)
    assert vectors.shape == (draws, 2, 3)
    products = torch.einsum("kni,knj->knij", vectors, vectors) * draws
    error = products.mean(0) - likelihood.output_hessian(output, target).squeeze(1)
    assert (error.abs() <= 5 * products.std(0) / draws**0.5 + 1e-14).all()
    mean = vectors.mean(0) * draws**0.5
    assert (mean.abs() <= 5 * vectors.std(0) + 1e-14).all()


def test_sampled_vectors_of_events_are_independent():
    output = torch.randn(1, 2, 3, generator=generator(0), dtype=DOUBLE)
    vectors = Categorical().sampled_vectors(output, generator(4), 20_000).flatten(2)[:, 0]
    products = torch.einsum("ki,kj->kij", vectors, vectors) * len(vectors)
    expected = torch.block_diag(*Categorical().output_hessian(output)[0])
    error = products.mean(0) - expected
    assert (error.abs() <= 5 * products.std(0) / len(vectors) ** 0.5).all()


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli", "poisson"])
def test_sampling_uses_only_the_given_generator(name):
    likelihood = as_likelihood(name)
    output = torch.randn(3, 4, generator=generator(0), requires_grad=True)
    state = torch.get_rng_state()
    first = likelihood.sample(output, generator(5))
    vectors = likelihood.sampled_vectors(output, generator(5), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, likelihood.sample(output, generator(5)))
    assert torch.equal(vectors, likelihood.sampled_vectors(output, generator(5), 2))
    assert not torch.equal(vectors, likelihood.sampled_vectors(output, generator(6), 2))
    assert not first.requires_grad
    assert not likelihood.sample(output).requires_grad  # the global generator, by default


# -- inference from an observed gradient ----------------------------------------------------------


@given(categorical_cases(smoothing=False), st.sampled_from([1.0, 0.25, 65536.0]), st.booleans())
def test_weights_and_scale_are_inferred_from_the_gradient(case, factor, mean):
    likelihood, output, target, reference = case
    output.requires_grad_()
    loss = factor * reference(output, "mean" if mean else "sum")
    (cotangent,) = torch.autograd.grad(loss, output)
    output = output.detach()
    # Where gradients over two dimensions vanish by accident, the class dimension is not in doubt.
    weights, scale = likelihood.infer_event_weights(output, cotangent)
    torch.testing.assert_close(weights, likelihood.event_weights(output, target))
    expected = factor / likelihood.count(output, target) if mean else torch.tensor(factor).double()
    torch.testing.assert_close(scale, expected, rtol=1e-9, atol=0)
    weights, scale = likelihood.infer_event_weights(output, cotangent, target)
    torch.testing.assert_close(weights, likelihood.event_weights(output, target))
    torch.testing.assert_close(scale, expected, rtol=1e-9, atol=0)


@given(ANY_CASE, st.sampled_from([1.0, 0.25]))
def test_a_known_target_gives_the_scale_of_any_loss(case, factor):
    likelihood, output, target, reference = case
    output.requires_grad_()
    (cotangent,) = torch.autograd.grad(factor * reference(output), output)
    output = output.detach()
    weights, scale = likelihood.infer_event_weights(output, cotangent, target)
    torch.testing.assert_close(weights, likelihood.event_weights(output, target))
    torch.testing.assert_close(
        scale * likelihood.gradient(output, target), cotangent, rtol=1e-9, atol=1e-12
    )


@given(ANY_CASE, st.sampled_from([1.0, 0.25]))
def test_largest_decrement_is_of_residuals_but_no_more_than_the_loss_can_fall(case, factor):
    likelihood, output, target, reference = case
    gradient = likelihood.gradient(output, target)
    cotangent = factor * gradient / likelihood.count(output, target)
    weights, scale = likelihood.infer_event_weights(output, cotangent, target)
    found = likelihood.largest_decrement(output, cotangent, weights, scale)
    events = likelihood.split_events(gradient)
    hessians = likelihood.output_hessian(output, target)
    if isinstance(likelihood, Categorical):
        each = (events.unsqueeze(-2) @ torch.linalg.pinv(hessians) @ events.unsqueeze(-1)).flatten()
        p = likelihood.split_events(output).softmax(-1)
        q = p - events / likelihood.event_weights(output, target).unsqueeze(-1)
        q = q.nan_to_num(nan=1.0).clamp_min(1e-300)
        best = likelihood.merge_events(q.log(), output)
        excess = likelihood.nll(output, target) - likelihood.nll(best, target)
        deviance = 2 * excess.flatten() * likelihood.event_weights(output, target).flatten()
    else:
        each = (events.square() / hessians.diagonal(dim1=-2, dim2=-1)).flatten()
        share = likelihood._scale(output)
        if isinstance(likelihood, Gaussian):
            deviance = each
        elif isinstance(likelihood, Poisson):
            least = target - torch.xlogy(target, target)
            deviance = 2 * share * (output.exp() - target * output - least).flatten()
        else:
            cross = functional.binary_cross_entropy
            entropy = cross(target, target, reduction="none")
            losses = functional.binary_cross_entropy_with_logits(output, target, reduction="none")
            deviance = 2 * share * (losses - entropy).flatten()
    expected = scale**2 * torch.minimum(each, deviance).sum()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_confident_mistakes_count_with_their_deviance():
    """χ² of a label of probability 1e-6 is a million, twice its loss 28."""
    output = torch.tensor([[0.0, 6 * math.log(10.0)]], dtype=DOUBLE, requires_grad=True)
    loss = functional.cross_entropy(output, torch.tensor([0]))
    (cotangent,) = torch.autograd.grad(loss, output)
    likelihood, z = Categorical(), output.detach()
    weights, scale = likelihood.infer_event_weights(z, cotangent)
    found = likelihood.largest_decrement(z, cotangent, weights, scale)
    assert math.isclose(float(found), 2 * float(loss.detach()), rel_tol=1e-9)
    assert float(likelihood.root_inverse_apply(z, cotangent).square().sum()) > 9e5


@given(elementwise_cases())
def test_elementwise_scale_follows_the_reduction(case):
    likelihood, output, target, reference = case
    assume(not isinstance(likelihood, Bernoulli) or torch.equal(target, target.round()))
    output.requires_grad_()
    (cotangent,) = torch.autograd.grad(reference(output), output)
    weights, scale = likelihood.infer_event_weights(output.detach(), cotangent)
    assert torch.equal(weights, torch.ones(len(output), 1, dtype=DOUBLE))
    torch.testing.assert_close(scale, torch.tensor(1 / len(output), dtype=DOUBLE))
    summed = type(likelihood)(reduce_outputs=likelihood.reduce_outputs, reduction="sum")
    _, scale = summed.infer_event_weights(output.detach(), cotangent * len(output))
    torch.testing.assert_close(scale, torch.tensor(1.0, dtype=DOUBLE))


def test_bernoulli_scale_is_read_off_hard_labels():
    output = torch.randn(4, 3, generator=generator(0), dtype=DOUBLE, requires_grad=True)
    target = torch.randint(0, 2, (4, 3), generator=generator(1)).double()
    loss = 7 * functional.binary_cross_entropy_with_logits(output, target)
    (cotangent,) = torch.autograd.grad(loss, output)
    _, scale = Bernoulli().infer_event_weights(output.detach(), cotangent)
    torch.testing.assert_close(scale, torch.tensor(7 / 12, dtype=DOUBLE))
    # Soft labels show no scale, so the reduction decides.
    target = torch.rand(4, 3, generator=generator(2), dtype=DOUBLE)
    loss = functional.binary_cross_entropy_with_logits(output, target)
    (cotangent,) = torch.autograd.grad(loss, output)
    _, scale = Bernoulli("mean").infer_event_weights(output.detach(), cotangent)
    torch.testing.assert_close(scale, torch.tensor(1 / 4, dtype=DOUBLE))


def test_label_smoothing_mask_and_scale():
    output = torch.randn(5, 3, 4, generator=generator(0), dtype=DOUBLE, requires_grad=True)
    target = torch.randint(0, 4, (5, 3), generator=generator(1))
    target[0, 1] = target[3, 2] = -100
    likelihood = Categorical(label_smoothing=0.1)
    loss = functional.cross_entropy(output.mT, target, label_smoothing=0.1)
    (cotangent,) = torch.autograd.grad(loss, output)
    got, scale = likelihood.infer_event_weights(output.detach(), cotangent)
    torch.testing.assert_close(got, likelihood.event_weights(output, target))
    torch.testing.assert_close(scale, 1 / likelihood.count(output, target))


def test_weights_with_smoothing_cannot_be_inferred():
    likelihood = Categorical(class_weights=(0.5, 2.0), label_smoothing=0.1)
    output = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"optimizer\.loss"):
        likelihood.infer_event_weights(output, torch.ones(3, 2))


def test_soft_targets_fall_back_to_the_reduction():
    output = torch.randn(6, 4, generator=generator(0), dtype=DOUBLE, requires_grad=True)
    target = torch.randn(6, 4, generator=generator(1), dtype=DOUBLE).softmax(1)
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(output, target), output)
    weights, scale = Categorical().infer_event_weights(output.detach(), cotangent)
    assert torch.equal(weights, torch.ones(6, 1, dtype=DOUBLE))
    torch.testing.assert_close(scale, torch.tensor(1 / 6, dtype=DOUBLE))


def test_saturated_events_are_not_taken_for_ignored_ones():
    output = torch.zeros(3, 4)
    output[0, 1] = output[1, 2] = 1000.0
    output.requires_grad_()
    (cotangent,) = torch.autograd.grad(
        functional.cross_entropy(output, torch.tensor([1, 0, 0])), output
    )
    assert not cotangent[0].any()
    weights, scale = Categorical().infer_event_weights(output.detach(), cotangent)
    assert weights.squeeze(1).tolist() == [1, 1, 1]
    torch.testing.assert_close(scale, torch.tensor(1 / 3))
    # All events saturated: nothing to read a scale from, so the reduction decides.
    first = output.detach()[:1].requires_grad_()
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(first, torch.tensor([1])), first)
    weights, scale = Categorical().infer_event_weights(first.detach(), cotangent)
    assert weights.item() == 1 and scale.item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inference_in_low_precision(dtype):
    output = torch.randn(64, 10, generator=generator(0)).to(dtype).requires_grad_()
    target = torch.randint(0, 10, (64,), generator=generator(1))
    target[::7] = -100
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(output, target), output)
    weights, scale = Categorical().infer_event_weights(output.detach(), cotangent)
    assert torch.equal(weights.squeeze(1) > 0, target != -100)
    count = (target != -100).sum()
    torch.testing.assert_close(scale * count, torch.tensor(1.0), rtol=3e-2, atol=0)


def test_wrong_class_dim_is_named():
    output = torch.randn(4, 5, 6, generator=generator(0), requires_grad=True)
    target = torch.randint(0, 5, (4, 6), generator=generator(1))
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(output, target), output)
    with pytest.raises(ValueError, match=r"class_dim=1\)"):
        Categorical().infer_event_weights(output.detach(), cotangent)
    weights, _ = Categorical(class_dim=1).infer_event_weights(output.detach(), cotangent)
    assert weights.shape == (4, 6)
    images = torch.randn(2, 3, 3, 5, generator=generator(2), requires_grad=True)
    labels = torch.randint(0, 5, (2, 3, 3), generator=generator(3))
    loss = functional.cross_entropy(images.movedim(-1, 1), labels)
    (cotangent,) = torch.autograd.grad(loss, images)
    with pytest.raises(ValueError, match=r"class_dim=3\)"):
        Categorical().infer_event_weights(images.detach(), cotangent)


# -- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss,
        lambda **k: nn.CrossEntropyLoss(
            torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE), ignore_index=1, label_smoothing=0.1, **k
        ),
        nn.MSELoss,
        nn.BCEWithLogitsLoss,
        nn.PoissonNLLLoss,
    ],
    ids=["cross-entropy", "weighted cross-entropy", "mse", "bce", "poisson"],
)
def test_from_loss_matches_the_criterion(criterion, reduction):
    criterion = criterion(reduction=reduction)
    likelihood = from_loss(criterion)
    assert likelihood.reduction == reduction
    output = torch.randn(5, 3, generator=generator(0), dtype=DOUBLE)
    target = torch.rand(5, 3, generator=generator(1), dtype=DOUBLE)
    if isinstance(criterion, nn.CrossEntropyLoss):
        target = torch.tensor([0, 1, 2, 2, 0])
    count = likelihood.count(output, target)
    factor = 1 if reduction == "mean" else count
    torch.testing.assert_close(
        factor * likelihood.loss(output, target), criterion(output, target), **TOLERANCE
    )
    expected = hessian(lambda z: criterion(z, target), output)
    expected = expected * (count if reduction == "mean" else 1)
    blocks = likelihood.output_hessian(output, target)
    torch.testing.assert_close(blocks_as_matrix(likelihood, output, blocks), expected, **TOLERANCE)
    assert as_likelihood(criterion) == likelihood


def test_from_loss_values_of_the_contract():
    assert from_loss(nn.MSELoss()) == Gaussian(0.5, "mean")
    assert from_loss(nn.MSELoss(reduction="sum")) == Gaussian(0.5, reduction="sum")
    assert from_loss(nn.BCEWithLogitsLoss()) == Bernoulli("mean")
    output = torch.zeros(2, 4, dtype=DOUBLE)
    eye = torch.eye(4, dtype=DOUBLE).expand(2, 1, 4, 4)
    torch.testing.assert_close(Gaussian(0.5, "mean").output_hessian(output), eye * 2 / 4)
    torch.testing.assert_close(Gaussian().output_hessian(output), eye)


def test_as_likelihood():
    assert as_likelihood("categorical") == Categorical()
    assert as_likelihood("gaussian") == Gaussian()
    assert as_likelihood("bernoulli") == Bernoulli()
    assert as_likelihood("poisson") == Poisson()
    mine = Gaussian(3.0)
    assert as_likelihood(mine) is mine


def test_likelihoods_are_plain_values():
    weights = torch.tensor([1.0, 2.0])
    likelihood = Categorical(class_weights=weights, label_smoothing=0.1)
    assert likelihood == Categorical(class_weights=[1.0, 2.0], label_smoothing=0.1)
    assert hash(likelihood) == hash(copy.deepcopy(likelihood))
    assert pickle.loads(pickle.dumps(likelihood)) == likelihood
    with pytest.raises(AttributeError):
        likelihood.label_smoothing = 0.2
    assert repr(likelihood) == "Categorical(class_weights=(1.0, 2.0), label_smoothing=0.1)"
    assert repr(Categorical(class_weights=torch.ones(9))) == "Categorical(class_weights=<9 values>)"
    assert repr(Gaussian(0.5, "mean")) == "Gaussian(variance=0.5, reduce_outputs='mean')"
    assert repr(Poisson()) == "Poisson()"


# -- errors ---------------------------------------------------------------------------------------

Z = torch.zeros(3, 4)
ERRORS = [
    (lambda: as_likelihood("softmax"), ValueError, "categorical, gaussian, bernoulli, poisson"),
    (lambda: as_likelihood(3), TypeError, "categorical, gaussian, bernoulli, poisson"),
    (lambda: as_likelihood(nn.CTCLoss()), TypeError, "not for CTCLoss"),
    (lambda: as_likelihood(nn.MSELoss(reduction="none")), ValueError, "'none'"),
    (lambda: as_likelihood(nn.BCEWithLogitsLoss(weight=torch.ones(2))), ValueError, "with weight"),
    (lambda: Gaussian(0.0), ValueError, "variance"),
    (lambda: Gaussian(float("nan")), ValueError, "variance"),
    (lambda: Gaussian(reduce_outputs="max"), ValueError, "reduce_outputs"),
    (lambda: Bernoulli(reduction="none"), ValueError, "reduction"),
    (lambda: Categorical(label_smoothing=1.5), ValueError, "label_smoothing"),
    (lambda: Categorical(class_weights=[-1.0, 1.0]), ValueError, "non-negative"),
    (lambda: Categorical(class_weights=[[1.0]]), ValueError, "class_weights"),
    (lambda: Categorical(class_dim=0), ValueError, "class_dim"),
    (lambda: Categorical(class_dim=2).gradient(Z, torch.zeros(3).long()), ValueError, "class_dim"),
    (lambda: Categorical(class_weights=[1.0]).nll(Z, torch.zeros(3).long()), ValueError, "4 class"),
    (
        lambda: Categorical().nll(torch.zeros(3), torch.zeros(3).long()),
        ValueError,
        "what single numbers mean",
    ),
    (lambda: Categorical().nll(Z, torch.tensor([0, 1, 4])), ValueError, r"0\.\.3"),
    (lambda: Categorical().nll(Z, torch.tensor([0, -1, 2])), ValueError, "-100"),
    (lambda: Categorical().nll(Z, torch.zeros(3, 1).long()), ValueError, r"\(3,\)"),
    (lambda: Categorical().nll(Z, torch.zeros(3)), ValueError, "probabilities"),
    (lambda: Categorical().nll(Z, torch.zeros(3).bool()), TypeError, "integer"),
    (lambda: Categorical().nll(Z.long(), torch.zeros(3).long()), TypeError, "floating-point"),
    (lambda: Categorical().nll([1.0], torch.zeros(3).long()), TypeError, "list"),
    (lambda: Gaussian().gradient(Z, torch.zeros(3)), ValueError, r"\(3, 4\)"),
    (
        lambda: Gaussian().gradient(torch.tensor(1.0), torch.tensor(1.0)),
        ValueError,
        "what single numbers",
    ),
    (lambda: Bernoulli().nll(Z, torch.full((3, 4), 2.0)), ValueError, "between 0 and 1"),
    (lambda: Poisson().nll(Z, torch.full((3, 4), -2.0)), ValueError, "negative"),
    (lambda: Gaussian().infer_event_weights(Z, Z[:1]), ValueError, "shape"),
    (lambda: Categorical().root_inverse_apply(Z, Z[:1]), ValueError, "shape"),
]


@pytest.mark.parametrize("call, kind, words", ERRORS, ids=range(len(ERRORS)))
def test_errors_are_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words) as error:
        call()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 250


def test_a_new_likelihood_needs_four_methods():
    """The base class derives the rest: a Laplace-like likelihood with constant curvature."""

    class Scaled(Likelihood):
        def nll(self, output, target):
            return (output - target).square().sum(1)

        def gradient(self, output, target):
            return 2 * (output - target)

        def output_hessian_root(self, output, target=None):
            eye = torch.eye(output.shape[1], dtype=output.dtype)
            return (2**0.5 * eye).expand(len(output), 1, *eye.shape)

        def sample(self, output, generator=None):
            return output + 0.5**0.5 * torch.randn(output.shape, generator=generator).to(output)

    likelihood, reference = Scaled(), Gaussian(0.5)
    output = torch.randn(4, 3, generator=generator(0), dtype=DOUBLE)
    target = torch.randn(4, 3, generator=generator(1), dtype=DOUBLE)
    cotangent = reference.gradient(output, target)
    for name, arguments in [
        ("loss", (target,)),
        ("output_hessian", ()),
        ("root_vectors", ()),
        ("root_inverse_apply", (cotangent,)),
        ("count", (target,)),
    ]:
        expected = getattr(reference, name)(output, *arguments)
        torch.testing.assert_close(getattr(likelihood, name)(output, *arguments), expected)
    _, scale = likelihood.infer_event_weights(output, 0.5 * cotangent, target)
    torch.testing.assert_close(scale, torch.tensor(0.5, dtype=DOUBLE))
    vectors = likelihood.sampled_vectors(output, generator(2), 20_000)
    products = torch.einsum("kni,knj->nij", vectors, vectors)
    assert (products - 2 * torch.eye(3)).abs().max() < 5 * 2 * (2 / 20_000) ** 0.5


@given(st.floats(-9, 9), st.floats(1e-15, 1.0, exclude_max=True))
def test_counts_are_quantiles(logarithm: float, number: float) -> None:
    rate = torch.tensor(logarithm, dtype=DOUBLE).exp()
    found = counts_at(torch.tensor(number, dtype=DOUBLE), rate)
    # Σ exp(k log λ − λ − log k!) passes the number at this count, but for rounding.
    k = torch.arange(float(found) + 1, dtype=DOUBLE)
    terms = (k * rate.log() - rate - torch.lgamma(k + 1)).exp()
    assert float(terms[:-1].sum()) <= number + 1e-11
    assert float(terms.sum()) > number - 1e-11
