"""The claims of Gao et al.: what trains, what is compared, and damping layer by layer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments.claims import gao
from natgrad.experiments.claims.claim import Setting
from natgrad.experiments.claims.image_training import VGG, ImageTask, ResNet, images, train
from natgrad.experiments.claims.layer_damping import LayerDampedKFAC, LayerDampedTKFAC
from natgrad.experiments.claims.race import Race, at_equal_time, time_to

CLAIMS = {claim.name: claim for claim in gao.SOURCE.claims}


def small_task(epochs: int = 2) -> ImageTask:
    data = Setting().dataset(200, test_samples=50)
    return ImageTask(data, lambda c, k, side: VGG(c, k, ((4,), (8,)), side), epochs, 50)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_published_networks_have_the_published_sizes():
    # He et al. 2016, table 6: 0.27 M; VGG-16's convolutions: 14.7 M, and a linear layer.
    assert 0.265e6 < parameters(ResNet(3, 10, (16, 32, 64), 3)) < 0.28e6
    groups = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    assert parameters(VGG(3, 100, groups, 32)) == 14_714_688 + 512 * 100 + 100


@pytest.mark.parametrize("side", [4, 8, 32])
def test_networks_take_images_of_any_size(side):
    x = torch.randn(2, 3, side, side)
    assert VGG(3, 7, ((4, 4), (8,), (8,), (8,)), side)(x).shape == (2, 7)
    assert ResNet(3, 7, (4, 8, 16), 2)(x).shape == (2, 7)


def test_images_are_shrunk_and_classes_kept():
    data = images(Setting(), 100, 3)
    assert data.input_shape == (1, 8, 8) and data.classes == 10 and len(data.train_labels) == 1200


def test_training_is_that_of_a_plain_loop():
    task = small_task()
    curves = train(task, lambda m: torch.optim.SGD(m.parameters(), lr=0.05), 3)

    model, data = task.model(3), task.data
    generator, means = torch.Generator().manual_seed(3), []
    for _ in range(2):
        order, losses = torch.randperm(200, generator=generator), []
        for start in range(0, 200, 50):
            chosen = order[start : start + 50]
            loss = functional.cross_entropy(
                model(data.train_inputs[chosen]), data.train_labels[chosen]
            )
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.05 * g
            losses.append(float(loss.detach()))
        means.append(sum(losses) / 4)
    right = (model(data.test_inputs).argmax(1) == data.test_labels).double().mean()
    assert curves["loss"] == pytest.approx(means, rel=1e-5)
    assert curves["accuracy"][-1] == float(right)
    assert 0 < curves["seconds"][0] < curves["seconds"][1]


def test_a_run_that_diverges_has_infinite_losses_and_chance_accuracy():
    curves = train(small_task(3), lambda m: torch.optim.SGD(m.parameters(), lr=1e12), 0)
    assert curves["loss"][-1] == math.inf and curves["accuracy"][-1] == 0.1
    assert {len(values) for values in curves.values()} == {3}
    assert at_equal_time([curves], "loss") == [math.inf]


def test_figures_at_equal_time_are_linear_between_epochs():
    fast = {"loss": [3.0, 2.0], "accuracy": [0.2, 0.3], "seconds": [1.0, 2.0]}
    slow = {"loss": [4.0, 2.0, 1.0], "accuracy": [0.1, 0.5, 0.6], "seconds": [1.6, 3.2, 4.8]}
    # The fast one's accuracy is known after 2 s at last, its loss in the middle of an epoch, 1.5 s.
    assert at_equal_time([fast, slow], "accuracy") == pytest.approx([0.3, 0.1 + 0.4 * 0.4 / 1.6])
    assert at_equal_time([fast, slow], "loss") == pytest.approx([2.0, 4.0 - 2.0 * 0.7 / 1.6])
    late = {"loss": [4.0, 2.0], "accuracy": [0.1, 0.2], "seconds": [9.0, 18.0]}
    assert at_equal_time([fast, late], "loss") == [2.0, 4.0]


def test_an_accuracy_is_reached_after_the_first_epoch_that_has_it():
    curves = {"accuracy": [0.1, 0.4, 0.3, 0.5], "seconds": [1.0, 2.0, 3.0, 4.0]}
    assert [time_to(curves, a) for a in (0.1, 0.4, 0.45, 0.6)] == [1.0, 2.0, 4.0, math.inf]


@pytest.mark.parametrize(("own", "plain"), [(LayerDampedKFAC, "kfac"), (LayerDampedTKFAC, "tkfac")])
def test_layers_are_damped_in_their_own_units(own, plain):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[3].weight.mul_(20)  # Layers of very different curvature.
    data = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.randint(4, (9,))
    structure = own(factored_damping=False)
    found = natgrad.fisher_matrix(model, data, structure=structure).inverse(0.3)
    matrix = natgrad.fisher_matrix(model, data, structure=plain)
    units = []
    for name, part in matrix.parts.items():
        dense = part.to_dense()
        units.append(float(dense.diagonal().mean()))
        damped = dense + 0.3 * units[-1] * torch.eye(len(dense), dtype=torch.float64)
        inverse = found.parts[name].to_dense()
        eye = torch.eye(len(dense), dtype=torch.float64)
        torch.testing.assert_close(inverse @ damped, eye, rtol=0, atol=1e-9)
    assert max(units) > 5 * min(units)


def test_damping_in_own_units_does_not_see_the_scale_of_the_loss():
    def step(scale: float) -> torch.Tensor:
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double()
        likelihood = natgrad.Gaussian(variance=1 / scale)
        optimizer = natgrad.TKFAC(
            model, likelihood, lr=1.0, momentum=0.0, damping=0.2, fisher="exact",
            structure=LayerDampedTKFAC(), step_rule=natgrad.StepRule(length="lr"),
        )  # fmt: skip
        x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
        before = model.weight.detach().clone()
        (scale * 0.5 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        return model.weight.detach() - before

    torch.testing.assert_close(step(100.0), step(1.0), rtol=1e-9, atol=0)


def test_the_trace_and_the_order_of_errors_hold_on_the_digits(monkeypatch):
    monkeypatch.setattr(gao, "CHECKPOINTS", (0, 2))
    monkeypatch.setattr(gao, "DRAWS", 1)
    only = {"VGG": lambda c, k, side: VGG(c, k, ((2,), (4,)), side)}
    monkeypatch.setattr(gao, "_matrix_networks", lambda setting: only)
    figures = gao.trace(Setting())
    assert CLAIMS["gao.trace"].verdict(figures) == "reproduced"
    assert figures["the same of K-FAC, VGG"] > 1e-3
    assert figures["the same with the source's coefficient of convolutions, VGG"] > 1e-3
    figures = gao.tekfac_error(Setting(seed=1))
    assert CLAIMS["gao.tekfac-error"].verdict(figures) == "reproduced"
    assert set(gao.tkfac_error(Setting(seed=1))) >= {"‖F − TKFAC‖ / ‖F − K-FAC‖, VGG after 2 steps"}


def test_the_source_s_coefficient_is_its_formula():
    torch.manual_seed(0)
    model, x = nn.Conv2d(1, 2, 2), torch.randn(5, 1, 3, 3)
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(8, 3, bias=False)).double()
    x = x.double()
    found = natgrad.fisher_matrix(
        model, (x, None), "gaussian", structure=gao._PositionsApart()
    ).parts["0"]
    patches = functional.unfold(x, 2)  # (N, 4, T)
    lam = patches.square().sum((1, 2)) + 4  # the bias sees a 1 at each of 4 positions
    gamma = model[2].weight.square().sum()  # of every sample: the layers above are linear
    torch.testing.assert_close(found.trace(), (lam * gamma).mean() / 4)


@pytest.fixture
def tiny(monkeypatch):
    """Two draws, two trials, one epoch of a small network."""
    few = {n: dataclasses.replace(m, trials=m.trials[:2]) for n, m in gao.METHODS.items()}
    monkeypatch.setattr(gao, "VGG_16", Race(lambda setting: small_task(1), few, 2))


def test_orders_compare_every_method_at_its_best_rate(tiny):
    setting = Setting()
    figures = gao.vgg_epochs(setting)
    losses = {m.title: figures[f"training loss of {m.title}"] for m in gao.METHODS.values()
              if "damping" not in m.title}  # fmt: skip
    assert figures["training loss, TEKFAC / SGD"] == [
        a / b for a, b in zip(losses["TEKFAC"], losses["SGD"], strict=True)
    ]
    parts = setting.parts
    searched = {rate: parts[f"sgd ({rate},) 0"]["loss"][-1] for rate in (0.02, 0.06)}
    assert figures["best rate of SGD"] == min(searched, key=searched.__getitem__)
    assert losses["SGD"][0] == parts[f"sgd ({figures['best rate of SGD']},) 1"]["loss"][-1]
    judged = [name for name in figures if CLAIMS["gao.vgg-epochs"].expectation(name)]
    assert len(judged) == 8
    # The same runs, read after equal time: all methods but the fastest have come less far.
    later = gao.vgg_seconds(Setting())
    assert later.keys() >= {f"seconds an epoch, {title}" for title in losses}
    # After one epoch there is no earlier figure to come from.
    assert later["training loss of SGD"] == losses["SGD"]


def test_ways_of_damping_are_compared(tiny):
    figures = gao.damping_vgg(Setting())
    final = {n: figures[f"final loss of {gao.METHODS[n].title}"] for n in ("tkfac-own", "kfac-one")}
    assert figures["training loss, TKFAC with own / K-FAC with one damping"] == [
        a / b for a, b in zip(final["tkfac-own"], final["kfac-one"], strict=True)
    ]
    assert figures["best share of TKFAC, own damping"] in (0.05, 0.2)
