"""Whether a loss adds or averages over outputs, and whether it is one at all, is seen."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import (
    Bernoulli,
    BinaryProbabilities,
    Categorical,
    ClassProbabilities,
    Gaussian,
    Poisson,
)
from natgrad.likelihoods.binary_probabilities import shows_overlaps
from tests import pairwise
from tests.cases import generator, normal
from tests.likelihoods.test_torch_losses import assert_same, loss_hessian, seen_by_optimizer

SCALES = [1 / 2, 1 / 3, 1 / 8, 65536.0, 1024.0]


def labels(name: str, n: int, size: int) -> Tensor:
    y = normal(n, size, seed=1)
    return {
        "gaussian": y,
        "bernoulli": (y > 0).double(),
        "poisson": (1.5 + y).square().round(),
        "soft": torch.sigmoid(3 * y),
        "rates": (1.5 + y).square(),
    }[name]


MEANS = {
    "gaussian": functional.mse_loss,
    "bernoulli": functional.binary_cross_entropy_with_logits,
    "poisson": functional.poisson_nll_loss,
    "soft": functional.binary_cross_entropy_with_logits,
    "rates": functional.poisson_nll_loss,
}
MODULES = {
    "gaussian": nn.MSELoss(),
    "bernoulli": nn.BCEWithLogitsLoss(),
    "poisson": nn.PoissonNLLLoss(),
}
LIKELIHOODS = {"soft": "bernoulli", "rates": "poisson"}


def loss_of(name: str, x: Tensor, y: Tensor, averages: bool, factor: float = 1.0):
    """A loss of torch, or its sum over outputs (for squares half of it, as in the likelihood)."""

    def loss(f):
        z = f(x)
        if averages:
            return factor * MEANS[name](z, y)
        total = MEANS[name](z, y, reduction="sum") / len(z)
        return factor * (total / 2 if name == "gaussian" else total)

    return loss


def network(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, size).double()


@pytest.mark.parametrize("factor", SCALES)
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("size", [7, 10])  # A third of the sum over 3 is their mean.
def test_hard_labels_tell_the_scale_of_scaled_losses(size, averages, factor):
    check_told("bernoulli", size, averages, factor)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("size", [2, 3, 20])
@pytest.mark.parametrize("name", ["bernoulli", "poisson"])
def test_labels_and_counts_tell_the_scale(name, size, averages):
    check_told(name, size, averages, 1.0)


def check_told(name: str, size: int, averages: bool, factor: float) -> None:
    model, x, y = network(size), normal(24, 6), labels(name, 24, size)
    expected = loss_hessian(model, loss_of(name, x, y, averages))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = seen_by_optimizer(model, name, loss_of(name, x, y, averages, factor))
    assert_same(fisher, expected)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("size", [2, 24])
@pytest.mark.parametrize("name", ["gaussian", "soft", "rates"])
def test_a_told_target_tells_the_scale(name, size, averages):
    model, x, y = network(size), normal(24, 6), labels(name, 24, size)
    loss = loss_of(name, x, y, averages)
    expected = loss_hessian(model, loss)
    optimizer = natgrad.ExactNGD(model, LIKELIHOODS.get(name, name), lr=0.0, kl_clip=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.loss(lambda z, y: loss(lambda x: z), model(x), y).backward()
    optimizer.step()
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)


@pytest.mark.parametrize("size", [20, 64])
@pytest.mark.parametrize("name", ["gaussian", "soft", "rates"])
def test_a_mean_over_outputs_is_taken_for_one_and_said(name, size):
    model, x, y = network(size), normal(24, 6), labels(name, 24, size)
    expected = loss_hessian(model, loss_of(name, x, y, True))
    with pytest.warns(UserWarning, match=f"mean over the {size} outputs"):
        fisher = seen_by_optimizer(model, LIKELIHOODS.get(name, name), loss_of(name, x, y, True))
    assert_same(fisher, expected)


@pairwise.parametrize(
    {
        "name": ["gaussian", "bernoulli", "poisson", "soft", "rates"],
        "size": [1, 4, 20, 300],
        "seed": range(4),
    }
)
def test_a_sum_over_outputs_stays_one_without_a_word(name, size, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, size)).double()
    x, y = normal(24, 6, seed=seed), labels(name, 24, size)
    optimizer = natgrad.KFAC(model, LIKELIHOODS.get(name, name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(name, x, y, False)(model).backward()
    if size > 1:
        assert optimizer.preconditioner.observer.likelihood.reduce_outputs == "sum"


@pairwise.parametrize({"seed": range(3), "depth": [1, 3], "size": [32, 64, 576]})
def test_autoencoders(size, depth, seed):
    torch.manual_seed(seed)
    layers = [m for _ in range(depth) for m in (nn.Linear(size, size), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(size, size))
    x = torch.rand(64, size, generator=generator(seed))
    decided = {}
    for averages in (False, True):
        optimizer = natgrad.KFAC(model, "gaussian")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss_of("gaussian", x, x, averages)(model).backward()
        decided[averages] = optimizer.preconditioner.observer.likelihood.reduce_outputs
        del optimizer
    assert decided == {False: "sum", True: "mean"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_an_explicit_likelihood_is_left_alone(name):
    model, x, y = network(32), normal(24, 6), labels(name, 24, 32)
    for averages in (False, True):
        loss = loss_of(name, x, y, averages)
        for likelihood in (
            MODULES[name],
            {"gaussian": Gaussian, "bernoulli": Bernoulli, "poisson": Poisson}[name](
                reduce_outputs="sum"
            ),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fisher = seen_by_optimizer(model, likelihood, loss)
            expected = natgrad.fisher_matrix(model, (x, None), likelihood, "full").to_dense()
            assert_same(fisher, expected)


def test_masks_do_not_hide_it():
    model, x, y = network(12), normal(24, 6), labels("bernoulli", 24, 12)
    mask = torch.rand(24, 12, generator=generator(0)) < 0.5

    def loss(f):
        values = MEANS["bernoulli"](f(x), y, reduction="none")
        return (values * mask).sum() / mask.sum()

    assert_same(seen_by_optimizer(model, "bernoulli", loss), loss_hessian(model, loss))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1 / 24, 1 / 48, 300.0])
def test_some_hard_labels_tell_the_scale(logits, factor):
    """Pixels of digits: most are 0 or 1, and some between."""
    z, y = normal(24, 30, seed=2), labels("soft", 24, 30)
    y = torch.where(y > 0.3, y, 0.0)
    z = (z if logits else z.sigmoid()).requires_grad_()
    loss = MEANS["soft"] if logits else functional.binary_cross_entropy
    (cotangent,) = torch.autograd.grad(factor * loss(z, y, reduction="sum"), z)
    for average in ("sum", "mean"):
        likelihood = (Bernoulli if logits else BinaryProbabilities)(average)
        weights, scale = likelihood.infer_event_weights(z.detach(), cotangent)
        assert (weights == 1).all()
        expected = factor * (30 if average == "mean" else 1)
        torch.testing.assert_close(scale, scale.new_tensor(expected))


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_soft_labels_leave_the_scale_to_the_reduction(factor):
    z, y = normal(24, 3, seed=2).requires_grad_(), labels("soft", 24, 3)
    (cotangent,) = torch.autograd.grad(factor * MEANS["soft"](z, y, reduction="sum"), z)
    _, scale = Bernoulli().infer_event_weights(z.detach(), cotangent)
    torch.testing.assert_close(scale, scale.new_tensor(1 / 24))


def test_what_was_seen_is_saved():
    model, x, y = network(64), normal(24, 6), labels("gaussian", 24, 64)
    optimizer = natgrad.KFAC(model, "gaussian")
    with pytest.warns(UserWarning, match="mean over the 64"):
        loss_of("gaussian", x, y, True)(model).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = natgrad.KFAC(copy.deepcopy(model), "gaussian")
    other.load_state_dict(state)
    assert other.preconditioner.observer.likelihood == Gaussian(0.5, "mean")


@pytest.mark.parametrize("likelihood", [None, "gaussian"])
@pytest.mark.parametrize("factor", [1.0, *SCALES])
@pytest.mark.parametrize("keeps", ["all", "some"])
@pytest.mark.parametrize("averages", [False, True])
def test_losses_that_are_linear_in_the_outputs_tell_the_scale(averages, keeps, factor, likelihood):
    """As those of log-densities, one for every token, that a model returns."""
    model, x = network(7), normal(24, 6)
    mask = torch.ones(24, 7).double() if keeps == "all" else (normal(24, 7, seed=3) > 0).double()
    divisor = mask.sum() if averages else mask.any(1).sum()
    options = () if likelihood is None else (likelihood,)
    optimizer = natgrad.ExactNGD(model, *options, fisher="exact", lr=0.0, kl_clip=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (-factor * (model(x) * mask).sum() / divisor).backward()
    optimizer.step()

    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(
        dict(model.named_parameters())
    )
    flat = torch.cat([rows[name].flatten(2) for name in rows], 2).detach()
    # The variance of squared errors that are averaged is that of ``nn.MSELoss()``.
    expected = torch.einsum("ncp,nc,ncq->pq", flat, mask, flat) * (2 if averages else 1) / divisor
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)


# -- losses that are none of the likelihood ------------------------------------------------------


def contrastive(z: Tensor) -> Tensor:
    same = torch.arange(len(z))
    return functional.cross_entropy(z, same) + functional.cross_entropy(z.T, same)


FOREIGN = {
    "contrastive": ("categorical", 8, contrastive),
    "squares of logits": ("categorical", 4, lambda z: z.square().mean()),
    "critic": ("gaussian", 1, lambda z: -z.mean()),
    "two critics": ("bernoulli", 3, lambda z: z.mean()),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_loss_that_is_no_likelihood_is_named_once(case):
    likelihood, size, loss = FOREIGN[case]
    model, x = network(size), normal(8, 6)
    optimizer = natgrad.KFAC(model, likelihood)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    (sentence,) = [str(one.message) for one in said if "no loss of" in str(one.message)]
    assert "ResidualNGD" in sentence and "likelihood=" in sentence


def test_a_sum_that_is_asked_for_measures_how_far_outputs_move():
    """As of log-densities that a model returns, whose gradient is one number."""
    model = network(1)
    optimizer = natgrad.KFAC(model, Gaussian(reduce_outputs="sum"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (-model(normal(8, 6)).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()])
def test_probabilities_of_classes_are_taken_for_what_they_are(end):
    """As of policies: the loss takes their logarithm, times whatever reward."""
    model, reward = nn.Sequential(network(4), end), normal(16, seed=1)
    optimizer = natgrad.KFAC(model, "categorical")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        output = model(normal(16, 6))
        named = "probs" if isinstance(end, nn.Softmax) else "logits"
        actions = torch.distributions.Categorical(**{named: output})
        (-actions.log_prob(torch.arange(16) % 4) * reward).sum().backward()
        optimizer.step()
    assert not [one for one in said if "natgrad:" in str(one.message)]
    found = optimizer.preconditioner.observer.likelihood
    assert isinstance(found, ClassProbabilities) == isinstance(end, nn.Softmax)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("weight", [None, (0.2, 1.0, 4.0)])
def test_the_scale_at_log_probabilities_is_that_of_the_loss(told, weight):
    """Whether the target is told or not, and however sure the predictions are."""
    y, weights = torch.arange(8) % 3, None if weight is None else torch.tensor(weight).double()
    z = (normal(8, 3) + 3 * functional.one_hot(y)).log_softmax(1).requires_grad_()
    (gradient,) = torch.autograd.grad(0.25 * functional.nll_loss(z, y, weights), z)
    likelihood = Categorical(class_weights=weight)
    seen = likelihood.infer_event_weights(z.detach(), gradient, y if told else None)
    expected = Categorical(class_weights=weight).event_weights(z.detach(), y)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1], 0.25 / expected.sum())


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_of_class_probabilities_need_the_target(soft):
    weight = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
    model, x, criterion = network(3), normal(16, 6), nn.CrossEntropyLoss(weight)
    y = normal(16, 3, seed=1).softmax(1) if soft else torch.arange(16) % 3
    optimizer = natgrad.ExactNGD(model, criterion, lr=0.0, kl_clip=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if soft:
            with pytest.raises(UserWarning, match="class probabilities"):
                criterion(model(x), y).backward()
            optimizer.zero_grad()
            optimizer = natgrad.ExactNGD(model, criterion, lr=0.0, kl_clip=None)
            optimizer.loss(criterion, model(x), y).backward()
        else:
            criterion(model(x), y).backward()
    optimizer.step()
    expected = loss_hessian(model, lambda f: criterion(f(x), y))
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)


CROSS_ENTROPIES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)},
    "summed": {"reduction": "sum"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CROSS_ENTROPIES)
def test_cross_entropies_are_not(options, dtype):
    options = {
        k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in CROSS_ENTROPIES[options].items()
    }
    model, x = network(4).to(dtype), normal(64, 6).to(dtype)
    y = torch.randint(0, 4, (64,), generator=generator(1))
    y[::5] = -100
    optimizer = natgrad.KFAC(model, nn.CrossEntropyLoss(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.cross_entropy(model(x), y, **options).backward()
        optimizer.step()


def test_each_head_is_seen():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 64).double(), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model, x, y = Two(), normal(24, 6), labels("gaussian", 24, 64)
    optimizer = natgrad.KFAC(model, {0: "gaussian", 1: "categorical"})
    target = torch.randint(0, 3, (24,), generator=generator(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.cross_entropy(model(x)[1], target).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"head 0: .*mean over the 64"):
        functional.mse_loss(model(x)[0], y).backward()
    optimizer.step()
    assert optimizer.preconditioner.observer.likelihood.heads[0] == Gaussian(0.5, "mean")


def overlap(z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of Sudre et al. (2017), as segmentation takes it."""
    p = torch.sigmoid(z)
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_losses_of_overlaps_are_of_the_size_of_a_mean(share: float):
    model, x = nn.Linear(6, 400).double(), normal(16, 6)
    y = (normal(16, 400, seed=3) > 1).double()
    z = model(x)
    crossed = functional.binary_cross_entropy_with_logits(z, y)
    (cotangent,) = torch.autograd.grad(share * crossed + overlap(z, y), z)
    found, said = Bernoulli().seen_with(z.detach(), cotangent)
    assert found == Bernoulli("mean")
    assert "mean over the 400" in said[0]
    summed = functional.binary_cross_entropy_with_logits(
        z, torch.sigmoid(3 * y - 1), reduction="sum"
    )
    (cotangent,) = torch.autograd.grad(summed / 16, z)
    assert Bernoulli().seen_with(z.detach(), cotangent) == (Bernoulli("sum"), [])


