"""Shared coefficients, against dense solves and explicit sums of per-sample gradients."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.fngd.weighted_gradients import WeightedGradient, _scaled_copy
from tests import dense, processes
from tests.cases import generator, normal

CLASSES = 3
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "normalization": "none", "damping_scale": "absolute",
    "damping": 0.1,
}  # fmt: skip


class Sentence(nn.Module):
    """Tokens, an embedding with padding, positions, and layers over three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.norm(self.words(tokens))))
        return self.head(hidden).mean(1)


class Reused(nn.Module):
    """One layer called three times, once by keyword and once under checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(input=torch.tanh(self.first(x))))
        hidden = checkpoint(lambda h: torch.tanh(self.again(h)), hidden, use_reentrant=False)
        return self.head(torch.tanh(self.again(hidden)))


class Folded(nn.Module):
    """A layer that sees two rows per sample in its batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.reshape(-1, 2)))
        return self.head(hidden.view(len(x), 2, -1).sum(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, (2, 1), padding="valid", groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding="same", dilation=2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


class Own(nn.Module):
    """A linear map of another author, without a bias, of which some keep a flag."""

    def __init__(self, d_in: int, d_out: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((d_in, d_out) if transposed else (d_out, d_in)))
        self.transposed = transposed
        if not transposed:
            self.bias = False

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.transposed else self.weight.T)


def own_layers() -> nn.Module:
    return nn.Sequential(
        Own(4, 6, True), nn.Tanh(), Own(6, 2, False), nn.Tanh(), nn.Linear(2, CLASSES)
    )


def dilated() -> nn.Module:
    """Convolutions that are changed when they are made, as in dilated backbones."""
    model = convolutions()
    model[0].stride, model[0].dilation, model[0].padding = (1, 1), (2, 2), (1, 1)
    model[2].dilation = (2, 1)
    model[4].dilation, model[5] = (1, 2), nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten())
    return model


def one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
    )


def tokens(size: int, seed: int) -> Tensor:
    return torch.randint(0, 7, (size, 5), generator=generator(seed))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "mlp": (mlp, lambda n, seed: normal(n, 4, seed=seed)),
    "own_layers": (own_layers, lambda n, seed: normal(n, 4, seed=seed)),
    "convolutions": (convolutions, lambda n, seed: normal(n, 2, 6, 5, seed=seed)),
    "dilated": (dilated, lambda n, seed: normal(n, 2, 6, 5, seed=seed)),
    "one_dimension": (one_dimension, lambda n, seed: normal(n, 2, 4, seed=seed)),
    "sentence": (Sentence, tokens),
    "reused": (Reused, lambda n, seed: normal(n, 4, seed=seed)),
    "folded": (Folded, lambda n, seed: normal(n, 4, seed=seed)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def batch(name: str, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = MODELS[name][1](size, seed)
    return x, torch.randint(0, CLASSES, (size,), generator=generator(100 + seed))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return parameter name → gradients of the samples' losses, one backward pass each."""
    model = copy.deepcopy(model)  # Without hooks, which would weigh these samples, too.
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(parameters.values())
        )
        for n in range(len(x))
    ]
    return {
        name: torch.stack(column)
        for name, column in zip(parameters, zip(*rows, strict=True), strict=True)
    }


def blocks(model: nn.Module) -> list[list[str]]:
    """Return the parameter names of each layer."""
    names = [n for n, _ in model.named_parameters()]
    layers = dict.fromkeys(n.rpartition(".")[0] for n in names)
    return [[n for n in names if n.rpartition(".")[0] == layer] for layer in layers]


