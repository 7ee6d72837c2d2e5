"""Are predictions as sure as they should be? Promised against observed frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.arguments import check_integer


@dataclass(frozen=True)
class Calibration:
    """Frequencies that predictions promise, beside those observed.

    Attributes:
        promised: Mean confidence of each bin that has any predictions, or level of each interval,
            ``(B,)``, float64.
        observed: Share of predictions in it that are right, or of targets inside, ``(B,)``.
        counts: How many predictions each is about, ``(B,)``.
    """

    promised: Tensor
    observed: Tensor
    counts: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error, the mean of ``|observed − promised|`` by counts."""
        distances = (self.observed - self.promised).abs()
        return float((distances * self.counts).sum() / self.counts.sum())

    def plot(self, axes: Any = None, label: str | None = None) -> Any:
        """Draw observed against promised frequencies; on the diagonal all is as it should be.

        Args:
            axes: Matplotlib's axes; those of a new figure by default.
            label: For a legend.

        Returns:
            The axes.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError("plot() needs Matplotlib: pip install matplotlib") from error
            axes = Figure(figsize=(4.2, 4.2), layout="constrained").add_subplot()
        axes.plot([0.0, 1.0], [0.0, 1.0], color="0.6", linestyle=":")
        axes.plot(self.promised.tolist(), self.observed.tolist(), marker="o", label=label)
        axes.set_xlabel("promised")
        axes.set_ylabel("observed")
        return axes


def calibration(
    prediction: Tensor | tuple[Tensor, Tensor], targets: Tensor, bins: int = 15
) -> Calibration:
    """Return how well predictions are calibrated.

    Args:
        prediction: What ``predict`` of a posterior returns: probabilities of classes ``(N, C)``, of
            which the largest is the confidence; probabilities of binary outcomes, in the shape of
            the targets; or mean and variance of Gaussian outputs, whose central intervals are
            looked at.
        targets: Labels ``(N,)``, or outcomes or values in the shape of the predictions, of which
            those that are NaN are missing and do not count.
        bins: Bins of equal width for probabilities; levels ``1/(bins + 1), …`` of intervals.

    Raises:
        ValueError: If shapes do not go together, probabilities, labels or variances are none, there
            is nothing to count, or the number of bins is not positive.

    Source: Guo et al., On calibration of modern neural networks (2017); Kuleshov, Fenner & Ermon,
    Accurate uncertainties for deep learning using calibrated regression (2018).

    Example:
        >>> posterior = natgrad.Laplace(model, loader)
        >>> natgrad.laplace.calibration(posterior.predict(x), y).plot()
    """
    check_integer("bins", bins)
    if isinstance(prediction, tuple):
        return _of_intervals(*prediction, targets, bins)
    if targets.shape == prediction.shape:
        return _of_events(prediction.flatten(), targets.flatten(), bins)
    if prediction.dim() != 2 or targets.shape != prediction.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not go with predictions of shape "
            f"{tuple(prediction.shape)}: give labels (N,) for classes (N, C), or one each"
        )
    confidence, label = prediction.max(1)
    if not bool(((targets >= 0) & (targets < prediction.shape[1])).all()):
        raise ValueError(
            f"labels must be from 0 to {prediction.shape[1] - 1}: leave out samples without one"
        )
    return _of_events(confidence, label == targets, bins)


def _of_events(promised: Tensor, happened: Tensor, bins: int) -> Calibration:
    """Return means over bins of probabilities, of promises and of what happened."""
    promised, happened = promised.detach().double().cpu(), happened.double().cpu()
    known = ~happened.isnan()
    promised, happened = promised[known], happened[known]
    if not len(promised) or not bool(((promised >= 0) & (promised <= 1)).all()):
        raise ValueError(
            "calibration takes one or more predictions that are probabilities, from 0 to 1: those "
            "of logits are their softmax, or sigmoid"
        )
    place = (promised * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights, minlength=bins) for weights in (promised, happened)]
    some = counts > 0
    means = [total[some] / counts[some] for total in sums]
    return Calibration(means[0], means[1], counts[some])


def _of_intervals(mean: Tensor, variance: Tensor, targets: Tensor, levels: int) -> Calibration:
    """Return how many targets lie in central intervals that should have shares of them."""
    if targets.shape != mean.shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not go with predictions of shape "
            f"{tuple(mean.shape)}: they must be the same"
        )
    if not bool((variance > 0).all()):
        raise ValueError("calibration takes means and positive variances of Gaussian outputs")
    distance = ((targets - mean) / variance.sqrt()).detach().double().abs().flatten().cpu()
    distance = distance[~targets.isnan().flatten().cpu()]
    if not len(distance) or bool(distance.isnan().any()):
        raise ValueError("calibration takes means that are numbers, and targets that count")
    promised = torch.arange(1, levels + 1, dtype=torch.float64) / (levels + 1)
    inside = torch.special.erf(distance / 2**0.5)  # The level of the interval that just reaches it.
    observed = (inside <= promised.unsqueeze(1)).double().mean(1)
    return Calibration(promised, observed, torch.full((levels,), len(distance)))
