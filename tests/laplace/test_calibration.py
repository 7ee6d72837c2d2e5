"""Calibration against counting, one prediction after the other."""

from __future__ import annotations

import pytest
import torch

from natgrad.laplace import calibration
from tests.cases import generator


def counted(promised: list[float], happened: list[bool], bins: int) -> float:
    """Return the expected calibration error by going through all predictions."""
    total = 0.0
    for index in range(bins):
        inside = [
            (p, h) for p, h in zip(promised, happened, strict=True)
            if index <= p * bins < index + 1 or (p == 1 and index == bins - 1)
        ]  # fmt: skip
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            share = sum(h for _, h in inside) / len(inside)
            total += len(inside) * abs(mean - share)
    return total / len(promised)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_classes_and_binary_outcomes(bins):
    logits = 3.0 * torch.randn(300, 4, generator=generator(0))
    probabilities = torch.softmax(logits.double(), 1)
    probabilities[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    labels = torch.randint(0, 4, (300,), generator=generator(1))
    found = calibration(probabilities, labels, bins)
    confidence, chosen = probabilities.max(1)
    right = (chosen == labels).tolist()
    assert found.error == pytest.approx(counted(confidence.tolist(), right, bins))
    assert int(found.counts.sum()) == 300 and (found.counts > 0).all()
    outcomes = torch.randint(0, 2, (300, 4), generator=generator(2)).double()
    found = calibration(probabilities, outcomes, bins)
    flat = probabilities.flatten().tolist(), (outcomes == 1).flatten().tolist()
    assert found.error == pytest.approx(counted(*flat, bins))


def test_true_probabilities_are_calibrated():
    """Up to the spread of their frequencies."""
    probabilities = torch.rand(200_000, 1, generator=generator(0)).double()
    outcomes = (torch.rand(200_000, 1, generator=generator(1)) < probabilities).double()
    found = calibration(probabilities, outcomes, 10)
    spread = (found.promised * (1 - found.promised) / found.counts).sqrt()
    assert ((found.observed - found.promised).abs() < 5 * spread).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_intervals_of_gaussian_outputs(factor):
    """Those of a factor too narrow a variance hold ``erf(√factor · erf⁻¹(p))`` of the targets."""
    size = 100_000
    mean = torch.randn(size, 2, generator=generator(0)).double()
    deviation = 0.1 + torch.rand(size, 2, generator=generator(1)).double()
    noise = torch.randn(size, 2, generator=generator(2), dtype=torch.float64)
    prediction = mean, factor * deviation.square()
    found = calibration(prediction, mean + deviation * noise, 9)
    assert torch.equal(found.promised, torch.arange(1, 10).double() / 10)
    expected = torch.special.erf(factor**0.5 * torch.special.erfinv(found.promised))
    spread = (expected * (1 - expected) / (2 * size)).sqrt()
    assert ((found.observed - expected).abs() < 5 * spread).all()
    assert (found.error > 0.05) is (factor != 1.0)


def test_the_plot_shows_both_frequencies():
    pytest.importorskip("matplotlib")
    found = calibration(torch.tensor([[0.2, 0.8], [0.4, 0.6]]), torch.tensor([1, 0]), 5)
    axes = found.plot(label="posterior")
    diagonal, curve = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0.0, 1.0]
    assert list(curve.get_xdata()) == pytest.approx([0.6, 0.8])
    assert list(curve.get_ydata()) == [0.0, 1.0]
    assert found.plot(axes) is axes and len(axes.get_lines()) == 4


def test_wrong_shapes_are_named():
    for prediction, targets in (
        (torch.ones(3, 2) / 2, torch.zeros(2, dtype=torch.long)),
        ((torch.ones(3, 1), torch.ones(3, 1)), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="do not go with"):
            calibration(prediction, targets)
    with pytest.raises(ValueError, match="bins"):
        calibration(torch.ones(1, 1), torch.zeros(1, dtype=torch.long), 0)


def test_what_are_no_probabilities_labels_or_variances_is_refused():
    g = generator(0)
    logits, labels = 3.0 * torch.randn(20, 3, generator=g), torch.arange(20) % 3
    for wrong in (logits, logits * float("nan"), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="probabilities, from 0 to 1"):
            calibration(wrong, labels[: len(wrong)])
    with pytest.raises(ValueError, match="probabilities, from 0 to 1"):
        calibration(logits[:, 0], (logits[:, 1] > 0).float())
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match="labels must be from 0 to 2"):
            calibration(logits.softmax(1), labels.index_fill(0, torch.tensor([4]), wrong))
    mean = torch.zeros(5)
    for variance in (torch.zeros(5), -torch.ones(5), torch.full((5,), float("nan"))):
        with pytest.raises(ValueError, match="positive variances"):
            calibration((mean, variance), mean)
    with pytest.raises(ValueError, match="targets that count"):
        calibration((mean, torch.ones(5)), mean * float("nan"))


def test_missing_targets_do_not_count():
    g = generator(0)
    mean, variance = torch.randn(40, generator=g).double(), torch.rand(40, generator=g).double() + 1
    targets, outcomes = torch.randn(40, generator=g).double(), torch.rand(40, generator=g).round()
    kept = torch.arange(40) % 4 != 1
    missing = torch.where(kept, targets, float("nan"))
    found = calibration((mean, variance), missing)
    expected = calibration((mean[kept], variance[kept]), targets[kept])
    assert torch.equal(found.observed, expected.observed)
    assert torch.equal(found.counts, expected.counts)
    chances = mean.sigmoid().requires_grad_()
    found = calibration(chances, torch.where(kept, outcomes.double(), float("nan")))
    assert found.error == calibration(chances[kept], outcomes[kept].double()).error
