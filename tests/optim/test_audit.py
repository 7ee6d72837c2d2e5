"""Gradients that rows do not explain are found on the first step, named once and handled."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.optim.observer import CHECK_INTERVAL
from tests.cases import normal
from tests.situations import Calls

PLAIN = {"momentum": 0.0, "kl_clip": None, "damping": 0.1, "lr": 1.0}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> list[str]:
    """Take a step and return what natgrad said."""
    optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss.backward()
        optimizer.step()
    return [str(one.message) for one in told if "natgrad" in one.filename or "trains" in str(one)]


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.ExactNGD, natgrad.SINGD, natgrad.FNGD])
def test_a_head_the_likelihood_does_not_see_is_named_once_and_trained(kind):
    torch.manual_seed(0)
    model = TwoHeads().double()
    optimizer = kind(model, lr=0.01)
    x, y = normal(16, 4), torch.arange(16) % 3
    before = model.value.weight.detach().clone()
    said = []
    for _ in range(3):
        logits, value = model(x)
        loss = functional.cross_entropy(logits, y) + 0.1 * value.square().mean()
        said.append([s for s in step(optimizer, loss) if "value" in s])
    assert len(said[0]) == 1 and "value.weight" in said[0][0] and "likelihood={...}" in said[0][0]
    assert said[1:] == [[], []]
    assert {"value.weight", "value.bias"} <= set(optimizer.preconditioner.untrusted)
    assert not torch.equal(before, model.value.weight)
    assert "value" in str(optimizer.summary())


@pytest.mark.parametrize(
    "change",
    [
        lambda model, loss: loss,
        lambda model, loss: loss * 3.7,
        lambda model, loss: loss + 0.1 * sum(p.square().sum() for p in model.parameters()),
        lambda model, loss: loss.sum() / 2 + loss / 2,
    ],
)
def test_scales_and_penalties_are_no_findings(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].weight.register_hook(lambda g: 0.5 * g)
    optimizer = natgrad.KFAC(model)
    y = torch.arange(12) % 3
    loss = change(model, functional.cross_entropy(model(normal(12, 4)), y))
    assert step(optimizer, loss) == []
    assert optimizer.preconditioner.untrusted == {}


def test_gradients_that_are_zero_but_for_rounding_are_no_findings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 3)).double()
    optimizer = natgrad.KFAC(model)
    assert (
        step(optimizer, functional.cross_entropy(model(normal(12, 4)), torch.arange(12) % 3)) == []
    )
    assert optimizer.preconditioner.untrusted == {}


def test_a_term_of_another_kind_is_named_and_the_rest_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = natgrad.ExactNGD(model, **PLAIN)
    y = torch.arange(12) % 3
    loss = functional.cross_entropy(model(normal(12, 4)), y)
    said = step(optimizer, loss + 0.002 * model[0].weight.abs().sum())
    assert len(said) == 1 and "'0.weight'" in said[0] and "0.bias" not in said[0]


class Balanced(nn.Module):
    """Weighs two losses by parameters that no output depends on."""

    def __init__(self, balances: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        if balances:
            self.balance = nn.Parameter(torch.ones(2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.BlockDiagonalNGD, natgrad.SINGD])
@pytest.mark.parametrize("asks", [False, True])
def test_a_gradient_put_there_by_hand_is_none_of_the_output(kind, asks):
    """As GradNorm and multipliers of constraints have it: steps of all others are as without."""
    x, y = normal(16, 4), torch.arange(16) % 3
    found = {}
    for balances in (True, False):
        model = Balanced(balances)
        optimizer = kind(model, fisher="exact", damping=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward(retain_graph=asks)
            if balances:
                given = torch.tensor([3.0, -5.0]).double()
                if asks:
                    (given,) = torch.autograd.grad((model.balance * given).sum(), model.balance)
                model.balance.grad = given
            optimizer.step()
        found[balances] = nn.utils.parameters_to_vector(model.layers.parameters()).detach()
        if balances:
            assert set(optimizer.preconditioner.untrusted) == {"balance"}
            assert model.balance[0] < 1 < model.balance[1]
    torch.testing.assert_close(found[True], found[False], rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_left_from_other_passes_is_no_finding():
    """One head has its turn, and what the other one has learnt from stays where it is."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    likelihood = {0: "categorical", 1: nn.MSELoss()}
    optimizer = natgrad.KFAC(model, likelihood)
    x, y = normal(16, 4), torch.arange(16) % 3
    for turn in range(4):
        logits, value = model(x)
        if turn % 2 == 0:
            functional.cross_entropy(logits, y).backward()
        else:
            value.square().mean().backward()
        optimizer.step()
    assert not optimizer.preconditioner.untrusted