def flat_rows(rows: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([rows[n].flatten(1) for n in names], 1)


def dense_coefficients(
    rows: dict[str, Tensor], names: list[str], damping: float, relative: bool = False
) -> Tensor:
    """Return ``c = (GGᵀ/N + λI)⁻¹ 1``."""
    g = flat_rows(rows, names)
    gram = g @ g.T / len(g)
    shift = damping * gram.diagonal().mean() if relative else damping
    identity = torch.eye(len(g), dtype=g.dtype)
    return torch.linalg.solve(gram + shift * identity, torch.ones(len(g), dtype=g.dtype))


def weighted(rows: dict[str, Tensor], name: str, coefficients: Tensor) -> Tensor:
    return torch.tensordot(coefficients, rows[name], 1) / len(coefficients)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, scale: float = 1.0
) -> dict[str, Tensor]:
    """Take a step of the learning rate 1 and return the direction."""
    before = values(model)
    optimizer.zero_grad()
    (scale * functional.cross_entropy(model(x), y)).backward()
    optimizer.step()
    return {n: (old - model.get_parameter(n).detach()) for n, old in before.items()}


def weighs_all(optimizer: natgrad.FNGD) -> list[str]:
    """Return the blocks whose samples are weighed one by one."""
    return [n for n, o in optimizer.preconditioner.own_backward.items() if o.active is not False]


@pytest.mark.parametrize("name", MODELS)
def test_first_phase_is_the_damped_block_of_the_empirical_fisher(name: str) -> None:
    model, (x, y) = make(name), batch(name)
    rows = sample_gradients(model, x, y)
    direction = step(model, natgrad.FNGD(model, coefficient_steps=3, **PLAIN), x, y)
    for names in blocks(model):
        g = flat_rows(rows, names)
        fisher = g.T @ g / len(g) + 0.1 * torch.eye(g.shape[1], dtype=g.dtype)
        found = torch.cat([direction[n].flatten() for n in names])
        dense.assert_same(found, torch.linalg.solve(fisher, g.mean(0)), 1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", ["position", "iteration", "sample", "mean"])
def test_second_phase_is_the_weighted_sum_with_frozen_coefficients(name: str, share: str) -> None:
    model = make(name)
    optimizer = natgrad.FNGD(model, coefficient_steps=2, share=share, **PLAIN)
    kept: dict[tuple[str, ...], list[Tensor]] = {}
    for seed in range(2):
        x, y = batch(name, seed=seed)
        rows = sample_gradients(model, x, y)
        for names in blocks(model):
            kept.setdefault(tuple(names), []).append(dense_coefficients(rows, names, 0.1))
        optimizer.set_indices(torch.arange(6) + 6 * seed)
        step(model, optimizer, x, y)
    chosen = torch.tensor([3, 9, 0, 11, 7, 5])  # Of both batches.
    for seed in range(2, 5):
        x, y = batch(name, seed=seed)
        rows = sample_gradients(model, x, y)
        optimizer.set_indices(chosen)
        direction = step(model, optimizer, x, y)
        for names, pair in kept.items():
            c = {
                "position": (pair[0] + pair[1]) / 2,
                "iteration": pair[seed % 2],
                "sample": torch.cat(pair)[chosen],
                "mean": torch.cat(pair).mean().expand(6),
            }[share]
            if names[0].startswith("norm"):
                c = torch.cat(pair).mean().expand(6)  # Not weighed sample by sample.
            for n in names:
                dense.assert_same(direction[n], weighted(rows, n, c), 1e-9)
    expected = 0 if share == "mean" else len([b for b in blocks(model) if "norm" not in b[0]])
    assert len(weighs_all(optimizer)) == expected


def test_a_convolution_that_is_changed_later_is_as_it_is_now() -> None:
    model = make("convolutions")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, share="position", **PLAIN)
    x, y = batch("convolutions")
    rows, names = sample_gradients(model, x, y), ["4.weight", "4.bias"]
    coefficients = dense_coefficients(rows, names, 0.1)
    step(model, optimizer, x, y)
    model[4].dilation = (1, 1)
    rows = sample_gradients(model, x, y)
    direction = step(model, optimizer, x, y)
    for name in names:
        dense.assert_same(direction[name], weighted(rows, name, coefficients), 1e-9)


@pytest.mark.parametrize("share", ["iteration", "sample"])
def test_the_same_batches_in_the_same_order_give_the_same_directions(share: str) -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=3, share=share, **PLAIN)
    start, seen = values(model), []
    for _ in range(2):
        for seed in range(3):
            x, y = batch("mlp", seed=seed)
            optimizer.set_indices(torch.arange(6) + 6 * seed)
            seen.append(step(model, optimizer, x, y))
            model.load_state_dict(start)  # As with a learning rate of 0.
    for first, second in zip(seen[:3], seen[3:], strict=True):
        for name, direction in first.items():
            dense.assert_same(second[name], direction, 1e-10)


