"""Fisher matrices of torch's own losses, whatever the layout, against their Hessians at the output.

The loss of a model that is linear in its parameters has the Hessian ``JᵀΛJ/count``, so autograd's
second derivative of the training loss itself is the reference.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Categorical, as_likelihood
from tests.cases import generator, normal

DOUBLE = torch.float64


class Placed(nn.Module):
    """A linear layer on the last dimension whose outputs are moved to another one."""

    def __init__(self, classes: int, class_dim: int, log: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, classes, dtype=DOUBLE)
        self.class_dim, self.log = class_dim, log
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(normal(*p.shape, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        z = z.log_softmax(-1) if self.log else z
        return z.movedim(-1, self.class_dim)


def loss_hessian(model: nn.Module, loss) -> Tensor:
    """The Hessian of ``loss(model)`` in the model's parameters, (P, P)."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([v.flatten() for v in values.values()])

    def evaluated(vector: Tensor) -> Tensor:
        parts = vector.split([v.numel() for v in values.values()])
        given = {n: p.view_as(v) for (n, v), p in zip(values.items(), parts, strict=True)}
        return loss(lambda x: torch.func.functional_call(model, given, (x,)))

    return torch.func.hessian(evaluated)(flat)


def seen_by_optimizer(model: nn.Module, likelihood, loss) -> Tensor:
    """The Fisher matrix that an optimizer holds after one plain step on a loss."""
    optimizer = natgrad.ExactNGD(model, likelihood, lr=0.0, kl_clip=None)
    loss(model).backward()
    optimizer.step()
    return optimizer.preconditioner.curvature.matrix().to_dense()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 1e-10 * expected.norm()