def test_it_is_looked_again_when_layers_change_and_rarely_otherwise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = natgrad.KFAC(model)
    rows = optimizer.preconditioner.capture.rows

    def train(times: int) -> int:
        for _ in range(times):
            step(optimizer, functional.cross_entropy(model(normal(6, 3)), torch.arange(6) % 2))
        return optimizer.preconditioner.capture.sources.checks

    assert train(12) == 1
    model[2] = nn.Linear(4, 2).double()
    assert train(12) == 1 and optimizer.preconditioner.capture.rows is not rows
    optimizer.preconditioner.observer.steps = CHECK_INTERVAL - 1
    assert train(2) == 2


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = checkpoint(lambda z: torch.tanh(self.inner(z)), h, use_reentrant=self.reentrant)
        return self.last(h)


def test_reentrant_checkpoints_leave_layers_to_the_fallback_by_name():
    torch.manual_seed(0)
    x, y = normal(8, 3), torch.arange(8) % 2
    model = Checkpointed(True).double()
    optimizer = natgrad.KFAC(model)
    said = step(optimizer, functional.cross_entropy(model(x), y))
    untrusted = set(optimizer.preconditioner.untrusted)
    assert untrusted == {"first.weight", "first.bias", "inner.weight", "inner.bias"}
    assert all(any(name in sentence for sentence in said) for name in untrusted)
    reasons = optimizer.preconditioner.untrusted
    assert all("use_reentrant=False" in reasons[name] for name in untrusted)
    assert step(optimizer, functional.cross_entropy(model(x), y)) == []
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        natgrad.fisher_matrix(model, (x, y))
    model = Checkpointed(False).double()
    optimizer = natgrad.KFAC(model)
    assert step(optimizer, functional.cross_entropy(model(x), y)) == []


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_graph_kept_by_create_graph_is_understood(kind):
    found = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer = natgrad.ExactNGD(model, fisher=kind, **PLAIN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of torch, about cycles in memory.
            loss = functional.cross_entropy(model(normal(6, 3)), torch.arange(6) % 2)
            loss.backward(create_graph=create_graph)
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("passes", [8, 60])
def test_any_number_of_passes_before_one_backward_pass(passes):
    torch.manual_seed(0)
    x, y = normal(2 * passes, 3), torch.arange(2 * passes) % 2
    found = []
    for parts in (1, passes):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer = natgrad.ExactNGD(model, fisher="exact", **PLAIN)
        pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
        sum(functional.cross_entropy(model(a), b) / parts for a, b in pairs).backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_a_pass_that_was_forgotten_is_named(monkeypatch):
    monkeypatch.setattr("natgrad.capture.capture.WAITING_ELEMENTS", 0)
    monkeypatch.setitem(natgrad.capture.capture.WAITING_PASSES, True, 2)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    optimizer = natgrad.KFAC(model)
    y = torch.arange(4) % 2
    loss = sum(functional.cross_entropy(model(normal(4, 3, seed=s)), y) for s in range(4))
    assert any("was forgotten" in sentence for sentence in step(optimizer, loss))


def test_two_threads_do_not_see_each_other():
    """Two models trained at once take the steps they take alone."""

    def train(seed: int, start: threading.Barrier | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        optimizer = natgrad.KFAC(model, fisher="exact", refresh=natgrad.Refresh(1, 1))
        x = torch.randn(16, 3, generator=generator).double()
        for _ in range(20):
            if start is not None:
                start.wait()
            optimizer.zero_grad()
            functional.cross_entropy(model(x), torch.arange(16) % 2).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    alone = [train(seed, None) for seed in (0, 1)]
    together: dict[int, Tensor] = {}
    start = threading.Barrier(2)

    def run(seed: int) -> None:
        together[seed] = train(seed, start)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert torch.equal(alone[seed], together[seed])


def test_inference_mode_and_modules_without_values_are_named():
    model = nn.Linear(3, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        natgrad.fisher_matrix(model, (torch.randn(4, 3), None))
    with torch.inference_mode():
        made_inside = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="inference_mode"):
        natgrad.KFAC(made_inside)
    with pytest.raises(ValueError, match="run the model once"):
        natgrad.KFAC(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"parameter '0.weight' is on the meta device"):
        natgrad.KFAC(nn.Sequential(nn.Linear(3, 2, device="meta")))


def test_a_dimension_that_is_none_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"batch_dim=2 is no dimension of .*\(4, 2\)"):
        natgrad.fisher_matrix(model, (x, None), batch_dim=2)
    with pytest.raises(ValueError, match="batch_dim must be None or a dimension"):
        natgrad.KFAC(model, batch_dim=-1)


def test_a_loss_that_comes_through_no_output_is_named_and_trained():
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.layer(x), layer=nn.Linear(3, 2)).double()
    optimizer = natgrad.KFAC(model, "gaussian")
    x = normal(6, 3)
    loss = model(x).square().sum() * 1e-9 + functional.linear(x, model.layer.weight).abs().sum()
    before = model.layer.weight.detach().clone()
    step(optimizer, loss)
    assert not torch.equal(before, model.layer.weight)
    assert model.layer.weight.isfinite().all()