@given(
    samples=st.integers(1, 5),
    seed=st.integers(0, 100),
    exponent=st.floats(4.0, 6.0),
)
@settings(max_examples=20, deadline=None)
def test_limits_of_the_damping(samples: int, seed: int, exponent: float) -> None:
    x, y = batch("mlp", samples, seed)
    model = make("mlp")
    rows = sample_gradients(model, x, y)

    def run(damping: float, **options: Any) -> dict[str, Tensor]:
        copied = copy.deepcopy(model)
        options = {**PLAIN, "damping": damping, **options}
        return step(copied, natgrad.FNGD(copied, **options), x, y)

    # λ → ∞ is gradient descent with the rate 1/λ.
    large = 10.0**exponent
    for n, direction in run(large).items():
        dense.assert_same(direction * large, rows[n].mean(0), 10 / large)
    # One sample alone has c = 1/(‖g‖² + λ).
    alone = step(
        one := copy.deepcopy(model), natgrad.FNGD(one, **{**PLAIN, "damping": 0.3}), x[:1], y[:1]
    )
    for names in blocks(model):
        square = flat_rows(rows, names)[0].square().sum()
        for n in names:
            dense.assert_same(alone[n], rows[n][0] / (square + 0.3), 1e-9)
    # λ → 0 lowers the loss of every sample by the same amount, layer by layer.
    small = run(1e-9, damping_scale="relative")
    for names in blocks(model):
        g = flat_rows(rows, names)
        if torch.linalg.cond(g @ g.T) < 1e4:
            changes = g @ torch.cat([small[n].flatten() for n in names])
            dense.assert_same(changes, torch.ones_like(changes), 1e-4)


def test_equal_coefficients_are_gradient_descent() -> None:
    """With damping far above every eigenvalue the coefficients of a model's mean 1 are all 1."""
    for name in MODELS:
        model, plain = make(name), make(name)
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
        optimizer = natgrad.FNGD(
            model, damping=1e14, coefficient_steps=2, normalization="layer", **options
        )
        sgd = torch.optim.SGD(plain.parameters(), **options)
        for seed in range(6):
            x, y = batch(name, seed=seed)
            step(model, optimizer, x, y)
            step(plain, sgd, x, y)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            dense.assert_same(p.detach(), q.detach(), 1e-12)


@pytest.mark.parametrize("normalization", ["none", "layer", "model"])
def test_relative_damping_and_normalization(normalization: str) -> None:
    model, (x, y) = make("mlp"), batch("mlp")
    rows = sample_gradients(model, x, y)
    found = {
        tuple(names): dense_coefficients(rows, names, 0.2, relative=True) for names in blocks(model)
    }
    sizes = {names: sum(rows[n][0].numel() for n in names) for names in found}
    mean = sum(c.mean() * sizes[names] for names, c in found.items()) / sum(sizes.values())
    options = {**PLAIN, "damping": 0.2, "damping_scale": "relative", "normalization": normalization}
    optimizer = natgrad.FNGD(model, coefficient_steps=1, **options)
    first = step(model, optimizer, x, y)
    again = sample_gradients(model, x, y)
    second = step(model, optimizer, x, y)
    for names, c in found.items():
        c = {"none": c, "layer": c / c.mean(), "model": c / mean}[normalization]
        layer = names[0].rpartition(".")[0]
        dense.assert_same(optimizer.coefficients()[layer], c.mean(), 1e-9)
        for n in names:
            dense.assert_same(first[n], weighted(rows, n, c), 1e-9)
            dense.assert_same(second[n], weighted(again, n, c), 1e-9)