# -- what is taken where the name stands for classes and the loss has none -------------------------


def triplets(z: Tensor) -> Tensor:
    return functional.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0), margin=5.0)


def binary(z: Tensor) -> Tensor:
    y = (normal(*z.shape, seed=3) > 0.5).double()
    return functional.binary_cross_entropy_with_logits(z, y)


def squares(z: Tensor) -> Tensor:
    return functional.mse_loss(z, normal(*z.shape, seed=3))


def penalised(z: Tensor) -> Tensor:
    y = torch.arange(len(z)) % z.shape[1]
    return functional.cross_entropy(z, y) + 0.05 * z.logsumexp(1).square().mean()


@pytest.mark.parametrize(
    ("loss", "size", "expected"),
    [
        (triplets, 6, Gaussian(reduce_outputs="sum")),
        (binary, 6, Bernoulli("mean")),
        (binary, 1, Bernoulli("sum")),
        (squares, 64, Gaussian(0.5, "mean")),
        (squares, 1, Gaussian(reduce_outputs="sum")),
        (penalised, 6, Categorical()),
    ],
)
def test_a_loss_without_classes_is_not_taken_for_one_of_classes(loss, size, expected):
    model, x = network(size), normal(24, 6)
    optimizer = natgrad.KFAC(model)
    with pytest.warns(UserWarning, match=r"no loss of Categorical\(\)|a single class"):
        loss(model(x)).backward()
    optimizer.step()
    assert optimizer.preconditioner.observer.likelihood == expected
    other = natgrad.KFAC(copy.deepcopy(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.preconditioner.observer.likelihood == expected


def test_losses_of_pixels_are_means():
    z, y = normal(16, 1, 20, 20), normal(16, 1, 20, 20, seed=3)
    z = z.requires_grad_()
    (-10 * functional.mse_loss(z, y).log10()).backward()
    found, (sentence,) = Categorical().seen_with(z.detach(), z.grad)
    assert found == Gaussian(0.5, "mean") and "a single class" in sentence


def jaccard(z: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    both = (p * y).sum(1)
    return (1 - (both + 1) / (p.sum(1) + y.sum(1) - both + 1)).mean()


def squared_dice(z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of Milletari et al. (2016)."""
    p = torch.sigmoid(z)
    return (1 - (2 * (p * y).sum(1) + 1) / (p.square().sum(1) + y.sum(1) + 1)).mean()


def focal_tversky(z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of Abraham & Khan (2019), of the whole batch at once."""
    p = torch.sigmoid(z)
    both = (p * y).sum()
    index = (both + 1) / (both + 0.3 * (p * (1 - y)).sum() + 0.7 * ((1 - p) * y).sum() + 1)
    return (1 - index) ** 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 1, 20, 20), (8, 2, 12, 12), (8, 20, 20)])
@pytest.mark.parametrize("crossed", [0.0, 1.0])
@pytest.mark.parametrize("loss", [overlap, jaccard, squared_dice, focal_tversky])
def test_losses_of_overlaps_are_of_binary_labels(loss, crossed, shape, dtype):
    z = (0.5 * normal(*shape)).to(dtype).requires_grad_()
    y = (normal(*shape, seed=3) > 0.5).to(dtype)
    total = crossed * functional.binary_cross_entropy_with_logits(z, y)
    (total + loss(z.flatten(1), y.flatten(1))).backward()
    found, (sentence,) = Categorical().seen_with(z.detach(), z.grad)
    assert found == Bernoulli("mean") and "likelihood=" in sentence


def test_overlaps_of_complementary_channels_are_of_binary_labels():
    """Their gradients nearly sum to zero over the channels, as those of classes do."""
    z, y = 0.5 * normal(8, 1, 12, 12), (normal(8, 1, 12, 12, seed=3) > 0.5).double()
    z, y = torch.cat([z, -z], 1).requires_grad_(), torch.cat([y, 1 - y], 1)
    jaccard(z.flatten(0, 1).flatten(1), y.flatten(0, 1).flatten(1)).backward()
    assert Categorical().seen_with(z.detach(), z.grad)[0] == Bernoulli("mean")


NO_OVERLAPS = {
    "absolute": lambda z, y: functional.l1_loss(z, y),
    "squares": lambda z, y: z.square().mean(),
    "squared errors": lambda z, y: functional.mse_loss(z, y),
    "Huber": lambda z, y: functional.smooth_l1_loss(z, 3 * y),
    "hinge": lambda z, y: functional.relu(1 - z * y.sign()).mean(),
    "critic": lambda z, y: z[::2].mean() - z[1::2].mean(),
    "similarity": lambda z, y: functional.cosine_similarity(z.flatten(1), y.flatten(1)).mean(),
}


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("loss", NO_OVERLAPS)
def test_other_losses_are_no_overlaps(loss, size):
    z, y = (size * normal(8, 1, 16, 16)).requires_grad_(), normal(8, 1, 16, 16, seed=3)
    NO_OVERLAPS[loss](z, y).backward()
    assert not shows_overlaps(z.detach(), z.grad)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_first_batch_that_overflows_is_no_overlap(number):
    model = nn.Conv2d(1, 1, 3, padding=1).double()
    optimizer = natgrad.KFAC(model)
    y = (normal(8, 1, 16, 16, seed=3) > 0).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for factor in (number, 1.0):
            optimizer.zero_grad()
            overlap(model(factor * normal(8, 1, 16, 16)).flatten(1), y.flatten(1)).backward()
            optimizer.step()
    assert all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_overflows_decides_nothing(number):
    """As at the first steps of mixed precision, whose scale is too large yet."""
    model, x = network(6), normal(24, 6)
    optimizer = natgrad.KFAC(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for factor in (number, 1.0):
            optimizer.zero_grad()
            (factor * triplets(model(x))).backward()
            optimizer.step()
    assert optimizer.preconditioner.observer.likelihood == Gaussian(reduce_outputs="sum")


def test_penalties_of_logits_leave_classes_what_they_are():
    z = (0.1 * normal(16, 100)).requires_grad_()
    penalty = 0.05 * z.logsumexp(1).square().mean()
    (functional.cross_entropy(z, torch.arange(16)) + penalty).backward()
    assert Categorical().seen_with(z.detach(), z.grad)[0] == Categorical()


def test_a_criterion_that_is_given_is_kept():
    model, x = network(6), normal(24, 6)
    optimizer = natgrad.KFAC(model, nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.warns(UserWarning, match="does not belong"):
        triplets(model(x)).backward()
    optimizer.step()
    assert isinstance(optimizer.preconditioner.observer.likelihood, Categorical)