@pytest.mark.parametrize(
    "kind", [natgrad.KFAC, natgrad.ExactNGD, natgrad.FNGD, natgrad.ImprovedEmpiricalNGD]
)
@pytest.mark.parametrize("lends", [False, True])
def test_gradients_at_inputs_alone_are_no_part_of_the_step(kind, lends):
    """Adversarial examples are made between ``zero_grad`` and the backward pass that trains."""
    x, y = normal(12, 4), torch.arange(12) % 3

    def train(attacks: bool) -> tuple[Tensor, list[str]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer, said = kind(model), []
        for _ in range(3):
            optimizer.zero_grad()
            moved = x.clone().requires_grad_()
            for _ in range(2 if attacks else 0):
                out = model(moved[:5])
                if lends:
                    out = torch.func.functional_call(model, dict(model.named_parameters()), moved)
                torch.autograd.grad(functional.cross_entropy(out, y[: len(out)]), moved)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            said += [str(one.message) for one in told]
        return nn.utils.parameters_to_vector(model.parameters()).detach(), said

    alone, attacked = train(False), train(True)
    assert torch.equal(alone[0], attacked[0])
    assert attacked[1] == alone[1]


def test_parameters_lent_for_a_pass_that_trains_are_seen():
    """None of the model's own parameters is in such a graph."""
    model = nn.Linear(3, 2).double()
    optimizer = natgrad.KFAC(model)
    lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, lent, normal(8, 3))
    functional.cross_entropy(out, torch.arange(8) % 2).backward()
    assert len(optimizer.preconditioner.observer.seen) == 1


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(20, 32), nn.Linear(32, 16)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.head(h), self.other(h)


@pytest.mark.parametrize("term", [0.0, 0.3])
def test_sums_in_half_precision_are_no_findings(term):
    """Autocast adds those of several passes in its type; of a triplet's biases they cancel."""
    torch.manual_seed(0)
    model = Embedded()
    optimizer = natgrad.KFAC(model, natgrad.Gaussian(reduce_outputs="sum"))
    inputs = [torch.randn(64, 20) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = [model(x) for x in inputs]
        loss = functional.triplet_margin_loss(*(embedding for embedding, _ in pairs))
        loss = loss + term * pairs[0][1].square().sum(1).mean()
    assert pairs[0][0].dtype == torch.bfloat16
    said = [one for one in step(optimizer, loss) if "a part of the gradients" in one]
    if not term:
        assert said == []
    else:  # What really comes from elsewhere is named as before.
        assert len(said) == 1 and "'body.weight'" in said[0]