def test_improved_fisher_weighs_by_the_norms_at_the_output() -> None:
    model, (x, y) = make("mlp"), batch("mlp")
    rows = sample_gradients(model, x, y)
    output = model(x).detach()
    s = (output.softmax(1) - functional.one_hot(y, CLASSES)).square().sum(1)
    optimizer = natgrad.FNGD(model, coefficient_steps=1, fisher="improved", **PLAIN)
    direction = step(model, optimizer, x, y)
    later = sample_gradients(model, x, y)
    second = step(model, optimizer, x, y)
    for names in blocks(model):
        g = flat_rows(rows, names)
        fisher = (g / s.unsqueeze(1)).T @ g / len(g) + 0.1 * torch.eye(g.shape[1]).double()
        found = torch.cat([direction[n].flatten() for n in names])
        dense.assert_same(found, torch.linalg.solve(fisher, g.mean(0)), 1e-9)
        scaled = g / s.sqrt().unsqueeze(1)
        inner = scaled @ scaled.T / len(g) + 0.1 * torch.eye(len(g)).double()
        c = torch.linalg.solve(inner, s.sqrt()) / s.sqrt()
        for n in names:
            dense.assert_same(second[n], weighted(later, n, c), 1e-9)


@pytest.mark.parametrize("fisher", ["empirical", "improved"])
@pytest.mark.parametrize("damping_scale", ["absolute", "relative"])
@pytest.mark.parametrize("normalization", ["none", "layer", "model"])
def test_samples_that_do_not_count_change_nothing(
    normalization: str, damping_scale: str, fisher: str
) -> None:
    """Ignored targets and masks leave steps and means as without these samples, in both phases."""
    x, y = batch("mlp", 9)
    kept = torch.tensor([0, 2, 3, 7])
    counts = torch.zeros(9, dtype=torch.bool).index_fill_(0, kept, True)
    ignored = torch.where(counts, y, -100)

    def masked(model: nn.Module) -> Tensor:
        losses = functional.cross_entropy(model(x), y, reduction="none")
        return (losses * counts).sum() / 4

    def run(loss: Callable[[nn.Module], Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = make("mlp")
        options = {**PLAIN, "normalization": normalization, "damping_scale": damping_scale}
        optimizer = natgrad.FNGD(
            model, coefficient_steps=2, share="mean", fisher=fisher, **options, norm_clip=0.5
        )
        for _ in range(4):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], optimizer.coefficients()

    expected = run(lambda model: functional.cross_entropy(model(x[kept]), y[kept]))
    for loss in (lambda model: functional.cross_entropy(model(x), ignored), masked):
        found = run(loss)
        for value, other in zip(found[0], expected[0], strict=True):
            dense.assert_same(value, other, 1e-9)
        for name, mean in expected[1].items():
            dense.assert_same(found[1][name], mean, 1e-9)


def test_batches_of_another_size_take_the_mean() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, **PLAIN)
    x, y = batch("mlp")
    rows = sample_gradients(model, x, y)
    step(model, optimizer, x, y)
    for size in (4, 12):
        x, y = batch("mlp", size, seed=size)
        later = sample_gradients(model, x, y)
        direction = step(model, optimizer, x, y)
        for names in blocks(model):
            mean = dense_coefficients(rows, names, 0.1).mean()
            for n in names:
                dense.assert_same(direction[n], mean * later[n].mean(0), 1e-9)


def test_samples_never_seen_take_the_mean() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, share="sample", **PLAIN)
    x, y = batch("mlp")
    rows = sample_gradients(model, x, y)
    optimizer.set_indices(torch.tensor([4, 0, 9, 2, 3, 5]))
    step(model, optimizer, x, y)
    x, y = batch("mlp", 3, seed=1)
    later = sample_gradients(model, x, y)
    optimizer.set_indices(torch.tensor([9, 1, 50]))
    direction = step(model, optimizer, x, y)
    for names in blocks(model):
        kept = dense_coefficients(rows, names, 0.1)
        c = torch.stack([kept[2], kept.mean(), kept.mean()])
        for n in names:
            dense.assert_same(direction[n], weighted(later, n, c), 1e-9)