@st.composite
def layouts(draw):
    """A model with classes along a dimension, inputs, labels, options of the cross-entropy."""
    places = draw(st.lists(st.integers(1, 3), max_size=2))
    classes = draw(st.integers(2, 4))
    samples, seed = draw(st.integers(2, 4)), draw(st.integers(0, 2**20))
    x = normal(samples, *places, 2, seed=seed)
    y = torch.randint(0, classes, (samples, *places), generator=generator(seed))
    if draw(st.booleans()):
        y.view(-1)[1:][torch.rand(y.numel() - 1, generator=generator(seed)) < 0.3] = -100
    weight = torch.rand(classes, generator=generator(seed), dtype=DOUBLE) + 0.2
    options = {
        "weight": weight if draw(st.booleans()) else None,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    return classes, x, y, options


@given(layouts())
@settings(deadline=None, max_examples=60)
def test_cross_entropy_has_its_classes_in_dimension_1(case):
    classes, x, y, options = case
    model, criterion = Placed(classes, 1), nn.CrossEntropyLoss(**options)
    expected = loss_hessian(model, lambda f: criterion(f(x), y))
    assert_same(natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense(), expected)
    if options["weight"] is None or not options["label_smoothing"]:
        assert_same(seen_by_optimizer(model, criterion, lambda m: criterion(m(x), y)), expected)


@given(layouts())
@settings(deadline=None, max_examples=30)
def test_class_probabilities_as_targets(case):
    classes, x, _, options = case
    model, criterion = Placed(classes, 1), nn.CrossEntropyLoss(**options)
    y = normal(*model(x).shape, seed=5).softmax(1)
    expected = loss_hessian(model, lambda f: criterion(f(x), y))
    assert_same(natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense(), expected)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@given(layouts(), st.sampled_from(["nll", "mean", "batchmean", "sum"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_log_probabilities_have_the_curvature_of_their_logits(case, kind, log_target):
    classes, x, y, options = case
    # A divergence has no class dimension of its own: it is that of the likelihood's name.
    dim = 2 if kind != "nll" and x.dim() == 3 else 1
    logits, model = Placed(classes, dim), Placed(classes, dim, log=True)
    if kind == "nll":
        criterion = nn.NLLLoss(options["weight"])
        same = nn.CrossEntropyLoss(options["weight"])
        expected = loss_hessian(logits, lambda f: same(f(x), y))
        assert_same(natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense(), expected)
        assert_same(seen_by_optimizer(model, criterion, lambda m: criterion(m(x), y)), expected)
        return
    criterion = nn.KLDivLoss(reduction=kind, log_target=log_target)
    p = normal(*model(x).shape, seed=5).softmax(dim)
    target = p.log() if log_target else p
    expected = loss_hessian(logits, lambda f: criterion(f(x).log_softmax(dim), target))
    count = x[..., 0].numel() if kind == "sum" else 1  # F is a mean, of events.
    for fisher in (
        natgrad.fisher_matrix(model, (x, target), criterion, "full").to_dense(),
        seen_by_optimizer(model, criterion, lambda m: criterion(m(x), target)),
    ):
        assert_same(fisher * count, expected)


def test_the_name_says_the_last_dimension_of_three_and_an_option_any():
    x, y = normal(3, 4, 2, seed=0), torch.randint(0, 3, (3, 4), generator=generator(1))
    for likelihood, dim in (("categorical", 2), (Categorical(class_dim=1), 1)):
        model = Placed(3, dim)

        def loss(f, dim=dim):
            return functional.cross_entropy(f(x).movedim(dim, 1), y)

        expected = loss_hessian(model, loss)
        assert_same(natgrad.fisher_matrix(model, (x, y), likelihood, "full").to_dense(), expected)
        assert_same(seen_by_optimizer(model, likelihood, loss), expected)


@pytest.mark.parametrize("likelihood", ["categorical", nn.CrossEntropyLoss()])
def test_an_optimizer_sees_classes_along_another_dimension(likelihood):
    """As where the criterion is given ``output.flatten(0, 1)``."""
    x, y = normal(3, 4, 2, seed=0), torch.randint(0, 4, (3, 4), generator=generator(1))
    dim = 1 if likelihood == "categorical" else 2
    model = Placed(4, dim)

    def loss(f):
        return functional.cross_entropy(f(x).movedim(dim, 1), y)

    assert_same(seen_by_optimizer(model, likelihood, loss), loss_hessian(model, loss))
    optimizer = natgrad.ExactNGD(model, likelihood, kl_clip=None)
    loss(model).backward()
    optimizer.step()
    assert optimizer.preconditioner.observer.likelihood.class_dim == dim
    resumed = natgrad.ExactNGD(model, likelihood, kl_clip=None)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.preconditioner.observer.likelihood.class_dim == dim


def test_a_divergence_of_classes_along_another_dimension_is_refused():
    model, x = Placed(4, 1, log=True), normal(3, 4, 2, seed=0)
    with pytest.raises(ValueError, match=r"log-probabilities over dimension 1 .*class_dim=1\)"):
        natgrad.fisher_matrix(model, (x, None), nn.KLDivLoss(reduction="batchmean"), "full")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs(dtype):
    x, y = normal(32, 4, 2, seed=0), torch.randint(0, 3, (32, 4), generator=generator(1))
    y[::3, 1] = -100
    exact, low = Placed(3, 1), Placed(3, 1).to(dtype)
    criterion = nn.CrossEntropyLoss()
    expected = natgrad.fisher_matrix(exact, (x, y), criterion, "full").to_dense()
    for got in (
        seen_by_optimizer(low, criterion, lambda m: criterion(m(x.to(dtype)), y)),
        natgrad.fisher_matrix(low, (x.to(dtype), y), criterion, "full").to_dense(),
    ):
        assert (got.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("criterion", [nn.MultiMarginLoss(), nn.TripletMarginLoss(), nn.CTCLoss()])
def test_losses_that_are_no_likelihoods_are_named(criterion):
    with pytest.raises(TypeError, match="pass a Likelihood instead") as error:
        natgrad.KFAC(nn.Linear(2, 2), criterion)
    assert type(criterion).__name__ in str(error.value) and "\n" not in str(error.value)


def test_functions_stand_for_their_modules():
    for function, module in (
        (functional.mse_loss, nn.MSELoss()),
        (functional.cross_entropy, nn.CrossEntropyLoss()),
        (functional.nll_loss, nn.NLLLoss()),
        (functional.binary_cross_entropy, nn.BCELoss()),
        (functional.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss()),
    ):
        assert as_likelihood(function) == as_likelihood(module)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "improved", "gram"])
@pytest.mark.parametrize("ignored", [False, True])
def test_steps_at_log_probabilities_are_those_at_logits(fisher, ignored):
    """Their gradients do not sum to zero; the network lets through what does."""
    x, labels = normal(12, 4), torch.arange(12) % 3
    labels[: 3 * ignored] = -100
    kind = natgrad.ImprovedFisher(damping_on="gram") if fisher == "gram" else fisher
    found = []
    for last, loss in ((None, functional.cross_entropy), (nn.LogSoftmax(1), functional.nll_loss)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        if last is not None:
            model.append(last)
        optimizer = natgrad.ExactNGD(model, fisher=kind)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), labels).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)