def test_accumulated_passes_form_one_batch() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, share="iteration", **PLAIN)
    kept: dict[str, Tensor] = {}
    for count in range(2):
        parts = [batch("mlp", size, seed=10 * count + size) for size in (4, 2)]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = sample_gradients(model, x, y)
        before = values(model)
        optimizer.zero_grad()
        for part, target in parts:
            (functional.cross_entropy(model(part), target, reduction="sum") / 6).backward()
        optimizer.step()
        for names in blocks(model):
            if count == 0:
                g = flat_rows(rows, names)
                inner = g @ g.T / 6 + 0.1 * torch.eye(6).double()
                kept[names[0]] = torch.linalg.solve(inner, torch.ones(6).double())
            for n in names:
                found = before[n] - model.get_parameter(n).detach()
                dense.assert_same(found, weighted(rows, n, kept[names[0]]), 1e-9)


@pytest.mark.parametrize("scale", [1e-3, 512.0])
def test_a_scaler_changes_nothing(scale: float) -> None:
    """Gradients are scaled for the backward pass and unscaled before the step."""
    models = make("mlp"), make("mlp")
    for model, factor in zip(models, (1.0, scale), strict=True):
        optimizer = natgrad.FNGD(model, coefficient_steps=2, **PLAIN)
        for seed in range(4):
            x, y = batch("mlp", seed=seed)
            optimizer.zero_grad()
            (factor * functional.cross_entropy(model(x), y)).backward()
            for p in model.parameters():
                p.grad /= factor
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        dense.assert_same(p.detach(), q.detach(), 1e-8)


def test_penalties_are_added_as_they_are() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, **PLAIN)
    for seed in range(2):
        x, y = batch("mlp", seed=0)
        rows = sample_gradients(model, x, y)
        if seed == 0:
            kept = {n[0]: dense_coefficients(rows, n, 0.1) for n in blocks(model)}
        before = values(model)
        optimizer.zero_grad()
        penalty = sum((normal(*p.shape, seed=7) * p).sum() for p in model.parameters())
        (functional.cross_entropy(model(x), y) + penalty).backward()
        optimizer.step()
        for names in blocks(model):
            c = kept[names[0]]
            g = flat_rows(rows, names)
            extra = torch.cat([normal(*model.get_parameter(n).shape, seed=7).flatten()
                               for n in names])  # fmt: skip
            found = torch.cat([(before[n] - model.get_parameter(n)).detach().flatten()
                               for n in names])  # fmt: skip
            expected = c @ g / len(g) + extra
            if seed == 0:
                # What a penalty shares with the gradient cannot be told from a scaled loss.
                plain = g.mean(0)
                share = 1 + (extra @ plain) / plain.square().sum()
                expected = share * (c @ g / len(g)) + extra - (share - 1) * plain
            dense.assert_same(found, expected, 1e-8)


def test_coefficients_are_refreshed() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, refresh_interval=3, **PLAIN)
    for index in range(7):
        x, y = batch("mlp", seed=index)
        rows = sample_gradients(model, x, y)
        direction = step(model, optimizer, x, y)
        if index % 3 == 0:
            kept = {n[0]: dense_coefficients(rows, n, 0.1) for n in blocks(model)}
        for names in blocks(model):
            for n in names:
                dense.assert_same(direction[n], weighted(rows, n, kept[names[0]]), 1e-9)


@pytest.mark.parametrize("share", ["position", "iteration", "sample", "mean"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, share: str, stop: int) -> None:
    def run(model: nn.Module, optimizer: natgrad.FNGD, first: int, last: int) -> None:
        for index in range(first, last):
            x, y = batch("mlp", seed=index)
            optimizer.set_indices(torch.arange(6) + index)
            step(model, optimizer, x, y)

    options = {**PLAIN, "lr": 0.1, "momentum": 0.9, "coefficient_steps": 3, "share": share}
    whole, model = make("mlp"), make("mlp")
    run(whole, natgrad.FNGD(whole, **options), 0, 9)
    optimizer = natgrad.FNGD(model, **options)
    run(model, optimizer, 0, stop)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = make("mlp")
    resumed.load_state_dict(weights)
    second = natgrad.FNGD(resumed, **options)
    second.load_state_dict(state)
    copied, third = copy.deepcopy((resumed, second))
    run(resumed, second, stop, 9)
    run(copied, third, stop, 9)
    for p, q, r in zip(whole.parameters(), resumed.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


@pytest.mark.parametrize("when", [1, 4])
def test_batches_that_are_not_finite_leave_no_trace(when: int) -> None:
    clean, model = make("mlp"), make("mlp")
    options = {**PLAIN, "momentum": 0.9, "lr": 0.1, "coefficient_steps": 3}
    first, second = natgrad.FNGD(clean, **options), natgrad.FNGD(model, **options)
    for index in range(6):
        if index == when:
            x, y = batch("mlp", seed=50)
            before = values(model)
            with pytest.warns(UserWarning, match="skipped a step"):
                step(model, second, x * float("nan"), y)
            assert all(torch.equal(v, before[n]) for n, v in values(model).items())
        x, y = batch("mlp", seed=index)
        step(clean, first, x, y)
        step(model, second, x, y)
    for p, q in zip(clean.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.back = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.back.weight = self.words.weight
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.back(self.words(x)).mean(1)))


@pytest.mark.parametrize("case", ["attention", "tied", "batch_norm", "frozen_bias", "positions"])
def test_layers_that_are_not_weighed_take_their_mean(case: str) -> None:
    torch.manual_seed(0)
    x: Tensor
    if case == "attention":
        model, x = Attending().double(), normal(6, 3, 4)
    elif case == "tied":
        model, x = Tied().double(), tokens(6, 0)
    elif case == "positions":
        model, x = Placed().double(), tokens(6, 0)
    elif case == "batch_norm":
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()
        x = normal(6, 4)
    else:
        model, x = mlp().double(), normal(6, 4)
        model[0].bias.requires_grad_(False)
    y = torch.arange(6) % CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = natgrad.FNGD(model, coefficient_steps=1, **PLAIN)
        step(model, optimizer, x, y)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    bare = copy.deepcopy(model)
    loss = functional.cross_entropy(bare(x), y)
    leaves = [bare.get_parameter(n) for n in parameters]
    plain = dict(zip(parameters, torch.autograd.grad(loss, leaves), strict=True))
    direction = step(model, optimizer, x, y)
    means = optimizer.coefficients()
    not_weighed = {
        "attention": {"attention.in_proj", "attention.out_proj"},
        "tied": set(),
        "batch_norm": {"1"},
        "frozen_bias": set(),
        "positions": {"places"},
    }[case]
    curvature = optimizer.preconditioner.curvature
    own = optimizer.preconditioner.own_backward
    weighed = {n for n, block in curvature.blocks.items() if n in own and n in means}
    assert set(curvature.blocks) - weighed == not_weighed
    sizes = {name: curvature.blocks[name].numel for name in means}
    typical = sum(mean * sizes[name] for name, mean in means.items()) / sum(sizes.values())
    for name in not_weighed:
        factor = means.get(name, typical)
        for n in curvature.blocks[name].names:
            dense.assert_same(direction[n], factor * plain[n], 1e-10)


class Placed(nn.Module):
    """A table of positions, called once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x) + self.places(torch.arange(5))).mean(1))


def test_first_order_groups_keep_plain_gradients() -> None:
    model = make("mlp")
    groups = [{"modules": [model[0]], "preconditioned": False}]
    optimizer = natgrad.FNGD(model, coefficient_steps=1, params=groups, **PLAIN)
    assert list(optimizer.preconditioner.own_backward) == ["2", "4"]
    step(model, optimizer, *batch("mlp"))
    x, y = batch("mlp")
    rows = sample_gradients(model, x, y)
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    dense.assert_same(model[0].weight.grad, rows["0.weight"].mean(0), 1e-12)
    assert not torch.allclose(model[2].weight.grad, rows["2.weight"].mean(0))


def test_second_derivatives_and_evaluation_see_the_plain_layers() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, coefficient_steps=1, **PLAIN)
    step(model, optimizer, *batch("mlp"))
    x = normal(6, 4).requires_grad_()
    plain = make("mlp")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    gradient = torch.autograd.grad(model(x).sum(), x)[0]
    dense.assert_same(gradient, torch.autograd.grad(plain(x).sum(), x)[0], 1e-12)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_threads_do_not_share_scratch_memory() -> None:
    rows, factors = normal(4, 3), normal(4, seed=1)
    found: list[Tensor] = []
    first = _scaled_copy(rows, factors)
    kept = first.clone()
    thread = threading.Thread(target=lambda: found.append(_scaled_copy(-rows, factors)))
    thread.start()
    thread.join()
    assert torch.equal(first, kept)
    assert torch.equal(found[0], -kept)
    assert _scaled_copy(rows, factors).data_ptr() == first.data_ptr()


def test_autocast() -> None:
    model = make("convolutions").float()
    optimizer = natgrad.FNGD(model, lr=0.1, coefficient_steps=2)
    x, y = batch("convolutions")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_compiled_model_takes_the_same_steps() -> None:
    eager, model = make("mlp"), make("mlp")
    compiled = torch.compile(model, backend="aot_eager")
    first = natgrad.FNGD(eager, coefficient_steps=2, **PLAIN)
    second = natgrad.FNGD(compiled, coefficient_steps=2, **PLAIN)
    for seed in range(4):
        x, y = batch("mlp", seed=seed)
        step(eager, first, x, y)
        second.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        second.step()
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        dense.assert_same(p.detach(), q.detach(), 1e-10)
    own = second.preconditioner.own_backward.values()
    assert all(isinstance(one, WeightedGradient) for one in own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient_steps": 0}, "coefficient_steps"),
        ({"refresh_interval": 5, "coefficient_steps": 5}, "refresh_interval"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": natgrad.LevenbergMarquardt()}, "adaptive damping"),
        ({"lr": "isotropic"}, "isotropic"),
        ({"fisher": "mc"}, "fisher must be"),
        ({"share": "batch"}, "share must be"),
        ({"normalization": "all"}, "normalization must be"),
        ({"damping_scale": "log"}, "damping_scale must be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natgrad.FNGD(make("mlp"), **options)


@pytest.mark.parametrize("option", ["kl_clip", "structure", "refresh", "step_rule"])
def test_options_that_need_curvature_or_the_plain_gradient_are_refused(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        natgrad.FNGD(make("mlp"), **{option: None})


def test_missing_indices_are_asked_for_and_nothing_moves() -> None:
    model = make("mlp")
    optimizer = natgrad.FNGD(model, share="sample", **PLAIN)
    before = values(model)
    with pytest.raises(ValueError, match="indices of no samples"):
        step(model, optimizer, *batch("mlp"))
    optimizer.set_indices(torch.arange(4))
    with pytest.raises(ValueError, match="indices of 4 samples for 6"):
        step(model, optimizer, *batch("mlp"))
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    optimizer.set_indices(torch.arange(6))
    step(model, optimizer, *batch("mlp"))
    assert any(not torch.equal(v, before[n]) for n, v in values(model).items())


def replica(rank: int) -> dict[str, Tensor]:
    plain = make("mlp")
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = natgrad.FNGD(model, coefficient_steps=2, **PLAIN)
    for index in range(4):
        x, y = batch("mlp", seed=10 * index + rank)
        optimizer.zero_grad()
        (2.0 * functional.cross_entropy(model(x), y)).backward()
        for p in plain.parameters():
            p.grad /= 2.0
        optimizer.step()
    return values(plain)


@pytest.mark.slow
def test_replicas_weigh_the_samples_of_the_joint_batch() -> None:
    found = processes.run(replica)
    model = make("mlp")
    kept: dict[str, list[Tensor]] = {}
    for index in range(4):
        batches = [batch("mlp", seed=10 * index + rank) for rank in range(2)]
        rows = sample_gradients(model, *(torch.cat(each) for each in zip(*batches, strict=True)))
        direction = {}
        for names in blocks(model):
            if index < 2:
                kept.setdefault(names[0], []).append(dense_coefficients(rows, names, 0.1))
                c = kept[names[0]][-1]
            else:
                c = torch.stack(kept[names[0]]).mean(0)
            direction.update({n: weighted(rows, n, c) for n in names})
        with torch.no_grad():
            for n, p in model.named_parameters():
                p -= direction[n]
    for n, p in model.named_parameters():
        assert torch.equal(found[0][n], found[1][n])
        dense.assert_same(found[0][n], p.detach(), 1e-8)
